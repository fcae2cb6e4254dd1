"""Bring tokens into the order of their experts, and back: a stable sort, so that the result is repeatable.

A token appears k times in the sorted rows. Both directions read: where autograd would add rows into their tokens one
after another (atomically on a GPU, in any order), the k rows of a token are summed from where they lie.

On a GPU choices are sorted by counting, since there are few experts: each block of choices counts its own by expert;
the running sum of these counts, expert after expert and block after block, is where each block's choices of each expert
begin; and within a block, a choice comes after those before it. So equal choices keep their order.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (Triton's annotations are those of its own compiler.)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from tokenmill.kernels import backends, launch
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


# ------------------------------------------------------------------------------------------------------------ sorting


def sort_reference(experts: Tensor, num_experts: int) -> Sorted:
    choices, order = experts.reshape(-1).sort(stable=True)
    ends = torch.arange(num_experts, device=order.device)
    offsets = torch.searchsorted(choices, ends, right=True, out_int32=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return Sorted(offsets, order, inverse.view_as(experts))


@triton.jit
def _taken(experts, count, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,) the choices of a block, and (BLOCK, SPAN) int32 which expert each of them takes."""
    choice = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + choice, mask=choice < count, other=SPAN).to(tl.int32)
    return choice, (expert[:, None] == tl.arange(0, SPAN)[None, :]).to(tl.int32)


@triton.jit
def _count_kernel(experts, counts, count, EXPERTS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """counts (E, blocks)."""
    _, taken = _taken(experts, count, SPAN, BLOCK)
    e = tl.arange(0, SPAN)
    tl.store(counts + e * tl.num_programs(0) + tl.program_id(0), tl.sum(taken, 0), mask=e < EXPERTS)


@triton.jit
def _place_kernel(
    experts, counts, ends, order, inverse, count, EXPERTS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr
):
    """ends (E, blocks): the running sum of counts."""
    choice, taken = _taken(experts, count, SPAN, BLOCK)
    e = tl.arange(0, SPAN)
    at = e * tl.num_programs(0) + tl.program_id(0)
    begin = tl.load(ends + at, mask=e < EXPERTS, other=0) - tl.load(counts + at, mask=e < EXPERTS, other=0)
    place = tl.sum(taken * (begin[None, :] + tl.cumsum(taken, 0) - 1), 1)
    inside = choice < count
    tl.store(inverse + choice, place.to(tl.int64), mask=inside)
    tl.store(order + place, choice, mask=inside)


@library.custom_op("tokenmill::sort_choices", mutates_args=())
@launch.on_its_device
def _sort_choices(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of Sorted."""
    settings: dict[str, Any] = launch.sort_choices("sort_choices", num_experts) | {"EXPERTS": num_experts}
    count = experts.numel()
    blocks = triton.cdiv(count, settings["BLOCK"])
    order, inverse = experts.new_empty(count, dtype=torch.int64), torch.empty_like(experts, dtype=torch.int64)
    if not count:
        return experts.new_zeros(num_experts, dtype=torch.int32), order, inverse
    counts = experts.new_empty(num_experts * blocks, dtype=torch.int32)
    _count_kernel[(blocks,)](experts, counts, count, **settings)
    ends = counts.cumsum(0, dtype=torch.int32)
    _place_kernel[(blocks,)](experts, counts, ends, order, inverse, count, **settings)
    return ends[blocks - 1 :: blocks].clone(), order, inverse


@_sort_choices.register_fake
def _(experts, num_experts):
    order = experts.new_empty(experts.numel(), dtype=torch.int64)
    return order.new_empty(num_experts, dtype=torch.int32), order, torch.empty_like(experts, dtype=torch.int64)


def sort_choices(routing: Routing, *, backend: backends.Backend = "auto") -> Sorted:
    """Where each choice goes, a ghost's too. Never waits for the device."""
    return sort_by_expert(routing.experts, routing.counts.numel(), backend=backend)


def sort_by_expert(experts: Tensor, num_experts: int, *, backend: backends.Backend = "auto") -> Sorted:
    """The same for experts (T, k) integers alone."""
    if backends.choose(backend, experts) == "torch":
        return sort_reference(experts, num_experts)
    return Sorted(*_sort_choices(experts.contiguous(), num_experts))


# --------------------------------------------------------------------------------------------------- there and back


def _sum_choices(ys: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
    """(T, D) sum, weighted or not, in float32 of each token's k rows of ys (T * k, D): an embedding bag a token."""
    accurate = ys.to(torch.promote_types(ys.dtype, torch.float32))
    weights = None if weights is None else weights.to(accurate.dtype)
    return backends.cast(F.embedding_bag(inverse, accurate, per_sample_weights=weights, mode="sum"), ys.dtype)


class _Permute(torch.autograd.Function):
    """Rows of x, each k times, in `order`; where k is 1, with `order` and `inverse` swapped, back again."""

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


def permute(x: Tensor, routing: Routing) -> Permuted:
    """Rows of x (T, D), each k times, sorted by expert."""
    by_expert = sort_choices(routing)
    return Permuted(_Permute.apply(x, by_expert.order, by_expert.inverse), *by_expert)  # type: ignore[arg-type]


def combine(ys: Tensor, permuted: Permuted, routing: Routing) -> Tensor:
    """(T, D) sum of each token's k rows of ys (T * k, D), weighted in float32 by routing.weights; ys's dtype."""
    return _Combine.apply(ys, routing.weights, permuted.order, permuted.inverse)  # type: ignore[return-value]
