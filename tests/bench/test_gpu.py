"""The visit to a GPU machine, rehearsed: what its report holds, and that one part's failure costs only its own."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

import pytest
import torch

from tokenmill.bench import checks, checks_experts, gpu, head, moe, ops
from tokenmill.bench.gpu import PARTS, Part, Place, visit


def raises(place: Place) -> list:
    raise RuntimeError("no such luck")


def crashes(place: Place) -> list:
    os._exit(3)


def hangs(place: Place) -> list:
    time.sleep(600)
    return []


def dies_later(place: Place) -> list:
    threading.Timer(0.3, os._exit, [3]).start()
    return []


def waits(place: Place) -> list:
    return []


def does_not_hold(place: Place) -> list:
    return [{"what": "a sum", "held": False}]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return Place(torch.device("cpu"), True, tmp_path)


def run(folder, parts: list[Part], **options) -> tuple[int, dict]:
    status = visit(folder, rehearse=True, parts=parts, **options)
    return status, json.loads((folder / "gpu.json").read_text())


def test_a_failure_costs_only_its_own_part(tmp_path, capsys):
    noise = Part("tokenmill.bench.checks:noise", 60, check=True)
    broken = [Part(f"{__name__}:raises", 60), Part(f"{__name__}:crashes", 60)]
    status, report = run(tmp_path, [*broken, noise])
    parts = report["parts"]
    assert status == 1
    assert report["date"].endswith("+00:00")
    assert report["rehearsal"]
    (machine,) = report["machine"]["rows"]
    assert machine["torch"] == torch.__version__
    assert {"device", "driver_version", "triton", "cuda", "python"} <= machine.keys()
    assert parts[f"{__name__}:raises"]["status"] == "failed"
    assert "Traceback" in parts[f"{__name__}:raises"]["error"]
    assert "no such luck" in parts[f"{__name__}:raises"]["error"]
    assert "exit code 3" in parts[f"{__name__}:crashes"]["error"]
    assert parts[noise.function]["status"] == "done"
    assert all(row["held"] for row in parts[noise.function]["rows"])
    assert f"failed: {__name__}:raises, {__name__}:crashes" in capsys.readouterr().out


def test_a_hanging_part_is_ended_and_a_spent_budget_said(tmp_path):
    hanging, late = Part(f"{__name__}:hangs", 1), Part("tokenmill.bench.ops:ceilings", 60)
    first = Part(f"{__name__}:waits", 60)  # imports this file, which takes its time
    status, report = run(tmp_path, [first, hanging, late], budget=120)
    assert status == 1
    assert "ended after 1 s" in report["parts"][hanging.function]["error"]
    assert report["parts"][late.function]["status"] == "done"
    assert "in hangs" in (tmp_path / "gpu.log").read_text()

    status, report = run(tmp_path, [late], budget=0)
    assert report["parts"][late.function] == {"status": "not measured", "reason": "the budget of 0 s was spent"}
    assert status == 0
    assert run(tmp_path, [Part(late.function, 60, check=True)], budget=0)[0] == 1


def test_a_process_that_died_between_parts_costs_none(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_summary", lambda *_: time.sleep(1))  # after each part
    parts = [Part(f"{__name__}:dies_later", 60), Part(f"{__name__}:waits", 60)]
    status, report = run(tmp_path, parts)
    assert [result["status"] for result in report["parts"].values()] == ["done", "done"]
    assert status == 0


def test_a_process_that_cannot_be_spoken_to_is_a_failed_part(tmp_path):
    worker = gpu._Worker(tmp_path, True)
    worker.process.kill()
    worker.process.join()
    assert "exit code -9" in worker.run("tokenmill.bench.gpu:machine", 10)["error"]


def test_an_unknown_part_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", f"--output={tmp_path}", "--rehearse", "--only", "attention"])
    with pytest.raises(SystemExit) as left:
        gpu._main()
    assert left.value.code == 2
    assert "--only: no part attention; the parts are checks:noise" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_check_that_does_not_hold_shows_in_the_exit_status(tmp_path):
    status, report = run(tmp_path, [Part(f"{__name__}:does_not_hold", 60, check=True)])
    assert status == 1
    assert report["parts"][f"{__name__}:does_not_hold"]["status"] == "done"


def test_every_part_exists():
    from tokenmill.bench import generation, training

    modules = {
        module.__name__.split(".")[-1]: module
        for module in (checks, checks_experts, generation, head, moe, ops, training)
    }
    for part in [*PARTS, *gpu.MORE, *gpu.EXPERTS]:
        module, name = part.function.removeprefix("tokenmill.bench.").split(":")
        assert callable(getattr(modules[module], name))


@pytest.mark.parametrize(
    "part",
    [
        checks.cross_entropy, checks.elementwise, checks.attention, checks.optimizer,
        checks_experts.moe, checks_experts.routing,
    ],
)  # fmt: skip
def test_operations_hold(place, part):
    rows = part(place)
    assert all(row["held"] is not False for row in rows)
    assert any(row["held"] for row in rows)


def test_a_wrong_optimizer_does_not_hold(place, monkeypatch):
    right = checks.adamw_

    def wrong(*tensors: torch.Tensor, backend: Any, **options: Any) -> None:
        right(*tensors, backend=backend, **options)
        if backend == "triton":
            tensors[0][0] += 1

    monkeypatch.setattr(checks, "adamw_", wrong)
    assert not any(row["held"] for row in checks.optimizer(place))


def test_a_wrong_operation_does_not_hold():
    inputs = [torch.randn(5, 7)]

    def definition(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    def unwritten(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.sin()[:4], x.new_empty(1, 7)])

    assert checks.compared("right", torch.float32, definition, definition, inputs)["held"]
    assert not checks.compared("wrong", torch.float32, lambda x: x.sin() * 1.0001, definition, inputs)["held"]
    assert not checks.compared("unwritten", torch.float32, unwritten, definition, inputs)["held"]


MEASUREMENTS = [
    ops.ceilings, ops.attention, ops.elementwise, moe.moe,
    head.cross_entropy, head.log_probabilities, head.vocabularies,
]  # fmt: skip


@pytest.mark.parametrize("part", MEASUREMENTS)
def test_measurements_are_complete(place, part):
    for row in part(place):
        assert row["ms"] > 0
        assert row["runs"] >= 3
