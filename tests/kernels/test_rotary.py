"""Rotary embedding against Hugging Face's and the rotation of complex numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding, apply_rotary_pos_emb

from tokenmill.kernels.layout import Layout
from tokenmill.kernels.rotary import apply_rotary, reference

THETA = 1e4


def inputs(tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.randn(tokens, heads, head_dim).to(dtype) for heads in (6, 2, 6, 2))  # type: ignore[return-value]


def results(function, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> list[Tensor]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = function(q, k)
    return [*out, *torch.autograd.grad(out, (q, k), (dq, dk))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("head_dim", [2, 10, 64])
def test_error_is_that_of_pytorch_at_most_twice(head_dim: int, dtype: torch.dtype):
    layout = Layout.from_lengths([1, 17, 300, 3])
    tensors = inputs(321, head_dim, dtype)

    def turned(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return reference(q, layout.positions, THETA), reference(k, layout.positions, THETA)

    exact = results(turned, *(t.double() for t in tensors))
    ours, theirs = results(lambda q, k: apply_rotary(q, k, layout, THETA), *tensors), results(turned, *tensors)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        # The reference is given the same float32 angles, whose sines float64 sees exactly.
        assert (a - e).norm() <= 2 * (b - e).norm() + max(torch.finfo(dtype).eps, 1e-7) * e.norm()


def test_equals_hugging_face_document_by_document():
    lengths, head_dim = [5, 1, 40], 16
    layout = Layout.from_lengths(lengths)
    q, k, dq, dk = inputs(46, head_dim, torch.float32)
    config = MistralConfig(hidden_size=96, num_attention_heads=6, head_dim=head_dim)
    config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
    embedding = MistralRotaryEmbedding(config)
    start = 0
    ours = results(lambda q, k: apply_rotary(q, k, layout, THETA), q, k, dq, dk)
    for length in lengths:
        rows = slice(start, start + length)
        cos, sin = embedding(q, torch.arange(length)[None])

        def theirs(q: Tensor, k: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> tuple[Tensor, Tensor]:
            turned = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
            return turned[0][0].transpose(0, 1), turned[1][0].transpose(0, 1)

        for a, b in zip(ours, results(theirs, q[rows], k[rows], dq[rows], dk[rows]), strict=True):
            torch.testing.assert_close(a[rows], b, rtol=0, atol=1e-6)
        start += length


def test_the_table_is_made_once_for_each_theta_and_head_dim():
    layout = Layout.from_lengths([4])
    for theta in (1e4, 1e6):
        for head_dim in (4, 8):
            q = torch.ones(4, 1, head_dim)
            turned = apply_rotary(q, q, layout, theta)[0]
            torch.testing.assert_close(turned, reference(q, layout.positions, theta))
    tables = dict(layout._derived)
    apply_rotary(torch.ones(4, 1, 8), torch.ones(4, 1, 8), layout, 1e6)
    assert len(tables) == 4
    assert all(layout._derived[key] is table for key, table in tables.items())


def test_wrong_shapes_are_named():
    layout = Layout.from_lengths([4])
    with pytest.raises(ValueError, match="even head dim, got 3 and 3"):
        apply_rotary(torch.zeros(4, 1, 3), torch.zeros(4, 1, 3), layout, THETA)
    with pytest.raises(ValueError, match="q has 5 rows and k 5, the layout 4"):
        apply_rotary(torch.zeros(5, 1, 2), torch.zeros(5, 1, 2), layout, THETA)
