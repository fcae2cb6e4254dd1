"""Rotary position embedding: channels i and i + d/2 of a head turn together by the angle position * theta^(-2i/d).

q is (T, Hq, d) and k (T, Hkv, d); positions come from the layout and restart in every document. The pairing of halves
is Hugging Face's; it equals the original's pairing of neighbours with the channels reordered. Angles, sines and the
rotation are float32 whatever the input. Source: Su et al., "RoFormer" (2021), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.layout import Layout


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


def _table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(T, 1, d) cosines, and sines with the sign of the half that they are added to."""
    angles = _angles(positions, head_dim, theta)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def apply_rotary(q: Tensor, k: Tensor, layout: Layout, theta: float) -> tuple[Tensor, Tensor]:
    """Rotate q (T, Hq, d) and k (T, Hkv, d) by their positions in their documents.

    Returns new tensors of the same shapes and dtypes. The table of sines is made once a layout.
    Raises ValueError where d is odd or a tensor's rows are not the layout's.
    """
    head_dim = q.shape[-1]
    if head_dim % 2 or k.shape[-1] != head_dim:
        raise ValueError(f"apply_rotary: q and k need one even head dim, got {head_dim} and {k.shape[-1]}")
    tokens = layout.positions.numel()
    if q.shape[0] != tokens or k.shape[0] != tokens:
        raise ValueError(f"apply_rotary: q has {q.shape[0]} rows and k {k.shape[0]}, the layout {tokens}")
    cos, sin = layout.derived(("rotary", head_dim, theta), lambda: _table(layout.positions, head_dim, theta))
    return _rotate(q, cos, sin), _rotate(k, cos, sin)
