"""The router and the experts against their definitions on the device at hand, as bench/checks.py does for the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tokenmill.bench.checks import FLOOR, Function, Row, _error, _name, _precisions, _randn, compared, repeated
from tokenmill.bench.gpu import Place
from tokenmill.kernels import launch, swiglu
from tokenmill.kernels import moe as moe_kernels
from tokenmill.kernels.moe import grouped_gemm
from tokenmill.kernels.moe.permute import sort_choices, sort_reference
from tokenmill.kernels.moe.router import reference, route


def moe(place: Place) -> list[Row]:
    """Every backend of the experts inside the whole layer, one expert without a token; the layer is repeatable."""
    count, dim, hidden = (13, 8, 16) if place.small else (1021, 256, 512)
    inputs = [
        _randn(place, count, dim), _randn(place, count, 8),
        _randn(place, 8, 2 * hidden, dim, scale=dim**-0.5), _randn(place, 8, dim, hidden, scale=hidden**-0.5),
    ]  # fmt: skip
    chosen = torch.rand(count, 7, device=place.device).topk(2).indices  # of the first 7

    def naive(x: Tensor, logits: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        weights = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).gather(1, chosen)
        weights = torch.zeros_like(logits).scatter(1, chosen, (weights / weights.sum(-1, keepdim=True)).to(x.dtype))
        ys = [swiglu.reference(x @ up.T) @ down.T for up, down in zip(w_gate_up, w_down, strict=True)]
        return (torch.stack(ys, 1) * weights[..., None]).sum(1)

    rows = []
    for precision in _precisions(place):
        for name in ("triton", "grouped_mm", "reference"):

            def ours(*inputs: Tensor, name: str = name) -> Tensor:
                return moe_kernels.moe(*inputs, top_k=2, forced=chosen, backend=name)[0]

            rows.append(compared(f"moe {name}", precision, ours, naive, inputs))
            rows.append(repeated(f"moe {name}", precision, ours, inputs))
            if name == "triton":
                with _products_of_library():
                    rows.append(compared("moe triton, PyTorch's products", precision, ours, naive, inputs))
        rows.append(_added(place, precision))
    return rows


@contextlib.contextmanager
def _products_of_library() -> Iterator[None]:
    settings = launch.settings

    def turned(kernel: str, shape: Sequence[int], default: dict[str, Any]) -> dict[str, Any]:
        return settings(kernel, shape, default) | {key: True for key in default if key == "LIBRARY"}

    with mock.patch.object(launch, "settings", turned):
        yield


def _added(place: Place, precision: torch.dtype) -> Row:
    """Gradients of weights added to what is there."""
    count, n, k = (13, 8, 16) if place.small else (1021, 256, 512)
    a, b, before = _randn(place, count, n), _randn(place, count, k), _randn(place, 2, n, k)
    a, b, cut = a.to(precision), b.to(precision), count // 3
    total = before.clone()
    grouped_gemm.weight_gradient(a, b, torch.tensor([cut, count], dtype=torch.int32, device=place.device), total)
    parts = [a[:cut].double().T @ b[:cut].double(), a[cut:].double().T @ b[cut:].double()]
    error = _error(total, before.double() + torch.stack(parts))
    allowed = FLOOR[torch.float32]
    row = {"what": f"moe weight gradient added, {_name(precision)}", "held": error <= allowed}
    return row | {"error": error, "allowed": allowed}


def capturing(place: Place) -> list[Row]:
    """The layer, forward and backward, in a CUDA graph: replayed for other choices it gives what it gives without."""
    row: Row = {"what": "moe triton in a CUDA graph"}
    if place.device.type != "cuda":
        return [row | {"held": None, "reason": "not measured: there is no GPU"}]
    x, logits, dy = (_randn(place, 1021, width).bfloat16() for width in (256, 8, 256))
    weights = [_randn(place, 8, 1024, 256, scale=0.06).bfloat16(), _randn(place, 8, 256, 512, scale=0.04).bfloat16()]
    inputs = [tensor.requires_grad_() for tensor in (x, logits, *weights)]

    def run() -> list[Tensor]:
        y, _ = moe_kernels.moe(*inputs, top_k=2, backend="triton")
        return [y, *torch.autograd.grad(y, inputs, dy)]

    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):  # a graph is captured beside the default stream, of kernels that are compiled
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
    graph.replay()
    made = [tensor.detach().clone() for tensor in captured]
    return [row | {"held": all(torch.equal(a, b) for a, b in zip(made, run(), strict=True))}]


def routing(place: Place) -> list[Row]:
    """The router's choices, weights and sums, and the order of its choices, beside PyTorch's."""
    rows = []
    for count, experts, top_k in [(13, 4, 2)] if place.small else [(1021, 8, 2), (5001, 64, 8)]:
        logits, bias = _randn(place, count, experts), 0.1 * _randn(place, experts)
        real = torch.rand(count, device=place.device) < 0.9

        def run(choose: Function, logits: Tensor, top_k: int = top_k, bias: Tensor = bias, real: Tensor = real) -> Any:
            made = choose(logits, top_k, bias, None, real)
            return made.weights, made.probability_sums, made.lse_squared_sum

        def ours(logits: Tensor, top_k: int, bias: Tensor, forced: None, real: Tensor) -> Any:
            return route(logits, top_k, bias=bias, forced=forced, real_rows=real, backend="triton")

        made, known = (function(logits, top_k, bias, None, real) for function in (ours, reference))
        what = f"routing T {count} E {experts} top {top_k}"
        rows.append(compared(what, torch.float32, partial(run, ours), partial(run, reference), [logits]))
        rows.append({"what": f"{what}: choices", "held": torch.equal(made.experts, known.experts)})
        rows.append({"what": f"{what}: counts", "held": torch.equal(made.counts, known.counts)})
        order, truth = sort_choices(made, backend="triton"), sort_reference(made.experts, experts)
        same = all(torch.equal(x, y) for x, y in zip(order, truth, strict=True))
        rows.append({"what": f"{what}: order", "held": same})
    return rows
