"""Rotary embedding against Hugging Face's and the rotation of complex numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, library
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding, apply_rotary_pos_emb

from tokenmill.kernels import rotary
from tokenmill.kernels.layout import Layout
from tokenmill.kernels.rotary import apply_rotary, reference

THETA = 1e4


def inputs(tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.randn(tokens, heads, head_dim).to(dtype) for heads in (6, 3, 6, 3))  # type: ignore[return-value]


def results(function, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> list[Tensor]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = function(q, k)
    return [*out, *torch.autograd.grad(out, (q, k), (dq, dk))]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [  # the interpreter truncates to bf16 where a GPU rounds
        *[("torch", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)],
        *[("triton", dtype) for dtype in (torch.float32, torch.float16)],
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [2, 10, 80])
@pytest.mark.parametrize("lengths", [[1], [1, 17, 111]], ids=str)
def test_error_is_that_of_pytorch_at_most_twice(lengths: list[int], head_dim: int, backend, dtype: torch.dtype):
    layout = Layout.from_lengths(lengths)
    tensors = inputs(sum(lengths), head_dim, dtype)

    def turned(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return reference(q, layout.positions, THETA), reference(k, layout.positions, THETA)

    exact = results(turned, *(t.double() for t in tensors))
    ours = results(lambda q, k: apply_rotary(q, k, layout, THETA, backend=backend), *tensors)
    theirs = results(turned, *tensors)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        # The reference is given the same float32 angles, whose sines float64 sees exactly.
        assert (a - e).norm() <= 2 * (b - e).norm() + max(torch.finfo(dtype).eps, 1e-7) * e.norm()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equals_hugging_face_document_by_document(backend):
    lengths, head_dim = [5, 1, 40], 16
    layout = Layout.from_lengths(lengths)
    q, k, dq, dk = inputs(46, head_dim, torch.float32)
    config = MistralConfig(hidden_size=96, num_attention_heads=6, head_dim=head_dim)
    config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
    embedding = MistralRotaryEmbedding(config)
    start = 0
    ours = results(lambda q, k: apply_rotary(q, k, layout, THETA, backend=backend), q, k, dq, dk)
    for length in lengths:
        rows = slice(start, start + length)
        cos, sin = embedding(q, torch.arange(length)[None])

        def theirs(q: Tensor, k: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> tuple[Tensor, Tensor]:
            turned = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
            return turned[0][0].transpose(0, 1), turned[1][0].transpose(0, 1)

        for a, b in zip(ours, results(theirs, q[rows], k[rows], dq[rows], dk[rows]), strict=True):
            torch.testing.assert_close(a[rows], b, rtol=0, atol=1e-6)
        start += length


def test_slices_of_one_product_are_read_where_they_lie():
    """And the gradients, whatever their strides, of which those of a sum are all 0."""
    layout, heads = Layout.from_lengths([4, 9]), (6, 2, 2)
    qkv = torch.randn(13, 10, 16)
    found = []
    for backend in ("torch", "triton"):
        leaf = qkv.clone().requires_grad_()
        q, k, _ = leaf.split(heads, dim=1)
        q, k = apply_rotary(q, k, layout, THETA, backend=backend)
        assert q.is_contiguous()
        assert k.is_contiguous()
        # Laid out heads first, as some attention kernels leave them.
        d_q, d_k, _ = qkv.flip(0).transpose(0, 1).contiguous().transpose(0, 1).split(heads, dim=1)
        found.append([q, k, *torch.autograd.grad((q, k), leaf, (d_q, d_k), retain_graph=True)])
        found[-1] += torch.autograd.grad(q.sum() + k[:, 1].sum(), leaf)
    torch.testing.assert_close(*found)


def test_no_rows_and_one_output_unused():
    layout = Layout.from_lengths([])
    turned = apply_rotary(torch.empty(0, 6, 8), torch.empty(0, 2, 8), layout, THETA, backend="triton")
    assert [x.shape for x in turned] == [(0, 6, 8), (0, 2, 8)]
    q, k = torch.randn(3, 6, 8, requires_grad=True), torch.randn(3, 2, 8, requires_grad=True)
    turned = apply_rotary(q, k, Layout.from_lengths([3]), THETA, backend="triton")
    turned[1].square().sum().backward()
    assert q.grad is not None
    assert not q.grad.any()
    torch.testing.assert_close(k.grad, 2 * k.detach())


def test_operator_is_well_formed():
    layout = Layout.from_lengths([2, 3])
    q, k, *_ = inputs(5, 12, torch.float32)
    table = rotary._table(layout.positions, 12, THETA)
    for inverse in (False, True):
        library.opcheck(rotary._rotary, (q.requires_grad_(), k.requires_grad_(), *table, inverse))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole(backend):
    layout, tensors = Layout.from_lengths([2, 3]), inputs(5, 12, torch.float32)

    def turn(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary(q, k, layout, THETA, backend=backend)

    compiled = torch.compile(turn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, *tensors), results(turn, *tensors))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_table_is_made_once_for_each_theta_and_head_dim(backend):
    layout = Layout.from_lengths([4])
    for theta in (1e4, 1e6):
        for head_dim in (4, 8):
            q = torch.ones(4, 1, head_dim)
            turned = apply_rotary(q, q, layout, theta, backend=backend)[0]
            torch.testing.assert_close(turned, reference(q, layout.positions, theta))
    tables = dict(layout._derived)
    apply_rotary(torch.ones(4, 1, 8), torch.ones(4, 1, 8), layout, 1e6, backend=backend)
    assert len(tables) == 4
    assert all(layout._derived[key] is table for key, table in tables.items())


def test_wrong_shapes_are_named():
    layout = Layout.from_lengths([4])
    with pytest.raises(ValueError, match="even head dim, got 3 and 3"):
        apply_rotary(torch.zeros(4, 1, 3), torch.zeros(4, 1, 3), layout, THETA)
    with pytest.raises(ValueError, match="q has 5 rows and k 5, the layout 4"):
        apply_rotary(torch.zeros(5, 1, 2), torch.zeros(5, 1, 2), layout, THETA)
