"""Weights in 4 bits: NF4 with double quantisation, byte for byte in bitsandbytes' format.

A tensor is cut into blocks of 64 values. Each value, divided by its block's largest magnitude (the block's scale),
becomes the nearest of 16 quantiles of the normal distribution, two to a byte, the first in the upper half. The scales,
their mean taken away, are quantised likewise to 8 bits in blocks of 256. That is 0.5 byte a weight for the codes, and
0.0159 for the scales. Source: Dettmers et al., "QLoRA" (2023), section 3 and appendix E; the 8-bit code is that of
Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022), section 1.3.

    quantise      a tensor to its `Packed` form
    dequantise    back, through bitsandbytes' kernels where it is installed on a GPU, through PyTorch elsewhere
    NF4Weight     stands where a parameter was; called with a dtype, it gives the weight
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK, SCALES_BLOCK = 64, 256
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Packed(NamedTuple):
    codes: Tensor  # (ceil(n / 2),) uint8
    scales: Tensor  # (blocks,) uint8
    scales_scales: Tensor  # (ceil(blocks / 256),) float32
    offset: Tensor  # () float32 the mean of the scales

    @staticmethod
    def empty(values: int) -> Packed:
        blocks = -(-values // BLOCK)
        return Packed(
            torch.empty(-(-values // 2), dtype=torch.uint8),
            torch.empty(blocks, dtype=torch.uint8),
            torch.empty(-(-blocks // SCALES_BLOCK), dtype=torch.float32),
            torch.empty((), dtype=torch.float32),
        )


@functools.cache
def _codes(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The 16 values of a code, both values of each byte (256, 2), and the 256 values of a scale's code: 0, 1, and
    either sign of 2**i fractions in each decade from 10**-6 up (i from 0 to 6).
    """
    nf4 = torch.tensor(NF4)
    ends = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
    decades = torch.cat([10 ** (i - 6) * ((e[:-1] + e[1:]) / 2) for i, e in enumerate(ends)])
    dynamic = torch.cat([-decades, decades, torch.tensor([0.0, 1.0])]).sort().values
    return nf4.to(device), torch.stack([nf4.repeat_interleave(16), nf4.repeat(16)], 1).to(device), dynamic.to(device)


def _nearest(values: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The index of each value's nearest in `code`, after division by its block's largest magnitude; and those."""
    blocks = F.pad(values, (0, -len(values) % block)).view(-1, block)
    largest = blocks.abs().amax(1)
    scaled = blocks * (1 / largest.clamp(min=1e-38))[:, None]
    nearest = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True)
    return nearest.to(torch.uint8).view(-1)[: len(values)], largest


def quantise(weight: Tensor) -> Packed:
    """Any shape, read row by row."""
    nf4, _, dynamic = _codes(weight.device)
    nearest, largest = _nearest(weight.float().reshape(-1), nf4, BLOCK)
    pairs = F.pad(nearest, (0, len(nearest) % 2), value=NF4.index(0.0)).view(-1, 2)
    offset = largest.mean()
    return Packed(pairs[:, 0] << 4 | pairs[:, 1], *_nearest(largest - offset, dynamic, SCALES_BLOCK), offset)


def dequantise(packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight, computed in float32 and rounded once."""
    if packed.codes.is_cuda and (package := _bitsandbytes()) is not None:
        return dequantise_bitsandbytes(package, packed, shape, dtype)
    _, pairs, dynamic = _codes(packed.codes.device)
    scales = dynamic.index_select(0, packed.scales.int())
    scales *= packed.scales_scales.repeat_interleave(SCALES_BLOCK)[: len(scales)]
    scales += packed.offset
    values = pairs.index_select(0, packed.codes.int()).view(-1)
    padded = F.pad(values, (0, len(scales) * BLOCK - len(values))).view(-1, BLOCK)
    padded *= scales[:, None]
    return padded.view(-1)[: torch.Size(shape).numel()].view(shape).to(dtype)


@functools.cache
def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional as package  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return package


def dequantise_bitsandbytes(package: Any, packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    nf4, _, dynamic = _codes(packed.codes.device)
    scales = package.QuantState(absmax=packed.scales_scales, code=dynamic, blocksize=SCALES_BLOCK, dtype=torch.float32)
    state = package.QuantState(
        absmax=packed.scales, shape=torch.Size(shape), code=nf4, blocksize=BLOCK, quant_type="nf4", dtype=dtype,
        offset=packed.offset, state2=scales,
    )  # fmt: skip
    return package.dequantize_4bit(packed.codes[:, None], state)


class _Part(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.shape = (rows, columns)
        for name, tensor in Packed.empty(rows * columns)._asdict().items():
            self.register_buffer(name, tensor)

    def packed(self) -> Packed:
        return Packed(*(getattr(self, name) for name in Packed._fields))


class NF4Weight(nn.Module):
    """A frozen weight of `shape` in 4 bits. Seen as a matrix it is a stack of parts of so many `rows`, each quantised
    for itself, as it is in a Hugging Face model. Its tensors are buffers: under FSDP every rank holds them whole.
    """

    def __init__(self, shape: Sequence[int], rows: Sequence[int]) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.parts = nn.ModuleList(_Part(count, shape[-1]) for count in rows)

    def fill(self, start: int, weight: Tensor) -> None:
        """Quantise `weight`, the part whose first row is `start`."""
        at = 0
        for part in self.parts:
            assert isinstance(part, _Part)
            if at == start:
                for kept, made in zip(part.packed(), quantise(weight.to(part.packed().codes.device)), strict=True):
                    kept.copy_(made)
            at += part.shape[0]

    def forward(self, dtype: torch.dtype) -> Tensor:
        parts = [dequantise(part.packed(), part.shape, dtype) for part in self.parts if isinstance(part, _Part)]
        whole = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.shape)
        if (made := _made.get()) is not None:
            made[whole.untyped_storage().data_ptr()] = self, whole
        return whole


def dense(weight: Tensor | nn.Module, dtype: torch.dtype) -> Tensor:
    """A module's weight as a tensor: itself, or made of its 4 bits."""
    return weight if isinstance(weight, Tensor) else weight(dtype)


# What is dequantised within `saved_in_4_bits`, by the address of its storage.
_made: ContextVar[dict[int, tuple[NF4Weight, Tensor]] | None] = ContextVar("made", default=None)


@contextmanager
def saved_in_4_bits() -> Iterator[None]:
    """Within: autograd keeps no dequantised weight for the backward pass, which makes each of them again, once, and
    holds it until it is through with what ran within. They exist until the end of the context, so that no other
    tensor can come to lie, and be saved, where one of them was.
    """
    again: dict[NF4Weight, Tensor] = {}
    made: dict[int, tuple[NF4Weight, Tensor]] = {}

    def pack(tensor: Tensor) -> Any:
        if (found := made.get(tensor.untyped_storage().data_ptr())) is None:
            return tensor.detach()  # a node's own result would keep the node, and so itself, alive
        return found[0], tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        weight, dtype, *view = packed
        if weight not in again:
            again[weight] = weight(dtype)
        return again[weight].as_strided(*view)

    token = _made.set(made)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _made.reset(token)
        made.clear()
