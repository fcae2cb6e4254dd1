"""Accuracies over seeds and questions, with intervals that hold for other seeds and other questions.

The bootstrap draws seeds, and of each drawn seed its questions, with replacement: so what differs from world to world
and from training to training is in the interval too. With few seeds it is rough. Questions of each kind are drawn
apart, as many as there are. Two arms answer the same questions in the same worlds, so they are compared on the same
draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenmill.trainer.evaluate.metrics import LEVEL, Estimate

RESAMPLES = 2000


class Draws:
    """The resamples of (seeds, questions), the same for everything that is measured on them."""

    def __init__(self, seeds: int, kinds: ArrayLike, *, resamples: int = RESAMPLES) -> None:
        """`kinds` (questions,) is the kind of each."""
        rng = np.random.default_rng(0)
        drawn = rng.integers(seeds, size=(resamples, seeds))
        times = np.stack([(drawn == seed).sum(1) for seed in range(seeds)], axis=1)  # (resamples, seeds)
        of = np.asarray(kinds)
        self.counts: NDArray[np.int64] = np.zeros((resamples, seeds, len(of)), np.int64)
        for kind in np.unique(of):
            here = np.flatnonzero(of == kind)
            # A seed that is drawn twice has its questions drawn twice over.
            self.counts[:, :, here] = rng.multinomial(times * len(here), np.full(len(here), 1 / len(here)))

    def mean(self, values: ArrayLike, which: ArrayLike | None = None) -> Estimate:
        """Of values (seeds, questions), or of those of the kinds that `which` (questions,) is true of, with 95 %
        intervals. Of a difference of two arms, give the differences of their values."""
        found = np.asarray(values, np.float64)
        kept = np.ones(found.shape[1], bool) if which is None else np.asarray(which, bool)
        counts, found = self.counts[:, :, kept], found[:, kept]
        means = (counts * found).sum((1, 2)) / counts.sum((1, 2))
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(float(found.mean()), float(low), float(high))
