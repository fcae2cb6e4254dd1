"""Cross-entropy of a linear layer's logits, and log-probabilities of given tokens, without a (T, V) tensor.

    logits = hidden @ weight.T                      hidden (T, D), weight (V, D)
    lse    = log(sum(exp(logits)))                  over V, as everything here in fp32 (fp64 for fp64 inputs)
    nll    = lse - logits[target]                   the negative log-likelihood of the target
    loss   = sum(w * (nll + z * lse**2))            w a weight a row, z the z-loss of PaLM (Chowdhery et al. 2022)

`linear_cross_entropy` makes its gradients in the forward pass, chunk by chunk: a chunk's logits are overwritten by

    d_logits = w * (1 + 2 * z * lse) * softmax(logits) - w * onehot(target)         (logits.py)

which two more products turn into d_hidden = d_logits @ weight and d_weight += d_logits.T @ hidden. Backward has only
to multiply both by the gradient of the loss, a scalar: three products in all.

`token_logprobs` returns -nll. Its upstream gradient is not known in the forward pass, so backward makes the logits of
each chunk again: four products. It is the same formula with w the negative upstream gradient and z = 0, and the lse
is known by then.

Where a target is IGNORE, w, nll and both gradients are 0; so they are in rows left out by `rows`, which do not enter
the products at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from tokenmill.kernels import launch, logits
from tokenmill.kernels.backends import Backend, choose
from tokenmill.kernels.layout import IGNORE
from tokenmill.kernels.logits import RowStatistics, accumulator


class LossOutput(NamedTuple):
    loss: Tensor  # () fp32, fp64 for fp64 inputs
    nll: Tensor  # (T,) of the same dtype, detached, 0 on rows left out
    correct: Tensor  # (T,) bool: the target is the (first) largest logit; False on rows left out
    entropy: Tensor  # (T,) as nll: of the predicted distribution, nats


# ---------------------------------------------------------------------------------------------------- reference


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None = None, z_loss: float = 0.0
) -> LossOutput:
    """The definition, differentiable, with all logits in memory."""
    scores = (hidden @ weight.T).to(accumulator(hidden))
    nll = F.cross_entropy(scores, targets, ignore_index=IGNORE, reduction="none")
    kept = targets != IGNORE
    row_loss = nll + z_loss * (scores.logsumexp(-1) * kept) ** 2
    loss = (row_loss if token_weights is None else row_loss * token_weights).sum()
    logprobs = scores.detach().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1) * kept
    return LossOutput(loss, nll.detach(), scores.argmax(-1) == targets, entropy)


# ------------------------------------------------------------------------------------------------ chunk by chunk


def chunked(
    hidden: Tensor, weight: Tensor, overwrite: Callable[[Tensor, slice], None],
    of_hidden: bool, of_weight: bool, use_triton: bool, weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """d_hidden (T, D) and d_weight (V, D), with one chunk of logits in memory at a time.

    `overwrite` turns the logits of the rows of a slice into their gradient. A gradient that is not asked for is empty.
    d_weight is summed in fp32 (fp64 for fp64) and stays so: autograd rounds it to the parameter's own `grad_dtype`.
    It is empty, too, where it is added to `weight_grad` instead.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    d_hidden = hidden.new_empty(hidden.shape if of_hidden else 0)
    d_weight = weight.new_empty(weight.shape if of_weight else 0, dtype=accumulator(weight))
    if rows == 0:
        d_weight.zero_()
    size = launch.cross_entropy_chunk(vocab, hidden.element_size(), hidden.is_cuda)
    stride = logits.padded(vocab) if use_triton else vocab
    buffer = hidden.new_empty(min(size, rows), stride)[:, :vocab]
    for start in range(0, rows, size):
        at = slice(start, start + size)
        x = hidden[at]
        chunk = torch.mm(x, weight.T, out=buffer[: x.shape[0]])
        overwrite(chunk, at)
        if of_hidden:
            torch.mm(chunk, weight, out=d_hidden[at])
        if weight_grad is not None:
            _accumulate(weight_grad, chunk.T, x, keep=True)
        elif of_weight:
            _accumulate(d_weight, chunk.T, x, keep=start > 0)
    return d_hidden, d_weight


def _accumulate(total: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
    """total = a @ b, plus what it held if `keep`, summed in total's dtype."""
    if total.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, beta=int(keep), out_dtype=total.dtype, out=total)
    else:  # a CPU has no product with a wider output, and its bf16 products are slower than its fp32 ones
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=int(keep))


def gather(values: Tensor, rows: Tensor | None) -> Tensor:
    return values.contiguous() if rows is None else values.index_select(0, rows)


def scatter(values: Tensor, rows: Tensor | None, total: int) -> Tensor:
    """The inverse of `gather`: 0 on the rows left out."""
    if rows is None:
        return values
    out = values.new_zeros(total, *values.shape[1:])
    out[rows] = values
    return out


def row_weights(token_weights: Tensor | None, targets: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(R,): of the gathered targets (R,), 0 where they are IGNORE, ones without token_weights (T,)."""
    kept = targets != IGNORE
    return kept.to(dtype) if token_weights is None else torch.where(kept, gather(token_weights, rows), 0)


def weighted_loss(of_rows: RowStatistics, weights: Tensor, z_loss: float) -> Tensor:
    return (weights * (of_rows.nll + z_loss * of_rows.lse**2)).sum()


def _check_targets(targets: Tensor, vocab: int, use_triton: bool) -> None:
    if use_triton or targets.is_cuda:  # waiting for the device would cost; there such a target makes a NaN
        return
    outside = targets[(targets != IGNORE) & ((targets < 0) | (targets >= vocab))]
    if outside.numel():
        raise ValueError(f"target {int(outside[0])} is outside the vocabulary of {vocab}; {IGNORE} is to be ignored")


# ----------------------------------------------------------------------------------------------- autograd binding


@library.custom_op("tokenmill::linear_cross_entropy", mutates_args=("weight_grad",))
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None, rows: Tensor | None, z_loss: float,
    of_hidden: bool, of_weight: bool, weight_grad: Tensor | None, use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, nll, correct, entropy, d_hidden, d_weight; a gradient that is not asked for is empty."""
    total = hidden.shape[0]
    hidden, targets = gather(hidden, rows), gather(targets, rows)
    _check_targets(targets, weight.shape[0], use_triton)
    weights = row_weights(token_weights, targets, rows, accumulator(hidden))
    of_rows = RowStatistics.empty(hidden.shape[0], like=hidden)
    needed = of_hidden or of_weight or weight_grad is not None

    def overwrite(chunk: Tensor, at: slice) -> None:
        if needed:
            logits.statistics_and_gradient(chunk, targets[at], weights[at], z_loss, of_rows.at(at), use_triton)
        else:
            of_rows.at(at).copy_(logits.combine(logits.statistics(chunk, targets[at], use_triton)[None], targets[at]))

    d_hidden, d_weight = chunked(hidden, weight, overwrite, of_hidden, of_weight, use_triton, weight_grad)
    return (
        weighted_loss(of_rows, weights, z_loss),
        scatter(of_rows.nll, rows, total),
        scatter(of_rows.correct, rows, total),
        scatter(of_rows.entropy, rows, total),
        scatter(d_hidden, rows, total) if of_hidden else d_hidden,
        d_weight,
    )


@_linear_cross_entropy.register_fake
def fake_linear_cross_entropy(hidden, weight, targets, token_weights, rows, z_loss, of_hidden, of_weight, *_):
    nll = hidden.new_empty(hidden.shape[0], dtype=accumulator(hidden))
    return (
        nll.new_empty(()),
        nll,
        torch.empty_like(nll, dtype=torch.bool),
        torch.empty_like(nll),
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape if of_weight else 0, dtype=accumulator(weight)),
    )


@library.custom_op("tokenmill::with_gradients", mutates_args=())
def _with_gradients(
    loss: Tensor, hidden: Tensor, weight: Tensor, d_hidden: Tensor, d_weight: Tensor, use_triton: bool
) -> Tensor:
    """The loss, whose gradients by hidden and weight are known: an empty one is of a tensor that needs none."""
    return loss.clone()


@_with_gradients.register_fake
def _(loss, hidden, weight, d_hidden, d_weight, use_triton):
    return torch.empty_like(loss)


@triton.jit
def _scale_kernel(values, scalar, count, BLOCK: tl.constexpr):
    factor = tl.load(scalar)
    if factor != 1.0:  # as it is where nothing but this loss is trained on: then nothing is read or written
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(values + index, mask=index < count).to(tl.float32)
        tl.store(values + index, value * factor, mask=index < count)


@library.custom_op("tokenmill::scale_", mutates_args=("values",))
@launch.on_its_device
def _scale_(values: Tensor, factor: Tensor) -> None:
    """values *= factor, a scalar on the device that the host never waits for."""
    count = values.numel()
    settings = launch.elementwise("scale", count)
    _scale_kernel[(triton.cdiv(count, settings["BLOCK"]),)](values, factor, count, **settings)


def _with_gradients_setup(ctx, inputs, output) -> None:
    _, _, _, d_hidden, d_weight, ctx.use_triton = inputs
    ctx.save_for_backward(d_hidden, d_weight)


def _with_gradients_backward(ctx, d_loss):
    d_hidden, d_weight = ctx.saved_tensors
    # In place: on a GPU a second d_weight would be the largest tensor of the step. A compiler, whose tensors are of
    # another type, would first copy what is changed in place; by itself it overwrites what nobody needs any longer.
    if ctx.use_triton and type(d_loss) is Tensor:
        for gradient in (d_hidden, d_weight):
            if gradient.numel():
                _scale_(gradient, d_loss)
    else:
        d_hidden, d_weight = d_hidden * d_loss, d_weight * d_loss
    _, of_hidden, of_weight, *_ = ctx.needs_input_grad
    return None, d_hidden if of_hidden else None, d_weight if of_weight else None, None, None, None


_with_gradients.register_autograd(_with_gradients_backward, setup_context=_with_gradients_setup)


def with_gradients(
    loss: Tensor, hidden: Tensor, weight: Tensor, d_hidden: Tensor, d_weight: Tensor, use_triton: bool
) -> Tensor:
    """Joins the loss, made of hidden and weight detached, to them."""
    return _with_gradients(loss, hidden, weight, d_hidden, d_weight, use_triton)


@library.custom_op("tokenmill::token_logprobs", mutates_args=())
def _token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, use_triton: bool
) -> tuple[Tensor, Tensor]:
    """(T,), and for backward the lse of each row (R,)."""
    x, of_x = gather(hidden, rows), gather(targets, rows)
    _check_targets(of_x, weight.shape[0], use_triton)
    of_rows = RowStatistics.empty(x.shape[0], like=x)

    def overwrite(chunk: Tensor, at: slice) -> None:
        of_rows.at(at).copy_(logits.combine(logits.statistics(chunk, of_x[at], use_triton)[None], of_x[at]))

    chunked(x, weight, overwrite, False, False, use_triton)
    return scatter(-of_rows.nll, rows, hidden.shape[0]), of_rows.lse


@_token_logprobs.register_fake
def _(hidden, weight, targets, rows, use_triton):
    logprobs = hidden.new_empty(hidden.shape[0], dtype=accumulator(hidden))
    return logprobs, logprobs.new_empty((hidden if rows is None else rows).shape[0])


@library.custom_op("tokenmill::token_logprobs_backward", mutates_args=())
def _token_logprobs_backward(
    upstream: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, lse: Tensor,
    of_hidden: bool, of_weight: bool, use_triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, of_x = gather(hidden, rows), gather(targets, rows)
    weights = -row_weights(upstream, of_x, rows, lse.dtype)

    def overwrite(chunk: Tensor, at: slice) -> None:
        logits.gradient(chunk, of_x[at], weights[at], lse[at], 0.0, use_triton)

    d_hidden, d_weight = chunked(x, weight, overwrite, of_hidden, of_weight, use_triton)
    return (scatter(d_hidden, rows, hidden.shape[0]) if of_hidden else d_hidden), d_weight


@_token_logprobs_backward.register_fake
def _(upstream, hidden, weight, targets, rows, lse, of_hidden, of_weight, use_triton):
    return (
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape if of_weight else 0, dtype=accumulator(weight)),
    )


def _logprobs_setup(ctx, inputs, output) -> None:
    *saved, ctx.use_triton = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved, lse)


def _logprobs_backward(ctx, upstream, _):
    if upstream is None:
        return (None,) * 5
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
    weight_grad: Tensor | None = None,
    backend: Backend = "auto",
) -> LossOutput:
    """The weighted sum of the cross-entropy of `hidden @ weight.T`, with gradients made in the forward pass.

    hidden (T, D) and weight (V, D) of one dtype; targets (T,) int64, IGNORE where none counts; token_weights (T,)
    fp32, ones if None; rows (R,) int32, distinct: the only rows that enter the products, all if None. No gradient is
    made for what does not require one. On a GPU the graph can be walked backward once.

    weight_grad (V, D) fp32: the gradient of weight is added to it here and now, not by autograd, which then gives
    weight none: one buffer of that size less, and one pass over it. As what comes after the loss is not known yet,
    the loss must be what is minimised, not a factor of it: all weighting is in token_weights.

    Raises ValueError where a shape or a dtype does not fit. A target outside [0, V) that is not IGNORE is an error on
    a CPU, and makes a NaN on a GPU.
    """
    use_triton = choose(backend, hidden, weight) == "triton"
    check(hidden, weight, targets, token_weights, rows)
    if weight_grad is not None and (weight_grad.shape != weight.shape or weight_grad.dtype != accumulator(weight)):
        expected = f"{accumulator(weight)} {[*weight.shape]}"
        raise ValueError(f"weight_grad: expected {expected}, got {weight_grad.dtype} {[*weight_grad.shape]}")
    grad = torch.is_grad_enabled()
    of_hidden, of_weight = grad and hidden.requires_grad, grad and weight.requires_grad and weight_grad is None
    loss, nll, correct, entropy, d_hidden, d_weight = _linear_cross_entropy(
        hidden.detach(), weight.detach(), targets, token_weights, rows, z_loss,
        of_hidden, of_weight, weight_grad, use_triton,
    )  # fmt: skip
    if of_hidden or of_weight:
        loss = with_gradients(loss, hidden, weight if of_weight else weight.detach(), d_hidden, d_weight, use_triton)
    return LossOutput(loss, nll, correct, entropy)


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, rows: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """(T,) fp32: the log-probability of each target under softmax(hidden @ weight.T), 0 on rows left out.

    Arguments and errors as in `linear_cross_entropy`; differentiable for any upstream gradient.
    """
    use_triton = choose(backend, hidden, weight) == "triton"
    check(hidden, weight, targets, None, rows)
    return _token_logprobs(hidden, weight, targets, rows, use_triton)[0]


def check(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None, rows: Tensor | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden (T, D) and weight (V, D), got {[*hidden.shape]} and {[*weight.shape]}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one to the other's")
    # Weights may be fp64 beside fp64 inputs.
    dtypes = {"targets": (torch.int64,), "token_weights": (torch.float32, accumulator(hidden))}
    for name, tensor in (("targets", targets), ("token_weights", token_weights)):
        if tensor is not None and (tensor.shape != hidden.shape[:1] or tensor.dtype not in dtypes[name]):
            expected = f"{dtypes[name][0]} of shape {[hidden.shape[0]]}"
            raise ValueError(f"{name}: expected {expected}, got {tensor.dtype} {[*tensor.shape]}")
    if rows is not None and (rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"rows: expected int32 of shape (R,), got {rows.dtype} {[*rows.shape]}")
