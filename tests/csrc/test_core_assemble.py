"""Batches gathered from shards against Batch.from_documents of the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill import _C
from tokenmill.data.batch import Batch


def spans_of(mask: np.ndarray) -> np.ndarray:
    """(S, 2) the runs of zeros in a mask."""
    return np.flatnonzero(np.diff(np.concatenate([[True], mask != 0, [True]]))).astype(np.uint64).reshape(-1, 2)


def assemble(tokens, silent, shard, start, length):
    """The rows that _C.assemble fills: tokens, targets, weights, positions, target rows and cu_seqlens."""
    total = int(np.clip(np.sum(np.asarray(length, np.float64)), 0, 10**6))
    rows: list[Any] = [np.full(total, 77, dtype) for dtype in (np.int32, np.int64, np.float32, np.int32, np.int32)]
    rows.append(np.full(len(length) + 1, 77, np.int32))
    count = _C.assemble(tokens, silent, shard, start, length, *rows)
    rows[4] = rows[4][:count]
    return rows


def check(shards: list[np.ndarray], masks: list[np.ndarray], parts: list[tuple[int, int, int]]) -> None:
    shard, start, length = (np.array(column, np.int64) for column in zip(*parts, strict=True))
    tokens, targets, weights, positions, target_rows, cu_seqlens = assemble(
        shards, [spans_of(mask) for mask in masks], shard, start, length
    )
    expected = Batch.from_documents(
        [shards[s][b : b + n] for s, b, n in parts], [masks[s][b : b + n] for s, b, n in parts]
    )
    for got, want in (
        (tokens, expected.tokens),
        (targets, expected.targets),
        (weights, expected.weights),
        (positions, expected.layout.positions),
        (target_rows, expected.target_rows),
        (cu_seqlens, expected.layout.cu_seqlens),
    ):
        assert torch.from_numpy(got).dtype == want.dtype
        assert torch.equal(torch.from_numpy(got), want)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_same_as_from_documents(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shards, masks = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        dtype = data.draw(st.sampled_from([np.uint16, np.uint32]))
        size = data.draw(st.integers(1, 60))
        shards.append(rng.integers(0, 2**16 if dtype == np.uint16 else 2**31, size).astype(dtype))
        masks.append((rng.random(size) < data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))).astype(np.float32))
    parts = []
    for _ in range(data.draw(st.integers(1, 8))):
        shard = data.draw(st.integers(0, len(shards) - 1))
        start = data.draw(st.integers(0, len(shards[shard]) - 1))
        parts.append((shard, start, data.draw(st.integers(1, len(shards[shard]) - start))))
    check(shards, masks, parts)


@pytest.mark.parametrize("lengths", [[300_000], [1] * 200_000, [150_000, 1, 2, 150_000, 3]])
def test_threads_leave_no_row_out(lengths):
    rng = np.random.default_rng(0)
    shard = rng.integers(0, 32000, 300_000).astype(np.uint16)
    mask = (rng.random(300_000) < 0.7).astype(np.float32)
    check([shard], [mask], [(0, int(rng.integers(0, 300_001 - n)), n) for n in lengths])


def test_spans_that_make_no_sense_write_nothing_outside():
    """A damaged file is refused before it comes here; if it did come, memory would still be safe."""
    shard = np.arange(10, dtype=np.uint16)
    rng = np.random.default_rng(0)
    for _ in range(500):
        silent = rng.integers(0, 2**64, (5, 2), dtype=np.uint64) % np.uint64(rng.choice([12, 2**63]))
        tokens, targets, weights, *_ = assemble([shard], [silent], [0, 0], [0, 5], [5, 5])
        assert tokens.tolist() == list(range(10))
        assert np.all((targets == -100) == (weights == 0))


SHARDS = ([np.arange(10, dtype=np.uint16)], [np.zeros((0, 2), np.uint64)])


@pytest.mark.parametrize(
    ("shard", "start", "length", "message"),
    [
        ([0], [8], [3], "outside shard 0 of 10 tokens"),
        ([0], [-1], [3], "outside shard 0"),
        ([0], [0], [0], "outside shard 0"),
        ([0], [11], [1], "outside shard 0"),
        ([0], [2], [2**63 - 1], "outside shard 0"),
        ([0, 1], [0, 0], [1, 1], "part 1 names shard 1 of 1"),
        ([-1], [0], [1], "part 0 names shard -1 of 1"),
        ([0, 0], [0], [1], "one entry a part"),
    ],
)
def test_nothing_outside_a_shard_is_read(shard, start, length, message):
    with pytest.raises(ValueError, match=message):
        assemble(*SHARDS, shard, start, length)


@pytest.mark.parametrize(
    "tokens", [np.arange(10, dtype=np.int64), np.arange(20, dtype=np.uint16)[::2], np.zeros(3, ">u2")]
)
def test_shards_of_another_type(tokens):
    with pytest.raises(ValueError, match="contiguous array of uint16 or uint32"):
        assemble([tokens], SHARDS[1], [0], [0], [1])


def test_one_array_of_spans_a_shard():
    with pytest.raises(ValueError, match="one array of silent spans a shard"):
        assemble(SHARDS[0], [], [0], [0], [1])
    with pytest.raises(ValueError, match="pairs"):
        assemble(SHARDS[0], [np.zeros(3, np.uint64)], [0], [0], [1])


@pytest.mark.parametrize("row", range(6))
def test_rows_of_another_size_or_type_are_not_written(row):
    good: list[Any] = [
        np.zeros(4, np.int32),
        np.zeros(4, np.int64),
        np.zeros(4, np.float32),
        np.zeros(4, np.int32),
        np.zeros(4, np.int32),
        np.zeros(2, np.int32),
    ]

    def replaced(other: Any) -> list[Any]:
        return [*good[:row], other, *good[row + 1 :]]

    for other in (good[row][:-1], np.zeros(99, good[row].dtype), good[row].reshape(1, -1)):
        with pytest.raises(ValueError, match="entries, expected"):
            _C.assemble(*SHARDS, [0], [2], [4], *replaced(other))
    for other in (good[row].astype(np.float64), np.zeros(8, good[row].dtype)[::2]):
        with pytest.raises(TypeError):
            _C.assemble(*SHARDS, [0], [2], [4], *replaced(other))
    good[row].flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        _C.assemble(*SHARDS, [0], [2], [4], *good)
