"""The order of samples: weights that change, sources that end, and any place of it reached at once."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.data.mixture import WHOLE, Feed, SampleOrder, phases


def feeds(weights: Any, limits: Any = None, packs: int = 7) -> list[Feed]:
    return [Feed(packs, ((0, w),), limit) for w, limit in zip(weights, limits or [None] * len(weights), strict=True)]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 60) | st.none()), min_size=1, max_size=12),
    st.integers(0, 600),
)
def test_sources_that_end(sources, middle):
    order = SampleOrder(feeds([w for w, _ in sources], [n for _, n in sources]), 3)
    limits = [limit for _, limit in sources]
    total = sum(limit for limit in limits if limit is not None)
    assert order.samples == (None if None in limits else total)
    count = order.samples or 600
    taken = np.cumsum(order.take(0, count)[0][:, None] == np.arange(len(sources)), axis=0)
    assert max(abs(taken[n - 1] - order.share(n)).max() for n in range(1, count + 1)) < 1
    for given_, limit, end in zip(taken.T, limits, order.ends, strict=True):
        if limit is not None:
            assert given_.max() <= limit  # never more
            if end is not None and end < count:
                assert given_[end:].min() >= limit - 1  # and at its end all of them, but for the one that is owed
    if order.samples is not None:
        assert taken[-1].tolist() == limits
        with pytest.raises(ValueError, match=f"run out at sample {count}"):
            order.take(count, 1)
    middle = min(middle, count)
    resumed = SampleOrder(feeds([w for w, _ in sources], [n for _, n in sources]), 3)
    resumed.seek(middle, order.drawn(middle))
    for got, want in zip(resumed.take(middle, count - middle), order.take(0, count), strict=True):
        assert np.array_equal(got, want[middle:])


def test_the_shares_of_a_source_that_ended_go_to_the_others():
    order = SampleOrder(feeds([2, 1, 1], [4, None, None]), 0)
    assert order.ends == [8, None, None]
    assert np.bincount(order.take(0, 8)[0]).tolist() == [4, 2, 2]
    assert np.bincount(order.take(8, 10)[0], minlength=3).tolist() == [0, 5, 5]


def test_weights_that_change():
    order = SampleOrder([Feed(100, ((0, 1.0), (10, 0.0), (20, 3.0))), Feed(100, ((0, 1.0),))], 0)
    sources = order.take(0, 40)[0]
    assert [np.bincount(sources[a:b], minlength=2).tolist() for a, b in ((0, 10), (10, 20), (20, 40))] == [
        [5, 5],
        [0, 10],
        [15, 5],
    ]
    assert order.share(30) == [12.5, 17.5]
    same = SampleOrder(feeds([1.0, 1.0], packs=100), 0)
    assert np.array_equal(same.take(0, 10)[1], order.take(0, 10)[1])  # what comes later changes nothing before


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(1, 400), st.floats(0, 10)), max_size=3, unique_by=lambda pair: pair[0]),
            st.integers(1, 100) | st.none(),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_phases_share_out_the_whole_and_each_limit_exactly(sources):
    some = [Feed(5, ((0, 1.0), *sorted(changes)), limit) for changes, limit in sources]
    try:
        starts, rows, ends = phases(some)
    except ValueError as error:
        assert "no source that has packs left has a weight" in str(error)  # noqa: PT017
        return
    assert starts[0] == 0
    assert all(a < b for a, b in pairwise(starts))
    assert all(sum(row) == WHOLE for row in rows[:-1])
    assert sum(rows[-1]) in (0, WHOLE)
    for i, feed in enumerate(some):
        end = ends[i]
        due = sum(row[i] * (b - a) for row, (a, b) in zip(rows, pairwise(starts), strict=False))
        if end is not None:
            assert feed.limit is not None
            assert due == feed.limit * WHOLE
            assert all(row[i] == 0 for start, row in zip(starts, rows, strict=True) if start >= end)


def test_any_place_is_reached_in_under_a_millisecond():
    weights = [1.0] * 64
    seconds = []
    for _ in range(20):
        order = SampleOrder(feeds(weights, packs=10**12), 5)
        begin = time.perf_counter()
        order.seek(10**9, [10**9 // 64] * 64)
        order.take(10**9, 1)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1e-3


def test_nothing_left_is_said():
    with pytest.raises(ValueError, match="from sample 6 on no source that has packs left has a weight above 0"):
        SampleOrder([Feed(3, ((0, 1.0),), 6), Feed(3, ((0, 0.0), (100, 1.0)))], 0)
    with pytest.raises(ValueError, match="from sample 5 on"):
        SampleOrder([Feed(3, ((0, 1.0), (5, 0.0)))], 0)
