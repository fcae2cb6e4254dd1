"""The products of grouped_gemm.py by PyTorch's grouped product, with what comes around them in kernels of their own.

For the shapes at which tuned.json says that this is faster. What a product gives is rounded before it is used further:
gate and up before h is made of them, and d_h.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (Triton's annotations are those of its own compiler.)

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tokenmill.kernels import launch
from tokenmill.kernels.swiglu import swiglu


@triton.jit
def silu_and_slope(gate):
    """silu(gate) and its derivative."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return silu, sigmoid + silu * (1.0 - sigmoid)


@triton.jit
def _hidden_gradient_kernel(
    d_h, gate_up, p, d_gate_up, ph, d_p, FEATURES: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of one row a program; d_p (M, blocks) is added up afterwards."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < FEATURES
    narrow, wide = row * FEATURES + column, row * 2 * FEATURES + column
    weight = tl.load(p + row) if WEIGHTED else 1.0
    gate = tl.load(gate_up + wide, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + wide + FEATURES, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(d_h + narrow, mask=inside, other=0.0).to(tl.float32)
    silu, slope = silu_and_slope(gate)
    if WEIGHTED:
        tl.store(d_p + row * tl.num_programs(1) + block, tl.sum(gradient * silu * up, 0))
    tl.store(ph + narrow, (weight * silu * up).to(ph.dtype.element_ty), mask=inside)
    gradient *= weight
    tl.store(d_gate_up + wide, (gradient * up * slope).to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(d_gate_up + wide + FEATURES, (gradient * silu).to(d_gate_up.dtype.element_ty), mask=inside)


@triton.jit
def _clear_kernel(out, offsets, size, BLOCK: tl.constexpr):
    """A block of one expert's matrix a program: 0 where the expert has no rows."""
    e = tl.program_id(1)
    if tl.load(offsets + e) == tl.load(offsets + e - 1, mask=e > 0, other=0):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + e.to(tl.int64) * size + at, tl.zeros((BLOCK,), out.dtype.element_ty), mask=at < size)


def product(x: Tensor, w: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    return F.grouped_mm(x, w.mT if transposed else w, offs=offsets)


def gate_up(x: Tensor, w: Tensor, offsets: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    both = product(x, w, offsets, True)
    h = swiglu(both, backend="triton")
    return (both if keep else both.new_empty(0)), h


def hidden_gradient(
    dy: Tensor, w: Tensor, both: Tensor, offsets: Tensor, p: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    d_h = product(dy, w, offsets, False)
    rows, features = d_h.shape
    settings: dict[str, Any] = launch.swiglu("moe_hidden_gradient_rows", features)
    blocks = triton.cdiv(features, settings["BLOCK"])
    d_both, ph = both.new_empty(both.shape), dy.new_empty(rows, features)
    d_p = None if p is None else p.new_empty(rows, blocks)
    _hidden_gradient_kernel[(rows, blocks)](
        d_h, both, p, d_both, ph, d_p, FEATURES=features, WEIGHTED=p is not None, **settings
    )
    return d_both, ph, None if d_p is None else d_p.sum(1)


def weight_gradient(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """What PyTorch leaves of the matrix of an expert without rows is not said anywhere: it is made 0."""
    out = F.grouped_mm(a.T, b, offs=offsets)
    experts, size = out.shape[0], out[0].numel()
    settings: dict[str, Any] = launch.elementwise("moe_clear", size)
    _clear_kernel[(triton.cdiv(size, settings["BLOCK"]), experts)](out, offsets, size, **settings)
    return out
