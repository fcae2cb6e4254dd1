"""SwiGLU against Hugging Face's MLP and float64, forward and backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, library
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralMLP

from tokenmill.kernels import launch
from tokenmill.kernels import swiglu as module
from tokenmill.kernels.swiglu import reference, swiglu
from tokenmill.trainer.model import recompute

# The interpreter truncates to bf16 where a GPU rounds, so there the kernels are tested in the other types.
HALF = [("torch", torch.bfloat16), ("torch", torch.float16), ("triton", torch.float16)]
BACKENDS = [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32), *HALF]


def results(function, gate_up: Tensor, dy: Tensor) -> list[Tensor]:
    gate_up = gate_up.detach().requires_grad_()
    y = function(gate_up)
    return [y, *torch.autograd.grad(y, gate_up, dy)]


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (7, 13), (17, 2100), (129, 256)], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
def test_error_is_that_of_pytorch_at_most_twice(shape: tuple[int, int], backend, dtype: torch.dtype):
    tokens, hidden_dim = shape
    gate_up, dy = torch.randn(tokens, 2 * hidden_dim).mul(3).to(dtype), torch.randn(shape).to(dtype)
    exact = results(reference, gate_up.double(), dy.double())
    ours = results(partial(swiglu, backend=backend), gate_up, dy)
    for a, b, e in zip(ours, results(reference, gate_up, dy), exact, strict=True):
        assert a.dtype == dtype
        assert (a - e).norm() <= 2 * (b - e).norm() + torch.finfo(dtype).eps * e.norm()


@pytest.mark.parametrize(("backend", "dtype"), HALF, ids=str)
def test_half_types_are_rounded_once(backend, dtype: torch.dtype):
    gate_up, dy = torch.randn(7, 26).to(dtype), torch.randn(7, 13).to(dtype)
    in_float32 = results(reference, gate_up.float(), dy.float())
    for a, b in zip(results(partial(swiglu, backend=backend), gate_up, dy), in_float32, strict=True):
        assert torch.equal(a, b.to(dtype))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # the interpreter's, as meant
def test_a_row_of_several_blocks_with_large_and_strided_values(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "swiglu", lambda *_: {"BLOCK": 16})
    gate_up, dy = torch.randn(78, 5).T * 60, torch.randn(39, 5).T  # sigmoid under- and overflows
    torch.testing.assert_close(results(partial(swiglu, backend="triton"), gate_up, dy), results(reference, gate_up, dy))
    folded = swiglu(gate_up.reshape(5, 3, 26), backend="triton")
    torch.testing.assert_close(folded, reference(gate_up.reshape(5, 3, 26)))


def test_operators_are_well_formed():
    gate_up, dy = torch.randn(5, 12, requires_grad=True), torch.randn(5, 6)
    library.opcheck(module._swiglu, (gate_up,))
    library.opcheck(module._swiglu_backward, (dy, gate_up.detach()))


def test_selective_recomputation_computes_it_again(monkeypatch: pytest.MonkeyPatch):
    x, weight, down = torch.randn(5, 8), torch.randn(12, 8), torch.randn(8, 6)
    launches = []

    def counted(kernel: str, features: int) -> dict:
        launches.append(kernel)
        return {"BLOCK": 16}

    def feed_forward(x: Tensor) -> Tensor:
        return swiglu(x @ weight.T, backend="triton") @ down.T

    monkeypatch.setattr(launch, "swiglu", counted)
    plain = results(feed_forward, x, x)
    assert launches == ["swiglu", "swiglu_backward"]
    again = results(partial(recompute.run, "selective", feed_forward), x, x)
    assert launches[2:] == ["swiglu", "swiglu", "swiglu_backward"]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_equals_hugging_face_with_the_gate_first():
    mlp = MistralMLP(MistralConfig(hidden_size=12, intermediate_size=20))
    x = torch.randn(9, 12)
    gate_up = x @ torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).T
    torch.testing.assert_close(swiglu(gate_up) @ mlp.down_proj.weight.T, mlp(x))


def test_gradient_is_that_of_finite_differences():
    assert torch.autograd.gradcheck(swiglu, torch.randn(3, 8, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_keeps_nothing_but_its_input(backend):
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    gate_up = torch.randn(5, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        swiglu(gate_up, backend=backend)
    assert kept == [gate_up.numel()]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole(backend):
    gate_up, dy = torch.randn(5, 16), torch.randn(5, 8)
    function = partial(swiglu, backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, gate_up, dy), results(function, gate_up, dy))


def test_an_odd_last_dimension_is_refused():
    with pytest.raises(ValueError, match="must be even, got 5"):
        swiglu(torch.zeros(2, 5))
