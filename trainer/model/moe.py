"""Mixtral's sparse feed-forward layer: a router and experts, no token dropped."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenmill.kernels import moe
from tokenmill.kernels.layout import Layout
from tokenmill.trainer.model.config import ModelConfig


class MoELayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        experts = config.moe.n_experts
        self.top_k = config.moe.top_k
        self.backend: moe.Backend | None = None  # the whole model's choice, made by `Transformer`
        self.router = nn.Linear(config.dim, experts, bias=False)
        self.w_gate_up = nn.Parameter(torch.empty(experts, 2 * config.hidden_dim, config.dim))
        self.w_down = nn.Parameter(torch.empty(experts, config.dim, config.hidden_dim))

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, moe.Routing]:
        """x (T, D) -> (T, D), and where each row went."""
        return moe.moe(
            x,
            self.router(x),
            self.w_gate_up,
            self.w_down,
            self.top_k,
            real_rows=layout.real_rows,
            backend=self.backend or "auto",
        )
