"""The router: which k of E experts each token goes to, with which weights, and what balancing needs to know of it.

    p = softmax(logits)                       in float32                        logits (T, E)
    experts[t] = the k largest of p[t] + bias
    weights[t] = softmax(logits[t, experts[t]])    which is p of the chosen over its sum, also where p underflows

and sums over tokens: how many chose each expert, p, logsumexp(logits)^2 and the entropy of p. The rule is Mixtral's:
Jiang et al., "Mixtral of Experts" (2024), section 2.1 (a softmax over the k largest logits is the same number). A bias
for the choice only is that of Wang et al., "Auxiliary-Loss-Free Load Balancing" (2024).

The kernel does it in one pass; a program sums its own rows, and its sums are added after it in a fixed order. p is
computed again in the backward pass. With d_w the gradient of the weights w, P that of the sums of p and z that of the
sum of lse^2:

    d_logits = p * (P - sum over e of p[e] P[e] + 2 z lse), plus w[j] (d_w[j] - sum over i of d_w[i] w[i]) for chosen j
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (Triton's annotations are those of its own compiler.)

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from tokenmill.kernels import backends, launch


class Routing(NamedTuple):
    """Plain tensors, so that checkpointing and collectives take them as they are."""

    weights: Tensor  # (T, k) float32, each row sums to 1; differentiable
    experts: Tensor  # (T, k) int64, most probable first
    counts: Tensor  # (E,) int64 real tokens sent to each expert; sums to k times the real tokens
    probability_sums: Tensor  # (E,) float32 sum over the real tokens of each expert's probability; differentiable
    lse_squared_sum: Tensor  # () float32 sum over the real tokens of logsumexp(logits)^2, the z loss; differentiable
    entropy_sum: Tensor  # () float32 sum over the real tokens of their probabilities' entropy, nats; to report


def reference(
    logits: Tensor, top_k: int, bias: Tensor | None, forced: Tensor | None, real_rows: Tensor | None
) -> Routing:
    """In float32, or float64 for float64."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probabilities = logits.softmax(-1)
    lse = logits.logsumexp(-1)
    if forced is not None:
        experts = forced.long()
    else:
        scores = probabilities if bias is None else probabilities + bias
        experts = scores.detach().topk(top_k, -1).indices
    weights = logits.gather(-1, experts).softmax(-1)
    if real_rows is None:
        votes = torch.ones_like(experts)
    else:
        votes = real_rows.long()[:, None].expand(experts.shape)
        probabilities = probabilities * real_rows[:, None]
        lse = lse * real_rows
    # Not bincount, which waits for the device.
    counts = experts.new_zeros(logits.shape[1]).scatter_add_(0, experts.reshape(-1), votes.reshape(-1))
    entropy = torch.special.entr(probabilities.detach()).sum()
    return Routing(weights, experts, counts, probabilities.sum(0), lse.square().sum(), entropy)


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _softmax(logits, row, inside, EXPERTS: tl.constexpr, SPAN: tl.constexpr):
    """(ROWS, SPAN) logits and probabilities and (ROWS,) logsumexp; SPAN is a power of 2, and at least EXPERTS."""
    e = tl.arange(0, SPAN)[None, :]
    x = tl.load(logits + row[:, None] * EXPERTS + e, mask=inside[:, None] & (e < EXPERTS), other=0.0).to(tl.float32)
    x = tl.where(e < EXPERTS, x, float("-inf"))
    highest = tl.max(x, 1)
    exponentials = tl.exp(x - highest[:, None])
    total = tl.sum(exponentials, 1)
    return x, exponentials / total[:, None], highest + tl.log(total)


@triton.jit
def _rows_of(program, tokens, real_rows, ROWS: tl.constexpr, GHOSTS: tl.constexpr):
    """(ROWS,) int64 rows of a program, which of them exist, and which of those are real."""
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens
    real = inside
    if GHOSTS:
        real = tl.load(real_rows + row, mask=inside, other=0).to(tl.int1)
    return row, inside, real


@triton.jit
def _route_kernel(
    logits, bias, forced, real_rows, weights, experts, counts, probability_sums, squares, entropies, tokens,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SPAN: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr,
    BIASED: tl.constexpr, FORCED: tl.constexpr, GHOSTS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens a program; its sums go to its row of each partial result."""
    program = tl.program_id(0)
    row, inside, real = _rows_of(program, tokens, real_rows, ROWS, GHOSTS)
    x, p, lse = _softmax(logits, row, inside, EXPERTS, SPAN)
    e = tl.arange(0, SPAN)
    known = e < EXPERTS

    scores = p
    if BIASED:
        scores += tl.load(bias + e, mask=known, other=0.0)[None, :]
    # NaN counts as the largest, as in torch: a step that is not finite must choose experts that exist.
    scores = tl.where(scores == scores, scores, float("inf"))
    scores = tl.where(known[None, :], scores, float("-inf"))
    chosen = tl.zeros((ROWS, SPAN), tl.int32)  # how often; once at most, unless forced
    place = tl.arange(0, PLACES)[None, :]
    ids = tl.zeros((ROWS, PLACES), tl.int32)
    values = tl.full((ROWS, PLACES), float("-inf"), tl.float32)  # the chosen logits
    for j in range(TOP_K):
        best = tl.load(forced + row * TOP_K + j, mask=inside, other=0).to(tl.int32) if FORCED else tl.argmax(scores, 1)
        taken = e[None, :] == best[:, None]
        scores = tl.where(taken, float("-inf"), scores)
        chosen += taken.to(tl.int32)
        ids = tl.where(place == j, best[:, None], ids)
        values = tl.where(place == j, tl.sum(tl.where(taken, x, 0.0), 1)[:, None], values)
    at, mask = row[:, None] * TOP_K + place, inside[:, None] & (place < TOP_K)
    tl.store(experts + at, ids.to(tl.int64), mask=mask)
    values = tl.exp(values - tl.max(values, 1)[:, None])
    tl.store(weights + at, values / tl.sum(values, 1)[:, None], mask=mask)

    at = program * EXPERTS + e
    tl.store(counts + at, tl.sum(tl.where(real[:, None], chosen, 0), 0), mask=known)
    tl.store(probability_sums + at, tl.sum(tl.where(real[:, None], p, 0.0), 0), mask=known)
    tl.store(squares + program, tl.sum(tl.where(real, lse * lse, 0.0), 0))
    entropy = lse - tl.sum(p * tl.where(p > 0, x, 0.0), 1)
    tl.store(entropies + program, tl.sum(tl.where(real, entropy, 0.0), 0))


@triton.jit
def _route_backward_kernel(
    logits, weights, experts, real_rows, d_weights, d_probability_sums, d_square, d_logits, tokens,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, GHOSTS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens a program."""
    row, inside, real = _rows_of(tl.program_id(0), tokens, real_rows, ROWS, GHOSTS)
    _, p, lse = _softmax(logits, row, inside, EXPERTS, SPAN)
    e = tl.arange(0, SPAN)
    known = e < EXPERTS

    mean = tl.zeros((ROWS,), tl.float32)  # of d_w by w
    for j in range(TOP_K):
        at = row * TOP_K + j
        mean += tl.load(weights + at, mask=inside, other=0.0) * tl.load(d_weights + at, mask=inside, other=0.0)
    of_choice = tl.zeros((ROWS, SPAN), tl.float32)
    for j in range(TOP_K):
        at = row * TOP_K + j
        best = tl.load(experts + at, mask=inside, other=0).to(tl.int32)
        slope = tl.load(d_weights + at, mask=inside, other=0.0) - mean
        slope *= tl.load(weights + at, mask=inside, other=0.0)
        of_choice += tl.where(e[None, :] == best[:, None], slope[:, None], 0.0)
    sums = tl.load(d_probability_sums + e, mask=known, other=0.0)
    d_p = tl.where(real[:, None], sums[None, :], 0.0)
    through_lse = tl.where(real, 2 * tl.load(d_square) * lse, 0.0)
    d_x = p * (d_p - tl.sum(p * d_p, 1)[:, None] + through_lse[:, None]) + of_choice
    at = d_logits + row[:, None] * EXPERTS + e[None, :]
    tl.store(at, d_x.to(d_logits.dtype.element_ty), mask=inside[:, None] & known[None, :])


# --------------------------------------------------------------------------------------------------- autograd binding


@library.custom_op("tokenmill::route", mutates_args=())
@launch.on_its_device
def _route(
    logits: Tensor, top_k: int, bias: Tensor | None, forced: Tensor | None, real_rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of Routing."""
    tokens, num_experts = logits.shape
    settings = launch.router("route", num_experts)
    programs = triton.cdiv(tokens, settings["ROWS"])
    weights = logits.new_empty(tokens, top_k, dtype=torch.float32)
    experts = logits.new_empty(tokens, top_k, dtype=torch.int64)
    counts = logits.new_empty(programs, num_experts, dtype=torch.int32)
    probability_sums = logits.new_empty(programs, num_experts, dtype=torch.float32)
    squares, entropies = logits.new_empty(2, programs, dtype=torch.float32)
    if tokens:
        _route_kernel[(programs,)](
            logits, bias, forced, real_rows, weights, experts, counts, probability_sums, squares, entropies, tokens,
            EXPERTS=num_experts, TOP_K=top_k, PLACES=triton.next_power_of_2(top_k), BIASED=bias is not None,
            FORCED=forced is not None, GHOSTS=real_rows is not None, **settings,
        )  # fmt: skip
    return weights, experts, counts.sum(0), probability_sums.sum(0), squares.sum(), entropies.sum()


@_route.register_fake
def _(logits, top_k, bias, forced, real_rows):
    tokens, num_experts = logits.shape
    sums = logits.new_empty(num_experts, dtype=torch.float32)
    weights, square, entropy = (sums.new_empty(shape) for shape in ((tokens, top_k), (), ()))
    counts = sums.new_empty(num_experts, dtype=torch.int64)
    return weights, counts.new_empty(tokens, top_k), counts, sums, square, entropy


@library.custom_op("tokenmill::route_backward", mutates_args=())
@launch.on_its_device
def _route_backward(
    logits: Tensor, weights: Tensor, experts: Tensor, real_rows: Tensor | None,
    d_weights: Tensor, d_probability_sums: Tensor, d_square: Tensor,
) -> Tensor:  # fmt: skip
    tokens, num_experts = logits.shape
    settings = launch.router("route_backward", num_experts)
    d_logits = torch.empty_like(logits)
    if tokens:
        _route_backward_kernel[(triton.cdiv(tokens, settings["ROWS"]),)](
            logits, weights, experts, real_rows, d_weights, d_probability_sums, d_square, d_logits, tokens,
            EXPERTS=num_experts, TOP_K=experts.shape[1], GHOSTS=real_rows is not None, **settings,
        )  # fmt: skip
    return d_logits


@_route_backward.register_fake
def _(logits, weights, experts, real_rows, d_weights, d_probability_sums, d_square):
    return torch.empty_like(logits)


def _setup(ctx, inputs, output) -> None:
    logits, _top_k, _bias, _forced, real_rows = inputs
    weights, experts, counts, _, _, entropy = output
    ctx.mark_non_differentiable(experts, counts, entropy)
    ctx.save_for_backward(logits, weights, experts, real_rows)


def _backward(ctx, d_weights, _experts, _counts, d_probability_sums, d_square, _entropy):
    d_logits = _route_backward(
        *ctx.saved_tensors, d_weights.contiguous(), d_probability_sums.contiguous(), d_square.contiguous()
    )
    return d_logits, None, None, None, None


_route.register_autograd(_backward, setup_context=_setup)


# --------------------------------------------------------------------------------------------------- public functions


def route(
    logits: Tensor,
    top_k: int,
    *,
    bias: Tensor | None = None,
    forced: Tensor | None = None,
    real_rows: Tensor | None = None,
    backend: backends.Backend = "auto",
) -> Routing:
    """Route T tokens by logits (T, E), in float32 (float64 for float64). Never waits for the device.

    `bias` (E,) is added to the probabilities for the choice, not for the weights. `forced` (T, k) integers are experts
    kept from an earlier choice, for a recomputation that must not choose anew. Rows where `real_rows` (T,) is False are
    routed but left out of the counts and sums.

    Raises ValueError where top_k is not in 1..E, or another shape does not fit.
    """
    tokens, num_experts = logits.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"route: top_k is {top_k}, expected 1 to the number of experts, {num_experts}")
    shapes = {"bias": (bias, (num_experts,)), "forced": (forced, (tokens, top_k)), "real_rows": (real_rows, (tokens,))}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"route: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if backends.choose(backend, logits) == "torch":
        return reference(logits, top_k, bias, forced, real_rows)
    given = (None if tensor is None else tensor.contiguous() for tensor in (bias, forced, real_rows))
    return Routing(*_route(logits.contiguous(), top_k, *given))


def hf_load_balancing_loss(logits: Sequence[Tensor], num_experts: int, top_k: int) -> Tensor:
    """Hugging Face's per-batch loss over all layers' logits, each (T, E): E * sum_e f_e * P_e, for comparison.

    f_e is the number of choices of expert e a token (they sum to k, not to 1: balance gives k), P_e its mean
    probability, both over the tokens of all layers pooled. Source: Fedus et al., "Switch Transformers" (2021), eq. 4.
    """
    probabilities = torch.cat([layer.float() for layer in logits]).softmax(-1)
    chosen = F.one_hot(probabilities.topk(top_k, -1).indices, num_experts).sum(1)
    return num_experts * (chosen.float().mean(0) * probabilities.mean(0)).sum()
