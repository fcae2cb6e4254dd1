"""Attention as its definition reads: document by document, a dense mask, a softmax. For tests and small cases.

Every other backend is compared with this one. Cost and memory grow with the square of each document's length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.layout import Layout


def supports(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Everything that PyTorch computes."""
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> Tensor:
    """See `attention` in this package; float32 inside (float64 for float64). Waits for the device."""
    accurate = torch.promote_types(q.dtype, torch.float32)
    if layout.keys is not None:
        k, v = k[layout.keys.gather], v[layout.keys.gather]
    query_bounds = layout.cu_seqlens.tolist()
    key_bounds = query_bounds if layout.keys is None else layout.keys.cu_seqlens.tolist()
    group = q.shape[1] // k.shape[1]
    documents = [q[:0]]
    for n in range(len(query_bounds) - 1):
        query = q[query_bounds[n] : query_bounds[n + 1]].to(accurate)
        key = k[key_bounds[n] : key_bounds[n + 1]].to(accurate).repeat_interleave(group, 1)
        value = v[key_bounds[n] : key_bounds[n + 1]].to(accurate).repeat_interleave(group, 1)
        # From the bottom right: the last query's own key is the last key.
        own = torch.arange(len(query), device=q.device) + len(key) - len(query)
        before = own[:, None] - torch.arange(len(key), device=q.device)
        visible = (before >= 0) if window is None else (before >= 0) & (before < window)
        scores = torch.einsum("qhd,khd->hqk", query, key) / q.shape[-1] ** 0.5
        # The lowest finite number, not -inf, and the product after it: a query that sees no key gets 0, not NaN.
        probabilities = scores.masked_fill(~visible, torch.finfo(accurate).min).softmax(-1) * visible
        documents.append(torch.einsum("hqk,khd->qhd", probabilities, value).to(q.dtype))
    return torch.cat(documents)
