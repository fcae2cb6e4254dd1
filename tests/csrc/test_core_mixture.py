"""The schedule of sources: within 1 of the exact share at every prefix, from any start the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill import _C

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=64)


def worst(weights, count: int) -> float:
    """The largest distance of any count from its share, at any prefix up to `count`."""
    sources, draws = _C.Mixture(weights).draw(0, count)
    taken = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    assert np.array_equal(draws, taken[np.arange(count), sources] - 1)
    shares = np.asarray(weights) / np.sum(weights)
    return float(abs(taken - shares * np.arange(1, count + 1)[:, None]).max())


@settings(deadline=None, max_examples=60)
@given(WEIGHTS)
def test_within_one_of_the_share_at_every_prefix(weights):
    assert worst(weights, 2000) < 1


@pytest.mark.parametrize(
    "weights",
    [[1.0], [1, 1], [0.85, 0.15], [1] * 64, [1e-6, 1], list(range(1, 65)), [1 / 3] * 3, [2.0**-i for i in range(20)]],
)
def test_within_one_at_length(weights):
    assert worst(weights, 50_000) < 1


@settings(deadline=None, max_examples=60)
@given(WEIGHTS, st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 300)), max_size=6))
def test_is_a_function_of_the_sample_number(weights, windows):
    sources, draws = _C.Mixture(weights).draw(0, 1800)
    mixture = _C.Mixture(weights)
    for start, count in windows:
        some_sources, some_draws = mixture.draw(start, count)
        assert np.array_equal(some_sources, sources[start : start + count])
        assert np.array_equal(some_draws, draws[start : start + count])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "1 to 65535 sources, got 0"),
        ([1.0, 0.0], "positive and finite"),
        ([-1.0], "positive and finite"),
        ([float("nan"), 1.0], "positive and finite"),
        ([float("inf")], "positive and finite"),
        ([1e308] * 20, "too far apart"),
    ],
)
def test_bad_input(weights, message):
    with pytest.raises(ValueError, match=message):
        _C.Mixture(np.array(weights, np.float64))
