"""A shard of a token stream: four files of little-endian integers, written once, then mapped into memory.

    00000.tokens    u16 where the vocabulary fits, else u32: the documents of the shard, end to end
    00000.offsets   u64, one more than documents: document i is tokens[offsets[i]:offsets[i + 1]]
    00000.silent    u64 pairs: spans of tokens that carry no loss, sorted, counted from the shard's first token
    00000.sources   u32, one a document: an index into the stream's list of source names

A shard's *entry*, in the stream's manifest, holds its counts, the sha256 of each file and a crc32 for every MiB of it.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenmill.data.errors import DataError
from tokenmill.data.files import naming

BLOCK = 1 << 20  # bytes under one checksum
KINDS = ("tokens", "offsets", "silent", "sources")
AGAIN = "prepare the stream again"


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_file(folder: Path, shard: int, kind: str) -> Path:
    """Where a file of a shard is."""
    return folder / f"{shard:05d}.{kind}"


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

    @staticmethod
    def open(folder: Path, index: int, entry: dict[str, Any], vocab_size: int, sources: int) -> Shard:
        """Map a shard of a stream that names so many `sources`.

        Raises DataError, naming the file, where its sizes, boundaries or spans are not what its entry, which has the
        form of one, and the format say.
        """
        documents, tokens, files = entry["documents"], entry["tokens"], entry["files"]

        def map_file(kind: str, dtype: np.dtype | str, count: int) -> NDArray[Any]:
            path = shard_file(folder, index, kind)
            if not path.is_file():
                raise DataError(f"{path}: missing; {AGAIN}")
            actual, expected = path.stat().st_size, count * np.dtype(dtype).itemsize
            if actual != expected:
                raise DataError(
                    f"{path}: {actual} bytes, expected {expected}: the file is truncated or changed; {AGAIN}"
                )
            # A plain array over the map: to index a memmap costs several times what it costs to index that.
            return np.asarray(np.memmap(path, dtype, mode="r")) if actual else np.empty(0, dtype)

        shard = Shard(
            path=shard_file(folder, index, "tokens"),
            crc32=files["tokens"]["crc32"],
            checked=np.zeros(len(files["tokens"]["crc32"]), np.bool_),
            tokens=map_file("tokens", token_dtype(vocab_size), tokens),
            offsets=map_file("offsets", "<u8", documents + 1),
            silent=map_file("silent", "<u8", 2 * entry["silent"]).reshape(-1, 2),
            sources=map_file("sources", "<u4", documents),
        )
        if len(shard.crc32) != (blocks := -(-shard.tokens.nbytes // BLOCK)):
            raise DataError(f"{shard.path}: has {blocks} blocks and {len(shard.crc32)} checksums; {AGAIN}")
        offsets, silent = shard.offsets, shard.silent
        ordered = documents > 0 and offsets[0] == 0 and offsets[-1] == tokens and np.all(offsets[1:] > offsets[:-1])
        if not ordered or np.diff(offsets).min() < 2:
            raise DataError(
                f"{shard_file(folder, index, 'offsets')}: boundaries are not from 0 to {tokens} with 2 tokens or more "
                f"a document; {AGAIN}"
            )
        if len(silent) and (
            np.any(silent[:, 0] >= silent[:, 1]) or np.any(silent[1:, 0] < silent[:-1, 1]) or silent[-1, 1] > tokens
        ):
            path = shard_file(folder, index, "silent")
            raise DataError(f"{path}: spans are not sorted within {tokens} tokens; {AGAIN}")
        if shard.sources.max() >= sources:
            path = shard_file(folder, index, "sources")
            raise DataError(f"{path}: names source {shard.sources.max()} of {sources}; {AGAIN}")
        for kind in ("offsets", "silent", "sources"):  # small beside the tokens, and read whole here anyway
            verify_file(shard_file(folder, index, kind), files[kind])
        return shard

    def holds_pairs(self) -> bool:
        """Whether its documents are preference pairs (data/preference.py): each has two spans without loss, the prompt
        at its beginning and one token between the answers."""
        if len(self.silent) != 2 * (len(self.offsets) - 1):
            return False
        (prompt, answer), (answer_end, rejected) = self.silent.reshape(-1, 2, 2).transpose(1, 2, 0)
        begins = (prompt == self.offsets[:-1]) & (answer < answer_end)
        return bool(np.all(begins & (rejected == answer_end + 1) & (rejected < self.offsets[1:])))

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

    def largest(self) -> int:
        """The largest token."""
        return max(int(self.tokens[i : i + BLOCK].max()) for i in range(0, len(self.tokens), BLOCK))

    def silent_below(self, token: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of the tokens before each given one carry no loss."""
        silent = self.silent.astype(np.int64)
        ends = np.concatenate([[0], silent[:, 1]])
        before = np.concatenate([[0], np.cumsum(silent[:, 1] - silent[:, 0])])
        spans = np.searchsorted(silent[:, 0], token, side="left")  # begun before the token, the last may go beyond it
        return before[spans] - np.maximum(ends[spans] - token, 0)


def verify_file(path: Path, facts: dict[str, Any]) -> None:
    """Read a file of a shard. Raises DataError naming the block that is not as its entry says."""
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


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents to write, end to end."""

    tokens: NDArray[Any]  # (T,) ids, BOS and EOS included
    lengths: NDArray[np.int64]  # (N,)
    silent: NDArray[np.int64]  # (S, 2) spans of tokens without loss, sorted, each within one document
    source_ids: NDArray[np.int64]  # (N,) indices into the names
    sources: list[str]

    def kept(self, keep: NDArray[np.bool_]) -> Documents:
        """Those of the documents (N,) that are True."""
        if keep.all():
            return self
        ends = np.cumsum(self.lengths)
        of_span = np.searchsorted(ends, self.silent[:, 0], side="right")
        gone = np.cumsum(np.where(keep, 0, self.lengths))
        return Documents(
            self.tokens[np.repeat(keep, self.lengths)],
            self.lengths[keep],
            (self.silent - gone[of_span, None])[keep[of_span]],
            self.source_ids[keep],
            self.sources,
        )


def silent_spans(mask: ArrayLike) -> NDArray[np.int64]:
    """(S, 2) where a mask (L,) is 0: begin and end of each run."""
    loss = np.asarray(mask) != 0
    return np.flatnonzero(np.diff(np.concatenate([[True], loss, [True]]))).reshape(-1, 2)


class ShardWriter:
    """Writes the files of one shard."""

    def __init__(self, folder: Path, index: int, dtype: np.dtype) -> None:
        self.tokens = 0
        self._documents = self._silent = 0
        self._dtype = dtype
        self._files = {kind: BlockFile(shard_file(folder, index, kind)) for kind in KINDS}
        self._files["offsets"].write(np.zeros(1, "<u8"))

    def add(self, documents: Documents, source_ids: NDArray[np.int64]) -> None:
        """Append documents, of which source_ids (N,) are the stream's."""
        self._files["tokens"].write(documents.tokens.astype(self._dtype))
        self._files["offsets"].write((np.cumsum(documents.lengths) + self.tokens).astype("<u8"))
        self._files["silent"].write((documents.silent + self.tokens).astype("<u8"))
        self._files["sources"].write(source_ids.astype("<u4"))
        self.tokens += len(documents.tokens)
        self._documents += len(documents.lengths)
        self._silent += len(documents.silent)

    def finish(self) -> dict[str, Any]:
        """Wait until all is on the disk. Returns the shard's entry."""
        files = {kind: file.finish() for kind, file in self._files.items()}
        return {"documents": self._documents, "tokens": self.tokens, "silent": self._silent, "files": files}

    def close(self) -> None:
        """Leave the files as they are."""
        for file in self._files.values():
            file.close()


class BlockFile:
    """A file being written, and what a shard's entry will say of it."""

    def __init__(self, path: Path) -> None:
        self._path = path
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
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return {"sha256": self._sha256.hexdigest(), "crc32": self._crc32}

    def close(self) -> None:
        with suppress(OSError):  # of a full disk, which was reported when it was met
            self._file.close()

    def _flush(self, size: int) -> None:
        block = bytes(self._pending[:size])
        del self._pending[:size]
        with naming(self._path):
            self._file.write(block)
        self._sha256.update(block)
        self._crc32.append(zlib.crc32(block))
