"""A batch: documents on one flat token axis, what to predict at each row, and how much it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill import _C
from tokenmill.kernels.layout import GHOST, IGNORE, Layout, bucket

# Of a Batch: tokens, targets, weights, positions, and room for the target rows.
ROWS = (torch.int32, torch.int64, torch.float32, torch.int32, torch.int32)


@dataclass(frozen=True, eq=False)
class Batch:
    tokens: Tensor  # (T,) int32 input ids
    targets: Tensor  # (T,) int64 next token of the same document, IGNORE where none counts
    weights: Tensor  # (T,) float32 loss weight of each target, 0 where targets is IGNORE
    target_rows: Tensor  # (R,) int32 the rows with a weight; R is known on the host
    source_ids: Tensor  # (N,) int32 where each document came from
    layout: Layout

    @staticmethod
    def from_documents(
        documents: Sequence[Sequence[int] | NDArray[Any]],
        loss_mask: Sequence[Sequence[float] | NDArray[Any]] | None = None,
        document_ids: Sequence[int] | None = None,
        source_ids: Sequence[int] | None = None,
    ) -> Batch:
        """Lay token lists end to end.

        `loss_mask[i][j]` is the weight of token j of document i as a target (the first token of a document is never
        one); all ones if None. A document of one token has a row and no target.

        Raises ValueError where a document is empty or a mask does not have its document's length.
        """
        lengths = [len(document) for document in documents]
        layout = Layout.from_lengths(lengths, document_ids)
        flat = np.concatenate([np.asarray(d, dtype=np.int64) for d in documents]) if lengths else np.zeros(0, np.int64)
        if loss_mask is None:
            mask = np.ones(len(flat), np.float32)
        else:
            if [len(m) for m in loss_mask] != lengths:
                raise ValueError(f"loss_mask has lengths {[len(m) for m in loss_mask]}, the documents {lengths}")
            mask = np.concatenate([np.asarray(m, dtype=np.float32) for m in loss_mask])
        targets = np.full(len(flat), IGNORE, np.int64)
        weights = np.zeros(len(flat), np.float32)
        targets[:-1], weights[:-1] = flat[1:], mask[1:]
        weights[layout.cu_seqlens[1:].numpy() - 1] = 0.0  # the next token there is another document's
        targets[weights == 0] = IGNORE
        sources = np.zeros(len(lengths), np.int32) if source_ids is None else np.asarray(source_ids, np.int32)
        return Batch(
            torch.from_numpy(flat.astype(np.int32)),
            torch.from_numpy(targets),
            torch.from_numpy(weights),
            torch.from_numpy(np.flatnonzero(weights).astype(np.int32)),
            torch.from_numpy(sources),
            layout,
        )

    @staticmethod
    def from_shards(
        tokens: Sequence[NDArray[Any]],
        silent: Sequence[NDArray[np.uint64]],
        shard: NDArray[np.int64],
        start: NDArray[np.int64],
        length: NDArray[np.int64],
        *,
        document_ids: NDArray[np.int64],
        source_ids: NDArray[Any],
        pinned: bool = False,
    ) -> Batch:
        """Documents gathered from arrays, usually mapped files: `tokens[shard[i]][start[i]:start[i] + length[i]]`.

        `silent[s]` (S, 2): spans of shard s that carry no loss, sorted; all else has weight 1. `pinned` memory is what
        a GPU copies from without the CPU. Otherwise the same as `from_documents`. Raises ValueError where a document is
        not wholly inside its shard.
        """
        if length.min(initial=1) < 1 or length.astype(np.float64).sum() >= 2**31:
            raise ValueError("documents must have from 1 to, all together, 2**31 - 1 tokens")
        total = int(length.sum())
        rows = [torch.empty(total, dtype=dtype, pin_memory=pinned) for dtype in ROWS]
        cu_seqlens = torch.empty(len(length) + 1, dtype=torch.int32, pin_memory=pinned)
        count = _C.assemble(tokens, silent, shard, start, length, *(row.numpy() for row in (*rows, cu_seqlens)))
        flat, targets, weights, positions, target_rows = rows

        def tensor(values: NDArray[Any], dtype: type) -> Tensor:
            made = torch.from_numpy(values.astype(dtype))
            return made.pin_memory() if pinned else made

        return Batch(
            flat,
            targets,
            weights,
            target_rows[:count],
            tensor(source_ids, np.int32),
            Layout(
                positions,
                cu_seqlens,
                bucket(int(length.max(initial=0))),
                tensor(document_ids, np.int64),
                tensor(length, np.int32),
            ),
        )

    @staticmethod
    def ghost() -> Batch:
        """A tiny batch of weight 0, for a rank that has no sample left in a step; every row is a target row, so that
        it goes through the model and the loss as any other."""
        empty = Batch.from_documents([[0] * 16], loss_mask=[[0.0] * 16], document_ids=[GHOST])
        return replace(empty, target_rows=torch.arange(16, dtype=torch.int32))

    def padded(self, *, tokens: int, documents: int) -> Batch:
        """The same batch with one ghost document of weight 0 and empty segments, up to exactly `tokens` rows and
        `documents` segments: fixed shapes for a compiled or captured step. `target_rows` then holds every row.

        Raises ValueError where the batch does not fit, leaves no segment for the ghost, or has answers that share a
        prompt.
        """
        if self.layout.keys is not None:
            raise ValueError("a batch whose answers share their prompt (layout.keys) cannot be padded: pad it before")
        rows, segments = self.tokens.numel(), self.source_ids.numel()
        ghost = tokens - rows
        if ghost < 0 or documents < segments + (ghost > 0):
            raise ValueError(
                f"a batch of {rows} tokens in {segments} documents (and a ghost) does not fit {tokens} and {documents}"
            )
        spare = documents - segments

        def grow(tensor: Tensor, by: int, value: float) -> Tensor:
            return torch.cat([tensor, tensor.new_full((by,), value)])

        layout = self.layout
        lengths = grow(layout.document_lengths, spare, 0)
        cu_seqlens = grow(layout.cu_seqlens, spare, tokens)
        if ghost:
            lengths[segments] = ghost
        return Batch(
            grow(self.tokens, ghost, 0),
            grow(self.targets, ghost, IGNORE),
            grow(self.weights, ghost, 0.0),
            torch.arange(tokens, dtype=torch.int32, device=self.tokens.device),
            grow(self.source_ids, spare, 0),
            Layout(
                torch.cat([layout.positions, torch.arange(ghost, dtype=torch.int32, device=self.tokens.device)]),
                cu_seqlens,
                max(layout.max_seqlen, bucket(ghost)),
                grow(layout.document_ids, spare, GHOST),
                lengths,
            ),
        )

    def tensors(self) -> list[Tensor]:
        """All that it holds, its layout's included."""
        found = [*vars(self).values(), *vars(self.layout).values(), *vars(self.layout.keys or object).values()]
        return [value for value in found if isinstance(value, Tensor)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return Batch(
            move(self.tokens),
            move(self.targets),
            move(self.weights),
            move(self.target_rows),
            move(self.source_ids),
            self.layout.to(device, non_blocking),
        )
