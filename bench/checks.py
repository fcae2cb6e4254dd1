"""Every operation against its definition on the device at hand: values, gradients, bits, waiting, compiling.

A value is compared with the definition in fp64; it may be off by at most twice what plain PyTorch is in the same
precision, or by FLOOR. Memory that an operation allocates and does not write shows as NaN. Run by
`tokenmill.bench.gpu`: each public function takes a Place and returns rows.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill import _C
from tokenmill.bench.gpu import Place
from tokenmill.kernels import attention as attention_kernels
from tokenmill.kernels import moe as moe_kernels
from tokenmill.kernels import rms_norm as norms
from tokenmill.kernels import rotary, swiglu
from tokenmill.kernels.adamw import adamw_
from tokenmill.kernels.attention import attention as attend
from tokenmill.kernels.cross_entropy import linear_cross_entropy, token_logprobs
from tokenmill.kernels.cross_entropy import reference as naive_cross_entropy
from tokenmill.kernels.embedding import Noise, embed, neftune_uniform
from tokenmill.kernels.layout import IGNORE, KeyLayout, Layout

Row = dict[str, Any]
Function = Callable[..., Any]

FLOOR = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # relative, by norm
SEED, STEP = 2**40 + 12345, 2**33 + 7  # both halves of both matter
IDS = (7, 2**40 + 3, 0, 12)


# ---------------------------------------------------------------------------------------------------------- comparing


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory is allocated full of NaN (integers: of their largest)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that have no deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def results(function: Function, inputs: Sequence[Tensor], precision: torch.dtype, wide: bool = False) -> list[Tensor]:
    """The outputs of `function`, and the gradients of its inputs for an upstream gradient that is always the same.

    Inputs and upstream gradient are rounded to `precision`; `wide` then computes with those numbers in fp64.
    """
    dtype = torch.float64 if wide else precision
    leaves = [x.detach().to(precision).to(dtype, copy=True).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator(leaves[0].device).manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, device=y.device).to(precision).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, upstream)
    return [y.detach() for y in outputs] + [x.new_zeros(()) if x.grad is None else x.grad for x in leaves]


def compared(what: str, precision: torch.dtype, ours: Function, definition: Function, inputs: Sequence[Tensor]) -> Row:
    """The row of a check: of all outputs and gradients the one nearest to, or farthest beyond, what is allowed."""
    with poisoned():
        values = results(ours, inputs, precision)
    plain, exact = results(definition, inputs, precision), results(definition, inputs, precision, wide=True)
    errors = []
    for i, (value, same, truth) in enumerate(zip(values, plain, exact, strict=True)):
        error, allowed = _error(value, truth), max(FLOOR[precision], 2 * _error(same, truth))
        errors.append((math.inf if math.isnan(error) else error / allowed, error, allowed, i))
    share, error, allowed, tensor = max(errors)
    row = {"what": f"{what}, {_name(precision)}", "held": share <= 1, "error": error, "allowed": allowed}
    return row | {"tensor": tensor}


def repeated(what: str, precision: torch.dtype, function: Function, inputs: Sequence[Tensor]) -> Row:
    """The row of a check that 20 runs give the same bits; in a rehearsal 2, which is slow enough."""
    times = 2 if inputs[0].device.type == "cpu" else 20
    first, *others = (results(function, inputs, precision) for _ in range(times))
    same = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    return {"what": f"{what} {times} times, {_name(precision)}", "held": same}


def _error(value: Tensor, exact: Tensor) -> float:
    if value.shape != exact.shape:
        return math.nan
    return float((value.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _precisions(place: Place) -> list[torch.dtype]:
    return [torch.float32] if place.small else [torch.bfloat16, torch.float32]  # interpreted bf16 is not to be trusted


def _randn(place: Place, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=place.device) * scale


def _lengths(place: Place) -> list[int]:
    return [5, 1, 11, 7] if place.small else [300, 1, 513, 210]


def _layout(place: Place) -> Layout:
    return Layout.from_lengths(_lengths(place), IDS, place.device)


def _with_halo(layout: Layout, rows: int = 3) -> Layout:
    """Each document's keys are its own and up to `rows` before them."""
    bounds = layout.cu_seqlens.tolist()
    spans = [torch.arange(max(0, s - rows), e) for s, e in itertools.pairwise(bounds)]
    ends = torch.tensor([0, *map(len, spans)]).cumsum(0).int()
    device = layout.positions.device
    keys = KeyLayout(torch.cat(spans).to(device), ends.to(device), 2 * layout.max_seqlen)
    return Layout(
        layout.positions, layout.cu_seqlens, layout.max_seqlen, layout.document_ids, layout.document_lengths, keys
    )


# ----------------------------------------------------------------------------------------------------- one operation


def noise(place: Place) -> list[Row]:
    """NEFTune's bits against C++: the uniform numbers, and the sum with the weight in each precision."""
    rows, layout, lengths = [], _layout(place), _lengths(place)
    for dim in [20] if place.small else [20, 130, 4096]:
        parts = [_C.neftune_uniform(SEED, STEP, i, 0, n, dim) for i, n in zip(IDS, lengths, strict=True)]
        uniform = torch.from_numpy(np.concatenate(parts))
        seed, step = (torch.tensor(value, device=place.device) for value in (SEED, STEP))
        made = neftune_uniform(seed, step, layout.document_ids[layout.segment_ids], layout.positions, dim)
        rows.append({"what": f"uniform in torch, D {dim}", "held": _same_bits(made, uniform)})
        scales = torch.tensor([np.float32(5.0 / np.sqrt(np.float64(n) * dim)) for n in lengths])
        added = uniform * scales.repeat_interleave(torch.tensor(lengths))[:, None]
        for precision in _precisions(place):
            weight = _randn(place, 50, dim).to(precision)
            tokens = torch.randint(50, (sum(lengths),), dtype=torch.int32, device=place.device)
            with poisoned():
                out = embed(tokens, weight, noise=Noise(5.0, SEED, STEP), layout=layout, backend="triton")
            expected = (weight.cpu()[tokens.cpu().long()].float() + added).to(precision)
            held = _same_bits(out, expected)
            rows.append({"what": f"noisy rows in Triton, D {dim}, {_name(precision)}", "held": held})
    return rows


def _same_bits(a: Tensor, b: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.cpu().view(bits), b.cpu().view(bits))


def embedding(place: Place) -> list[Row]:
    """The lookup and its gradient, over tokens that are mostly one; the gradient is repeatable."""
    rows = []
    for count, vocab, dim in [(70, 11, 20)] if place.small else [(5001, 1003, 130), (8192, 32000, 4096)]:
        tokens = torch.randint(vocab, (count,), dtype=torch.int32, device=place.device)
        tokens[: count // 2] = 3
        ours, theirs = (lambda w, f=f, t=tokens: f(t, w) for f in (embed, F.embedding))
        for precision in _precisions(place):
            weight = [_randn(place, vocab, dim)]
            rows += [
                compared(f"embed T {count} D {dim}", precision, ours, theirs, weight),
                repeated(f"embed T {count} D {dim}", precision, ours, weight),
            ]
    return rows


def cross_entropy(place: Place) -> list[Row]:
    """The loss and the log-probabilities: a row held whole, a row read twice, several chunks, rows left out."""
    shapes = [(17, 20, 301)] if place.small else [(5001, 256, 1003), (515, 512, 32000), (129, 64, 40001)]
    return [row for shape in shapes for row in _cross_entropy(place, *shape)]


def _cross_entropy(place: Place, count: int, dim: int, vocab: int) -> list[Row]:
    targets = torch.randint(vocab, (count,), device=place.device)
    targets[::5] = IGNORE
    weights = torch.rand(count, device=place.device)
    kept = torch.randperm(count, device=place.device)[: count // 2].sort().values.int()
    masked = torch.full_like(targets, IGNORE)
    masked[kept] = targets[kept]

    def loss(h: Tensor, w: Tensor, rows: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(h, w, targets, token_weights=weights, rows=rows, z_loss=0.01).loss

    def naive_loss(h: Tensor, w: Tensor, targets: Tensor = targets) -> Tensor:
        return naive_cross_entropy(h, w, targets, weights.to(torch.promote_types(h.dtype, torch.float32)), 0.01).loss

    def naive_logprobs(h: Tensor, w: Tensor) -> Tensor:
        logits = (h @ w.T).to(torch.promote_types(h.dtype, torch.float32))
        return -F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")

    pairs = {
        "linear_cross_entropy": (loss, naive_loss),
        "half the rows of it": (lambda h, w: loss(h, w, kept), lambda h, w: naive_loss(h, w, masked)),
        "token_logprobs": (lambda h, w: token_logprobs(h, w, targets), naive_logprobs),
    }
    inputs = [_randn(place, count, dim), _randn(place, vocab, dim, scale=0.5)]
    return [
        compared(f"{name} T {count} D {dim} V {vocab}", precision, ours, naive, inputs)
        for precision in _precisions(place)
        for name, (ours, naive) in pairs.items()
    ]


def elementwise(place: Place) -> list[Row]:
    """RMSNorm, alone and after an addition, SwiGLU and rotary positions."""
    layout = _layout(place)
    count = layout.positions.numel()

    def add_norm(x: Tensor, w: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return norms.reference(x + residual, w, 1e-5), x + residual

    rows = []
    for dim in [20] if place.small else [20, 1000, 4096]:
        q, k = _randn(place, count, 4, dim), _randn(place, count, 2, dim)
        x, residual, weight = _randn(place, count, dim), _randn(place, count, dim), _randn(place, dim)
        cases: dict[str, tuple[Function, Function, list[Tensor]]] = {
            "rms_norm": (
                lambda x, w: norms.rms_norm(x, w, 1e-5),
                lambda x, w: norms.reference(x, w, 1e-5),
                [x, weight],
            ),
            "add + rms_norm": (lambda x, w, r: norms.rms_norm(x, w, 1e-5, r), add_norm, [x, weight, residual]),
            "swiglu": (swiglu.swiglu, swiglu.reference, [_randn(place, count, 2 * dim)]),
            "rotary": (
                lambda q, k: rotary.apply_rotary(q, k, layout, 1e4),
                lambda q, k: [rotary.reference(x, layout.positions, 1e4) for x in (q, k)],
                [q, k],
            ),
        }
        for precision in _precisions(place):
            rows += [compared(f"{name} D {dim}", precision, *case) for name, case in cases.items()]
    return rows


def optimizer(place: Place) -> list[Row]:
    """AdamW in Triton here and in torch on the CPU: the same bits, rounded stochastically or not."""
    rows = []
    for precision in _precisions(place):
        count = 1025 if place.small else 1_000_003
        state = [_randn(place, count).to(precision) for _ in range(4)]
        state[3].abs_()
        options: dict[str, Any] = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
        options |= dict(step=3, seed=SEED, tensor_id=5, offset=7)
        expected = [x.cpu().clone() for x in state]  # on a CPU, `cpu` alone would be the same memory
        adamw_(*state, **options, backend="triton")
        adamw_(*expected, **options, backend="torch")
        held = all(_same_bits(a, b) for a, b in zip(state, expected, strict=True))
        rows.append({"what": f"adamw, {_name(precision)}", "held": held})
    return rows


def attention(place: Place) -> list[Row]:
    """Every backend that runs here, with and without a window, with shared key heads and with keys of its own."""
    rows, layout = [], _layout(place)
    dim, count = (8, 24) if place.small else (128, 1024)
    inputs = [_randn(place, count, heads, dim) for heads in (8, 2, 2)]
    layouts = {"": layout, " with a halo": _with_halo(layout)}
    for precision in _precisions(place):
        for name in ("flash", "sdpa", "reference"):
            try:
                backend = attention_kernels.choose(name, place.device, precision, dim)
            except ValueError as reason:
                rows.append({"what": f"attention {name}, {_name(precision)}", "held": None, "reason": str(reason)})
                continue
            for kind, where in layouts.items():
                for window in (None, 4 if place.small else 100):

                    def ours(q: Tensor, k: Tensor, v: Tensor, where=where, window=window, backend=backend) -> Tensor:
                        return attend(q, k, v, where, window, backend)

                    def naive(q: Tensor, k: Tensor, v: Tensor, where=where, window=window) -> Tensor:
                        return _naive_attention(q, k, v, where, window)

                    what = f"attention {name} window {window}{kind}"
                    rows.append(compared(what, precision, ours, naive, inputs))
    return rows


def _naive_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> Tensor:
    """One mask over all queries and keys, everything in the inputs' dtype."""
    queries = torch.arange(q.shape[0], device=q.device)
    keys, bounds = queries, layout.cu_seqlens
    if layout.keys is not None:
        keys, bounds = layout.keys.gather, layout.keys.cu_seqlens
    segments = torch.repeat_interleave(bounds.diff())  # of the keys
    before = queries[:, None] - keys
    visible = (segments == layout.segment_ids[:, None]) & (before >= 0) & (before < (window or len(queries)))
    k, v = (x[keys].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


# ------------------------------------------------------------------------------------------- what all have in common


def _operations(place: Place, precision: torch.dtype) -> dict[str, tuple[Function, list[Tensor]]]:
    """Those that promise not to wait for the device and to compile whole, with inputs; attention where it does."""
    layout = _layout(place)
    count, dim, vocab = layout.positions.numel(), 64, 1000
    tokens = torch.randint(vocab, (count,), dtype=torch.int32, device=place.device)
    targets, rows = tokens.long(), torch.arange(0, count, 2, dtype=torch.int32, device=place.device)
    chosen = torch.rand(count, 4, device=place.device).topk(2).indices
    x, weight = _randn(place, count, dim), _randn(place, vocab, dim)
    experts = [_randn(place, count, 4), _randn(place, 4, 2 * dim, dim), _randn(place, 4, dim, dim)]
    heads = [_randn(place, count, h, dim) for h in (4, 2, 2)]
    cases: dict[str, tuple[Function, list[Tensor]]] = {
        "embed": (lambda w: embed(tokens, w, noise=Noise(5.0, SEED, STEP), layout=layout), [weight]),
        "linear_cross_entropy": (lambda h, w: linear_cross_entropy(h, w, targets, rows=rows).loss, [x, weight]),
        "token_logprobs": (lambda h, w: token_logprobs(h, w, targets, rows=rows), [x, weight]),
        "rms_norm": (lambda x, w, r: norms.rms_norm(x, w, 1e-5, r), [x, _randn(place, dim), x]),
        "swiglu": (swiglu.swiglu, [x]),
        "rotary": (lambda q, k: rotary.apply_rotary(q, k, layout, 1e4), heads[:2]),
        "moe triton": (lambda *a: moe_kernels.moe(*a, top_k=2, forced=chosen, backend="triton")[0], [x, *experts]),
        # In bf16, the only precision in which the compiler takes a grouped product.
        "moe grouped_mm": (
            lambda *a: moe_kernels.moe(*(x.bfloat16() for x in a), top_k=2, forced=chosen, backend="grouped_mm")[0],
            [x, *experts],
        ),
    }
    if attention_kernels.flash.supports(place.device, precision, dim) is None:
        cases["attention"] = (lambda q, k, v: attend(q, k, v, layout, 100), heads)
    return cases


def waiting(place: Place) -> list[Row]:
    """No operation waits for the device, forward or backward, once its kernels are compiled."""
    rows, precision = [], _precisions(place)[0]
    fresh = _operations(place, precision)  # with a layout that nothing has been derived from
    for name, (function, inputs) in _operations(place, precision).items():
        _backward(function, [x.to(precision).requires_grad_() for x in inputs])
        function, leaves = fresh[name][0], [x.to(precision).requires_grad_() for x in fresh[name][1]]
        row: Row = {"what": f"{name} never waits"}
        try:
            if place.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
                row["held"] = True
            else:
                row |= {"held": None, "reason": "not measured: there is no device to wait for"}
            _backward(function, leaves)
        except RuntimeError as error:
            row |= {"held": False, "reason": str(error).partition("\n")[0]}
        finally:
            if place.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        rows.append(row)
    return rows


def _backward(function: Function, leaves: Sequence[Tensor]) -> None:
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def compiling(place: Place) -> list[Row]:
    """torch.compile(fullgraph=True) takes each operation, and gives what it gives without."""
    return [
        _compiled(place, f"{name} compiled, {_name(precision)}", precision, function, inputs)
        for precision in _precisions(place)
        for name, (function, inputs) in _operations(place, precision).items()
    ]


def _compiled(place: Place, what: str, precision: torch.dtype, function: Function, inputs: list[Tensor]) -> Row:
    whole = torch.compile(function, fullgraph=True, backend="aot_eager" if place.small else "inductor")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = results(whole, inputs, precision)
        errors = [_error(a, b.double()) for a, b in zip(values, results(function, inputs, precision), strict=True)]
    except Exception as error:  # the compiler's are of many kinds, and one must not hide the others
        return {"what": what, "held": False, "reason": f"{type(error).__name__}: {error}"[:500]}
    return {"what": what, "held": all(e <= 2 * FLOOR[precision] for e in errors), "errors": errors}
