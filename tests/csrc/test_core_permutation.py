"""The keyed bijection of [0, n): every index once, any range by itself, spread evenly over keys."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill import _C

KEYS = st.integers(0, 2**64 - 1)


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 5000), KEYS)
def test_is_a_bijection(n, key):
    assert np.array_equal(np.sort(_C.permutation(n, key, 0, n)), np.arange(n, dtype=np.uint64))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 2**63), KEYS, st.data())
def test_any_range_is_found_without_the_rest(n, key, data):
    start = data.draw(st.integers(0, n - 1))
    count = data.draw(st.integers(0, min(n - start, 3000)))
    images = _C.permutation(n, key, start, count)
    assert len(np.unique(images)) == count
    assert np.all(images < n)
    for i in {0, count // 2, count - 1} if count else ():
        assert _C.permute(start + i, n, key) == images[i]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_order_of_a_few_is_about_as_likely(n):
    trials = 24000
    keys = [_C.derive_key(0, 0, epoch) for epoch in range(trials)]
    seen = dict.fromkeys(itertools.permutations(range(n)), 0)
    for key in keys:
        seen[tuple(int(i) for i in _C.permutation(n, key, 0, n))] += 1
    expected = trials / len(seen)
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    freedom = len(seen) - 1
    assert chi_square < freedom + 6 * np.sqrt(2 * freedom) + 6


def test_looks_random():
    n = 100_003
    images = _C.permutation(n, 42, 0, n).astype(np.float64)
    other = _C.permutation(n, 43, 0, n).astype(np.float64)
    for a, b in [(images, np.arange(n)), (images, other), (images[1:], images[:-1])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)
    assert (images == np.arange(n)).sum() < 10  # one fixed point is expected


def test_keys_differ_by_seed_source_and_epoch():
    arguments = itertools.product((0, 1, 2**64 - 1), (0, 1, 2**32 - 1), (0, 1, 2**32, 2**64 - 1))
    keys = {_C.derive_key(*a) for a in arguments}
    assert len(keys) == 36


def test_order_is_pinned():
    """The order of samples is a promise: a checkpoint resumes under a later version with the same order."""
    assert _C.permutation(1000, 12345, 0, 5).tolist() == [405, 258, 482, 497, 384]
    assert _C.permutation(10**12, 12345, 0, 2).tolist() == [285655313355, 634695669672]
    assert _C.derive_key(1, 2, 3) == 4790976648236552900


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _C.permutation(0, 1, 0, 0), "n >= 1"),
        (lambda: _C.permute(5, 5, 1), "index 5 is not below n = 5"),
        (lambda: _C.permutation(5, 1, 3, 3), "not all below n = 5"),
        (lambda: _C.permutation(5, 1, 2**64 - 1, 2), "not all below n = 5"),
        (lambda: _C.permutation(5, 1, 0, 2**62), "above n = 5"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
