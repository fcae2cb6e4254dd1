"""Best-fit-decreasing packing against the quadratic statement of it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill import _C


def naive(lengths: list[int], capacity: int) -> list[int]:
    """The room left in each pack, sorted, which does not depend on how ties are broken."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def check(lengths, capacity: int) -> list[int]:
    """Every item once, in increasing order within its pack, no pack over capacity; the room left, sorted."""
    lengths = np.asarray(lengths, np.int64)
    offsets, items = _C.pack(lengths, capacity)
    assert offsets[0] == 0
    assert offsets[-1] == len(items) == len(lengths)
    assert np.array_equal(np.sort(items), np.arange(len(lengths)))
    rooms = []
    for begin, end in pairwise(offsets):
        assert begin < end
        assert np.all(np.diff(items[begin:end]) > 0)
        rooms.append(capacity - int(lengths[items[begin:end]].sum()))
    assert min(rooms, default=0) >= 0
    return sorted(rooms)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_is_best_fit_decreasing(data):
    capacity = data.draw(st.integers(1, 300))
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=120))
    assert check(lengths, capacity) == naive(lengths, capacity)


@pytest.mark.parametrize("capacity", [63, 64, 65, 4095, 4096, 4097, 300_001])
def test_capacities_around_the_levels_of_the_bitset(capacity):
    rng = np.random.default_rng(capacity)
    lengths = rng.integers(1, capacity + 1, 400)
    assert check(lengths, capacity) == naive(lengths.tolist(), capacity)


def test_nearly_full_on_many_documents():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 1, 100_000), 2, 2048).astype(np.int64)
    assert sum(check(lengths, 2048)) < 0.001 * lengths.sum()


def test_repeats_itself():
    lengths = np.random.default_rng(1).integers(1, 50, 1000)
    first, second = _C.pack(lengths, 64), _C.pack(lengths, 64)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


def test_nothing_to_pack():
    offsets, items = _C.pack(np.zeros(0, np.int64), 8)
    assert offsets.tolist() == [0]
    assert items.tolist() == []


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ([3, 9], 8, r"lengths\[1\] is 9: expected 1 to the capacity 8"),
        ([0], 8, r"lengths\[0\] is 0"),
        ([3, -1], 8, r"lengths\[1\] is -1"),
        ([1], 0, "capacity must be between"),
        ([1], 2**60, "capacity must be between"),
    ],
)
def test_bad_input(lengths, capacity, message):
    with pytest.raises(ValueError, match=message):
        _C.pack(np.array(lengths), capacity)
