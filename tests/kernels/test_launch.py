"""How kernels are launched: where their tensors are, and with what the table says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from tokenmill.kernels import launch
from tokenmill.kernels.adamw import adamw_
from tokenmill.kernels.cross_entropy import linear_cross_entropy, token_logprobs
from tokenmill.kernels.embedding import Noise, embed
from tokenmill.kernels.layout import Layout
from tokenmill.kernels.moe import fused, rows
from tokenmill.kernels.rms_norm import rms_norm
from tokenmill.kernels.rotary import apply_rotary
from tokenmill.kernels.swiglu import swiglu


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def differentiate(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def experts() -> None:
    inverse = torch.arange(16).view(8, 2)
    rows.sum_choices(rows.spread(torch.randn(8, 16), inverse), inverse)
    differentiate(fused.experts(leaf(8, 16), torch.tensor([3, 8], dtype=torch.int32), leaf(2, 64, 16), leaf(2, 16, 32)))


def optimizer() -> None:
    parameter, gradient, exp_avg, exp_avg_sq = (torch.ones(5) for _ in range(4))
    adamw_(
        parameter, gradient, exp_avg, exp_avg_sq, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
        step=1, seed=1, tensor_id=2, backend="triton",
    )  # fmt: skip


LAYOUT = Layout.from_lengths([5, 3])
TOKENS, TARGETS = torch.arange(8, dtype=torch.int32), torch.arange(8)
USES: dict[str, Callable[[], object]] = {
    "embed": lambda: differentiate(embed(TOKENS, leaf(9, 8), noise=Noise(5.0, 1, 2), layout=LAYOUT, backend="triton")),
    "rms_norm": lambda: differentiate(*rms_norm(leaf(8, 16), leaf(16), 1e-5, leaf(8, 16), backend="triton")),
    "rotary": lambda: differentiate(*apply_rotary(leaf(8, 2, 8), leaf(8, 1, 8), LAYOUT, 1e4, backend="triton")),
    "swiglu": lambda: differentiate(swiglu(leaf(8, 32), backend="triton")),
    "loss": lambda: differentiate(linear_cross_entropy(leaf(8, 4), leaf(9, 4), TARGETS, backend="triton").loss),
    "log-probabilities": lambda: differentiate(token_logprobs(leaf(8, 4), leaf(9, 4), TARGETS, backend="triton")),
    "adamw": optimizer,
    "experts": experts,
}


@pytest.mark.parametrize("use", USES)
def test_kernels_are_launched_where_their_tensors_are(use, monkeypatch):
    """Which may be another device than the current one, that Triton launches on."""
    current: list[object] = []
    launched: list[bool] = []

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: launched.append(bool(current)))
    USES[use]()
    assert launched
    assert all(launched)


def test_a_gradient_is_scaled_as_the_table_says(monkeypatch):
    table: dict[str, Any] = {"sm_0": {"scale": {"": {"BLOCK": 64, "num_warps": 2}}}}
    monkeypatch.setattr(launch, "table", lambda: table)
    assert launch.elementwise("scale", 1000) == {"BLOCK": 64, "num_warps": 2, "enable_fp_fusion": True}
    assert launch.elementwise("other", 1000)["BLOCK"] == 1024
