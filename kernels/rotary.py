"""Rotary position embedding: channels i and i + d/2 of a head turn together by the angle position * theta^(-2i/d).

q is (T, Hq, d) and k (T, Hkv, d); positions come from the layout and restart in every document. The pairing of halves
is Hugging Face's; it equals the original's pairing of neighbours with the channels reordered. Angles, sines and the
rotation are float32 whatever the input. Source: Su et al., "RoFormer" (2021), section 3.2.

A rotation's transpose is the rotation back, so backward is the same operation with the sines negated.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from tokenmill.kernels import launch
from tokenmill.kernels.backends import Backend, choose
from tokenmill.kernels.layout import Layout

# ---------------------------------------------------------------------------------------------------------- reference


def reference(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x (T, H, d) turned as complex numbers: (first half + i * second half) * exp(i * angle)."""
    half = x.shape[-1] // 2
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    turn = torch.polar(torch.ones(()), _angles(positions, x.shape[-1], theta).cpu()).to(x.device)
    turned = torch.complex(wide[..., :half], wide[..., half:]) * turn[:, None]
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


def _angles(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """(T, d/2) float32 angles, by the same float32 operations as Hugging Face's, whose sines then are ours."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    return positions[:, None].float() * (1.0 / theta ** (channels / head_dim))


# -------------------------------------------------------------------------------------------------------------- torch


def _signed_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(T, 1, d) cosines, and sines with the sign of the half that they are added to."""
    angles = _angles(positions, head_dim, theta)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


# ------------------------------------------------------------------------------------------------------------- Triton


def _table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(T, d/2) cosines and sines."""
    angles = _angles(positions, head_dim, theta)
    return angles.cos(), angles.sin()


@triton.jit
def _turn(first, second, cos, sin, out, mask, HALF: tl.constexpr):
    first, second = first.to(tl.float32), second.to(tl.float32)
    tl.store(out, first * cos - second * sin, mask=mask)
    tl.store(out + HALF, second * cos + first * sin, mask=mask)


@triton.jit
def _rotary_kernel(
    q, k, cos, sin, q_out, k_out, q_row, q_head, k_row, k_head,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads of one token a program, so that its sines are read once. q_out and k_out are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, HALF_BLOCK)[None, :]
    q_heads, k_heads = tl.arange(0, Q_BLOCK)[:, None], tl.arange(0, K_BLOCK)[:, None]
    q_mask = (q_heads < Q_HEADS) & (channels < HALF)
    k_mask = (k_heads < K_HEADS) & (channels < HALF)

    # All loads come before the first store, so that they wait for memory together.
    c = tl.load(cos + row * HALF + channels, mask=channels < HALF)
    s = tl.load(sin + row * HALF + channels, mask=channels < HALF)
    q += row * q_row + q_heads * q_head + channels
    k += row * k_row + k_heads * k_head + channels
    q_first, q_second = tl.load(q, mask=q_mask), tl.load(q + HALF, mask=q_mask)
    k_first, k_second = tl.load(k, mask=k_mask), tl.load(k + HALF, mask=k_mask)

    if INVERSE:
        s = -s
    q_out += (row * Q_HEADS + q_heads) * (2 * HALF) + channels
    k_out += (row * K_HEADS + k_heads) * (2 * HALF) + channels
    _turn(q_first, q_second, c, s, q_out, q_mask, HALF)
    _turn(k_first, k_second, c, s, k_out, k_mask, HALF)


@launch.on_its_device
def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """q (T, Hq, d) and k (T, Hkv, d), of any strides over rows and heads, turned by (T, d/2) angles or back."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    rows, q_heads, head_dim = q.shape
    k_heads, half = k.shape[1], head_dim // 2
    settings: dict[str, Any] = launch.rotary(q_heads, k_heads, half)
    settings |= {"Q_HEADS": q_heads, "K_HEADS": k_heads, "HALF": half, "INVERSE": inverse}
    _rotary_kernel[(rows,)](
        q, k, cos, sin, q_out, k_out, q.stride(0), q.stride(1), k.stride(0), k.stride(1), **settings
    )
    return q_out, k_out


# --------------------------------------------------------------------------------------------------- autograd binding

_rotary = library.custom_op("tokenmill::rotary", _forward, mutates_args=())


@_rotary.register_fake
def _(q, k, cos, sin, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup(ctx, inputs, output) -> None:
    *_, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _autograd(ctx, d_q, d_k):
    return (*_rotary(d_q, d_k, *ctx.saved_tensors, not ctx.inverse), None, None, None)


_rotary.register_autograd(_autograd, setup_context=_setup)


# ---------------------------------------------------------------------------------------------------- public function


def apply_rotary(
    q: Tensor, k: Tensor, layout: Layout, theta: float, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotate q (T, Hq, d) and k (T, Hkv, d) by their positions in their documents.

    Returns new tensors of the same shapes and dtypes. Both may be slices of one product: their rows and heads are read
    where they lie. The table of sines is made once a layout.

    Raises ValueError where d is odd or a tensor's rows are not the layout's.
    """
    head_dim = q.shape[-1]
    if head_dim % 2 or k.shape[-1] != head_dim:
        raise ValueError(f"apply_rotary: q and k need one even head dim, got {head_dim} and {k.shape[-1]}")
    tokens = layout.positions.numel()
    if q.shape[0] != tokens or k.shape[0] != tokens:
        raise ValueError(f"apply_rotary: q has {q.shape[0]} rows and k {k.shape[0]}, the layout {tokens}")
    use_triton = choose(backend, q, k) == "triton"
    make = _table if use_triton else _signed_table
    cos, sin = layout.derived((make, head_dim, theta), lambda: make(layout.positions, head_dim, theta))
    if use_triton:
        return _rotary(q, k, cos, sin, False)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)
