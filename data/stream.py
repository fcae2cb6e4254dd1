"""A token stream: documents as token ids on disk, mapped into memory, each block under a checksum.

A stream is a folder. `manifest.json` says what is in it; each shard is four files of little-endian integers:

    00000.tokens    u16 where the vocabulary fits, else u32: the documents of the shard, end to end
    00000.offsets   u64, one more than documents: document i is tokens[offsets[i]:offsets[i + 1]]
    00000.silent    u64 pairs: spans of tokens that carry no loss, sorted, counted from the shard's first token
    00000.sources   u32, one a document: an index into the manifest's list of source names

The manifest holds the counts of each shard, the sha256 of each file and a crc32 for every MiB of it, and its own
fingerprint: the sha256 of everything else in it. So the fingerprint names the content of the whole stream, and no bit
changes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenmill.data.errors import DataError
from tokenmill.data.tokenizer import MODEL_FILE, Tokenizer

MAGIC = "tokenmill token stream"
VERSION = 1
BLOCK = 1 << 20  # bytes under one checksum
MANIFEST = "manifest.json"
KINDS = ("tokens", "offsets", "silent", "sources")
AGAIN = "prepare the stream again"


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """The sha256 of all of a manifest but its fingerprint."""
    content = {key: value for key, value in manifest.items() if key != "fingerprint"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Shard:
    """The arrays of one shard, mapped."""

    path: Path  # of the tokens
    tokens: NDArray[Any]  # (T,) uint16 or uint32
    offsets: NDArray[np.uint64]  # (N + 1,)
    silent: NDArray[np.uint64]  # (S, 2)
    sources: NDArray[np.uint32]  # (N,)
    crc32: list[int]  # of each block of the tokens
    checked: NDArray[np.bool_]  # (blocks,) those that `check` has read

    def check(self, begin: int, end: int) -> None:
        """That tokens [begin, end) are as they were written: each block is read and summed the first time that a
        token of it is wanted, so nothing damaged is trained on and nothing is read before it is needed.

        Raises DataError naming the file and the block.
        """
        width = self.tokens.itemsize
        for i in range(begin * width // BLOCK, (end * width - 1) // BLOCK + 1):
            if not self.checked[i]:
                block = self.tokens[i * BLOCK // width : (i + 1) * BLOCK // width]
                if zlib.crc32(block.data) != self.crc32[i]:
                    raise _damaged(self.path, i)
                self.checked[i] = True


class TokenStream:
    """Documents 0 to len(stream) of a token stream. `TokenStream.open` checks sizes and boundaries; `verify` reads
    everything."""

    def __init__(self, folder: Path, manifest: dict[str, Any], shards: list[Shard]) -> None:
        tokenizer = manifest["tokenizer"]
        self.folder = folder
        self.name = folder.resolve().name
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer_name: str = tokenizer["name"]
        self.tokenizer_sha256: str = tokenizer["sha256"]
        self.vocab_size: int = tokenizer["vocab_size"]
        self.bos_id: int = tokenizer["bos_id"]
        self.eos_id: int = tokenizer["eos_id"]
        self.sources: list[str] = manifest["sources"]
        self.shards = shards
        self.tokens = sum(len(shard.tokens) for shard in shards)
        offsets = [shard.offsets.astype(np.int64) for shard in shards]
        self.lengths: NDArray[np.int64] = np.concatenate([np.diff(o) for o in offsets])  # (N,)
        self.starts: NDArray[np.int64] = np.concatenate([o[:-1] for o in offsets])  # (N,) within the shard
        self.shard_ids: NDArray[np.int64] = np.repeat(np.arange(len(shards)), [len(o) - 1 for o in offsets])  # (N,)
        self.source_ids: NDArray[np.int32] = np.concatenate([s.sources for s in shards]).astype(np.int32)  # (N,)
        self._manifest = manifest

    @staticmethod
    def open(folder: str | Path) -> TokenStream:
        """Map the stream in a folder.

        Raises DataError, naming the file, where it is not a stream, is of another version, or its sizes, boundaries
        or spans are not what the manifest and the format say.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(
                f"{folder}: no token stream here ({MANIFEST} is missing): make one with `tokenmill prepare`"
            )
        try:
            manifest = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}): the file is damaged; {AGAIN}") from None
        if not isinstance(manifest, dict) or manifest.get("magic") != MAGIC:
            raise DataError(f"{path}: not the manifest of a token stream (magic is not {MAGIC!r}); {AGAIN}")
        if manifest.get("version") != VERSION:
            raise DataError(f"{path}: version {manifest.get('version')!r}, expected {VERSION}; {AGAIN}")
        if manifest.get("fingerprint") != fingerprint_of(manifest):
            raise DataError(f"{path}: does not match its own fingerprint: the file was changed or damaged; {AGAIN}")
        try:
            dtype = token_dtype(manifest["tokenizer"]["vocab_size"])
            if manifest["byte_order"] != "little" or manifest["dtype"] != dtype.name:
                raise DataError(f"{path}: expected little-endian {dtype.name} tokens; {AGAIN}")
            if not manifest["shards"]:
                raise DataError(f"{path}: holds no shards; {AGAIN}")
            shards = [_open_shard(folder, i, manifest) for i in range(len(manifest["shards"]))]
            return TokenStream(folder, manifest, shards)
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: is missing a field or has one of a wrong type ({error}); {AGAIN}") from None

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, i: int) -> NDArray[Any]:
        """(L,) uint16 or uint32: the ids of document i, read-only, mapped.

        Raises IndexError, and DataError where they are damaged.
        """
        shard, start, end = self._locate(i)
        shard.check(start, end)
        return shard.tokens[start:end]

    def loss_mask(self, i: int) -> NDArray[np.float32]:
        """(L,) float32: the weight of each token of document i as a target, 1 or 0. Raises IndexError."""
        shard, start, end = self._locate(i)
        mask = np.ones(end - start, np.float32)
        first = np.searchsorted(shard.silent[:, 1], start, side="right")
        last = np.searchsorted(shard.silent[:, 0], end, side="left")
        for span_begin, span_end in shard.silent[first:last].astype(np.int64):
            mask[max(span_begin - start, 0) : span_end - start] = 0.0
        return mask

    def loss_tokens(self, documents: ArrayLike, begin: ArrayLike, end: ArrayLike) -> NDArray[np.int64]:
        """(P,) int64: how many of the tokens [begin, end) of each document carry loss. All arguments (P,)."""
        documents = np.asarray(documents, np.int64)
        begin = self.starts[documents] + np.asarray(begin, np.int64)
        end = self.starts[documents] + np.asarray(end, np.int64)
        count = end - begin
        for i, shard in enumerate(self.shards):
            here = self.shard_ids[documents] == i
            count[here] -= _silent_below(shard, end[here]) - _silent_below(shard, begin[here])
        return count

    def verify(self) -> None:
        """Read everything. Raises DataError naming the file and the block that is not as it was written."""
        for i, entry in enumerate(self._manifest["shards"]):
            for kind in KINDS:
                _verify_file(_shard_file(self.folder, i, kind), entry["files"][kind])
            largest = max((int(block.max()) for block in _blocks(self.shards[i].tokens)), default=0)
            if largest >= self.vocab_size:
                raise DataError(
                    f"{_shard_file(self.folder, i, 'tokens')}: holds token {largest}, "
                    f"outside the vocabulary of {self.vocab_size}; {AGAIN}"
                )
        model = self.folder / MODEL_FILE
        if not model.is_file() or hashlib.sha256(model.read_bytes()).hexdigest() != self.tokenizer_sha256:
            raise DataError(f"{model}: not the tokenizer that made this stream; {AGAIN}")

    def _locate(self, i: int) -> tuple[Shard, int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.folder}")
        start = int(self.starts[i])
        return self.shards[self.shard_ids[i]], start, start + int(self.lengths[i])


def _shard_file(folder: Path, shard: int, kind: str) -> Path:
    return folder / f"{shard:05d}.{kind}"


def _open_shard(folder: Path, index: int, manifest: dict[str, Any]) -> Shard:
    """Map a shard's files, sizes and order checked."""
    entry = manifest["shards"][index]
    documents, tokens = entry["documents"], entry["tokens"]

    def map_file(kind: str, dtype: np.dtype | str, count: int) -> NDArray[Any]:
        path = _shard_file(folder, index, kind)
        if not path.is_file():
            raise DataError(f"{path}: missing; {AGAIN}")
        actual, expected = path.stat().st_size, count * np.dtype(dtype).itemsize
        if actual != expected:
            raise DataError(f"{path}: {actual} bytes, expected {expected}: the file is truncated or changed; {AGAIN}")
        return np.memmap(path, dtype, mode="r") if actual else np.empty(0, dtype)

    files = entry["files"]
    blocks = len(files["tokens"]["crc32"])
    shard = Shard(
        path=_shard_file(folder, index, "tokens"),
        crc32=files["tokens"]["crc32"],
        checked=np.zeros(blocks, np.bool_),
        tokens=map_file("tokens", token_dtype(manifest["tokenizer"]["vocab_size"]), tokens),
        offsets=map_file("offsets", "<u8", documents + 1),
        silent=map_file("silent", "<u8", 2 * entry["silent"]).reshape(-1, 2),
        sources=map_file("sources", "<u4", documents),
    )
    offsets, silent = shard.offsets, shard.silent
    ordered = documents > 0 and offsets[0] == 0 and offsets[-1] == tokens and bool(np.all(offsets[1:] > offsets[:-1]))
    if not ordered or np.diff(offsets).min() < 2:
        raise DataError(
            f"{_shard_file(folder, index, 'offsets')}: boundaries are not from 0 to {tokens} with 2 tokens or more "
            f"a document; {AGAIN}"
        )
    if len(silent) and (
        np.any(silent[:, 0] >= silent[:, 1]) or np.any(silent[1:, 0] < silent[:-1, 1]) or silent[-1, 1] > tokens
    ):
        raise DataError(f"{_shard_file(folder, index, 'silent')}: spans are not sorted within {tokens} tokens; {AGAIN}")
    if shard.sources.max() >= len(manifest["sources"]):
        raise DataError(
            f"{_shard_file(folder, index, 'sources')}: names source {shard.sources.max()} of "
            f"{len(manifest['sources'])}; {AGAIN}"
        )
    for kind in ("offsets", "silent", "sources"):  # small beside the tokens, and read whole here anyway
        _verify_file(_shard_file(folder, index, kind), files[kind])
    return shard


def _silent_below(shard: Shard, token: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of a shard's tokens before each given one carry no loss."""
    silent = shard.silent.astype(np.int64)
    ends = np.concatenate([[0], silent[:, 1]])
    before = np.concatenate([[0], np.cumsum(silent[:, 1] - silent[:, 0])])
    spans = np.searchsorted(silent[:, 0], token, side="left")  # begun before the token, the last may go beyond it
    return before[spans] - np.maximum(ends[spans] - token, 0)


def _blocks(array: NDArray[Any]) -> list[NDArray[Any]]:
    return [array[i : i + BLOCK] for i in range(0, len(array), BLOCK)]


def _verify_file(path: Path, facts: dict[str, Any]) -> None:
    whole = hashlib.sha256()
    with path.open("rb") as file:
        for i, expected in enumerate(facts["crc32"]):
            block = file.read(BLOCK)
            whole.update(block)
            if zlib.crc32(block) != expected:
                raise _damaged(path, i)
        whole.update(file.read(1))  # a byte beyond the last block
    if whole.hexdigest() != facts["sha256"]:
        raise DataError(f"{path}: does not match its sha256: the file was changed; {AGAIN}")


def _damaged(path: Path, block: int) -> DataError:
    return DataError(
        f"{path}: block {block} (from byte {block * BLOCK}) does not match its checksum: the file is damaged; {AGAIN}"
    )


class _BlockFile:
    """A file being written, and what the manifest will say of it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._pending = bytearray()
        self._sha256 = hashlib.sha256()
        self._crc32: list[int] = []

    def write(self, array: NDArray[Any]) -> None:
        self._pending += array.tobytes()
        while len(self._pending) >= BLOCK:
            self._flush(BLOCK)

    def finish(self) -> dict[str, Any]:
        """Write what is left, wait until it is on the disk, and say what the file holds."""
        if self._pending:
            self._flush(len(self._pending))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"sha256": self._sha256.hexdigest(), "crc32": self._crc32}

    def close(self) -> None:
        self._file.close()

    def _flush(self, size: int) -> None:
        block = bytes(self._pending[:size])
        del self._pending[:size]
        self._file.write(block)
        self._sha256.update(block)
        self._crc32.append(zlib.crc32(block))


class StreamWriter:
    """Writes a stream beside its final place and moves it there when the `with` block ends; an exception leaves
    nothing behind.

    Raises DataError where the folder already exists (unless `overwrite`, and it is a token stream), where a document
    has fewer than 2 tokens or an id outside the vocabulary, and at the end where there was no document.
    """

    def __init__(
        self, folder: str | Path, tokenizer: Tokenizer, *, overwrite: bool = False, shard_tokens: int = 1 << 28
    ) -> None:
        self.folder = Path(folder)
        empty = self.folder.is_dir() and not any(self.folder.iterdir())  # as good as none
        if self.folder.exists() and not overwrite and not empty:
            raise DataError(f"{self.folder}: already exists: choose another folder, or overwrite it (--overwrite)")
        if self.folder.exists() and not empty and not (self.folder / MANIFEST).is_file():
            raise DataError(f"{self.folder}: exists and is not a token stream, so it will not be overwritten")
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._shard_tokens = shard_tokens
        self._temporary = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")
        self._sources: dict[str, int] = {}
        self._shards: list[dict[str, Any]] = []
        self._files: dict[str, _BlockFile] = {}
        self._documents = self._tokens = self._silent = 0  # of the shard being written

    def __enter__(self) -> StreamWriter:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        return self

    def add(self, tokens: Sequence[int] | NDArray[Any], mask: ArrayLike | None = None, *, source: str) -> None:
        """Append a document: its ids (L,), BOS and EOS included, and where given a mask (L,), 0 on tokens without loss.
        The stream is opened with `sources[source_ids[i]] == source`."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or len(ids) < 2:
            raise DataError(f"a document of {ids.size} tokens: at least 2 are needed for one to predict another")
        if ids.dtype.kind not in "iu":
            raise DataError(f"a document of {ids.dtype} values: token ids must be integers")
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or largest >= self._tokenizer.vocab_size:
            raise DataError(
                f"token id {smallest if smallest < 0 else largest} is outside the vocabulary of "
                f"{self._tokenizer.vocab_size} of tokenizer {self._tokenizer.name!r}"
            )
        if not self._files:
            self._begin_shard()
        if mask is not None:
            loss = np.asarray(mask) != 0
            if loss.shape != ids.shape:
                raise DataError(f"a mask of shape {loss.shape} for a document of {len(ids)} tokens")
            edges = np.flatnonzero(np.diff(np.concatenate([[True], loss, [True]])))
            self._files["silent"].write((edges + self._tokens).astype("<u8"))
            self._silent += len(edges) // 2
        self._files["tokens"].write(ids.astype(self._dtype))
        self._tokens += len(ids)
        self._documents += 1
        self._files["offsets"].write(np.array([self._tokens], "<u8"))
        self._files["sources"].write(np.array([self._sources.setdefault(source, len(self._sources))], "<u4"))
        if self._tokens >= self._shard_tokens:
            self._end_shard()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for file in self._files.values():
                file.close()
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _begin_shard(self) -> None:
        index = len(self._shards)
        self._files = {kind: _BlockFile(_shard_file(self._temporary, index, kind)) for kind in KINDS}
        self._files["offsets"].write(np.array([0], "<u8"))
        self._documents = self._tokens = self._silent = 0

    def _end_shard(self) -> None:
        files = {kind: file.finish() for kind, file in self._files.items()}
        self._shards.append(
            {"documents": self._documents, "tokens": self._tokens, "silent": self._silent, "files": files}
        )
        self._files = {}

    def _finish(self) -> None:
        if self._files:
            self._end_shard()
        if not self._shards:
            raise DataError(f"{self.folder}: no documents to write: the corpus is empty")
        tokenizer = self._tokenizer
        manifest: dict[str, Any] = {
            "magic": MAGIC,
            "version": VERSION,
            "byte_order": "little",
            "dtype": self._dtype.name,
            "tokenizer": {
                "name": tokenizer.name,
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "bos_id": tokenizer.bos_id,
                "eos_id": tokenizer.eos_id,
            },
            "sources": list(self._sources),
            "shards": self._shards,
        }
        manifest["fingerprint"] = fingerprint_of(manifest)
        _write_synced(self._temporary / MODEL_FILE, tokenizer.model)
        _write_synced(self._temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync_folder(self._temporary)
        if self.folder.exists():  # a folder cannot be replaced in one step: move the old one away first
            old = self._temporary.with_suffix(".old")
            self.folder.rename(old)
            self._temporary.rename(self.folder)
            shutil.rmtree(old)
        else:
            self._temporary.rename(self.folder)
        _sync_folder(self.folder.parent)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
