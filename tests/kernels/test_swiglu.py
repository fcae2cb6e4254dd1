"""SwiGLU against Hugging Face's MLP and float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralMLP

from tokenmill.kernels.swiglu import reference, swiglu


def results(function, gate_up: Tensor, dy: Tensor) -> list[Tensor]:
    gate_up = gate_up.detach().requires_grad_()
    y = function(gate_up)
    return [y, *torch.autograd.grad(y, gate_up, dy)]


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (7, 13), (65, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_error_is_that_of_pytorch_at_most_twice(shape: tuple[int, int], dtype: torch.dtype):
    tokens, hidden_dim = shape
    gate_up, dy = torch.randn(tokens, 2 * hidden_dim).mul(3).to(dtype), torch.randn(shape).to(dtype)
    exact = results(reference, gate_up.double(), dy.double())
    for a, b, e in zip(results(swiglu, gate_up, dy), results(reference, gate_up, dy), exact, strict=True):
        assert a.dtype == dtype
        assert (a - e).norm() <= 2 * (b - e).norm() + torch.finfo(dtype).eps * e.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_rounded_once(dtype: torch.dtype):
    gate_up, dy = torch.randn(7, 26).to(dtype), torch.randn(7, 13).to(dtype)
    in_float32 = results(reference, gate_up.float(), dy.float())
    for a, b in zip(results(swiglu, gate_up, dy), in_float32, strict=True):
        assert torch.equal(a, b.to(dtype))


def test_equals_hugging_face_with_the_gate_first():
    mlp = MistralMLP(MistralConfig(hidden_size=12, intermediate_size=20))
    x = torch.randn(9, 12)
    gate_up = x @ torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).T
    torch.testing.assert_close(swiglu(gate_up) @ mlp.down_proj.weight.T, mlp(x))


def test_gradient_is_that_of_finite_differences():
    assert torch.autograd.gradcheck(swiglu, torch.randn(3, 8, dtype=torch.float64).requires_grad_())


def test_keeps_nothing_but_its_input():
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    gate_up = torch.randn(5, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        swiglu(gate_up)
    assert kept == [gate_up.numel()]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
def test_compiles_whole():
    gate_up, dy = torch.randn(5, 16), torch.randn(5, 8)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, gate_up, dy), results(swiglu, gate_up, dy), strict=True):
        torch.testing.assert_close(a, b)


def test_an_odd_last_dimension_is_refused():
    with pytest.raises(ValueError, match="must be even, got 5"):
        swiglu(torch.zeros(2, 5))
