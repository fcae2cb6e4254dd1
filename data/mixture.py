"""The order of samples: which pack of which source each global sample number is, a pure function of seed and number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tokenmill import _C


class SampleOrder:
    """Sources are interleaved by weight; within a source, each epoch goes through all its packs in a fresh order."""

    def __init__(self, weights: Sequence[float], packs: Sequence[int], seed: int) -> None:
        """`weights` and `packs`, (m,) each: the share of each source and how many packs it holds.

        Raises ValueError where a weight is not positive.
        """
        self._schedule = _C.Mixture(np.asarray(weights, np.float64))
        self._packs = list(packs)
        self._seed = seed

    def take(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Samples `start` to `start + count`: the source of each and its pack within that source, (count,) each."""
        sources, draws = self._schedule.draw(start, count)
        packs = np.empty(count, np.int64)
        for source in np.unique(sources):
            here = np.flatnonzero(sources == source)
            packs[here] = self._draws(int(source), int(draws[here[0]]), len(here))
        return sources.astype(np.int64), packs

    def _draws(self, source: int, start: int, count: int) -> NDArray[np.int64]:
        """The packs that a source gives at its draws `start` to `start + count`: whole epochs, one after the other."""
        n = self._packs[source]
        pieces = []
        while count > 0:
            epoch, within = divmod(start, n)
            size = min(count, n - within)
            key = _C.derive_key(self._seed, source, epoch)
            pieces.append(_C.permutation(n, key, within, size).astype(np.int64))
            start, count = start + size, count - size
        return np.concatenate(pieces)
