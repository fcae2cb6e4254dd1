"""Killed anywhere, resumed at any number of ranks in any order: one global sequence, nothing twice, nothing missed."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenmill.data.loader import PART_BITS, Loader, Source
from tokenmill.kernels.layout import GHOST

WORLDS = (1, 2, 3, 4, 6, 7, 8)
SOURCES = {
    "constant": lambda a, b: [Source(a, 0.7), Source(b, 0.3)],
    "changing": lambda a, b: [Source(a, [(0, 0.9), (3, 0.2), (9, 0.0)]), Source(b, [(0, 0.1), (9, 1.0)])],
    "ending": lambda a, b: [Source(a, 0.7, epochs=1.5), Source(b, 0.3)],
}
STEPS, PACKS = 16, 5


@pytest.fixture
def streams(make_stream):
    one = make_stream([5, 9, 3, 40, 12, 7, 8, 2, 31, 16, 16, 16, 10, 70], "one", masks=True, shard_tokens=50)
    return one, make_stream([30, 2, 9, 16, 33, 12, 5], "two", masks=True, seed=1)


def make(sources, rank: int = 0, world: int = 1, micro: int = 2) -> Loader:
    return Loader(
        sources, sequence_length=16, packs_per_step=PACKS, packs_per_micro_batch=micro, seed=3, rank=rank, world=world
    )


def step(loaders: list[Loader]) -> tuple[list[int], list[int], dict]:
    """One step on all ranks: the documents' ids and the tokens, in the global order, and the state that is saved."""
    steps = [next(loader) for loader in loaders]
    assert all(s.state == steps[0].state and s.total_weight == steps[0].total_weight for s in steps)
    assert len({len(s.micro_batches) for s in steps}) == 1
    batches = [b for s in steps for b in s.micro_batches if b.layout.document_ids[0] != GHOST]
    ids = [i for b in batches for i in b.layout.document_ids.tolist()]
    return ids, [t for b in batches for t in b.tokens.tolist()], json.loads(json.dumps(steps[0].state))


@pytest.mark.parametrize("kind", SOURCES)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_global_sequence_whatever_happens(streams, kind, data):
    sources = SOURCES[kind](*streams)
    alone = [make(sources)]
    want = [step(alone)[:2] for _ in range(STEPS)]
    state, done = None, 0
    while done < STEPS:
        world, micro = data.draw(st.sampled_from(WORLDS)), data.draw(st.integers(1, 3))
        ranks = [make(sources, rank, world, micro) for rank in range(world)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        kept = data.draw(st.integers(1, STEPS - done))  # steps up to the last checkpoint
        lost = data.draw(st.integers(0, min(2, STEPS - done - kept)))  # and what a kill undoes
        for number in range(done, done + kept + lost):
            ids, tokens, after = step(ranks)
            assert (ids, tokens) == want[number]
            if number < done + kept:
                state = after
        done += kept
        assert state is not None
        assert state["samples"] == PACKS * done


@pytest.mark.parametrize("before", WORLDS)
@pytest.mark.parametrize("after", WORLDS)
def test_every_pair_of_world_sizes(streams, before, after):
    sources = SOURCES["constant"](*streams)
    alone = [make(sources)]
    want = [step(alone)[:2] for _ in range(4)]
    ranks = [make(sources, rank, before) for rank in range(before)]
    *first, state = step(ranks)
    ranks = [make(sources, rank, after) for rank in range(after)]
    for rank in ranks:
        rank.load_state_dict(state)
    assert [tuple(first), *(step(ranks)[:2] for _ in range(3))] == want


def test_nothing_twice_and_nothing_missed(streams):
    """An epoch and a half of the first source over changing worlds: each of its parts once or twice, no more."""
    sources = [Source(streams[0], epochs=2)]
    whole = make(sources)
    total = whole.steps
    assert total is not None
    seen: dict[int, int] = {}
    state, ranks = None, []
    for number in range(total):
        world = WORLDS[number % len(WORLDS)]
        ranks = [make(sources, rank, world) for rank in range(world)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        ids, _, state = step(ranks)
        for i in ids:
            seen[i & ((1 << PART_BITS) - 1)] = seen.get(i & ((1 << PART_BITS) - 1), 0) + 1
    assert seen == dict.fromkeys(range(len(whole.plans[0].items)), 2)
    assert next(whole, None) is not None
    for rank in ranks:
        assert next(rank, None) is None


def test_a_state_that_cannot_be_is_refused(streams):
    loader = make(SOURCES["constant"](*streams))
    state = next(loader).state
    for change in ({"samples": 6}, {"drawn": [0, 5]}, {"drawn": [-1, 6]}, {"drawn": [5]}, {"samples": -5}):
        with pytest.raises(ValueError, match="checkpoint's state of the data is damaged"):
            loader.load_state_dict({**state, **change})
    loader.load_state_dict(state)
