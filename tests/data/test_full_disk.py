"""A full disk leaves the old stream or none, whatever was being written, and says which file there was no room for."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenmill.data.convert import export_megatron, import_tokens
from tokenmill.data.merge import merge
from tokenmill.data.prepare import prepare
from tokenmill.data.stream import TokenStream
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.data.writer import StreamWriter


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def no_links(*_: Any) -> None:
    raise OSError("another disk")


# What writes to a disk: from the streams `old` and `more`, rows.jsonl and ids.npy, to `out`, which is a copy of `old`
# where that is to be changed.
WRITERS: dict[str, Callable[[Path, Tokenizer], Any]] = {
    "prepare": lambda here, small: prepare([here / "rows.jsonl"], small, here / "out", progress=False),
    "overwrite": lambda here, small: prepare(
        [here / "rows.jsonl"], small, here / "out", overwrite=True, progress=False
    ),
    "append": lambda here, small: prepare([here / "rows.jsonl"], small, here / "out", append=True, progress=False),
    "merge": lambda here, small: merge([here / "old", here / "more"], here / "out"),
    "merge copies": lambda here, small: merge([here / "old", here / "more"], here / "out"),
    "import": lambda here, small: import_tokens(here / "ids.npy", small, here / "out"),
    "export": lambda here, small: export_megatron(here / "old", here / "out" / "megatron"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_stream_or_none(tmp_path, small, monkeypatch, capsys, name):
    """Full at each of the files in turn, the small ones too; and then there is room again."""
    write = WRITERS[name]
    if name == "merge copies":
        monkeypatch.setattr(os, "link", no_links)
    for stream, sources in (("old", "ab"), ("more", "cbc")):
        with StreamWriter(tmp_path / stream, small, shard_tokens=250) as writer:
            for source in sources:
                writer.add(range(1, 200), [0, *[1] * 198], source=source)
    np.save(tmp_path / "ids.npy", np.arange(250))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"Fever of {i}."}) + "\n" for i in range(40)))
    out, old = tmp_path / "out", TokenStream.open(tmp_path / "old")
    there = {path.name for path in tmp_path.iterdir()}

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)
        if name in ("overwrite", "append"):
            shutil.copytree(tmp_path / "old", out)

    begin()
    write(tmp_path, small)
    expected = {path.name: path.read_bytes() for path in out.iterdir()}
    failures = 0
    for size in sorted({len(content) for content in expected.values() if content}):
        begin()
        problem = None
        try:
            with full_disk(size - 1):
                write(tmp_path, small)
        except OSError as error:
            problem = str(error)
        if problem is not None:
            failures += 1
            assert str(tmp_path) in problem  # names a file
            if name in ("overwrite", "append"):
                stream = TokenStream.open(out)
                stream.verify()
                assert stream.fingerprint == old.fingerprint
            else:
                assert not out.exists() or not list(out.iterdir())
            assert {path.name for path in tmp_path.iterdir()} <= there | {"out", ".out.partial"}
            write(tmp_path, small)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
    assert failures >= (2 if name == "export" else 4)
