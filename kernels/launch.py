"""How kernels are launched: block sizes, warps and chunks, in one place so that they can be tuned in one place.

`settings` gives a kernel's launch arguments: a default that is sensible on every GPU, and over it what `tokenmill bench
tune` measured to be the fastest for the kernel's shape on this architecture, from tuned.json beside this file. Nothing
is ever tried out at a launch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from triton.runtime import driver

from tokenmill.kernels.backends import INTERPRETED

# The widest row of logits that one program holds in registers without spilling any; a wider one is read twice.
SINGLE_READ_LIMIT = 32768
WIDE_ROW_BLOCK = 8192

# Rows of token gradients that one program sums in order; a longer run of one id is summed in pieces.
RUN_PIECE = 32

TABLE = Path(__file__).with_name("tuned.json")


@functools.cache
def table() -> dict[str, dict[str, dict[str, Any]]]:
    """What was measured: architecture ("sm_90") -> kernel -> shape ("8192x4096") -> launch arguments."""
    return json.loads(TABLE.read_text())


def architecture() -> int:
    """Of the device that kernels are compiled for: 80, 90, 100, ...; 0 under the interpreter."""
    return 0 if INTERPRETED else int(driver.active.get_current_target().arch)


def settings(kernel: str, shape: Sequence[int], default: dict[str, Any]) -> dict[str, Any]:
    """The launch arguments of `kernel` for `shape`, the sizes that they depend on (the count of rows seldom does)."""
    measured = table().get(f"sm_{architecture()}", {}).get(kernel, {})
    return default | measured.get("x".join(map(str, shape)), {})


def cross_entropy_row(vocab: int) -> dict[str, Any]:
    """For the kernel that holds one row of `vocab` logits a program."""
    once = vocab <= SINGLE_READ_LIMIT
    block = triton.next_power_of_2(vocab) if once else WIDE_ROW_BLOCK
    warps = max(4, min(16, block // 512))
    default = {"ONCE": once, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}
    return settings("cross_entropy_row", [vocab], default)


def cross_entropy_chunk(vocab: int, itemsize: int, on_gpu: bool) -> int:
    """Rows whose logits are in memory at once.

    On a GPU few and large chunks, since each reads and writes the whole gradient of the weight: 256 MiB, 4096 rows of
    32,000 bf16 logits. On a CPU what its cache keeps between the passes.
    """
    budget, most = (256 << 20, 4096) if on_gpu else (32 << 20, 1024)
    rows = budget // (vocab * itemsize)
    return max(128, min(most, rows // 128 * 128))


def elementwise(count: int) -> dict[str, Any]:
    """For kernels over `count` independent elements."""
    return {"BLOCK": min(4096, max(16, triton.next_power_of_2(count))), "num_warps": 4, "enable_fp_fusion": True}


def channels(kernel: str, dim: int) -> dict[str, Any]:
    """For kernels that hold a block of one row's `dim` channels a program.

    Multiply and add stay apart: a fused one rounds once where torch and C++ round twice.
    """
    block = min(2048, max(16, triton.next_power_of_2(dim)))
    return settings(kernel, [dim], {"BLOCK": block, "num_warps": max(1, block // 512), "enable_fp_fusion": False})


def adamw(count: int) -> dict[str, Any]:
    """For the update of `count` elements. Multiply and add stay apart, as above."""
    block = min(1024, max(16, triton.next_power_of_2(count)))
    return settings("adamw", [], {"BLOCK": block, "num_warps": 4, "enable_fp_fusion": False})
