"""How long Mixtral's layer of experts takes under every routing, beside other backends, projects and bare products.

`tokenmill bench moe` measures two lengths under uniform and Zipf's routing, and with all tokens on the same experts, on
every backend that runs here, Hugging Face's experts and ScatterMoE (where it is installed) with the same weights and
choices. `moe` alone, ours against the design's targets, is a part of `tokenmill bench ops` and `tokenmill bench gpu`.
On a CPU, whole training steps of a tiny Mixtral beside Hugging Face's are what `tokenmill bench step` measures.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tokenmill.bench.gpu import Place
from tokenmill.bench.ops import NOT_HERE, Row, Variants, _randn, _ratio, peak_memory, timed
from tokenmill.kernels import moe as moe_kernels

TOP_K = 2


class Layer:
    """The tensors of one layer, choices by kind of routing, and the ways to compute it from them."""

    def __init__(self, place: Place, tokens: int) -> None:
        self.dim, self.hidden, self.experts = (8, 16, 4) if place.small else (4096, 14336, 8)
        self.tokens = 16 if place.small else tokens
        self.x, self.logits = _randn(place, self.tokens, self.dim), _randn(place, self.tokens, self.experts)
        self.w_gate_up = _randn(place, self.experts, 2 * self.hidden, self.dim)
        self.w_down = _randn(place, self.experts, self.dim, self.hidden)
        with torch.no_grad():
            self.w_gate_up.mul_(self.dim**-0.5)
            self.w_down.mul_(self.hidden**-0.5)
        self.dy = torch.randn_like(self.x)
        zipf = 1 / torch.arange(1, self.experts + 1, device=place.device)
        self.choices = {
            "uniform": torch.rand(self.tokens, self.experts, device=place.device).topk(TOP_K).indices,
            "Zipf": zipf.expand(self.tokens, self.experts).multinomial(TOP_K),
            "all to the same": torch.arange(TOP_K, device=place.device).repeat(self.tokens, 1),
        }

    def forward(self, backend: str, chosen: Tensor) -> Tensor:
        weights = self.w_gate_up, self.w_down
        return moe_kernels.moe(self.x, self.logits, *weights, TOP_K, forced=chosen, backend=backend)[0]

    def backward(self, y: Tensor) -> None:
        torch.autograd.grad(y, [self.x, self.logits, self.w_gate_up, self.w_down], self.dy)

    def step(self, forward: Callable[[Tensor], Tensor], chosen: Tensor) -> None:
        self.backward(forward(chosen))

    def tflops(self, ms: float, products: int) -> float:
        """Of so many products with one of the three matrices of an expert: 3 forward, 6 backward."""
        return 2 * products * TOP_K * self.tokens * self.dim * self.hidden / ms / 1e9

    def backends(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Ours, by name; "reference" is a loop of cuBLAS products."""
        names = ["triton", "grouped_mm", "reference"]
        if moe_kernels.megablocks.supports(self.x.device, self.x.dtype) is None:
            names.append("megablocks")
        labelled = (str(moe_kernels.choose(name, self.x.device, self.x.dtype)) for name in names)  # with whose products
        return {label: partial(self.forward, name) for label, name in zip(labelled, names, strict=True)}

    def peers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Other projects' experts with our weights, behind our router."""

        def routed(experts: torch.nn.Module, names: tuple[str, str], index_first: bool, chosen: Tensor) -> Tensor:
            routing = moe_kernels.route(self.logits, TOP_K, forced=chosen)
            weights = routing.weights.to(self.x.dtype)
            arguments = (routing.experts, weights) if index_first else (weights, routing.experts)
            parameters = dict(zip(names, (self.w_gate_up, self.w_down), strict=True))
            return functional_call(experts, parameters, (self.x, *arguments))

        found: dict[str, Callable[[Tensor], Tensor]] = {}
        if importlib.util.find_spec("transformers") is not None:
            package: Any = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
            for way in ("eager", "grouped_mm"):
                config = package.MixtralConfig(
                    hidden_size=self.dim, intermediate_size=self.hidden, num_local_experts=self.experts
                )
                config._experts_implementation = way
                with torch.device("meta"):
                    experts = package.MixtralExperts(config)
                found[f"HF {way}"] = partial(routed, experts, ("gate_up_proj", "down_proj"), True)
        if importlib.util.find_spec("scattermoe") is not None:
            package = importlib.import_module("scattermoe.mlp")
            with torch.device("meta"):
                experts = package.GLUMLP(self.dim, self.hidden, self.experts, TOP_K, activation=torch.nn.SiLU())
            # It takes gate and up in the other order, which is all the same to time.
            found["ScatterMoE"] = partial(routed, experts, ("experts.weight", "output_experts.weight"), False)
        return found

    def dense(self, place: Place) -> Callable[[], None]:
        """The products alone, each as one over all rows."""
        up, down = self.w_gate_up.detach()[0], self.w_down.detach()[0]
        sizes = (self.dim, 2 * self.hidden, self.hidden)
        xs, wide, narrow = (_randn(place, TOP_K * self.tokens, size, grad=False) for size in sizes)

        def run() -> None:
            for a, b in ((xs, up.T), (narrow, down.T), (xs, down), (xs.T, narrow), (wide, up), (wide.T, xs)):
                torch.mm(a, b)

        return run


def moe(place: Place) -> list[Row]:
    """Forward and backward on our backends at 8192 tokens, beside the same operations in plain dense products."""
    layer = Layer(place, 8192)
    backends = layer.backends()
    kinds = {kind: layer.choices[kind] for kind in ("uniform", "Zipf")}
    variants: Variants = {"dense products": layer.dense(place)}
    for name, forward in backends.items():
        variants |= {f"{name}, {kind}": partial(layer.step, forward, chosen) for kind, chosen in kinds.items()}
    rows = timed(place, variants, 10)
    for row in rows.values():
        row["TFLOP/s"] = layer.tflops(row["ms"], 9)
    for kind, chosen in kinds.items():
        row = rows[f"triton, {kind}"]
        row["of the best other"] = row["ms"] / min(rows[f"{o}, {kind}"]["ms"] for o in backends if o != "triton")
        _ratio(row, "of dense", rows["dense products"]["ms"] / row["ms"], "<= 1.0; >= 0.85; <= 973 MiB saved")
        row["saved MiB"] = _saved(place, partial(layer.forward, "triton", chosen))
        row["peak MiB"] = peak_memory(place, partial(layer.step, backends["triton"], chosen))
    return list(rows.values())


def _saved(place: Place, forward: Callable[[], Tensor]) -> float | str:
    """MiB that a forward pass keeps for its backward, its output left out."""
    if place.device.type != "cuda":
        return NOT_HERE
    before = torch.cuda.memory_allocated()
    out = forward()
    return (torch.cuda.memory_allocated() - before - out.nbytes) / 2**20


def tokens_8192(place: Place) -> list[Row]:
    return _all(place, 8192)


def tokens_32768(place: Place) -> list[Row]:
    return _all(place, 32768)


def _all(place: Place, tokens: int) -> list[Row]:
    """Every way to compute the layer under every routing, forward alone and with the backward pass."""
    layer = Layer(place, tokens)
    (dense,) = timed(place, {"dense products": layer.dense(place)}).values()
    rows = [dense | {"TFLOP/s": layer.tflops(dense["ms"], 9)}]
    for kind, chosen in layer.choices.items():
        ways = layer.backends() | layer.peers()
        why_not = {name: _failure(partial(layer.step, way, chosen)) for name, way in ways.items()}
        rows += [{"what": f"{name}, {kind}", "ms": f"not measured: {why}"} for name, why in why_not.items() if why]
        fitting = {name: way for name, way in ways.items() if not why_not[name]}
        variants: Variants = {}
        for name, forward in fitting.items():
            variants |= {name: partial(forward, chosen), f"{name} both": partial(layer.step, forward, chosen)}
        times = timed(place, variants, 10)
        for name in fitting:
            forward, both = times[name], times[f"{name} both"]
            rows.append(forward | {"what": f"{name}, {kind}, forward", "TFLOP/s": layer.tflops(forward["ms"], 3)})
            both |= {"what": f"{name}, {kind}", "TFLOP/s": layer.tflops(both["ms"], 9)}
            rows.append(both | {"backward TFLOP/s": layer.tflops(both["ms"] - forward["ms"], 6)})
    return rows


def _failure(run: Callable[[], Any]) -> str:
    """Why it does not run: a peer's error costs the others nothing. Empty where it does."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""
