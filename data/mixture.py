"""The order of samples: which pack of which source each global sample number is, a pure function of seed and number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenmill import _C

WHOLE = _C.Mixture.WHOLE  # a share of 1


@dataclass(frozen=True)
class Feed:
    """How one source is mixed in."""

    packs: int  # that it holds
    weights: tuple[tuple[int, float], ...]  # from sample number ... on this weight, relative to the other sources'
    limit: int | None = None  # packs that it gives at most; None: it begins again as often as asked

    def weight(self, sample: int) -> Fraction:
        return Fraction(next(weight for start, weight in reversed(self.weights) if start <= sample))


class SampleOrder:
    """Sources are interleaved by weight, at every prefix within 1 of the exact share; within a source, each epoch goes
    through all its packs in a fresh order.

    The exact share of a source is the sum over all samples so far of its weight over the weight of all sources. One
    that reaches its limit leaves its share to the others from then on.
    """

    def __init__(self, feeds: Sequence[Feed], seed: int) -> None:
        """Raises ValueError where at some sample no source has a weight, though not all have reached their limits."""
        self._feeds = list(feeds)
        self._seed = seed
        self._starts, self._shares, self.ends = phases(self._feeds)
        self._schedule = _C.Mixture(np.array(self._starts, np.uint64), np.array(self._shares, np.uint64))

    @property
    def samples(self) -> int | None:
        """How many samples there are in all; None where there is no end of them."""
        return None if any(self._shares[-1]) else self._starts[-1]

    def take(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Samples `start` to `start + count`: the source of each and its pack within that source, (count,) each.

        Raises ValueError where the sources run out before. Going on from the last call, or from `seek`, is the cheap
        way; any other start costs time in proportion to the samples before it.
        """
        sources, draws = self._schedule.draw(start, count)
        packs = np.empty(count, np.int64)
        for source in np.unique(sources):
            here = np.flatnonzero(sources == source)
            packs[here] = self._draws(int(source), int(draws[here[0]]), len(here))
        return sources.astype(np.int64), packs

    def drawn(self, samples: int) -> NDArray[np.int64]:
        """(m,) how many of the first `samples` each source gives."""
        self._schedule.draw(samples, 0)
        return self._schedule.counts.astype(np.int64)

    def seek(self, samples: int, drawn: ArrayLike) -> None:
        """Be at sample `samples` at once, given what `drawn` says there. Raises ValueError where that cannot be."""
        self._schedule.seek(samples, np.asarray(drawn, np.uint64))

    def share(self, samples: int) -> list[float]:
        """(m,) the exact share that each source has of the first `samples`, in packs."""
        due = [0] * len(self._feeds)
        for i, start in enumerate(self._starts):
            stop = min(self._starts[i + 1] if i + 1 < len(self._starts) else samples, samples)
            due = [d + share * max(stop - start, 0) for d, share in zip(due, self._shares[i], strict=True)]
        return [float(Fraction(d, WHOLE)) for d in due]

    def _draws(self, source: int, start: int, count: int) -> NDArray[np.int64]:
        """The packs that a source gives at its draws `start` to `start + count`: whole epochs, one after the other."""
        n = self._feeds[source].packs
        pieces = []
        while count > 0:
            epoch, within = divmod(start, n)
            size = min(count, n - within)
            key = _C.derive_key(self._seed, source, epoch)
            pieces.append(_C.permutation(n, key, within, size).astype(np.int64))
            start, count = start + size, count - size
        return np.concatenate(pieces)


def phases(feeds: Sequence[Feed]) -> tuple[list[int], list[list[int]], list[int | None]]:
    """Where the shares of sources change, the shares from there on in units of 1 / WHOLE, and the sample number that
    each source has no share from on (None: it goes on); exactly, in integers.

    A source's last sample is one in which it has just what is left to its limit, and the others the rest of it, so
    that in the end it has given its limit to the last pack.
    """
    left = [None if feed.limit is None else feed.limit * WHOLE for feed in feeds]
    changes = sorted({start for feed in feeds for start, _ in feed.weights})
    ends: list[int | None] = [None] * len(feeds)
    starts: list[int] = []
    rows: list[list[int]] = []
    sample = 0

    def go(count: int, shares: list[int]) -> None:
        nonlocal sample
        starts.append(sample)
        rows.append(shares)
        sample += count
        for i, share in enumerate(shares):
            rest = left[i]
            if rest is not None:
                left[i] = rest - share * count
                if left[i] == 0 and ends[i] is None:
                    ends[i] = sample

    while True:
        weights = [Fraction(0) if end is not None else f.weight(sample) for f, end in zip(feeds, ends, strict=True)]
        if not any(weights):
            if None in ends:
                raise ValueError(f"from sample {sample} on no source that has packs left has a weight above 0")
            starts.append(sample)
            rows.append([0] * len(feeds))
            return starts, rows, ends
        shares = _split(WHOLE, weights)
        change = next((start for start in changes if start > sample), None)
        lasts = [rest // share for rest, share in zip(left, shares, strict=True) if rest is not None and share]
        count = min(lasts, default=None)
        if change is not None and (count is None or change - sample <= count):
            go(change - sample, shares)
        elif count is None:
            starts.append(sample)
            rows.append(shares)
            return starts, rows, ends
        elif count > 0:
            go(count, shares)
        else:  # the sample in which a source has its last
            last: dict[int, int] = {}
            while over := {i: r for i, r in enumerate(left) if r is not None and i not in last and r < shares[i]}:
                last |= over
                others = [Fraction(0) if i in last else weight for i, weight in enumerate(weights)]
                rest = WHOLE - sum(last.values())
                if rest and not any(others):
                    raise ValueError(f"from sample {sample} on no source that has packs left has a weight above 0")
                shares = [last.get(i, share) for i, share in enumerate(_split(rest, others) if rest else shares)]
            go(1, shares)


def _split(whole: int, weights: Sequence[Fraction]) -> list[int]:
    """A whole in proportion to weights, in integers that add up to it."""
    total = sum(weights)
    shares = [math.floor(whole * weight / total) for weight in weights]
    shares[max(range(len(weights)), key=lambda i: weights[i])] += whole - sum(shares)
    return shares
