"""RMSNorm against Hugging Face's module and float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from tokenmill.kernels.rms_norm import reference, rms_norm

EPS = 1e-5


def inputs(tokens: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*s, dtype=torch.float64).to(dtype) for s in ((tokens, dim), (dim,), (tokens, dim)))  # type: ignore[return-value]


def results(function, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight, EPS)
    return [y, *torch.autograd.grad(y, (x, weight), dy)]


@pytest.mark.parametrize("shape", [(1, 2), (1, 7), (13, 96), (257, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_that_of_pytorch_at_most_twice(shape: tuple[int, int], dtype: torch.dtype):
    x, weight, dy = inputs(*shape, dtype)
    exact = results(reference, x.double(), weight.double(), dy.double())
    ours, theirs = results(rms_norm, x, weight, dy), results(reference, x, weight, dy)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        # Half types are rounded where PyTorch's are; float32 has room to differ where both are near exact.
        slack = torch.finfo(torch.float32).eps * e.norm()
        assert (a - e).norm() <= 2 * (b - e).norm() + slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_hugging_face(dtype: torch.dtype):
    x, weight, dy = inputs(33, 128, dtype)
    module = MistralRMSNorm(128, eps=EPS).to(dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
    hf_x = x.clone().requires_grad_()
    hf_y = module(hf_x)
    expected = (hf_y, *torch.autograd.grad(hf_y, (hf_x, module.weight), dy))
    ours = results(rms_norm, x, weight, dy)
    # The forward pass rounds where theirs does; their backward rounds more often than ours.
    tolerances = {torch.float32: [1e-6] * 3, torch.bfloat16: [5e-4, 1e-2, 1e-2]}[dtype]
    for a, b, tolerance in zip(ours, expected, tolerances, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_gradient_is_that_of_finite_differences():
    x, weight, _ = inputs(3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x.requires_grad_(), weight.requires_grad_()))


def test_residual_is_added_before_and_handed_on():
    x, weight, dy = inputs(9, 24, torch.float64)
    residual, d_total = torch.randn(2, 9, 24, dtype=torch.float64)
    for leaf in (x, residual, weight):
        leaf.requires_grad_()
    y, total = rms_norm(x, weight, EPS, residual)
    gradients = torch.autograd.grad((y, total), (x, residual, weight), (dy, d_total))
    assert torch.equal(total, x + residual)
    expected_total = x + residual
    expected = torch.autograd.grad(
        (reference(expected_total, weight, EPS), expected_total), (x, residual, weight), (dy, d_total)
    )
    torch.testing.assert_close(y, reference(total, weight, EPS))
    torch.testing.assert_close(gradients, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
def test_compiles_whole():
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    x, weight, dy = inputs(5, 16, torch.float32)
    for a, b in zip(results(compiled, x, weight, dy), results(rms_norm, x, weight, dy), strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), expected \(4,\)"):
        rms_norm(torch.zeros(2, 4), torch.zeros(3), EPS)
    with pytest.raises(ValueError, match="residual has shape"):
        rms_norm(torch.zeros(2, 4), torch.zeros(4), EPS, torch.zeros(1, 4))
