"""The files that text is read from: which they are, their content in pieces of whole documents, and the rows in one.

| suffix | a document is |
| --- | --- |
| `.txt` | the file |
| `.jsonl` | a line: `{"text": ...}`, preferences (data/preference.py), or a conversation (data/chat.py) |
| `.parquet` | a row with the same keys as columns |

The first two may be compressed (`.gz`, `.zst`). A conversation is `{"messages": [...]}`, OpenAI's; `{"conversations":
[...]}`, ShareGPT's; or Alpaca's `instruction`, `input` and `output`; with `system` beside these, if there is a prompt.
A row with a conversation or preferences is that, even if it has a text as well, which often is the same put together;
where the key of the text is named, the text.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, cast

from tokenmill.data.chat import Message, alpaca_messages, parse, sharegpt_messages, with_system
from tokenmill.data.errors import DataError
from tokenmill.data.preference import Pair, is_pair, parse_pair

SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
TEXT_KEY = "text"  # where no other is named
PIECE = 1 << 20  # bytes of content to a piece, or one document where it is larger
PACKAGES = {".zst": "zstandard", ".parquet": "pyarrow"}


@dataclass(frozen=True)
class Input:
    """A file, and the name of the source that its documents are of."""

    path: Path
    source: str
    size: int  # bytes on the disk


@dataclass(frozen=True)
class Piece:
    """Whole documents of one file, in its order."""

    input: Input
    first: int  # the number of its first line or row, from 1
    content: Any  # bytes, or of a .parquet file a pyarrow.RecordBatch
    size: int  # bytes of the content
    end: int  # bytes of the file read so far


def find_inputs(inputs: Sequence[str | Path]) -> list[Input]:
    """The files that are meant: a file; a folder, whose files with a known suffix are taken, also those in its folders;
    a pattern such as `web/**/*.jsonl`; each may have a name before it, as in `web=crawl/*.jsonl`.

    A file's source is that name, or of a folder the folder's, or the file's own without its suffix. Files of a folder
    or a pattern are sorted. Raises DataError where one is missing, empty, of an unknown kind or given twice, or needs a
    package that is not installed.
    """
    if not inputs:
        raise DataError(f"no input files: pass files ({', '.join(SUFFIXES)}), folders or patterns")
    found: dict[Path, Input] = {}  # by the path that all spellings of it have
    for given in map(str, inputs):
        name, _, place = given.rpartition("=") if not Path(given).exists() else ("", "", given)
        places = [Path(place)] if Path(place).exists() else [Path(p) for p in sorted(glob.glob(place, recursive=True))]
        if not places:
            raise DataError(f"{place}: no such file{' matches' if glob.has_magic(place) else ''}")
        for path in places:
            files = [path]
            if path.is_dir():
                files = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file))
                if not files:
                    raise DataError(f"{path}: holds no file that ends in {', '.join(SUFFIXES)}")
            for file in files:
                if first := found.get(file.resolve()):
                    raise DataError(f"{first.path}: is given twice, also by {given!r}")
                own = path.resolve().name if path.is_dir() else file.name.removesuffix(_suffix(file) or "")
                found[file.resolve()] = _input(file, name or own)
    return list(found.values())


def _input(path: Path, source: str) -> Input:
    suffix = _suffix(path)
    if suffix is None:
        raise DataError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    package = PACKAGES.get(path.suffix)
    if package and find_spec(package) is None:
        raise DataError(f"{path}: needs the package {package}, not installed: pip install 'tokenmill[data]'")
    size = path.stat().st_size
    if not size:
        raise DataError(f"{path}: is empty")
    return Input(path, source, size)


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def pieces(file: Input, keys: Sequence[str] | None = None) -> Iterator[Piece]:
    """The content of a file, cut between documents. Of a table, only the columns `keys`, if any is there, are read.

    Raises DataError where the file cannot be read to its end.
    """
    return _parquet_pieces(file, keys) if file.path.suffix == ".parquet" else _text_pieces(file)


def _text_pieces(file: Input) -> Iterator[Piece]:
    whole = (_suffix(file.path) or "").startswith(".txt")
    first = 1
    kind, damage = "text", ()
    with file.path.open("rb") as raw:
        content: IO[bytes] = raw
        if file.path.suffix == ".gz":
            kind, damage = "gzip", (EOFError, gzip.BadGzipFile, zlib.error)
            content = cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        elif file.path.suffix == ".zst":
            import zstandard

            kind, damage = "zstd", (EOFError, zstandard.ZstdError)
            content = io.BufferedReader(_ZstdFile(raw), PIECE)
        try:
            while data := content.read() if whole else content.read(PIECE) + content.readline():
                yield Piece(file, first, data, len(data), min(raw.tell(), file.size))
                first += data.count(b"\n") or 1
        except damage as error:
            raise DataError(f"{file.path}:{first}: not whole as {kind} ({error}): get the file again") from None
    if first == 1:
        raise DataError(f"{file.path}: is empty")


class _ZstdFile(io.RawIOBase):
    """The content of a zstd file of one or more frames. zstandard's own reader takes a file that is cut short for one
    that ends there; this one raises EOFError."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw = raw
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._begun = False  # whether the frame has got any data
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not self._ready:
            if self._frame.eof:
                data, self._frame, self._begun = self._frame.unused_data, self._new(), False
            data = data or self._raw.read(1 << 17)
            if not data:
                if self._begun:
                    raise EOFError("the file ends before the data does")
                return 0
            self._ready, self._begun = memoryview(self._frame.decompress(data)), True
            data = b""
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _parquet_pieces(file: Input, keys: Sequence[str] | None) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    first = 1
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            columns = [name for name in table.schema_arrow.names if name in (keys or ())] or None
            groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
            total = sum(group.total_byte_size for group in groups)
            count = table.metadata.num_rows
            for batch in table.iter_batches(max(1, PIECE * count // max(total, 1)), columns=columns):
                end = file.size * (first - 1 + batch.num_rows) // count
                yield Piece(file, first, batch, batch.nbytes, end)
                first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path}: cannot be read as parquet from row {first} on ({error})") from None
    if first == 1:
        raise DataError(f"{file.path}: is empty")


def rows(piece: Piece, text_key: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows in a piece, and where each is for a message; of a .txt, one with its text under the key that `content`
    will look for. Raises DataError where one cannot be read."""
    text_key = text_key or TEXT_KEY
    path = piece.input.path
    if path.suffix == ".parquet":
        for number, row in enumerate(piece.content.to_pylist(), piece.first):
            # A column is there for every row: null stands for a key that a row does not have.
            yield f"{path}: row {number}", {key: value for key, value in row.items() if value is not None}
        return
    try:
        text = piece.content.decode("utf-8")
        if piece.first == 1:
            text = text.removeprefix("\ufeff")  # which some editors put before a text
    except UnicodeDecodeError as error:
        before = piece.content[: error.start]
        where, byte = str(path), error.start
        if not _is_text(path):
            line = piece.first + before.count(b"\n")
            where, byte = f"{path}:{line}", byte - (before.rfind(b"\n") + 1)
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {byte}): convert the file") from None
    if _is_text(path):
        yield str(path), {text_key: text}
        return
    for number, line in enumerate(text.split("\n"), piece.first):
        if not line or line.isspace():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}): expected one object a line") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: a {type(row).__name__}, expected an object such as {{{text_key!r}: ...}}")
        yield where, row


def _is_text(path: Path) -> bool:
    return (_suffix(path) or "").startswith(".txt")


def content(row: Mapping[str, Any], text_key: str | None = None) -> str | Pair | Sequence[Message]:
    """What a row holds: a text, a preference pair, or the messages of a conversation. Of several, the text where
    `text_key` names it; else the text, under the key "text", comes last, which may be empty. Raises DataError where it
    holds none."""
    row = {key: value for key, value in row.items() if value is not None}  # as in a table, null stands for no such key
    if text_key in row:
        return _text(row, text_key)
    if is_pair(row):  # before messages, which such rows repeat the chosen ones in
        return parse_pair(row)
    if "messages" in row:
        return with_system(row["messages"], row)
    if "conversations" in row:
        return sharegpt_messages(row)
    if "instruction" in row and "output" in row:
        return alpaca_messages(row)
    if text_key is None and TEXT_KEY in row:
        return _text(row, TEXT_KEY)
    found = ", ".join(map(repr, row)) or "none"
    raise DataError(
        f"no key {text_key or TEXT_KEY!r}, 'messages', 'conversations', 'instruction' with 'output', or 'chosen' with "
        f"'rejected' (found {found}): name the key of the text (--text-key)"
    )


def _text(row: Mapping[str, Any], key: str) -> str:
    text = row[key]
    if not isinstance(text, str):
        raise DataError(f"{key!r} is a {type(text).__name__}, expected a string")
    return text


def texts(content: str | Pair | Sequence[Message]) -> list[str]:
    """The texts in what a row holds: itself, or the system prompt and each turn. Raises DataError as `parse` does."""
    if isinstance(content, str):
        return [content]
    if isinstance(content, Pair):
        return content.texts()
    system, turns = parse(content)
    return [text for text in (system, *(turn.text for turn in turns)) if text]


def utf8_size(text: str) -> int:
    """The bytes of a text. Raises DataError where it is not valid Unicode."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:  # a lone surrogate, which JSON can smuggle in
        raise DataError(f"{text[:40]!r}: holds half of a surrogate pair, which is not text") from None


def read_texts(inputs: Sequence[str | Path], text_key: str | None = None) -> Iterator[str]:
    """Every text in the inputs but empty ones, conversations a message each: what a tokenizer is trained on.

    Raises DataError naming file, line and key where one cannot be used.
    """
    for file in find_inputs(inputs):
        for piece in pieces(file):
            for where, row in rows(piece, text_key):
                try:
                    found = texts(content(row, text_key))
                    utf8_size("".join(found))
                except DataError as error:
                    raise DataError(f"{where}: {error}") from None
                yield from filter(str.strip, found)
