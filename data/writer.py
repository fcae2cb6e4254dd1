"""Writing a token stream: beside its final place, in shards, and into its place in one step at the end."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenmill.data.errors import DataError
from tokenmill.data.files import lock, replace_file, sync
from tokenmill.data.merge import add_shards, check_tokenizer
from tokenmill.data.shard import KINDS, Documents, ShardWriter, shard_file, silent_spans, token_dtype
from tokenmill.data.stream import (
    MAGIC,
    MANIFEST,
    VERSION,
    TokenStream,
    fingerprint_of,
    read_manifest,
    write_manifest,
)
from tokenmill.data.tokenizer import MODEL_FILE, Tokenizer


class StreamWriter:
    """Writes a stream beside its final place and moves it there when the `with` block ends.

    An exception leaves nothing behind, and neither it nor a kill changes a stream that is there. With `job`, a text
    that names what is being written, the finished shards are kept where something other than the documents stopped the
    work: a later writer for the same job goes on after them, and `state` is what `checkpoint` returned at the last.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: Tokenizer,
        *,
        overwrite: bool = False,
        append: bool = False,
        shard_tokens: int = 1 << 26,
        job: str | None = None,
        checkpoint: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """A shard ends with the documents that bring it to `shard_tokens`; then `checkpoint` is called.

        Raises DataError where the folder already exists, unless it is a token stream, and `overwrite` or, with the same
        tokenizer, `append` is given; with the latter also where there is none.
        """
        self.folder = Path(folder)
        self._tokenizer = tokenizer
        self._overwrite = overwrite
        self._append = append
        self._base = self._read_base()
        self.partial = self.folder.with_name(f".{self.folder.name}.partial")  # what is in work; the caller's too
        self.state: dict[str, Any] | None = None
        self.done = False  # whether all was appended before, and only the end of the process was missing
        self.report: dict[str, Any] | None = None  # to be kept in the manifest
        # What the documents have in common; where there are some already, that which these have.
        self.pairs: bool | None = None  # whether they are preference pairs
        self.chat: dict[str, str] | None = None  # how conversations are rendered
        self._stream = self.partial / "stream"
        self._progress = self.partial / "progress.json"
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._shard_tokens = shard_tokens
        self._job = job
        self._checkpoint = checkpoint
        self._sources: dict[str, int] = {}
        self._shards: list[dict[str, Any]] = []
        self._shard: ShardWriter | None = None

    def __enter__(self) -> StreamWriter:
        self._lock = self._lock_partial()
        try:
            self._base = self._read_base()  # again: until now another writer may have changed it
            self._begin()
        except BaseException:
            with suppress(OSError):  # work begun stays
                self.partial.rmdir()
            os.close(self._lock)
            raise
        return self

    def _read_base(self) -> dict[str, Any] | None:
        """The manifest of the stream that is appended to, if one is. Raises DataError where there must be no stream, or
        not the one there is."""
        if not self._append:
            _check_free(self.folder, self._overwrite)
            return None
        base = read_manifest(self.folder)
        check_tokenizer(self.folder, base, self._tokenizer.name, self._tokenizer.sha256)
        return base

    def _lock_partial(self) -> int:
        """A descriptor of `partial` with its lock, which the system lets go however the process ends."""
        while True:
            self.partial.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.partial, os.O_RDONLY)
            if not lock(descriptor):
                os.close(descriptor)
                raise DataError(f"{self.folder}: is being written by another process")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), self.partial.stat()):
                    return descriptor
            os.close(descriptor)  # of a folder that another writer has removed as it ended

    def _begin(self) -> None:
        """Go on after the shards of an earlier writer for this job, or make room for the first."""
        if self._base is not None:
            self.pairs, self.chat = self._base.get("pairs", False), self._base.get("chat")
        progress = self._load_progress()
        before = self._base and self._base["fingerprint"]
        self.done = before is not None and (progress.get("job"), progress.get("after")) == (self._job, before)
        if self.done:
            pass
        elif self._stream.is_dir() and (progress.get("job", ""), progress.get("before")) == (self._job, before):
            self._shards, self.state = progress["shards"], progress["state"]
            self._sources = {name: i for i, name in enumerate(progress["sources"])}
            done = {shard_file(self._stream, i, kind) for i in range(len(self._shards)) for kind in KINDS}
            for file in set(self._stream.iterdir()) - done:
                file.unlink()
        else:
            if progress and progress["job"] != self._job:
                print(f"{self.folder}: the inputs or arguments are not those of the work begun: anew", file=sys.stderr)
            for path in self.partial.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._stream.mkdir()

    def add(self, tokens: Sequence[int] | NDArray[Any], mask: ArrayLike | None = None, *, source: str) -> None:
        """Append a document: its ids (L,), BOS and EOS included, and where given a mask (L,), 0 on tokens without loss.
        The stream is opened with `sources[source_ids[i]] == source`. Raises DataError as `add_documents` does."""
        ids = np.asarray(tokens)
        if ids.ndim != 1:
            raise DataError(f"a document of shape {ids.shape}: expected a list of ids")
        silent = np.empty((0, 2), np.int64)
        if mask is not None:
            silent = silent_spans(mask)
            if np.shape(mask) != ids.shape:
                raise DataError(f"a mask of shape {np.shape(mask)} for a document of {len(ids)} tokens")
        self.add_documents(Documents(ids, np.array([len(ids)]), silent, np.zeros(1, np.int64), [source]))

    def add_documents(self, documents: Documents) -> None:
        """Append documents. Raises DataError where one has fewer than 2 tokens or an id outside the vocabulary."""
        lengths, ids = documents.lengths, documents.tokens
        if not len(lengths):
            return
        if lengths.min() < 2:
            raise DataError(f"a document of {lengths.min()} tokens: at least 2 are needed for one to predict another")
        if ids.dtype.kind not in "iu":
            raise DataError(f"a document of {ids.dtype} values: token ids must be integers")
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or largest >= self._tokenizer.vocab_size:
            raise DataError(
                f"token id {smallest if smallest < 0 else largest} is outside the vocabulary of "
                f"{self._tokenizer.vocab_size} of tokenizer {self._tokenizer.name!r}"
            )
        names, first = np.unique(documents.source_ids, return_index=True)
        number = np.zeros(len(documents.sources), np.int64)
        for i in names[np.argsort(first)]:
            number[i] = self._sources.setdefault(documents.sources[i], len(self._sources))
        if self._shard is None:
            self._shard = ShardWriter(self._stream, len(self._shards), self._dtype)
        self._shard.add(documents, number[documents.source_ids])
        if self._shard.tokens >= self._shard_tokens:
            self._end_shard()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException as error:
            kind = type(error)
            raise
        finally:
            if self._shard is not None:
                self._shard.close()
            # What is done is of use where another attempt can end differently with the same documents.
            if kind is None or issubclass(kind, DataError) or self._job is None or not self._shards:
                shutil.rmtree(self.partial, ignore_errors=True)
            os.close(self._lock)

    def _end_shard(self) -> None:
        assert self._shard is not None
        self._shards.append(self._shard.finish())
        self._shard = None
        if self._job is not None:
            sync(self._stream)
            self._save_progress(after=None)

    def _save_progress(self, after: str | None) -> None:
        """What a later writer needs; `before` and `after` are the fingerprints of a stream that is appended to."""
        progress = {
            "job": self._job,
            "before": self._base and self._base["fingerprint"],
            "after": after,
            "shards": self._shards,
            "sources": list(self._sources),
            "state": self._checkpoint(),
        }
        replace_file(self._progress, json.dumps({**progress, "fingerprint": fingerprint_of(progress)}).encode())

    def _load_progress(self) -> dict[str, Any]:
        """What `_save_progress` saved; nothing where it did not, or the file is damaged."""
        if not self._progress.is_file():
            return {}
        try:
            progress = json.loads(self._progress.read_bytes())
            if progress["fingerprint"] == fingerprint_of(progress):
                return progress
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        print(f"{self._progress}: is damaged: the work begun is done anew", file=sys.stderr)
        return {}

    def _finish(self) -> None:
        if self.done:
            return
        if self._shard is not None:
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
        if self.pairs:
            manifest["pairs"] = True
        if self.chat is not None:
            manifest["chat"] = self.chat
        if self.report is not None:
            manifest["report"] = self.report
        replace_file(self._stream / MODEL_FILE, tokenizer.model)
        write_manifest(self._stream, manifest)
        TokenStream.open(self._stream)  # what cannot be opened does not take the place of what can, or join it
        if self._read_base() != self._base:  # by something that has no need of the lock
            raise DataError(f"{self.folder}: was changed as documents for it were prepared: append them again")
        if self._base is not None:
            joined = add_shards(self.folder, self._base, [self._stream])
            self._save_progress(after=fingerprint_of(joined))
            write_manifest(self.folder, joined)
            return
        if self.folder.exists():  # a folder cannot be replaced in one step: move the old one away first
            self.folder.rename(self.partial / "old")
        self._stream.rename(self.folder)
        sync(self.folder.parent)


def _check_free(folder: Path, overwrite: bool) -> None:
    """Raises DataError where a stream must not be put in a folder."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):  # an empty one is as good as none
        return
    if not overwrite:
        raise DataError(f"{folder}: already exists: choose another folder, or overwrite it (--overwrite)")
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder}: exists and is not a token stream, so it will not be overwritten")
