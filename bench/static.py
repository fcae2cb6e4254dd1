"""`tokenmill bench static`: the proof, on a CPU, that every kernel is well compiled.

Every case of bench/cases.py runs on tensors without data, as it would on a GPU, with launches that end at the compiler:
so each kernel is compiled for the types, the alignments and the launch arguments that training gives it. What is read
from the machine code, in a row for each compilation:

    registers                 of a thread
    spill_bytes               local memory of a thread; 0 where nothing is stored to it (a called function's frame)
    shared_bytes              of a block
    tensor_memory_columns     of a block, on sm_100: 4 bytes wide, 128 rows
    tensor_core_instructions  in the code (not executed): HMMA, HGMMA, UTCHMMA, ...
    async_copies              likewise: LDGSTS, UTMALDG, ...
    global_load_bytes         width of a thread's load that carries the data: of the widths in the code, the one that
                              most bytes are loaded with; 16 is best (32 on sm_100); null where there is none, or
                              where a tensor memory access carries the data
    global_store_bytes        the same of stores
    bytes_over_least          bytes loaded and stored, over those of the distinct elements that were: 1 is best. See
                              bench/traffic.py; null for kernels with products, which are too slow to count so

It is a fault where registers spill, a `tl.dot` has no tensor-core instruction or no asynchronous copies in the loop
around it, shared or tensor memory is more than the card has, or tuned.json has an entry that no case launches. Cases
that bench/cases.py calls EXACT have fp32 products with input_precision="ieee", which no such instruction computes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tokenmill.bench.cases import CASES, EXACT
from tokenmill.bench.sass import examine
from tokenmill.kernels import launch
from tokenmill.kernels.backends import INTERPRETED

Row = dict[str, Any]

SHARED_LIMIT = {
    80: 163 << 10,
    90: 227 << 10,
    100: 227 << 10,
}  # bytes a block; CUDA C++ Programming Guide, compute capabilities
TENSOR_MEMORY_LIMIT = 512  # columns; PTX ISA, tensor memory
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


# ------------------------------------------------------------------------------------------- a GPU that only compiles


class CompileOnly:
    """What Triton asks of a driver before a launch, answered for an architecture that need not be there."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a device each: a kernel remembers what it compiled, and for which target, by device

    def get_current_stream(self, device: int) -> int:
        return 0


class _Bodies(TorchDispatchMode):
    """Runs the body of our operators, where tensors without data would stop at their fake implementation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.addmm.dtype_out:  # is for GPUs only
            return kwargs["out"]
        if func.namespace != "tokenmill":
            return func(*args, **kwargs)
        with self:
            return OPDEFS[func.name()]._init_fn(*args, **kwargs)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Operations take the way that they take on a GPU, whatever their tensors are on."""
    with mock.patch.object(torch.Tensor, "is_cuda", True), _Bodies():
        yield


# ---------------------------------------------------------------------------------------------------------- compiling


class Compiled(NamedTuple):
    rows: list[Row]  # one for each distinct compilation
    asked: set[tuple[str, str, str]]  # of the table of launch arguments: architecture, kernel, shape
    error: str | None  # why the case did not get to its end


def compiled(arch: int, case: str) -> Compiled:
    """What a case launches on an architecture, compiled and read."""
    rows: dict[str, Row] = {}
    asked: set[tuple[str, str, str]] = set()
    run: Any = JITFunction.run
    settings = launch.settings
    gpu: Any = CompileOnly(arch)

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **config: Any) -> Any:
        made = run(kernel, *args, grid=grid, warmup=True, **config)
        if made.hash not in rows:
            row: Row = {"kernel": kernel_name(kernel.fn), "arch": f"sm_{made.metadata.target.arch}", "case": case}
            row["config"] = {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in config.items()}
            row["types"] = {k: v for k, v in made.src.signature.items() if v != "constexpr"}
            row |= {"hash": made.hash, "shared_bytes": made.metadata.shared}
            row["tensor_memory_columns"] = made.metadata.tmem_size
            rows[made.hash] = row | _examined(made)
        return made

    def asking(kernel: str, shape: Sequence[int], default: dict[str, Any]) -> dict[str, Any]:
        asked.add((f"sm_{arch}", kernel, "x".join(map(str, shape))))
        return settings(kernel, shape, default)

    driver.set_active(gpu)
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch, "settings", asking),
        pretended_gpu(),
    ):
        try:
            CASES[case]("meta", False)()
            error = None
        except Exception as raised:  # one broken kernel does not hide the others
            if os.environ.get("TOKENMILL_DEBUG"):
                raise
            error = f"{type(raised).__name__}: {raised}"
    return Compiled(list(rows.values()), asked, error)


def kernel_name(function: Any) -> str:
    """Where it is: cross_entropy._rows_kernel."""
    return f"{function.__module__.removeprefix('tokenmill.kernels.')}.{function.__name__}"


def _examined(made: Any) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        code = _tool("nvdisasm", "-c", str(cubin))
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    local = resources["STACK"] + resources["LOCAL"]
    found = examine(code)
    row = {"registers": resources["REG"], "spill_bytes": local if found.pop("uses_local_memory") else 0}
    return row | found | {"has_dot": "tt.dot" in made.asm["ttir"]}


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


# ------------------------------------------------------------------------------------------------------------- report


def main(
    archs: Sequence[int] = tuple(SHARED_LIMIT), as_json: bool = False, only: str = "", processes: int | None = None
) -> None:
    """Print a table, or JSON, of the cases whose name contains `only`, compiled in as many processes as there are
    cores, or in this one where `processes` is 1.

    Raises ValueError where there are faults, after a line on stderr for each.
    """
    if INTERPRETED:
        raise ValueError("bench static compiles kernels, and TRITON_INTERPRET=1 interprets them: unset it")
    if missing := [tool for tool in ("cuobjdump", "nvdisasm") if not (TOOLS / tool).exists()]:
        raise ValueError(f"{TOOLS / missing[0]} is missing: bench static needs triton as PyPI has it, with such tools")
    tasks = [(arch, case) for case in CASES if only in case for arch in archs]
    if not tasks:
        raise ValueError(f"no case has {only!r} in its name; there are {', '.join(CASES)}")
    results = _all(tasks, processes or os.cpu_count() or 1)
    rows = list({row["hash"]: row for result in reversed(results) for row in result.rows}.values())
    rows.sort(key=lambda row: (row["kernel"], list(CASES).index(row["case"]), archs.index(int(row["arch"][3:]))))
    _count_traffic(rows)
    print(json.dumps(rows, indent=1) if as_json else _table(rows), flush=True)
    wrong = [f"{case} on sm_{arch}: {r.error}" for (arch, case), r in zip(tasks, results, strict=True) if r.error]
    wrong += [fault for row in rows for fault in faults(row)]
    if not only:
        wrong += unlaunched(set().union(*(result.asked for result in results)), archs)
    for line in wrong:
        print(f"fault: {line}", file=sys.stderr)
    if wrong:
        raise ValueError(f"{len(wrong)} faults in {len(rows)} compilations; the lines above name them")


def _all(tasks: list[tuple[int, str]], processes: int) -> list[Compiled]:
    """The result of each task, with progress on stderr if that is a terminal."""
    progress = partial(tqdm, desc="compiling", total=len(tasks), disable=None, leave=False)
    if processes == 1:
        return [compiled(*task) for task in progress(tasks)]
    with ProcessPoolExecutor(min(processes, len(tasks)), mp_context=get_context("spawn")) as pool:
        return list(progress(pool.map(compiled, *zip(*tasks, strict=True))))


def faults(row: Row) -> list[str]:
    """What is wrong with a compilation, a line each."""
    limit = SHARED_LIMIT[int(row["arch"].removeprefix("sm_"))]
    found = {
        f"spills {row['spill_bytes']} bytes of registers": row["spill_bytes"],
        "has a tl.dot without tensor-core instructions": (
            row["has_dot"] and not row["tensor_core_instructions"] and row["case"] not in EXACT
        ),
        "has no asynchronous copies in its main loop": row["has_dot"] and row["main_loop_is_synchronous"],
        f"takes {row['shared_bytes']} bytes of shared memory, of {limit}": row["shared_bytes"] > limit,
        f"takes {row['tensor_memory_columns']} columns of tensor memory, of {TENSOR_MEMORY_LIMIT}": (
            row["tensor_memory_columns"] > TENSOR_MEMORY_LIMIT
        ),
    }
    where = f"{row['kernel']} on {row['arch']} ({row['case']}: {_text(row['config'])})"
    return [f"{where} {what}" for what, is_so in found.items() if is_so]


def unlaunched(asked: Collection[tuple[str, str, str]], archs: Collection[int]) -> list[str]:
    """A line for each entry of tuned.json that none of the cases `asked` for."""
    shipped = [
        (name, kernel, shape)
        for name in (f"sm_{arch}" for arch in archs)
        for kernel, shapes in launch.table().get(name, {}).items()
        for shape in shapes
    ]
    return [f"tuned.json: {' '.join(entry)} is launched by no case: add one" for entry in shipped if entry not in asked]


def _count_traffic(rows: list[Row]) -> None:
    """Add bytes_over_least, counted in another process, where kernels are interpreted."""
    products = {row["case"] for row in rows if row["has_dot"]}
    cases = list(dict.fromkeys(row["case"] for row in rows if row["case"] not in products))
    counted = {}
    if cases:
        command = [sys.executable, "-m", "tokenmill.bench.traffic", *cases]
        result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE)
        if result.returncode:
            raise ValueError("the traffic could not be counted; the lines above say why")
        counted = json.loads(result.stdout)
    for row in rows:
        row["bytes_over_least"] = counted.get(row["case"], {}).get(row["kernel"])


def _text(config: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in config.items())


_COLUMNS = {  # of the table
    "kernel": "kernel", "case": "case", "arch": "arch", "registers": "regs", "spill_bytes": "spill",
    "shared_bytes": "shared", "tensor_core_instructions": "tensor", "async_copies": "async",
    "global_load_bytes": "load", "global_store_bytes": "store", "bytes_over_least": "traffic",
}  # fmt: skip


def _table(rows: list[Row]) -> str:
    cells = [["-" if row[key] is None else str(row[key]) for key in _COLUMNS] for row in rows]
    lines = [[*_COLUMNS.values(), "launch arguments"]]
    lines += [[*line, _text(row["config"])] for line, row in zip(cells, rows, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{'>' if 2 < i < len(_COLUMNS) else '<'}{widths[i]}}" for i, cell in enumerate(line)).rstrip()
        for line in lines
    )
