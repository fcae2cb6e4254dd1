"""The optimizer: torch's fused AdamW, with weight decay on matrices only."""

from __future__ import annotations

import torch
from torch import nn

from tokenmill.trainer.config import OptimizerSection


def build_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019). Norms' gains are not decayed: they have nothing to be regularised for."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True)
