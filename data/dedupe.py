"""Documents that repeat an earlier one, exactly or nearly: each has keys, and repeats another where they share one.

`exact`: one key, a hash of the text. `minhash`: 14 keys, each of 8 MinHash values of the set of its runs of 5 words
(Broder 1997; bands as in Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4; 5, 14 and 8 as in
FineWeb, Penedo et al. 2024). Two texts whose sets have Jaccard similarity s share a key with probability
1 - (1 - s**8)**14: 5 % at 0.5, 56 % at 0.7, 92 % at 0.8, 99.96 % at 0.9.

The first of several documents is kept, and each is compared with those kept before it: what is removed resembles what
stays. Keys have 64 bits: of 100 million different documents, one shares its only key with another with a probability
of 0.03 %.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tokenmill.data.words import hash_runs, hash_words, mix

Dedupe = Literal["exact", "minhash"]
SHINGLE, BANDS, ROWS = 5, 14, 8
BLOCK = 1024  # runs at a time: a block's values stay in the processor's cache

# h(x) = A x + B modulo 2**32 (Dietzfelbinger et al. 1997): what orders values are the high bits, which are good.
A, B = np.random.default_rng(0).integers(0, 1 << 32, (2, BANDS * ROWS, 1), np.uint32)
A |= np.uint32(1)


def keys(texts: Sequence[str], how: Dedupe) -> NDArray[np.uint64]:
    """(N, K) the keys of each text."""
    if how == "exact":
        return np.array([[_digest(text)] for text in texts], np.uint64).reshape(-1, 1)
    minima = np.array([_minhash(text) for text in texts], np.uint32).reshape(-1, BANDS, ROWS)
    # The band's number is in its key: the same values in two bands are no resemblance.
    bands = np.broadcast_to(np.arange(BANDS, dtype=np.uint64), minima.shape[:2])
    for row in range(ROWS):
        bands = mix(bands + np.uint64(1)) ^ minima[:, :, row]
    return mix(bands)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _minhash(text: str) -> NDArray[np.uint32]:
    """(BANDS * ROWS,) the least value of each hash function over the runs of 5 words of a text."""
    (runs,) = hash_runs(hash_words(text), SHINGLE)
    if not len(runs):  # too short to resemble: it only repeats what is equal
        runs = np.array([_digest(text)], np.uint64)
    x = (runs >> np.uint64(32)).astype(np.uint32)
    least = np.full(BANDS * ROWS, 0xFFFFFFFF, np.uint32)
    for i in range(0, len(x), BLOCK):
        np.minimum(least, (A * x[i : i + BLOCK] + B).min(axis=1), out=least)
    return least


class SeenKeys:
    """A set of keys that only grows, at 8 bytes a key: sorted arrays, each more than twice as long as the next, so that
    a key is moved and looked for a logarithmic number of times."""

    def __init__(self) -> None:
        self._runs: list[NDArray[np.uint64]] = []

    def add(self, keys: NDArray[np.uint64]) -> None:
        """Add keys (K,)."""
        run = np.sort(keys)
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]))
        if len(run):
            self._runs.append(run)

    def contains(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of the keys, of any shape, are in the set."""
        found = np.zeros(keys.shape, np.bool_)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            found |= run[at] == keys
        return found

    def first(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(N,) which of the documents with keys (N, K) repeat no earlier one; their keys are added."""
        new: NDArray[np.bool_] = np.logical_not(self.contains(keys).any(axis=1))
        here: set[int] = set()
        for i in np.flatnonzero(new):
            row = keys[i].tolist()
            new[i] = here.isdisjoint(row)
            if new[i]:
                here.update(row)
        self.add(keys[new].ravel())
        return new
