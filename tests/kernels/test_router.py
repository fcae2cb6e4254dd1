"""The router's kernels and the counting sort, interpreted: against PyTorch, float64 and torch's stable sort."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, library

from tokenmill.kernels import launch
from tokenmill.kernels.moe import Routing, route, router
from tokenmill.kernels.moe.permute import _sort_choices, sort_choices
from tokenmill.trainer.model import recompute

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter

# tokens, experts, top_k: one of each, all experts chosen, no power of two, more rows than a program takes
CASES = [(1, 1, 1), (17, 2, 2), (129, 8, 2), (70, 60, 4), (29, 64, 8), (300, 3, 1)]


def options(tokens: int, experts: int, top_k: int) -> dict[str, dict[str, Any]]:
    return {
        "plain": {},
        "bias and ghosts": {"bias": torch.randn(experts) * 0.05, "real_rows": torch.rand(tokens) < 0.7},
        "forced": {"forced": torch.rand(tokens, experts).topk(top_k).indices.int()},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_that_of_pytorch_at_most_twice(case: tuple[int, int, int], dtype: torch.dtype):
    tokens, experts, top_k = case
    distinct = torch.rand(tokens, experts).argsort(1) * 0.11  # of equal ones, torch takes any
    logits = (distinct + torch.randn(tokens, 1)).to(dtype).requires_grad_()
    d_weights, d_sums, d_square = torch.randn(tokens, top_k), torch.randn(experts), torch.randn(())

    def results(x: Tensor, backend: Any, **given: Any) -> tuple[Routing, list[Tensor]]:
        routing = route(x, top_k, backend=backend, **given)
        sums = routing.weights, routing.probability_sums, routing.lse_squared_sum
        upstream = [d.to(y.dtype) for d, y in zip((d_weights, d_sums, d_square), sums, strict=True)]
        return routing, [*sums, routing.entropy_sum, *torch.autograd.grad(sums, x, upstream)]

    for given in options(*case).values():
        ours, close = results(logits, "triton", **given)
        theirs, plain = results(logits, "torch", **given)
        _, exact = results(logits.detach().double().requires_grad_(), "torch", **given | {"forced": theirs.experts})
        assert torch.equal(ours.experts, theirs.experts)
        assert torch.equal(ours.counts, theirs.counts)
        for a, b, e in zip(close, plain, exact, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            # With one expert a token its weight is 1, and the logits' gradient a difference of equal numbers.
            slack = 2 * torch.finfo(b.dtype).eps * max(e.norm(), 1.0)
            assert (a - e).norm() <= 2 * (b - e).norm() + slack


def test_it_is_the_same_bits_every_time():
    logits = torch.randn(70, 8, requires_grad=True)
    first = None
    for _ in range(20):
        routing = route(logits, 2, backend="triton")
        loss = routing.weights.square().sum() + routing.probability_sums[0] + routing.lse_squared_sum
        found = [*routing, *torch.autograd.grad(loss, logits)]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_what_is_not_finite_still_goes_to_experts_that_exist():
    logits = torch.randn(6, 5)
    logits[0], logits[1, 2], logits[2] = float("nan"), float("inf"), float("-inf")
    logits[3, 1:] = float("-inf")
    for experts in (route(logits, k, backend="triton").experts for k in (1, 3, 5)):
        assert ((experts >= 0) & (experts < 5)).all()
        assert all(len({*row}) == len(row) for row in experts.tolist())


def test_the_operators_are_sound_and_leave_no_gap_in_a_compiled_graph():
    logits, real = torch.randn(9, 5, requires_grad=True), torch.arange(9) < 7
    operators: Any = (router._route, router._route_backward, _sort_choices)
    library.opcheck(operators[0], (logits, 2, torch.randn(5), None, real))
    routing = route(logits.detach(), 2)
    sums = torch.randn(9, 2), torch.randn(5), torch.randn(())
    library.opcheck(operators[1], (logits.detach(), routing.weights, routing.experts, real, *sums))
    library.opcheck(operators[2], (routing.experts, 5))

    def weighed(x: Tensor) -> Tensor:
        routing = route(x, 2, real_rows=real, backend="triton")
        return routing.weights @ torch.ones(2) + sort_choices(routing, backend="triton").inverse.sum(1)

    compiled = torch.compile(weighed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), weighed(logits))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_weights_of_choices_whose_probabilities_vanish(backend: Any):
    """As a bias can choose them: exp(-200) is 0 in fp32, and 0 / 0 no weight."""
    logits = torch.tensor([[200.0, 0.0, 1.0]], requires_grad=True)
    routing = route(logits, 2, bias=torch.tensor([-2.0, 0.0, 0.0]), backend=backend)
    weights = torch.tensor([[0.0, 1.0]]).gather(1, routing.experts - 1).softmax(1)
    torch.testing.assert_close(routing.weights, weights)
    (gradient,) = torch.autograd.grad(routing.weights[0, 0], logits)
    slope = float(weights.prod())
    expected = torch.zeros(1, 3).scatter(1, routing.experts, torch.tensor([[slope, -slope]]))
    torch.testing.assert_close(gradient, expected)


def test_ghosts_in_any_strides():
    logits, real = torch.randn(8, 4), torch.arange(16).view(8, 2)[:, 0] < 10
    assert not torch.empty(8, 2, dtype=torch.bool)[:, 0].is_contiguous()
    spread = torch.stack([real, ~real], 1)[:, 0]
    assert torch.equal(*(route(logits, 2, real_rows=r, backend="triton").counts for r in (real, spread)))


@pytest.mark.parametrize("name", ["bias", "forced", "real_rows"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_another_shape_is_named(name: str, backend: Any):
    with pytest.raises(ValueError, match=rf"{name} has shape \(3,\), expected"):
        route(torch.randn(8, 4), 2, **{name: torch.zeros(3, dtype=torch.int64)}, backend=backend)


def test_no_token_is_no_error():
    routing = route(torch.randn(0, 4), 2, backend="triton")
    assert [*map(tuple, (t.shape for t in routing))] == [(0, 2), (0, 2), (4,), (4,), (), ()]
    assert not any(t.any() for t in routing)
    assert not sort_choices(routing, backend="triton").offsets.any()


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_keeps_the_choice(mode: recompute.Recompute, monkeypatch: pytest.MonkeyPatch):
    launched = []
    arguments = launch.router
    monkeypatch.setattr(launch, "router", lambda name, experts: launched.append(name) or arguments(name, experts))
    weight = torch.randn(8, 4, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return route((x * x) @ weight, 2, backend="triton").weights.square()

    recompute.run(mode, block, torch.randn(11, 8, requires_grad=True)).sum().backward()
    assert launched == ["route", "route_backward"]
    assert weight.grad is not None


@pytest.mark.parametrize("case", [*CASES, (700, 60, 4), (333, 5, 2)], ids=str)
def test_sorting_is_torchs_stable_sort(case: tuple[int, int, int]):
    tokens, experts, top_k = case
    uniform = torch.rand(tokens, experts).topk(top_k).indices
    for chosen in (uniform, uniform.clamp_max(experts // 2), torch.full_like(uniform, experts - 1)):
        counts = torch.bincount(chosen.flatten(), minlength=experts)
        zero = torch.zeros(())
        routing = Routing(torch.ones(chosen.shape), chosen, counts, zero, zero, zero)
        ours = sort_choices(routing, backend="triton")
        for a, b in zip(ours, sort_choices(routing, backend="torch"), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a, b)
