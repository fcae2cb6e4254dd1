"""The schedule of sources: within 1 of the exact share at every prefix and phase, from any start the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill import _C

WHOLE = _C.Mixture.WHOLE
WEIGHTS = st.floats(1e-3, 1e3) | st.just(0.0)


def shares_of(weights) -> np.ndarray:
    """(P, m) uint64: each row in proportion, adding up to the whole."""
    rows = []
    for row in np.atleast_2d(np.asarray(weights, np.float64)):
        shares = [int(weight / row.sum() * WHOLE) for weight in row]
        shares[int(row.argmax())] += WHOLE - sum(shares)
        rows.append(shares)
    return np.array(rows, np.uint64)


def mixture(weights, starts=(0,)) -> _C.Mixture:
    return _C.Mixture(np.array(starts, np.uint64), shares_of(weights))


@st.composite
def phased(draw) -> tuple[list[int], np.ndarray]:
    sources, phases = draw(st.integers(1, 64)), draw(st.integers(1, 4))
    starts = [0, *sorted(draw(st.sets(st.integers(1, 1500), min_size=phases - 1, max_size=phases - 1)))]
    rows = st.lists(WEIGHTS, min_size=sources, max_size=sources).filter(any)
    return starts, np.array([draw(rows) for _ in starts])


def due(weights, starts, count: int) -> np.ndarray:
    """(count, m) the exact share of each source after each sample."""
    weights = np.atleast_2d(np.asarray(weights, np.float64))
    phase = np.searchsorted(starts, np.arange(count), side="right") - 1
    return np.cumsum((weights / weights.sum(1, keepdims=True))[phase], axis=0)


def worst(weights, starts, count: int) -> float:
    """The largest distance of any count from its share, at any prefix up to `count`."""
    exact = due(weights, starts, count)
    sources, draws = mixture(weights, starts).draw(0, count)
    taken = np.cumsum(sources[:, None] == np.arange(exact.shape[1]), axis=0)
    assert np.array_equal(draws, taken[np.arange(count), sources] - 1)
    return float(abs(taken - exact).max())


@settings(deadline=None, max_examples=80)
@given(phased())
def test_within_one_of_the_share_at_every_prefix_and_phase(case):
    starts, weights = case
    assert worst(weights, starts, 2000) < 1


@pytest.mark.parametrize(
    "weights",
    [[1.0], [1, 1], [0.85, 0.15], [1] * 64, [1e-6, 1], list(range(1, 65)), [1 / 3] * 3, [2.0**-i for i in range(20)]],
)
def test_within_one_at_length(weights):
    assert worst(weights, [0], 50_000) < 1


@settings(deadline=None, max_examples=60)
@given(phased(), st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 300)), max_size=6))
def test_is_a_function_of_the_sample_number(case, windows):
    starts, weights = case
    sources, draws = mixture(weights, starts).draw(0, 1800)
    moving = mixture(weights, starts)
    for start, count in windows:
        some_sources, some_draws = moving.draw(start, count)
        assert np.array_equal(some_sources, sources[start : start + count])
        assert np.array_equal(some_draws, draws[start : start + count])
        counts = np.bincount(sources[: start + count], minlength=weights.shape[1])
        assert np.array_equal(moving.counts, counts)
        sought = mixture(weights, starts)  # its counts are its whole state
        sought.seek(start + count, counts.astype(np.uint64))
        rest = sought.draw(start + count, 1800 - start - count)
        assert np.array_equal(rest[0], sources[start + count :])
        assert np.array_equal(rest[1], draws[start + count :])


def test_far_out_it_is_as_exact_as_at_the_start():
    far = mixture([1] * 64)
    sources, draws = far.draw(0, 1000)
    for position in (10**9, 64 * 10**15):
        far.seek(position, np.full(64, position // 64, np.uint64))
        some_sources, some_draws = far.draw(position, 1000)
        assert np.array_equal(some_sources, sources)
        assert np.array_equal(some_draws, draws + position // 64)


def test_seek_refuses_other_counts():
    some = mixture([3, 1])
    others = [(8, [5, 3]), (8, [6, 3]), (8, [6, 2, 0]), (8, []), (2**63, [2**62, 2**62]), (1, [2, 2**64 - 1])]
    for position, counts in others:
        with pytest.raises(ValueError, match=f"not those of the mixture at sample {position}"):
            some.seek(position, np.array(counts, np.uint64))
    some.seek(8, np.array([6, 2], np.uint64))
    assert np.array_equal(some.draw(8, 4)[0], mixture([3, 1]).draw(8, 4)[0])


def test_ends_where_the_shares_do():
    shares = np.vstack([shares_of([1, 3]), np.zeros((1, 2), np.uint64)])
    ending = _C.Mixture(np.array([0, 8], np.uint64), shares)
    assert np.bincount(ending.draw(0, 8)[0]).tolist() == [2, 6]
    for start, count in [(0, 9), (8, 1), (9, 0), (1, 8)]:
        with pytest.raises(ValueError, match="run out at sample 8"):
            ending.draw(start, count)


@pytest.mark.parametrize(
    ("starts", "shares", "message"),
    [
        ([], np.zeros((0, 1)), "start at sample 0"),
        ([1], [[WHOLE]], "start at sample 0"),
        ([0, 5, 5], [[WHOLE]] * 3, "later and later"),
        ([0], np.zeros((1, 0)), "1 to 65535 sources"),
        ([0], [[WHOLE, 1]], "phase 0 do not add up"),
        ([0], [[0]], "phase 0 do not add up"),
        ([0, 3, 4], [[WHOLE], [0], [WHOLE]], "phase 1 do not add up"),
        ([0, 1], [[WHOLE]], r"starts must be \(P,\)"),
        ([0], [2**63, 2**63], r"starts must be \(P,\)"),
    ],
)
def test_bad_input(starts, shares, message):
    with pytest.raises(ValueError, match=message):
        _C.Mixture(np.array(starts, np.uint64), np.array(shares, np.uint64))
