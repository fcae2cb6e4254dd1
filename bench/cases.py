"""The catalogue: every launch of a kernel that training Mistral-7B and Mixtral-8x7B makes, and some at other shapes.

A case is a function of a device, where it makes its tensors, and `small`; it returns a function that runs the operation
forward and backward, as often as wanted, and returns all that its kernels write. `small` shortens the axes that a
kernel's launch does not depend on, for where a full run would take too long. `tokenmill bench static` compiles what the
cases launch, without a GPU; `tokenmill bench tune` times it and compares what is returned.

To add a kernel: write its case, and name it in CASES with each shape and dtype that is launched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tokenmill.kernels import moe
from tokenmill.kernels.adamw import adamw_
from tokenmill.kernels.cross_entropy import linear_cross_entropy, token_logprobs
from tokenmill.kernels.embedding import Noise, embed
from tokenmill.kernels.layout import Layout
from tokenmill.kernels.logits import gradient, padded, statistics
from tokenmill.kernels.moe import fused, torch_gemm
from tokenmill.kernels.moe.permute import sort_choices
from tokenmill.kernels.rms_norm import rms_norm
from tokenmill.kernels.rotary import apply_rotary
from tokenmill.kernels.swiglu import swiglu

Results = tuple[Tensor, ...]
Case = Callable[[str, bool], Callable[[], Results]]

_BF16, _FP32 = torch.bfloat16, torch.float32

TOKENS = 8192
VOCAB = 32000
DIM = 4096
HIDDEN = 14336


def _randn(device: str, *shape: int, dtype: torch.dtype = _BF16, grad: bool = True) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad)


def _both(outputs: Results, inputs: Results, upstream: Results) -> Results:
    """The outputs and the gradients of the inputs."""
    return *outputs, *torch.autograd.grad(outputs, inputs, upstream)


def _one_document(device: str, tokens: int) -> Layout:
    def made(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    positions = torch.arange(tokens, dtype=torch.int32, device=device)
    return Layout(positions, made(0, tokens), tokens, made(0, dtype=torch.int64), made(tokens))


def _embed(
    device: str, small: bool, *, tokens: int = TOKENS, dim: int = DIM, noise: bool = False, dtype: torch.dtype = _BF16
) -> Callable[[], Results]:
    tokens, vocab = (33, 1000) if small else (tokens, VOCAB)
    weight, upstream = _randn(device, vocab, dim, dtype=dtype), _randn(device, tokens, dim, dtype=dtype, grad=False)
    frequency = 1 / torch.arange(1, vocab + 1, device=device)  # as in a text
    ids = frequency.multinomial(tokens, replacement=True).int()
    layout = _one_document(device, tokens)

    def run() -> Results:
        out = embed(ids, weight, noise=Noise(5.0, 1, 2) if noise else None, layout=layout)
        return _both((out,), (weight,), (upstream,))

    return run


def _rms_norm(
    device: str, small: bool, *, dim: int = DIM, residual: bool = True, last: bool = False, dtype: torch.dtype = _BF16
) -> Callable[[], Results]:
    """`last`: nothing but the head follows, so the sum has no gradient."""
    tokens = 8 if small else TOKENS
    x, stream, upstream, of_stream = (_randn(device, tokens, dim, dtype=dtype) for _ in range(4))
    weight = _randn(device, dim, dtype=dtype)

    def run() -> Results:
        if not residual:
            return _both((rms_norm(x, weight, 1e-5),), (x, weight), (upstream,))
        y, total = rms_norm(x, weight, 1e-5, stream)
        outputs, gradients = ((y,), (upstream,)) if last else ((y, total), (upstream, of_stream))
        return _both(outputs, (x, stream, weight), gradients)

    return run


def _rotary(
    device: str, small: bool, *, heads: int = 32, kv_heads: int = 8, dtype: torch.dtype = _BF16
) -> Callable[[], Results]:
    tokens, head_dim = 8 if small else TOKENS, 128
    qkv = _randn(device, tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    upstream = tuple(_randn(device, tokens, n, head_dim, dtype=dtype, grad=False) for n in (heads, kv_heads))
    layout = _one_document(device, tokens)

    def run() -> Results:
        q, k, _ = qkv.split((heads, kv_heads, kv_heads), dim=1)
        return _both(apply_rotary(q, k, layout, 1e4), (qkv,), upstream)

    return run


def _swiglu(device: str, small: bool, *, hidden: int = HIDDEN, dtype: torch.dtype = _BF16) -> Callable[[], Results]:
    tokens = 8 if small else TOKENS
    gate_up, upstream = (_randn(device, tokens, width, dtype=dtype) for width in (2 * hidden, hidden))
    return lambda: _both((swiglu(gate_up),), (gate_up,), (upstream,))


def _experts(device: str, small: bool, *, dtype: torch.dtype = _BF16) -> Callable[[], Results]:
    """Mixtral's layer of experts on our own products: whole, without a backward pass, and its second step alone."""
    backend = moe.Backend("triton", fused.experts, fused.layer)
    experts, tokens, dim, hidden = (4, 64, 64, 96) if small else (8, TOKENS, DIM, HIDDEN)
    x, logits = _randn(device, tokens, dim, dtype=dtype), _randn(device, tokens, experts, dtype=dtype)
    w_gate_up = _randn(device, experts, 2 * hidden, dim, dtype=dtype)
    w_down = _randn(device, experts, dim, hidden, dtype=dtype)
    with torch.no_grad():
        w_gate_up.mul_(dim**-0.5)
        w_down.mul_(hidden**-0.5)
    upstream = _randn(device, tokens, dim, dtype=dtype, grad=False)
    offsets = torch.arange(1, experts + 1, dtype=torch.int32, device=device) * (tokens // experts)

    def run() -> Results:
        with torch.no_grad():
            alone, _ = moe.moe(x, logits, w_gate_up, w_down, 2, backend=backend)
        ys = backend.experts(x, offsets, w_gate_up, w_down)
        second = _both((ys,), (x, w_gate_up, w_down), (upstream,))
        y, routing = moe.moe(x, logits, w_gate_up, w_down, 2, backend=backend)
        first = _both((y,), (x, logits, w_gate_up, w_down), (upstream,))
        totals = torch.zeros_like(w_gate_up, dtype=_FP32), torch.zeros_like(w_down, dtype=_FP32)
        added = fused.layer(x, routing._replace(weights=routing.weights.detach()), w_gate_up, w_down, totals)
        added.backward(upstream)
        return alone, *second, *first, *totals

    return run


def _adapters_of_experts(device: str, small: bool, *, rank: int = 16) -> Callable[[], Results]:
    """One product alone with frozen weights, and the two of an adapter, on what goes into both layers."""
    experts, rows, dim, hidden = (4, 64, 64, 96) if small else (8, 2 * TOKENS, DIM, HIDDEN)
    offsets = torch.arange(1, experts + 1, dtype=torch.int32, device=device) * (rows // experts)
    xs, h = _randn(device, rows, dim), _randn(device, rows, hidden)
    low, narrow = _randn(device, rows, 2 * rank), _randn(device, rows, rank)
    inputs = [
        (xs, _randn(device, experts, 2 * hidden, dim, grad=False)),
        (xs, _randn(device, experts, 2 * rank, dim)), (low, _randn(device, experts, 2 * hidden, 2 * rank)),
        (h, _randn(device, experts, rank, hidden)), (narrow, _randn(device, experts, dim, rank)),
    ]  # fmt: skip
    upstream = [_randn(device, rows, w.shape[1], grad=False) for _, w in inputs]

    def run() -> Results:
        made: list[Tensor] = []
        for (x, w), dy in zip(inputs, upstream, strict=True):
            y = fused.linear(x, w, offsets)
            made += _both((y,), tuple(t for t in (x, w) if t.requires_grad), (dy,))
        return tuple(made)

    return run


def _experts_by_library(device: str, small: bool, *, dtype: torch.dtype = _BF16) -> Callable[[], Results]:
    """What is ours where PyTorch's grouped product takes the place of our own."""
    experts, rows, dim, hidden = (4, 64, 64, 96) if small else (8, 2 * TOKENS, DIM, HIDDEN)
    dy, both = _randn(device, rows, dim, dtype=dtype), _randn(device, rows, 2 * hidden, dtype=dtype)
    w, p = _randn(device, experts, dim, hidden, dtype=dtype), _randn(device, rows, dtype=_FP32)
    offsets = torch.arange(1, experts + 1, dtype=torch.int32, device=device) * (rows // experts)

    def run() -> Results:
        with torch.no_grad():
            d_both, ph, d_p = torch_gemm.hidden_gradient(dy, w, both, offsets, p)
            assert d_p is not None
            return d_both, ph, d_p, torch_gemm.weight_gradient(dy, ph, offsets)

    return run


def _routing(
    device: str, small: bool, *, experts: int = 8, top_k: int = 2, dtype: torch.dtype = _BF16
) -> Callable[[], Results]:
    """The choice of experts, as it is, and with a bias and ghosts; and the order of the choices."""
    tokens = 64 if small else TOKENS
    logits, bias = _randn(device, tokens, experts, dtype=dtype), _randn(device, experts, dtype=_FP32, grad=False)
    d_weights = _randn(device, tokens, top_k, dtype=_FP32, grad=False)
    d_sums, d_square = _randn(device, experts, dtype=_FP32, grad=False), torch.ones((), device=device)
    real = torch.ones(tokens, dtype=torch.bool, device=device)

    def run() -> Results:
        biased = moe.route(logits, top_k, bias=bias)
        order = sort_choices(biased)
        routing = moe.route(logits, top_k, real_rows=real)
        forced = moe.route(logits, top_k, forced=routing.experts)
        sums = routing.weights, routing.probability_sums, routing.lse_squared_sum
        gradients = torch.autograd.grad(sums, logits, (d_weights, d_sums, d_square))
        return *biased, *order, *routing, *forced, *gradients

    return run


def _loss(
    device: str, small: bool, *, tokens: int = TOKENS, vocab: int = VOCAB, dtype: torch.dtype = _BF16
) -> Callable[[], Results]:
    tokens, dim = (4, 8) if small else (tokens, DIM)
    hidden, weight = _randn(device, tokens, dim, dtype=dtype), _randn(device, vocab, dim, dtype=dtype)
    targets = torch.randint(vocab, (tokens,), device=device)

    def run() -> Results:
        of_tokens = linear_cross_entropy(hidden, weight, targets, z_loss=1e-4)
        gradients = torch.autograd.grad(of_tokens.loss / 2, (hidden, weight))  # 1 would have nothing to scale
        return *of_tokens, *gradients

    return run


def _evaluation(device: str, small: bool, *, vocab: int = VOCAB) -> Callable[[], Results]:
    """The loss where no gradient is wanted."""
    tokens, dim = (16, 32) if small else (TOKENS, DIM)
    hidden, weight = _randn(device, tokens, dim, grad=False), _randn(device, vocab, dim, grad=False)
    targets = torch.randint(vocab, (tokens,), device=device)
    return lambda: tuple(linear_cross_entropy(hidden, weight, targets))


def _logprobs(device: str, small: bool, *, vocab: int = VOCAB) -> Callable[[], Results]:
    tokens, dim = (4, 8) if small else (TOKENS, DIM)
    hidden, weight = _randn(device, tokens, dim), _randn(device, vocab, dim)
    targets = torch.randint(vocab, (tokens,), device=device)
    upstream = _randn(device, tokens, dtype=_FP32, grad=False)

    def run() -> Results:
        return _both((token_logprobs(hidden, weight, targets),), (hidden, weight), (upstream,))

    return run


def _slice_of_logits(device: str, small: bool, *, vocab: int) -> Callable[[], Results]:
    """What the vocabulary-parallel loss launches for its `vocab` columns of a chunk, between two exchanges."""
    tokens = 4 if small else 4096
    chunk = _randn(device, tokens, padded(vocab), grad=False)
    targets = torch.randint(vocab, (tokens,), device=device)
    weights, lse = torch.ones(tokens, device=device), torch.full((tokens,), 11.0, device=device)

    def run() -> Results:
        mine = chunk.clone()[:, :vocab]
        parts = statistics(mine, targets, True)
        gradient(mine, targets, weights, lse, 1e-4, True)
        return parts, mine

    return run


def _adamw(
    device: str, small: bool, *, count: int = DIM * HIDDEN, gradient: torch.dtype, moments: torch.dtype,
    on_device: bool = False, offset: int = 0,
) -> Callable[[], Results]:  # fmt: skip
    if small:
        count = min(count, 8192)
    parameter = _randn(device, count, grad=False)
    slope = _randn(device, count, dtype=gradient, grad=False)
    exp_avg, exp_avg_sq = (torch.zeros(count, dtype=moments, device=device) for _ in range(2))
    step = torch.ones((), dtype=torch.int64, device=device) if on_device else 1

    def run() -> Results:
        state = parameter.clone(), exp_avg.clone(), exp_avg_sq.clone()
        adamw_(
            state[0], slope, *state[1:], lr=1e-5, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
            step=step, seed=1, tensor_id=2, offset=offset,
        )  # fmt: skip
        return state

    return run


CASES: dict[str, Case] = {
    "embed": _embed,
    "embed, noise": partial(_embed, noise=True),
    "embed, noise, 8191 tokens": partial(_embed, noise=True, tokens=8191),
    "embed, noise, dim 2048": partial(_embed, noise=True, dim=2048),
    "embed, noise, dim 8192": partial(_embed, noise=True, dim=8192),
    "embed, noise, fp32": partial(_embed, noise=True, dtype=_FP32),
    "rms_norm, no residual": partial(_rms_norm, residual=False),
    "rms_norm": _rms_norm,
    "rms_norm, last": partial(_rms_norm, last=True),
    "rms_norm, dim 2048": partial(_rms_norm, dim=2048),
    "rms_norm, dim 8192": partial(_rms_norm, dim=8192),
    "rms_norm, fp32": partial(_rms_norm, dtype=_FP32),
    "rotary": _rotary,
    "rotary, 64 heads": partial(_rotary, heads=64),
    "rotary, fp32": partial(_rotary, dtype=_FP32),
    "swiglu": _swiglu,
    "swiglu, fp32": partial(_swiglu, dtype=_FP32),
    "routing": _routing,
    "routing, 64 experts, top 8": partial(_routing, experts=64, top_k=8),
    "routing, fp32": partial(_routing, dtype=_FP32),
    "experts": _experts,
    "experts, fp32": partial(_experts, dtype=_FP32),
    "experts, PyTorch's product": _experts_by_library,
    "experts, adapters of rank 16": _adapters_of_experts,
    "loss": _loss,
    "loss, 8191 tokens": partial(_loss, tokens=8191),
    "loss, vocabulary 32768": partial(_loss, vocab=32768),
    "loss, vocabulary 50257": partial(_loss, vocab=50257),
    "loss, vocabulary 128256": partial(_loss, vocab=128256),
    "loss, vocabulary 151936": partial(_loss, vocab=151936),
    "loss, evaluation": _evaluation,
    "loss, evaluation, vocabulary 128256": partial(_evaluation, vocab=128256),
    "loss, fp32": partial(_loss, dtype=_FP32),
    "log-probabilities": _logprobs,
    "log-probabilities, vocabulary 128256": partial(_logprobs, vocab=128256),
    "loss, eighth of 32000": partial(_slice_of_logits, vocab=4000),
    "loss, eighth of 128256": partial(_slice_of_logits, vocab=16032),
    "adamw": partial(_adamw, gradient=_BF16, moments=_BF16),
    "adamw, fp32 gradient": partial(_adamw, gradient=_FP32, moments=_BF16),
    "adamw, fp32 moments": partial(_adamw, gradient=_BF16, moments=_FP32),
    "adamw, fp32 gradient and moments": partial(_adamw, gradient=_FP32, moments=_FP32),
    "adamw, step on the device": partial(_adamw, gradient=_BF16, moments=_BF16, on_device=True),
    "adamw, odd shard": partial(_adamw, gradient=_BF16, moments=_BF16, count=4095, offset=4097),
}

# Products in fp32 that are exact: tensor cores would round their factors.
EXACT = frozenset({"experts, fp32"})
