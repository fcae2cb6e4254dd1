"""The table and the plot of a visit's measurements, and the command that makes them."""

from __future__ import annotations

import csv
import json

import pytest

from tokenmill.bench import gpu, report
from tokenmill.trainer.cli import main

VISIT = {
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {
        "rows": [
            {"what": "machine", "device": "A card", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"}
            | {"transformers": None, "megablocks": "0.10.0", "liger-kernel": "0.8.5"}
        ]
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
        "tokenmill.bench.moe:moe": {
            "status": "done",
            "rows": [
                {"what": "triton", "ms": 3.0, "of the best other": 0.9, "of dense": 0.86, "target": "<= 1.0; >= 0.85"},
                {"what": "peer", "ms": 4.0, "difference": 0.3, "note": "another result than ours"},
            ],
        },
        "tokenmill.bench.ops:optimizer": {"status": "failed", "error": "no memory"},
    },
}


def test_a_row_a_timing(tmp_path):
    report.write_csv(VISIT, tmp_path / "ops.csv")
    rows = [*csv.DictReader((tmp_path / "ops.csv").read_text().splitlines())]
    assert [row["what"] for row in rows] == ["copy", "product 8^3", "rms_norm", "triton", "peer"]
    norm = rows[2]
    assert (norm["device"], norm["torch"], norm["date"]) == ("A card", "2.11.0", "2026-01-02T03:04:05+00:00")
    assert (norm["part"], norm["ms"], norm["of ceiling"]) == ("elementwise", "0.5", "0.75")
    assert norm["packages"] == "megablocks-0.10.0 liger-kernel-0.8.5"
    assert (norm["of the copy"], norm["of dense"], norm["target"]) == ("0.7", "", ">= 0.80")
    assert (rows[3]["of the best other"], rows[3]["of dense"]) == ("0.9", "0.86")
    assert (rows[4]["difference"], rows[4]["note"]) == ("0.3", "another result than ours")
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
    empty = VISIT | {"parts": {"tokenmill.bench.ops:optimizer": VISIT["parts"]["tokenmill.bench.ops:optimizer"]}}
    report.write_csv(empty, tmp_path / "ops.csv")
    assert len((tmp_path / "ops.csv").read_text().splitlines()) == 1


@pytest.mark.slow
def test_experts_are_measured_under_every_routing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "EXPERTS", gpu.EXPERTS[:2])  # two lengths are the same in a rehearsal
    assert main(["bench", "moe", "--rehearse", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "moe.png").is_file()
    rows = [*csv.DictReader((tmp_path / "moe.csv").read_text().splitlines())]
    assert {row["part"] for row in rows} == {"ceilings", "tokens_8192"}
    steps = {row["what"]: row for row in rows if row["backward TFLOP/s"]}
    for way in ("triton", "grouped_mm", "reference", "HF eager", "HF grouped_mm"):
        for kind in ("uniform", "Zipf", "all to the same"):
            assert float(steps[f"{way}, {kind}"]["TFLOP/s"]) > 0
            assert f"{way}, {kind}, forward" in {row["what"] for row in rows}
