"""How kernels are launched: block sizes, warps and chunks, in one place so that they can be tuned in one place.

`settings` gives a kernel's launch arguments: a default that is sensible on every GPU, and over it what `tokenmill bench
tune` measured to be the fastest for the kernel's shape on this architecture, from tuned.json beside this file. Nothing
is ever tried out at a launch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from tokenmill.kernels.backends import INTERPRETED

# The widest row of logits that one program holds in registers without spilling any; a wider one is read twice, in
# blocks on their way through shared memory.
SINGLE_READ_LIMIT = 32768
WIDE_ROW_BLOCK = 8192

# The widest row that RMSNorm's kernels hold in registers.
ROW_LIMIT = 8192

# Rows of token gradients that one program sums in order; a longer run of one id is summed in pieces.
RUN_PIECE = 32

TABLE = Path(__file__).with_name("tuned.json")

_P = ParamSpec("_P")
_R = TypeVar("_R")


def on_its_device(function: Callable[Concatenate[Tensor, _P], _R]) -> Callable[Concatenate[Tensor, _P], _R]:
    """The function, run with the device of its first argument as the current one: Triton launches on that, wherever a
    kernel's tensors are.
    """

    @functools.wraps(function)
    def on_device(tensor: Tensor, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.cuda.device_of(tensor):  # nothing happens where that is the current device, or no GPU
            return function(tensor, *args, **kwargs)

    return on_device


@functools.cache
def table() -> dict[str, dict[str, dict[str, Any]]]:
    """What was measured: architecture ("sm_90") -> kernel -> shape ("8192x4096") -> launch arguments."""
    return json.loads(TABLE.read_text())


def architecture() -> int:
    """Of the device that kernels are compiled for: 80, 90, 100, ...; 0 under the interpreter."""
    target: Any = None if INTERPRETED else driver.active.get_current_target()
    return int(target.arch) if target else 0


def settings(kernel: str, shape: Sequence[int | str], default: dict[str, Any]) -> dict[str, Any]:
    """The launch arguments of `kernel` for `shape`, the sizes that they depend on (the count of rows seldom does)."""
    measured = table().get(f"sm_{architecture()}", {}).get(kernel, {})
    return default | measured.get("x".join(map(str, shape)), {})


def cross_entropy_row(vocab: int) -> dict[str, Any]:
    """For the kernel that makes statistics and gradient of one row of `vocab` logits a program."""
    if vocab > SINGLE_READ_LIMIT:
        default = {"ONCE": False} | _row_in_blocks(vocab)
    else:
        block = triton.next_power_of_2(vocab)
        default = {"ONCE": True, "BLOCK": block, "STAGES": 1, "num_warps": max(4, min(16, block // 512))}
    return settings("cross_entropy_row", [vocab], default | {"enable_fp_fusion": True})


def cross_entropy_scan(kernel: str, vocab: int) -> dict[str, Any]:
    """For the kernels that make one of the two, in blocks of one row a program."""
    return settings(kernel, [vocab], _row_in_blocks(vocab) | {"enable_fp_fusion": True})


def _row_in_blocks(vocab: int) -> dict[str, Any]:
    """8 logits a thread and block: with 16, one program of the widest spills where the last block is not full. Many
    threads a row, so that few rows are at work at once, and stay in the L2 cache until they are read again.
    """
    block = min(WIDE_ROW_BLOCK, max(128, triton.next_power_of_2(vocab)))
    return {"BLOCK": block, "STAGES": 3, "num_warps": max(1, block // 256)}


def cross_entropy_chunk(vocab: int, itemsize: int, on_gpu: bool) -> int:
    """Rows whose logits are in memory at once.

    On a GPU few and large chunks, since each reads and writes the whole gradient of the weight: 4096 rows, 250 MiB of
    32,000 bf16 logits, as long as they fit in 1 GiB. On a CPU what its cache keeps between the passes.
    """
    budget, most = (1 << 30, 4096) if on_gpu else (32 << 20, 1024)
    rows = budget // (vocab * itemsize)
    return max(128, min(most, rows // 128 * 128))


def elementwise(kernel: str, count: int) -> dict[str, Any]:
    """For kernels over `count` independent elements."""
    block = min(4096, max(16, triton.next_power_of_2(count)))
    return settings(kernel, [], {"BLOCK": block, "num_warps": 4, "enable_fp_fusion": True})


def channels(kernel: str, dim: int, of_thread: int = 16) -> dict[str, Any]:
    """For kernels that hold a block of one row's `dim` channels a program.

    Multiply and add stay apart: a fused one rounds once where torch and C++ round twice.
    """
    block = min(2048, max(16, triton.next_power_of_2(dim)))
    warps = max(1, block // (32 * of_thread))
    return settings(kernel, [dim], {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": False})


def adamw(count: int) -> dict[str, Any]:
    """For the update of `count` elements. Multiply and add stay apart, as above."""
    block = min(1024, max(16, triton.next_power_of_2(count)))
    return settings("adamw", [], {"BLOCK": block, "num_warps": 4, "enable_fp_fusion": False})


def rms_norm(dim: int) -> dict[str, Any]:
    """For the kernel that holds one row of `dim` channels a program: 16 of them a thread."""
    block = max(32, triton.next_power_of_2(dim))
    default = {"BLOCK": block, "num_warps": max(1, block // 512), "enable_fp_fusion": True}
    return settings("rms_norm", [dim], default)


def rms_norm_backward(dim: int, itemsize: int, device: torch.device) -> tuple[int, dict[str, Any]]:
    """How many programs share out the rows, and the arguments of each.

    As many as run at once, since each writes a row of partial sums. Each has up to three rows of its three tensors on
    their way in shared memory while it works on another, in 96 KiB at most.
    """
    block = max(32, triton.next_power_of_2(dim))
    ahead = min(3, (96 << 10) // (3 * block * itemsize))
    default = {"BLOCK": block, "STAGES": ahead + 1, "PER_MULTIPROCESSOR": min(16, ROW_LIMIT // block)}
    default |= {"num_warps": max(1, block // 512), "enable_fp_fusion": True}
    chosen = settings("rms_norm_backward", [dim, itemsize], default)
    return chosen.pop("PER_MULTIPROCESSOR") * multiprocessors(device), chosen


def rotary(q_heads: int, k_heads: int, half: int) -> dict[str, Any]:
    """For the kernel that turns all heads of a token a program: 32 pairs of q's channels a thread."""
    blocks = {"Q_BLOCK": q_heads, "K_BLOCK": k_heads, "HALF_BLOCK": half}
    default = {name: triton.next_power_of_2(size) for name, size in blocks.items()}
    pairs = default["Q_BLOCK"] * default["HALF_BLOCK"]
    default |= {"num_warps": max(1, min(16, pairs // 1024)), "enable_fp_fusion": True}
    return settings("rotary", [q_heads, k_heads, half], default)


def swiglu(kernel: str, features: int) -> dict[str, Any]:
    """For kernels over a block of one row's `features` a program: 16 of them a thread."""
    block = min(2048, max(32, triton.next_power_of_2(features)))
    default = {"BLOCK": block, "num_warps": max(1, block // 512), "enable_fp_fusion": True}
    return settings(kernel, [features], default)


def multiprocessors(device: torch.device) -> int:
    """How many programs kernels start that share out their work by themselves; few under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def grouped_gemm(kernel: str, sizes: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """For the products of kernels/moe/grouped_gemm.py, of `sizes` (experts, N, K). LIBRARY: by PyTorch's; there only
    where that never waits for the host (kernels/moe/grouped_mm.py).
    """
    descriptors = not 0 < architecture() < 90  # before sm_90, reading through them is not asynchronous
    width, stages = (256, 4) if descriptors else (128, 3)
    default = {"ROWS": 128, "COLUMNS": width, "INNER": 64, "num_stages": stages, "num_warps": 8}
    if kernel == "moe_gate_up":  # two products a tile
        default["COLUMNS"] //= 2
    if kernel == "moe_hidden_gradient":  # what follows its product needs registers too
        default |= {"COLUMNS": 128, "num_stages": 3}
    if dtype.itemsize == 4:  # exact products, without tensor cores
        default = {"ROWS": 32, "COLUMNS": 32, "INNER": 32, "num_stages": 2, "num_warps": 4}
    default |= {"GROUP": 16, "DESCRIPTORS": descriptors, "enable_fp_fusion": True}
    if grouped_mm_is_one_launch(dtype):
        default["LIBRARY"] = False
    return settings(kernel, [*sizes, str(dtype).removeprefix("torch.")], default)


def grouped_mm_is_one_launch(dtype: torch.dtype) -> bool:
    """Whether PyTorch's grouped product is a kernel of its own here; elsewhere, on a GPU, it waits for the rows of each
    expert and loops over them.
    """
    return INTERPRETED or (dtype == torch.bfloat16 and 90 <= architecture() < 110)


def by_torch(function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Run what takes the place of a kernel whose launch arguments have LIBRARY set."""
    return function(*args, **kwargs)


def router(kernel: str, experts: int) -> dict[str, Any]:
    """For the kernels that hold the probabilities of ROWS tokens over `experts` a program: 4 of them a thread."""
    span = max(2, triton.next_power_of_2(experts))
    rows = max(1, 512 // span)
    return settings(kernel, [experts], {"SPAN": span, "ROWS": rows, "num_warps": 4, "enable_fp_fusion": True})


def sort_choices(kernel: str, experts: int) -> dict[str, Any]:
    """For the kernels that count BLOCK choices by expert a program: 32 pairs of them a thread."""
    span = max(2, triton.next_power_of_2(experts))
    return settings(
        kernel, [experts], {"SPAN": span, "BLOCK": max(16, 4096 // span), "num_warps": 4, "enable_fp_fusion": True}
    )
