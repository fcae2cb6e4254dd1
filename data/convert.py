"""Token files of other trainers to a token stream, and a stream to Megatron's.

Megatron's indexed dataset is two files. `PREFIX.bin` holds sequences of ids, end to end; `PREFIX.idx`, little-endian:

    9 bytes   "MMIDIDX\\0\\0"
    u64       version, 1
    u8        type of the ids: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16
    u64, u64  sequences S, and entries of the last array, one more than documents
    i32 (S,)  ids of each sequence
    i64 (S,)  where each begins, in bytes: not before the end of the one before
    i64       documents, as the number of their first sequence, and at the end S

`.npy` files and other `.bin` files are ids alone; a document ends with the tokenizer's EOS, or begins with its BOS.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from tokenmill.data.errors import DataError
from tokenmill.data.files import naming, sync
from tokenmill.data.shard import Documents, token_dtype
from tokenmill.data.stream import TokenStream
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.data.writer import StreamWriter

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
BATCH = 1 << 22  # ids at a time


def import_tokens(
    path: str | Path,
    tokenizer: Tokenizer | str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    delimiter: Literal["bos", "eos"] = "eos",
) -> TokenStream:
    """A token file to the stream `output`: `PREFIX.bin` beside `PREFIX.idx` (or either's name), `.npy`, or ids alone,
    of type `dtype` (None: u16 where the vocabulary fits, else u32), of which `delimiter` ends ("eos") or begins ("bos")
    each document. Ids stay as they are, nothing is put around them.

    A document of a single token has nothing to predict: such are left out, and their number is said on stderr, as it is
    where ids alone hold no delimiter. Raises DataError where the file is not of its format, or holds an id outside the
    vocabulary; and where neither its name nor `dtype` says that it holds ids.
    """
    path = Path(path)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.open(tokenizer)
    index = path.with_suffix(".idx") if path.suffix in (".bin", ".idx") else Path(f"{path}.idx")
    if index.is_file():
        batches = _megatron(index)
    elif not path.is_file():
        raise DataError(f"{path}: no such file")
    elif path.suffix not in (".bin", ".npy") and dtype is None:
        raise DataError(
            f"{path}: expected .bin, .npy or Megatron's .idx: if it holds ids alone, name their type (--dtype)"
        )
    else:
        ids = _ids(path, np.dtype(dtype) if dtype else token_dtype(tokenizer.vocab_size))
        batches = _flat(path, ids, delimiter, getattr(tokenizer, f"{delimiter}_id"))
    short = 0
    with StreamWriter(output, tokenizer) as writer:
        for ids, lengths in batches:
            none = np.empty((0, 2), np.int64)
            documents = Documents(ids, lengths, none, np.zeros(len(lengths), np.int64), [path.stem])
            short += int((lengths < 2).sum())
            writer.add_documents(documents.kept(lengths > 1))
    if short:
        print(f"{path}: {short:,} documents of fewer than 2 tokens left out", file=sys.stderr)
    return TokenStream.open(output)


def _ids(path: Path, dtype: np.dtype) -> NDArray[Any]:
    """(T,) the ids in a file, mapped."""
    if path.suffix == ".npy":
        try:
            ids = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise DataError(f"{path}: cannot be read as .npy ({error})") from None
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(f"{path}: holds {ids.dtype} of shape {ids.shape}, expected integers in one dimension")
        return ids
    size = path.stat().st_size
    if not size or size % dtype.itemsize:
        raise DataError(f"{path}: {size} bytes are not a number of {dtype} ids: name their type (--dtype)")
    return np.memmap(path, dtype, mode="r")


def _flat(
    path: Path, ids: NDArray[Any], delimiter: Literal["bos", "eos"], token: int
) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
    """Ids alone in batches of whole documents: ids and lengths. What is before the first BOS or after the last EOS is a
    document too."""
    begin, found = 0, False  # the document in work, which may be far longer than a batch
    for start in range(0, len(ids), BATCH):
        at = np.flatnonzero(ids[start : start + BATCH] == token)
        found |= len(at) > 0
        ends = at + start + (delimiter == "eos")
        ends = ends[ends > begin]
        if len(ends):
            yield ids[begin : ends[-1]], np.diff(ends, prepend=begin)
            begin = int(ends[-1])
    if begin < len(ids):
        yield ids[begin:], np.array([len(ids) - begin])
    if len(ids) and not found:
        other = "bos" if delimiter == "eos" else "eos"
        remedy = f"taken for one document; are they delimited otherwise (--delimiter {other})?"
        print(f"{path}: holds no {delimiter.upper()} ({token}): {len(ids):,} ids are {remedy}", file=sys.stderr)


def _megatron(index: Path) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
    """An indexed dataset in batches of whole documents: ids and lengths."""
    data = index.with_suffix(".bin")
    content = np.memmap(index, np.uint8, mode="r") if index.stat().st_size else np.empty(0, np.uint8)
    at = 0

    def read(dtype: str, count: int) -> NDArray[Any]:
        nonlocal at
        size = np.dtype(dtype).itemsize * count
        if size > len(content) - at:
            raise DataError(f"{index}: ends before its {count:,} entries at byte {at}: the file is truncated")
        at += size
        return np.frombuffer(content[at - size : at].tobytes(), dtype)

    if bytes(content[: len(MAGIC)]) != MAGIC:
        raise DataError(f"{index}: not the index of a Megatron dataset (it begins otherwise)")
    at = len(MAGIC)
    version, code = int(read("<u8", 1)[0]), int(read("u1", 1)[0])
    if version != 1 or code not in DTYPES:
        raise DataError(f"{index}: version {version}, type {code}: expected version 1 and a type of {list(DTYPES)}")
    sequences, entries = (int(count) for count in read("<u8", 2))
    lengths, pointers, documents = read("<i4", sequences), read("<i8", sequences), read("<i8", entries)
    width = np.dtype(DTYPES[code]).itemsize
    if not data.is_file():
        raise DataError(f"{data}: missing beside {index.name}")
    size = data.stat().st_size
    if np.any(lengths < 0) or np.any(pointers < 0) or np.any(pointers % width):
        raise DataError(f"{index}: holds a length or a place that is below 0 or between two ids")
    if np.any(pointers > size) or np.any(lengths.astype(np.int64) * width > size - pointers):
        raise DataError(f"{index}: names ids beyond the end of {data.name} ({size:,} bytes)")
    if np.any(before := pointers[1:] < pointers[:-1] + lengths[:-1].astype(np.int64) * width):
        raise DataError(
            f"{index}: sequence {before.argmax() + 1} begins before the end of the one before it: the file is damaged"
        )
    if not entries or documents[0] != 0 or documents[-1] != sequences or np.any(np.diff(documents) < 0):
        raise DataError(f"{index}: documents are not from sequence 0 to {sequences}")
    ids = np.memmap(data, DTYPES[code], mode="r") if size else np.empty(0, DTYPES[code])
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[documents]  # ids before each document
    first = 0
    while first < entries - 1:
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + BATCH, side="right")) - 1)
        run = range(int(documents[first]), int(documents[last]))
        parts = [ids[pointers[i] // width : pointers[i] // width + lengths[i]] for i in run]
        yield np.concatenate([ids[:0], *parts]), np.diff(ends[first : last + 1])
        first = last


def export_megatron(stream: str | Path, prefix: str | Path) -> None:
    """A stream to `PREFIX.bin` and `PREFIX.idx`, each document a sequence; `.idx`, which is read first, appears last.

    Loss masks and sources have no place there: where tokens are without loss, it is said on stderr. Raises DataError
    where the stream is damaged or holds preference pairs, or one of the files exists.
    """
    source = TokenStream.open(stream)
    if source.pairs:
        raise DataError(f"{stream}: holds preference pairs, which Megatron's files have no form for")
    data, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (data, index):
        if path.exists():
            raise DataError(f"{path}: already exists: choose another name")
    dtype = source.shards[0].tokens.dtype
    code = 8 if dtype.itemsize == 2 else 4  # Megatron has no u32; ids fit i32
    index.parent.mkdir(parents=True, exist_ok=True)
    temporary = index.with_name(f".{index.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        with naming(data), (temporary / "bin").open("wb") as file:
            for shard in source.shards:
                shard.check(0, len(shard.tokens))
                file.write(shard.tokens.data)
        with naming(index), (temporary / "idx").open("wb") as file:
            _write_index(file, source.lengths, code, dtype.itemsize)
        for name, path in (("bin", data), ("idx", index)):
            sync(temporary / name)
            (temporary / name).rename(path)
        sync(index.parent)
    finally:
        shutil.rmtree(temporary)
    if silent := sum(int(shard.silent_below(np.array([len(shard.tokens)]))[0]) for shard in source.shards):
        print(f"{index}: {silent:,} tokens carry no loss in the stream, and do here", file=sys.stderr)


def _write_index(file: BinaryIO, lengths: NDArray[np.int64], code: int, width: int) -> None:
    file.write(MAGIC)
    file.write(np.uint64(1).tobytes() + np.uint8(code).tobytes())
    file.write(np.array([len(lengths), len(lengths) + 1], "<u8").tobytes())
    file.write(lengths.astype("<i4").tobytes())
    file.write(((np.cumsum(lengths) - lengths) * width).astype("<i8").tobytes())
    file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
