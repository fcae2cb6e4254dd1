"""Matrix products over the rows of each expert, with no padding and no wait for how many rows each has.

Rows (M) are sorted by expert, and offsets (E,) int32 on the device are the ends of each expert's; p (M,) fp32 is the
router's weight of each row. For the rows of each expert e:

    product          y = x w[e]^T, or x w[e]               x (M, K), w (E, N, K) or (E, K, N), y (M, N)
    gate_up          g, u = x w[e]^T;  h = silu(g) * u     w (E, 2F, K), gate first; gate_up = [g, u] (M, 2F), h (M, F)
    hidden_gradient  d_h = dy w[e]                         dy (M, D) before weighting, w (E, D, F)
                     d_p = <d_h, h>;  p * h;  d_g and d_u of p * d_h
    weight_gradient  out[e] = a^T b                        a (M, N), b (M, K), out (E, N, K); 0 where e has no rows
                     total[e] += a^T b                     where there is a total (E, N, K) fp32

silu(g) = g * sigmoid(g). Products are accumulated in fp32 and rounded once. The output is cut into tiles; as many
programs as the GPU has multiprocessors each compute every so many-th of them, and find from `offsets` which expert a
tile belongs to. A tile at the end of an expert reads on into the rows of the next, and does not store what comes of
them. From sm_90 on, operands are read through tensor descriptors, made in the kernel, whose copies are asynchronous;
before, through pointers. Nothing depends on the order in which programs run, so results are the same bits every time.
At shapes for which tuned.json says so, PyTorch's grouped product takes the place of ours (torch_gemm.py).
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (Triton's annotations are those of its own compiler.)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenmill.kernels import launch
from tokenmill.kernels.moe import torch_gemm

# --------------------------------------------------------------------------------------------------- tiles in Triton


@triton.jit
def _matrices(base, count, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """`count` matrices (rows, columns), one behind the other, for `_read` to read in tiles."""
    if DESCRIPTORS:
        size = tl.cast(rows, tl.int64) * columns
        matrices = tl.make_tensor_descriptor(base, [count, rows, columns], [size, columns, 1], [1, ROWS, COLUMNS])
    else:
        matrices = base
    return matrices


@triton.jit
def _read(
    matrices, index, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """A tile of one of the matrices, 0 outside of it."""
    if DESCRIPTORS:
        tile = matrices.load([index, row, column]).reshape(ROWS, COLUMNS)
    else:
        base = matrices + (tl.cast(index, tl.int64) * rows + row) * columns + column
        i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        inside = (row + i < rows)[:, None] & (column + j < columns)[None, :]
        tile = tl.load(base + i[:, None] * columns + j[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def _at(base, row, column, end, width, stride, SHAPE: tl.constexpr):
    """Pointers to a tile of a matrix (end, width) whose rows lie `stride` apart, and which of them are inside."""
    i, j = tl.arange(0, SHAPE[0]), tl.arange(0, SHAPE[1])
    inside = (row + i < end)[:, None] & (column + j < width)[None, :]
    return base + tl.cast(row, tl.int64) * stride + column + i[:, None] * stride + j[None, :], inside


@triton.jit
def _tile_ends(offsets, EXPERTS: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMN_TILES: tl.constexpr):
    """(SPAN,) how many tiles there are up to the end of each expert; SPAN is a power of 2, and at least EXPERTS."""
    e = tl.arange(0, SPAN)
    start = tl.load(offsets + e - 1, mask=(e > 0) & (e < EXPERTS), other=0)
    end = tl.load(offsets + e, mask=e < EXPERTS, other=0)
    return tl.cumsum(tl.cdiv(end - start, ROWS) * COLUMN_TILES, 0)


@triton.jit
def _swizzle(tile, row_tiles, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile. Tiles go down GROUP rows before the next column, so that programs at work together
    share what they read in the L2 cache.
    """
    first = tile // (GROUP * COLUMN_TILES) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = tile % (GROUP * COLUMN_TILES)
    return first + inside % height, inside // height


@triton.jit
def _locate(tile, tile_ends, offsets, ROWS: tl.constexpr, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """The expert of a tile, its first row, the end of the expert's rows, and its column among the tiles."""
    passed = tile_ends <= tile
    e = tl.sum(passed.to(tl.int32), 0)
    start = tl.load(offsets + e - 1, mask=e > 0, other=0)
    end = tl.load(offsets + e)
    tile -= tl.max(tl.where(passed, tile_ends, 0), 0)
    row, column = _swizzle(tile, tl.cdiv(end - start, ROWS), COLUMN_TILES, GROUP)
    return e, start + row * ROWS, end, column


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns. What is done to one after the other needs half the registers."""
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


# -------------------------------------------------------------------------------------------------- Triton's kernels


@triton.jit
def _product_kernel(
    x, w, y, offsets, count,
    EXPERTS: tl.constexpr, SPAN: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    tile_ends = _tile_ends(offsets, EXPERTS, SPAN, ROWS, TILES)
    xs = _matrices(x, 1, count, K, ROWS, INNER, DESCRIPTORS)
    if TRANSPOSED:
        ws = _matrices(w, EXPERTS, N, K, COLUMNS, INNER, DESCRIPTORS)
    else:
        ws = _matrices(w, EXPERTS, K, N, INNER, COLUMNS, DESCRIPTORS)
    for tile in tl.range(tl.program_id(0), tl.max(tile_ends, 0), tl.num_programs(0), flatten=DESCRIPTORS):
        e, row, end, column = _locate(tile, tile_ends, offsets, ROWS, TILES, GROUP)
        column *= COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, K, INNER):
            a = _read(xs, 0, row, k, count, K, ROWS, INNER, DESCRIPTORS)
            if TRANSPOSED:
                b = _read(ws, e, column, k, N, K, COLUMNS, INNER, DESCRIPTORS).T
            else:
                b = _read(ws, e, k, column, K, N, INNER, COLUMNS, DESCRIPTORS)
            total = tl.dot(a, b, total, input_precision="ieee")
        at, inside = _at(y, row, column, end, N, N, total.shape)
        tl.store(at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gate_up_kernel(
    x, w, gate_up, h, offsets, count,
    EXPERTS: tl.constexpr, SPAN: tl.constexpr, F: tl.constexpr, K: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A tile of the gate and the same of up together. KEEP: store them, for a backward pass."""
    TILES: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    tile_ends = _tile_ends(offsets, EXPERTS, SPAN, ROWS, TILES)
    xs = _matrices(x, 1, count, K, ROWS, INNER, DESCRIPTORS)
    ws = _matrices(w, EXPERTS, 2 * F, K, COLUMNS, INNER, DESCRIPTORS)
    for tile in tl.range(tl.program_id(0), tl.max(tile_ends, 0), tl.num_programs(0), flatten=DESCRIPTORS):
        e, row, end, column = _locate(tile, tile_ends, offsets, ROWS, TILES, GROUP)
        column *= COLUMNS
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, K, INNER):
            a = _read(xs, 0, row, k, count, K, ROWS, INNER, DESCRIPTORS)
            b = _read(ws, e, column, k, 2 * F, K, COLUMNS, INNER, DESCRIPTORS).T
            gate = tl.dot(a, b, gate, input_precision="ieee")
            b = _read(ws, e, F + column, k, 2 * F, K, COLUMNS, INNER, DESCRIPTORS).T
            up = tl.dot(a, b, up, input_precision="ieee")
        gate_0, gate_1 = _halves(gate, ROWS, COLUMNS)
        up_0, up_1 = _halves(up, ROWS, COLUMNS)
        _store_gate_up(gate_0, up_0, gate_up, h, row, column, end, F, KEEP)
        _store_gate_up(gate_1, up_1, gate_up, h, row, column + COLUMNS // 2, end, F, KEEP)


@triton.jit
def _store_gate_up(gate, up, gate_up, h, row, column, end, F: tl.constexpr, KEEP: tl.constexpr):
    if KEEP:
        at, inside = _at(gate_up, row, column, end, F, 2 * F, gate.shape)
        tl.store(at, gate.to(gate_up.dtype.element_ty), mask=inside)
        tl.store(at + F, up.to(gate_up.dtype.element_ty), mask=inside)
    at, inside = _at(h, row, column, end, F, F, gate.shape)
    tl.store(at, (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_gradient_kernel(
    dy, w, gate_up, p, d_gate_up, ph, d_p, offsets, count,
    EXPERTS: tl.constexpr, SPAN: tl.constexpr, F: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """WEIGHTED: by p; without, p is 1. d_p (M, tiles) is the sum over each tile's columns, added up afterwards: atomic
    additions would be made in any order.
    """
    TILES: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    tile_ends = _tile_ends(offsets, EXPERTS, SPAN, ROWS, TILES)
    dys = _matrices(dy, 1, count, K, ROWS, INNER, DESCRIPTORS)
    ws = _matrices(w, EXPERTS, K, F, INNER, COLUMNS, DESCRIPTORS)
    for tile in tl.range(tl.program_id(0), tl.max(tile_ends, 0), tl.num_programs(0), flatten=DESCRIPTORS):
        e, row, end, column_tile = _locate(tile, tile_ends, offsets, ROWS, TILES, GROUP)
        column = column_tile * COLUMNS
        d_h = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, K, INNER):
            a = _read(dys, 0, row, k, count, K, ROWS, INNER, DESCRIPTORS)
            b = _read(ws, e, k, column, K, F, INNER, COLUMNS, DESCRIPTORS)
            d_h = tl.dot(a, b, d_h, input_precision="ieee")

        rows = row + tl.arange(0, ROWS)
        weight = tl.load(p + rows, mask=rows < end, other=0.0)[:, None] if WEIGHTED else 1.0
        left, right = _halves(d_h, ROWS, COLUMNS)
        sum_0 = _store_hidden_gradient(left, weight, gate_up, d_gate_up, ph, row, column, end, F)
        column += COLUMNS // 2
        sum_1 = _store_hidden_gradient(right, weight, gate_up, d_gate_up, ph, row, column, end, F)
        if WEIGHTED:
            tl.store(d_p + rows.to(tl.int64) * TILES + column_tile, sum_0 + sum_1, mask=rows < end)


@triton.jit
def _store_hidden_gradient(d_h, weight, gate_up, d_gate_up, ph, row, column, end, F: tl.constexpr):
    """Returns the sums over the columns of d_h * h."""
    at, inside = _at(gate_up, row, column, end, F, 2 * F, d_h.shape)
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    silu, slope = torch_gemm.silu_and_slope(gate)
    d_p = tl.sum(d_h * silu * up, 1)
    at, inside = _at(ph, row, column, end, F, F, d_h.shape)
    tl.store(at, (weight * silu * up).to(ph.dtype.element_ty), mask=inside)
    d_h *= weight
    at, inside = _at(d_gate_up, row, column, end, F, 2 * F, d_h.shape)
    tl.store(at + F, (d_h * silu).to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(at, (d_h * up * slope).to(d_gate_up.dtype.element_ty), mask=inside)
    return d_p


@triton.jit
def _weight_gradient_kernel(
    a, b, out, offsets,
    EXPERTS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Here the rows are what is summed over: of each expert alone, so operands must end where it does. ADD to `out`."""
    ROW_TILES: tl.constexpr = (N + ROWS - 1) // ROWS
    COLUMN_TILES: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    TILES: tl.constexpr = ROW_TILES * COLUMN_TILES
    programs = tl.num_programs(0)
    for e in range(EXPERTS):
        start = tl.load(offsets + e - 1, mask=e > 0, other=0)
        end = tl.load(offsets + e)
        a_rows = _matrices(a, 1, end, N, INNER, ROWS, DESCRIPTORS)
        b_rows = _matrices(b, 1, end, K, INNER, COLUMNS, DESCRIPTORS)
        # Tiles are dealt to the programs in turn, on from where the last expert's left off.
        first = (tl.program_id(0) + e * (programs - TILES % programs)) % programs
        for tile in range(first, TILES, programs):
            row, column = _swizzle(tile, ROW_TILES, COLUMN_TILES, GROUP)
            row *= ROWS
            column *= COLUMNS
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for k in range(start, end, INNER):
                left = _read(a_rows, 0, k, row, end, N, INNER, ROWS, DESCRIPTORS)
                right = _read(b_rows, 0, k, column, end, K, INNER, COLUMNS, DESCRIPTORS)
                total = tl.dot(left.T, right, total, input_precision="ieee")
            matrix = out + tl.cast(e, tl.int64) * N * K
            if ADD and COLUMNS > 64:  # the tile, and what it is added to, are too much at once
                left, right = _halves(total, ROWS, COLUMNS)
                _store_gradient(left, matrix, row, column, N, K, ADD)
                _store_gradient(right, matrix, row, column + COLUMNS // 2, N, K, ADD)
            else:
                _store_gradient(total, matrix, row, column, N, K, ADD)


@triton.jit
def _store_gradient(value, matrix, row, column, N: tl.constexpr, K: tl.constexpr, ADD: tl.constexpr):
    at, inside = _at(matrix, row, column, N, K, K, value.shape)
    if ADD:
        value += tl.load(at, mask=inside, other=0.0)
    tl.store(at, value.to(matrix.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------------ launchers


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _launch(kernel: Any, settings: dict[str, Any], *arguments: Any, **constants: Any) -> None:
    """Start as many programs as there are multiprocessors."""
    # The memory of descriptors made in a kernel. A thread has its own allocator, and autograd its own thread.
    triton.set_allocator(_allocate)
    kernel[(launch.multiprocessors(arguments[0].device),)](*arguments, **constants, **settings)


@launch.on_its_device
def product(x: Tensor, w: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """(M, N) of x (M, K) and w, which is (E, N, K) if `transposed`, as a linear layer has it, else (E, K, N)."""
    experts, n, k = w.shape if transposed else (w.shape[0], w.shape[2], w.shape[1])
    y = x.new_empty(x.shape[0], n)
    if not y.numel():
        return y
    name = "moe_product_t" if transposed else "moe_product"
    settings = launch.grouped_gemm(name, (experts, n, k), x.dtype)
    if settings.pop("LIBRARY", False):
        return launch.by_torch(torch_gemm.product, x, w, offsets, transposed)
    constants = dict(EXPERTS=experts, SPAN=triton.next_power_of_2(experts), N=n, K=k, TRANSPOSED=transposed)
    _launch(_product_kernel, settings, x, w, y, offsets, x.shape[0], **constants)
    return y


@launch.on_its_device
def gate_up(x: Tensor, w: Tensor, offsets: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """gate_up (M, 2F), or (0,) unless `keep`, and h (M, F), of x (M, K) and w (E, 2F, K)."""
    experts, width, k = w.shape
    h = x.new_empty(x.shape[0], width // 2)
    both = x.new_empty((x.shape[0], width) if keep else 0)
    if not h.numel():
        return both, h
    settings = launch.grouped_gemm("moe_gate_up", (experts, width // 2, k), x.dtype)
    if settings.pop("LIBRARY", False):
        return launch.by_torch(torch_gemm.gate_up, x, w, offsets, keep)
    constants = dict(EXPERTS=experts, SPAN=triton.next_power_of_2(experts), F=width // 2, K=k, KEEP=keep)
    _launch(_gate_up_kernel, settings, x, w, both, h, offsets, x.shape[0], **constants)
    return both, h


@launch.on_its_device
def hidden_gradient(
    dy: Tensor, w: Tensor, both: Tensor, offsets: Tensor, p: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """d_gate_up (M, 2F), p * h (M, F) and d_p (M,) of dy (M, D), w (E, D, F), gate_up (M, 2F) and p; None without p."""
    experts, k, f = w.shape
    rows = dy.shape[0]
    settings = launch.grouped_gemm("moe_hidden_gradient", (experts, f, k), dy.dtype)
    if settings.pop("LIBRARY", False) and rows:
        return launch.by_torch(torch_gemm.hidden_gradient, dy, w, both, offsets, p)
    d_both, ph = both.new_empty(both.shape), dy.new_empty(rows, f)
    d_p = None if p is None else p.new_empty(rows, triton.cdiv(f, settings["COLUMNS"]))
    if rows:
        constants = dict(EXPERTS=experts, SPAN=triton.next_power_of_2(experts), F=f, K=k, WEIGHTED=p is not None)
        _launch(_hidden_gradient_kernel, settings, dy, w, both, p, d_both, ph, d_p, offsets, rows, **constants)
    return d_both, ph, None if d_p is None else d_p.sum(1)


@launch.on_its_device
def weight_gradient(a: Tensor, b: Tensor, offsets: Tensor, total: Tensor | None = None) -> Tensor:
    """(E, N, K): a^T b over the rows of each expert, of a (M, N) and b (M, K); 0 where it has none.

    With `total` (E, N, K) fp32 it is added to that, which is returned.
    """
    experts, n, k = offsets.shape[0], a.shape[1], b.shape[1]
    if a.shape[0] == 0:
        return a.new_zeros(experts, n, k) if total is None else total
    settings = launch.grouped_gemm("moe_weight_gradient", (experts, n, k), a.dtype)
    if settings.pop("LIBRARY", False) and total is None:  # PyTorch's would be rounded before it is added
        return launch.by_torch(torch_gemm.weight_gradient, a, b, offsets)
    out = a.new_empty(experts, n, k) if total is None else total
    constants = dict(EXPERTS=experts, N=n, K=k, ADD=total is not None)
    _launch(_weight_gradient_kernel, settings, a, b, out, offsets, **constants)
    return out
