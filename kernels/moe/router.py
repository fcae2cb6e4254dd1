"""The router: which k of E experts each token goes to, with which weights, and what balancing needs to know of it.

Mixtral's rule: a float32 softmax over all experts, the k largest, renormalised to sum to 1. Source: Jiang et al.,
"Mixtral of Experts" (2024), section 2.1 (a softmax over the k largest logits is the same number). A bias for the choice
only is that of Wang et al., "Auxiliary-Loss-Free Load Balancing" (2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routing(NamedTuple):
    """Plain tensors, so that checkpointing and collectives take them as they are."""

    weights: Tensor  # (T, k) float32, each row sums to 1; differentiable
    experts: Tensor  # (T, k) int64, most probable first
    counts: Tensor  # (E,) int64 real tokens sent to each expert; sums to k times the real tokens
    probability_sums: Tensor  # (E,) float32 sum over the real tokens of each expert's probability; differentiable
    lse_squared_sum: Tensor  # () float32 sum over the real tokens of logsumexp(logits)^2, the z loss; differentiable


def route(
    logits: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    forced: Tensor | None = None,
    real_rows: Tensor | None = None,
) -> Routing:
    """Route T tokens by logits (T, E), in float32 (float64 for float64). Never waits for the device.

    `bias` (E,) is added to the probabilities for the choice, not for the weights. `forced` (T, k) integers are experts
    kept from an earlier choice, for a recomputation that must not choose anew. Rows where `real_rows` (T,) is False are
    routed but left out of the counts and sums.

    Raises ValueError where top_k is not in 1..E or `forced` is not (T, k).
    """
    tokens, num_experts = logits.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"route: top_k is {top_k}, expected 1 to the number of experts, {num_experts}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probabilities = logits.softmax(-1)
    lse = logits.logsumexp(-1)
    if forced is not None:
        if forced.shape != (tokens, top_k):
            raise ValueError(f"route: forced has shape {tuple(forced.shape)}, expected {(tokens, top_k)}")
        experts = forced.long()
    else:
        scores = probabilities if bias is None else probabilities + bias
        experts = scores.detach().topk(top_k, -1).indices
    weights = probabilities.gather(-1, experts)
    weights = weights / weights.sum(-1, keepdim=True)
    if real_rows is None:
        votes = torch.ones_like(experts)
    else:
        votes = real_rows.long()[:, None].expand(tokens, top_k)
        probabilities = probabilities * real_rows[:, None]
        lse = lse * real_rows
    # Not bincount, which waits for the device.
    counts = experts.new_zeros(num_experts).scatter_add_(0, experts.reshape(-1), votes.reshape(-1))
    return Routing(weights, experts, counts, probabilities.sum(0), lse.square().sum())


def hf_load_balancing_loss(logits: Sequence[Tensor], num_experts: int, top_k: int) -> Tensor:
    """Hugging Face's per-batch loss over all layers' logits, each (T, E): E * sum_e f_e * P_e, for comparison.

    f_e is the number of choices of expert e a token (they sum to k, not to 1: balance gives k), P_e its mean
    probability, both over the tokens of all layers pooled. Source: Fedus et al., "Switch Transformers" (2021), eq. 4.
    """
    probabilities = torch.cat([layer.float() for layer in logits]).softmax(-1)
    chosen = F.one_hot(probabilities.topk(top_k, -1).indices, num_experts).sum(1)
    return num_experts * (chosen.float().mean(0) * probabilities.mean(0)).sum()
