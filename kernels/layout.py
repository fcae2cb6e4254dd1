"""Where documents lie on the token axis: the one object that attention, rotary embedding and noise all read.

There is no batch dimension anywhere in tokenmill. Tokens travel as one flat axis `T` of documents laid end to end,
and a `Layout` says where each begins, which it is, and how long it is as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the target of a row that predicts nothing, PyTorch's own convention
GHOST = -1  # document_ids of a ghost: padding that has positions but no weight, no noise and no vote in routing

_V = TypeVar("_V")


def bucket(length: int) -> int:
    """The next power of two, at least 16: an upper bound that changes rarely, so that a compiled step is kept."""
    return max(16, 1 << (length - 1).bit_length()) if length > 0 else 16


@dataclass(frozen=True, eq=False)
class KeyLayout:
    """Keys with boundaries of their own: a halo from a neighbour rank, a prompt shared by several answers, a cache.

    Segment n of the queries sees rows `gather[cu_seqlens[n]:cu_seqlens[n + 1]]` of k and v, causal from the bottom
    right: its last query sees the last of them.
    """

    gather: Tensor  # (Tk,) int64 rows of k and v
    cu_seqlens: Tensor  # (N + 1,) int32
    max_seqlen: int  # on the host, an upper bound from a few buckets


@dataclass(frozen=True, eq=False)
class Layout:
    """Documents laid end to end on a token axis of length T, N segments of which some may be empty.

    A segment is a document, or the part of one that is here: `positions` and `document_lengths` speak of the whole
    document, `cu_seqlens` of what is here.
    """

    positions: Tensor  # (T,) int32 position within the whole document
    cu_seqlens: Tensor  # (N + 1,) int32 boundaries of the queries' segments
    max_seqlen: int  # on the host, an upper bound from a few buckets: a launch never waits for the device
    document_ids: Tensor  # (N,) int64 identity of each document, the same in every layout; GHOST for padding
    document_lengths: Tensor  # (N,) int32 length of the whole document, also where only a part of it is here
    keys: KeyLayout | None = None  # None: the keys are the queries' own
    _derived: dict[Any, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def from_lengths(
        lengths: Sequence[int], document_ids: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> Layout:
        """Whole documents of the given lengths, end to end. Ids count from 0 unless given.

        Raises ValueError where a length is not positive or the ids are not one a document.
        """
        sizes = torch.as_tensor(lengths, dtype=torch.int64).reshape(-1)
        if sizes.numel() and int(sizes.min()) <= 0:
            raise ValueError(f"document lengths must be positive, got {int(sizes.min())}")
        ids = torch.arange(len(sizes)) if document_ids is None else torch.as_tensor(document_ids, dtype=torch.int64)
        if ids.shape != sizes.shape:
            raise ValueError(f"{len(sizes)} documents but {len(ids)} document_ids")
        cu_seqlens = torch.zeros(len(sizes) + 1, dtype=torch.int32)
        torch.cumsum(sizes, 0, out=cu_seqlens[1:])
        starts = torch.repeat_interleave(cu_seqlens[:-1], sizes)
        positions = torch.arange(int(cu_seqlens[-1]), dtype=torch.int32) - starts
        longest = int(sizes.max()) if sizes.numel() else 0
        layout = Layout(positions, cu_seqlens, bucket(longest), ids, sizes.to(torch.int32))
        return layout if torch.device(device).type == "cpu" else layout.to(device)

    @staticmethod
    def branching(
        prefixes: Sequence[int], branches: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> Layout:
        """Texts that begin alike: for each prefix a segment of so many tokens, perhaps none, and after it a segment for
        each of its branches, of so many more, which sees the prefix's keys before its own. A prefix and its branches
        have one id, a branch is as long as both.
        """
        sizes, before, documents = [], [], []  # of each segment: its tokens, those of its prefix, and the prefix
        for i, (prefix, ends) in enumerate(zip(prefixes, branches, strict=True)):
            sizes += [prefix, *ends]
            before += [0, *[prefix] * len(ends)]
            documents += [i] * (1 + len(ends))
        own, shared, ids = (torch.tensor(values, dtype=torch.int64) for values in (sizes, before, documents))
        starts = F.pad(own.cumsum(0), (1, 0))
        key_starts = F.pad((shared + own).cumsum(0), (1, 0))
        first = torch.tensor([0, *[1 + len(ends) for ends in branches]]).cumsum(0)[:-1]  # the prefixes' segments

        segment = torch.arange(len(own))
        of_key = segment.repeat_interleave(shared + own)
        place = torch.arange(len(of_key)) - key_starts[of_key]  # within the segment's keys
        beyond = place - shared[of_key]
        gather = torch.where(beyond < 0, starts[first[ids[of_key]]] + place, starts[of_key] + beyond)
        positions = shared.repeat_interleave(own) + torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(own)
        layout = Layout(
            positions.int(),
            starts.int(),
            bucket(max(sizes, default=0)),
            ids,
            (shared + own).int(),
            KeyLayout(gather, key_starts.int(), bucket(int((shared + own).max()) if sizes else 0)),
        )
        return layout if torch.device(device).type == "cpu" else layout.to(device)

    @property
    def segment_ids(self) -> Tensor:
        """(T,) int64: the segment that each row belongs to; empty segments own no row."""
        return self.derived("segment_ids", self._segment_ids)

    def _segment_ids(self) -> Tensor:
        rows = torch.arange(self.positions.numel(), dtype=torch.int32, device=self.positions.device)
        return torch.searchsorted(self.cu_seqlens[1:].contiguous(), rows, right=True)

    @property
    def real_rows(self) -> Tensor:
        """(T,) bool: rows of real documents, False on a ghost's."""
        return self.derived("real_rows", lambda: (self.document_ids != GHOST)[self.segment_ids])

    def derived(self, key: Any, make: Callable[[], _V]) -> _V:
        """What an operation computes from the layout alone (tables, tiles), made once and shared by all layers."""
        if torch.compiler.is_compiling():  # a traced value must not outlive its trace
            return make()
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Layout:
        """The same layout with its tensors on `device`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        keys = self.keys and KeyLayout(move(self.keys.gather), move(self.keys.cu_seqlens), self.keys.max_seqlen)
        return Layout(
            move(self.positions),
            move(self.cu_seqlens),
            self.max_seqlen,
            move(self.document_ids),
            move(self.document_lengths),
            keys,
        )
