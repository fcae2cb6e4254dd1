"""RMSNorm, alone or fused with the residual addition before it: y = weight * x / sqrt(mean(x^2) + eps), a row.

x is (T, D) and weight (D,). The mean and the division are done in float32 (float64 for float64 input), the quotient is
rounded to x's dtype and only then multiplied by the weight, as Hugging Face's models do. With a residual, x is the sum
rounded to its dtype. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.

With r = 1 / sqrt(mean(x^2) + eps), n = x * r and g = dy * weight, backward is

    d_weight = sum(dy * n)                          over rows
    dx       = r * (g - n * mean(g * n))            a row, plus the upstream gradient of the sum if there is a residual

and what is kept for it is x, or the sum, and r. The kernels read each of their tensors once and write each once.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from tokenmill.kernels import launch
from tokenmill.kernels.backends import Backend, cast, choose

# ---------------------------------------------------------------------------------------------------------- reference


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula; differentiated by autograd."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * normalised.to(x.dtype)).to(x.dtype)


# -------------------------------------------------------------------------------------------------------------- torch


class _RMSNorm(torch.autograd.Function):
    # Autograd would keep three (T, D) intermediates; this keeps the input and one number a row.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.rsqrt(torch.linalg.vecdot(wide, wide) / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, inverse)
        return cast(cast(wide * inverse[..., None], x.dtype) * weight, x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        dy = gradients[0].to(inverse.dtype)
        inverse = inverse[..., None]
        normalised = x * inverse
        d_weight = (dy * normalised).flatten(0, -2).sum(0)
        d_normalised = dy * weight
        along = torch.linalg.vecdot(d_normalised, normalised)[..., None] / x.shape[-1]
        dx = torch.addcmul(d_normalised, normalised, along, value=-1).mul_(inverse)
        return dx.to(x.dtype), d_weight.to(weight.dtype), None


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _forward_kernel(x, residual, weight, y, total, inverse, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program, in registers. `residual` is None where x is normalised as it is."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < DIM
    at = row * DIM + columns
    value = tl.load(x + at, mask=mask, other=0.0)
    if residual is not None:
        other = tl.load(residual + at, mask=mask, other=0.0)
    scale = tl.load(weight + columns, mask=mask)  # before the reduction, so that it need not be waited for after it
    if residual is not None:
        value = (value.to(tl.float32) + other.to(tl.float32)).to(total.dtype.element_ty)  # pyright: ignore[reportPossiblyUnboundVariable]
        tl.store(total + at, value, mask=mask)
    wide = value.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)
    normalised = (wide * factor).to(value.dtype)
    tl.store(y + at, normalised.to(tl.float32) * scale.to(tl.float32), mask=mask)
    tl.store(inverse + row, factor)


@triton.jit
def _backward_kernel(
    dy, d_total, x, weight, inverse, dx, partials, rows,
    DIM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A run of rows a program, which also sums their part of d_weight, in order. `d_total` is None where only y has a
    gradient. The loop is pipelined: while a row waits in its reduction, the next are on their way to shared memory.
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < DIM
    scale = tl.load(weight + columns, mask=mask, other=0.0)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    first = program * rows // tl.num_programs(0)
    end = (program + 1) * rows // tl.num_programs(0)
    for row in tl.range(first, end, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        at = row * DIM + columns
        factor = tl.load(inverse + row)
        normalised = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * factor
        upstream = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        d_weight += upstream * normalised
        upstream *= scale.to(tl.float32)
        along = tl.sum(upstream * normalised, 0) / DIM
        gradient = (upstream - normalised * along) * factor
        if d_total is not None:
            gradient += tl.load(d_total + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, gradient, mask=mask)
    tl.store(partials + program * DIM + columns, d_weight, mask=mask)


@launch.on_its_device
def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, D), the sum (T, D), empty without a residual, and r (T,) fp32."""
    dim = weight.numel()
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    total = y.new_empty(0 if residual is None else y.shape)
    inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
    settings: dict[str, Any] = launch.rms_norm(dim) | {"DIM": dim}
    residual = None if residual is None else residual.contiguous()
    _forward_kernel[(inverse.numel(),)](
        x.contiguous(), residual, weight.contiguous(), y, total, inverse, float(eps), **settings
    )
    return y, total, inverse


@launch.on_its_device
def _backward(dy: Tensor, d_total: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """dx of x's shape and dtype, and d_weight (D,) in fp32, from what was normalised."""
    dim = weight.numel()
    programs, settings = launch.rms_norm_backward(dim, x.element_size(), x.device)
    settings["DIM"] = dim
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    partials = x.new_empty(programs, dim, dtype=torch.float32)
    d_total = None if d_total is None else d_total.contiguous()
    _backward_kernel[(programs,)](
        dy.contiguous(), d_total, x.contiguous(), weight.contiguous(), inverse, dx, partials, inverse.numel(),
        **settings,
    )  # fmt: skip
    return dx, partials.sum(0)


# --------------------------------------------------------------------------------------------------- autograd binding

_rms_norm = library.custom_op("tokenmill::rms_norm", _forward, mutates_args=())
_rms_norm_backward = library.custom_op("tokenmill::rms_norm_backward", _backward, mutates_args=())


@_rms_norm.register_fake
def _(x, residual, weight, eps):
    y = x.new_empty(x.shape, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    return y, y.new_empty(0 if residual is None else y.shape), y.new_empty(x.shape[:-1], dtype=torch.float32)


@_rms_norm_backward.register_fake
def _(dy, d_total, x, weight, inverse):
    return x.new_empty(x.shape), x.new_empty(weight.shape, dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    x, residual, weight, _ = inputs
    _, total, inverse = output
    ctx.with_residual = residual is not None
    ctx.mark_non_differentiable(inverse, *([] if ctx.with_residual else [total]))
    ctx.set_materialize_grads(False)  # the last sum of a model has no gradient: zeros would be made and read
    ctx.save_for_backward(total if ctx.with_residual else x, weight, inverse)


def _autograd(ctx, dy, d_total, _):
    if dy is None:  # nothing upstream depends on y
        return d_total, d_total, None, None
    dx, d_weight = _rms_norm_backward(dy, d_total, *ctx.saved_tensors)
    return dx, dx if ctx.with_residual else None, d_weight, None


_rms_norm.register_autograd(_autograd, setup_context=_setup)


# ---------------------------------------------------------------------------------------------------- public function


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: Backend = "auto") -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise each row of x (T, D), or of x + residual, and scale it by weight (D,).

    Returns y (T, D) in x's dtype; with a residual (T, D), the pair (y, x + residual), both in the sum's dtype. The
    gradient of the weight is summed in float32, in an order that depends on T and the device alone.

    Raises ValueError where the shapes do not agree, or a row is too wide for backend="triton" when that is named.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, expected {tuple(x.shape[-1:])}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm: residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}")
    fits = weight.numel() <= launch.ROW_LIMIT
    if backend == "triton" and not fits:
        raise ValueError(f"rms_norm: backend='triton' takes rows of at most {launch.ROW_LIMIT}, got {weight.numel()}")
    if choose(backend, x, weight) == "triton" and fits:
        y, total, _ = _rms_norm(x, residual, weight, eps)
        return y if residual is None else (y, total)
    if residual is None:
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]
    total = x + residual
    return _RMSNorm.apply(total, weight, eps), total  # type: ignore[return-value]
