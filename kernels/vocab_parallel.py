"""Linear cross-entropy with the head split over ranks by its rows: each holds a slice of the vocabulary.

Every rank of a process group has the same hidden states and targets and its own slice of the weight, and gets the same
loss as the whole head gives. With hidden (T, D) and weight (v, D) this rank's v of the V rows, chunk by chunk of T:

    logits = hidden @ weight.T      (C, v)
    parts  = the statistics of each row of them, five numbers, gathered from all ranks and combined to those of the
             whole row (logits.py)
    logits = their gradient, given the whole row's lse
    d_hidden = logits @ weight      summed over the ranks, once for all chunks
    d_weight += logits.T @ hidden   this rank's slice of the whole

Traffic: 20 bytes a row and rank for the statistics, and d_hidden once, in its own dtype.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, library
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

from tokenmill.kernels import logits
from tokenmill.kernels.backends import Backend, choose
from tokenmill.kernels.cross_entropy import (
    LossOutput,
    check,
    chunked,
    fake_linear_cross_entropy,
    gather,
    row_weights,
    scatter,
    weighted_loss,
    with_gradients,
)
from tokenmill.kernels.layout import IGNORE
from tokenmill.kernels.logits import RowStatistics, accumulator


@library.custom_op("tokenmill::vocab_parallel_cross_entropy", mutates_args=())
def _vocab_parallel_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None, rows: Tensor | None, z_loss: float,
    of_hidden: bool, of_weight: bool, first: int, group: str, use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, nll, correct, entropy, d_hidden, d_weight; a gradient that is not asked for is empty."""
    ranks = _resolve_process_group(group)  # pyright: ignore[reportArgumentType]  (a str under another name)
    total = hidden.shape[0]
    hidden, targets = gather(hidden, rows), gather(targets, rows)
    weights = row_weights(token_weights, targets, rows, accumulator(hidden))
    own = torch.where(targets == IGNORE, IGNORE, targets - first)  # outside [0, v) where another rank's
    of_rows = RowStatistics.empty(hidden.shape[0], like=hidden)

    def overwrite(chunk: Tensor, at: slice) -> None:
        part = logits.statistics(chunk, own[at], use_triton)
        parts = part.new_empty(ranks.size(), *part.shape)
        dist.all_gather([*parts], part, group=ranks)
        of_chunk = of_rows.at(at)
        of_chunk.copy_(logits.combine(parts, targets[at]))
        if of_hidden or of_weight:
            logits.gradient(chunk, own[at], weights[at], of_chunk.lse, z_loss, use_triton)

    d_hidden, d_weight = chunked(hidden, weight, overwrite, of_hidden, of_weight, use_triton)
    if of_hidden:
        dist.all_reduce(d_hidden, group=ranks)
        d_hidden = scatter(d_hidden, rows, total)
    return (
        weighted_loss(of_rows, weights, z_loss),
        scatter(of_rows.nll, rows, total),
        scatter(of_rows.correct, rows, total),
        scatter(of_rows.entropy, rows, total),
        d_hidden,
        d_weight,
    )


_vocab_parallel_cross_entropy.register_fake(fake_linear_cross_entropy)


def vocab_parallel_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: ProcessGroup,
    *,
    first: int,
    token_weights: Tensor | None = None,
    rows: Tensor | None = None,
    z_loss: float = 0.0,
    backend: Backend = "auto",
) -> LossOutput:
    """`linear_cross_entropy` of a head whose rows are split over the ranks of `group`.

    weight (v, D), v >= 1: this rank's rows of the head (V, D), of which the first is its row `first`; ranks hold
    slices in order, that need not be of one length. All else is the same on every rank, what requires a gradient
    included, and the results are, bit by bit. The gradient of hidden is the whole one on every rank, that of weight
    is its slice's.

    Raises ValueError as `linear_cross_entropy` does, and where weight is empty. A target that is in no slice makes a
    NaN.
    """
    use_triton = choose(backend, hidden, weight) == "triton"
    check(hidden, weight, targets, token_weights, rows)
    if weight.shape[0] == 0:
        raise ValueError("weight: expected at least one row of the head on every rank; split it over fewer ranks")
    grad = torch.is_grad_enabled()
    of_hidden, of_weight = grad and hidden.requires_grad, grad and weight.requires_grad
    loss, nll, correct, entropy, d_hidden, d_weight = _vocab_parallel_cross_entropy(
        hidden.detach(), weight.detach(), targets, token_weights, rows, z_loss,
        of_hidden, of_weight, first, group.group_name, use_triton,
    )  # fmt: skip
    if of_hidden or of_weight:
        loss = with_gradients(loss, hidden, weight, d_hidden, d_weight, use_triton)
    return LossOutput(loss, nll, correct, entropy)
