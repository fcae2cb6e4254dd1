"""Block checksums: zlib's, read once, and a damaged block found wherever it is."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill import _C


def sums(tokens: np.ndarray, block: int) -> np.ndarray:
    data = tokens.tobytes()
    return np.array([zlib.crc32(data[i : i + block]) for i in range(0, len(data), block)], np.uint32)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_finds_the_first_part_that_is_damaged(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    block = data.draw(st.integers(1, 70))
    shards = []
    for _ in range(data.draw(st.integers(1, 3))):
        dtype = data.draw(st.sampled_from([np.uint16, np.uint32]))
        shards.append(rng.integers(0, 2**16, data.draw(st.integers(1, 200))).astype(dtype))
    crc32 = [sums(shard, block) for shard in shards]
    flip = data.draw(st.none() | st.integers(0, len(shards) - 1))
    at = 0
    if flip is not None:
        at = data.draw(st.integers(0, shards[flip].nbytes - 1))
        shards[flip].view(np.uint8)[at] ^= 1 << data.draw(st.integers(0, 7))
    checked = [np.zeros(len(c), np.bool_) for c in crc32]
    for _ in range(2):
        shard = rng.integers(0, len(shards), 6)
        start = np.array([rng.integers(0, len(shards[s])) for s in shard])
        length = np.array([rng.integers(1, len(shards[s]) - b + 1) for s, b in zip(shard, start, strict=True)])
        want, seen = -1, [c.copy() for c in checked]
        for i, (s, b, n) in enumerate(zip(shard, start, length, strict=True)):
            width = shards[s].itemsize
            blocks = range(b * width // block, ((b + n) * width - 1) // block + 1)
            bad = s == flip and at // block in blocks
            want = i if bad and want < 0 else want
            seen[s][[k for k in blocks if not (s == flip and k == at // block)]] = True
        assert _C.find_damaged(shards, crc32, checked, shard, start, length, block) == want
        assert all(np.array_equal(a, b) for a, b in zip(checked, seen, strict=True))


def test_what_was_checked_is_not_read_again():
    tokens = np.arange(100, dtype=np.uint16)
    arguments = [tokens], [sums(tokens, 64)], [np.zeros(4, np.bool_)], [0, 0], [0, 90], [10, 10], 64
    assert _C.find_damaged(*arguments) == -1
    assert arguments[2][0].tolist() == [True, False, True, True]
    tokens[0] ^= 1
    assert _C.find_damaged(*arguments) == -1
    arguments[2][0][:] = False
    assert _C.find_damaged(*arguments) == 0


def test_many_blocks_in_threads():
    tokens = np.random.default_rng(0).integers(0, 2**16, 1 << 20).astype(np.uint16)
    crc32, checked = [sums(tokens, 1 << 12)], [np.zeros(512, np.bool_)]
    tokens[700_000] ^= 8
    parts = np.zeros(1024, np.int64), np.arange(1024) << 10, np.full(1024, 1024)
    assert _C.find_damaged([tokens], crc32, checked, *parts, 1 << 12) == 700_000 >> 10 & ~1
    assert np.flatnonzero(~checked[0]).tolist() == [700_000 * 2 >> 12]


def test_bad_input():
    tokens, crc32, checked = np.arange(10, dtype=np.uint16), np.zeros(3, np.uint32), np.zeros(3, np.bool_)
    for arguments, message in [
        (([tokens], [crc32[1:]], [checked], [0], [0], [1], 8), "3 blocks and 2 sums"),
        (([tokens], [crc32], [checked[1:]], [0], [0], [1], 8), "3 blocks and 3 sums"),
        (([tokens], [], [], [0], [0], [1], 8), "one list of sums a shard"),
        (([tokens], [crc32], [], [0], [0], [1], 8), "one list of sums a shard"),
        (([tokens], [crc32], [checked], [0], [0], [1], 0), "one list of sums a shard"),
        (([tokens], [crc32], [checked], [0], [5], [6], 8), "outside shard 0"),
        (([tokens], [crc32], [checked], [1], [0], [1], 8), "names shard 1 of 1"),
        (([tokens], [crc32], [checked], [0], [2**62], [2**62], 8), "outside shard 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.find_damaged(*arguments)
