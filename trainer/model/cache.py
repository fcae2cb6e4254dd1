"""The keys and values of earlier tokens, so that a new token costs one row a layer: rings as wide as the window.

A cache is a pool of rows, the same in every layer. Each sequence has a ring of them: the key of position p goes to slot
p % width, over the one that has just left the window. So memory is bounded by the window, however long a sequence gets.

What several sequences begin with has rows of its own, computed once and seen by all of them: the tokens that prompts
share, and the prompt that several samples go on from. Of these, the first goes on in the prompt's rows as far as they
reach: the samples of a prompt advance together, so when a row is written over, it is in no window any more.

Keys come here after rotary embedding. A new token's query sees all keys in its ring, so their order does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.kernels.layout import KeyLayout, Layout, bucket


class Group(NamedTuple):
    """Prompts `first` to `end`, which begin with the same `shared` tokens: fewer than any of them has, 0 where it is
    one prompt alone."""

    first: int
    end: int
    shared: int


class Cache:
    """Before each forward pass, `begin` or `advance` says where its tokens' keys go, and gives the layout for it."""

    def __init__(
        self,
        lengths: NDArray[np.int64],
        groups: Sequence[Group],
        window: int | None,
        *,
        samples: int,
        growth: int,
        rows: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """For prompts of `lengths` (P,) in groups, of which each prompt gets `samples` sequences that may add `growth`
        tokens to it. Of at most `rows` rows a layer, unless one group needs more.
        """
        longest = int(lengths.max()) + growth
        self.width = min(longest, window or longest)
        self.lengths, self.groups, self.samples, self.growth = lengths, groups, samples, growth
        self.needs = np.array([self._needs(*group) for group in groups])  # (G,) rows
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

    def _needs(self, first: int, end: int, shared: int) -> int:
        """How many rows a group takes: those of what is shared, and each prompt's."""
        own = np.minimum(self.lengths[first:end] - shared + self.growth, self.width)
        others = (self.samples - 1) * min(self.growth, self.width) * len(own)
        return max(0, shared - self._oldest(self.lengths[first:end].min())) + int(own.sum()) + others

    def _oldest(self, length: int) -> int:
        """The first position that the token after so many sees."""
        return max(0, int(length) - self.width + 1)

    def begin(self, first: int, end: int) -> Layout:
        """Groups `first` to `end`, for which there must be room: the layout of their tokens, of each group those that
        are shared, if any are, and then each prompt's own. Their sequences come last, `samples` a prompt.
        """
        device, width, groups = self.rings.device, self.width, self.groups[first:end]
        free = np.flatnonzero(self.references == 0)
        taken = np.cumsum([0, *self.needs[first:end]])
        begun = slice(groups[0].first, groups[-1].end)
        lengths = self.lengths[begun]
        rings = np.zeros((len(lengths), self.samples, width), np.int64)
        table = np.zeros((len(lengths), width), np.int64)
        kept, places, start = [], [], 0
        for group, at in zip(groups, taken, strict=False):
            oldest = self._oldest(self.lengths[group.first : group.end].min())
            common = np.arange(oldest, group.shared)  # positions of what is shared that a next token sees
            common_rows, rows = np.split(free[at:], [len(common)])
            kept.append(start + common)
            places.append(common_rows)
            start += group.shared
            for i in range(group.first - begun.start, group.end - begun.start):
                length, ring = int(lengths[i]), rings[i]
                own = np.arange(max(group.shared, self._oldest(length)), length)  # positions
                going = np.arange(group.shared, group.shared + min(length - group.shared + self.growth, width)) % width
                added = np.arange(length, length + min(self.growth, width)) % width
                mine, others, rows = np.split(rows, np.cumsum([len(going), (self.samples - 1) * len(added)]))
                ring[0, going] = mine
                ring[1:, added] = others.reshape(self.samples - 1, len(added))
                prompt = ring[0, own % width]
                table[i, common % width] = common_rows
                table[i, own % width] = prompt
                self.held.append(np.concatenate([common_rows, mine]))
                self.held += [np.concatenate([common_rows, prompt, rest]) for rest in ring[1:, added]]
                kept.append(start + own - group.shared)
                places.append(prompt)
                start += length - group.shared
        for rows in self.held[len(self.positions) :]:
            self.references[rows] += 1
        self.positions = np.concatenate([self.positions, np.repeat(lengths, self.samples)])
        self.rings = torch.cat([self.rings, torch.from_numpy(rings).to(device).flatten(0, 1)])
        self.table = torch.cat([self.table, torch.from_numpy(table).to(device).repeat_interleave(self.samples, 0)])
        self.kept = torch.from_numpy(np.concatenate(kept)).to(device)
        self.places = torch.from_numpy(np.concatenate(places)).to(device)
        if not any(group.shared for group in groups):
            return Layout.from_lengths(lengths.tolist(), device=device)
        branches = [(self.lengths[group.first : group.end] - group.shared).tolist() for group in groups]
        return Layout.branching([group.shared for group in groups], branches, device=device)

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
