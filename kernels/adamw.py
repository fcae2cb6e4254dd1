"""AdamW in place, with stochastic rounding where a parameter or a moment is stored in bf16.

    m' = b1 m + (1 - b1) g                                  b1, b2 the betas, t the step, from 1
    v' = b2 v + (1 - b2) g**2
    p' = (1 - lr wd) p - lr / (1 - b1**t) m' / (sqrt(v') / sqrt(1 - b2**t) + eps)

Loshchilov and Hutter 2019, algorithm 2, with the decay scaled by the learning rate as in PyTorch. All in fp32, from the
stored values; m' and v' enter p' before they are rounded.

An update is often smaller than half the distance between two bf16 numbers, and rounding to nearest would lose it each
time. Stochastic rounding adds 16 random bits to the 16 that bf16 does not have, and cuts those off: of the two
neighbours the farther one is taken with the probability that makes the expectation exact. The bits are those of element
i of the whole parameter, wherever its shard lies:

    words = philox(counter = (i // 2, (i // 2) >> 32, tensor_id, step), key = (seed, seed >> 32))   each mod 2**32
    a, b  = words[0:2] for even i, words[2:4] for odd
    p' takes the low half of a, m' its high half, v' the low half of b

The torch and the Triton path give the same bits: the kernel is compiled without fusing multiply and add, and its
square root and division are those of IEEE 754.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill.kernels import launch
from tokenmill.kernels.backends import Backend, choose
from tokenmill.kernels.philox import halves, philox

_NAN = tl.constexpr(0x7FC00000)

# ------------------------------------------------------------------------------------------ plain torch, the reference


def random_bits(seed: int, step: int | Tensor, tensor_id: int, offset: int, like: Tensor) -> tuple[Tensor, ...]:
    """Three int32 tensors of 16 random bits an element, for parameter and moments, shaped and placed as `like`, whose
    first element is number `offset` of the whole parameter.
    """
    end = offset + like.numel()
    pairs = torch.arange(offset // 2, (end + 1) // 2, device=like.device)
    words = [torch.as_tensor(word) & 0xFFFFFFFF for word in (tensor_id, step)]
    w0, w1, w2, w3 = philox([*halves(pairs), *words], halves(torch.as_tensor(seed)))
    a, b = (torch.stack(w, dim=-1).flatten()[offset % 2 :][: like.numel()] for w in ((w0, w2), (w1, w3)))
    return tuple(bits.to(torch.int32).view(like.shape) for bits in (a & 0xFFFF, a >> 16, b & 0xFFFF))


def stochastic_round(value: Tensor, bits: Tensor) -> Tensor:
    """bf16 of an fp32 tensor: its neighbour away from 0 where its last 16 bits and `bits` (int32) carry, else that
    towards 0. Infinities and NaN stay; beyond the largest bf16 number lies infinity.
    """
    rounded = torch.where(value.isnan(), _NAN.value, value.view(torch.int32) + bits)
    return (rounded >> 16).to(torch.int16).view(torch.bfloat16)


def reference(
    parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, bits: tuple[Tensor, ...],
    coefficients: tuple[float | Tensor, ...], beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """The update, in place. `bits` as of `random_bits`, the coefficients as of `_coefficients`."""
    decay, step_size, correction = coefficients
    g = gradient.float()
    m = exp_avg.float()
    m = m + (g - m) * (1 - beta1)
    v = exp_avg_sq.float() * beta2 + g * g * (1 - beta2)
    root = v.double().sqrt().float()  # IEEE's: a CPU's fp32 vector square root may be off in the last bit
    p = parameter.float() * decay - m / (root * correction + eps) * step_size
    for stored, value, random in zip((parameter, exp_avg, exp_avg_sq), (p, m, v), bits, strict=True):
        stored.copy_(stochastic_round(value, random) if stored.dtype == torch.bfloat16 else value)


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def _store(pointer, index, mask, value, bits):
    if pointer.dtype.element_ty == tl.bfloat16:
        rounded = tl.where(value != value, _NAN, value.to(tl.uint32, bitcast=True) + bits)
        tl.store(pointer + index, (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointer + index, value, mask=mask)


@triton.jit(do_not_specialize=["pair", "step", "seed", "tensor_id"])
def _adamw_kernel(
    parameter, gradient, exp_avg, exp_avg_sq, count, pair, skip, step, seed, tensor_id,
    decay, step_size, correction, rest1, beta2, rest2, eps,
    ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of elements a program, from the first of `pair`, the pair in which the shard begins; `skip` is 1 where
    it begins with that pair's second. ON_DEVICE: step and coefficients that depend on it are pointers.
    """
    if ON_DEVICE:
        step, decay = tl.load(step), tl.load(decay)
        step_size, correction = tl.load(step_size), tl.load(correction)
    block, seed = tl.program_id(0).to(tl.int64), seed.to(tl.int64)

    group = pair + block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    same = tl.zeros((BLOCK // 2,), tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        group.to(tl.uint32), (group >> 32).to(tl.uint32), same + tensor_id.to(tl.uint32), same + step.to(tl.uint32),
        seed.to(tl.uint32), (seed >> 32).to(tl.uint32),
    )  # fmt: skip
    a, b = tl.interleave(w0, w2), tl.interleave(w1, w3)

    index = block * BLOCK + tl.arange(0, BLOCK) - skip
    mask = (index >= 0) & (index < count)
    p = tl.load(parameter + index, mask=mask).to(tl.float32)
    g = tl.load(gradient + index, mask=mask).to(tl.float32)
    m = tl.load(exp_avg + index, mask=mask).to(tl.float32)
    v = tl.load(exp_avg_sq + index, mask=mask).to(tl.float32)
    m = m + (g - m) * rest1
    v = v * beta2 + g * g * rest2
    p = p * decay - tl.div_rn(m, tl.sqrt_rn(v) * correction + eps) * step_size
    _store(parameter, index, mask, p, a & 0xFFFF)
    _store(exp_avg, index, mask, m, a >> 16)
    _store(exp_avg_sq, index, mask, v, b & 0xFFFF)


# ---------------------------------------------------------------------------------------------------- public function


@torch.no_grad()
def adamw_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    seed: int,
    tensor_id: int,
    offset: int = 0,
    backend: Backend = "auto",
) -> None:
    """One step of AdamW on a parameter or a shard of one; parameter, exp_avg and exp_avg_sq change in place.

    The four have one shape, each in bf16 or fp32; what is bf16 is rounded stochastically, what is fp32 not at all.
    `step` counts from 1. lr and step are numbers, or 0-d tensors on the device, which are read there: a captured graph
    then sees new values, and the host does not wait. Random bits depend on seed (0 <= seed < 2**63), step, tensor_id,
    the parameter's number among the others, and the element; `offset` is the number of the shard's first element in
    the whole parameter.

    Raises ValueError where a shape, a dtype, a stride or a number does not fit.
    """
    _check(parameter, gradient, exp_avg, exp_avg_sq, step, seed, tensor_id, offset)
    tensors = parameter, gradient.contiguous(), exp_avg, exp_avg_sq
    on_device = isinstance(lr, Tensor) or isinstance(step, Tensor)
    if on_device:
        lr = _scalar(lr, torch.float64, parameter.device)
        step = _scalar(step, torch.int64, parameter.device)
    coefficients = _coefficients(lr, beta1, beta2, weight_decay, step)
    if choose(backend, *tensors) == "torch":
        bits = random_bits(seed, step, tensor_id, offset, parameter)
        reference(*tensors, bits, coefficients, beta1, beta2, eps)
    elif count := parameter.numel():
        skip = offset % 2
        decay, step_size, correction = coefficients
        with torch.cuda.device_of(parameter):
            settings: dict[str, Any] = launch.adamw(count + skip) | {"ON_DEVICE": on_device}
            _adamw_kernel[(triton.cdiv(count + skip, settings["BLOCK"]),)](
                *tensors, count, offset // 2, skip, step, seed, tensor_id,
                decay, step_size, correction, 1 - beta1, beta2, 1 - beta2, eps, **settings,
            )  # fmt: skip


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-d tensor on the device, made without waiting for it."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def _coefficients(
    lr: float | Tensor, beta1: float, beta2: float, weight_decay: float, step: int | Tensor
) -> tuple[float | Tensor, ...]:
    """decay, step_size and correction, made in fp64: numbers, or 0-d fp32 tensors where lr and step are tensors."""
    exponent = step.double() if isinstance(step, Tensor) else step
    values = [1 - lr * weight_decay, lr / (1 - beta1**exponent), (1 - beta2**exponent) ** -0.5]
    return tuple(value.float() if isinstance(value, Tensor) else value for value in values)


def _check(
    parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
    step: int | Tensor, seed: int, tensor_id: int, offset: int,
) -> None:  # fmt: skip
    tensors = {"parameter": parameter, "gradient": gradient, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in tensors.items():
        if tensor.shape != parameter.shape or tensor.device != parameter.device:
            raise ValueError(
                f"{name} is {[*tensor.shape]} on {tensor.device}, the parameter {[*parameter.shape]} on "
                f"{parameter.device}: expected the same of both"
            )
        if tensor.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"{name} is {tensor.dtype}: expected torch.bfloat16 or torch.float32")
        if name != "gradient" and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}: expected a contiguous tensor, to change in place")
    if not isinstance(step, Tensor) and step < 1:
        raise ValueError(f"step is {step}: expected a count from 1")
    for name, value in (("seed", seed), ("tensor_id", tensor_id), ("offset", offset)):
        if not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value}: expected 0 <= {name} < 2**63")
