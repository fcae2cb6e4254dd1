"""The experts on our own grouped products (grouped_gemm.py), dropless: `moe = "triton"`.

    x -> rows by expert -> gate and up, silu(gate) * up -> down -> sum of each token's rows, weighted by p

Only x and the product of gate and up are kept for the backward pass. It goes back by d_h = dy w_down before weighting:
one epilogue makes of it the gradient of p, the hidden rows again (times p, for w_down's gradient), and both halves of
the gradient of gate and up. So the experts' outputs are never needed again, and need not be kept.

The same operator serves `experts` alone: rows that come sorted, and leave unweighted. Where something has to be added
to a product, as adapters are, `linear` is one product alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from tokenmill.kernels.backends import INTERPRETED
from tokenmill.kernels.moe import grouped_gemm
from tokenmill.kernels.moe.permute import sort_choices
from tokenmill.kernels.moe.router import Routing
from tokenmill.kernels.moe.rows import spread, sum_choices


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run, or None where they can."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels compute float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda" and not INTERPRETED:
        return "Triton's kernels need a GPU, or TRITON_INTERPRET=1 set before tokenmill is imported"
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter computes wrong products of bfloat16"
    return None


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and beginning at a multiple of 16 bytes, as copies need; a view need not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@library.custom_op("tokenmill::moe_experts", mutates_args=())
def _experts(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, offsets: Tensor,
    inverse: Tensor | None, weights: Tensor | None, gate_up_grad: Tensor | None, down_grad: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The layer with inverse and weights (T, k); without, sorted rows in and out. And gate_up, empty unless `keep`.

    gate_up_grad and down_grad are for the backward pass alone.
    """
    x, w_gate_up, w_down = _aligned(x), _aligned(w_gate_up), _aligned(w_down)
    xs = x if inverse is None else spread(x, inverse)
    gate_up, h = grouped_gemm.gate_up(xs, w_gate_up, offsets, keep)
    ys = grouped_gemm.product(h, w_down, offsets, transposed=True)
    return (ys if inverse is None else sum_choices(ys, inverse, weights)), gate_up


@_experts.register_fake
def _(x, w_gate_up, w_down, offsets, inverse, weights, gate_up_grad, down_grad, keep):
    rows = x.shape[0] if inverse is None else inverse.numel()
    return x.new_empty(x.shape), x.new_empty((rows, w_gate_up.shape[1]) if keep else 0)


@library.custom_op("tokenmill::moe_experts_backward", mutates_args=("gate_up_grad", "down_grad"))
def _experts_backward(
    dy: Tensor, x: Tensor, gate_up: Tensor, w_gate_up: Tensor, w_down: Tensor, offsets: Tensor,
    inverse: Tensor | None, weights: Tensor | None, gate_up_grad: Tensor | None, down_grad: Tensor | None,
    of_x: bool, of_gate_up: bool, of_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, w_gate_up, w_down and weights; empty where not asked for, or added to one that is given."""
    dy, x, w_gate_up, w_down = _aligned(dy), _aligned(x), _aligned(w_gate_up), _aligned(w_down)
    dx, d_w_gate_up, d_w_down = (x.new_empty(0) for _ in range(3))
    d_weights, p = x.new_empty(0, dtype=torch.float32), None
    if inverse is not None and weights is not None:
        dy = spread(dy, inverse)
        p = weights.new_empty(weights.numel()).scatter_(0, inverse.view(-1), weights.view(-1))
    d_gate_up, ph, d_p = grouped_gemm.hidden_gradient(dy, w_down, gate_up, offsets, p)
    if d_p is not None:
        d_weights = d_p[inverse]
    if of_down:
        made = grouped_gemm.weight_gradient(dy, ph, offsets, down_grad)
        d_w_down = made if down_grad is None else d_w_down
    if of_x:
        dx = grouped_gemm.product(d_gate_up, w_gate_up, offsets, transposed=False)
        dx = dx if inverse is None else sum_choices(dx, inverse)
    if of_gate_up:
        xs = x if inverse is None else spread(x, inverse)
        made = grouped_gemm.weight_gradient(d_gate_up, xs, offsets, gate_up_grad)
        d_w_gate_up = made if gate_up_grad is None else d_w_gate_up
    return dx, d_w_gate_up, d_w_down, d_weights


@_experts_backward.register_fake
def _(dy, x, gate_up, w_gate_up, w_down, offsets, inverse, weights, gate_up_grad, down_grad, of_x, of_gate_up, of_down):
    return (
        x.new_empty(x.shape if of_x else 0),
        x.new_empty(w_gate_up.shape if of_gate_up and gate_up_grad is None else 0),
        x.new_empty(w_down.shape if of_down and down_grad is None else 0),
        x.new_empty(0 if weights is None else weights.shape, dtype=torch.float32),
    )


def _setup(ctx, inputs, output) -> None:
    *saved, gate_up_grad, down_grad, _keep = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros are made for gate_up, as large as it
    ctx.save_for_backward(*saved, output[1])
    ctx.totals = gate_up_grad, down_grad  # not saved: that forbids what they are for, to be changed until then


def _backward(ctx, dy, _):
    x, w_gate_up, w_down, offsets, inverse, weights, gate_up = ctx.saved_tensors
    if dy is None:
        return (None,) * 9
    needs = ctx.needs_input_grad
    dx, d_w_gate_up, d_w_down, d_weights = _experts_backward(
        dy, x, gate_up, w_gate_up, w_down, offsets, inverse, weights, *ctx.totals, *needs[:3]
    )
    if ctx.totals[0] is not None:
        d_w_gate_up = d_w_down = None
    gradients = (dx, d_w_gate_up, d_w_down, None, None, d_weights, None, None, None)
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs, strict=True))


_experts.register_autograd(_backward, setup_context=_setup)


def layer(
    x: Tensor, routing: Routing, w_gate_up: Tensor, w_down: Tensor, weight_grads: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """`permute`, `experts` and `combine` of this package in one: x (T, D) to (T, D).

    weight_grads, fp32 like w_gate_up and w_down: the backward pass adds their gradients to these, and autograd gets
    none (compiled, it has to come before the next forward pass). Raises ValueError where they do not fit.
    """
    for total, w in zip(weight_grads or (), (w_gate_up, w_down), strict=bool(weight_grads)):
        if total.shape != w.shape or total.dtype != torch.float32 or not total.is_contiguous():
            expected = f"expected contiguous torch.float32 {[*w.shape]}"
            raise ValueError(f"weight_grads: {expected}, got {total.dtype} {[*total.shape]}")
    offsets, _, inverse = sort_choices(routing)
    return _run(x, w_gate_up, w_down, offsets, inverse, routing.weights, weight_grads)


def experts(xs: Tensor, offsets: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """See `experts` in this package."""
    return _run(xs, w_gate_up, w_down, offsets, None, None, None)


def _run(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, offsets: Tensor, inverse: Tensor | None, weights: Tensor | None,
    weight_grads: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Raises ValueError where dtypes differ, or a row is not a multiple of 16 bytes: copies need that."""
    if weights is not None and weights.dtype != torch.float32:
        raise ValueError(f'moe = "triton": the weights of the choices are {weights.dtype}, expected torch.float32')
    if not x.dtype == w_gate_up.dtype == w_down.dtype:
        raise ValueError(
            f'moe = "triton": x is {x.dtype}, w_gate_up {w_gate_up.dtype} and w_down {w_down.dtype}; cast to one dtype'
        )
    for name, size in (("D", x.shape[1]), ("F", w_down.shape[2])):
        _check_row(f"{name} = {size}", size, x, 'choose "reference"')
    weights = None if weights is None else weights.contiguous()
    needed = any(t is not None and t.requires_grad for t in (x, w_gate_up, w_down, weights))
    totals = weight_grads or (None, None)
    y, _ = _experts(x, w_gate_up, w_down, offsets, inverse, weights, *totals, torch.is_grad_enabled() and needed)
    return y


def _check_row(what: str, size: int, x: Tensor, instead: str) -> None:
    if size * x.element_size() % 16:
        raise ValueError(
            f'moe = "triton" needs rows of a multiple of 16 bytes, and {what} of {x.element_size()} bytes is not: '
            f"{instead}"
        )


# ------------------------------------------------------------------------------------------------- one product alone


@library.custom_op("tokenmill::moe_linear", mutates_args=())
def _linear(xs: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return grouped_gemm.product(_aligned(xs), _aligned(w), offsets, transposed=True)


@_linear.register_fake
def _(xs, w, offsets):
    return xs.new_empty(xs.shape[0], w.shape[1])


@library.custom_op("tokenmill::moe_linear_backward", mutates_args=())
def _linear_backward(dy: Tensor, xs: Tensor | None, w: Tensor | None, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of xs, where there is a w, and of w, where there are xs; empty where not."""
    dy = _aligned(dy)
    dx = dy.new_empty(0) if w is None else grouped_gemm.product(dy, _aligned(w), offsets, transposed=False)
    dw = dy.new_empty(0) if xs is None else grouped_gemm.weight_gradient(dy, _aligned(xs), offsets)
    return dx, dw


@_linear_backward.register_fake
def _(dy, xs, w, offsets):
    rows, outputs = dy.shape
    dx = dy.new_empty(0) if w is None else dy.new_empty(rows, w.shape[2])
    return dx, dy.new_empty(0) if xs is None else dy.new_empty(offsets.shape[0], outputs, xs.shape[1])


def _setup_linear(ctx, inputs, output) -> None:
    xs, w, offsets = inputs
    of_xs, of_w = ctx.needs_input_grad[:2]
    ctx.save_for_backward(xs if of_w else None, w if of_xs else None, offsets)  # a frozen weight needs no rows kept


def _backward_linear(ctx, dy):
    xs, w, offsets = ctx.saved_tensors
    dx, dw = _linear_backward(dy, xs, w, offsets)
    return None if w is None else dx, None if xs is None else dw, None


_linear.register_autograd(_backward_linear, setup_context=_setup_linear)


def linear(xs: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """x w[e]^T of each expert's rows: xs (M, K) sorted, w (E, N, K) to (M, N). Raises ValueError as `experts`."""
    if xs.dtype != w.dtype:
        raise ValueError(f'moe = "triton": xs is {xs.dtype} and w {w.dtype}; cast to one dtype')
    for size in w.shape[1:]:
        _check_row(f"{size}", size, xs, 'choose "reference", or for an adapter another rank')
    return _linear(xs, w, offsets)
