"""How long each operation takes at Mistral's and Mixtral's shapes, beside what it has to be measured against.

Times are medians in milliseconds of variants that take turns in one run; before each turn the caches are overwritten,
so that inputs need not rotate, and the host has queued the whole of it before the device begins, so that gaps between
launches do not count. bf16 on a GPU; a rehearsal on a CPU runs the same lines at tiny shapes in fp32. Run by
`tokenmill.bench.gpu`: each public function takes a Place and returns rows. A row's key "target" says what the ratio
beside it is to be, and a peer's "difference" how far its results are from ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import quantiles
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.bench import peers
from tokenmill.bench.checks import _error, results
from tokenmill.bench.gpu import Place
from tokenmill.bench.peers import Peer, Peers
from tokenmill.kernels import attention as attention_kernels
from tokenmill.kernels import rms_norm as norms
from tokenmill.kernels.adamw import adamw_
from tokenmill.kernels.attention import attention as attend
from tokenmill.kernels.embedding import Noise, embed
from tokenmill.kernels.layout import Layout
from tokenmill.kernels.rotary import apply_rotary
from tokenmill.kernels.swiglu import swiglu
from tokenmill.trainer.model.config import attended_pairs

Row = dict[str, Any]
Variants = dict[str, Callable[[], Any]]

NOT_HERE = "not measured: the CPU's allocator does not say"
DIFFERENCE = 2e-2  # of a peer's result, relative, by norm: what bf16 makes of sums and factors


# ------------------------------------------------------------------------------------------------------------- timing


class Fresh(NamedTuple):
    """A run that is made anew each time; its making is not timed."""

    make: Callable[[], Callable[[], Any]]

    def __call__(self) -> Any:
        return self.make()()


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
    run = run.make() if isinstance(run, Fresh) else run
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


def _forward(peer: Peer) -> Callable[[], Any]:
    return Fresh(lambda: partial(peer.function, *_copies(peer))) if peer.overwrites else partial(peer[0], *peer.inputs)


def _backward(peer: Peer) -> Callable[[], Any]:
    def make() -> Callable[[], Any]:
        inputs = _copies(peer) if peer.overwrites else peer.inputs
        return _backward_of(peer.function(*inputs), inputs)

    return Fresh(make) if peer.overwrites else make()


def _copies(peer: Peer) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in peer.inputs]


def _backward_of(outputs: Tensor | Sequence[Tensor], inputs: Sequence[Tensor]) -> Callable[[], Any]:
    """The backward pass alone, again and again."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    upstream = [torch.randn_like(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)


def running(ours: Peer, others: Peers) -> tuple[Peers, dict[str, Row]]:
    """Those of `others` that run here, and for every one what its row says: how far its results are from ours (and its
    gradients, where they are of the same tensors), or why it is not measured.
    """
    dtype = ours.inputs[0].dtype
    expected = results(ours.function, ours.inputs, dtype)
    found, said = {}, {}
    for name, peer in others.items():
        try:
            made, mine = results(peer.function, peer.inputs, dtype), expected
            if len(peer.inputs) != len(ours.inputs):
                made, mine = made[: -len(peer.inputs)], mine[: -len(ours.inputs)]
            errors = [_error(a, b.double()) for a, b in zip(made, mine, strict=True)]
        except Exception as error:  # of any kind: what another project's code says here costs only its own timing
            reason = str(error).strip().partition("\n")[0][:200]
            said[name] = {"what": name, "ms": f"not measured: {type(error).__name__}: {reason}"}
            continue
        found[name], said[name] = peer, {"difference": max(errors)}
        if not all(error <= DIFFERENCE for error in errors):
            said[name]["note"] = "another result than ours"
    return found, said


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


def flex_attention(place: Place) -> list[Row]:
    """A sliding window over one document, in our attention and in FlexAttention."""
    count, window, heads, kv_heads, dim = (64, 16, 4, 2, 8) if place.small else (32768, 4096, 32, 8, 128)
    q = _randn(place, count, heads, dim)
    k, v = (_randn(place, count, kv_heads, dim) for _ in range(2))
    layout = Layout.from_lengths([count], device=place.device)
    name = attention_kernels.choose("auto", place.device, q.dtype, dim).name
    ours = Peer(lambda q, k, v: attend(q, k, v, layout, window, name), (q, k, v))
    found, said = running(ours, peers.attention(q, k, v, window, place.small))
    variants: Variants = {}
    for label, peer in {name: ours, **found}.items():
        variants |= {f"{label} forward": _forward(peer), f"{label} backward": _backward(peer)}
    rows = timed(place, variants, 8)
    for label, row in rows.items():
        products = 2 if label.endswith("forward") else 5
        row["TFLOP/s"] = 2 * products * heads * dim * attended_pairs(count, window) / row["ms"] / 1e9
        row |= said.get(label.rpartition(" ")[0], {})
    return [*rows.values(), *(row for row in said.values() if "ms" in row)]


def elementwise(place: Place) -> list[Row]:
    """Norms, SwiGLU and rotary positions, by the fewest bytes that they have to move, beside a copy."""
    count, dim, hidden, heads, head_dim = (16, 32, 48, 4, 8) if place.small else (8192, 4096, 14336, 32, 128)
    x, residual, weight = _randn(place, count, dim), _randn(place, count, dim), _randn(place, dim)
    gate_up = _randn(place, count, 2 * hidden)
    q, k = _randn(place, count, heads, head_dim), _randn(place, count, heads // 4, head_dim)
    layout = Layout.from_lengths([count], device=place.device)
    token, turned, small = x.nbytes, q.nbytes + k.nbytes, place.small
    cases: dict[str, tuple[Peer, Peers, int, int]] = {  # ours, others, bytes forward and backward
        "rms_norm": (
            Peer(lambda x, w: norms.rms_norm(x, w, 1e-5), (x, weight)),
            peers.rms_norm(x, weight, 1e-5, small), 2 * token, 3 * token,
        ),
        "add + rms_norm": (
            Peer(lambda x, w, r: norms.rms_norm(x, w, 1e-5, r), (x, weight, residual)),
            peers.add_rms_norm(x, weight, 1e-5, residual, small), 4 * token, 4 * token,
        ),
        "swiglu": (
            Peer(swiglu, (gate_up,)),
            peers.swiglu(gate_up, small), gate_up.nbytes * 3 // 2, gate_up.nbytes * 5 // 2,
        ),
        "rotary": (
            Peer(lambda q, k: apply_rotary(q, k, layout, 1e4), (q, k)),
            peers.rotary(q, k, layout.positions, 1e4, small), 2 * turned, 2 * turned,
        ),
    }  # fmt: skip
    source = gate_up.detach()
    target = torch.empty_like(source)
    moved = {"copy": 2 * source.nbytes}
    variants: Variants = {"copy": lambda: target.copy_(source)}
    notes: dict[str, Row] = {}
    lost: list[Row] = []
    for name, (ours, others, forward, backward) in cases.items():
        found, said = running(ours, others)
        for label, peer in {name: ours, **{f"{name} of {other}": peer for other, peer in found.items()}}.items():
            variants |= {f"{label} forward": _forward(peer), f"{label} backward": _backward(peer)}
            moved |= {f"{label} forward": forward, f"{label} backward": backward}
        for other, row in said.items():
            label = f"{name} of {other}"
            if other in found:
                notes |= {f"{label} forward": row, f"{label} backward": row}
            else:
                lost.append(row | {"what": label})
    rows = timed(place, variants, 8)
    for name, row in rows.items():
        row["GB/s"] = moved[name] / row["ms"] / 1e6
        row |= notes.get(name, {})
        if name.rpartition(" ")[0] in cases:
            _ratio(row, "of the copy", row["GB/s"] / rows["copy"]["GB/s"], ">= 0.80, 0.90")
    return [*rows.values(), *lost]


def embedding(place: Place) -> list[Row]:
    """The lookup with and without noise, and its gradient, beside torch's, over tokens as frequent as in a text."""
    count, dim, vocab = (32, 32, 100) if place.small else (8192, 4096, 32000)
    weight = _randn(place, vocab, dim)
    frequency = 1 / torch.arange(1, vocab + 1, device=place.device)
    tokens = frequency.multinomial(count, replacement=True).int()
    layout = Layout.from_lengths([count // 4] * 4, device=place.device)
    noise = Noise(5.0, 1, 2)
    ours = Peer(lambda w: embed(tokens, w), (weight,))
    scale = 5.0 / (count // 4 * dim) ** 0.5
    found, said = running(ours, peers.embedding(tokens, weight, scale, place.small))
    ways = {
        "F.embedding": Peer(lambda w: F.embedding(tokens, w), (weight,)),
        "embed": ours,
        "embed with noise": Peer(lambda w: embed(tokens, w, noise=noise, layout=layout), (weight,)),
        **found,
    }
    variants: Variants = {name: _forward(way) for name, way in ways.items()}
    rows = timed(place, variants | {f"{name} backward": _backward(way) for name, way in ways.items()})
    for name, run in variants.items():
        rows[name]["peak MiB"] = peak_memory(place, run)
    for name, row in said.items():
        rows[name] = rows.get(name, {}) | row
    noisy = rows["embed with noise"]
    _ratio(noisy, "of F.embedding", noisy["ms"] / rows["F.embedding"]["ms"], "<= 1.10, 1.05")
    backward = rows["embed backward"]
    _ratio(backward, "of F.embedding's", backward["ms"] / rows["F.embedding backward"]["ms"], "<= 1.0")
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
