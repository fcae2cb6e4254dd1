"""Cross-entropy of a linear layer's logits, and log-probabilities of given tokens, without a (T, V) tensor.

    logits = hidden @ weight.T                      hidden (T, D), weight (V, D)
    lse    = log(sum(exp(logits)))                  over V, as everything here in fp32 (fp64 for fp64 inputs)
    nll    = lse - logits[target]                   the negative log-likelihood of the target
    loss   = sum(w * (nll + z * lse**2))            w a weight a row, z the z-loss of PaLM (Chowdhery et al. 2022)

`linear_cross_entropy` makes its gradients in the forward pass, chunk by chunk: a chunk's logits are overwritten by

    d_logits = w * (1 + 2 * z * lse) * softmax(logits) - w * onehot(target)

which two more products turn into d_hidden = d_logits @ weight and d_weight += d_logits.T @ hidden. Backward has only
to multiply both by the gradient of the loss, a scalar: three products in all.

`token_logprobs` returns -nll. Its upstream gradient is not known in the forward pass, so backward makes the logits of
each chunk again: four products. It is the same formula with w the negative upstream gradient and z = 0.

Where a target is IGNORE, w, nll and both gradients are 0; so they are in rows left out by `rows`, which do not enter
the products at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from tokenmill.kernels import launch
from tokenmill.kernels.backends import Backend, choose
from tokenmill.kernels.layout import IGNORE

_IGNORE = tl.constexpr(IGNORE)


class LossOutput(NamedTuple):
    loss: Tensor  # () fp32, fp64 for fp64 inputs
    nll: Tensor  # (T,) of the same dtype, detached, 0 on rows left out
    correct: Tensor  # (T,) bool: the target is the (first) largest logit; False on rows left out


# ---------------------------------------------------------------------------------------------------- reference


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None = None, z_loss: float = 0.0
) -> LossOutput:
    """The definition, differentiable, with all logits in memory."""
    logits = (hidden @ weight.T).to(_accumulator(hidden))
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    lse = logits.logsumexp(-1) * (targets != IGNORE)
    row_loss = nll + z_loss * lse**2
    loss = (row_loss if token_weights is None else row_loss * token_weights).sum()
    return LossOutput(loss, nll.detach(), logits.argmax(-1) == targets)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# ---------------------------------------------------------------------------------- one chunk of logits, in torch


def _rows_torch(
    logits: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float, nll: Tensor, lse: Tensor, correct: Tensor
) -> None:
    """Fill nll, lse and correct (R,) from logits (R, V); with weights (R,), overwrite logits by their gradient."""
    wide = logits.to(nll.dtype)
    kept = targets != IGNORE
    outside = kept & ((targets < 0) | (targets >= logits.shape[1]))
    if not logits.is_cuda and outside.any():  # a GPU's index kernels check by themselves, and waiting would cost
        target = int(targets[outside][0])
        raise ValueError(f"target {target} is outside the vocabulary of {logits.shape[1]}; {IGNORE} is to be ignored")
    target = torch.where(kept, targets, 0).unsqueeze(1)
    at_target = wide.gather(1, target).squeeze(1)
    top = wide.amax(-1)
    correct.copy_(at_target == top)
    likely = correct.nonzero().squeeze(1)  # a CPU's argmax costs as much as the softmax: only rows in question pay it
    correct[likely] = wide[likely].argmax(-1) == targets[likely]
    probabilities = torch.softmax(wide, -1, out=wide)
    # The largest probability is at least 1 / V: it has a logarithm where the target's may underflow.
    row_lse = top - probabilities.amax(-1).log()
    nll.copy_(torch.where(kept, row_lse - at_target, 0))
    lse.copy_(torch.where(kept, row_lse, 0))
    if weights is not None:
        weights = torch.where(kept, weights, 0).to(nll.dtype)
        probabilities.mul_((weights * (1 + 2 * z_loss * lse)).unsqueeze(1))
        probabilities.scatter_add_(1, target, -weights.unsqueeze(1))
        if wide is not logits:
            logits.copy_(probabilities)


# --------------------------------------------------------------------------------- one chunk of logits, in Triton


@triton.jit
def _rows_kernel(
    logits, targets, weights, nll, lse, correct, z_loss,
    VOCAB: tl.constexpr, GRADIENT: tl.constexpr, ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of logits a program. ONCE: the row fits in a block and is read once, else twice."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * VOCAB
    columns = tl.arange(0, BLOCK)

    # Read before the reductions below, whose barriers keep it ahead of the gradient that overwrites it. A target
    # outside the vocabulary shows as NaN.
    target = tl.load(targets + row)
    in_range = (target >= 0) & (target < VOCAB)
    at_target = tl.load(logits + target, mask=in_range, other=float("nan")).to(tl.float32)

    if ONCE:
        x = tl.load(logits + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
        top, best = tl.max(x, 0, return_indices=True)
        exponentials = tl.exp(x - top)
        total = tl.sum(exponentials, 0)
    else:  # the running maximum and sum of an online softmax (Milakov and Gimelshein 2018)
        top = float("-inf")
        total = 0.0
        best = 0
        for start in range(0, VOCAB, BLOCK):
            x = tl.load(logits + start + columns, mask=start + columns < VOCAB, other=float("-inf")).to(tl.float32)
            block_top, block_best = tl.max(x, 0, return_indices=True)
            best = tl.where(block_top > top, start + block_best, best)
            new_top = tl.maximum(top, block_top)
            total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), 0)
            top = new_top

    kept = target != _IGNORE
    row_lse = top + tl.log(total)
    tl.store(nll + row, tl.where(kept, row_lse - at_target, 0.0))
    tl.store(lse + row, tl.where(kept, row_lse, 0.0))
    tl.store(correct + row, best == target)

    if GRADIENT:
        weight = tl.where(kept, tl.load(weights + row), 0.0)
        scale = weight * (1.0 + 2.0 * z_loss * row_lse)
        if ONCE:
            gradient = exponentials * (scale / total)  # pyright: ignore[reportPossiblyUnboundVariable]
            tl.store(logits + columns, gradient, mask=columns < VOCAB)
        else:
            for start in range(0, VOCAB, BLOCK):
                here = start + columns
                x = tl.load(logits + here, mask=here < VOCAB, other=0.0).to(tl.float32)
                tl.store(logits + here, tl.exp(x - row_lse) * scale, mask=here < VOCAB)
        tl.debug_barrier()  # the target's own element comes last, and alone: compared in each, it would spill registers
        tl.store(logits + target, tl.exp(at_target - row_lse) * scale - weight, mask=in_range)


def _rows_triton(
    logits: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float, nll: Tensor, lse: Tensor, correct: Tensor
) -> None:
    """As `_rows_torch`."""
    rows, vocab = logits.shape
    settings: dict[str, Any] = launch.cross_entropy_row(vocab) | {"VOCAB": vocab, "GRADIENT": weights is not None}
    _rows_kernel[(rows,)](logits, targets, weights, nll, lse, correct, z_loss, **settings)


@triton.jit
def _scale_kernel(values, scalar, count, BLOCK: tl.constexpr):
    factor = tl.load(scalar)
    if factor != 1.0:  # as it is where nothing but this loss is trained on: then nothing is read or written
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(values + index, mask=index < count).to(tl.float32)
        tl.store(values + index, value * factor, mask=index < count)


# ------------------------------------------------------------------------------------------------ chunk by chunk


def _chunked(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, z_loss: float,
    of_hidden: bool, of_weight: bool, use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """nll, lse, correct (T,), d_hidden (T, D) and d_weight (V, D), with one chunk of logits in memory at a time.

    A gradient that is not asked for is empty. d_weight is summed in fp32 (fp64 for fp64) and stays so: autograd rounds
    it to the parameter's own `grad_dtype`.
    """
    rows, vocab, wide = hidden.shape[0], weight.shape[0], _accumulator(hidden)
    nll, lse = hidden.new_empty(rows, dtype=wide), hidden.new_empty(rows, dtype=wide)
    correct = hidden.new_empty(rows, dtype=torch.bool)
    d_hidden = hidden.new_empty(hidden.shape if of_hidden else 0)
    d_weight = weight.new_empty(weight.shape if of_weight else 0, dtype=wide)
    if rows == 0:
        d_weight.zero_()
    size = launch.cross_entropy_chunk(vocab, hidden.element_size(), hidden.is_cuda)
    buffer = hidden.new_empty(min(size, rows), vocab)
    fill = _rows_triton if use_triton else _rows_torch
    for start in range(0, rows, size):
        at = slice(start, start + size)
        x = hidden[at]
        logits = torch.mm(x, weight.T, out=buffer[: x.shape[0]])
        row_weights = weights[at] if of_hidden or of_weight else None
        fill(logits, targets[at], row_weights, z_loss, nll[at], lse[at], correct[at])
        if of_hidden:
            torch.mm(logits, weight, out=d_hidden[at])
        if of_weight:
            _accumulate(d_weight, logits.T, x, keep=start > 0)
    return nll, lse, correct, d_hidden, d_weight


def _accumulate(total: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
    """total = a @ b, plus what it held if `keep`, summed in total's dtype."""
    if total.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, beta=int(keep), out_dtype=total.dtype, out=total)
    else:  # a CPU has no product with a wider output, and its bf16 products are slower than its fp32 ones
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=int(keep))


def _gather(values: Tensor, rows: Tensor | None) -> Tensor:
    return values.contiguous() if rows is None else values.index_select(0, rows)


def _scatter(values: Tensor, rows: Tensor | None, total: int) -> Tensor:
    """The inverse of `_gather`: 0 on the rows left out."""
    if rows is None:
        return values
    out = values.new_zeros(total, *values.shape[1:])
    out[rows] = values
    return out


# ----------------------------------------------------------------------------------------------- autograd binding


@library.custom_op("tokenmill::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None, rows: Tensor | None, z_loss: float,
    of_hidden: bool, of_weight: bool, use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, nll, correct, d_hidden, d_weight; a gradient that is not asked for is empty."""
    total = hidden.shape[0]
    if token_weights is None:
        token_weights = hidden.new_ones(total, dtype=torch.float32)
    weights = _gather(token_weights, rows)
    nll, lse, correct, d_hidden, d_weight = _chunked(
        _gather(hidden, rows), weight, _gather(targets, rows), weights, z_loss, of_hidden, of_weight, use_triton
    )
    loss = (weights * (nll + z_loss * lse**2)).sum()
    if of_hidden:
        d_hidden = _scatter(d_hidden, rows, total)
    return loss, _scatter(nll, rows, total), _scatter(correct, rows, total), d_hidden, d_weight


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, token_weights, rows, z_loss, of_hidden, of_weight, use_triton):
    wide = _accumulator(hidden)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape[0], dtype=torch.bool),
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape if of_weight else 0, dtype=wide),
    )


@library.custom_op("tokenmill::scale_", mutates_args=("values",))
def _scale_(values: Tensor, factor: Tensor) -> None:
    """values *= factor, a scalar on the device that the host never waits for."""
    count = values.numel()
    settings = launch.elementwise(count)
    _scale_kernel[(triton.cdiv(count, settings["BLOCK"]),)](values, factor, count, **settings)


def _loss_setup(ctx, inputs, output) -> None:
    _, nll, correct, d_hidden, d_weight = output
    *_, ctx.of_hidden, ctx.of_weight, ctx.use_triton = inputs
    ctx.mark_non_differentiable(nll, correct, d_hidden, d_weight)
    ctx.set_materialize_grads(False)  # else zeros are made for d_weight, as large as it
    ctx.save_for_backward(d_hidden, d_weight)


def _loss_backward(ctx, d_loss, *_):
    d_hidden, d_weight = ctx.saved_tensors
    if d_loss is None:  # nothing upstream depends on the loss
        return (None,) * 9
    if ctx.use_triton:  # in place: on a GPU a second d_weight would be the largest tensor of the step
        for gradient in (d_hidden, d_weight):
            if gradient.numel():
                _scale_(gradient, d_loss)
    else:
        d_hidden, d_weight = d_hidden * d_loss, d_weight * d_loss
    return (d_hidden if ctx.of_hidden else None, d_weight if ctx.of_weight else None, *[None] * 7)


_linear_cross_entropy.register_autograd(_loss_backward, setup_context=_loss_setup)


@library.custom_op("tokenmill::token_logprobs", mutates_args=())
def _token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, use_triton: bool) -> Tensor:
    x = _gather(hidden, rows)
    nll, *_ = _chunked(x, weight, _gather(targets, rows), x, 0.0, False, False, use_triton)
    return _scatter(-nll, rows, hidden.shape[0])


@_token_logprobs.register_fake
def _(hidden, weight, targets, rows, use_triton):
    return hidden.new_empty(hidden.shape[0], dtype=_accumulator(hidden))


@library.custom_op("tokenmill::token_logprobs_backward", mutates_args=())
def _token_logprobs_backward(
    upstream: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None,
    of_hidden: bool, of_weight: bool, use_triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    *_, d_hidden, d_weight = _chunked(
        _gather(hidden, rows), weight, _gather(targets, rows), -_gather(upstream, rows), 0.0,
        of_hidden, of_weight, use_triton,
    )  # fmt: skip
    return (_scatter(d_hidden, rows, hidden.shape[0]) if of_hidden else d_hidden), d_weight


@_token_logprobs_backward.register_fake
def _(upstream, hidden, weight, targets, rows, of_hidden, of_weight, use_triton):
    return (
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape if of_weight else 0, dtype=_accumulator(weight)),
    )


def _logprobs_setup(ctx, inputs, output) -> None:
    *saved, ctx.use_triton = inputs
    ctx.save_for_backward(*saved)


def _logprobs_backward(ctx, upstream):
    needs = ctx.needs_input_grad[:2]
    gradients = _token_logprobs_backward(upstream, *ctx.saved_tensors, *needs, ctx.use_triton)
    return (*[gradient if need else None for gradient, need in zip(gradients, needs, strict=True)], None, None, None)


_token_logprobs.register_autograd(_logprobs_backward, setup_context=_logprobs_setup)


# ----------------------------------------------------------------------------------------------- public functions


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    rows: Tensor | None = None,
    z_loss: float = 0.0,
    backend: Backend = "auto",
) -> LossOutput:
    """The weighted sum of the cross-entropy of `hidden @ weight.T`, with gradients made in the forward pass.

    hidden (T, D) and weight (V, D) of one dtype; targets (T,) int64, IGNORE where none counts; token_weights (T,)
    fp32, ones if None; rows (R,) int32, distinct: the only rows that enter the products, all if None. No gradient is
    made for what does not require one. On a GPU the graph can be walked backward once.

    Raises ValueError where a shape or a dtype does not fit. A target outside [0, V) that is not IGNORE is an error on
    a CPU, and makes a NaN on a GPU.
    """
    use_triton = choose(backend, hidden, weight) == "triton"
    _check(hidden, weight, targets, token_weights, rows)
    grad = torch.is_grad_enabled()
    loss, nll, correct, _, _ = _linear_cross_entropy(
        hidden, weight, targets, token_weights, rows, z_loss,
        grad and hidden.requires_grad, grad and weight.requires_grad, use_triton,
    )  # fmt: skip
    return LossOutput(loss, nll, correct)


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, rows: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """(T,) fp32: the log-probability of each target under softmax(hidden @ weight.T), 0 on rows left out.

    Arguments and errors as in `linear_cross_entropy`; differentiable for any upstream gradient.
    """
    use_triton = choose(backend, hidden, weight) == "triton"
    _check(hidden, weight, targets, None, rows)
    return _token_logprobs(hidden, weight, targets, rows, use_triton)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None, rows: Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden (T, D) and weight (V, D), got {[*hidden.shape]} and {[*weight.shape]}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one to the other's")
    # Weights may be fp64 beside fp64 inputs.
    dtypes = {"targets": (torch.int64,), "token_weights": (torch.float32, _accumulator(hidden))}
    for name, tensor in (("targets", targets), ("token_weights", token_weights)):
        if tensor is not None and (tensor.shape != hidden.shape[:1] or tensor.dtype not in dtypes[name]):
            expected = f"{dtypes[name][0]} of shape {[hidden.shape[0]]}"
            raise ValueError(f"{name}: expected {expected}, got {tensor.dtype} {[*tensor.shape]}")
    if rows is not None and (rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"rows: expected int32 of shape (R,), got {rows.dtype} {[*rows.shape]}")
