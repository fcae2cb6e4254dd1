"""Other trainers' token files: what is in them is what the stream holds, and the other way round."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenmill.data import convert
from tokenmill.data.convert import export_megatron, import_tokens
from tokenmill.data.errors import DataError


def index_of(lengths, code=8, documents=None, pointers=None, version=1) -> bytes:
    """As the format has it, written by hand."""
    width = {8: 2, 4: 4}[code]
    begins = np.cumsum([0, *lengths])[:-1] * width if pointers is None else pointers
    documents = range(len(lengths) + 1) if documents is None else documents
    return (
        b"MMIDIDX\x00\x00"
        + version.to_bytes(8, "little")
        + bytes([code])
        + len(lengths).to_bytes(8, "little")
        + len(documents).to_bytes(8, "little")
        + np.array(lengths, "<i4").tobytes()
        + np.array(begins, "<i8").tobytes()
        + np.array(documents, "<i8").tobytes()
    )


@pytest.mark.parametrize("code", [4, 8])
def test_megatron_to_a_stream(tmp_path, small, capsys, code):
    ids = np.arange(3, 17)
    ids.astype({4: "<i4", 8: "<u2"}[code]).tofile(tmp_path / "m.bin")
    # Five sequences; documents of two, one, none and two of them. The third is a document of a single token.
    (tmp_path / "m.idx").write_bytes(index_of([2, 3, 1, 4, 4], code, documents=[0, 2, 3, 3, 5]))
    stream = import_tokens(tmp_path / "m.bin", small, tmp_path / "s")
    stream.verify()
    assert [stream.document(i).tolist() for i in range(len(stream))] == [[*range(3, 8)], [*range(9, 17)]]
    assert stream.sources == ["m"]
    assert "2 documents of fewer than 2 tokens left out" in capsys.readouterr().err


def test_a_stream_to_megatron_and_back(make_stream, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "BATCH", 50)
    stream = make_stream([400, 30, 2, 7, 20, 20, 20], shard_tokens=300)
    export_megatron(stream.folder, tmp_path / "deep" / "m.v1")
    assert (tmp_path / "deep" / "m.v1.idx").read_bytes() == index_of(stream.lengths.tolist())
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["m.v1.bin", "m.v1.idx"]
    again = import_tokens(tmp_path / "deep" / "m.v1", stream.folder, tmp_path / "again")
    assert [again.document(i).tolist() for i in range(7)] == [stream.document(i).tolist() for i in range(7)]
    with pytest.raises(DataError, match=r"m\.v1\.bin: already exists"):
        export_megatron(stream.folder, tmp_path / "deep" / "m.v1")


def test_masks_that_are_lost_are_said(make_stream, tmp_path, capsys):
    export_megatron(make_stream([40, 30], masks=True).folder, tmp_path / "m")
    assert "tokens carry no loss in the stream, and do here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not the index of a Megatron dataset"),
        (index_of([4, 4])[:-1], "the file is truncated"),
        (index_of([4, 4])[:20], "the file is truncated"),
        (index_of([4, 4], version=2), "version 2, type 8: expected version 1"),
        (index_of([4, 4]).replace(b"\x08", b"\x07", 1), "version 1, type 7"),
        (index_of([4, 5]), r"beyond the end of m\.bin"),
        (index_of([4, 4], pointers=[0, 2**62]), r"beyond the end of m\.bin"),
        (index_of([4, 4], pointers=[0, 7]), "between two ids"),
        (index_of([4, -1]), "below 0"),
        (index_of([4, 4], pointers=[0, 6]), "sequence 1 begins before the end of the one before it"),
        (index_of([2, 2, 2], pointers=[0, 8, 4]), "sequence 2 begins before the end of the one before it"),
        (index_of([4, 4], documents=[0, 3]), "documents are not from sequence 0 to 2"),
        (index_of([4, 4], documents=[0, 2, 1, 2]), "documents are not from sequence 0 to 2"),
        (index_of([4, 4])[:18] + b"\xff" * 7 + b"\x7f" + index_of([4, 4])[26:], "the file is truncated"),
    ],
)
def test_damaged_indices(tmp_path, small, content, message):
    np.arange(8, dtype="<u2").tofile(tmp_path / "m.bin")
    (tmp_path / "m.idx").write_bytes(content)
    with pytest.raises(DataError, match=rf"m\.idx: .*{message}"):
        import_tokens(tmp_path / "m", small, tmp_path / "s")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin", "m.idx"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(3, 299), min_size=1, max_size=9), min_size=1, max_size=9), st.booleans())
def test_ids_alone_end_at_eos(tmp_path_factory, monkeypatch, small, documents, last_ends):
    monkeypatch.setattr(convert, "BATCH", 5)
    folder = tmp_path_factory.mktemp("flat")
    expected = [[*document, 2] for document in documents]
    ids = list(chain(*expected, [] if last_ends else [5, 6]))
    expected += [] if last_ends else [[5, 6]]
    np.save(folder / "a.npy", np.array(ids))
    np.array(ids, "<u2").tofile(folder / "a.bin")
    np.array(ids, "<i4").tofile(folder / "b.bin")
    for name, dtype in (("a.npy", None), ("a.bin", None), ("b.bin", "int32")):
        stream = import_tokens(folder / name, small, folder / f"{name}.stream", dtype=dtype)
        assert [stream.document(i).tolist() for i in range(len(stream))] == expected


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(2, 299), min_size=1, max_size=9), min_size=1, max_size=9), st.booleans())
def test_ids_alone_begin_with_bos(tmp_path_factory, monkeypatch, small, documents, first_begins):
    monkeypatch.setattr(convert, "BATCH", 5)
    folder = tmp_path_factory.mktemp("flat")
    expected = [[*([] if first_begins else [5, 6]), *([1] if first_begins else []), *documents[0]]]
    expected += [[1, *document] for document in documents[1:]]
    np.array(list(chain(*expected)), "<u2").tofile(folder / "a.bin")
    stream = import_tokens(folder / "a.bin", small, folder / "stream", delimiter="bos")
    assert [stream.document(i).tolist() for i in range(len(stream))] == expected


def test_ids_without_a_delimiter(tmp_path, small, capsys):
    np.array([1, 5, 6, 1, 7, 8], "<u2").tofile(tmp_path / "a.bin")
    assert len(import_tokens(tmp_path / "a.bin", small, tmp_path / "one")) == 1
    assert "a.bin: holds no EOS (2): 6 ids are taken for one document" in capsys.readouterr().err
    assert len(import_tokens(tmp_path / "a.bin", small, tmp_path / "two", delimiter="bos")) == 2
    assert capsys.readouterr().err == ""


def test_a_file_of_another_kind_is_no_file_of_ids(tmp_path, small):
    for name in ("notes.txt", "a.jsonl", "ids"):
        np.array([1, 5, 2], "<u2").tofile(tmp_path / name)
        with pytest.raises(DataError, match=rf"{name}: expected \.bin, \.npy or .*name their type \(--dtype\)"):
            import_tokens(tmp_path / name, small, tmp_path / "s")
    assert import_tokens(tmp_path / "ids", small, tmp_path / "s", dtype="uint16").tokens == 3


def test_wrong_files_of_ids(tmp_path, small):
    (tmp_path / "odd.bin").write_bytes(b"123")
    np.save(tmp_path / "float.npy", np.zeros(4))
    np.array([5, 6, 300], "<u2").tofile(tmp_path / "large.bin")
    (tmp_path / "no.npy").write_bytes(b"x")
    for name, message in (
        ("odd.bin", "3 bytes are not a number of uint16 ids"),
        ("float.npy", r"holds float64 of shape \(4,\)"),
        ("large.bin", "token id 300 is outside the vocabulary"),
        ("no.npy", r"no\.npy: cannot be read as \.npy"),
        ("nowhere.bin", "no such file"),
    ):
        with pytest.raises(DataError, match=message):
            import_tokens(tmp_path / name, small, tmp_path / "s")
    assert not (tmp_path / "s").exists()
