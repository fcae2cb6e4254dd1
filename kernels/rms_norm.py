"""RMSNorm, alone or fused with the residual addition before it: y = weight * x / sqrt(mean(x^2) + eps), a row.

x is (T, D) and weight (D,). The mean and the division are done in float32 (float64 for float64 input), the quotient is
rounded to x's dtype and only then multiplied by the weight, as Hugging Face's models do. Source: Zhang and Sennrich,
"Root Mean Square Layer Normalization" (2019), equation 4.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from tokenmill.kernels.backends import cast


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula; differentiated by autograd."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * normalised.to(x.dtype)).to(x.dtype)


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


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise each row of x (T, D), or of x + residual, and scale it by weight (D,).

    Returns y (T, D) in x's dtype; with a residual (T, D), the pair (y, x + residual).
    Raises ValueError where the shapes do not agree.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, expected {tuple(x.shape[-1:])}")
    if residual is None:
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]
    if residual.shape != x.shape:
        raise ValueError(f"rms_norm: residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}")
    total = x + residual
    return _RMSNorm.apply(total, weight, eps), total  # type: ignore[return-value]
