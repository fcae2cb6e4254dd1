"""SwiGLU: silu(gate) * up, of a (T, 2F) tensor that holds the gate in its first F columns and up in the others.

silu(g) = g * sigmoid(g). Half types are computed in float32 and rounded once. Source: Shazeer, "GLU Variants Improve
Transformer" (2020), equation 6. With s = sigmoid(gate), backward is

    d_up   = dy * s * gate
    d_gate = dy * up * s * (1 + gate * (1 - s))

and keeps nothing but the input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from tokenmill.kernels import launch
from tokenmill.kernels.backends import Backend, cast, choose

# ---------------------------------------------------------------------------------------------------------- reference


def reference(gate_up: Tensor) -> Tensor:
    """The formula; differentiated by autograd."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    return cast(F.silu(gate) * up, gate_up.dtype)


# -------------------------------------------------------------------------------------------------------------- torch


class _SwiGLU(torch.autograd.Function):
    # Autograd would also keep silu(gate), half as much again as the input that has to be kept anyway.
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return reference(gate_up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        accurate = torch.promote_types(gate_up.dtype, torch.float32)
        gate, up = gate_up.to(accurate).chunk(2, -1)
        dy = gradients[0].to(accurate)
        d_gate = torch.ops.aten.silu_backward(dy * up, gate)
        return torch.cat([d_gate, F.silu(gate).mul_(dy)], -1).to(gate_up.dtype)


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _place(FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """The row of this program, the columns of its block, and which of them exist. Blocks of a row are neighbours."""
    blocks: tl.constexpr = (FEATURES + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row.to(tl.int64), columns, columns < FEATURES


@triton.jit
def _forward_kernel(gate_up, y, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    row, columns, mask = _place(FEATURES, BLOCK)
    gate_up += row * (2 * FEATURES) + columns
    gate = tl.load(gate_up, mask=mask).to(tl.float32)
    up = tl.load(gate_up + FEATURES, mask=mask).to(tl.float32)
    tl.store(y + row * FEATURES + columns, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def _backward_kernel(dy, gate_up, d_gate_up, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    row, columns, mask = _place(FEATURES, BLOCK)
    at = row * (2 * FEATURES) + columns
    upstream = tl.load(dy + row * FEATURES + columns, mask=mask).to(tl.float32)
    gate = tl.load(gate_up + at, mask=mask).to(tl.float32)
    up = tl.load(gate_up + at + FEATURES, mask=mask).to(tl.float32)
    weighted = upstream * tl.sigmoid(gate)
    tl.store(d_gate_up + at, weighted * up * (1.0 + gate * (1.0 - tl.sigmoid(gate))), mask=mask)
    tl.store(d_gate_up + at + FEATURES, weighted * gate, mask=mask)


@launch.on_its_device
def _forward(gate_up: Tensor) -> Tensor:
    features = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], features)
    settings: dict[str, Any] = launch.swiglu("swiglu", features) | {"FEATURES": features}
    grid = (gate_up.shape[:-1].numel() * triton.cdiv(features, settings["BLOCK"]),)
    _forward_kernel[grid](gate_up.contiguous(), y, **settings)
    return y


@launch.on_its_device
def _backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    features = dy.shape[-1]
    d_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    settings: dict[str, Any] = launch.swiglu("swiglu_backward", features) | {"FEATURES": features}
    grid = (dy.shape[:-1].numel() * triton.cdiv(features, settings["BLOCK"]),)
    _backward_kernel[grid](dy.contiguous(), gate_up.contiguous(), d_gate_up, **settings)
    return d_gate_up


# --------------------------------------------------------------------------------------------------- autograd binding

_swiglu = library.custom_op("tokenmill::swiglu", _forward, mutates_args=())
_swiglu_backward = library.custom_op("tokenmill::swiglu_backward", _backward, mutates_args=())


@_swiglu.register_fake
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@_swiglu_backward.register_fake
def _(dy, gate_up):
    return gate_up.new_empty(gate_up.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):
    return _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_autograd, setup_context=_setup)


# ---------------------------------------------------------------------------------------------------- public function


def swiglu(gate_up: Tensor, *, backend: Backend = "auto") -> Tensor:
    """silu(gate) * up of gate_up (T, 2F), gate first. Returns (T, F) in its dtype.

    Raises ValueError where the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: the last dimension holds gate and up, so must be even, got {gate_up.shape[-1]}")
    if choose(backend, gate_up) == "triton":
        return _swiglu(gate_up)
    return _SwiGLU.apply(gate_up)  # type: ignore[return-value]
