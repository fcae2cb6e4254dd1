"""Attention by PyTorch's own scaled_dot_product_attention, on tiles: the workhorse on a CPU, and right on any device.

A document that fits in the window is one tile, causal and without a mask. A longer one, or a segment with keys of its
own, is cut into tiles of query rows, each with the keys from the first that its first row sees to the last that its
last row sees, and a mask of that size. Tiles of similar size are padded to one size (with repetitions of their own last
row, which nothing reads) and go through one call together. So time grows with documents and window, and no mask is
larger than T x (window + tile). Padding takes part in no other document's arithmetic, not even as 0 times something.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.kernels.layout import Layout, bucket


def supports(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Everything that PyTorch computes."""
    return None


class _Tile(NamedTuple):
    """Query rows and (gathered) key rows that meet in one tile. Its last query sees the last key."""

    masked: bool
    rows: int
    span: int
    query: int  # first row
    key: int  # first row


class _Group(NamedTuple):
    tiles: int
    mask: Tensor | None  # (tiles, 1, rows, span) 0 or -inf in the queries' dtype, or None: causal, rows = span


@dataclass(frozen=True)
class _Plan:
    queries: Tensor  # (sum of tiles * rows,) int64 rows of q, group after group
    keys: Tensor  # (sum of tiles * span,) int64 rows of k and v
    query_sizes: list[int]  # tiles * rows of each group
    key_sizes: list[int]  # tiles * span
    groups: list[_Group]
    where: Tensor  # (T,) int64 place of each query's result: 1 + its place in `queries`, or 0 where it sees no key


def _tiles(layout: Layout, window: int | None) -> Iterator[_Tile]:
    query_bounds = layout.cu_seqlens.tolist()
    key_bounds = query_bounds if layout.keys is None else layout.keys.cu_seqlens.tolist()
    for n in range(len(query_bounds) - 1):
        key_start, key_end = key_bounds[n : n + 2]
        query_end = query_bounds[n + 1]
        shift = key_end - query_end  # a query's own key is this many rows after it
        query_start = max(query_bounds[n], key_start - shift)  # queries before it see no key
        length, keys = query_end - query_start, key_end - key_start
        if length == keys and (window is None or length <= window):
            if length:
                yield _Tile(False, length, length, query_start, key_start)
            continue
        reach = keys if window is None else min(window, keys)
        # Each tile reads the reach again: a quarter of it in rows bounds that by 4 times the keys.
        step = max(32, bucket(reach) // 4)
        for start in range(query_start, query_end, step):
            end = min(start + step, query_end)
            first = max(key_start, start + shift + 1 - reach)
            yield _Tile(True, end - start, end + shift - first, start, first)


def _groups(tiles: list[_Tile]) -> Iterator[list[_Tile]]:
    """Tiles of one kind and of similar size together: padding adds at most a quarter to a side, or 16 rows."""
    group: list[_Tile] = []
    for tile in sorted(tiles, reverse=True):
        if group:
            masked, rows, span, *_ = group[0]
            rows_fit = rows - tile.rows <= max(16, rows // 4)
            spans_fit = abs(span - tile.span) <= max(16, span // 4)
            if tile.masked != masked or not rows_fit or not spans_fit:
                yield group
                group = []
        group.append(tile)
    if group:
        yield group


def _plan(layout: Layout, window: int | None, dtype: torch.dtype) -> _Plan:
    device = layout.cu_seqlens.device
    queries, keys, groups = [], [], []
    where = torch.zeros(layout.positions.numel(), dtype=torch.int64)
    placed = 1
    for group in _groups(list(_tiles(layout, window))):
        _, rows, spans, query, key = torch.tensor(group).unbind(1)
        # In whole vectors of the kernel: odd sizes are slower than their padding, but for the one query of generation.
        row, column = (
            torch.arange(-(-most // 16) * 16 if most > 1 else 1) for most in (int(rows.max()), int(spans.max()))
        )
        real = row < rows[:, None]
        query_rows = query[:, None] + torch.minimum(row, rows[:, None] - 1)
        where[query_rows[real]] = placed + real.flatten().nonzero()[:, 0]
        placed += query_rows.numel()
        mask = None
        if group[0].masked:
            own = (torch.minimum(row, rows[:, None] - 1) + (spans - rows)[:, None])[..., None]
            visible = column <= own if window is None else (column <= own) & (column > own - window)
            mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))[:, None].to(device)
        groups.append(_Group(len(group), mask))
        queries.append(query_rows.flatten())
        keys.append((key[:, None] + torch.minimum(column, spans[:, None] - 1)).flatten())

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=torch.int64), *parts]).to(device)

    key_rows = joined(keys) if layout.keys is None else layout.keys.gather[joined(keys)]
    return _Plan(joined(queries), key_rows, [len(q) for q in queries], [len(k) for k in keys], groups, where.to(device))


@torch.compiler.disable  # the plan is made on the host, from the layout's values
def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> Tensor:
    """See `attention` in this package. Waits for the device once a layout, where the plan is made."""
    plan = layout.derived(("sdpa", window, q.dtype), lambda: _plan(layout, window, q.dtype))
    # All groups' rows are fetched at once, so that backward adds them up at once.
    queries = q.index_select(0, plan.queries).split(plan.query_sizes)
    keys = k.index_select(0, plan.keys).split(plan.key_sizes)
    values = v.index_select(0, plan.keys).split(plan.key_sizes)
    results = [q.new_zeros(1, *q.shape[1:])]
    for group, *parts in zip(plan.groups, queries, keys, values, strict=True):
        query, key, value = (part.unflatten(0, (group.tiles, -1)).transpose(1, 2) for part in parts)
        result = F.scaled_dot_product_attention(
            query, key, value, attn_mask=group.mask, is_causal=group.mask is None, enable_gqa=True
        )
        results.append(result.transpose(1, 2).flatten(0, 1))
    return torch.cat(results).index_select(0, plan.where)
