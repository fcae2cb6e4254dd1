"""Mixture of experts: against Hugging Face's Mixtral block, a token-by-token oracle in float64, and each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from tokenmill.kernels.moe import Routing, choose, combine, experts, hf_load_balancing_loss, moe, permute, route

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter

BACKENDS = ["reference", "grouped_mm", "triton"]
PRECISIONS = [(backend, dtype) for backend in BACKENDS[:2] for dtype in (torch.float32, torch.bfloat16)]
PRECISIONS += [("triton", torch.float32), ("triton", torch.float16)]  # the interpreter's bfloat16 products are wrong
# tokens, experts, top_k: one token, one expert, all experts chosen, many experts of which most stay empty
CASES = [(1, 1, 1), (1, 8, 2), (13, 2, 1), (13, 2, 2), (29, 4, 4), (70, 8, 2), (9, 60, 4)]
DIM, HIDDEN_DIM = 8, 24


def inputs(tokens: int, num_experts: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    weights = leaf(num_experts, 2 * HIDDEN_DIM, DIM), leaf(num_experts, DIM, HIDDEN_DIM)
    return leaf(tokens, DIM), leaf(tokens, num_experts), *weights


def oracle(x: Tensor, logits: Tensor, w_gate_up: Tensor, w_down: Tensor, top_k: int) -> Tensor:
    """The paper's formula, a token at a time: a softmax over the k largest logits, experts one after another."""
    rows = []
    for token, logit in zip(x, logits, strict=True):
        values, chosen = logit.topk(top_k)
        outputs = []
        for e in chosen.tolist():
            gate, up = (w_gate_up[e] @ token).chunk(2)
            outputs.append(w_down[e] @ (gate * torch.sigmoid(gate) * up))
        rows.append((values.softmax(0)[:, None] * torch.stack(outputs)).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case: tuple[int, int, int]):
    tokens, num_experts, top_k = case
    x, logits, w_gate_up, w_down = leaves = inputs(tokens, num_experts, torch.float64)
    dy = torch.randn(tokens, DIM, dtype=torch.float64)
    y, _ = moe(x, logits, w_gate_up, w_down, top_k)
    expected = oracle(x, logits, w_gate_up, w_down, top_k)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy))


@pytest.mark.parametrize(("backend", "dtype"), PRECISIONS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_that_of_pytorch_at_most_twice(case: tuple[int, int, int], dtype: torch.dtype, backend: str):
    tokens, num_experts, top_k = case
    x, logits, w_gate_up, w_down = leaves = inputs(tokens, num_experts, dtype)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dy = torch.randn(tokens, DIM).to(dtype)
    forced = route(logits, top_k).experts  # the same choice, whatever the rounding of a tie

    def plain(x: Tensor, logits: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        """Every expert on every token, those not chosen with weight 0."""
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        weights = torch.zeros_like(probabilities).scatter(1, forced, probabilities.gather(1, forced))
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        gate, up = torch.einsum("td,efd->tef", x, w_gate_up).chunk(2, -1)
        return torch.einsum("te,tef,edf->td", weights, F.silu(gate) * up, w_down)

    def results(y: Tensor, at: Sequence[Tensor]) -> list[Tensor]:
        return [y, *torch.autograd.grad(y, at, dy.to(y.dtype))]

    exact = results(plain(*exact_leaves), exact_leaves)
    theirs = results(plain(*leaves), leaves)
    ours = results(moe(x, logits, w_gate_up, w_down, top_k, forced=forced, backend=backend)[0], leaves)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        # With one expert a token its weight is 1, and the logits' gradient a difference of equal numbers.
        slack = 2 * torch.finfo(dtype).eps * torch.maximum(e.norm(), exact[0].norm())
        assert (a - e).norm() <= 2 * (b - e).norm() + slack


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [*CASES, (77, 4, 2)], ids=str)
def test_equals_hugging_face(case: tuple[int, int, int], backend: str):
    tokens, num_experts, top_k = case
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_local_experts=num_experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = "eager"
    block: Any = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hf_x = torch.randn(1, tokens, 32, requires_grad=True)
    dy = torch.randn(tokens, 32)
    hf_y = block(hf_x)
    hf_y.backward(dy[None])
    x, router, w_gate_up, w_down = leaves = [
        tensor.detach().clone().requires_grad_()
        for tensor in (hf_x[0], block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    ]
    y, _ = moe(x, x @ router.T, w_gate_up, w_down, top_k, backend=backend)
    gradients = torch.autograd.grad(y, leaves, dy)
    assert hf_x.grad is not None
    hf_gradients = (hf_x.grad[0], block.gate.weight.grad, block.experts.gate_up_proj.grad, block.experts.down_proj.grad)
    for a, b in zip((y, *gradients), (hf_y[0], *hf_gradients), strict=True):
        # With one expert a token its weight is 1, and the router's gradient a difference of equal numbers.
        assert (a - b).norm() <= 1e-5 * (b.norm() if top_k > 1 else torch.maximum(b.norm(), hf_x.grad.norm()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_without_tokens_get_gradients_of_zero(backend: str):
    x, _, w_gate_up, w_down = inputs(21, 5)
    logits = torch.zeros(21, 5)
    logits[:, 2] = 9.0
    y, routing = moe(x, logits, w_gate_up, w_down, 1, backend=backend)
    assert routing.counts.tolist() == [0, 0, 21, 0, 0]
    for gradient in torch.autograd.grad(y, (w_gate_up, w_down), torch.randn_like(y)):
        assert gradient[2].any()
        assert not gradient[[0, 1, 3, 4]].any()


def test_backends_agree_on_rows_in_any_proportion():
    _, _, w_gate_up, w_down = inputs(1, 4)
    xs = torch.randn(10, DIM)
    for ends in ([10, 10, 10, 10], [0, 0, 0, 10], [0, 3, 3, 10], [1, 2, 9, 10]):
        offsets = torch.tensor(ends, dtype=torch.int32)
        first, *others = (experts(xs, offsets, w_gate_up, w_down, backend) for backend in BACKENDS)
        for other in others:
            torch.testing.assert_close(other, first)


def test_permute_sorts_stably_and_combine_undoes_it():
    chosen = torch.tensor([[2, 0], [0, 1], [2, 1], [0, 2]])
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(())
    routing = Routing(weights, chosen, torch.zeros(4, dtype=torch.int64), torch.zeros(4), zero, zero)
    permuted = permute(x, routing)
    assert torch.equal(permuted.xs, x[[0, 1, 3, 1, 2, 0, 2, 3]])
    assert permuted.offsets.tolist() == [3, 5, 8, 8]
    assert permuted.offsets.dtype == torch.int32
    assert permuted.order[permuted.inverse.flatten()].tolist() == list(range(8))
    torch.testing.assert_close(combine(permuted.xs, permuted, routing), x * weights.sum(1, keepdim=True))

    def there_and_back(x: Tensor, weights: Tensor) -> Tensor:
        permuted = permute(x, routing)
        return combine(permuted.xs.square(), permuted, routing._replace(weights=weights))

    assert torch.autograd.gradcheck(there_and_back, (x, weights))


def test_combine_weighs_and_sums_in_float32():
    ys = torch.randn(40, 16).bfloat16()
    routing = route(torch.randn(10, 6), 4)
    permuted = permute(torch.randn(10, 16).bfloat16(), routing)
    rows = ys[permuted.inverse].float()
    expected = (rows * routing.weights[..., None]).sum(1).bfloat16().float()
    # A weight rounded to bfloat16 would show at 2e-3; the order of the sum, in single last bits.
    assert (combine(ys, permuted, routing).float() - expected).norm() <= 5e-4 * expected.norm()


def test_route_counts_what_balancing_needs():
    logits = torch.randn(50, 6, dtype=torch.bfloat16)
    real = torch.arange(50) < 37
    for rows, routing in ((slice(None), route(logits, 2)), (slice(0, 37), route(logits, 2, real_rows=real))):
        wide = logits.float()
        assert routing.weights.dtype == torch.float32
        torch.testing.assert_close(routing.weights, wide.topk(2).values.softmax(-1))
        assert torch.equal(routing.experts, wide.softmax(-1).topk(2).indices)
        assert torch.equal(routing.counts, torch.bincount(routing.experts[rows].flatten(), minlength=6))
        torch.testing.assert_close(routing.probability_sums, wide[rows].softmax(-1).sum(0))
        torch.testing.assert_close(routing.lse_squared_sum, wide[rows].logsumexp(-1).square().sum())
        entropy = torch.distributions.Categorical(logits=wide[rows]).entropy().sum()
        torch.testing.assert_close(routing.entropy_sum, entropy)


def test_ghost_rows_get_no_gradient_from_the_sums():
    logits = torch.randn(9, 3, requires_grad=True)
    routing = route(logits, 1, real_rows=torch.arange(9) < 4)
    loss = (routing.probability_sums * torch.randn(3)).sum() + routing.lse_squared_sum
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[:4].all()
    assert not gradient[4:].any()


def test_a_bias_changes_the_choice_but_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    routing = route(logits, 2, bias=torch.tensor([-1.0, 0.0, 1.0]))
    assert routing.experts.tolist() == [[2, 1]]
    torch.testing.assert_close(routing.weights, torch.tensor([[0.0, 1.0]]).softmax(-1))


def test_a_forced_choice_is_kept():
    logits = torch.randn(30, 8)
    chosen = route(logits, 2)
    again = route(logits + 1e-3 * torch.randn(30, 8), 2, forced=chosen.experts.int())
    assert torch.equal(again.experts, chosen.experts)
    assert torch.equal(again.counts, chosen.counts)
    reversed_choice = route(logits, 2, forced=chosen.experts.flip(1))
    torch.testing.assert_close(reversed_choice.weights, chosen.weights.flip(1))


def test_load_balancing_loss_is_hugging_faces():
    layers = [torch.randn(40, 6) for _ in range(3)]
    expected = load_balancing_loss_func(tuple(layers), 6, 2)  # type: ignore[arg-type]
    torch.testing.assert_close(hf_load_balancing_loss(layers, 6, 2), expected)
    # The same number out of what `route` sums up.
    routings = [route(layer, 2) for layer in layers]
    counts = torch.stack([routing.counts for routing in routings]).sum(0)
    sums = torch.stack([routing.probability_sums for routing in routings]).sum(0)
    torch.testing.assert_close(6 * (counts * sums).sum() / 120**2, expected)


def test_choice():
    assert choose("auto", "cpu", torch.float32).name == "reference"
    assert choose("auto", "cuda", torch.bfloat16).name == "grouped_mm"
    assert choose("auto", "cuda", torch.float64).name == "reference"
    assert choose("triton", "cpu", torch.float16).layer is not None
    with pytest.raises(ValueError, match='moe = "best" is unknown: expected one of auto, triton, megablocks, grouped'):
        choose("best", "cpu", torch.float32)
    with pytest.raises(ValueError, match='moe = "triton" cannot run here: .* wrong products of bfloat16'):
        choose("triton", "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match='moe = "triton" cannot run here: .*not float64'):
        choose("triton", "cuda", torch.float64)
    with pytest.raises(ValueError, match='moe = "grouped_mm" cannot run here: .*not float64'):
        choose("grouped_mm", "cpu", torch.float64)


def test_wrong_input_is_named():
    x, logits, w_gate_up, w_down = inputs(5, 3)
    with pytest.raises(ValueError, match="top_k is 4, expected 1 to the number of experts, 3"):
        route(logits, 4)
    with pytest.raises(ValueError, match=r"forced has shape \(5, 1\), expected \(5, 2\)"):
        route(logits, 2, forced=torch.zeros(5, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"do not fit: expected x \(M, D\)"):
        moe(x, logits, w_gate_up[:, 1:], w_down, 1)
    with pytest.raises(ValueError, match="D = 7 of 4 bytes"):
        experts(x[:, :7], torch.tensor([1, 2, 5]), w_gate_up[..., :7], w_down[:, :7], "grouped_mm")
