"""`moe = "triton"`, under the interpreter: against the formula in float64, and what it keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from tokenmill.kernels import launch
from tokenmill.kernels.moe import experts, fused, grouped_gemm, moe, reference, route
from tokenmill.kernels.moe.fused import linear

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter

DIM, HIDDEN_DIM = 24, 40  # no multiples of a tile


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dict(ROWS=32, COLUMNS=64, INNER=32, GROUP=2)
    monkeypatch.setattr(launch, "settings", lambda _, sizes, default: default | (small if "ROWS" in default else {}))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer is NaN before it is written."""

    new_empty = Tensor.new_empty

    def poison(*args: Any, **kwargs: Any) -> Tensor:
        made = new_empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poison)


def leaves(tokens: int, num_experts: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, logits, w_gate_up and w_down, of which outputs of the order of 1 come."""
    shapes = [(tokens, DIM), (tokens, num_experts), (num_experts, 2 * HIDDEN_DIM, DIM), (num_experts, DIM, HIDDEN_DIM)]
    scales = [1, 1, DIM**-0.5, HIDDEN_DIM**-0.5]
    made = [torch.randn(shape) * scale for shape, scale in zip(shapes, scales, strict=True)]
    return [made[0].to(dtype), made[1], made[2].to(dtype), made[3].to(dtype)]


def layer(inputs: Sequence[Tensor], top_k: int, chosen: Tensor | None = None) -> Tensor:
    x, logits, w_gate_up, w_down = inputs
    return moe(x, logits, w_gate_up, w_down, top_k, forced=chosen, backend="triton")[0]


def exact(inputs: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """Every expert on every token, those not chosen with weight 0."""
    x, logits, w_gate_up, w_down = inputs
    weights = logits.softmax(-1)
    weights = torch.zeros_like(weights).scatter(1, chosen, weights.gather(1, chosen))
    weights = weights / weights.sum(-1, keepdim=True)
    gate, up = torch.einsum("td,efd->tef", x, w_gate_up).chunk(2, -1)
    return torch.einsum("te,tef,edf->td", weights, F.silu(gate) * up, w_down)


def require(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies that ask for gradients."""
    return [tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_() for tensor in tensors]


def distance(value: Tensor, truth: Tensor) -> float:
    value, truth = value.detach(), truth.detach()
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-30))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "fullest"),
    [(1, 1, 1, False), (1, 8, 4, False), (19, 2, 1, False), (45, 4, 2, False), (45, 4, 1, True)],
)
def test_layer(tokens: int, num_experts: int, top_k: int, fullest: bool, dtype: torch.dtype):
    tensors = leaves(tokens, num_experts, dtype)
    if fullest:
        tensors[1][:, 2] += 99  # all tokens to one expert
    chosen = route(tensors[1], top_k).experts
    dy = torch.randn(tokens, DIM)
    inputs, doubles = require(tensors), require(tensors, torch.float64)
    y, truth = layer(inputs, top_k, chosen), exact(doubles, chosen)
    values = (y, *torch.autograd.grad(y, inputs, dy.to(dtype)))
    truths = (truth, *torch.autograd.grad(truth, doubles, dy.to(dtype).double()))
    for value, expected, like in zip(values, truths, (y, *inputs), strict=True):
        assert value.dtype == like.dtype
        if top_k > 1 or like is not inputs[1]:  # with one expert its weight is 1, its gradient a difference of equals
            assert distance(value, expected) < (2e-6 if dtype == torch.float32 else 2e-3)
        else:
            assert value.abs().max() < 1e-5


def test_experts_alone():
    _, _, w_gate_up, w_down = leaves(1, 3)
    xs, dy = torch.randn(41, DIM), torch.randn(41, DIM)
    offsets = torch.tensor([0, 20, 41], dtype=torch.int32)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = require([xs, w_gate_up, w_down], dtype)
        y = experts(inputs[0], offsets, inputs[1], inputs[2], backend)
        results.append((y, *torch.autograd.grad(y, inputs, dy.to(dtype))))
    for value, truth in zip(*results, strict=True):
        assert distance(value, truth) < 2e-6


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ends", [[1], [0, 20, 20, 41], [0, 0]], ids=str)
def test_one_product_alone(ends: list[int], dtype: torch.dtype):
    """Of a wide matrix and of a narrow one, as an adapter's are; a row, experts without any, no row at all."""
    offsets = torch.tensor(ends, dtype=torch.int32)
    for inputs, outputs in ((DIM, 8), (8, HIDDEN_DIM)):
        xs, dy = torch.randn(ends[-1], inputs).to(dtype), torch.randn(ends[-1], outputs).to(dtype)
        w = (torch.randn(len(ends), outputs, inputs) / inputs**0.5).to(dtype)
        values, truths = require([xs, w]), require([xs, w], torch.float64)
        y, truth = linear(values[0], values[1], offsets), reference.linear(truths[0], truths[1], offsets)
        gradients = torch.autograd.grad(y, values, dy), torch.autograd.grad(truth, truths, dy.double())
        for value, expected in zip((y, *gradients[0]), (truth, *gradients[1]), strict=True):
            assert value.dtype == dtype
            assert value.shape == expected.shape
            assert distance(value, expected) < (2e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("trained", [(0,), (1,)])
def test_one_product_keeps_and_makes_what_is_asked_for(trained: tuple[int, ...]):
    offsets = torch.tensor([3, 11], dtype=torch.int32)
    tensors = [torch.randn(11, DIM), torch.randn(2, 8, DIM)]
    every = require(tensors)
    some = [tensor.clone().requires_grad_(i in trained) for i, tensor in enumerate(tensors)]
    dy = torch.randn(11, 8)
    linear(every[0], every[1], offsets).backward(dy)
    kept = saved_bytes(lambda: linear(some[0], some[1], offsets))
    assert kept == sum(t.nbytes for i, t in enumerate(tensors) if i not in trained) + offsets.nbytes
    linear(some[0], some[1], offsets).backward(dy)
    for i, (one, other) in enumerate(zip(every, some, strict=True)):
        if i in trained:
            assert one.grad is not None
            assert other.grad is not None
            assert torch.equal(one.grad, other.grad)
        else:
            assert other.grad is None


@pytest.mark.parametrize("trained", [(0,), (2,), (1, 3)])
def test_only_gradients_that_are_asked_for(trained: tuple[int, ...]):
    tensors = leaves(7, 2)
    every = require(tensors)
    some = [tensor.requires_grad_(i in trained) for i, tensor in enumerate(t.clone() for t in tensors)]
    dy = torch.randn(7, DIM)
    layer(every, 2).backward(dy)
    layer(some, 2).backward(dy)
    for i, (one, other) in enumerate(zip(every, some, strict=True)):
        if i in trained:
            assert one.grad is not None
            assert other.grad is not None
            assert torch.equal(one.grad, other.grad)
        else:
            assert other.grad is None


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_added_to_what_is_there(compiled: bool):
    """Two micro-batches; the second forward before the first backward, which a compiled graph forbids."""
    tensors = leaves(9, 3)
    plain, inputs = require(tensors), require(tensors)
    totals = torch.ones_like(tensors[2]), torch.ones_like(tensors[3])

    def loss(x: Tensor, logits: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        return moe(x, logits, w_gate_up, w_down, 2, weight_grads=totals, backend="triton")[0].square().sum()

    step = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    losses = (step(*inputs) for _ in range(2))
    for one in losses if compiled else [*losses]:
        one.backward()
    for _ in range(2):
        layer(plain, 2).square().sum().backward()
    assert inputs[2].grad is inputs[3].grad is None
    for total, weight in zip(totals, plain[2:], strict=True):
        torch.testing.assert_close(total - 1, weight.grad, rtol=1e-5, atol=1e-5)
    for one, other in zip(inputs[:2], plain[:2], strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_twenty_passes_are_the_same_bits():
    tensors = leaves(5, 2)
    dy = torch.randn(5, DIM)

    def run() -> list[Tensor]:
        inputs = require(tensors)
        y = layer(inputs, 2)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    first = run()
    for _ in range(19):
        assert all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))


def test_weights_as_other_layers_leave_them():
    """Views, not contiguous; and a gradient that is expanded."""
    tensors = leaves(9, 3)
    moved = require([tensor.mT.contiguous().mT for tensor in tensors])
    plain = require(tensors)
    layer(moved, 2).sum().backward()
    layer(plain, 2).sum().backward()
    for one, other in zip(moved, plain, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_tensors_that_begin_anywhere(monkeypatch):
    """Views at an odd element: copies through descriptors need addresses that are multiples of 16 bytes."""
    addresses: list[int] = []
    launched = grouped_gemm._launch

    def checked(kernel: Any, settings: dict[str, Any], *arguments: Any, **constants: Any) -> None:
        addresses.extend(tensor.data_ptr() for tensor in arguments if isinstance(tensor, Tensor))
        launched(kernel, settings, *arguments, **constants)

    def shifted(tensor: Tensor) -> Tensor:
        view = torch.empty(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor)
        assert view.data_ptr() % 16
        return view.requires_grad_()

    monkeypatch.setattr(grouped_gemm, "_launch", checked)
    xs, _, w_gate_up, w_down = leaves(19, 2)
    dy, d_z = torch.randn(19, DIM), torch.randn(19, 2 * HIDDEN_DIM)
    offsets = torch.tensor([8, 19], dtype=torch.int32)
    results = []
    for place in (lambda tensor: tensor.clone().requires_grad_(), shifted):
        inputs = [place(tensor) for tensor in (xs, w_gate_up, w_down)]
        y = experts(inputs[0], offsets, inputs[1], inputs[2], "triton")
        z = linear(inputs[0], inputs[1], offsets)
        of_z = torch.autograd.grad(z, inputs[:2], place(d_z).detach())
        results.append((y, *torch.autograd.grad(y, inputs, place(dy).detach()), z, *of_z))
    assert not any(address % 16 for address in addresses)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_weights_of_choices_in_any_strides():
    x, logits, w_gate_up, w_down = leaves(9, 3)
    routing = route(logits, 2)
    turned = routing._replace(weights=routing.weights.T.contiguous().T)
    layers = [fused.layer(x, r, w_gate_up, w_down) for r in (routing, turned)]
    assert torch.equal(*layers)
    with pytest.raises(ValueError, match="weights of the choices are torch.float16, expected torch.float32"):
        fused.layer(x, routing._replace(weights=routing.weights.half()), w_gate_up, w_down)


def saved_bytes(use: Callable[[], object]) -> int:
    """Of the tensors kept for backward, parameters left out, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = use()  # held, so that no storage is freed and its address used again
    del out
    return sum(kept.values())


def test_saved_at_mixtrals_shape():
    """The input and the product of gate and up, and next to nothing else; and neither where no backward will come."""
    tokens, dim, hidden_dim = 8192, 4096, 14336
    with torch.device("meta"):
        x = torch.randn(tokens, dim, dtype=torch.float16, requires_grad=True)
        w_gate_up = torch.nn.Parameter(torch.empty(8, 2 * hidden_dim, dim, dtype=torch.float16))
        w_down = torch.nn.Parameter(torch.empty(8, dim, hidden_dim, dtype=torch.float16))
        logits = torch.randn(tokens, 8, requires_grad=True)
    must = (64 + 896) << 20
    saved = saved_bytes(lambda: layer([x, logits, w_gate_up, w_down], 2))
    assert must <= saved <= must + (2 << 20) < 0.95 * 2**30
    with torch.no_grad():
        assert saved_bytes(lambda: layer([x, logits, w_gate_up, w_down], 2)) == 0


def test_operators_are_well_formed():
    x, logits, w_gate_up, w_down = require(leaves(7, 3))
    routing = route(logits, 2)
    inverse = torch.argsort(torch.argsort(routing.experts.flatten(), stable=True)).view(7, 2)
    offsets = torch.bincount(routing.experts.flatten(), minlength=3).cumsum(0).int()
    weights = routing.weights.detach().requires_grad_()
    library.opcheck(fused._experts, (x, w_gate_up, w_down, offsets, inverse, weights, None, None, True))
    rows = torch.randn(14, DIM, requires_grad=True)
    library.opcheck(fused._experts, (rows, w_gate_up, w_down, offsets, None, None, None, None, True))
    gate_up = torch.randn(14, 2 * HIDDEN_DIM)
    tensors = [tensor.detach() for tensor in (x, x, gate_up, w_gate_up, w_down)]
    weights = weights.detach()
    library.opcheck(fused._experts_backward, (*tensors, offsets, inverse, weights, None, None, True, True, False))
    totals = [torch.zeros_like(w_gate_up), torch.zeros_like(w_down)]
    library.opcheck(fused._experts_backward, (*tensors, offsets, inverse, weights, *totals, True, True, True))


def test_one_products_operators_are_well_formed():
    xs, w = torch.randn(7, DIM, requires_grad=True), torch.randn(2, 8, DIM, requires_grad=True)
    dy, offsets = torch.randn(7, 8), torch.tensor([3, 7], dtype=torch.int32)
    library.opcheck(fused._linear, (xs, w, offsets))
    library.opcheck(fused._linear, (xs, w.detach(), offsets))
    for tensors in ((xs.detach(), w.detach()), (xs.detach(), None), (None, w.detach())):
        library.opcheck(fused._linear_backward, (dy, *tensors, offsets))


def test_compiles_to_one_graph():
    tensors = leaves(17, 4)

    def step(x: Tensor, *others: Tensor) -> Tensor:
        return layer([x * 2, *others], 2).square().sum()

    inputs, compiled = require(tensors), require(tensors)
    step(*inputs).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for one, other in zip(inputs, compiled, strict=True):
        torch.testing.assert_close(one.grad, other.grad)

    offsets = torch.tensor([5, 5, 17], dtype=torch.int32)
    xs, w = torch.randn(17, DIM), torch.randn(3, 8, DIM)
    inputs, compiled = require([xs, w]), require([xs, w])
    linear(inputs[0], inputs[1], offsets).square().sum().backward()
    one_product = torch.compile(linear, fullgraph=True, backend="aot_eager")
    one_product(compiled[0], compiled[1], offsets).square().sum().backward()
    for one, other in zip(inputs, compiled, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_wrong_input_is_named():
    x, logits, w_gate_up, w_down = leaves(5, 3)
    with pytest.raises(ValueError, match="w_down torch.float16; cast to one dtype"):
        moe(x, logits, w_gate_up, w_down.half(), 1, backend="triton")
    offsets = torch.tensor([1, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="xs is torch.float32 and w torch.float16; cast to one dtype"):
        linear(x, w_gate_up.half(), offsets)
    for of_adapter in (torch.randn(3, 6, DIM), torch.randn(3, DIM, 6)):
        with pytest.raises(ValueError, match="needs rows .* 6 of 4 bytes is not: .* or for an adapter another rank"):
            linear(torch.randn(5, of_adapter.shape[2]), of_adapter, offsets)
    with pytest.raises(ValueError, match='moe = "triton" needs rows .* D = 23 of 4 bytes'):
        moe(x[:, 1:], logits, w_gate_up[..., 1:], w_down[:, 1:], 1, backend="triton")
    with pytest.raises(ValueError, match='weight_grads: moe = "reference" gives gradients to autograd alone'):
        moe(x, logits, w_gate_up, w_down, 1, weight_grads=(w_gate_up, w_down), backend="reference")
    with pytest.raises(
        ValueError, match=r"weight_grads: expected contiguous torch.float32 \[3, 24, 40\], got .*float16"
    ):
        fused.layer(x, route(logits, 1), w_gate_up, w_down, (torch.empty_like(w_gate_up), w_down.half()))
