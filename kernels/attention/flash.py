"""FlashAttention for GPUs: the flash-attn package where it is installed, else the same kernel from inside PyTorch.

Both take sequences laid end to end with their boundaries, align the causal mask at the bottom right, share key heads
between query heads, and bound the window inclusively: a query that sees W keys, itself included, has W - 1 to its left,
and -1 stands for no bound. Source: Dao, "FlashAttention-2" (2023).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from tokenmill.kernels.layout import Layout


@functools.cache
def _package() -> Callable[..., Any] | None:
    try:
        return importlib.import_module("flash_attn").flash_attn_varlen_func
    except ImportError:  # also where it was compiled for another torch
        return None


def source() -> str:
    """Whose FlashAttention runs, and of which version."""
    return f"PyTorch {torch.__version__}" if _package() is None else f"flash-attn {metadata.version('flash-attn')}"


def supports(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why FlashAttention cannot run, or None where it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim > 256 or head_dim % 8:
        return f"it takes head dims up to 256 that are multiples of 8, not {head_dim}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0 or newer, {torch.cuda.get_device_name(device)} has less"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> Tensor:
    """See `attention` in this package. Never waits for the device."""
    bounds, longest = layout.cu_seqlens, layout.max_seqlen
    if layout.keys is not None:
        k, v = k.index_select(0, layout.keys.gather), v.index_select(0, layout.keys.gather)
        bounds, longest = layout.keys.cu_seqlens, layout.keys.max_seqlen
    left = -1 if window is None else window - 1
    package = _package()
    if package is not None:
        return package(
            q,
            k,
            v,
            cu_seqlens_q=layout.cu_seqlens,
            cu_seqlens_k=bounds,
            max_seqlen_q=layout.max_seqlen,
            max_seqlen_k=longest,
            causal=True,
            window_size=(left, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),  # PyTorch's own asks for itself
        )
    # What torch.nn.attention.varlen.varlen_attn calls: that function refuses shared key heads before torch 2.13.
    return torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        layout.cu_seqlens,
        bounds,
        layout.max_seqlen,
        longest,
        0.0,  # dropout
        True,  # causal
        False,  # return_debug_mask
        window_size_left=left,
        window_size_right=0,
    )[0]
