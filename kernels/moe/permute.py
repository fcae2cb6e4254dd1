"""Bring tokens into the order of their experts, and back: a stable sort, so that the result is repeatable.

A token appears k times in the sorted rows. Both directions read: where autograd would add rows into their tokens one
after another (atomically on a GPU, in any order), the k rows of a token are summed from where they lie.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.kernels.backends import cast
from tokenmill.kernels.moe.router import Routing


class Sorted(NamedTuple):
    """The choices in the order of their experts, and of their tokens within an expert."""

    offsets: Tensor  # (E,) int32 end of each expert's rows; the last is T * k
    order: Tensor  # (T * k,) int64 choice t * k + j that sorted row i holds
    inverse: Tensor  # (T, k) int64 sorted row that holds choice j of token t


class Permuted(NamedTuple):
    xs: Tensor  # (T * k, D) rows of x, sorted
    offsets: Tensor  # and the rest as in Sorted
    order: Tensor
    inverse: Tensor


def _sum_choices(ys: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
    """(T, D) sum, weighted or not, in float32 of each token's k rows of ys (T * k, D): an embedding bag a token."""
    accurate = ys.to(torch.promote_types(ys.dtype, torch.float32))
    weights = None if weights is None else weights.to(accurate.dtype)
    return cast(F.embedding_bag(inverse, accurate, per_sample_weights=weights, mode="sum"), ys.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order // inverse.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _sum_choices(gradients[0], *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ys: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(ys, weights, order, inverse)
        return _sum_choices(ys, inverse, weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ys, weights, order, inverse = ctx.saved_tensors
        dy = gradients[0].index_select(0, order // inverse.shape[1]).to(weights.dtype)
        d_weights = torch.linalg.vecdot(ys.to(weights.dtype), dy)[inverse]
        d_ys = dy * weights.reshape(-1)[order][:, None]
        return d_ys.to(ys.dtype), d_weights, None, None


def sort_choices(routing: Routing) -> Sorted:
    """Where each choice goes. Never waits for the device."""
    choices, order = routing.experts.reshape(-1).sort(stable=True)
    ends = torch.arange(routing.counts.numel(), device=order.device)
    offsets = torch.searchsorted(choices, ends, right=True, out_int32=True)  # of all rows, a ghost's too
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return Sorted(offsets, order, inverse.view_as(routing.experts))


def permute(x: Tensor, routing: Routing) -> Permuted:
    """Rows of x (T, D), each k times, sorted by expert."""
    by_expert = sort_choices(routing)
    return Permuted(_Permute.apply(x, by_expert.order, by_expert.inverse), *by_expert)  # type: ignore[arg-type]


def combine(ys: Tensor, permuted: Permuted, routing: Routing) -> Tensor:
    """(T, D) sum of each token's k rows of ys (T * k, D), weighted in float32 by routing.weights; ys's dtype."""
    return _Combine.apply(ys, routing.weights, permuted.order, permuted.inverse)  # type: ignore[return-value]
