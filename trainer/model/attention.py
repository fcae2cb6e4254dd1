"""Grouped-query attention with rotary positions and a sliding window, over packed documents."""

from __future__ import annotations

from torch import Tensor, nn

from tokenmill.kernels.attention import Backend, attention
from tokenmill.kernels.layout import Layout
from tokenmill.kernels.rotary import apply_rotary
from tokenmill.trainer.model.cache import LayerCache
from tokenmill.trainer.model.config import ModelConfig
from tokenmill.trainer.model.linear import Linear


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.head_dim = config.head_dim
        self.theta = config.rope_theta
        self.window = config.sliding_window
        self.backend: Backend | None = None  # the whole model's choice, made by `Transformer`
        self.qkv = Linear(config.dim, sum(self.heads) * self.head_dim)  # one product for the three
        self.out = Linear(config.n_heads * self.head_dim, config.dim)

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """x (T, D) -> (T, D)."""
        q, k, v = self.qkv(x).view(x.shape[0], -1, self.head_dim).split(self.heads, dim=1)
        q, k = apply_rotary(q, k, layout, self.theta)
        if cache is not None:
            k, v = cache.update(k, v)
        return self.out(attention(q, k, v, layout, self.window, self.backend or "auto").flatten(1))
