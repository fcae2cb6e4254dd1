"""Token streams: what is written is what is read, and no damage goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenmill.data.errors import DataError
from tokenmill.data.report import Report, inspect
from tokenmill.data.shard import BLOCK, token_dtype
from tokenmill.data.stream import TokenStream, fingerprint_of
from tokenmill.data.writer import StreamWriter


class Vocabulary:
    """Stands for a tokenizer, where only its size matters."""

    name, sha256, bos_id, eos_id, model = "wide", "0" * 64, 1, 2, b""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size


DOCUMENTS = st.lists(
    st.lists(st.tuples(st.integers(0, 299), st.booleans()), min_size=2, max_size=12), min_size=1, max_size=8
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(DOCUMENTS, st.integers(1, 30), st.booleans())
def test_round_trip(tmp_path, small, documents, shard_tokens, masked):
    folder = tmp_path / "stream"
    with StreamWriter(folder, small, overwrite=True, shard_tokens=shard_tokens) as writer:
        for i, document in enumerate(documents):
            ids, mask = zip(*document, strict=True)
            writer.add(ids, mask if masked else None, source="ab"[i % 2])
    stream = TokenStream.open(folder)
    stream.verify()
    assert len(stream) == len(documents)
    assert stream.tokens == sum(map(len, documents))
    assert stream.lengths.tolist() == [len(d) for d in documents]
    assert stream.sources == ["a", "b"][: len(documents)]
    assert stream.source_ids.tolist() == [i % 2 for i in range(len(documents))]
    assert (stream.vocab_size, stream.bos_id, stream.eos_id) == (300, 1, 2)
    rng = np.random.default_rng(0)
    for i, document in enumerate(documents):
        ids, mask = zip(*document, strict=True)
        assert stream.document(i).tolist() == list(ids)
        assert stream.document(i).dtype == np.uint16
        assert stream.loss_mask(i).dtype == np.float32
        expected = np.array(mask if masked else [True] * len(ids), np.float32)
        assert np.array_equal(stream.loss_mask(i), expected)
        begin, end = sorted(rng.integers(0, len(ids) + 1, 2))
        assert stream.loss_tokens([i], [begin], [end]).tolist() == [expected[begin:end].sum()]
    for i in (-1, len(documents)):
        with pytest.raises(IndexError):
            stream.document(i)
    with pytest.raises(ValueError, match="read-only"):
        stream.document(0)[0] = 1


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_ids_as_wide_as_the_vocabulary(tmp_path, vocab_size, dtype):
    with StreamWriter(tmp_path / "s", Vocabulary(vocab_size)) as writer:  # pyright: ignore[reportArgumentType]
        writer.add([0, vocab_size - 1], source="a")
    assert token_dtype(vocab_size) == dtype
    document = TokenStream.open(tmp_path / "s").document(0)
    assert document.dtype == dtype
    assert document.tolist() == [0, vocab_size - 1]


def test_same_documents_same_fingerprint(make_stream):
    first, again = make_stream([5, 9, 3], "a", masks=True), make_stream([5, 9, 3], "b", masks=True)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != make_stream([5, 9, 3], "c", masks=True, seed=1).fingerprint
    assert first.fingerprint != make_stream([5, 9, 3], "d").fingerprint  # the masks are content


def files_of(stream: TokenStream):
    return sorted(p for p in stream.folder.iterdir() if p.stat().st_size)


def open_and_verify(folder):
    TokenStream.open(folder).verify()


def test_every_flipped_bit_is_reported_with_its_file(make_stream):
    stream = make_stream([400, 30, 2, 7], masks=True, shard_tokens=300)
    rng = np.random.default_rng(0)
    assert len(files_of(stream)) == 10  # two shards of four files, the manifest and the tokenizer
    for path in files_of(stream):
        content = path.read_bytes()
        for bit in rng.integers(0, 8 * len(content), 30):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << (bit % 8)
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=path.name):
                open_and_verify(stream.folder)
        path.write_bytes(content)
    open_and_verify(stream.folder)


def test_a_flipped_bit_is_reported_with_its_block(make_stream):
    stream = make_stream([BLOCK, 10])  # two bytes a token: two whole blocks and a bit
    path = stream.folder / "00000.tokens"
    content = bytearray(path.read_bytes())
    for block, byte in [(0, 5), (1, 2 * BLOCK - 1), (2, 2 * BLOCK + 3)]:
        content[byte] ^= 16
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"00000\.tokens: block {block} \(from byte {block * BLOCK}\)"):
            open_and_verify(stream.folder)
        content[byte] ^= 16


def test_truncated_grown_missing_and_swapped_files(make_stream):
    stream = make_stream([400, 30, 2, 7, 50, 60], masks=True, shard_tokens=300)
    for path in files_of(stream):
        content = path.read_bytes()
        for changed in (content[:-1], content[: len(content) // 2], b"", content + b"\0" * 8, None):
            path.unlink()
            if changed is not None:
                path.write_bytes(changed)
            with pytest.raises(DataError, match=path.name):
                open_and_verify(stream.folder)
        path.write_bytes(content)
    first, second = stream.folder / "00000.tokens", stream.folder / "00001.tokens"
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(DataError, match=r"00000\.tokens: .* bytes, expected"):
        open_and_verify(stream.folder)


def forge(stream: TokenStream, change) -> None:
    """Change the manifest and make its fingerprint fit, as someone could on purpose."""
    path = stream.folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    manifest["fingerprint"] = fingerprint_of(manifest)
    path.write_text(json.dumps(manifest))


def set_shard(**values):
    return lambda manifest: manifest["shards"][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(magic="other"), "magic"),
        (lambda m: m.update(version=2), "version 2, expected 1"),
        (lambda m: m.update(byte_order="big"), "expected little-endian uint16"),
        (lambda m: m.update(dtype="float64"), "expected little-endian uint16"),
        (lambda m: m.update(shards=[]), "holds no shards"),
        (lambda m: m.update(shards=3), r"manifest\.json: shards is of a wrong type, int: expected list"),
        (lambda m: m.pop("tokenizer"), r"manifest\.json: tokenizer is missing"),
        (lambda m: m["tokenizer"].pop("bos_id"), r"tokenizer\.bos_id is missing"),
        (
            lambda m: m["tokenizer"].update(vocab_size="300"),
            r"tokenizer\.vocab_size is of a wrong type, str: expected int",
        ),
        (
            lambda m: m["tokenizer"].update(eos_id=5),
            r"manifest\.json: tokenizer\.eos_id is 5, in tokenizer\.model it is 2",
        ),
        (lambda m: m["tokenizer"].update(vocab_size=10), r"00000\.tokens: holds token \d+, outside the vocabulary"),
        (lambda m: m["sources"].pop(), r"00000\.sources: names source 1 of 1"),
        (set_shard(documents=2**61), r"00000\.offsets: .* bytes, expected"),
        (set_shard(documents=-1), r"shards\[0\]\.documents is out of range: expected 0 to"),
        (set_shard(documents=3.0), r"shards\[0\]\.documents is of a wrong type, float"),
        (set_shard(tokens=2**63 - 1), r"00000\.tokens: .* bytes, expected"),
        (set_shard(silent=2**63), r"shards\[0\]\.silent is out of range"),
        (lambda m: m.update(pairs=1), r"pairs is of a wrong type, int: expected bool"),
        (lambda m: m.update(chat={"template": 1, "loss_on": "all"}), r"chat\.template is of a wrong type, int"),
        (lambda m: m.update(chat={"template": "alpaca"}), r"chat\.loss_on is missing"),
        (lambda m: m.update(report=None), r"report is of a wrong type, NoneType: expected dict"),
        (lambda m: m.update(report={"bytes": {"a\nb": "9"}}), r"report\.bytes\['a\\nb'\] is of a wrong type, str"),
        (lambda m: m.update(report={"bytes": {"a": -1}}), r"report\.bytes\['a'\] is out of range"),
        (lambda m: m.update(report={"bytes": {}, "duplicates": {}}), r"report\.contaminated is missing"),
        (
            lambda m: m.update(report=Report().asdict() | {"empty": {"a": "3"}}),
            r"report\.empty\['a'\] is of a wrong type, str",
        ),
        (
            lambda m: m.update(report=Report().asdict() | {"duplicate_examples": [["a", 1]]}),
            r"report\.duplicate_examples\[0\]\[1\] is of a wrong type, int: expected str",
        ),
        (
            lambda m: m["shards"][0]["files"]["tokens"]["crc32"].append(1),
            r"00000\.tokens: has 1 blocks and 2 checksums",
        ),
        (lambda m: m["shards"][0]["files"]["tokens"]["crc32"].clear(), r"00000\.tokens: has 1 blocks and 0 checksums"),
    ],
)
def test_forged_manifests(make_stream, change, message):
    stream = make_stream([40, 30, 20], masks=True)
    forge(stream, change)
    with pytest.raises(DataError, match=message):
        open_and_verify(stream.folder)


def test_a_report_of_another_version(make_stream):
    stream = make_stream([40, 30])
    report = {**Report(duplicates=Counter(a=3), duplicate_examples=[["notes.txt:1", "a note"]]).asdict(), "later": 1}
    del report["empty"], report["empty_examples"]  # of an earlier one
    forge(stream, lambda m: m.update(report=report))
    assert "duplicates removed    3, such as\n  notes.txt:1: a note\n" in inspect(stream.folder)


def test_inspecting_what_is_forged(make_stream):
    stream = make_stream([40, 30, 20])
    forge(stream, lambda m: m.update(pairs=True))
    for look in (inspect, open_and_verify):
        with pytest.raises(DataError, match=r"00000\.silent: spans are not those of preference pairs"):
            look(stream.folder)
    stream = make_stream([40, 30, 20], overwrite=True)
    with StreamWriter(stream.folder.parent / "wide", Vocabulary(400)) as writer:  # pyright: ignore[reportArgumentType]
        writer.add([5, 399], source="a")
    wide = TokenStream.open(writer.folder)
    with pytest.raises(DataError, match=r"tokenizer\.model: not the tokenizer that made this stream"):
        inspect(wide.folder)
    model = (stream.folder / "tokenizer.model").read_bytes()
    (wide.folder / "tokenizer.model").write_bytes(model)
    forge(wide, lambda m: m["tokenizer"].update(sha256=hashlib.sha256(model).hexdigest()))
    with pytest.raises(DataError, match=r"00000\.tokens: holds token 399, outside the vocabulary of 300"):
        inspect(wide.folder)


def test_a_manifest_that_was_edited(make_stream):
    stream = make_stream([40, 30])
    path = stream.folder / "manifest.json"
    path.write_text(path.read_text().replace('"bos_id": 1', '"bos_id": 5'))
    with pytest.raises(DataError, match=r"manifest\.json: does not match its own fingerprint"):
        TokenStream.open(stream.folder)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("offsets", [1, 40, 70]),
        ("offsets", [0, 40, 69]),
        ("offsets", [0, 69, 70]),
        ("offsets", [0, 80, 70]),
        ("offsets", [0, 2**64 - 1, 70]),
        ("offsets", [0, 0, 70]),
        ("silent", [5, 5]),
        ("silent", [9, 5]),
        ("silent", [60, 71]),
        ("silent", [2**64 - 2, 2**64 - 1]),
        ("silent", [5, 9, 8, 12]),
        ("silent", [20, 30, 5, 9]),
    ],
)
def test_boundaries_that_make_no_sense(make_stream, name, values):
    stream = make_stream([40, 30])
    np.array(values, "<u8").tofile(stream.folder / f"00000.{name}")
    if name == "silent":
        forge(stream, set_shard(silent=len(values) // 2))
    with pytest.raises(DataError, match=rf"00000\.{name}: (boundaries|spans) are not"):
        TokenStream.open(stream.folder)


def test_not_a_stream(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no token stream here .*tokenmill prepare"):
        TokenStream.open(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="not the manifest of a token stream"):
        TokenStream.open(tmp_path)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([], None, "a document of 0 tokens"),
        ([5], None, "a document of 1 tokens: at least 2"),
        ([[1, 2]], None, r"shape \(1, 2\): expected a list of ids"),
        ([5, 300], None, "token id 300 is outside the vocabulary of 300 of tokenizer 'tokenizer.model'"),
        ([5, -1], None, "token id -1 is outside"),
        ([5.0, 6.0], None, "must be integers"),
        ([5, 6], [1], r"a mask of shape \(1,\) for a document of 2 tokens"),
    ],
)
def test_refused_documents_leave_nothing(tmp_path, small, ids, mask, message):
    def write() -> None:
        with StreamWriter(tmp_path / "s", small) as writer:
            writer.add([1, 2, 3], source="a")
            writer.add(ids, mask, source="a")

    with pytest.raises(DataError, match=message):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_stream_is_refused(tmp_path, small):
    with pytest.raises(DataError, match="the corpus is empty"), StreamWriter(tmp_path / "s", small):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_nothing_or_the_old_stream(make_stream, tmp_path, small):
    def interrupted(**options) -> None:
        with StreamWriter(tmp_path / "stream", small, **options) as writer:
            writer.add([1, 2, 3], source="a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    old = make_stream([5, 6])
    with pytest.raises(KeyboardInterrupt):
        interrupted(overwrite=True)
    assert TokenStream.open(old.folder).fingerprint == old.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["stream"]


def test_overwriting(make_stream, tmp_path, small):
    old = make_stream([5, 6])
    with pytest.raises(DataError, match="already exists"):
        StreamWriter(old.folder, small)
    assert make_stream([5, 7], overwrite=True).fingerprint != old.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["stream"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="is not a token stream, so it will not be overwritten"):
        StreamWriter(tmp_path / "mine", small, overwrite=True)


def test_a_stream_can_be_moved(make_stream, tmp_path):
    stream = make_stream([5, 6])
    shutil.move(stream.folder, tmp_path / "elsewhere")
    moved = TokenStream.open(tmp_path / "elsewhere")
    moved.verify()
    assert moved.fingerprint == stream.fingerprint
    assert moved.name == "elsewhere"
    assert os.access(moved.folder, os.R_OK)
