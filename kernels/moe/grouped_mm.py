"""The experts by PyTorch's grouped matrix product.

On a GPU of sm_90 or sm_100, in bfloat16, all of them are one launch, with no wait for their row counts. Elsewhere it
waits for these on the host, and makes a product for each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.kernels.swiglu import swiglu


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the grouped product cannot run, or None where it can."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"torch's grouped_mm computes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def experts(xs: Tensor, offsets: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """See `experts` in this package.

    Its backward takes a contiguous gradient, such as `combine` gives, not an expanded one (of a bare sum).
    Raises ValueError where a row of x, or of what lies between the two products, is not a multiple of 16 bytes.
    """
    for name, size in (("D", xs.shape[1]), ("F", w_down.shape[2])):
        if size * xs.element_size() % 16:
            raise ValueError(
                f'moe = "grouped_mm" needs rows of a multiple of 16 bytes, and {name} = {size} of '
                f'{xs.element_size()} bytes is not: choose "reference"'
            )
    hidden = swiglu(F.grouped_mm(xs, w_gate_up.transpose(1, 2), offs=offsets))
    return F.grouped_mm(hidden, w_down.transpose(1, 2), offs=offsets)


def linear(xs: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """x w[e]^T of each expert's rows: xs (M, K) sorted, w (E, N, K) to (M, N). Raises ValueError as `experts`."""
    for size in w.shape[1:]:
        if size * xs.element_size() % 16:
            raise ValueError(
                f'moe = "grouped_mm" needs rows of a multiple of 16 bytes, and {size} of {xs.element_size()} bytes are '
                f'not: choose "reference", or for an adapter another rank'
            )
    return F.grouped_mm(xs, w.transpose(1, 2), offs=offsets)
