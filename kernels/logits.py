"""What the losses need of a chunk of logits: statistics of each row, and the gradient that takes the logits' place.

    lse     = log(sum(exp(x)))                      x a row of logits (V,), everything in fp32 (fp64 for fp64)
    nll     = lse - x[target]                       the negative log-likelihood of the target
    entropy = lse - sum(softmax(x) * x)             of the predicted distribution, nats
    correct = the target is the (first) largest logit
    d_x     = w * (1 + 2 * z * lse) * softmax(x) - w * onehot(target)       the gradient of w * (nll + z * lse**2)

A row may be a part of a longer one, its other columns on other ranks: `statistics` gives what `combine` joins to those
of the whole row. All of it is made of one read of the logits, relative to the largest of the row:

    top = max(x)        total = sum(exp(x - top))        dot = sum(exp(x - top) * (x - top))

On a GPU, a row of at most 32768 logits is held in registers from this read until its gradient is written over it: in
fp32 128 KiB, of the 256 that a multiprocessor has. One of 65536 would need them all (kept in bf16 half of them, but
what is made of it spills). So a wider row is read twice, the second time from the L2 cache as far as that reaches: at
most two programs run on a multiprocessor, so an H100's 132 are at up to 264 rows at once, in bf16 27 MB of V 50257 and
68 MB of V 128256, and its cache has 50 MB.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill.kernels import launch
from tokenmill.kernels.layout import IGNORE

_IGNORE = tl.constexpr(IGNORE)
_GROUP = tl.constexpr(8)  # logits that a thread reads at once, of 2 bytes
_LOWEST = tl.constexpr(-1e30)  # below any logit, and finite: 0 times it is 0


class RowStatistics(NamedTuple):
    nll: Tensor  # (R,) fp32, fp64 for fp64; 0 where the target is IGNORE, as entropy
    lse: Tensor  # (R,) of every row, also where the target is IGNORE
    entropy: Tensor  # (R,)
    correct: Tensor  # (R,) bool

    @staticmethod
    def empty(rows: int, like: Tensor) -> RowStatistics:
        wide = accumulator(like)
        return RowStatistics(*(like.new_empty(rows, dtype=dtype) for dtype in (wide, wide, wide, torch.bool)))

    def at(self, rows: slice) -> RowStatistics:
        return RowStatistics(*(values[rows] for values in self))

    def copy_(self, values: RowStatistics) -> None:
        for mine, theirs in zip(self, values, strict=True):
            mine.copy_(theirs)


def accumulator(tensor: Tensor) -> torch.dtype:
    """What sums are made in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def padded(vocab: int) -> int:
    """The distance of rows of logits for which the kernels read and write 16 bytes at once, whatever the vocabulary."""
    return -(-vocab // 64) * 64


# ------------------------------------------------------------------------------------------------------- in torch


def combine(parts: Tensor, targets: Tensor) -> RowStatistics:
    """Of whole rows, from `statistics` (P, 5, R) of their P parts in the order of the columns; targets (R,)."""
    tops, totals, dots, at_targets, corrects = parts.unbind(1)
    top, first = tops.max(0)  # the first of equals
    shift = tops - top
    share = shift.exp()
    total = (share * totals).sum(0)
    dot = (share * (dots + totals * shift)).sum(0)
    here = ~at_targets.isnan()
    # A target that is nowhere divides by 0, and so do NaNs among the logits.
    at_target = at_targets.masked_fill(~here, 0).sum(0) / here.any(0)
    lse = top + total.log()
    kept = targets != IGNORE
    nll = torch.where(kept, lse - at_target, 0)
    entropy = torch.where(kept, total.log() - dot / total, 0)
    return RowStatistics(nll, lse, entropy, corrects.gather(0, first.unsqueeze(0)).squeeze(0) > 0)


def _pieces(logits: Tensor) -> list[slice]:
    """Rows of about 1 MiB of logits: a CPU's caches keep them and what is made of them."""
    rows = max(1, (1 << 21) // (logits.shape[1] * logits.element_size()))
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]


def _statistics_torch(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As `statistics`, and the probabilities (R, V)."""
    wide = logits.to(accumulator(logits))
    inside = (targets >= 0) & (targets < logits.shape[1])
    at_target = wide.gather(1, torch.where(inside, targets, 0).unsqueeze(1)).squeeze(1)
    at_target = at_target.masked_fill(~inside, torch.nan)
    top = wide.amax(-1)
    correct = at_target == top
    likely = correct.nonzero().squeeze(1)  # a CPU's argmax costs as much as the softmax: only rows in question pay it
    correct[likely] = wide[likely].argmax(-1) == targets[likely]
    probabilities = wide.softmax(-1)
    total = 1 / probabilities.amax(-1)
    dot = total * (torch.linalg.vecdot(probabilities, wide) - top)
    return torch.stack([top, total, dot, at_target, correct.to(wide.dtype)]), probabilities


def _scaled_torch(
    logits: Tensor, probabilities: Tensor, targets: Tensor, weights: Tensor, lse: Tensor, z_loss: float
) -> None:
    """logits = d_x; probabilities may be the same tensor."""
    inside = (targets >= 0) & (targets < logits.shape[1])
    column = torch.where(inside, targets, 0).unsqueeze(1)
    scale = (weights * (1 + 2 * z_loss * lse)).unsqueeze(1)
    at_target = probabilities.gather(1, column) * scale - torch.where(inside, weights, 0).unsqueeze(1)
    torch.mul(probabilities, scale, out=logits)
    logits.scatter_(1, column, at_target.to(logits.dtype))


def _rows_torch(logits: Tensor, targets: Tensor, weights: Tensor, z_loss: float, out: RowStatistics) -> None:
    parts, probabilities = _statistics_torch(logits, targets)
    out.copy_(combine(parts.unsqueeze(0), targets))
    _scaled_torch(logits, probabilities, targets, weights, out.lse, z_loss)


def _gradient_torch(logits: Tensor, targets: Tensor, weights: Tensor, lse: Tensor, z_loss: float) -> None:
    probabilities = logits.to(lse.dtype).sub_(lse.unsqueeze(1)).exp_()
    _scaled_torch(logits, probabilities, targets, weights, lse, z_loss)


# ------------------------------------------------------------------------------------------------------ in Triton
#
# One program a row. The target's logit is read before reductions, whose barriers keep it ahead of the gradient that
# overwrites it; a target outside the row shows as NaN.


@triton.jit
def _target(logits, targets, row, VOCAB: tl.constexpr):
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < VOCAB)
    return target, inside, tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _block(logits, columns, VOCAB: tl.constexpr, STRIDE: tl.constexpr):
    """Logits at `columns`; between VOCAB and STRIDE lies padding, which is read for the sake of wide loads."""
    x = tl.load(logits + columns, mask=columns < STRIDE, other=0.0).to(tl.float32)
    return tl.where(columns < VOCAB, x, _LOWEST)


@triton.jit
def _rescaled(top, total, dot, new_top):
    """total and dot relative to another top: where it rises by s, exp(x - top) shrinks by exp(-s) and x - top by s."""
    shift = top - new_top
    share = tl.exp(shift)
    return share * total, share * (dot + total * shift)


@triton.jit
def _scan(logits, VOCAB: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """top, total, dot and the first place of the top, block by block: an online softmax (Milakov and Gimelshein 2018).

    Every _GROUP neighbours of a block, which one thread has, have their own until the end: so threads wait for one
    another once a row, not once a block.
    """
    first = tl.arange(0, BLOCK // _GROUP) * _GROUP
    top = tl.full((BLOCK // _GROUP,), _LOWEST, tl.float32)
    total = tl.zeros_like(top)
    dot = tl.zeros_like(top)
    best = first
    for start in tl.range(0, VOCAB, BLOCK, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        x = _block(logits, start + tl.arange(0, BLOCK), VOCAB, STRIDE).reshape(BLOCK // _GROUP, _GROUP)
        group_top, group_best = tl.max(x, 1, return_indices=True)
        best = tl.where(group_top > top, start + first + group_best, best)
        new_top = tl.maximum(top, group_top)
        total, dot = _rescaled(top, total, dot, new_top)
        x -= new_top[:, None]
        exponentials = tl.exp(x)
        dot += tl.sum(exponentials * x, 1)
        total += tl.sum(exponentials, 1)
        top = new_top
    row_top = tl.max(top, 0)
    total, dot = _rescaled(top, total, dot, row_top)
    best = tl.min(tl.where(top == row_top, best, VOCAB), 0)
    return row_top, tl.sum(total, 0), tl.sum(dot, 0), best


@triton.jit
def _overwrite(
    logits, base, scale, VOCAB: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """logits = scale * exp(logits - base)."""
    for start in tl.range(0, VOCAB, BLOCK, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        columns = start + tl.arange(0, BLOCK)
        x = _block(logits, columns, VOCAB, STRIDE)
        tl.store(logits + columns, scale * tl.exp(x - base), mask=columns < STRIDE)


@triton.jit
def _statistics_kernel(
    logits, targets, out, rows,
    VOCAB: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * STRIDE
    target, _, at_target = _target(logits, targets, row, VOCAB)
    top, total, dot, best = _scan(logits, VOCAB, STRIDE, BLOCK, STAGES)
    out += row
    tl.store(out, top)
    tl.store(out + rows, total)
    tl.store(out + 2 * rows, dot)
    tl.store(out + 3 * rows, at_target)
    tl.store(out + 4 * rows, (best == target).to(tl.float32))


@triton.jit
def _gradient_kernel(
    logits, targets, weights, lse, z_loss,
    VOCAB: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * STRIDE
    target, inside, at_target = _target(logits, targets, row, VOCAB)
    row_lse = tl.load(lse + row)
    weight = tl.load(weights + row)
    scale = weight * (1.0 + 2.0 * z_loss * row_lse)
    tl.debug_barrier()
    _overwrite(logits, row_lse, scale, VOCAB, STRIDE, BLOCK, STAGES)
    tl.debug_barrier()  # the target's own element comes last, and alone: compared in each, it would spill registers
    tl.store(logits + target, scale * tl.exp(at_target - row_lse) - weight, mask=inside)


@triton.jit
def _rows_kernel(
    logits, targets, weights, nll, lse, entropy, correct, z_loss,
    VOCAB: tl.constexpr, STRIDE: tl.constexpr, ONCE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Statistics and gradient in one. ONCE: the row fits in a block and is held in registers from its only read on.

    A longer row is read twice.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * STRIDE
    target, inside, at_target = _target(logits, targets, row, VOCAB)
    columns = tl.arange(0, BLOCK)
    if ONCE:
        x = _block(logits, columns, VOCAB, STRIDE)
        top, best = tl.max(x, 0, return_indices=True)
        x -= top
        exponentials = tl.exp(x)
        total = tl.sum(exponentials, 0)
        dot = tl.sum(exponentials * x, 0)
    else:
        top, total, dot, best = _scan(logits, VOCAB, STRIDE, BLOCK, STAGES)

    kept = target != _IGNORE
    row_lse = top + tl.log(total)
    tl.store(nll + row, tl.where(kept, row_lse - at_target, 0.0))
    tl.store(lse + row, row_lse)
    tl.store(entropy + row, tl.where(kept, tl.log(total) - dot / total, 0.0))  # pyright: ignore[reportOperatorIssue]
    tl.store(correct + row, best == target)

    weight = tl.load(weights + row)
    scale = weight * (1.0 + 2.0 * z_loss * row_lse) / total
    if ONCE:
        tl.store(logits + columns, scale * exponentials, mask=columns < STRIDE)  # pyright: ignore[reportPossiblyUnboundVariable]
    else:
        _overwrite(logits, top, scale, VOCAB, STRIDE, BLOCK, STAGES)
    tl.debug_barrier()  # as above
    tl.store(logits + target, scale * tl.exp(at_target - top) - weight, mask=inside)


# ------------------------------------------------------------------------------------------------------ functions
#
# logits (R, V) are rows `padded(V)` apart for the kernels; targets (R,) int64, IGNORE where none counts; weights (R,)
# 0 there.


@launch.on_its_device
def statistics(logits: Tensor, targets: Tensor, use_triton: bool) -> Tensor:
    """(5, R): top, total, dot, the target's logit (NaN where it is not in the row), and correct as 0 or 1."""
    if not use_triton:
        return torch.cat([_statistics_torch(logits[at], targets[at])[0] for at in _pieces(logits)], 1)
    rows, vocab = logits.shape
    out = logits.new_empty(5, rows, dtype=accumulator(logits))
    settings = launch.cross_entropy_scan("cross_entropy_statistics", vocab)
    settings |= {"VOCAB": vocab, "STRIDE": logits.stride(0)}
    _statistics_kernel[(rows,)](logits, targets, out, rows, **settings)
    return out


@launch.on_its_device
def gradient(logits: Tensor, targets: Tensor, weights: Tensor, lse: Tensor, z_loss: float, use_triton: bool) -> None:
    """Overwrite logits by d_x, given the lse (R,) of the whole rows."""
    if not use_triton:
        for at in _pieces(logits):
            _gradient_torch(logits[at], targets[at], weights[at], lse[at], z_loss)
        return
    rows, vocab = logits.shape
    settings = launch.cross_entropy_scan("cross_entropy_gradient", vocab)
    settings |= {"VOCAB": vocab, "STRIDE": logits.stride(0)}
    _gradient_kernel[(rows,)](logits, targets, weights, lse, z_loss, **settings)


@launch.on_its_device
def statistics_and_gradient(
    logits: Tensor, targets: Tensor, weights: Tensor, z_loss: float, out: RowStatistics, use_triton: bool
) -> None:
    """Of whole rows: fill `out`, and overwrite logits by d_x."""
    if not use_triton:
        for at in _pieces(logits):
            _rows_torch(logits[at], targets[at], weights[at], z_loss, out.at(at))
        return
    rows, vocab = logits.shape
    settings: dict[str, Any] = launch.cross_entropy_row(vocab) | {"VOCAB": vocab, "STRIDE": logits.stride(0)}
    _rows_kernel[(rows,)](logits, targets, weights, *out, z_loss, **settings)
