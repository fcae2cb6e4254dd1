"""Other projects' versions of our operations, as far as they are installed here: what our timings stand beside.

liger-kernel, quack-kernels and cut-cross-entropy want versions of torch and triton of their own; where they would not
resolve together, give each an environment of its own with tokenmill beside it, and run `tokenmill bench ops` in each.
Each function returns what computes the same as ours from the same tensors, by name.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.kernels import cross_entropy as ours
from tokenmill.kernels import rms_norm as norms
from tokenmill.kernels import swiglu as glu

Peers = dict[str, Callable[[], Any]]


def compiled(function: Callable[..., Any], small: bool) -> Callable[..., Any]:
    """By torch.compile; in a rehearsal only traced."""
    return torch.compile(function, backend="eager" if small else "inductor", dynamic=False)


def _installed(module: str) -> Any:
    """The module, or None where its package is not installed."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return None
    return importlib.import_module(module)


def versions() -> dict[str, str]:
    """Of the packages that are here."""
    found = {}
    for package, module in (
        ("liger-kernel", "liger_kernel"), ("quack-kernels", "quack"), ("cut-cross-entropy", "cut_cross_entropy"),
        ("megablocks", "megablocks"), ("flash-attn", "flash_attn"), ("transformers", "transformers"),
    ):  # fmt: skip
        if importlib.util.find_spec(module) is not None:
            found[package] = version(package)
    return found


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, small: bool) -> Peers:
    """The summed loss, a scalar to call backward on."""
    definition = compiled(lambda h, w, t: ours.reference(h, w, t).loss, small)
    peers: Peers = {"torch.compile": lambda: definition(hidden, weight, targets)}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13; without options it keeps all the logits
        options: Any = importlib.import_module("torch.nn").LinearCrossEntropyOptions()
        peers["F.linear_cross_entropy"] = lambda: F.linear_cross_entropy(
            hidden, weight, targets, reduction="sum", options=options
        )
    if (liger := _installed("liger_kernel.transformers.functional")) is not None:
        peers["Liger-Kernel"] = lambda: liger.liger_fused_linear_cross_entropy(
            hidden, weight, targets, reduction="sum", accum_dtype=torch.float32
        )
    if (cut := _installed("cut_cross_entropy")) is not None:
        peers["cut-cross-entropy"] = lambda: cut.linear_cross_entropy(
            hidden, weight, targets, reduction="sum", impl="cce_exact"
        )
    if (quack := _installed("quack.linear_cross_entropy")) is not None:
        peers["quack"] = lambda: quack.chunked_linear_cross_entropy(hidden, weight, targets, reduction="sum")
    return peers


def rms_norm(x: Tensor, weight: Tensor, eps: float, small: bool) -> Peers:
    definition = compiled(norms.reference, small)
    peers: Peers = {
        "torch.compile": lambda: definition(x, weight, eps),
        "F.rms_norm": lambda: F.rms_norm(x, x.shape[-1:], weight, eps),
    }
    if (liger := _installed("liger_kernel.transformers.functional")) is not None:
        peers["Liger-Kernel"] = lambda: liger.liger_rms_norm(x, weight, eps, in_place=False)
    if (quack := _installed("quack.rmsnorm")) is not None:
        peers["quack"] = lambda: quack.rmsnorm(x, weight, eps=eps)
    return peers


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor, small: bool) -> Peers:
    def add(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norms.reference(total, weight, eps), total

    definition = compiled(add, small)
    peers: Peers = {"torch.compile": lambda: definition(x, residual)}
    if (liger := _installed("liger_kernel.transformers.functional")) is not None:
        peers["Liger-Kernel"] = lambda: liger.liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)
    if (quack := _installed("quack.rmsnorm")) is not None:
        peers["quack"] = lambda: quack.rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)
    return peers


def swiglu(gate_up: Tensor, small: bool) -> Peers:
    definition = compiled(glu.reference, small)
    peers: Peers = {"torch.compile": lambda: definition(gate_up)}
    if (liger := _installed("liger_kernel.transformers.functional")) is not None:
        peers["Liger-Kernel"] = lambda: liger.liger_swiglu(*gate_up.chunk(2, -1))
    return peers


def rotary(q: Tensor, k: Tensor, positions: Tensor, theta: float, small: bool) -> Peers:
    """q and k (T, H, d) turned by a table in their own dtype, as in Hugging Face's models."""
    channels = torch.arange(0, q.shape[-1], 2, device=q.device) / q.shape[-1]
    angles = (positions[:, None] / theta**channels).repeat(1, 2)
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    definition = compiled(lambda q, k: (turned(q), turned(k)), small)
    peers: Peers = {"torch.compile": lambda: definition(q, k)}
    if (liger := _installed("liger_kernel.transformers.functional")) is not None:
        batched = [x.transpose(0, 1)[None] for x in (q, k)]  # (1, H, T, d)
        peers["Liger-Kernel"] = lambda: liger.liger_rope(*batched, cos[None], sin[None])
    return peers
