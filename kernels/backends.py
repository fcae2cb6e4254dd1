"""Which implementation runs: one choice, the same for every operation.

"triton" is ours, for a GPU, or for Triton's interpreter on a CPU; "torch" is plain PyTorch, for everywhere else.
"""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]

# Triton decides between compiler and interpreter where a kernel is decorated, that is when its module is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, and nothing where that is its dtype already: torch 2.11 compiles an autograd.Function whose
    forward ends in a `to` that changes nothing to one with a gradient of zero.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def choose(backend: Backend, *tensors: Tensor) -> Literal["triton", "torch"]:
    """The backend for an operation on these tensors.

    "auto" is "triton" on a GPU or under TRITON_INTERPRET=1, and "torch" elsewhere and in fp64, since the kernels
    compute in fp32. Raises ValueError where the name is unknown or the kernels cannot run on these tensors.
    """
    on_gpu = all(tensor.is_cuda for tensor in tensors)
    if backend == "auto":
        wide = any(tensor.dtype == torch.float64 for tensor in tensors)
        return "triton" if not wide and (on_gpu or os.environ.get("TRITON_INTERPRET") == "1") else "torch"
    if backend == "torch":
        return "torch"
    if backend != "triton":
        raise ValueError(f"backend is {backend!r}: expected 'auto', 'triton' or 'torch'")
    if not on_gpu and not INTERPRETED:
        raise ValueError(
            "backend='triton' needs tensors on a GPU, or TRITON_INTERPRET=1 set before tokenmill is imported; "
            "use backend='auto'"
        )
    return "triton"
