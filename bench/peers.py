"""Other projects' versions of our operations, as far as they are installed here: what our timings stand beside.

liger-kernel, quack-kernels and cut-cross-entropy want versions of torch and triton of their own; where they would not
resolve together, give each an environment of its own with tokenmill beside it, and run `tokenmill bench ops` in each.
Each function returns what computes the same as ours, by name. A package is imported at a peer's first call, so that one
that cannot be imported costs no more than its own timing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.kernels import cross_entropy as ours
from tokenmill.kernels import rms_norm as norms
from tokenmill.kernels import swiglu as glu


class Peer(NamedTuple):
    """Called with its inputs, which are what gradients are wanted of."""

    function: Callable[..., Any]
    inputs: Sequence[Tensor]
    overwrites: bool = False  # its inputs or what it saved for backward: each run needs a fresh copy


Peers = dict[str, Peer]

LIGER = "liger_kernel.transformers.functional"


def compiled(function: Callable[..., Any], small: bool) -> Callable[..., Any]:
    """By torch.compile; in a rehearsal only traced."""
    return torch.compile(function, backend="eager" if small else "inductor", dynamic=False)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _from(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, small: bool) -> Peers:
    """The summed loss, a scalar."""
    inputs = hidden, weight
    peers = {"torch.compile": Peer(compiled(lambda h, w: ours.reference(h, w, targets).loss, small), inputs)}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13; without options it keeps all the logits

        def in_torch(h: Tensor, w: Tensor) -> Tensor:
            options = _from("torch.nn", "LinearCrossEntropyOptions")()
            return F.linear_cross_entropy(h, w, targets, reduction="sum", options=options)

        peers["F.linear_cross_entropy"] = Peer(in_torch, inputs)
    if _installed("liger_kernel"):

        def in_liger(h: Tensor, w: Tensor) -> Tensor:
            function = _from(LIGER, "liger_fused_linear_cross_entropy")
            return function(h, w, targets, reduction="sum", accum_dtype=torch.float32)

        peers["Liger-Kernel"] = Peer(in_liger, inputs)
    if _installed("cut_cross_entropy"):

        def cut(h: Tensor, w: Tensor) -> Tensor:
            function = _from("cut_cross_entropy", "linear_cross_entropy")
            return function(h, w, targets, reduction="sum", impl="cce", filter_eps=None)  # no gradient is left out

        peers["cut-cross-entropy"] = Peer(cut, inputs)
    if _installed("quack"):

        def in_quack(h: Tensor, w: Tensor) -> Tensor:
            return _from("quack.linear_cross_entropy", "chunked_linear_cross_entropy")(h, w, targets, reduction="sum")

        peers["quack"] = Peer(in_quack, inputs)
    return peers


def log_probabilities(hidden: Tensor, weight: Tensor, targets: Tensor, small: bool) -> Peers:
    """Of the targets, (T,)."""

    def naive(h: Tensor, w: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(h, w).float(), targets, reduction="none")

    inputs = hidden, weight
    return {"naive": Peer(naive, inputs), "torch.compile": Peer(compiled(naive, small), inputs)}


def embedding(tokens: Tensor, weight: Tensor, scale: float, small: bool) -> Peers:
    """The lookup, and one with uniform noise in (-scale, scale), as in TRL's trainer."""

    def noisy(w: Tensor) -> Tensor:
        rows = F.embedding(tokens, w)
        return rows + torch.empty_like(rows).uniform_(-scale, scale)

    peers = {
        "torch.compile": Peer(compiled(lambda w: F.embedding(tokens, w), small), (weight,)),
        "torch.compile with noise": Peer(compiled(noisy, small), (weight,)),
    }
    if _installed("liger_kernel"):

        def in_liger(w: Tensor) -> Tensor:
            return _from("liger_kernel.ops.experimental.embedding", "LigerEmbeddingFunction").apply(w, tokens)

        peers["Liger-Kernel"] = Peer(in_liger, (weight,))
    return peers


def rms_norm(x: Tensor, weight: Tensor, eps: float, small: bool) -> Peers:
    inputs = x, weight
    peers = {
        "torch.compile": Peer(compiled(lambda x, w: norms.reference(x, w, eps), small), inputs),
        "F.rms_norm": Peer(lambda x, w: F.rms_norm(x, x.shape[-1:], w, eps), inputs),
    }
    if _installed("liger_kernel"):
        peers["Liger-Kernel"] = Peer(lambda x, w: _from(LIGER, "liger_rms_norm")(x, w, eps, in_place=False), inputs)
    if _installed("quack"):
        peers["quack"] = Peer(lambda x, w: _from("quack.rmsnorm", "rmsnorm")(x, w, eps=eps), inputs)
    return peers


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor, small: bool) -> Peers:
    inputs = x, weight, residual

    def add(x: Tensor, w: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norms.reference(total, w, eps), total

    peers = {"torch.compile": Peer(compiled(add, small), inputs)}
    if _installed("liger_kernel"):

        def in_liger(x: Tensor, w: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return _from(LIGER, "liger_fused_add_rms_norm")(x, residual, w, eps, in_place=False)

        peers["Liger-Kernel"] = Peer(in_liger, inputs)
    if _installed("quack"):

        def in_quack(x: Tensor, w: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return _from("quack.rmsnorm", "rmsnorm")(x, w, residual=residual, eps=eps, prenorm=True)

        peers["quack"] = Peer(in_quack, inputs)
    return peers


def swiglu(gate_up: Tensor, small: bool) -> Peers:
    peers = {"torch.compile": Peer(compiled(glu.reference, small), (gate_up,))}
    if _installed("liger_kernel"):  # two tensors, as two linear layers make them; their gradients take their place
        halves = [half.detach().contiguous().requires_grad_() for half in gate_up.chunk(2, -1)]
        peers["Liger-Kernel"] = Peer(lambda a, b: _from(LIGER, "liger_swiglu")(a, b), halves, overwrites=True)
    return peers


def rotary(q: Tensor, k: Tensor, positions: Tensor, theta: float, small: bool) -> Peers:
    """q and k (T, H, d) turned by a table in their own dtype, as in Hugging Face's models."""
    channels = torch.arange(0, q.shape[-1], 2, device=q.device) / q.shape[-1]
    angles = (positions[:, None] / theta**channels).repeat(1, 2)
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    peers = {"torch.compile": Peer(compiled(lambda q, k: (turned(q), turned(k)), small), (q, k))}
    if _installed("liger_kernel"):

        def in_place(q: Tensor, k: Tensor) -> list[Tensor]:
            batched = [x.transpose(0, 1)[None] for x in (q, k)]  # (1, H, T, d)
            made = _from(LIGER, "liger_rope")(*batched, cos[None], sin[None])
            return [x[0].transpose(0, 1) for x in made]

        peers["Liger-Kernel"] = Peer(in_place, (q, k), overwrites=True)
    return peers


def attention(q: Tensor, k: Tensor, v: Tensor, window: int, small: bool) -> Peers:
    """One document of q (T, Hq, d), k and v (T, Hkv, d), of whose keys a query sees `window`, by FlexAttention."""
    flex = "torch.nn.attention.flex_attention"
    attend = compiled(lambda *qkv, **options: _from(flex, "flex_attention")(*qkv, **options), small)

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    @functools.cache
    def blocks() -> Any:
        make = compiled(_from(flex, "create_block_mask"), small)
        return make(visible, None, None, q.shape[0], q.shape[0], device=q.device.type)

    def run(*qkv: Tensor) -> Tensor:
        batched = [x.transpose(0, 1)[None] for x in qkv]
        return attend(*batched, block_mask=blocks(), enable_gqa=True)[0].transpose(0, 1)

    return {"FlexAttention": Peer(run, (q, k, v))}
