"""What all making of data by a model shares: prompts with places, a report of what became of the answers, and rows."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tokenmill.data.dedupe import Dedupe, SeenKeys, keys
from tokenmill.data.errors import DataError
from tokenmill.data.files import replace_file
from tokenmill.data.journal import Answer, Journal, Request


class Report:
    """Counts of what was asked and made, of what was dropped by reason, and an example of each reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # in the order in which they are printed
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.notes: list[str] = []

    def drop(self, reason: str, example: str) -> None:
        self.dropped[reason] += 1
        self.examples.setdefault(reason, excerpt(example))

    def answered(self, answer: Answer, requests: str) -> None:
        """Count an answer to one of such requests."""
        self.counts[requests] += 1
        if answer.refused:
            self.drop("refused", answer.refused)

    def used(self, journal: Journal) -> None:
        """Note how many answers are new."""
        self.notes.append(f"{journal.asked:,} requests made, {journal.known:,} answers from {journal.path}")

    def __str__(self) -> str:
        lines = [f"{name:<18} {count:,}" for name, count in self.counts.items()]
        for reason, count in self.dropped.items():
            lines.append(f"{count:,} dropped, {reason}, such as {self.examples[reason]}")
        return "\n".join([*lines, *self.notes])


def excerpt(text: str) -> str:
    """The beginning of a text in one printable line."""
    return repr(" ".join(text.split())[:160])


def spoken(answer: Answer) -> str:
    """What an answer says, without the thoughts of a reasoning model before it."""
    return answer.text.rpartition("</think>")[2].strip()


def read_prompt(file: str | Path, *places: str) -> str:
    """The prompt in a text file, which has these places. Raises DataError where there is none, or it lacks one."""
    if not Path(file).is_file():
        raise DataError(f"{file}: no such prompt: expected a text file")
    try:
        prompt = Path(file).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}): convert the file") from None
    check_prompt(prompt, *places, where=str(file))
    return prompt


def check_prompt(prompt: str, *places: str, where: str = "the prompt") -> None:
    """Raises DataError where a prompt lacks one of its places."""
    for place in places:
        if f"{{{place}}}" not in prompt:
            raise DataError(f"{where}: has no {{{place}}}: write it where that is to stand")


def fill(prompt: str, **values: str) -> str:
    """A prompt with a value in each `{place}`; other braces stay as they are, also those in values."""
    return re.sub(rf"\{{({'|'.join(values)})\}}", lambda match: values[match[1]], prompt)


def request(name: str, text: str, max_tokens: int, temperature: float, seed: int) -> Request:
    """A request of one user's message."""
    return Request(name, ({"role": "user", "content": text},), max_tokens, temperature, seed)


def journal_path(output: Path) -> Path:
    """Where the answers are kept that an output is made of: under a name that `prepare` does not take for text."""
    return output.with_name(f"{output.name}.journal")


def check_output(output: Path, overwrite: bool) -> None:
    """Raises DataError where rows cannot be written to a file of this name."""
    if output.suffix != ".jsonl":
        raise DataError(f"{output}: expected a name that ends in .jsonl")
    if not output.parent.is_dir():
        raise DataError(f"{output}: there is no folder {output.parent}: make it first")
    if output.is_dir() or (output.exists() and not overwrite):
        raise DataError(f"{output}: already exists: choose another name, or overwrite it (--overwrite)")


def write_rows(rows: Sequence[dict[str, str]], output: Path, dedupe: Dedupe, report: Report) -> None:
    """Write Alpaca rows but those that repeat an earlier one. Raises DataError where there is none."""
    texts = ["\n".join((row["instruction"], row["input"], row["output"])) for row in rows]
    new = SeenKeys().first(keys(texts, dedupe))
    for text, is_new in zip(texts, new.tolist(), strict=True):
        if not is_new:
            report.drop("like an earlier row", text)
    kept = [row for row, is_new in zip(rows, new.tolist(), strict=True) if is_new]
    if not kept:
        said = "; ".join(f"{reason}: {example}" for reason, example in report.examples.items())
        raise DataError(f"{output}: nothing to write: no answer was of use ({said or 'there was none'})")
    report.counts["rows written"] = len(kept)
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    replace_file(output, content)
