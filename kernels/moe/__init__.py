"""A mixture of experts: route, permute, experts, combine, and the four in one where nothing has to come between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenmill.kernels.moe import fused, grouped_mm, megablocks, reference
from tokenmill.kernels.moe.permute import Permuted, combine, permute
from tokenmill.kernels.moe.router import Routing, hf_load_balancing_loss, route

__all__ = [
    "Backend",
    "Permuted",
    "Routing",
    "choose",
    "combine",
    "experts",
    "hf_load_balancing_loss",
    "moe",
    "permute",
    "route",
]

_BACKENDS: dict[str, Any] = {
    "triton": fused, "megablocks": megablocks, "grouped_mm": grouped_mm, "reference": reference,
}  # fmt: skip


class Backend(NamedTuple):
    """One way to compute `experts`: called as `backend.experts(xs, offsets, w_gate_up, w_down)`.

    `layer(x, routing, w_gate_up, w_down)`, where there is one, also permutes and combines. `linear(xs, w, offsets)` is
    one product alone, w (E, N, K), for what adds something to it.
    """

    name: str
    experts: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    layer: Callable[[Tensor, Routing, Tensor, Tensor], Tensor] | None = None
    linear: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __str__(self) -> str:
        return megablocks.source() if self.name == "megablocks" else self.name


def choose(name: str, device: torch.device | str, dtype: torch.dtype) -> Backend:
    """The backend called `name`, or under "auto" the best for the device.

    On a GPU that is "grouped_mm", until "triton" has been measured there. On a CPU it is the loop, for any shape and
    dtype: it took 0.8 to 0.9 times as long as the grouped product with 4 or 8 experts, 1.6 times with 60 small ones.
    Raises ValueError where the name is unknown, or the backend cannot run there: the message says why.
    """
    device = torch.device(device)
    if name == "auto":
        fits = device.type == "cuda" and grouped_mm.supports(device, dtype) is None
        name = "grouped_mm" if fits else "reference"
    if name not in _BACKENDS:
        raise ValueError(f'moe = "{name}" is unknown: expected one of auto, {", ".join(_BACKENDS)}')
    reason = _BACKENDS[name].supports(device, dtype)
    if reason is not None:
        raise ValueError(f'moe = "{name}" cannot run here: {reason}; choose another or "auto"')
    module = _BACKENDS[name]
    return Backend(name, module.experts, getattr(module, "layer", None), getattr(module, "linear", None))


def experts(xs: Tensor, offsets: Tensor, w_gate_up: Tensor, w_down: Tensor, backend: str | Backend = "auto") -> Tensor:
    """Each expert's SwiGLU network, w_down swiglu(w_gate_up x), on its own rows.

    xs (M, D) are sorted by expert and offsets (E,) int32 are the ends of each one's rows, the last of them M; w_gate_up
    is (E, 2F, D), the gate first, and w_down (E, D, F). Returns (M, D). An expert with no rows gets gradients of 0.
    `backend` is a name, or what `choose` returned. Raises ValueError where the shapes do not fit.
    """
    _check(xs, offsets.shape[0], w_gate_up, w_down)
    if isinstance(backend, str):
        backend = choose(backend, xs.device, xs.dtype)
    return backend.experts(xs, offsets, w_gate_up, w_down)


def moe(
    x: Tensor,
    logits: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    forced: Tensor | None = None,
    real_rows: Tensor | None = None,
    weight_grads: tuple[Tensor, Tensor] | None = None,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Routing]:
    """The whole layer: x (T, D) with router logits (T, E) to (T, D). Arguments as in `route` and `experts`.

    weight_grads, fp32 like w_gate_up and w_down, are what the backward pass adds their gradients to, instead of giving
    them to autograd: "triton" alone does that. Raises ValueError where another is asked to.
    """
    _check(x, logits.shape[1], w_gate_up, w_down)
    routing = route(logits, top_k, bias=bias, forced=forced, real_rows=real_rows)
    if isinstance(backend, str):
        backend = choose(backend, x.device, x.dtype)
    if weight_grads is not None:
        if backend.name != "triton":
            raise ValueError(f'weight_grads: moe = "{backend}" gives gradients to autograd alone: choose "triton"')
        return fused.layer(x, routing, w_gate_up, w_down, weight_grads), routing
    if backend.layer is not None:
        return backend.layer(x, routing, w_gate_up, w_down), routing
    permuted = permute(x, routing)
    ys = backend.experts(permuted.xs, permuted.offsets, w_gate_up, w_down)
    return combine(ys, permuted, routing), routing


def _check(x: Tensor, num_experts: int, w_gate_up: Tensor, w_down: Tensor) -> None:
    dim, hidden_dim = w_down.shape[1:]
    if w_gate_up.shape != (num_experts, 2 * hidden_dim, dim) or w_down.shape[0] != num_experts or x.shape[1] != dim:
        raise ValueError(
            f"{num_experts} experts, x {tuple(x.shape)}, w_gate_up {tuple(w_gate_up.shape)} and w_down "
            f"{tuple(w_down.shape)} do not fit: expected x (M, D), w_gate_up (E, 2F, D) and w_down (E, D, F)"
        )
