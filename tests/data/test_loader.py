"""The loader: one global order whatever the ranks, each pack once an epoch, resumable, totals known beforehand."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from tokenmill.data.batch import Batch
from tokenmill.data.errors import DataError
from tokenmill.data.loader import PART_BITS, Loader, Source, sequential_batches
from tokenmill.data.mixture import Feed, SampleOrder
from tokenmill.data.packing import Plan
from tokenmill.data.stream import TokenStream
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.data.writer import StreamWriter
from tokenmill.kernels.layout import GHOST

LENGTHS = [5, 9, 3, 40, 12, 7, 8, 2, 31, 16, 16, 16, 10, 70]


@pytest.fixture
def sources(make_stream):
    one = make_stream(LENGTHS, "one", masks=True, shard_tokens=50)
    two = make_stream(LENGTHS[::-1] + LENGTHS, "two", masks=True, seed=1)
    return [Source(one, 0.7), Source(two, 0.3)]


def loader(sources, **changes) -> Loader:
    options = {"sequence_length": 16, "packs_per_step": 5, "packs_per_micro_batch": 2, "seed": 3}
    return Loader(sources, **{**options, **changes})


def real(batch: Batch) -> list[int]:
    return [i for i in batch.layout.document_ids.tolist() if i != GHOST]


def test_batches_hold_what_their_ids_say(sources):
    plans = [Plan.make(source.stream, 16) for source in sources]
    for batch in next(loader(sources, packs_per_step=20)).micro_batches:
        documents, masks = [], []
        for document_id, source_id in zip(batch.layout.document_ids.tolist(), batch.source_ids.tolist(), strict=True):
            assert document_id >> PART_BITS == source_id
            plan, stream = plans[source_id], sources[source_id].stream
            part = document_id & ((1 << PART_BITS) - 1)
            i, begin, length = int(plan.documents[part]), plan.begins[part], plan.lengths[part]
            documents.append(stream.document(i)[begin : begin + length])
            masks.append(stream.loss_mask(i)[begin : begin + length])
        want = Batch.from_documents(documents, masks)
        for name in ("tokens", "targets", "weights", "target_rows"):
            assert torch.equal(getattr(batch, name), getattr(want, name))
        assert torch.equal(batch.layout.cu_seqlens, want.layout.cu_seqlens)
        assert torch.equal(batch.layout.positions, want.layout.positions)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_ranks_share_one_global_order(sources, world):
    alone = loader(sources)
    ranks = [loader(sources, rank=rank, world=world) for rank in range(world)]
    for _ in range(8):
        whole, steps = next(alone), [next(rank) for rank in ranks]
        assert len({len(step.micro_batches) for step in steps}) == 1  # nobody waits for a rank that is done
        together = [i for step in steps for batch in step.micro_batches for i in real(batch)]
        assert together == [i for batch in whole.micro_batches for i in real(batch)]
        for step in steps:
            assert (step.total_weight, step.total_tokens, step.samples) == (
                whole.total_weight,
                whole.total_tokens,
                whole.samples,
            )
        batches = [batch for step in steps for batch in step.micro_batches]
        assert sum(float(batch.weights.sum()) for batch in batches) == whole.total_weight
        tokens = sum(batch.tokens.numel() for batch in batches if real(batch))
        assert tokens == whole.total_tokens


def test_a_rank_without_a_sample_gets_ghosts(sources):
    step = next(loader(sources, packs_per_step=2, packs_per_micro_batch=1, rank=0, world=3))
    assert [real(batch) for batch in step.micro_batches] == [[]]
    assert float(step.micro_batches[0].weights.sum()) == 0


def test_how_a_step_is_cut_changes_nothing(sources):
    cuts = [next(loader(sources, packs_per_step=6, packs_per_micro_batch=size)) for size in (1, 2, 4, 6, 9)]
    assert [len(step.micro_batches) for step in cuts] == [6, 3, 2, 1, 1]
    for step in cuts:
        assert [i for b in step.micro_batches for i in real(b)] == [i for b in cuts[0].micro_batches for i in real(b)]
        assert step.total_weight == cuts[0].total_weight


def test_each_epoch_is_every_part_once_in_a_fresh_order(sources):
    one = loader(sources[:1], packs_per_step=1)
    epoch = one.packs_per_epoch
    assert one.tokens_per_epoch == one.plans[0].tokens.sum()
    orders = [[i for _ in range(epoch) for b in next(one).micro_batches for i in real(b)] for _ in range(3)]
    for order in orders:
        assert sorted(order) == list(range(len(one.plans[0].items)))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    other = loader(sources[:1], packs_per_step=1, seed=4)
    assert [i for _ in range(epoch) for b in next(other).micro_batches for i in real(b)] != orders[0]


def test_sources_come_by_their_weights(sources):
    step = next(loader(sources, packs_per_step=400, packs_per_micro_batch=1))
    counts = Counter(int(batch.source_ids[0]) for batch in step.micro_batches)
    assert counts == {0: 280, 1: 120}


def test_sample_order_is_a_function_of_the_number():
    weights, packs = [0.5, 0.3, 0.2], [7, 1, 50]
    feeds = [Feed(n, ((0, weight),)) for n, weight in zip(packs, weights, strict=True)]
    sources, draws = SampleOrder(feeds, 9).take(0, 500)
    order = SampleOrder(feeds, 9)
    for start, count in [(400, 100), (0, 1), (3, 0), (123, 77), (124, 300)]:
        some_sources, some_packs = order.take(start, count)
        assert np.array_equal(some_sources, sources[start : start + count])
        assert np.array_equal(some_packs, draws[start : start + count])
    for source, n in enumerate(packs):
        of_source = draws[sources == source]
        for epoch in range(len(of_source) // n):
            assert sorted(of_source[epoch * n : (epoch + 1) * n]) == list(range(n))


@pytest.mark.parametrize("stop", [1, 3, 9])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (3, 2), (2, 4)])
def test_resume_goes_on_with_the_same_samples(sources, stop, before, after):
    alone = loader(sources)
    want = [[i for b in next(alone).micro_batches for i in real(b)] for _ in range(12)]
    first = loader(sources, world=before)
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    drawn = state.pop("drawn")
    assert state == {"samples": 5 * stop, "seed": 3, "fingerprint": first.fingerprint}
    assert sum(drawn) == 5 * stop
    state["drawn"] = drawn
    for resumed in (
        [loader(sources, rank=rank, world=after) for rank in range(after)],
        [loader(sources, rank=rank, world=after, samples=state["samples"]) for rank in range(after)],
    ):
        for rank in resumed:
            if rank.samples == 0:
                rank.load_state_dict(state)
        got = [[i for rank in resumed for b in next(rank).micro_batches for i in real(b)] for _ in range(12 - stop)]
        assert got == want[stop:]


def test_another_order_is_refused(sources, make_stream):
    first = loader(sources)
    state = first.state_dict()
    changed = [
        loader(sources[:1]),
        loader([sources[0], Source(sources[1].stream, 0.4)]),
        loader(sources, sequence_length=17),
        loader([sources[0], Source(make_stream(LENGTHS, "two", seed=5, overwrite=True), 0.3)]),
    ]
    for other in changed:
        with pytest.raises(
            DataError, match=f"fingerprint is {other.fingerprint}, the checkpoint's {first.fingerprint}"
        ):
            other.load_state_dict(state)
    with pytest.raises(DataError, match="seed is 4, the checkpoint's 3"):
        loader([sources[0], sources[1]], seed=4).load_state_dict({**state, "fingerprint": first.fingerprint})


def test_a_stream_may_move(sources, tmp_path):
    first = loader(sources)
    sources[0].stream.folder.rename(tmp_path / "moved")
    moved = loader([Source(TokenStream.open(tmp_path / "moved"), 0.7), sources[1]])
    assert moved.fingerprint == first.fingerprint
    assert moved.sources[0].name == "moved"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packs_per_step": 0}, "packs_per_step is 0, expected at least 1"),
        ({"packs_per_micro_batch": 0}, "packs_per_micro_batch is 0"),
        ({"world": 0}, "world is 0"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"samples": -1}, "samples -1"),
        ({"seed": -1}, "seed -1"),
        ({"sequence_length": 1}, "sequence_length is 1"),
    ],
)
def test_bad_numbers(sources, changes, message):
    with pytest.raises(DataError, match=message):
        loader(sources, **changes)


def test_overlong_documents_are_split_rejected_or_an_error(sources, make_stream):
    split, rejecting = loader(sources), loader(sources, overlong="reject")
    lengths = [source.stream.lengths for source in sources]
    for plan, one in zip(rejecting.plans, lengths, strict=True):
        assert set(plan.documents.tolist()) <= set(np.flatnonzero(one <= 16).tolist())
        assert (plan.begins == 0).all()
    assert rejecting.fingerprint != split.fingerprint
    assert [line.rpartition("; ")[2] for line in split.summary(3)] == [
        "3 documents of more than 16 tokens are cut into parts",
        "6 documents of more than 16 tokens are cut into parts",
    ]
    assert rejecting.summary(3)[0].endswith("; 3 documents of more than 16 tokens are left out")
    with pytest.raises(DataError, match=r"one: 3 of 14 documents have more than 16 tokens \(the longest 70\): split"):
        loader(sources, overlong="error")
    assert (
        loader(sources, sequence_length=70, overlong="error").fingerprint
        == loader(sources, sequence_length=70, overlong="reject").fingerprint
        == loader(sources, sequence_length=70).fingerprint
    )
    with pytest.raises(DataError, match="no document has a token with loss after its first and fits 2 tokens"):
        Plan.make(make_stream([3, 4], "long"), 2, overlong="reject")


def test_what_becomes_of_a_source_is_said(sources):
    packs = [len(plan) for plan in loader(sources).plans]
    steps = 6 * sum(packs) // 5
    ending = loader([Source(sources[0].stream, 0.5, epochs=1.5), Source(sources[1].stream, [(0, 0.5), (2, 0.25)])])
    first, second = ending.summary(steps)
    assert f"weight 0.5; {round(1.5 * packs[0]) / packs[0]:.2f} epochs in" in first
    assert "no more from step" in first
    assert "weight 0.5, 0.25 from step 2; " in second
    assert ", so it begins again" in second
    notices = [(number, notice) for number in range(steps) for notice in next(ending).notices]
    assert [notice.partition(": ")[2] for _, notice in notices] == [
        f"has given all its {packs[0]:,} packs, and begins again",
        "has given its 1.5 epochs, and gives no more",
        f"has given all its {packs[1]:,} packs, and begins again",
    ]


def test_a_loader_ends_with_its_sources(sources):
    ending = loader([Source(source.stream, epochs=1) for source in sources], packs_per_step=4)
    steps = list(ending)
    assert len(steps) == ending.steps
    assert sum(len(step.samples) for step in steps) == ending.packs_per_epoch
    assert sum(step.total_tokens for step in steps) == ending.tokens_per_epoch
    ids = [i for step in steps for batch in step.micro_batches for i in real(batch)]
    assert len(ids) == len({*ids}) == sum(len(plan.items) for plan in ending.plans)


def test_a_damaged_block_is_named(sources):
    stream = sources[0].stream
    path = stream.folder / "00000.tokens"
    content = bytearray(path.read_bytes())
    content[9] ^= 4
    path.write_bytes(content)
    damaged = loader([Source(TokenStream.open(stream.folder))])
    with pytest.raises(DataError, match=r"00000.tokens: block 0 \(from byte 0\) does not match its checksum"):
        list(zip(range(20), damaged, strict=False))


def test_bad_sources(sources, tmp_path):
    with pytest.raises(DataError, match="no sources"):
        loader([])
    for weight in (
        0.0,
        -1.0,
        float("nan"),
        float("inf"),
        [],
        [(1, 1.0)],
        [(0, 1.0), (0, 2.0)],
        [(0, 0.0)],
        [(0, -1.0)],
    ):
        with pytest.raises(DataError, match=r"one: weight .*, expected a positive number, or pairs of a step"):
            loader([Source(sources[0].stream, weight)])
    for epochs in (0, -1, float("nan"), float("inf")):
        with pytest.raises(DataError, match=r"one: epochs .*, expected a positive number"):
            loader([Source(sources[0].stream, epochs=epochs)])
    with pytest.raises(DataError, match="do not fit: from sample 10 on no source"):
        loader([Source(sources[0].stream, [(0, 1.0), (2, 0.0)])])
    with StreamWriter(tmp_path / "other", Tokenizer.open("mistral-v1")) as writer:
        writer.add([1, 2, 3], source="a")
    with pytest.raises(DataError, match=r"one was made by tokenizer 'tokenizer.model' .*other by 'mistral-v1'"):
        loader([sources[0], Source(TokenStream.open(tmp_path / "other"))])


@pytest.mark.parametrize("tokens_per_batch", [16, 40, 10_000])
def test_sequential_batches_are_the_parts_in_order(sources, tokens_per_batch):
    stream = sources[0].stream
    plan = Plan.make(stream, 16)
    batches = list(sequential_batches(stream, sequence_length=16, tokens_per_batch=tokens_per_batch))
    ids = [i for batch in batches for i in batch.layout.document_ids.tolist()]
    assert ids == list(range(len(plan.documents)))
    lengths = [n for batch in batches for n in batch.layout.document_lengths.tolist()]
    assert lengths == plan.lengths.tolist()
    assert max(batch.tokens.numel() for batch in batches) <= tokens_per_batch
    for batch, following in pairwise(batches):  # as full as they can be
        assert batch.tokens.numel() + int(following.layout.document_lengths[0]) > tokens_per_batch
    assert sum(float(batch.weights.sum()) for batch in batches) == plan.weights.sum()
    documents = plan.documents[ids]
    assert [i for batch in batches for i in batch.source_ids.tolist()] == stream.source_ids[documents].tolist()
    flat = np.concatenate(
        [stream.document(d)[b : b + n] for d, b, n in zip(plan.documents, plan.begins, plan.lengths, strict=True)]
    )
    assert torch.cat([batch.tokens for batch in batches]).tolist() == flat.tolist()


def test_sequential_batches_stop_after_max_tokens(sources):
    stream = sources[0].stream
    ends = np.cumsum(Plan.make(stream, 16).lengths)
    for most in (1, int(ends[3]) - 1, int(ends[3]), int(ends[3]) + 1, 10**9):
        batches = sequential_batches(stream, sequence_length=16, tokens_per_batch=30, max_tokens=most)
        total = sum(batch.tokens.numel() for batch in batches)
        assert total == ends[min(int(np.searchsorted(ends, most)), len(ends) - 1)]


def test_sequential_batches_refuse_what_does_not_fit(sources):
    with pytest.raises(DataError, match="sequence_length 16 must be from 2 to tokens_per_batch, which is 15"):
        sequential_batches(sources[0].stream, sequence_length=16, tokens_per_batch=15)
