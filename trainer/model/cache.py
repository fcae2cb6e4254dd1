"""The keys and values of earlier tokens, so that a new token costs one row a layer: rings as wide as the window.

A cache is a pool of rows, the same in every layer. Each sequence has a ring of them: the key of position p goes to slot
p % width, over the one that has just left the window. So memory is bounded by the window, however long a sequence gets.

Samples of one prompt begin with the same rows, its keys, which are computed once; each has rows of its own for what it
adds. Those of the first sample are the prompt's as far as they reach: the samples of a prompt advance together, so when
a row is written over, it is in no window any more.

Keys come here after rotary embedding. A new token's query sees all keys in its ring, so their order does not matter.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.kernels.layout import KeyLayout, Layout, bucket


class Cache:
    """Before each forward pass, `begin` or `advance` says where its tokens' keys go, and gives the layout for it."""

    def __init__(
        self,
        lengths: NDArray[np.int64],
        window: int | None,
        *,
        samples: int,
        growth: int,
        rows: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """For prompts of `lengths` (P,), of which each gets `samples` sequences that may add `growth` tokens to it. Of
        at most `rows` rows a layer, unless one prompt needs more.
        """
        longest = int(lengths.max()) + growth
        self.width = min(longest, window or longest)
        self.lengths, self.samples, self.growth = lengths, samples, growth
        self.needs = np.minimum(lengths + growth, self.width) + (samples - 1) * min(growth, self.width)  # (P,) rows
        rows = min(int(self.needs.sum()), max(rows, int(self.needs.max())))
        self.references = np.zeros(rows, np.int64)  # how many sequences hold each row; 0: it is free
        self.held: list[NDArray[np.int64]] = []  # the rows that each sequence holds
        self.positions = np.zeros(0, np.int64)  # (N,) of each sequence's next token
        self.rings = torch.zeros(0, self.width, dtype=torch.int64, device=device)  # (N, width) its own rows, by slot
        self.table = self.rings.clone()  # (N, width) the rows of the keys that it sees, by slot
        self.pools: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values (R, Hkv, d) of each layer
        self.kept: Tensor | None = None  # (M,) the pass's tokens whose keys are kept; None: all of them
        self.places = self.rings[:, 0]  # (M,) the rows that they go to

    @property
    def free(self) -> int:
        """How many rows are free."""
        return int((self.references == 0).sum())

    def begin(self, first: int, end: int) -> Layout:
        """Prompts `first` to `end`, for which there must be room: the layout of them, each once. Their sequences come
        last, `samples` a prompt.
        """
        device, lengths = self.rings.device, self.lengths[first:end]
        free = np.split(np.flatnonzero(self.references == 0), np.cumsum(self.needs[first:end]))
        rings = np.zeros((end - first, self.samples, self.width), np.int64)
        kept, places, start = [], [], 0
        for length, ring, rows in zip(lengths.tolist(), rings, free, strict=False):
            oldest = max(0, length - self.width + 1)  # of the prompt's positions that the next token sees
            seen = np.arange(oldest, length) % self.width
            added = np.arange(length, length + min(self.growth, self.width)) % self.width
            of_first = min(length + self.growth, self.width)
            ring[0, :of_first] = rows[:of_first]
            ring[1:, added] = rows[of_first:].reshape(self.samples - 1, len(added))
            prompt = ring[0, seen]
            self.held.append(rows[:of_first])
            self.held += [np.concatenate([prompt, own]) for own in ring[1:, added]]
            kept.append(np.arange(start + oldest, start + length))
            places.append(prompt)
            start += length
        for rows in self.held[len(self.positions) :]:
            self.references[rows] += 1
        self.positions = np.concatenate([self.positions, np.repeat(lengths, self.samples)])
        new = torch.from_numpy(rings).to(device)
        self.rings = torch.cat([self.rings, new.flatten(0, 1)])
        self.table = torch.cat([self.table, new[:, 0].repeat_interleave(self.samples, 0)])
        self.kept = torch.from_numpy(np.concatenate(kept)).to(device)
        self.places = torch.from_numpy(np.concatenate(places)).to(device)
        return Layout.from_lengths(lengths.tolist(), device=device)

    def advance(self) -> Layout:
        """The layout of one new token for every sequence, whose query sees the keys in its ring, its own among them."""
        count, device = len(self.positions), self.rings.device
        seen = np.minimum(self.positions + 1, self.width)
        total, longest = int(seen.sum()), int(seen.max())  # known here, so nothing waits for the device
        positions = torch.from_numpy(self.positions).to(device)
        self.positions = self.positions + 1

        slots = (positions % self.width)[:, None]
        rows = self.rings.gather(1, slots)
        self.table.scatter_(1, slots, rows)
        self.kept, self.places = None, rows[:, 0]

        spans = (positions + 1).clamp(max=self.width)
        sequences = torch.arange(count, device=device)
        bounds = torch.zeros(count + 1, dtype=torch.int64, device=device)
        torch.cumsum(spans, 0, out=bounds[1:])
        of_key = torch.repeat_interleave(sequences, spans, output_size=total)
        slot = torch.arange(total, device=device) - bounds[of_key]
        return Layout(
            positions.int(),
            torch.arange(count + 1, dtype=torch.int32, device=device),
            1,  # exact, so that it never changes
            sequences,
            positions.int() + 1,
            KeyLayout(self.table[of_key, slot], bounds.int(), bucket(longest)),
        )

    def keep(self, going: NDArray[np.bool_]) -> None:
        """Only the sequences that are `going` (N,) stay; the others' rows are free unless another holds them."""
        if going.all():
            return
        for gone in np.flatnonzero(~going):
            self.references[self.held[gone]] -= 1
        stay = np.flatnonzero(going)
        self.held = [self.held[i] for i in stay]
        self.positions = self.positions[stay]
        index = torch.from_numpy(stay).to(self.rings.device)
        self.rings, self.table = self.rings[index], self.table[index]

    def layer(self, number: int) -> LayerCache:
        return LayerCache(self, number)


class LayerCache(NamedTuple):
    """One layer's part of a cache."""

    cache: Cache
    number: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the pass's k and v (T, Hkv, d), as far as they will be seen again, and give those that its queries see:
        themselves, or those in the cache, gathered by the layout.
        """
        cache = self.cache
        if self.number not in cache.pools:  # made here, in the dtype and on the device that the layer computes in
            keys, values = (x.new_empty(len(cache.references), *x.shape[1:]) for x in (k, v))
            cache.pools[self.number] = keys, values
        pool = cache.pools[self.number]
        for rows, x in zip(pool, (k, v), strict=True):
            rows.index_copy_(0, cache.places, x if cache.kept is None else x.index_select(0, cache.kept))
        return pool if cache.kept is None else (k, v)
