"""The resume matrix: runs of every shape, stopped anywhere and gone on with at any number of ranks, with other
micro-batches and, where weights stay as they are, other steps. One global sequence of packs: none twice, none missed.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tokenmill.data.errors import DataError
from tokenmill.data.loader import PART_BITS, Loader, Source
from tokenmill.data.mixture import Feed, SampleOrder
from tokenmill.data.stream import TokenStream
from tokenmill.kernels.layout import GHOST

WORLDS = (1, 2, 3, 4, 6, 7, 8)
MOST = 60  # packs of a run
Pack = tuple[list[int], list[int]]  # the ids of its documents, and its tokens

WEIGHT = st.floats(0.05, 5)
CHANGES = st.lists(st.tuples(st.integers(1, 12), WEIGHT | st.just(0.0)), max_size=3, unique_by=lambda change: change[0])
EPOCHS = st.none() | st.floats(0.2, 2.5)
RUN = st.lists(st.tuples(st.integers(0, 2), WEIGHT, CHANGES, EPOCHS), min_size=1, max_size=4)
# World size, packs of a micro-batch, packs of a step where that may change, steps that are kept and that a kill undoes.
PIECE = st.tuples(st.sampled_from(WORLDS), st.integers(1, 4), st.integers(1, 11), st.integers(1, 9), st.integers(0, 2))
slowly = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture
def streams(make_stream) -> list[TokenStream]:
    return [
        make_stream([5, 9, 3, 40, 12, 7, 8, 2, 31, 16, 16, 16, 10, 70], "one", masks=True, shard_tokens=50),
        make_stream([30, 2, 9, 16, 33, 12, 5], "two", masks=True, seed=1),
        make_stream([16, 3], "three", seed=2),
    ]


def packs_of(loaders: list[Loader]) -> tuple[Pack, dict]:
    """What one step gives all ranks, in the global order, and the state that is saved."""
    steps = [next(loader) for loader in loaders]
    assert all((s.state, s.total_weight) == (steps[0].state, steps[0].total_weight) for s in steps)
    assert len({len(s.micro_batches) for s in steps}) == 1
    batches = [b for s in steps for b in s.micro_batches if b.layout.document_ids[0] != GHOST]
    assert sum(float(b.weights.sum()) for b in batches) == steps[0].total_weight
    ids = [i for b in batches for i in b.layout.document_ids.tolist()]
    return (ids, [t for b in batches for t in b.tokens.tolist()]), json.loads(json.dumps(steps[0].state))


def check_matrix(streams: list[TokenStream], run: list, pieces: list, packs_per_step: int) -> None:
    def loader(scale: int, step: int, micro: int = 1, rank: int = 0, world: int = 1) -> Loader:
        """`scale` packs are a step of the weights."""
        sources = [
            Source(streams[i], [(0, weight), *((s * scale, w) for s, w in sorted(changes))], epochs)
            for i, weight, changes, epochs in run
        ]
        return Loader(
            sources,
            sequence_length=16,
            packs_per_step=step,
            packs_per_micro_batch=micro,
            seed=3,
            rank=rank,
            world=world,
        )

    try:
        alone = loader(packs_per_step, 1)  # a pack a step
    except DataError as error:
        assume("no source that has packs left has a weight" not in str(error))
        raise
    want = [packs_of([alone])[0] for _ in range(min(MOST, alone.steps or MOST))]
    check_epochs(want, alone)

    fixed = any(changes for _, _, changes, _ in run)  # weights change with the step
    done, state = 0, None
    for world, micro, step, kept, lost in pieces:
        step = packs_per_step if fixed else step
        ranks = [loader(1 if fixed else packs_per_step, step, micro, rank, world) for rank in range(world)]
        for rank in ranks:
            assert rank.fingerprint == alone.fingerprint
            if state is not None:
                rank.load_state_dict(state)
        at = done
        for number in range(kept + lost):
            count = step if alone.steps is None else min(step, alone.steps - at)
            if at + count > len(want):
                break
            if count == 0:
                assert all(next(rank, None) is None for rank in ranks)
                break
            got, after = packs_of(ranks)
            assert got == tuple(list(itertools.chain(*column)) for column in zip(*want[at : at + count], strict=True))
            at += count
            if number < kept:
                done, state = at, after
        assert state is None or state["samples"] == done


def check_epochs(packs: list[Pack], alone: Loader) -> None:
    """Each source gives all of its parts once before any of them again, and no more than its epochs."""
    given_: defaultdict[int, list[list[int]]] = defaultdict(list)
    for ids, _ in packs:
        (source,) = {i >> PART_BITS for i in ids}
        given_[source].append([i & ((1 << PART_BITS) - 1) for i in ids])
    for source, parts in given_.items():
        plan, epochs = alone.plans[source], alone.sources[source].epochs
        for first in range(0, len(parts), len(plan)):
            epoch = parts[first : first + len(plan)]
            seen = Counter(itertools.chain(*epoch))
            assert max(seen.values()) == 1
            assert len(epoch) < len(plan) or seen.keys() == {*range(len(plan.items))}
        assert epochs is None or len(parts) <= max(1, round(epochs * len(plan)))


@settings(slowly, max_examples=25)
@given(run=RUN, pieces=st.lists(PIECE, min_size=2, max_size=8), packs_per_step=st.integers(1, 9))
def test_one_sequence(streams, run, pieces, packs_per_step):
    check_matrix(streams, run, pieces, packs_per_step)


@pytest.mark.slow
@settings(slowly, max_examples=500)
@given(run=RUN, pieces=st.lists(PIECE, min_size=2, max_size=8), packs_per_step=st.integers(1, 9))
def test_one_sequence_at_length(streams, run, pieces, packs_per_step):
    check_matrix(streams, run, pieces, packs_per_step)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 50), WEIGHT, CHANGES), min_size=1, max_size=6),
    st.lists(st.integers(0, 60), min_size=1, max_size=8),
    st.integers(0, 2**64 - 1),
)
def test_a_longer_run_begins_alike(sources, cuts, seed):
    """However far an order was followed, and in whatever pieces, the samples before are the same, each epoch whole."""

    def order() -> SampleOrder:
        feeds = [Feed(packs, ((0, weight), *sorted(changes))) for packs, weight, changes in sources]
        return SampleOrder([Feed(7, ((0, 1.0),)), *feeds], seed)

    longer, total = order().take(0, 600), sum(cuts)
    whole = order().take(0, total)
    pieces = order()
    at = 0
    for count in cuts:
        for got, one, other in zip(pieces.take(at, count), whole, longer, strict=True):
            assert np.array_equal(got, one[at : at + count])
            assert np.array_equal(got, other[at : at + count])
        at += count
    for source, size in enumerate([7, *(packs for packs, _, _ in sources)]):
        drawn = longer[1][longer[0] == source]
        for first in range(0, len(drawn) - size + 1, size):
            assert np.array_equal(np.sort(drawn[first : first + size]), np.arange(size))
