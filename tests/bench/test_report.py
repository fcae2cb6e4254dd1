"""The table and the plot of a visit's measurements, and the command that makes them."""

from __future__ import annotations

import csv
import json

from tokenmill.bench import report
from tokenmill.trainer.cli import main

VISIT = {
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {
        "rows": [{"what": "machine", "device": "A card", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"}]
    },
    "parts": {
        "tokenmill.bench.ops:ceilings": {
            "status": "done",
            "rows": [{"what": "copy", "ms": 1.0, "GB/s": 2000.0}, {"what": "product 8^3", "ms": 2.0, "TFLOP/s": 800.0}],
        },
        "tokenmill.bench.ops:elementwise": {
            "status": "done",
            "rows": [
                {"what": "rms_norm", "ms": 0.5, "GB/s": 1500.0, "of the copy": 0.7, "target": ">= 0.80"},
                {"what": "not timed", "ms": "not measured: no time was left"},
            ],
        },
        "tokenmill.bench.ops:moe": {"status": "failed", "error": "no memory"},
    },
}


def test_a_row_a_timing(tmp_path):
    report.write_csv(VISIT, tmp_path / "ops.csv")
    rows = [*csv.DictReader((tmp_path / "ops.csv").read_text().splitlines())]
    assert [row["what"] for row in rows] == ["copy", "product 8^3", "rms_norm"]
    norm = rows[2]
    assert (norm["device"], norm["torch"], norm["date"]) == ("A card", "2.11.0", "2026-01-02T03:04:05+00:00")
    assert (norm["part"], norm["ms"], norm["of ceiling"]) == ("elementwise", "0.5", "0.75")
    assert (norm["ratio"], norm["value"], norm["target"]) == ("of the copy", "0.7", ">= 0.80")
    assert float(rows[1]["of ceiling"]) == 1


def test_the_command_measures_and_draws(tmp_path, capsys):
    assert main(["bench", "ops", "--rehearse", "--only", "ceilings", "embedding", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
    rows = [*csv.DictReader((tmp_path / "ops.csv").read_text().splitlines())]
    assert {row["part"] for row in rows} == {"ceilings", "embedding"}
    assert json.loads((tmp_path / "gpu.json").read_text())["rehearsal"]
    assert main(["bench", "ops", "--only", "embeding", "--output", str(tmp_path)]) == 1
    assert "--only embeding: expected some of ceilings, cross_entropy" in capsys.readouterr().err


def test_nothing_measured_is_an_empty_table(tmp_path):
    empty = VISIT | {"parts": {"tokenmill.bench.ops:moe": VISIT["parts"]["tokenmill.bench.ops:moe"]}}
    report.write_csv(empty, tmp_path / "ops.csv")
    assert len((tmp_path / "ops.csv").read_text().splitlines()) == 1
