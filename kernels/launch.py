"""How kernels are launched: block sizes, warps and chunks, in one place so that they can be tuned in one place."""

from __future__ import annotations

from typing import Any

import triton

# The widest row of logits that one program holds in registers without spilling any; a wider one is read twice.
SINGLE_READ_LIMIT = 32768
WIDE_ROW_BLOCK = 8192

# Rows of token gradients that one program sums in order; a longer run of one id is summed in pieces.
RUN_PIECE = 32


def cross_entropy_row(vocab: int) -> dict[str, Any]:
    """Launch arguments of the kernel that holds one row of `vocab` logits a program."""
    once = vocab <= SINGLE_READ_LIMIT
    block = triton.next_power_of_2(vocab) if once else WIDE_ROW_BLOCK
    warps = max(4, min(16, block // 512))
    return {"ONCE": once, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}


def cross_entropy_chunk(vocab: int, itemsize: int, on_gpu: bool) -> int:
    """Rows whose logits are in memory at once.

    On a GPU few and large chunks, since each reads and writes the whole gradient of the weight: 256 MiB, 4096 rows of
    32,000 bf16 logits. On a CPU what its cache keeps between the passes.
    """
    budget, most = (256 << 20, 4096) if on_gpu else (32 << 20, 1024)
    rows = budget // (vocab * itemsize)
    return max(128, min(most, rows // 128 * 128))


def elementwise(count: int) -> dict[str, Any]:
    """Launch arguments of kernels over `count` independent elements."""
    return {"BLOCK": min(4096, max(16, triton.next_power_of_2(count))), "num_warps": 4, "enable_fp_fusion": True}


def channels(dim: int) -> dict[str, Any]:
    """Launch arguments of kernels that hold a block of one row's `dim` channels a program.

    Multiply and add stay apart: a fused one rounds once where torch and C++ round twice.
    """
    block = min(2048, max(16, triton.next_power_of_2(dim)))
    return {"BLOCK": block, "num_warps": max(1, block // 512), "enable_fp_fusion": False}
