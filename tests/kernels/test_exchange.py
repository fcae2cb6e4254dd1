"""Experts spread over ranks, which one process plays in turn: the whole layer's outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenmill.kernels.moe import combine, experts, moe, permute, route
from tokenmill.kernels.moe.exchange import arrange, restore, send_counts

EXPERTS, TOP_K, DIM, HIDDEN = 8, 2, 8, 12


def all_to_all(parts: list[list[Tensor]]) -> list[Tensor]:
    """parts[source][destination] to what each destination gets, source after source."""
    return [torch.cat(received) for received in zip(*parts, strict=True)]


@pytest.mark.parametrize("backend", ["reference", "grouped_mm", "triton"])
@pytest.mark.parametrize("tokens", [[13], [9, 4], [5, 0, 7, 1], [3, 0, 0, 0, 2, 2, 1, 30]], ids=str)
@pytest.mark.parametrize("kind", ["spread", "all to one"])
def test_ranks_together_are_the_whole_layer(tokens: list[int], kind: str, backend: str):
    ranks, total = len(tokens), sum(tokens)
    dtype = torch.float64 if backend == "reference" else torch.float32
    logits = torch.randn(total, EXPERTS, dtype=dtype)
    if kind == "all to one":
        logits[:, 3] += 50
    leaves = [
        t.requires_grad_()
        for t in (
            torch.randn(total, DIM, dtype=dtype),
            logits,
            torch.randn(EXPERTS, 2 * HIDDEN, DIM, dtype=dtype),
            torch.randn(EXPERTS, DIM, HIDDEN, dtype=dtype),
        )
    ]
    x, logits, w_gate_up, w_down = leaves
    dy = torch.randn_like(x)
    expected, _ = moe(x, logits, w_gate_up, w_down, TOP_K, backend=backend)

    routings = [route(part, TOP_K) for part in logits.split(tokens)]
    permuted = [permute(part, routing) for part, routing in zip(x.split(tokens), routings, strict=True)]
    sent = [send_counts(p.offsets, ranks) for p in permuted]
    received = [counts.view(ranks, -1) for counts in all_to_all([[*counts.split(1)] for counts in sent])]
    to_each = [[*p.xs.split(counts.sum(1).tolist())] for p, counts in zip(permuted, sent, strict=True)]
    answers = []
    for rank, (rows, counts) in enumerate(zip(all_to_all(to_each), received, strict=True)):
        mine = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
        xs, offsets, order, inverse = arrange(rows, counts)
        assert offsets.tolist() == counts.sum(0).cumsum(0).tolist()
        ys = restore(experts(xs, offsets, w_gate_up[mine], w_down[mine], backend), order, inverse)
        answers.append([*ys.split(counts.sum(1).tolist())])
    y = torch.cat([combine(*back) for back in zip(all_to_all(answers), permuted, routings, strict=True)])

    bound = 1e-12 if backend == "reference" else 2e-6
    gradients = torch.autograd.grad(y, leaves, dy)
    for a, b in zip((y, *gradients), (expected, *torch.autograd.grad(expected, leaves, dy)), strict=True):
        assert (a - b).norm() <= bound * b.norm()


def test_experts_that_cannot_be_shared_are_named():
    with pytest.raises(ValueError, match="8 experts cannot be shared evenly by 3 ranks"):
        send_counts(torch.arange(8, dtype=torch.int32), 3)
