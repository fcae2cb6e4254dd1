"""Streams joined: every document as it was, under one manifest."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from tokenmill.data import files
from tokenmill.data import merge as merging
from tokenmill.data.errors import DataError
from tokenmill.data.merge import merge
from tokenmill.data.stream import TokenStream, write_manifest
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.data.writer import StreamWriter


def contents(stream: TokenStream):
    return [
        (stream.document(i).tolist(), stream.loss_mask(i).tolist(), stream.sources[stream.source_ids[i]])
        for i in range(len(stream))
    ]


def other_sources(folder, tokenizer) -> TokenStream:
    with StreamWriter(folder, tokenizer) as writer:
        for source in ("new", "source1", "new"):
            writer.add([1, 7, 2], [0, 1, 1], source=source)
    return TokenStream.open(folder)


@pytest.mark.parametrize("links", [True, False])
def test_merge(make_stream, tmp_path, small, monkeypatch, links):
    if not links:
        monkeypatch.setattr(merging.os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    first = make_stream([400, 30, 2, 7], masks=True, shard_tokens=300)
    second = other_sources(tmp_path / "second", small)
    joined = merge([first.folder, second.folder, first.folder], tmp_path / "joined")
    joined.verify()
    assert contents(joined) == contents(first) + contents(second) + contents(first)
    assert joined.sources == ["source0", "source1", "new"]
    assert len(joined.shards) == 5
    assert os.path.samefile(joined.shards[0].path, first.shards[0].path) == links
    first.verify()
    with pytest.raises(DataError, match="already exists"):
        merge([first.folder], tmp_path / "joined")
    with StreamWriter(tmp_path / "foreign", Tokenizer.open("mistral-v1")) as writer:
        writer.add([1, 2], source="a")
    with pytest.raises(DataError, match="foreign: was made by tokenizer 'mistral-v1'"):
        merge([first.folder, tmp_path / "foreign"], tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign", "joined", "second", "stream"]


def test_append(make_stream, small):
    stream = make_stream([40, 30], masks=True)
    before = contents(stream)
    with StreamWriter(stream.folder, small, append=True) as writer:
        writer.add([1, 7, 2], source="new")
    after = TokenStream.open(stream.folder)
    after.verify()
    assert contents(after) == [*before, ([1, 7, 2], [1.0, 1.0, 1.0], "new")]
    assert after.fingerprint != stream.fingerprint
    assert contents(stream) == before  # one that was open sees what it saw
    assert np.array_equal(after.source_ids, [0, 1, 2])
    with pytest.raises(DataError, match="was made by tokenizer"):
        StreamWriter(stream.folder, Tokenizer.open("mistral-v1"), append=True)
    with pytest.raises(DataError, match="no token stream here"):
        StreamWriter(stream.folder / "no", small, append=True)
    assert [p.name for p in stream.folder.parent.iterdir()] == ["stream"]


def test_appends_one_after_the_other_keep_both(make_stream, small):
    stream = make_stream([40, 30])
    late = StreamWriter(stream.folder, small, append=True)
    for writer, source in ((StreamWriter(stream.folder, small, append=True), "first"), (late, "second")):
        with writer:
            writer.add([1, 7, 2], source=source)
    after = TokenStream.open(stream.folder)
    after.verify()
    assert [after.sources[i] for i in after.source_ids] == ["source0", "source1", "first", "second"]
    late = StreamWriter(stream.folder.parent / "new", small)
    other_sources(stream.folder.parent / "new", small)
    with pytest.raises(DataError, match="new: already exists"), late:
        pass
    assert sorted(p.name for p in stream.folder.parent.iterdir()) == ["new", "stream"]


def test_the_lock_is_that_of_the_folder_there(tmp_path, small, monkeypatch):
    """Between its opening and its locking, another writer ends and removes it."""
    flock = files.fcntl.flock

    def late(*arguments: Any) -> None:
        monkeypatch.undo()
        (tmp_path / ".s.partial").rmdir()
        flock(*arguments)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with StreamWriter(tmp_path / "s", small) as writer:
        writer.add([1, 7, 2], source="a")
        with (
            pytest.raises(DataError, match="s: is being written by another process"),
            StreamWriter(writer.folder, small),
        ):
            pass
    assert len(TokenStream.open(tmp_path / "s")) == 1


def test_a_stream_that_changes_during_an_append_is_left_alone(make_stream, small):
    stream = make_stream([40, 30])

    def append() -> None:
        with StreamWriter(stream.folder, small, append=True) as writer:
            writer.add([1, 7, 2], source="a")
            write_manifest(stream.folder, {**stream.manifest, "sources": ["source0", "renamed"]})

    with pytest.raises(DataError, match="stream: was changed as documents for it were prepared"):
        append()
    assert TokenStream.open(stream.folder).sources == ["source0", "renamed"]
    assert len(list(stream.folder.iterdir())) == 6
