"""Hashes of the words of a text and of every run of them: what near-duplicates and contamination are found by.

A word is a run of letters and digits in lower case, so that case, punctuation and layout make no difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 16  # characters at a time, which stay in the processor's cache
BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    return re.findall(r"[^\W_]+", text.lower())


def hash_words(text: str) -> NDArray[np.uint64]:
    """(W,) a 64-bit hash of each of the words of a text, in order; the same in every process. A word across more than
    65,536 characters may be cut."""
    is_word, values, powers, inverses = _tables()
    codes = np.frombuffer(text.lower().encode("utf-32-le"), np.uint32)
    found = []
    start = 0
    while start < len(codes):
        inside = is_word[codes[start : start + BLOCK]]
        end = len(inside)
        if start + end < len(codes) and inside[-1] and not inside.all():
            end = int(np.flatnonzero(~inside)[-1])  # its last word may go on beyond the block
        padded = np.zeros(end + 2, np.bool_)
        padded[1:-1] = inside[:end]
        edges = np.flatnonzero(padded[1:] != padded[:-1])
        first, last = edges[::2], edges[1::2]
        # A word's hash is a polynomial in BASE over its characters: a difference of two sums over the text before.
        sums = np.zeros(end + 1, np.uint64)
        np.cumsum(values[codes[start : start + end]] * powers[:end], out=sums[1:])
        found.append(mix((sums[last] - sums[first]) * inverses[first]))
        start += end
    return np.concatenate(found) if found else np.empty(0, np.uint64)


def hash_runs(hashes: NDArray[np.uint64], *sizes: int) -> Iterator[NDArray[np.uint64]]:
    """For each n of the increasing sizes, (W - n + 1,) a hash of each run of n words, of the words' hashes (W,); empty
    where there are fewer."""
    runs, n = hashes.copy(), 1
    for size in sizes:
        while n < size and len(runs):
            runs = runs[:-1]
            runs *= np.uint64(BASE)
            runs += hashes[n:]
            n += 1
        yield mix(runs)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit over all 64 (the finaliser of SplitMix64: Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@cache
def _tables() -> tuple[NDArray[np.bool_], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """By code point: whether it is of a word, and a random number for it. By position: powers of BASE, and inverses."""
    size = 0x110000
    is_word = np.fromiter((chr(code).isalnum() for code in range(size)), np.bool_, size)
    powers, inverses = (
        np.multiply.accumulate(np.full(BLOCK, base, np.uint64)) for base in (BASE, pow(BASE, -1, 1 << 64))
    )
    return is_word, mix(np.arange(1, size + 1, dtype=np.uint64)), powers, inverses
