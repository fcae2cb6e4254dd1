"""Mixtral's sparse feed-forward layer: a router and experts, no token dropped."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenmill.kernels import moe
from tokenmill.kernels.layout import Layout
from tokenmill.kernels.swiglu import swiglu
from tokenmill.trainer.model.config import ModelConfig
from tokenmill.trainer.model.linear import Linear, product
from tokenmill.trainer.model.quantise import dense


class MoELayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        experts = config.moe.n_experts
        self.top_k = config.moe.top_k
        self.backend: moe.Backend | None = None  # the whole model's choice, made by `Transformer`
        self.balance_bias: Tensor | None = None  # (E,) fp32, as in `route`; set by `Transformer.set_balance_bias`
        self.router = Linear(config.dim, experts)
        self.w_gate_up = nn.Parameter(torch.empty(experts, 2 * config.hidden_dim, config.dim))
        self.w_down = nn.Parameter(torch.empty(experts, config.dim, config.hidden_dim))
        self.adapters = nn.ModuleDict()  # of the two, if they have some: see lora.py

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, moe.Routing]:
        """x (T, D) -> (T, D), and where each row went."""
        if self.adapters:
            return self._adapted(x, layout)
        return moe.moe(
            x,
            self.router(x),
            dense(self.w_gate_up, x.dtype),
            dense(self.w_down, x.dtype),
            self.top_k,
            bias=self.balance_bias,
            real_rows=layout.real_rows,
            backend=self.backend or "auto",
        )

    def _adapted(self, x: Tensor, layout: Layout) -> tuple[Tensor, moe.Routing]:
        """The same, each product with its adapter's beside it."""
        assert self.backend is not None
        linear = self.backend.linear
        routing = moe.route(self.router(x), self.top_k, bias=self.balance_bias, real_rows=layout.real_rows)
        permuted = moe.permute(x, routing)
        hidden = swiglu(product(self, "w_gate_up", permuted.xs, linear, permuted.offsets))
        ys = product(self, "w_down", hidden, linear, permuted.offsets)
        return moe.combine(ys, permuted, routing), routing
