"""How long each operation takes at Mistral's and Mixtral's shapes, beside what it has to be measured against.

Times are medians in milliseconds of variants that take turns in one run; before each turn the caches are overwritten,
so that inputs need not rotate, and the host has queued the whole of it before the device begins, so that gaps between
launches do not count. bf16 on a GPU; a rehearsal on a CPU runs the same lines at tiny shapes in fp32. Run by
`tokenmill.bench.gpu`: each public function takes a Place and returns rows. A row's key "target" says what the ratio
beside it is to be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.bench import peers
from tokenmill.bench.gpu import Place
from tokenmill.kernels import attention as attention_kernels
from tokenmill.kernels import moe as moe_kernels
from tokenmill.kernels import rms_norm as norms
from tokenmill.kernels.adamw import adamw_
from tokenmill.kernels.attention import attention as attend
from tokenmill.kernels.cross_entropy import linear_cross_entropy
from tokenmill.kernels.embedding import Noise, embed
from tokenmill.kernels.layout import Layout
from tokenmill.kernels.moe import megablocks
from tokenmill.kernels.rotary import apply_rotary
from tokenmill.kernels.swiglu import swiglu
from tokenmill.trainer.model.config import attended_pairs

Row = dict[str, Any]
Variants = dict[str, Callable[[], Any]]

NOT_HERE = "not measured: the CPU's allocator does not say"


# ------------------------------------------------------------------------------------------------------------- timing


def timed(place: Place, variants: Variants, seconds: float = 4.0) -> dict[str, Row]:
    """A row for each variant: `ms`, the median, `spread`, the share of it between the quartiles, and `runs`."""
    once = {name: _once(place, run) for name, run in variants.items()}  # compiles
    once = {name: _once(place, run) for name, run in variants.items()}
    runs = max(3, min(50, int(seconds * 1e3 / sum(ms + 1 for ms in once.values()))))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(3 if place.small else runs):
        for name, run in variants.items():
            times[name].append(_once(place, run))
    rows = {}
    for name, values in times.items():
        low, middle, high = quantiles(values, n=4)
        rows[name] = {"what": name, "ms": middle, "spread": (high - low) / middle, "runs": len(values)}
    return rows


def _once(place: Place, run: Callable[[], Any]) -> float:
    """Milliseconds of one run, from cold caches."""
    if place.device.type == "cpu":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(256 << 20, dtype=torch.int8, device=place.device).zero_()  # several times the L2 cache
    torch.cuda._sleep(4_000_000)  # about 2 ms, in which the host runs ahead
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_memory(place: Place, run: Callable[[], Any]) -> float | str:
    """MiB that `run` needs at its peak beyond what is there before it."""
    if place.device.type != "cuda":
        run()
        return NOT_HERE
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _backward_of(outputs: Tensor | tuple[Tensor, ...], inputs: list[Tensor]) -> Callable[[], Any]:
    """The backward pass alone, again and again."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    upstream = [torch.randn_like(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)


def _randn(place: Place, *shape: int, grad: bool = True) -> Tensor:
    dtype = torch.float32 if place.small else torch.bfloat16
    return torch.randn(shape, device=place.device, dtype=dtype).requires_grad_(grad)


def _ratio(row: Row, key: str, value: float | str, target: str) -> None:
    row |= {key: value, "target": target}


# ---------------------------------------------------------------------------------------------------------- the parts


def ceilings(place: Place) -> list[Row]:
    """What this device does at its best: a copy and a large matrix product."""
    size = 64 if place.small else 8192
    a, b = (_randn(place, size, size, grad=False) for _ in range(2))
    source = _randn(place, 1 << 10 if place.small else 1 << 29, grad=False)
    target = torch.empty_like(source)
    rows = timed(place, {"copy": lambda: target.copy_(source), f"product {size}^3": lambda: a @ b})
    copy, product = rows.values()
    copy["GB/s"] = 2 * source.nbytes / copy["ms"] / 1e6
    product["TFLOP/s"] = 2 * size**3 / product["ms"] / 1e9
    return [copy, product]


def cross_entropy(place: Place) -> list[Row]:
    """The loss of the head, forward and backward, beside its three bare products."""
    count, dim, vocab = (16, 32, 100) if place.small else (8192, 4096, 32000)
    hidden, weight = _randn(place, count, dim), _randn(place, vocab, dim)
    weight.grad_dtype = torch.float32  # as the loss sums it; else autograd would round it once more
    targets = torch.randint(vocab, (count,), device=place.device)
    half = torch.randperm(count, device=place.device)[: count // 2].sort().values.int()
    h, w = hidden.detach(), weight.detach()
    logits = h @ w.T

    def products() -> None:
        torch.mm(h, w.T, out=logits)
        torch.mm(logits, w)
        torch.mm(logits.T, h)

    def backward(loss: Tensor) -> None:
        hidden.grad = weight.grad = None
        loss.backward()

    def ours(rows: Tensor | None = None) -> None:
        backward(linear_cross_entropy(hidden, weight, targets, rows=rows).loss)

    def naive() -> None:
        backward(F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum"))

    def without_gradients() -> None:
        linear_cross_entropy(h, w, targets)

    def theirs(loss: Callable[[], Tensor]) -> None:
        backward(loss())

    variants: Variants = {
        "three bare products": products,
        "linear_cross_entropy": ours,
        "half the rows": partial(ours, half),
        "naive": naive,
        "loss alone": without_gradients,
    }
    others = peers.cross_entropy(hidden, weight, targets, place.small)
    variants |= {name: partial(theirs, loss) for name, loss in others.items()}
    rows = timed(place, variants, 8)
    for name, run in variants.items():
        hidden.grad = weight.grad = None
        rows[name]["peak MiB"] = peak_memory(place, run)
    whole = rows["linear_cross_entropy"]
    if not isinstance(whole["peak MiB"], str):
        whole["MiB beyond gradients"] = whole["peak MiB"] - (hidden.nbytes + 4 * weight.numel()) / 2**20
    _ratio(whole, "of the products", whole["ms"] / rows["three bare products"]["ms"], "<= 1.25, 1.12; <= 512 MiB")
    _ratio(rows["half the rows"], "of the whole", rows["half the rows"]["ms"] / whole["ms"], "<= 0.60")
    return list(rows.values())


def attention(place: Place) -> list[Row]:
    """A sliding window beside full causal attention of the same backend, and documents packed together."""
    count, window, heads, kv_heads, dim = (64, 16, 4, 2, 8) if place.small else (32768, 4096, 32, 8, 128)
    q = _randn(place, count, heads, dim)
    k, v = (_randn(place, count, kv_heads, dim) for _ in range(2))
    lengths, left = [], count
    for length in torch.randn(count).mul(1.2).add(6.5).exp().long().clamp_min(1).tolist():  # of texts: log-normal
        lengths.append(min(length, left))
        left -= lengths[-1]
        if not left:
            break
    one, packed = (Layout.from_lengths(sizes, device=place.device) for sizes in ([count], lengths))
    name = attention_kernels.choose("auto", place.device, q.dtype, dim).name
    rows = []
    cases = {"full causal": (one, None), "window": (one, window), f"{len(lengths)} documents": (packed, window)}
    rates: dict[str, float] = {}
    for direction, products in (("forward", 2), ("backward", 5)):
        variants: Variants = {}
        for case, (layout, bound) in cases.items():
            run = partial(attend, q, k, v, layout, bound, name)
            variants[case] = run if direction == "forward" else _backward_of(run(), [q, k, v])
        for case, row in timed(place, variants).items():
            layout, bound = cases[case]
            pairs = sum(attended_pairs(n, bound) for n in layout.document_lengths.tolist())
            rates[case] = row["TFLOP/s"] = 2 * products * heads * dim * pairs / row["ms"] / 1e9
            row["what"] = f"{name} {direction}, {case}"
            if case == "window":
                _ratio(row, "of full causal", rates[case] / rates["full causal"], ">= 0.80, 0.90")
            rows.append(row)
    return rows


def moe(place: Place) -> list[Row]:
    """The experts' layer, forward and backward, beside the same operations in plain dense products."""
    count, dim, hidden, experts, top_k = (16, 8, 16, 4, 2) if place.small else (8192, 4096, 14336, 8, 2)
    x, logits = _randn(place, count, dim), _randn(place, count, experts)
    w_gate_up, w_down = _randn(place, experts, 2 * hidden, dim), _randn(place, experts, dim, hidden)
    with torch.no_grad():
        w_gate_up.mul_(dim**-0.5)
        w_down.mul_(hidden**-0.5)
    dy = torch.randn_like(x)
    leaves = [x, logits, w_gate_up, w_down]
    zipf = 1 / torch.arange(1, experts + 1, device=place.device)
    choices = {
        "uniform": torch.rand(count, experts, device=place.device).topk(top_k).indices,
        "Zipf": zipf.expand(count, experts).multinomial(top_k),
    }

    def layer(name: str, chosen: Tensor) -> Tensor:
        return moe_kernels.moe(x, logits, w_gate_up, w_down, top_k, forced=chosen, backend=name)[0]

    def step(name: str, chosen: Tensor) -> None:
        torch.autograd.grad(layer(name, chosen), leaves, dy)

    up, down = w_gate_up.detach()[0], w_down.detach()[0]
    xs, wide, narrow = (_randn(place, top_k * count, size, grad=False) for size in (dim, 2 * hidden, hidden))

    def dense() -> None:
        for a, b in ((xs, up.T), (narrow, down.T), (xs, down), (xs.T, narrow), (wide, up), (wide.T, xs)):
            torch.mm(a, b)

    variants: Variants = {"dense products": dense}
    others = ["grouped_mm", "reference"]  # the latter is a loop of cuBLAS products
    if megablocks.supports(place.device, x.dtype) is None:
        others.append("megablocks")
    for backend in ("triton", *others):
        variants |= {f"{backend}, {kind}": partial(step, backend, chosen) for kind, chosen in choices.items()}
    rows = timed(place, variants, 10)
    for row in rows.values():
        row["TFLOP/s"] = 18 * top_k * count * dim * hidden / row["ms"] / 1e9
    for kind, chosen in choices.items():
        row = rows[f"triton, {kind}"]
        row["of the best other"] = row["ms"] / min(rows[f"{other}, {kind}"]["ms"] for other in others)
        _ratio(row, "of dense", rows["dense products"]["ms"] / row["ms"], "<= 1.0; >= 0.85; <= 973 MiB saved")
        row["saved MiB"] = _saved(place, partial(layer, "triton", chosen))
        row["peak MiB"] = peak_memory(place, partial(step, "triton", chosen))
    return list(rows.values())


def _saved(place: Place, forward: Callable[[], Tensor]) -> float | str:
    """MiB that a forward pass keeps for its backward, its output left out."""
    if place.device.type != "cuda":
        return NOT_HERE
    before = torch.cuda.memory_allocated()
    out = forward()
    return (torch.cuda.memory_allocated() - before - out.nbytes) / 2**20


def elementwise(place: Place) -> list[Row]:
    """Norms, SwiGLU and rotary positions, by the fewest bytes that they have to move, beside a copy."""
    count, dim, hidden, heads, head_dim = (16, 32, 48, 4, 8) if place.small else (8192, 4096, 14336, 32, 128)
    x, residual, weight = _randn(place, count, dim), _randn(place, count, dim), _randn(place, dim)
    gate_up = _randn(place, count, 2 * hidden)
    q, k = _randn(place, count, heads, head_dim), _randn(place, count, heads // 4, head_dim)
    layout = Layout.from_lengths([count], device=place.device)
    token, turned, small = x.nbytes, q.nbytes + k.nbytes, place.small
    cases: list[tuple[str, Callable[[], Any], peers.Peers, list[Tensor], int, int]] = [  # bytes forward, backward
        (
            "rms_norm", lambda: norms.rms_norm(x, weight, 1e-5), peers.rms_norm(x, weight, 1e-5, small),
            [x, weight], 2 * token, 3 * token,
        ),
        (
            "add + rms_norm", lambda: norms.rms_norm(x, weight, 1e-5, residual),
            peers.add_rms_norm(x, weight, 1e-5, residual, small), [x, weight, residual], 4 * token, 4 * token,
        ),
        (
            "swiglu", lambda: swiglu(gate_up), peers.swiglu(gate_up, small),
            [gate_up], gate_up.nbytes * 3 // 2, gate_up.nbytes * 5 // 2,
        ),
        (
            "rotary", lambda: apply_rotary(q, k, layout, 1e4), peers.rotary(q, k, layout.positions, 1e4, small),
            [q, k], 2 * turned, 2 * turned,
        ),
    ]  # fmt: skip
    source = gate_up.detach()
    target = torch.empty_like(source)
    moved = {"copy": 2 * source.nbytes}
    variants: Variants = {"copy": lambda: target.copy_(source)}
    ours = set()
    for name, run, others, inputs, forward, backward in cases:
        ours |= {f"{name} forward", f"{name} backward"}
        for label, call in {name: run, **{f"{name} of {peer}": call for peer, call in others.items()}}.items():
            variants |= {f"{label} forward": call, f"{label} backward": _backward_of(call(), inputs)}
            moved |= {f"{label} forward": forward, f"{label} backward": backward}
    rows = timed(place, variants, 8)
    for name, row in rows.items():
        row["GB/s"] = moved[name] / row["ms"] / 1e6
        if name in ours:
            _ratio(row, "of the copy", row["GB/s"] / rows["copy"]["GB/s"], ">= 0.80, 0.90")
    return list(rows.values())


def embedding(place: Place) -> list[Row]:
    """The lookup with and without noise, and its gradient, beside torch's, over tokens as frequent as in a text."""
    count, dim, vocab = (32, 32, 100) if place.small else (8192, 4096, 32000)
    weight = _randn(place, vocab, dim)
    frequency = 1 / torch.arange(1, vocab + 1, device=place.device)
    tokens = frequency.multinomial(count, replacement=True).int()
    layout = Layout.from_lengths([count // 4] * 4, device=place.device)
    noise = Noise(5.0, 1, 2)
    variants: Variants = {
        "F.embedding": lambda: F.embedding(tokens, weight),
        "embed": lambda: embed(tokens, weight),
        "embed with noise": lambda: embed(tokens, weight, noise=noise, layout=layout),
    }
    gradients = {f"{name} backward": _backward_of(run(), [weight]) for name, run in variants.items()}
    rows = timed(place, variants | gradients)
    for name, run in variants.items():
        rows[name]["peak MiB"] = peak_memory(place, run)
    noisy = rows["embed with noise"]
    _ratio(noisy, "of F.embedding", noisy["ms"] / rows["F.embedding"]["ms"], "<= 1.10, 1.05")
    ours = rows["embed backward"]
    _ratio(ours, "of F.embedding's", ours["ms"] / rows["F.embedding backward"]["ms"], "<= 1.0")
    return list(rows.values())


def optimizer(place: Place) -> list[Row]:
    """AdamW on a bf16 parameter with stochastic rounding, beside a copy and torch's fused AdamW without it."""
    count = 1 << (12 if place.small else 28)
    parameter, gradient, exp_avg, exp_avg_sq = (_randn(place, count, grad=False) for _ in range(4))
    exp_avg_sq.abs_()
    theirs = gradient.clone().requires_grad_()
    theirs.grad = gradient
    fused = torch.optim.AdamW([theirs], fused=True)
    options: dict[str, Any] = dict(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    options |= dict(step=2, seed=1, tensor_id=0)
    target = torch.empty_like(gradient)
    variants: Variants = {
        "copy": lambda: target.copy_(gradient),
        "adamw": lambda: adamw_(parameter, gradient, exp_avg, exp_avg_sq, **options),
        "torch's fused AdamW": fused.step,
    }
    rows = timed(place, variants)
    for name, row in rows.items():  # parameter and moments are read and written, the gradient is read
        row["GB/s"] = (2 if name == "copy" else 7) * gradient.nbytes / row["ms"] / 1e6
    rows["adamw"]["of the copy"] = rows["adamw"]["GB/s"] / rows["copy"]["GB/s"]
    return list(rows.values())
