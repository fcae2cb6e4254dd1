"""A token stream: documents as token ids on disk, mapped into memory, each block under a checksum.

A stream is a folder: shards (data/shard.py), the tokenizer that made them, and `manifest.json`, which says what is in
it. The manifest holds the entries of the shards, the names of the sources, for a prepared stream a report of how it was
made (data/report.py), and its own fingerprint: the sha256 of everything else in it. So the fingerprint names the
content of the whole stream, and no bit changes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenmill.data.errors import DataError
from tokenmill.data.files import replace_file
from tokenmill.data.shard import AGAIN, KINDS, Shard, shard_file, token_dtype, verify_file
from tokenmill.data.tokenizer import MODEL_FILE, Tokenizer

MAGIC = "tokenmill token stream"
VERSION = 1
MANIFEST = "manifest.json"
LARGEST = 1 << 30  # bytes of a file that is read at once: the manifest of a stream of 50 TB
COUNT = range(1 << 63)
# What a manifest holds.
FORM = {
    "byte_order": str,
    "dtype": str,
    "tokenizer": {
        "name": str,
        "sha256": str,
        "vocab_size": range(1, 1 << 31),  # batches hold ids as int32
        "bos_id": range(1 << 31),
        "eos_id": range(1 << 31),
    },
    "sources": [str],
    "shards": [
        {
            "documents": COUNT,
            "tokens": COUNT,
            "silent": COUNT,
            "files": {kind: {"sha256": str, "crc32": [range(1 << 32)]} for kind in KINDS},
        }
    ],
}
# What those of some streams hold as well.
MORE = {
    "pairs": bool,
    "chat": {"template": str, "loss_on": str},
    "report": {
        **{key: {str: COUNT} for key in ("bytes", "duplicates", "contaminated")},
        **{key: [[str]] for key in ("duplicate_examples", "contaminated_examples")},
        "empty": ({str: COUNT},),
        "empty_examples": ([[str]],),
    },
}


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """The sha256 of all of a manifest but its fingerprint."""
    content = {key: value for key, value in manifest.items() if key != "fingerprint"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the stream in a folder. Raises DataError where there is none, it is of another version, was
    changed, or has not the form of one."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder}: no token stream here ({MANIFEST} is missing): make one with `tokenmill prepare`")
    if (size := path.stat().st_size) > LARGEST:
        raise DataError(f"{path}: {size} bytes, expected at most {LARGEST}: the file is damaged; {AGAIN}")
    try:
        manifest = json.loads(path.read_bytes())
        whole = isinstance(manifest, dict) and manifest.get("fingerprint") == fingerprint_of(manifest)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}): the file is damaged; {AGAIN}") from None
    if not isinstance(manifest, dict) or manifest.get("magic") != MAGIC:
        raise DataError(f"{path}: not the manifest of a token stream (magic is not {MAGIC!r}); {AGAIN}")
    if manifest.get("version") != VERSION:
        raise DataError(f"{path}: version {manifest.get('version')!r}, expected {VERSION}; {AGAIN}")
    if not whole:
        raise DataError(f"{path}: does not match its own fingerprint: the file was changed or damaged; {AGAIN}")
    if problem := _mismatch(manifest, FORM | {key: form for key, form in MORE.items() if key in manifest}):
        raise DataError(f"{path}: {problem.lstrip('.')}; {AGAIN}")
    return manifest


def _mismatch(value: Any, form: Any) -> str | None:
    """Where a value read from JSON is not of a form, and how; None where it is. A form is a type, a range of integers,
    a list with the form of every item, or a dictionary with the forms of some keys, or with that of every one for
    `str`; a form in a tuple is that of what may be missing."""
    kind = int if isinstance(form, range) else form if isinstance(form, type) else type(form)
    if type(value) is not kind:
        return f" is of a wrong type, {type(value).__name__}: expected {kind.__name__}"
    if isinstance(form, range) and value not in form:
        return f" is out of range: expected {form.start} to {form.stop - 1}"
    if isinstance(form, dict) and str in form:
        for key, item in value.items():
            if problem := _mismatch(item, form[str]):
                return f"[{key!r}]{problem}"
    elif isinstance(form, dict):
        for key, inner in form.items():
            if key not in value and not isinstance(inner, tuple):
                return f".{key} is missing"
            inner = inner[0] if isinstance(inner, tuple) else inner
            if key in value and (problem := _mismatch(value[key], inner)):
                return f".{key}{problem}"
    if isinstance(form, list):
        for i, item in enumerate(value):
            if problem := _mismatch(item, form[0]):
                return f"[{i}]{problem}"
    return None


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Give a folder's stream this manifest, and its fingerprint, in one step."""
    manifest = {**manifest, "fingerprint": fingerprint_of(manifest)}
    replace_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


class TokenStream:
    """Documents 0 to len(stream) of a token stream. `TokenStream.open` checks sizes and boundaries; `verify` reads
    everything."""

    def __init__(self, folder: Path, manifest: dict[str, Any], shards: list[Shard]) -> None:
        tokenizer = manifest["tokenizer"]
        self.folder = folder
        self.manifest = manifest
        self.name = folder.resolve().name
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer_name: str = tokenizer["name"]
        self.tokenizer_sha256: str = tokenizer["sha256"]
        self.vocab_size: int = tokenizer["vocab_size"]
        self.bos_id: int = tokenizer["bos_id"]
        self.eos_id: int = tokenizer["eos_id"]
        self.sources: list[str] = manifest["sources"]
        self.pairs: bool = manifest.get("pairs", False)  # each document is a preference pair (data/preference.py)
        self.shards = shards
        self.tokens = sum(len(shard.tokens) for shard in shards)
        offsets = [shard.offsets.astype(np.int64) for shard in shards]
        self.lengths: NDArray[np.int64] = np.concatenate([np.diff(o) for o in offsets])  # (N,)
        self.starts: NDArray[np.int64] = np.concatenate([o[:-1] for o in offsets])  # (N,) within the shard
        self.shard_ids: NDArray[np.int64] = np.repeat(np.arange(len(shards)), [len(o) - 1 for o in offsets])  # (N,)
        self.source_ids: NDArray[np.int32] = np.concatenate([s.sources for s in shards]).astype(np.int32)  # (N,)

    @staticmethod
    def open(folder: str | Path) -> TokenStream:
        """Map the stream in a folder.

        Raises DataError, naming the file, where it is not a stream, is of another version, or its sizes, boundaries
        or spans are not what the manifest and the format say.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        path = folder / MANIFEST
        vocab_size = manifest["tokenizer"]["vocab_size"]
        dtype = token_dtype(vocab_size)
        if manifest["byte_order"] != "little" or manifest["dtype"] != dtype.name:
            raise DataError(f"{path}: expected little-endian {dtype.name} tokens; {AGAIN}")
        if not manifest["shards"]:
            raise DataError(f"{path}: holds no shards; {AGAIN}")
        shards = [
            Shard.open(folder, i, entry, vocab_size, len(manifest["sources"]))
            for i, entry in enumerate(manifest["shards"])
        ]
        for i, shard in enumerate(shards):
            if manifest.get("pairs") and not shard.holds_pairs():
                path = shard_file(folder, i, "silent")
                raise DataError(f"{path}: spans are not those of preference pairs, two a document; {AGAIN}")
        return TokenStream(folder, manifest, shards)

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
            count[here] -= shard.silent_below(end[here]) - shard.silent_below(begin[here])
        return count

    def verify(self) -> None:
        """Read everything. Raises DataError naming the file and the block that is not as it was written."""
        for i, (entry, shard) in enumerate(zip(self.manifest["shards"], self.shards, strict=True)):
            for kind in KINDS:
                verify_file(shard_file(self.folder, i, kind), entry["files"][kind])
            if (largest := shard.largest()) >= self.vocab_size:
                raise DataError(
                    f"{shard.path}: holds token {largest}, outside the vocabulary of {self.vocab_size}; {AGAIN}"
                )
        tokenizer = self.tokenizer()
        for name in ("vocab_size", "bos_id", "eos_id"):
            if getattr(self, name) != getattr(tokenizer, name):
                raise DataError(
                    f"{self.folder / MANIFEST}: tokenizer.{name} is {getattr(self, name)}, in {MODEL_FILE} it is "
                    f"{getattr(tokenizer, name)}; {AGAIN}"
                )

    def tokenizer(self) -> Tokenizer:
        """The one that made this stream. Raises DataError where the folder has it no more."""
        model = self.folder / MODEL_FILE
        there = model.is_file() and model.stat().st_size <= LARGEST
        if not there or hashlib.sha256(model.read_bytes()).hexdigest() != self.tokenizer_sha256:
            raise DataError(f"{model}: not the tokenizer that made this stream; {AGAIN}")
        return Tokenizer.open(self.folder)

    def _locate(self, i: int) -> tuple[Shard, int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.folder}")
        start = int(self.starts[i])
        return self.shards[self.shard_ids[i]], start, start + int(self.lengths[i])
