"""How long the losses of the head take, forward and backward, beside the bare products that they cannot do without.

As in bench/ops.py: each public function takes a Place and returns rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.bench import peers
from tokenmill.bench.gpu import Place
from tokenmill.bench.ops import Fresh, Row, Variants, _randn, _ratio, peak_memory, running, timed
from tokenmill.bench.peers import Peer, Peers
from tokenmill.kernels import logits
from tokenmill.kernels.cross_entropy import linear_cross_entropy, token_logprobs


def cross_entropy(place: Place) -> list[Row]:
    """The loss of the head, forward and backward, beside its three bare products."""
    hidden, weight, targets = _head(place, 32000)
    half = torch.randperm(len(targets), device=place.device)[: len(targets) // 2].sort().values.int()

    def loss(h: Tensor, w: Tensor, rows: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(h, w, targets, rows=rows).loss

    def naive(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).float(), targets, reduction="sum")

    theirs = weight.detach().clone().requires_grad_()  # a gradient in its own dtype, as each of them makes it
    others = {"naive": Peer(naive, (hidden, theirs))} | peers.cross_entropy(hidden, theirs, targets, place.small)
    others, said = running(Peer(loss, (hidden, weight)), others)
    variants: Variants = {
        "three bare products": _products(hidden, weight, "forward, to hidden, to weight"),
        "linear_cross_entropy": lambda: _step(loss(hidden, weight), hidden, weight),
        "half the rows": lambda: _step(loss(hidden, weight, half), hidden, weight),
        "loss alone": lambda: loss(hidden.detach(), weight.detach()),
    }
    rows = _beside(place, variants, others, said)
    whole = rows["linear_cross_entropy"]
    if not isinstance(whole["peak MiB"], str):
        whole["MiB beyond gradients"] = whole["peak MiB"] - (hidden.nbytes + 4 * weight.numel()) / 2**20
    _ratio(whole, "of the products", whole["ms"] / rows["three bare products"]["ms"], "<= 1.25, 1.12; <= 512 MiB")
    _ratio(rows["half the rows"], "of the whole", rows["half the rows"]["ms"] / whole["ms"], "<= 0.60")
    return list(rows.values())


def log_probabilities(place: Place) -> list[Row]:
    """Those of the targets, forward and backward, beside four bare products: backward makes the logits again."""
    hidden, weight, targets = _head(place, 32000)
    upstream = torch.randn(len(targets), device=place.device)

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return token_logprobs(h, w, targets)

    def weighted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: (function(*inputs) * upstream).sum()

    theirs = weight.detach().clone().requires_grad_()
    others = peers.log_probabilities(hidden, theirs, targets, place.small)
    others = {name: peer._replace(function=weighted(peer.function)) for name, peer in others.items()}
    others, said = running(Peer(weighted(ours), (hidden, weight)), others)
    variants: Variants = {
        "four bare products": _products(hidden, weight, "forward, forward, to hidden, to weight"),
        "token_logprobs": lambda: _step(weighted(ours)(hidden, weight), hidden, weight),
    }
    rows = _beside(place, variants, others, said)
    whole = rows["token_logprobs"]
    whole["of the products"] = whole["ms"] / rows["four bare products"]["ms"]
    return list(rows.values())


def vocabularies(place: Place) -> list[Row]:
    """The loss of larger heads beside its three products; and what one of 8 ranks, over which the largest is split,
    does with a chunk of its logits between two exchanges, beside a copy.
    """
    rows: list[Row] = []
    for vocab in (128256, 151936):
        hidden, weight, targets = _head(place, vocab)

        def step(h: Tensor = hidden, w: Tensor = weight, t: Tensor = targets) -> None:
            _step(linear_cross_entropy(h, w, t).loss, h, w)

        name, products = f"linear_cross_entropy, V {vocab}", f"three bare products, V {vocab}"
        bare = _products(hidden, weight, "forward, to hidden, to weight")
        both = _beside(place, {products: bare, name: step}, {}, {})
        both[name]["of the products"] = both[name]["ms"] / both[products]["ms"]
        rows += both.values()
    count, vocab = (16, 100) if place.small else (4096, 151936 // 8)
    chunk = _randn(place, count, logits.padded(vocab), grad=False)
    targets = torch.randint(vocab, (count,), device=place.device)
    weights, lse = torch.ones(count, device=place.device), torch.full((count,), 12.0, device=place.device)
    target = torch.empty_like(chunk)

    def gradient() -> Callable[[], Any]:
        return partial(logits.gradient, chunk.clone()[:, :vocab], targets, weights, lse, 0.0, True)

    moved = {"copy of logits": 2, "statistics of a slice": 1, "gradient of a slice": 2}  # times the chunk
    runs = (
        lambda: target.copy_(chunk),
        lambda: logits.statistics(chunk[:, :vocab], targets, True),
        Fresh(gradient),
    )
    times = timed(place, dict(zip(moved, runs, strict=True)))
    for name, row in times.items():
        row["GB/s"] = moved[name] * chunk.nbytes / row["ms"] / 1e6
        row["of the copy"] = row["GB/s"] / times["copy of logits"]["GB/s"]
    return rows + list(times.values())


def _head(place: Place, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, the weight, whose gradient stays in fp32 as the losses sum it, and targets."""
    count, dim, vocab = (16, 32, 100) if place.small else (8192, 4096, vocab)
    hidden, weight = _randn(place, count, dim), _randn(place, vocab, dim)
    with torch.no_grad():
        weight.mul_(dim**-0.5)  # logits of about 1: of larger ones bf16 keeps too little to compare gradients
    weight.grad_dtype = torch.float32
    return hidden, weight, torch.randint(vocab, (count,), device=place.device)


def _products(hidden: Tensor, weight: Tensor, which: str) -> Callable[[], None]:
    """The head's products alone, without anything between them."""
    h, w = hidden.detach(), weight.detach()
    chunk = h @ w.T
    products = {
        "forward": lambda: torch.mm(h, w.T, out=chunk),
        "to hidden": lambda: torch.mm(chunk, w),
        "to weight": lambda: torch.mm(chunk.T, h),
    }

    def run() -> None:
        for name in which.split(", "):
            products[name]()

    return run


def _step(loss: Tensor, hidden: Tensor, weight: Tensor) -> None:
    loss.backward()
    hidden.grad = weight.grad = None


def _beside(place: Place, variants: Variants, others: Peers, said: dict[str, Row]) -> dict[str, Row]:
    """Rows with peak memory of our variants, and of other losses forward and backward."""
    variants = variants | {name: partial(_step_of, other) for name, other in others.items()}
    rows = timed(place, variants, 8)
    for name, run in variants.items():
        rows[name]["peak MiB"] = peak_memory(place, run)
    return {name: rows.get(name, {}) | said.get(name, {}) for name in dict.fromkeys([*rows, *said])}


def _step_of(peer: Peer) -> None:
    torch.autograd.grad(peer.function(*peer.inputs), peer.inputs)
