"""Embedding lookup, with NEFTune noise (Jain et al. 2023) made on the fly.

    out[t] = weight[tokens[t]] + u(t) * scale(document of t)          tokens (T,), weight (V, D), out (T, D)
    scale  = alpha / sqrt(L * D)                                      L the length of the whole document
    u      ~ U(-1, 1)                                                 a value a channel

u is a pure function of (seed, step, document id, position in the document, channel), by Philox4x32-10 (Salmon et al.
2011), so that a document has the same noise alone, packed and reordered, and nothing is stored for backward:

    key    = the first two words of philox(counter = (step, step >> 32, "NEFT", 0), key = (seed, seed >> 32))
    words  = philox(counter = (id, id >> 32, position, channel // 4), key)           each taken modulo 2**32
    u      = (2 * (words[channel % 4] >> 8) + 1 - 2**24) / 2**24                      exact in fp32

The bits agree between this file's torch and Triton and csrc/philox.hpp: scale is rounded once from fp64 to fp32, the
product and the sum are rounded apart in fp32, and the sum is then rounded to the weight's dtype. A ghost document has
no noise.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from tokenmill.kernels import launch
from tokenmill.kernels.backends import Backend, choose
from tokenmill.kernels.layout import GHOST, Layout
from tokenmill.kernels.philox import halves, philox

_NEFT = 0x4E454654  # "NEFT": keeps this use of (seed, step) apart from any other
_GHOST = tl.constexpr(GHOST)


@dataclass(frozen=True)
class Noise:
    """NEFTune's alpha and what its random bits depend on. A number, or a 0-d tensor on the device where a captured
    graph is replayed with other values.
    """

    alpha: float | Tensor
    seed: int | Tensor  # 0 <= seed < 2**63
    step: int | Tensor  # 0 <= step < 2**63

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, Tensor) and not self.alpha >= 0:
            raise ValueError(f"noise alpha is {self.alpha}: expected a number >= 0")
        for name, value in (("seed", self.seed), ("step", self.step)):
            if not isinstance(value, Tensor) and not 0 <= value < 2**63:
                raise ValueError(f"noise {name} is {value}: expected 0 <= {name} < 2**63")


# ------------------------------------------------------------------------------------------ plain torch, the reference


def neftune_uniform(seed: Tensor, step: Tensor, document_ids: Tensor, positions: Tensor, dim: int) -> Tensor:
    """(T, dim) fp32 in (-1, 1), from 0-d int64 seed and step and (T,) ids and positions."""
    zero = torch.zeros_like(step)
    k0, k1, _, _ = philox([*halves(step), zero + _NEFT, zero], halves(seed))
    low, high = halves(document_ids[:, None])
    group = torch.arange((dim + 3) // 4, device=positions.device)
    words = philox([low, high, positions[:, None].long(), group], (k0, k1))
    channels = torch.stack(words, dim=-1).flatten(1)[:, :dim]
    return (2 * (channels >> 8) + 1 - 2**24).float() * 2.0**-24


def neftune_scales(alpha: Tensor, document_ids: Tensor, document_lengths: Tensor, dim: int) -> Tensor:
    """(N,) fp32, from 0-d fp64 alpha and (N,) ids and lengths."""
    scales = torch.div(alpha, (document_lengths.double() * dim).sqrt()).float()
    return torch.where(document_ids == GHOST, 0.0, scales)


def reference(tokens: Tensor, weight: Tensor, noise: list[Tensor], alpha: float, seed: int, step: int) -> Tensor:
    """The lookup, with noise if `noise` and the numbers are what `_noise_arguments` makes, without if it is empty."""
    rows = F.embedding(tokens, weight)
    if not noise:
        return rows
    segments, positions, document_ids, document_lengths, *on_device = noise
    a, s, t = on_device or (torch.tensor(alpha, dtype=torch.float64), torch.tensor(seed), torch.tensor(step))
    dim = weight.shape[1]
    scale = neftune_scales(a, document_ids, document_lengths, dim)[segments, None]
    uniform = neftune_uniform(s, t, document_ids[segments], positions, dim)
    wide = torch.promote_types(weight.dtype, torch.float32)
    noisy = (rows.to(wide) + (uniform * scale).to(wide)).to(weight.dtype)
    return torch.where(scale > 0, noisy, rows)  # -0.0 + 0.0 is 0.0: a scale of 0 must leave no trace


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _row_mask(token, vocab, channels, dim):
    """The channels of a row of the weight; none where the token is outside the vocabulary."""
    return channels < tl.where((token >= 0) & (token < vocab), dim, 0)


@triton.jit(do_not_specialize=["alpha", "seed", "step"])
def _embed_kernel(
    tokens, weight, out, segments, positions, document_ids, document_lengths, vocab, dim, alpha, seed, step,
    NOISE: tl.constexpr, ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of channels of one row a program. A token outside the vocabulary shows as NaN. ON_DEVICE: alpha, seed and
    step are pointers; else alpha is the bits of an fp64.
    """
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row).to(tl.int64)
    mask = _row_mask(token, vocab, channels, dim)
    value = tl.load(weight + token * dim + channels, mask=mask, other=float("nan"))

    if NOISE:
        segment = tl.load(segments + row)
        document = tl.load(document_ids + segment)
        length = tl.load(document_lengths + segment).to(tl.float64)
        if ON_DEVICE:
            a, s, t = tl.load(alpha), tl.load(seed), tl.load(step)
        else:
            a = alpha.to(tl.int64).to(tl.float64, bitcast=True)
            s, t = seed.to(tl.int64), step.to(tl.int64)
        scale = tl.where(document == _GHOST, 0.0, (a / tl.sqrt(length * dim)).to(tl.float32))
        zero = tl.zeros((1,), tl.uint32)
        k0, k1, _, _ = tl.philox_impl(
            zero + t.to(tl.uint32), zero + (t >> 32).to(tl.uint32), zero + 0x4E454654, zero,
            s.to(tl.uint32), (s >> 32).to(tl.uint32),
        )  # fmt: skip
        group = (tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        same = group * 0
        w0, w1, w2, w3 = tl.philox_impl(
            same + document.to(tl.uint32), same + (document >> 32).to(tl.uint32),
            same + tl.load(positions + row).to(tl.uint32), group, k0, k1,
        )  # fmt: skip
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # to channel order
        uniform = (2 * (words >> 8).to(tl.int32) + (1 - (1 << 24))).to(tl.float32) * (1.0 / (1 << 24))
        noisy = (value.to(tl.float32) + uniform * scale).to(value.dtype)
        value = tl.where(scale > 0, noisy, value)

    tl.store(out + row * dim + channels, value, mask=channels < dim)


# The gradient of a row of the weight is the sum of d_out over the tokens that looked it up. Sorting the tokens makes
# them runs of equal ids; summing each in order, with no atomic additions, makes the same bits every time. A frequent
# token's run may span most of the batch, so a program sums a fixed piece of the sorted tokens: a run that lies within
# one piece is stored at once, the parts of others go to `partials` (pieces, 2, D): slot 0 where the run began in an
# earlier piece, slot 1 where it begins in this one.


@triton.jit
def _sum_pieces_kernel(
    sorted_tokens, order, d_out, partials, d_weight, count, vocab, dim, PIECE: tl.constexpr, BLOCK: tl.constexpr
):
    piece = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < dim
    first = piece * PIECE
    token = tl.load(sorted_tokens + first)
    began_here = tl.load(sorted_tokens + first - 1, mask=first > 0, other=-1) != token
    partials += piece.to(tl.int64) * 2 * dim + channels
    total = tl.zeros((BLOCK,), tl.float32)

    for i in range(PIECE):
        at = first + i
        row = tl.load(order + at, mask=at < count, other=0)
        present = channels < tl.where(at < count, dim, 0)
        total += tl.load(d_out + row * dim + channels, mask=present, other=0.0).to(tl.float32)
        following = tl.load(sorted_tokens + at + 1, mask=at + 1 < count, other=-1)
        if following != token:  # the run ends here
            if began_here:
                own = _row_mask(token, vocab, channels, dim)
                tl.store(d_weight + token.to(tl.int64) * dim + channels, total, mask=own)
            else:
                tl.store(partials, total, mask=mask)
            total = tl.zeros((BLOCK,), tl.float32)
            began_here = True
        token = following

    if token == tl.load(sorted_tokens + first + PIECE - 1, mask=first + PIECE <= count, other=-2):  # the run goes on
        tl.store(partials + tl.where(began_here, dim, 0), total, mask=mask)


@triton.jit
def _join_pieces_kernel(sorted_tokens, partials, d_weight, count, vocab, dim, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """For the run that begins in this piece and goes on after it, add its parts in order."""
    piece = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < dim
    first = piece * PIECE
    end = first + PIECE
    token = tl.load(sorted_tokens + tl.minimum(end, count) - 1)
    goes_on = tl.load(sorted_tokens + end, mask=end < count, other=-1) == token
    began_here = tl.load(sorted_tokens + first - 1, mask=first > 0, other=-1) != token
    if goes_on & began_here:
        part = partials + piece.to(tl.int64) * 2 * dim + channels
        total = tl.load(part + dim, mask=mask, other=0.0)
        while tl.load(sorted_tokens + end, mask=end < count, other=-1) == token:
            part += 2 * dim
            end += PIECE
            total += tl.load(part, mask=mask, other=0.0)
        own = _row_mask(token, vocab, channels, dim)
        tl.store(d_weight + token.to(tl.int64) * dim + channels, total, mask=own)


# --------------------------------------------------------------------------------------------------- autograd binding


@library.custom_op("tokenmill::embed", mutates_args=())
@launch.on_its_device
def _embed(
    tokens: Tensor, weight: Tensor, noise: list[Tensor], alpha: float, seed: int, step: int, use_triton: bool
) -> Tensor:
    if not use_triton:  # in the operator too: a compiler that saw the sum could fuse it with the product
        return reference(tokens, weight, noise, alpha, seed, step)
    segments, positions, document_ids, document_lengths, *on_device = noise or [None] * 4
    vocab, dim = weight.shape
    if weight.dtype == torch.bfloat16 and not weight.is_cuda:
        # Triton's interpreter truncates to bf16 where a GPU rounds, so there the sum is left in fp32 and rounded here.
        return _embed(tokens, weight.float(), noise, alpha, seed, step, use_triton).to(weight.dtype)
    out = weight.new_empty(tokens.numel(), dim)
    if out.numel():
        # With noise, 32 channels a thread: its key and its scale are each thread's own work.
        settings: dict[str, Any] = launch.channels("embed_noise", dim, 32) if noise else launch.channels("embed", dim)
        settings |= {"NOISE": bool(noise), "ON_DEVICE": bool(on_device)}
        (alpha_bits,) = struct.unpack("q", struct.pack("d", alpha))  # a Python float would arrive as fp32
        scalars: list[Any] = on_device or [alpha_bits, seed, step]
        _embed_kernel[(tokens.numel(), triton.cdiv(dim, settings["BLOCK"]))](
            tokens.contiguous(), weight.contiguous(), out, segments, positions, document_ids, document_lengths,
            vocab, dim, *scalars, **settings,
        )  # fmt: skip
    return out


@_embed.register_fake
def _(tokens, weight, noise, alpha, seed, step, use_triton):
    return weight.new_empty(tokens.numel(), weight.shape[1])


@library.custom_op("tokenmill::embed_backward", mutates_args=())
@launch.on_its_device
def _embed_backward(d_out: Tensor, tokens: Tensor, vocab: int, use_triton: bool) -> Tensor:
    """(V, D) of d_out's dtype from d_out (T, D), summed in fp32; 0 where a row was not looked up."""
    if not use_triton:
        return torch.ops.aten.embedding_dense_backward(d_out, tokens, vocab, -1, False)
    count, dim = d_out.shape
    d_weight = d_out.new_zeros(vocab, dim)
    if d_out.numel():
        sorted_tokens, order = torch.sort(tokens, stable=True)
        pieces = triton.cdiv(count, launch.RUN_PIECE)
        partials = d_out.new_empty(pieces, 2, dim, dtype=torch.float32)
        settings: dict[str, Any] = launch.channels("embed_backward", dim) | {"PIECE": launch.RUN_PIECE}
        grid = (pieces, triton.cdiv(dim, settings["BLOCK"]))
        d_out = d_out.contiguous()
        _sum_pieces_kernel[grid](sorted_tokens, order, d_out, partials, d_weight, count, vocab, dim, **settings)
        _join_pieces_kernel[grid](sorted_tokens, partials, d_weight, count, vocab, dim, **settings)
    return d_weight


@_embed_backward.register_fake
def _(d_out, tokens, vocab, use_triton):
    return d_out.new_empty(vocab, d_out.shape[1])


def _setup(ctx, inputs, output) -> None:
    tokens, weight, noise, *_, ctx.use_triton = inputs
    ctx.save_for_backward(tokens)
    ctx.vocab, ctx.noise_tensors = weight.shape[0], len(noise)


def _backward(ctx, d_out):
    (tokens,) = ctx.saved_tensors
    d_weight = _embed_backward(d_out, tokens, ctx.vocab, ctx.use_triton)
    return None, d_weight, [None] * ctx.noise_tensors, None, None, None, None


_embed.register_autograd(_backward, setup_context=_setup)


# ---------------------------------------------------------------------------------------------------- public function


def embed(
    tokens: Tensor,
    weight: Tensor,
    *,
    noise: Noise | None = None,
    layout: Layout | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """(T, D): the rows of weight (V, D) that tokens (T,) int32 name, with NEFTune noise if `noise` is given.

    `layout` says where documents lie and how long they are, and is needed for noise only. Without noise, with alpha 0
    and in ghost documents the result is bit-identical to `F.embedding`.

    Raises ValueError where a shape does not fit, or noise comes without a layout.
    """
    if tokens.ndim != 1 or weight.ndim != 2:
        raise ValueError(f"expected tokens (T,) and weight (V, D), got {[*tokens.shape]} and {[*weight.shape]}")
    made, *numbers = ([], 0.0, 0, 0) if noise is None else _noise_arguments(noise, layout, tokens)
    use_triton = choose(backend, tokens, weight) == "triton"
    if not made and not use_triton:
        return F.embedding(tokens, weight)
    return _embed(tokens, weight, made, *numbers, use_triton)


def _noise_arguments(noise: Noise, layout: Layout | None, tokens: Tensor) -> tuple[list[Tensor], float, int, int]:
    """segments (T,), positions (T,), document_ids (N,) and document_lengths (N,); and the numbers alpha, seed and step,
    or, where one of them is a tensor, all three as tensors behind the others, on the tokens' device, made without
    waiting for it. No tensors where alpha is 0.
    """
    if layout is None:
        raise ValueError("noise needs a layout: its scale and its bits depend on the documents")
    if layout.positions.shape != tokens.shape:
        raise ValueError(f"the layout has {layout.positions.numel()} rows, tokens {tokens.numel()}")
    if not isinstance(noise.alpha, Tensor) and noise.alpha == 0:
        return [], 0.0, 0, 0
    made = [layout.segment_ids, layout.positions, layout.document_ids, layout.document_lengths]
    alpha, seed, step = noise.alpha, noise.seed, noise.step
    if not (isinstance(alpha, Tensor) or isinstance(seed, Tensor) or isinstance(step, Tensor)):
        return made, alpha, seed, step

    def scalar(value: float | Tensor, dtype: torch.dtype) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(tokens.device, dtype)
        return torch.full((), value, dtype=dtype, device=tokens.device)

    return [*made, scalar(alpha, torch.float64), scalar(seed, torch.int64), scalar(step, torch.int64)], 0.0, 0, 0
