"""The transformer: tokens and a layout in, hidden states out; its head turns those into losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenmill.kernels import attention as attention_kernels
from tokenmill.kernels import moe as moe_kernels
from tokenmill.kernels.cross_entropy import LossOutput, linear_cross_entropy, token_logprobs
from tokenmill.kernels.embedding import Noise, embed
from tokenmill.kernels.layout import Layout
from tokenmill.kernels.rms_norm import rms_norm
from tokenmill.kernels.swiglu import swiglu
from tokenmill.trainer.model.attention import Attention
from tokenmill.trainer.model.config import ModelConfig
from tokenmill.trainer.model.moe import MoELayer


class ModelOutput(NamedTuple):
    hidden: Tensor  # (T, D), normalised: what the head takes
    routing: tuple[moe_kernels.Routing, ...]  # one a layer; empty for a dense model


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.dim))

    def forward(self, tokens: Tensor, layout: Layout, noise: Noise | None) -> Tensor:
        return embed(tokens, self.weight, noise=noise, layout=layout)


class RMSNorm(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.dim))
        self.eps = config.norm_eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Adds x to the residual stream (None: x begins it): (the sum normalised, the sum)."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return rms_norm(x, self.weight, self.eps, residual)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward network or experts, each behind a norm and beside the residual stream.

    The stream's additions are made inside the norms, so a block takes and returns the pair (x, residual), x being
    the part that is still to be added.
    """

    def __init__(
        self, config: ModelConfig, attention: attention_kernels.Backend, moe: moe_kernels.Backend | None
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, attention)
        self.feed_forward_norm = RMSNorm(config)
        self.feed_forward = FeedForward(config) if moe is None else MoELayer(config, moe)

    def forward(
        self, x: Tensor, residual: Tensor | None, layout: Layout
    ) -> tuple[Tensor, Tensor, moe_kernels.Routing | None]:
        x, stream = self.attention_norm(x, residual)
        x, stream = self.feed_forward_norm(self.attention(x, layout), stream)
        if isinstance(self.feed_forward, MoELayer):
            x, routing = self.feed_forward(x, layout)
            return x, stream, routing
        return self.feed_forward(x), stream, None


class Head(nn.Module):
    """The output projection. Its forward is the loss itself, so that nobody else touches a weight that may be
    sharded, and no (T, V) tensor of logits is made unless `logits` asks for it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.dim))

    def forward(self, hidden: Tensor, targets: Any = None, *, output: str = "loss", **options: Any) -> Any:
        match output:
            case "loss":
                return linear_cross_entropy(hidden, self.weight, targets, **options)
            case "logprobs":
                return token_logprobs(hidden, self.weight, targets, **options)
            case "logits":
                return F.linear(hidden, self.weight)
        raise ValueError(f"output must be loss, logprobs or logits, got {output!r}")

    def loss(
        self, hidden: Tensor, targets: Tensor, *, token_weights: Tensor, rows: Tensor, z_loss: float = 0.0
    ) -> LossOutput:
        """`linear_cross_entropy` of hidden (T, D) and targets (T,)."""
        return self(hidden, targets, token_weights=token_weights, rows=rows, z_loss=z_loss)

    def logprobs(self, hidden: Tensor, targets: Tensor, *, rows: Tensor) -> Tensor:
        """`token_logprobs` of hidden (T, D) and targets (T,): (T,) fp32, 0 on other rows."""
        return self(hidden, targets, output="logprobs", rows=rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, V)."""
        return self(hidden, output="logits")


class Transformer(nn.Module):
    """Backends are chosen once, here, and by name: see `tokenmill.kernels.attention` and `tokenmill.kernels.moe`."""

    def __init__(
        self, config: ModelConfig, *, attention: str = "auto", moe: str = "auto",
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        device = torch.device(device)
        attend = attention_kernels.choose(attention, device, dtype, config.head_dim)
        experts = moe_kernels.choose(moe, device, dtype) if config.moe else None
        self.backends = {"attention": attend.name, "moe": experts.name if experts else "none"}
        with device:
            self.embed = Embedding(config)
            self.blocks = nn.ModuleList(TransformerBlock(config, attend, experts) for _ in range(config.n_layers))
            self.norm = RMSNorm(config)
            self.head = Head(config)
        self.to(dtype)

    def initialise(self, seed: int) -> None:
        """Normal(0, 0.02) weights; the projections back into the residual stream scaled by 1 / sqrt(2 layers), as in
        GPT-2 (Radford et al., 2019), so that the stream's variance does not grow with depth.
        """
        generator = torch.Generator(self.embed.weight.device).manual_seed(seed)
        back = 0.02 / (2 * self.config.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                std = back if name.endswith(("attention.out.weight", "down.weight", "w_down")) else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, tokens: Tensor, layout: Layout, *, noise: Noise | None = None) -> ModelOutput:
        """tokens (T,) laid out by `layout` -> hidden (T, D) and each layer's routing. `noise`: NEFTune's."""
        x: Tensor = self.embed(tokens, layout, noise)
        residual, routings = None, []
        for block in self.blocks:
            x, residual, routing = block(x, residual, layout)
            if routing is not None:
                routings.append(routing)
        hidden, _ = self.norm(x, residual)
        return ModelOutput(hidden, tuple(routings))

    def logits(self, batch) -> Tensor:
        """(T, V) for a `Batch`: for inspection and tests; training and scoring never make it."""
        return self.head.logits(self(batch.tokens, batch.layout).hidden)
