"""The static proof: all that is shipped is clean, and what is not is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenmill.bench import static
from tokenmill.bench.cases import CASES
from tokenmill.bench.sass import examine
from tokenmill.kernels import launch

FIELDS = {
    "kernel", "arch", "config", "registers", "spill_bytes", "shared_bytes", "tensor_core_instructions", "async_copies",
    "global_load_bytes", "global_store_bytes", "bytes_over_least",
}  # fmt: skip

# Kernels that are compiled badly on purpose, launched as cases of a catalogue of their own.
BAD = """
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from tokenmill.bench import cases, static
from tokenmill.kernels import launch

@triton.jit
def _product_kernel(a, b, c, count, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in tl.range(0, count, BLOCK, num_stages=STAGES):
        x, y = tl.load(a + i * count + k + j), tl.load(b + (k + i) * BLOCK + j)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    tl.store(c + i * BLOCK + j, total)

def product(device, small, dtype=torch.bfloat16, **constants):
    a, b = (torch.empty(1 << 16, dtype=dtype, device=device) for _ in range(2))
    c = torch.empty(1 << 14, device=device)
    settings = {"BLOCK": 64, "STAGES": 3, "PRECISION": "tf32", "enable_fp_fusion": True} | constants
    return lambda: _product_kernel[(1,)](a, b, c, 512, **settings)

def raises(device, small):
    raise RuntimeError("no such luck")

cases.CASES |= {
    "bad, well": product,
    "bad, synchronous": lambda *place: product(*place, STAGES=1),
    "bad, without tensor cores": lambda *place: product(*place, dtype=torch.float32, BLOCK=32, PRECISION="ieee"),
    "bad, too wide": lambda *place: product(*place, BLOCK=128, STAGES=8),
    "bad, raises": raises,
}
launch.TABLE = Path(sys.argv[1])
static.main([90], only=sys.argv[2], processes=1)
"""


def run(*command: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of Python, whose kernels are compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def test_everything_shipped_is_clean():
    command = "from tokenmill.trainer.cli import main; raise SystemExit(main(['bench', 'static', '--json']))"
    status, out, err = run("-c", command)
    assert status == 0, err
    rows = json.loads(out)
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert {row["case"] for row in rows} <= set(CASES)
    for row in rows:
        assert row.keys() >= FIELDS
        assert 0 < row["registers"] <= 255
        assert row["spill_bytes"] == 0
        assert static.faults(row) == []
    (once,) = [
        row
        for row in rows
        if (row["case"], row["kernel"], row["arch"]) == ("swiglu", "swiglu._forward_kernel", "sm_90")
    ]
    assert (once["global_load_bytes"], once["global_store_bytes"], once["bytes_over_least"]) == (16, 16, 1.0)
    (twice,) = [
        row
        for row in rows
        if row["kernel"].endswith("_rows_kernel") and row["config"].get("VOCAB") == 128256 and row["arch"] == "sm_90"
    ]
    assert twice["bytes_over_least"] == 1.5  # read twice, written once


@pytest.fixture
def catalogue(tmp_path) -> Path:
    (tmp_path / "bad.py").write_text(BAD)
    # A tile of so many elements a thread does not fit into its registers.
    table = {"sm_90": {"adamw": {"": {"BLOCK": 4096, "num_warps": 1}}}}
    (tmp_path / "tuned.json").write_text(json.dumps(table))
    return tmp_path


def faults(folder: Path, only: str) -> list[str]:
    status, _, err = run(folder / "bad.py", folder / "tuned.json", only)
    lines = [line for line in err.splitlines() if line.startswith("fault: ")]
    assert status == 1
    assert f"ValueError: {len(lines)} faults" in err
    return lines


def test_a_spilling_tile_is_named(catalogue):
    (line,) = faults(catalogue, "adamw, fp32 moments")
    assert line.startswith("fault: adamw._adamw_kernel on sm_90 (adamw, fp32 moments: BLOCK=4096 num_warps=1 ")
    assert line.endswith(" bytes of registers")


def test_badly_compiled_products_are_named(catalogue):
    lines = faults(catalogue, "bad")
    expected = {
        "synchronous": "has no asynchronous copies in its main loop",
        "without tensor cores": "has a tl.dot without tensor-core instructions",
        "too wide": "bytes of shared memory, of 232448",
        "raises": "RuntimeError: no such luck",
    }
    assert len(lines) == len(expected)  # and nothing of the one that is compiled well
    for name, fault in expected.items():
        (line,) = [line for line in lines if f"bad, {name}" in line]
        assert "on sm_90" in line
        assert fault in line


def test_an_entry_of_the_table_that_no_case_launches(monkeypatch):
    table = {"sm_90": {"embed": {"4096": {}, "5": {}}}, "sm_80": {"adamw": {"": {}}}}
    monkeypatch.setattr(launch, "table", lambda: table)
    asked = {("sm_90", "embed", "4096"), ("sm_80", "embed", "5")}
    assert static.unlaunched(asked, [90]) == ["tuned.json: sm_90 embed 5 is launched by no case: add one"]
    assert len(static.unlaunched(asked, [80, 90])) == 2


def test_limits():
    row = {
        "kernel": "k", "arch": "sm_100", "case": "experts", "config": {}, "spill_bytes": 0, "shared_bytes": 227 << 10,
        "tensor_memory_columns": 512, "has_dot": True, "tensor_core_instructions": 1, "main_loop_is_synchronous": False,
    }  # fmt: skip
    assert static.faults(row) == []
    assert len(static.faults(row | {"shared_bytes": (227 << 10) + 1})) == 1
    (line,) = static.faults(row | {"tensor_memory_columns": 640})
    assert line == "k on sm_100 (experts: ) takes 640 columns of tensor memory, of 512"
    exact = row | {"tensor_core_instructions": 0}
    assert len(static.faults(exact)) == 1
    assert static.faults(exact | {"case": "experts, fp32"}) == []


def test_what_cannot_be_compiled_is_said(monkeypatch):
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        static.main([90])
    monkeypatch.setattr(static, "INTERPRETED", False)
    with pytest.raises(ValueError, match="no case has 'nothing' in its name; there are embed, "):
        static.main([90], only="nothing")
    monkeypatch.setattr(static, "TOOLS", Path("nowhere"))
    with pytest.raises(ValueError, match="nowhere/cuobjdump is missing"):
        static.main([90])


def listing(*lines: str) -> str:
    return "\n".join(line if line.startswith(".L") else f"        /*0000*/  {line} ;" for line in lines)


def test_widths():
    wide, narrow = "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", "@!P0 LDG.E.U16 R4, desc[UR4][R2.64]"
    assert examine(listing(wide, *[narrow] * 7))["global_load_bytes"] == 16
    assert examine(listing(wide, *[narrow] * 8))["global_load_bytes"] == 2
    assert examine(listing("LDG.E R4, [R2.64]", "LDS.128 R4, [R2]"))["global_load_bytes"] == 4
    assert examine(listing("LDG.E R4, [R2.64]", "@UP1 UTMALDG.3D [UR8], [UR6]"))["global_load_bytes"] is None
    found = examine(listing("STG.E.LTC128B.64 desc[UR4][R2.64], R4", "STL [R1], R4"))
    assert (found["global_load_bytes"], found["global_store_bytes"], found["uses_local_memory"]) == (None, 8, True)


def test_loops():
    copy, product = "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "HMMA.16816.F32.BF16 R4, R8, R12, R4"
    inside = ".L_x_0:", copy, product, "@P0 BRA `(.L_x_0)"
    assert not examine(listing(*inside))["main_loop_is_synchronous"]
    prologue = copy, ".L_x_0:", product, "@P0 BRA `(.L_x_0)"
    assert examine(listing(*prologue))["main_loop_is_synchronous"]
    persistent = ".L_x_1:", *prologue, "@P1 BRA `(.L_x_1)"
    assert examine(listing(*persistent))["main_loop_is_synchronous"]
    synchronous = ".L_x_2:", "LDG.E R4, [R2.64]", product, "@P0 BRA `(.L_x_2)"
    assert examine(listing(*inside, *synchronous))["main_loop_is_synchronous"]  # which the other does not excuse
    epilogue = ".L_x_1:", *inside, product, "@P1 BRA `(.L_x_1)"
    assert not examine(listing(*epilogue))["main_loop_is_synchronous"]
    unrolled = examine(listing(copy, product, product))
    assert (unrolled["main_loop_is_synchronous"], unrolled["tensor_core_instructions"]) == (False, 2)
    repeated = (
        ".L_x_0:",
        copy,
        ".L_x_1:",
        product.replace("HMMA", "@UP2 UTCHMMA"),
        "@P1 BRA.U.ANY `(.L_x_1)",
        inside[-1],
    )
    assert not examine(listing(*repeated))["main_loop_is_synchronous"]
