"""Rows of tokens to rows of choices and back, by where each choice lies once they are sorted by expert.

    spread        out[inverse[t, j]] = x[t]                                   x (T, D), inverse (T, k), out (T * k, D)
    sum_choices   out[t] = sum over j of weights[t, j] * ys[inverse[t, j]]    ys (T * k, D), out (T, D)

Without weights, each is the other's gradient. Every row is read once and written once, and a sum is made in float32 by
the token that owns it, so that nothing is added in an order that could change. `permute.py` has both in PyTorch.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tokenmill.kernels import launch


@triton.jit
def _spread_kernel(x, inverse, out, dim, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """A block of channels of one token a program."""
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + token * dim + channels, mask=channels < dim)
    for j in range(CHOICES):
        row = tl.load(inverse + token * CHOICES + j)
        tl.store(out + row * dim + channels, value, mask=channels < dim)


@triton.jit
def _sum_choices_kernel(
    ys, inverse, weights, out, dim, WEIGHTED: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of channels of one token a program."""
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(CHOICES):
        row = tl.load(inverse + token * CHOICES + j)
        value = tl.load(ys + row * dim + channels, mask=channels < dim, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * CHOICES + j)
        total += value
    tl.store(out + token * dim + channels, total.to(out.dtype.element_ty), mask=channels < dim)


@launch.on_its_device
def spread(x: Tensor, inverse: Tensor) -> Tensor:
    """(T * k, D) of x (T, D), contiguous, and inverse (T, k) int64."""
    (tokens, dim), choices = x.shape, inverse.shape[1]
    out = x.new_empty(tokens * choices, dim)
    if out.numel():
        settings: dict[str, Any] = launch.channels("moe_spread", dim) | {"CHOICES": choices}
        grid = (tokens, triton.cdiv(dim, settings["BLOCK"]))
        _spread_kernel[grid](x, inverse, out, dim, **settings)
    return out


@launch.on_its_device
def sum_choices(ys: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
    """(T, D) of ys (T * k, D), inverse (T, k) int64 and weights (T, k) float32, ones if None."""
    (tokens, choices), dim = inverse.shape, ys.shape[1]
    out = ys.new_empty(tokens, dim)
    if out.numel():
        settings: dict[str, Any] = launch.channels("moe_sum_choices", dim)
        settings |= {"CHOICES": choices, "WEIGHTED": weights is not None}
        grid = (tokens, triton.cdiv(dim, settings["BLOCK"]))
        _sum_choices_kernel[grid](ys, inverse, weights, out, dim, **settings)
    return out
