"""The shape of a model and of its adapters, and what follows from it alone: parameters and operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MoEConfig:
    n_experts: int
    top_k: int = 2

    def __post_init__(self) -> None:
        if type(self.n_experts) is not int or type(self.top_k) is not int:
            raise ValueError(f"moe.n_experts and moe.top_k must be integers, got {self.n_experts!r}, {self.top_k!r}")
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"moe.top_k must lie in 1..n_experts ({self.n_experts}), got {self.top_k}")


@dataclass(frozen=True)
class ModelConfig:
    """Mistral's architecture (Jiang et al., 2023), and with `moe` Mixtral's (Jiang et al., 2024)."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int  # of one feed-forward network, or of one expert
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 1e4
    sliding_window: int | None = None  # keys a query sees, itself included; None: all before it
    moe: MoEConfig | None = None
    max_positions: int = 32768  # what the model was made for; nothing here depends on it
    bos_id: int | None = 1
    eos_id: int | None = 2

    def __post_init__(self) -> None:
        optional = ("sliding_window", "bos_id", "eos_id")
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_positions")
        for name in sizes + optional:
            value = getattr(self, name)
            if type(value) is not int and not (value is None and name in optional):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1 (the query's own key), got {self.sliding_window}")

    def parameters(self, *, active: bool = False) -> int:
        """Parameters in all; or those that one token passes through, where experts are chosen.

        Mistral-7B-v0.1: 7,241,732,096. Mixtral-8x7B-v0.1: 46,702,792,704, of which 12,879,925,248 active.
        """
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        feed_forward = 3 * self.dim * self.hidden_dim
        if self.moe:
            feed_forward *= self.moe.top_k if active else self.moe.n_experts
            feed_forward += self.dim * self.moe.n_experts
        return self.n_layers * (attention + feed_forward + 2 * self.dim) + self.dim + 2 * self.vocab_size * self.dim

    def flops(self, tokens: int, attended: int, *, frozen: bool = False) -> float:
        """Floating-point operations of one forward and backward pass over `tokens` rows, exactly: matrix products
        with the weights that act (active experts, router and head, not the lookup), and attention over `attended`
        (query, key) pairs a layer, counted within documents and window. A product's backward is twice its forward;
        with a weight that is `frozen` under adapters, once (and what the adapters themselves add is left out).
        """
        norms = (2 * self.n_layers + 1) * self.dim
        weights = self.parameters(active=True) - norms - self.vocab_size * self.dim
        attention = self.n_layers * 2 * 2 * self.n_heads * self.head_dim * attended
        return (2.0 if frozen else 3.0) * 2 * weights * tokens + 3.0 * attention


@dataclass(frozen=True)
class AdapterConfig:
    """Adapters on frozen weights: LoRA (Hu et al., 2021), or DoRA (Liu et al., 2024), which also trains the length of
    each row; rank-stabilised, they are scaled by alpha / sqrt(rank) (Kalajdzievski, 2023) instead of alpha / rank.
    """

    kind: Literal["lora", "dora"] = "lora"
    rank: int = 16
    alpha: float = 32.0
    # Patterns of projections' names (`lora.projections`), whole or from a dot on: "attention", "v", "experts.*",
    # "blocks.3.attention.q". Embedding and head have none.
    targets: tuple[str, ...] = ("attention", "feed_forward")
    rank_stabilised: bool = False
    quantise: Literal["none", "nf4"] = "none"  # nf4: frozen weights in 4 bits (QLoRA)
    quantise_experts: bool = True
    quantise_router: bool = False
    path: str | None = None  # a folder that PEFT wrote, or a checkpoint, to start from; None: they change nothing yet

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"adapter.rank must be positive, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"adapter.alpha must be positive, got {self.alpha}")
        if not self.targets:
            raise ValueError("adapter.targets must name at least one projection")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


def attended_pairs(length: int, window: int | None) -> int:
    """(query, key) pairs that causal attention visits in one document of `length` tokens."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window
