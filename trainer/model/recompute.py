"""Activation checkpointing: what a block keeps for its backward pass, and what it computes again.

    none       everything that autograd saves
    selective  matrix products and attention; norms, rotary embedding, SwiGLU and permutations are computed again
    full       a block's input

Whatever is recomputed, the router's choice is kept: computed again it could fall on another expert where two
probabilities are close. Source: Korthikanti et al., "Reducing Activation Recomputation" (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tokenmill.kernels.moe  # noqa: F401  registers tokenmill::route and tokenmill::moe_experts

Recompute = Literal["none", "selective", "full"]

_aten = torch.ops.aten
_CHOICE = {_aten.topk.default, torch.ops.tokenmill.route.default}
_COSTLY = _CHOICE | {
    _aten.mm.default,
    _aten._grouped_mm.default,
    _aten._flash_attention_forward.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.tokenmill.moe_experts.default,
    torch.ops.tokenmill.moe_linear.default,
}


def run(mode: Recompute, function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, keeping for the backward pass what `mode` says."""
    if mode == "none" or not torch.is_grad_enabled():
        return function(*inputs)
    kept = _CHOICE if mode == "full" else _COSTLY

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        # flash-attn's package registers its kernels under its own name.
        keep = op in kept or (mode == "selective" and str(op).startswith("flash_attn"))
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        context_fn=contexts,
        preserve_rng_state=False,  # nothing here is random
    )
