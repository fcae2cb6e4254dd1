"""RMSNorm against Hugging Face's module and float64, forward and backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, library
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from tokenmill.kernels import launch
from tokenmill.kernels import rms_norm as module
from tokenmill.kernels.rms_norm import reference, rms_norm

# Triton 3.6's interpreter makes numbers of a loop's bounds in a way that NumPy is about to forbid.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

EPS = 1e-5
# The interpreter truncates to bf16 where a GPU rounds, so there the kernels are tested in the other types.
BACKENDS = [
    *[("torch", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)],
    *[("triton", dtype) for dtype in (torch.float32, torch.float16)],
]


def inputs(tokens: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*s, dtype=torch.float64).to(dtype) for s in ((tokens, dim), (dim,), (tokens, dim)))  # type: ignore[return-value]


def results(function, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight, EPS)
    return [y, *torch.autograd.grad(y, (x, weight), dy)]


def check_error(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """Ours is at most twice PyTorch's."""
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        # Half types are rounded where PyTorch's are; float32 has room to differ where both are near exact.
        slack = torch.finfo(torch.float32).eps * e.norm()
        assert (a - e).norm() <= 2 * (b - e).norm() + slack


@pytest.mark.parametrize("shape", [(1, 2), (1, 7), (13, 96), (17, 1030), (129, 64)], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
def test_error_is_that_of_pytorch_at_most_twice(shape: tuple[int, int], backend, dtype: torch.dtype):
    x, weight, dy = inputs(*shape, dtype)
    exact = results(reference, x.double(), weight.double(), dy.double())
    ours = results(partial(rms_norm, backend=backend), x, weight, dy)
    check_error(ours, results(reference, x, weight, dy), exact, dtype)


@pytest.mark.parametrize("shape", [(1, 7), (17, 1030), (129, 64)], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
def test_error_after_the_addition_is_that_of_pytorch_at_most_twice(shape: tuple[int, int], backend, dtype: torch.dtype):
    x, weight, dy = inputs(*shape, dtype)
    residual, d_total = torch.randn(2, *shape, dtype=torch.float64).to(dtype)

    def gradients(function, *tensors: Tensor) -> list[Tensor]:
        *leaves, dy, d_total = (t.detach().requires_grad_() for t in tensors)
        y, total = function(*leaves)
        return [y, total, *torch.autograd.grad((y, total), leaves, (dy, d_total))]

    def theirs(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = (x + residual).to(dtype).to(x.dtype)  # it is the rounded sum that is normalised
        return reference(total, weight, EPS), total

    def ours(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, EPS, residual, backend=backend)

    tensors = (x, weight, residual, dy, d_total)
    results = gradients(ours, *tensors)
    assert torch.equal(results[1], x + residual)
    check_error(results, gradients(theirs, *tensors), gradients(theirs, *(t.double() for t in tensors)), dtype)


def test_only_one_of_both_outputs_may_have_a_gradient():
    x, weight, dy = inputs(5, 24, torch.float32)
    for output in (0, 1):
        found = []
        for backend in ("torch", "triton"):
            leaves = [t.clone().requires_grad_() for t in (x, x.flip(0), weight)]
            pair = rms_norm(leaves[0], leaves[2], EPS, leaves[1], backend=backend)
            pair[output].backward(dy)
            found.append([leaf.grad for leaf in leaves])
        assert (found[0][2] is None) == (found[1][2] is None) == (output == 1)
        torch.testing.assert_close(*found)


def test_strided_wide_and_empty_tensors():
    x, weight, dy = inputs(6, 24, torch.float32)
    triton = partial(rms_norm, backend="triton")
    expected = results(reference, x, weight, dy)
    strided = results(triton, x.T.contiguous().T, weight.repeat_interleave(2)[::2], dy.T.contiguous().T)
    torch.testing.assert_close(strided, expected)
    folded = results(triton, x.view(2, 3, 24), weight, dy.view(2, 3, 24))
    torch.testing.assert_close([t.view(e.shape) for t, e in zip(folded, expected, strict=True)], expected)
    empty = results(triton, x[:0], weight, dy[:0])
    assert [*map(torch.Tensor.numel, empty)] == [0, 0, 24]
    assert not empty[2].any()


@pytest.mark.parametrize("programs", [1, 3, 40])
def test_the_weight_gradient_is_summed_in_a_fixed_order(programs: int, monkeypatch: pytest.MonkeyPatch):
    def few(dim, itemsize, device):
        return programs, {"BLOCK": 32, "STAGES": 2}

    monkeypatch.setattr(launch, "rms_norm_backward", few)
    x, weight, dy = inputs(33, 20, torch.float32)
    first, again = (results(partial(rms_norm, backend="triton"), x, weight, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.testing.assert_close(first, results(reference, x, weight, dy))


def test_operators_are_well_formed():
    x, weight, dy = inputs(5, 20, torch.float32)
    inverse = torch.rand(5)
    leaves = [t.clone().requires_grad_() for t in (x, dy, weight)]
    library.opcheck(module._rms_norm, (leaves[0], None, leaves[2], EPS))
    library.opcheck(module._rms_norm, (*leaves, EPS))
    library.opcheck(module._rms_norm_backward, (dy, None, x, weight, inverse))
    library.opcheck(module._rms_norm_backward, (dy, dy, x, weight, inverse))


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
def test_equals_hugging_face(backend, dtype: torch.dtype):
    x, weight, dy = inputs(33, 128, dtype)
    module = MistralRMSNorm(128, eps=EPS).to(dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
    hf_x = x.clone().requires_grad_()
    hf_y = module(hf_x)
    expected = (hf_y, *torch.autograd.grad(hf_y, (hf_x, module.weight), dy))
    ours = results(partial(rms_norm, backend=backend), x, weight, dy)
    # The forward pass rounds where theirs does; their backward rounds more often than ours.
    tolerances = {torch.float32: [1e-6] * 3, torch.float16: [5e-5, 1e-3, 1e-3], torch.bfloat16: [5e-4, 1e-2, 1e-2]}
    for a, b, tolerance in zip(ours, expected, tolerances[dtype], strict=True):
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
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole(backend):
    def layer(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, total = rms_norm(x, weight, eps, x * 2, backend=backend)
        return rms_norm(y + total, weight, eps, backend=backend)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    tensors = inputs(5, 16, torch.float32)
    torch.testing.assert_close(results(compiled, *tensors), results(layer, *tensors))


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), expected \(4,\)"):
        rms_norm(torch.zeros(2, 4), torch.zeros(3), EPS)
    with pytest.raises(ValueError, match="residual has shape"):
        rms_norm(torch.zeros(2, 4), torch.zeros(4), EPS, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="takes rows of at most 8192, got 8193"):
        rms_norm(torch.zeros(2, 8193), torch.zeros(8193), EPS, backend="triton")
