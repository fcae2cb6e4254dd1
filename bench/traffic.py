"""How many bytes a kernel moves against the least possible, counted while Triton's interpreter runs it.

    TRITON_INTERPRET=1 python -m tokenmill.bench.traffic CASE...

Each case of bench/cases.py runs at its small size. Moved are the bytes of every active lane of every load and store;
the least possible are those of the distinct addresses loaded and of the distinct addresses stored. So 1 means that
nothing is read or written twice, by any program: also what caches would serve counts as moved, and that memory moves
whole sectors does not show. Prints JSON: case -> kernel -> ratio, over all launches of the kernel in the case.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from tokenmill.bench.cases import CASES
from tokenmill.bench.static import kernel_name, pretended_gpu


class _Count:
    """Of one launch."""

    def __init__(self) -> None:
        self.moved = 0
        self.touched: dict[tuple[str, int], list[np.ndarray]] = {}

    def add(self, kind: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[mask.data]
        self.moved += addresses.size * size
        self.touched.setdefault((kind, size), []).append(addresses)

    def least(self) -> int:
        return sum(size * np.unique(np.concatenate(parts)).size for (_, size), parts in self.touched.items())


def count(case: str) -> dict[str, float]:
    """Kernel -> bytes moved over the least possible, rounded to hundredths."""
    totals: dict[str, list[int]] = {}
    current = _Count()
    launched = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal current
        current = _Count()
        result = launched(self, *args, **kwargs)
        total = totals.setdefault(kernel_name(self.fn), [0, 0])
        total[0] += current.moved
        total[1] += current.least()
        return result

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        current.add("load", pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        current.add("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(GridExecutor, "__call__", counted_launch),
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        pretended_gpu(),
    ):
        torch.manual_seed(0)
        CASES[case]("cpu", True)()
    return {kernel: round(moved / least, 2) for kernel, (moved, least) in totals.items() if least}


def main(cases: Sequence[str]) -> None:
    print(json.dumps({case: count(case) for case in cases}))


if __name__ == "__main__":
    main(sys.argv[1:])
