"""Philox against the published known answers, and NEFTune's uniforms against the contract spelled out in Python."""

from __future__ import annotations

import numpy as np
import pytest

from tokenmill import _C

# Random123's kat_vectors for philox4x32-10.
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def split(value: int) -> tuple[int, int]:
    return value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF


def contract(seed: int, step: int, document: int, position: int, channel: int) -> float:
    key = _C.philox((*split(step), 0x4E454654, 0), split(seed))[:2]
    word = _C.philox((*split(document), position, channel // 4), key)[channel % 4]
    return (2 * (word >> 8) + 1 - 2**24) * 2.0**-24


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert tuple(_C.philox(counter, key)) == answer


@pytest.mark.parametrize("dim", [1, 3, 4, 7])
@pytest.mark.parametrize(
    ("seed", "step", "document", "position"),
    [(0, 0, 0, 0), (2**64 - 1, 2**63 + 5, 7 << 40 | 123, 4000), (3, 2**32, -1, 2**32 - 2)],
)
def test_uniforms_are_the_contract(seed, step, document, position, dim):
    out = _C.neftune_uniform(seed, step, document, position, 2, dim)
    assert out.dtype == np.float32
    assert out.shape == (2, dim)
    expected = [[contract(seed, step, document, position + i, j) for j in range(dim)] for i in range(2)]
    assert out.tolist() == expected  # fp64 equality: the values are exact in fp32


def test_rows_do_not_depend_on_where_the_range_begins():
    whole = _C.neftune_uniform(5, 6, 7, 0, 9, 10)
    assert np.array_equal(_C.neftune_uniform(5, 6, 7, 4, 5, 10), whole[4:])
    assert _C.neftune_uniform(5, 6, 7, 0, 0, 10).shape == (0, 10)


def test_distribution_is_uniform_symmetric_and_never_zero():
    values = _C.neftune_uniform(1, 2, 3, 0, 1000, 1000).astype(np.float64).ravel()
    assert abs(values).max() < 1
    assert np.all(values != 0)
    assert abs(values.mean()) < 5 / np.sqrt(3 * values.size)  # five standard errors
    assert abs(values.std() - 1 / np.sqrt(3)) < 1e-3
    counts = np.histogram(values, bins=64, range=(-1, 1))[0]
    expected = values.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 6 * np.sqrt(2 * 63)


def test_bad_input():
    with pytest.raises(ValueError, match="must not be negative"):
        _C.neftune_uniform(0, 0, 0, 0, -1, 4)
    with pytest.raises(TypeError):
        _C.neftune_uniform(-1, 0, 0, 0, 1, 4)
