"""Text files to a token stream, and a page on what a stream holds.

Inputs are read line by line: `.txt` (a file is a document), `.jsonl` and `.jsonl.gz` (a row is a document). A row is
plain text (`{"text": ...}`), an Alpaca row (`{"instruction", "input", "output"}`) or a conversation
(`{"messages": [...]}`); the last two carry loss on the answers only.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from tokenmill.data.chat import Message, alpaca_messages, parse, render
from tokenmill.data.errors import DataError
from tokenmill.data.stream import StreamWriter, TokenStream
from tokenmill.data.tokenizer import Tokenizer

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer | str | Path,
    output: str | Path,
    *,
    text_key: str = "text",
    source: str | None = None,
    template: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> TokenStream:
    """Tokenise files into the stream `output`, a folder that appears whole or not at all.

    A plain document is BOS, its text, EOS; a conversation is rendered with `template` (data/chat.py). Documents keep
    the order of the inputs. `source` names where they came from, each file's own name without its suffix if None.

    Raises DataError naming file, line and key where an input cannot be used; nothing is skipped in silence.
    """
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.open(tokenizer)
    paths = _paths(inputs)
    size = sum(path.stat().st_size for path in paths)
    with (
        StreamWriter(output, tokenizer, overwrite=overwrite) as writer,
        tqdm(total=size, unit="B", unit_scale=True, desc="prepare", disable=not progress) as bar,
    ):
        for path in paths:
            name = source or path.name.removesuffix(_suffix(path) or "")
            with path.open("rb") as file:
                done = 0
                for where, row in _rows(path, file, text_key):
                    try:
                        ids, mask = _encode(row, tokenizer, text_key, template)
                        writer.add(ids, mask, source=name)
                    except DataError as error:
                        raise DataError(f"{where}: {error}") from None
                    bar.update(file.tell() - done)
                    done = file.tell()
    return TokenStream.open(output)


def read_texts(inputs: Sequence[str | Path], text_key: str = "text") -> Iterator[str]:
    """Every text in the inputs, conversations a message each: what a tokenizer is trained on.

    Raises DataError as `prepare` does.
    """
    for path in _paths(inputs):
        with path.open("rb") as file:
            for where, row in _rows(path, file, text_key):
                try:
                    content = _content(row, text_key)
                    system, turns = (content, []) if isinstance(content, str) else parse(content)
                except DataError as error:
                    raise DataError(f"{where}: {error}") from None
                yield from filter(None, (system, *(turn["content"] for turn in turns)))


def inspect(folder: str | Path) -> str:
    """What a stream holds, as text to print: counts, tokenizer, sources, lengths, and the beginning of a document."""
    stream = TokenStream.open(folder)
    documents = len(stream)
    loss = int(stream.loss_tokens(np.arange(documents), np.zeros(documents, np.int64), stream.lengths).sum())
    lines = [
        f"token stream  {stream.folder}",
        f"fingerprint   {stream.fingerprint}",
        f"documents     {documents:,}",
        f"tokens        {stream.tokens:,} ({loss / stream.tokens:.1%} with loss)",
        f"vocabulary    {stream.vocab_size:,} ({stream.shards[0].tokens.dtype})",
        f"tokenizer     {stream.tokenizer_name} (BOS {stream.bos_id}, EOS {stream.eos_id}, "
        f"sha256 {stream.tokenizer_sha256[:16]})",
        "sources",
    ]
    for i, name in enumerate(stream.sources):
        of_source = stream.source_ids == i
        lines.append(f"  {name}: {of_source.sum():,} documents, {stream.lengths[of_source].sum():,} tokens")
    lines.append(
        f"lengths       {stream.lengths.min():,} to {stream.lengths.max():,}, "
        f"median {int(np.median(stream.lengths)):,}, mean {stream.lengths.mean():,.1f}"
    )
    exponents = np.frexp(stream.lengths - 1)[1]  # lengths above 2**(e - 1), up to 2**e
    counts = np.bincount(exponents)
    for exponent in range(exponents.min(), len(counts)):
        bar = "#" * int(np.ceil(40 * counts[exponent] / counts.max()))
        lines.append(f"  up to {1 << exponent:>9,} {counts[exponent]:>12,} {bar}")
    excerpt = Tokenizer.open(stream.folder).decode(stream.document(0)[:200])
    lines += ["first document", "  " + " ".join(excerpt.split())[:300]]
    return "\n".join(lines)


def _paths(inputs: Sequence[str | Path]) -> list[Path]:
    paths = [Path(path) for path in inputs]
    if not paths:
        raise DataError("no input files: pass at least one .txt, .jsonl or .jsonl.gz file")
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: {'is a folder: pass its files' if path.is_dir() else 'no such file'}")
        if _suffix(path) is None:
            raise DataError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    return paths


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in reversed(SUFFIXES) if path.name.endswith(suffix)), None)


def _rows(path: Path, file: IO[bytes], text_key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, and where each is for a message. Raises DataError where one cannot be read."""
    if _suffix(path) == ".txt":
        yield str(path), {text_key: _text(str(path), file.read())}
        return
    lines = gzip.GzipFile(fileobj=file) if _suffix(path) == ".jsonl.gz" else file
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            text = _text(where, line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error}): expected one object a line") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}: a {type(row).__name__}, expected an object such as {{{text_key!r}: ...}}")
            yield where, row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: not whole as gzip ({error}): get the file again") from None


def _text(where: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}): convert the file") from None


def _encode(
    row: Mapping[str, Any], tokenizer: Tokenizer, text_key: str, template: str
) -> tuple[list[int], list[int] | None]:
    """The ids of a row, and its loss mask, None where all tokens carry loss."""
    content = _content(row, text_key)
    if isinstance(content, str):
        return [tokenizer.bos_id, *tokenizer.encode(content), tokenizer.eos_id], None
    return render(content, tokenizer, template)


def _content(row: Mapping[str, Any], text_key: str) -> str | Sequence[Message]:
    """What a row holds: a text, or the messages of a conversation."""
    if text_key in row:
        text = row[text_key]
        if not isinstance(text, str):
            raise DataError(f"{text_key!r} is a {type(text).__name__}, expected a string")
        if not text.strip():
            raise DataError(f"{text_key!r} is empty")
        return text
    if "messages" in row:
        return row["messages"]
    if "instruction" in row and "output" in row:
        return alpaca_messages(row)
    found = ", ".join(map(repr, row)) or "none"
    raise DataError(
        f"no key {text_key!r}, 'messages', or 'instruction' with 'output' (found {found}): "
        "name the key of the text (--text-key)"
    )
