"""Which files are read, and that every one is read whole or refused."""

from __future__ import annotations

import gzip
import json
import os
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tokenmill.data import documents
from tokenmill.data.documents import content, find_inputs, pieces, read_texts, rows, texts
from tokenmill.data.errors import DataError


def test_folders_patterns_and_names(tmp_path):
    for name in ("web/b.jsonl", "web/deep/a.txt", "web/README.md", "notes-1.txt", "notes-2.txt", "c=d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_inputs([tmp_path / "web", f"ward={tmp_path}/notes-*.txt", tmp_path / "c=d.txt"])
    assert [(str(f.path.relative_to(tmp_path)), f.source) for f in found] == [
        ("web/b.jsonl", "web"),
        ("web/deep/a.txt", "web"),
        ("notes-1.txt", "ward"),
        ("notes-2.txt", "ward"),
        ("c=d.txt", "c=d"),
    ]
    assert [f.source for f in find_inputs([f"{tmp_path}/notes-*"])] == ["notes-1", "notes-2"]
    with pytest.raises(DataError, match=r"notes-1\.txt: is given twice"):
        find_inputs([tmp_path / "notes-1.txt", f"{tmp_path}/*.txt"])
    for again in (tmp_path / "web" / ".." / "notes-1.txt", os.path.relpath(tmp_path / "notes-1.txt")):
        with pytest.raises(DataError, match=r"notes-1\.txt: is given twice, also by '.*\.\./.*notes-1\.txt'"):
            find_inputs([tmp_path / "notes-1.txt", again])
    with pytest.raises(DataError, match=r"\*\.parquet: no such file matches"):
        find_inputs([f"{tmp_path}/*.parquet"])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: is empty"):
        find_inputs([tmp_path / "empty.jsonl"])


ROWS = [{"text": f"Line {i} of the file. " * (i % 7 + 1)} for i in range(500)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd_frames(content: bytes) -> bytes:
    compress = zstandard.ZstdCompressor().compress
    return compress(content[:5000]) + compress(content[5000:])


@pytest.mark.parametrize(
    ("name", "packed"),
    [("a.jsonl", LINES), ("a.jsonl.gz", gzip.compress(LINES, mtime=0)), ("a.jsonl.zst", zstd_frames(LINES))],
)
def test_pieces_are_whole_lines(tmp_path, monkeypatch, name, packed):
    monkeypatch.setattr(documents, "PIECE", 1000)
    (tmp_path / name).write_bytes(packed)
    (file,) = find_inputs([tmp_path / name])
    found = list(pieces(file))
    assert b"".join(piece.content for piece in found) == LINES
    assert len(found) > 20
    assert found[-1].end == len(packed)
    read = [pair for piece in found for pair in rows(piece)]
    assert read == [(f"{tmp_path / name}:{i + 1}", row) for i, row in enumerate(ROWS)]


def test_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 1000)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    table = [{**row, "messages": None, "picture": "x" * 9} for row in ROWS]
    table.append({"text": None, "messages": chat, "picture": None})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet", row_group_size=200)
    (file,) = find_inputs([tmp_path / "a.parquet"])
    found = list(pieces(file, ["text", "messages"]))
    assert len(found) > 9
    assert found[-1].end == file.size
    read = [pair for piece in found for pair in rows(piece)]
    assert [row for _, row in read] == [*ROWS, {"messages": chat}]
    assert read[-1][0] == f"{tmp_path}/a.parquet: row 501"
    assert list(read_texts([tmp_path / "a.parquet"])) == [*(row["text"] for row in ROWS), "Hi", "Hello."]


def test_a_text_beside_a_conversation():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    alpaca = {"instruction": "Hi", "input": "", "output": "Hello."}
    rows = [
        alpaca,
        {"messages": turns},
        {"conversations": turns},
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "No"},
    ]
    for row in rows:
        row |= {"text": "Hi, below is the same put together."}
        assert texts(content(row)) == ["Hi", "Hello.", "No"][: 2 + ("chosen" in row)]
        assert texts(content(row, "body")) == texts(content(row))
        assert content(row, "text") == row["text"]
        nothing = dict.fromkeys(row)
        assert content(nothing | {"text": "A fever."}) == "A fever."
        with pytest.raises(DataError, match=r"no key 'text', .* \(found none\)"):
            content(nothing)
    with pytest.raises(DataError, match="no key 'body'"):
        content({"text": "A fever."}, "body")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "PIECE", 1)
    line = "A fever." if name == "a.txt" else '{"text": "A fever."}\n{"text": "\ufeffA rash."}'
    (tmp_path / name).write_text(f"\ufeff{line}", encoding="utf-8")
    assert list(read_texts([tmp_path / name])) == ["A fever.", "\ufeffA rash."][: 1 + (name == "a.jsonl")]


def test_a_system_prompt_beside_messages():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    system = {"role": "system", "content": "Be brief."}
    for messages in (turns, [system, *turns], [{"role": "system", "content": ""}, *turns]):
        assert texts(content({"messages": messages, "system": "Be brief."}, "text")) == ["Be brief.", "Hi", "Hello."]
    assert content({"messages": turns, "system": None}, "text") == turns
    with pytest.raises(DataError, match="'system' is not the system message among"):
        content({"messages": [system, *turns], "system": "Be kind."}, "text")
    with pytest.raises(DataError, match="'messages' is a str"):
        texts(content({"messages": "Hi", "system": "Be kind."}, "text"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "not whole as gzip"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.jsonl.zst", zstd_frames(LINES)[:-9], "not whole as zstd"),
        ("a.jsonl.zst", LINES, "not whole as zstd"),
        ("a.txt.zst", zstandard.ZstdCompressor().compress(b"x" * 999)[:-2], "not whole as zstd"),
        ("a.parquet", LINES, "cannot be read as parquet"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        list(read_texts([tmp_path / name]))


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_package_that_is_missing(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.delitem(sys.modules, package)
    monkeypatch.setattr(documents, "find_spec", lambda wanted: None)
    with pytest.raises(DataError, match=rf"needs the package {package}.*pip install 'tokenmill\[data\]'"):
        find_inputs([tmp_path / name])
