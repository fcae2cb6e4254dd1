"""From dense to sparse: a model of experts that begins as the function its dense one had learnt.

Each expert is a copy of the dense feed-forward network, and the router is new and small. Equal experts, weighted by
shares that sum to 1, give what the one gave; training, and the noise if there is any, drives them apart. Source:
Komatsuzaki et al., "Sparse Upcycling" (2023).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokenmill.trainer.model.config import MoEConfig
from tokenmill.trainer.model.transformer import Transformer

ROUTER_STD = 0.02


def upcycle(dense: Transformer, experts: int, top_k: int = 2, *, noise: float = 0.0, seed: int = 0) -> Transformer:
    """`dense` with `experts` copies of each feed-forward network, of which `top_k` act on a token.

    `noise` is the standard deviation of what is added to each copy's weights, relative to that of the gate's, the up
    projection's or the down projection's own. Noise and routers are functions of `seed`. What is not copied is shared
    with `dense`, whose feed-forward networks are emptied one after another, so that memory holds little but the result.

    Raises ValueError where `dense` has experts already, or the sizes are impossible.
    """
    if dense.config.moe is not None:
        raise ValueError(f"upcycling begins from a dense model, this one has {dense.config.moe.n_experts} experts")
    if not noise >= 0:
        raise ValueError(f"noise is {noise}, expected a share of a weight's standard deviation, 0 or more")
    config = replace(dense.config, moe=MoEConfig(experts, top_k))
    device, dtype = dense.embed.weight.device, dense.embed.weight.dtype
    with torch.device("meta"):
        sparse = Transformer(config, **dense.names, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float | Tensor) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(device, dtype)

    def copies(weight: Tensor, parts: int) -> Tensor:
        """(E, ...) of a weight that holds so many projections, one above the other."""
        result = weight.expand(experts, *weight.shape).clone()
        for copy in result if noise else ():
            for part in copy.chunk(parts):
                part += draw(*part.shape, std=noise * part.float().std().cpu())
        return result

    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, weight in dense.named_parameters():
            if name.endswith("feed_forward.gate_up.weight"):
                layer = name.removesuffix("gate_up.weight")
                tensors[layer + "router.weight"] = draw(experts, config.dim, std=ROUTER_STD)
                tensors[layer + "w_gate_up"] = copies(weight, 2)
                weight.data = weight.new_empty(0)
            elif name.endswith("feed_forward.down.weight"):
                tensors[name.removesuffix("down.weight") + "w_down"] = copies(weight, 1)
                weight.data = weight.new_empty(0)
            else:
                tensors[name] = weight
    sparse.load_state_dict(tensors, assign=True)
    return sparse
