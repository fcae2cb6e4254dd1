"""The transformer: tokens and a layout in, hidden states out; its head turns those into losses."""

from __future__ import annotations

from contextlib import nullcontext
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
from tokenmill.trainer.model import recompute
from tokenmill.trainer.model.attention import Attention
from tokenmill.trainer.model.cache import Cache, LayerCache
from tokenmill.trainer.model.config import AdapterConfig, ModelConfig
from tokenmill.trainer.model.linear import Linear
from tokenmill.trainer.model.moe import MoELayer
from tokenmill.trainer.model.quantise import saved_in_4_bits
from tokenmill.trainer.model.recompute import Recompute
from tokenmill.trainer.model.rows import local_rows


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
        self.gate_up = Linear(config.dim, 2 * config.hidden_dim)
        self.down = Linear(config.hidden_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward network or experts, each behind a norm and beside the residual stream.

    The stream's additions are made inside the norms, so a block takes and returns the pair (x, residual), x being
    the part that is still to be added.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config)
        self.feed_forward = MoELayer(config) if config.moe else FeedForward(config)
        self.recompute: Recompute = "none"
        self.quantised = False  # whether some of its weights are `NF4Weight`s

    def forward(
        self, x: Tensor, residual: Tensor | None, layout: Layout, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor, moe_kernels.Routing | None]:
        with saved_in_4_bits() if self.quantised and self.recompute == "none" else nullcontext():
            return recompute.run(self.recompute, self._forward, x, residual, layout, cache)

    def _forward(
        self, x: Tensor, residual: Tensor | None, layout: Layout, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, moe_kernels.Routing | None]:
        x, stream = self.attention_norm(x, residual)
        x, stream = self.feed_forward_norm(self.attention(x, layout, cache), stream)
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
    """Backends are chosen by name, once for all layers: see `tokenmill.kernels.attention` and `tokenmill.kernels.moe`.

    `device` and `dtype` are what it will compute on and in, for which the choice is made; the parameters themselves
    are made on torch's default device, in `dtype`. A model that moves to another device or dtype chooses anew.
    """

    def __init__(
        self, config: ModelConfig, *, attention: str = "auto", moe: str = "auto",
        device: torch.device | str | None = None, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.names = {"attention": attention, "moe": moe}
        self.backends: dict[str, str] = {}
        self.balance_bias: Tensor | None = None
        self.adapter: AdapterConfig | None = None  # set by `lora.attach`
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config)
        self.head = Head(config)
        self.to(dtype)
        self.choose_backends(device or self.embed.weight.device, dtype)

    def choose_backends(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Give every layer the backends for computing on `device` in `dtype`.

        Raises ValueError where one that was named cannot run there.
        """
        attention = attention_kernels.choose(self.names["attention"], device, dtype, self.config.head_dim)
        self.backends = {"attention": str(attention)}
        experts = None
        if self.config.moe:
            experts = moe_kernels.choose(self.names["moe"], device, dtype)
            self.backends["experts"] = str(experts)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = attention
            elif isinstance(module, MoELayer):
                module.backend = experts

    def set_balance_bias(self, bias: Tensor | None) -> None:
        """Add bias (layers, E) fp32 to the routers' probabilities for the choice of experts; None: nothing.

        It is no parameter: the trainer owns it, and it stays fp32 whatever the model computes in.
        """
        self.balance_bias = None if bias is None else bias.to(self.embed.weight.device)
        layers = [module for module in self.modules() if isinstance(module, MoELayer)]
        rows = [None] * len(layers) if self.balance_bias is None else self.balance_bias.unbind()
        for layer, row in zip(layers, rows, strict=True):
            layer.balance_bias = row

    def set_recompute(self, mode: Recompute) -> None:
        """Activation checkpointing of every block: none, selective or full (`trainer/model/recompute.py`)."""
        for module in self.modules():
            if isinstance(module, TransformerBlock):
                module.recompute = mode

    def _apply(self, fn: Any, recurse: bool = True) -> Transformer:
        """Behind `to`, `cuda`, `bfloat16` and the like."""
        before = self.embed.weight
        super()._apply(fn, recurse)
        after = self.embed.weight
        moved = (before.device, before.dtype) != (after.device, after.dtype)
        if self.backends and moved and before.device.type != "meta":  # else it was made for where it is now
            self.choose_backends(after.device, after.dtype)
            self.set_balance_bias(self.balance_bias)
        return self

    def initialise(self, seed: int) -> None:
        """Normal(0, 0.02) weights; the projections back into the residual stream scaled by 1 / sqrt(2 layers), as in
        GPT-2 (Radford et al., 2019), so that the stream's variance does not grow with depth.
        """
        generator = torch.Generator().manual_seed(seed)
        back = 0.02 / (2 * self.config.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            local, first = local_rows(parameter.data)
            if parameter.dim() == 1:
                local.fill_(1.0)
                continue
            std = back if name.endswith(("attention.out.weight", "down.weight", "w_down")) else 0.02
            # Made whole on every rank and on the host, so that the weights depend on nothing but the seed.
            whole = torch.empty(parameter.shape).normal_(std=std, generator=generator).view(-1, parameter.shape[-1])
            local.copy_(whole[first : first + local.shape[0]])

    def forward(
        self, tokens: Tensor, layout: Layout, *, noise: Noise | None = None, cache: Cache | None = None
    ) -> ModelOutput:
        """tokens (T,) laid out by `layout` -> hidden (T, D) and each layer's routing. `noise`: NEFTune's, added in
        training only. `cache`: in generation, earlier tokens' keys, and room for these; `layout` is what it gave."""
        x: Tensor = self.embed(tokens, layout, noise if self.training else None)
        residual, routings = None, []
        for number, block in enumerate(self.blocks):
            x, residual, routing = block(x, residual, layout, None if cache is None else cache.layer(number))
            if routing is not None:
                routings.append(routing)
        hidden, _ = self.norm(x, residual)
        return ModelOutput(hidden, tuple(routings))

    def logits(self, batch) -> Tensor:
        """(T, V) for a `Batch`: for inspection and tests; training and scoring never make it."""
        return self.head.logits(self(batch.tokens, batch.layout).hidden)
