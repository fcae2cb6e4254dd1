"""The plan: every token predicted once, every part in one pack, kept and mapped or made again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tokenmill.data.errors import DataError
from tokenmill.data.packing import ARRAYS, Plan, cut
from tokenmill.data.stream import TokenStream
from tokenmill.data.writer import StreamWriter

LENGTHS = [2, 3, 15, 16, 17, 30, 31, 32, 33, 46, 47, 100]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("sequence_length", [2, 3, 16, 31, 1000])
def test_every_token_is_predicted_once(make_stream, sequence_length, masks):
    stream = make_stream(LENGTHS, masks=masks, shard_tokens=60)
    plan = Plan.make(stream, sequence_length)
    predicted = [np.zeros(length) for length in LENGTHS]
    loss = []
    for document, begin, length in zip(plan.documents, plan.begins, plan.lengths, strict=True):
        assert 2 <= length <= sequence_length
        assert begin + length <= LENGTHS[document]
        predicted[document][begin + 1 : begin + length] += 1
        loss.append(stream.loss_mask(document)[begin + 1 : begin + length].sum())
    assert min(loss) > 0  # a part with nothing to learn is left out
    for i, counts in enumerate(predicted):
        learned = stream.loss_mask(i) > 0
        learned[0] = False
        assert np.all(counts[learned] == 1)
        assert counts.max() <= 1
        assert counts[0] == 0
    assert np.array_equal(np.sort(plan.items), np.arange(len(plan.documents)))
    assert plan.offsets[-1] == len(plan.items)
    for k in range(len(plan)):
        parts = plan.parts(k)
        assert np.all(np.diff(parts) > 0)
        assert plan.tokens[k] == plan.lengths[parts].sum() <= sequence_length
        assert plan.weights[k] == sum(loss[p] for p in parts) > 0


def test_a_document_that_fits_is_whole(make_stream):
    stream = make_stream(LENGTHS)
    documents, begins, lengths, loss = cut(stream, 100)
    assert documents.tolist() == list(range(len(LENGTHS)))
    assert begins.tolist() == [0] * len(LENGTHS)
    assert lengths.tolist() == LENGTHS
    assert loss.tolist() == [length - 1 for length in LENGTHS]


def test_is_kept_beside_the_stream_and_mapped(make_stream):
    stream = make_stream(LENGTHS)
    made, mapped = Plan.make(stream, 16), Plan.make(stream, 16)
    assert isinstance(mapped.items.base, np.memmap)
    assert not isinstance(made.items.base, np.memmap)
    for name in ARRAYS:
        assert np.array_equal(getattr(made, name), getattr(mapped, name))
        assert getattr(made, name).dtype == getattr(mapped, name).dtype
    assert made.fingerprint == mapped.fingerprint
    assert made.fingerprint != Plan.make(stream, 17).fingerprint
    assert sorted(p.name for p in stream.folder.glob("plan*")) == ["plan-16", "plan-17"]
    assert not list(stream.folder.glob(".*"))
    stream.verify()


def test_a_plan_of_another_stream_or_a_damaged_one_is_made_again(make_stream, tmp_path):
    first, second = make_stream(LENGTHS, "a"), make_stream(LENGTHS[::-1], "b")
    kept = tmp_path / "plans"
    want = Plan.make(second, 16)
    assert not np.array_equal(Plan.make(first, 16, kept).documents, want.documents)
    assert np.array_equal(Plan.make(second, 16, kept).documents, want.documents)
    for path in sorted((kept / "plan-16").iterdir()):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        assert np.array_equal(Plan.make(second, 16, kept).items, want.items)
        assert isinstance(Plan.make(second, 16, kept).items.base, np.memmap)
    (kept / "plan-16" / "plan.json").write_text(json.dumps([1]))
    assert len(Plan.make(second, 16, kept)) == len(want)


def test_where_nothing_can_be_written_it_is_kept_in_memory(make_stream, tmp_path):
    stream = make_stream(LENGTHS)
    (tmp_path / "file").write_text("in the way")
    plan = Plan.make(stream, 16, tmp_path / "file" / "plans")
    assert len(plan) > 0
    assert (tmp_path / "file").read_text() == "in the way"


def test_bad_input(make_stream, tmp_path, small):
    with pytest.raises(DataError, match="sequence_length is 1: at least 2"):
        Plan.make(make_stream([5]), 1)
    with StreamWriter(tmp_path / "mute", small) as writer:
        writer.add([1, 2, 3], [1, 0, 0], source="a")
    with pytest.raises(DataError, match=r"mute: no document has a token with loss after its first"):
        Plan.make(TokenStream.open(tmp_path / "mute"), 16)
