"""Experts spread over ranks: what each rank does beside the exchange itself, which is not here.

Of R ranks, rank r holds the experts from r * E / R on. A rank's rows, sorted by expert, are sorted by destination too:

    permuted = permute(x, routing)                    this rank's tokens
    counts = send_counts(permuted.offsets, R)         and all ranks tell each other their row of it
    rows = the rows of each source, one after another: an all-to-all with counts.sum(1) as its sizes
    ys = local_experts(rows, received counts, ...)    with this rank's weights
    back to where they came from, and combine(...)

The sizes of an all-to-all are wanted on the host, so `counts` are waited for there, once; nothing here waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.moe.permute import _Permute, sort_by_expert


def send_counts(offsets: Tensor, ranks: int) -> Tensor:
    """(R, E / R) int64 rows for each expert of each rank, from offsets (E,) as `permute` gives them.

    Raises ValueError where ranks cannot share the experts evenly.
    """
    if offsets.numel() % ranks:
        raise ValueError(f"{offsets.numel()} experts cannot be shared evenly by {ranks} ranks")
    return offsets.long().diff(prepend=offsets.new_zeros(1)).view(ranks, -1)


def arrange(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows (M, D) from R sources, each one's sorted by expert, all sorted by expert; counts (R, E / R) as received.

    Returns xs (M, D), offsets (E / R,) int32, and for `restore` order (M,) and inverse (M, 1).
    """
    local = torch.arange(counts.shape[1], device=counts.device).repeat(counts.shape[0])
    experts = local.repeat_interleave(counts.flatten(), output_size=rows.shape[0])
    offsets, order, inverse = sort_by_expert(experts[:, None], counts.shape[1])
    return _Permute.apply(rows, order, inverse), offsets, order, inverse  # type: ignore[return-value]


def restore(ys: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """ys (M, D) sorted by expert to the order in which `arrange` was given its rows."""
    return _Permute.apply(ys, inverse[:, 0], order[:, None])  # type: ignore[return-value]
