"""The experts as the paper's loop: each applies its SwiGLU network to its own rows."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.swiglu import swiglu


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Everything that PyTorch computes."""
    return None


def experts(xs: Tensor, offsets: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """See `experts` in this package. Waits for the device, for the number of rows of each expert."""
    counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    # unbind, not w[e]: the gradient of each w[e] would be a tensor of all experts' size.
    weights = zip(xs.split(counts), w_gate_up.unbind(), w_down.unbind(), strict=True)
    return torch.cat([swiglu(x @ gate_up.T) @ down.T for x, gate_up, down in weights])


def linear(xs: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """x w[e]^T of each expert's rows: xs (M, K) sorted, w (E, N, K) to (M, N). Waits for the device as `experts`."""
    counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    return torch.cat([x @ of_expert.T for x, of_expert in zip(xs.split(counts), w.unbind(), strict=True)])
