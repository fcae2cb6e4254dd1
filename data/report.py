"""What a stream holds and what was left out of it: the report that is kept in a manifest, and a page to print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokenmill.data.errors import DataError
from tokenmill.data.shard import AGAIN
from tokenmill.data.stream import TokenStream

EXAMPLES = 5  # of each kind that are kept


@dataclass
class Report:
    """Counts by source. An example is where a document that was left out is, and a line on it."""

    bytes: Counter[str] = field(default_factory=Counter)  # of text, in UTF-8, of the documents that were kept
    duplicates: Counter[str] = field(default_factory=Counter)  # documents removed
    contaminated: Counter[str] = field(default_factory=Counter)  # documents removed
    empty: Counter[str] = field(default_factory=Counter)  # documents removed
    duplicate_examples: list[list[str]] = field(default_factory=list)
    contaminated_examples: list[list[str]] = field(default_factory=list)
    empty_examples: list[list[str]] = field(default_factory=list)

    def removed(self) -> list[tuple[str, Counter[str], list[list[str]]]]:
        """What was left out: what that is called, how many documents, and examples."""
        return [
            ("duplicates", self.duplicates, self.duplicate_examples),
            ("contaminated", self.contaminated, self.contaminated_examples),
            ("empty", self.empty, self.empty_examples),
        ]

    @staticmethod
    def load(values: Mapping[str, Any]) -> Report:
        """A report as `asdict` made it; what else is in it is of another version."""
        known = {key: values[key] for key in vars(Report()) if key in values}
        loaded: dict[str, Any] = {k: Counter(v) if isinstance(v, dict) else list(v) for k, v in known.items()}
        return Report(**loaded)

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return {key: dict(value) if isinstance(value, dict) else list(value) for key, value in vars(self).items()}


def joined(reports: Iterable[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The report of several streams together, None where one has none."""
    total = Report()
    for values in reports:
        if values is None:
            return None
        report = Report.load(values)
        total.bytes += report.bytes
        for (_, removed, examples), (_, more, others) in zip(total.removed(), report.removed(), strict=True):
            removed.update(more)
            examples += others[: EXAMPLES - len(examples)]
    return total.asdict()


def inspect(folder: str | Path) -> str:
    """What a stream holds, as text to print: counts, tokenizer, sources, lengths, what was left out, and the beginning
    of a document. Raises DataError where the stream cannot be opened, or a part that is read for that is damaged."""
    stream = TokenStream.open(folder)
    documents = len(stream)
    loss = int(stream.loss_tokens(np.arange(documents), np.zeros(documents, np.int64), stream.lengths).sum())
    report = Report.load(stream.manifest.get("report") or {})
    lines = [
        f"token stream  {stream.folder}",
        f"fingerprint   {stream.fingerprint}",
        f"documents     {documents:,}",
        f"tokens        {stream.tokens:,} ({loss / stream.tokens:.1%} with loss)",
    ]
    if stream.pairs:
        lines.append(_pairs(stream))
    if chat := stream.manifest.get("chat"):
        lines.append(f"conversations {rendering(chat)}")
    if report.bytes:
        size = report.bytes.total()
        lines.append(f"text          {size:,} bytes, {size / stream.tokens:.2f} a token")
    lines += [
        f"vocabulary    {stream.vocab_size:,} ({stream.shards[0].tokens.dtype})",
        f"tokenizer     {stream.tokenizer_name} (BOS {stream.bos_id}, EOS {stream.eos_id}, "
        f"sha256 {stream.tokenizer_sha256[:16]})",
        "sources",
    ]
    counts = np.bincount(stream.source_ids, minlength=len(stream.sources))
    tokens = np.bincount(stream.source_ids, stream.lengths, len(stream.sources))
    for name in dict.fromkeys([*stream.sources, *(name for _, removed, _ in report.removed() for name in removed)]):
        i = stream.sources.index(name) if name in stream.sources else None
        n, t = (0, 0) if i is None else (int(counts[i]), int(tokens[i]))
        line = f"  {name}: {n:,} documents, {t:,} tokens"
        if name in report.bytes and t:
            line += f", {report.bytes[name] / t:.2f} bytes a token"
        for what, removed, _ in report.removed():
            line += f", {removed[name]:,} {what} removed" if removed[name] else ""
        lines.append(line)
    lines += _lengths(stream)
    for what, removed, examples in report.removed():
        if removed:
            lines.append(f"{what + ' removed':<21} {removed.total():,}, such as")
            lines += [f"  {': '.join(example)}" for example in examples]
    tokenizer, ids = stream.tokenizer(), stream.document(0)[:200]
    if ids.max() >= tokenizer.vocab_size:
        problem = f"holds token {ids.max()}, outside the vocabulary of {tokenizer.vocab_size}"
        raise DataError(f"{stream.shards[0].path}: {problem}; {AGAIN}")
    excerpt = tokenizer.decode(ids)
    lines += ["first document", "  " + " ".join(excerpt.split())[:300]]
    return "\n".join(lines)


def rendering(chat: Mapping[str, str]) -> str:
    """How a stream's conversations were rendered, from its manifest."""
    return f"template {chat['template']} and loss on {'every' if chat['loss_on'] == 'all' else 'the last'} answer"


def _pairs(stream: TokenStream) -> str:
    silent = np.concatenate([shard.silent for shard in stream.shards]).astype(np.int64)
    silent = silent.reshape(-1, 2, 2)
    prompt, copy = (silent[:, i, 1] - silent[:, i, 0] for i in (0, 1))  # of a prompt the last token is there twice
    chosen = silent[:, 1, 0] - silent[:, 0, 1]
    rejected = stream.lengths - prompt - chosen - copy
    return (
        f"preferences   every document is a pair: {prompt.sum():,} tokens of prompts, {chosen.sum():,} of chosen and "
        f"{rejected.sum():,} of rejected answers"
    )


def _lengths(stream: TokenStream) -> list[str]:
    lengths = stream.lengths
    lines = [
        f"lengths       {lengths.min():,} to {lengths.max():,}, "
        f"median {int(np.median(lengths)):,}, mean {lengths.mean():,.1f}"
    ]
    exponents = np.frexp(lengths - 1)[1]  # lengths above 2**(e - 1), up to 2**e
    counts = np.bincount(exponents)
    for exponent in range(exponents.min(), len(counts)):
        bar = "#" * int(np.ceil(40 * counts[exponent] / counts.max()))
        lines.append(f"  up to {1 << exponent:>9,} {counts[exponent]:>12,} {bar}")
    return lines
