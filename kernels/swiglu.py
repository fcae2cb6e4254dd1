"""SwiGLU: silu(gate) * up, of a (T, 2F) tensor that holds the gate in its first F columns and up in the others.

silu(g) = g * sigmoid(g). Half types are computed in float32 and rounded once. Source: Shazeer, "GLU Variants Improve
Transformer" (2020), equation 6.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.kernels.backends import cast


def reference(gate_up: Tensor) -> Tensor:
    """The formula; differentiated by autograd."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    return cast(F.silu(gate) * up, gate_up.dtype)


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


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up (T, 2F), gate first. Returns (T, F) in its dtype.

    Raises ValueError where the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: the last dimension holds gate and up, so must be even, got {gate_up.shape[-1]}")
    return _SwiGLU.apply(gate_up)  # type: ignore[return-value]
