"""The real MegaBlocks on our weights, under the interpreter: against our reference, and its own layer and router."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.kernels import moe
from tokenmill.kernels.moe import megablocks

# Triton 3.6's interpreter makes numbers of a loop's bounds in a way that NumPy is about to forbid.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

CPU = torch.device("cpu")
MISSING = megablocks.supports(CPU, torch.float32)
needs_package = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

# tokens, experts, top_k: one token, one expert, all experts chosen, experts that stay empty
CASES = [(1, 1, 1), (1, 8, 2), (9, 1, 1), (8, 2, 1), (5, 4, 4), (11, 8, 2), (3, 8, 4), (2, 60, 4)]
DIM, HIDDEN_DIM = 12, 20


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def weights(num_experts: int) -> tuple[Tensor, Tensor]:
    return leaf(num_experts, 2 * HIDDEN_DIM, DIM), leaf(num_experts, DIM, HIDDEN_DIM)


def assert_equal_to(expected: Tensor, actual: Tensor, leaves: tuple[Tensor, ...]) -> None:
    """Values, and the gradients of the leaves for the same random upstream gradient."""
    dy = torch.randn_like(expected)
    theirs = (expected, *torch.autograd.grad(expected, leaves, dy))
    for a, b in zip((actual, *torch.autograd.grad(actual, leaves, dy)), theirs, strict=True):
        assert a.is_contiguous()
        assert (a - b).norm() <= 1e-5 * b.norm()


def reference_layer(x: Tensor, routing: moe.Routing, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    permuted = moe.permute(x, routing)
    ys = moe.experts(permuted.xs, permuted.offsets, w_gate_up, w_down, "reference")
    return moe.combine(ys, permuted, routing)


@needs_package
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_equals_ours(case: tuple[int, int, int]):
    tokens, num_experts, top_k = case
    x, (w_gate_up, w_down), router_weights = leaf(tokens, DIM), weights(num_experts), leaf(tokens, top_k)
    routing = moe.route(torch.randn(tokens, num_experts), top_k)._replace(weights=router_weights)
    expected = reference_layer(x, routing, w_gate_up, w_down)
    actual = megablocks.layer(x, routing, w_gate_up, w_down)
    assert_equal_to(expected, actual, (x, router_weights, w_gate_up, w_down))


@needs_package
@pytest.mark.parametrize("ends", [[7], [0, 3, 3, 10], [0, 0, 0, 5], [6, 6], [0, 0]], ids=str)
def test_experts_equal_ours(ends: list[int]):
    xs, (w_gate_up, w_down), offsets = leaf(ends[-1], DIM), weights(len(ends)), torch.tensor(ends, dtype=torch.int32)
    expected = moe.experts(xs, offsets, w_gate_up, w_down, "reference")
    actual = megablocks.experts(xs, offsets, w_gate_up, w_down)
    assert_equal_to(expected, actual, (xs, w_gate_up, w_down))


@needs_package
def test_experts_without_tokens_get_gradients_of_zero():
    x, (w_gate_up, w_down) = leaf(6, DIM), weights(5)
    routing = moe.route(F.one_hot(torch.full((6,), 2), 5).float(), 1)
    y = megablocks.layer(x, routing, w_gate_up, w_down)
    for gradient in torch.autograd.grad(y, (w_gate_up, w_down), torch.randn_like(y)):
        assert gradient[2].all()
        assert not gradient[[0, 1, 3, 4]].any()


@needs_package
def test_equals_its_own_layer_with_its_router():
    """megablocks.dMoE as its documentation makes one, given our weights."""
    package: Any = importlib.import_module("megablocks")
    dmoe = package.dMoE(
        package.Arguments(
            hidden_size=DIM,
            ffn_hidden_size=64,
            moe_num_experts=4,
            moe_top_k=2,
            moe_normalize_expert_weights=1,
            moe_loss_weight=0,
            activation_fn=F.silu,
            mlp_type="glu",
            mlp_impl="grouped",
            bias=False,
            return_bias=False,
            fp16=False,
            device="cpu",
        )
    )
    x, w_gate_up, w_down, router = leaf(10, DIM), leaf(4, 128, DIM), leaf(4, DIM, 64), leaf(4, DIM)
    glu, gate, up = dmoe.experts.mlp, *w_gate_up.detach().chunk(2, dim=1)
    for parameter, values in ((glu.w1, gate), (glu.v1, up), (glu.w2, w_down.mT), (dmoe.router.layer.weight, router)):
        parameter.data.copy_(values.detach().reshape(parameter.shape))
    y = megablocks.layer(x, moe.route(x @ router.T, 2), w_gate_up, w_down)
    their_x = x.detach().reshape(2, 5, DIM).requires_grad_()
    their_y = dmoe(their_x)
    dy = torch.randn_like(y)
    y.backward(dy)
    their_y.backward(dy.view_as(their_y))
    gate, up, down = (parameter.grad.view(4, 64, DIM) for parameter in (glu.w1, glu.v1, glu.w2))
    theirs: Any = (their_y, their_x.grad, torch.cat([gate, up], 1), down.mT, dmoe.router.layer.weight.grad)
    ours: Any = (y, x.grad, w_gate_up.grad, w_down.grad, router.grad)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b.view_as(a)).norm() <= 1e-5 * b.norm()


@needs_package
def test_weights_are_not_copied():
    x, (w_gate_up, w_down) = leaf(4, DIM), weights(3)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        megablocks.layer(x, moe.route(torch.randn(4, 3), 2), w_gate_up, w_down)
    memory = [tensor.untyped_storage().data_ptr() for tensor in saved if tensor.dim() == 3]
    own = [weight.untyped_storage().data_ptr() for weight in (w_gate_up, w_gate_up, w_down)]
    assert sorted(memory) == sorted(own)


@needs_package
def test_rows_may_lie_apart():
    rows, (w_gate_up, w_down) = torch.randn(3, 2 * DIM)[:, ::2], weights(2)
    routing = moe.route(torch.randn(3, 2), 1)
    expected = megablocks.layer(rows.contiguous(), routing, w_gate_up, w_down)
    assert torch.equal(megablocks.layer(rows, routing, w_gate_up, w_down), expected)


@needs_package
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_runs_as_it_is_inside_a_compiled_function():
    xs, (w_gate_up, w_down), offsets = leaf(5, DIM), weights(2), torch.tensor([3, 5], dtype=torch.int32)

    def function(xs: Tensor) -> Tensor:
        return 2 * megablocks.experts(xs, offsets, w_gate_up, w_down)

    compiled = torch.compile(function, backend="eager")
    assert_equal_to(function(xs), compiled(xs), (xs, w_gate_up, w_down))


@needs_package
def test_what_stands_in_for_compiled_modules_is_seen_by_it_alone():
    for name in ("megablocks_ops", "grouped_gemm"):
        assert name not in sys.modules or importlib.util.find_spec(name) is not None


def test_installed_compiled_modules_are_not_replaced(monkeypatch: pytest.MonkeyPatch):
    real = ModuleType("megablocks_ops")
    monkeypatch.setitem(sys.modules, "megablocks_ops", real)
    monkeypatch.setitem(sys.modules, "grouped_gemm", None)  # importing it raises ImportError
    with megablocks._compiled_modules():
        assert sys.modules["megablocks_ops"] is real
        assert sys.modules["grouped_gemm"].ops.gmm is megablocks._grouped_product
    assert sys.modules["megablocks_ops"] is real


@needs_package
def test_source_names_package_and_products():
    assert megablocks.source() == f"megablocks 0.10.0 with torch.mm {torch.__version__}"


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch):
    reason = megablocks.supports(CPU, torch.float64)
    assert reason == "it computes float32, float16 and bfloat16, not float64"
    monkeypatch.setattr(megablocks, "_package", lambda: "No module named 'megablocks'")
    reason = megablocks.supports(CPU, torch.float32)
    assert reason == f"No module named 'megablocks'; install it by: {megablocks.INSTALL}"
    monkeypatch.setattr(megablocks, "INTERPRETED", False)
    assert megablocks.supports(CPU, torch.float32) == "its Triton kernels need a CUDA device, not cpu"
