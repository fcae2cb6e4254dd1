"""The tuner: what it tries, what it takes, and what it leaves in the table."""

from __future__ import annotations

import json

import pytest
import torch

from tokenmill.bench import tune
from tokenmill.bench.cases import CASES
from tokenmill.kernels import launch
from tokenmill.trainer.cli import main

NAME = "swiglu, fp32"


@pytest.fixture(autouse=True)
def _table(monkeypatch, tmp_path):
    """Kernels are interpreted, and the package's table stays as it is."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launch, "TABLE", tmp_path / "tuned.json")
    (tmp_path / "tuned.json").write_text('{"sm_90": {"other": {"1": {"BLOCK": 8}}}}')
    launch.table.cache_clear()
    yield
    launch.table.cache_clear()


def test_what_a_case_asks_for():
    asked = tune.asked(CASES[NAME], "cpu", small=True)
    assert [kernel for kernel, _, _ in asked] == ["swiglu", "swiglu_backward"]
    assert all(shape == "14336" and arguments["BLOCK"] > 0 for _, shape, arguments in asked)


def test_one_argument_at_a_time():
    tried = list(tune.neighbours({"BLOCK": 64, "STAGES": 1, "FLATTEN": False, "ONCE": True, "num_warps": 1}))
    base = {"BLOCK": 64, "STAGES": 1, "FLATTEN": False, "ONCE": True, "num_warps": 1}
    assert tried == [
        base | {"BLOCK": 32}, base | {"BLOCK": 128}, base | {"STAGES": 2}, base | {"FLATTEN": True},
        base | {"num_warps": 2},
    ]  # fmt: skip


def test_the_fastest_right_arguments_go_into_the_table(monkeypatch, tmp_path, capsys):
    """By a made-up clock, on which the right answer is two turns away, and a wrong result is the fastest of all."""

    def clock(self, candidates, rounds):
        return [1 + abs(c["BLOCK"] - 512) + abs(c["num_warps"] - 2) / 10 for c in candidates]

    def right(self, arguments, expected):
        return arguments["num_warps"] != 1

    monkeypatch.setattr(tune._Trial, "milliseconds", clock)
    monkeypatch.setattr(tune._Trial, "is_right", right)
    monkeypatch.setattr(launch, "architecture", lambda: 90)
    tune.tune("cpu", NAME, small=True, table=launch.TABLE)
    table = json.loads(launch.TABLE.read_text())
    assert table["sm_90"]["other"] == {"1": {"BLOCK": 8}}
    assert {**table["sm_90"]["swiglu"]["14336"]} == {"BLOCK": 512, "num_warps": 2}
    assert launch.swiglu("swiglu", 14336)["BLOCK"] == 512
    assert "swiglu 14336 (swiglu, fp32)" in capsys.readouterr().out


def test_a_wrong_result_is_no_candidate():
    """A block of which not all is written, and one that Triton does not take."""
    trial = tune._Trial(CASES["rms_norm, fp32"]("cpu", True), "rms_norm", "4096")
    (arguments,) = [a for kernel, _, a in tune.asked(CASES["rms_norm, fp32"], "cpu", True) if kernel == "rms_norm"]
    expected = trial.result(arguments)
    assert len(expected) > 1
    assert trial.is_right(arguments, expected)
    assert trial.is_right(arguments | {"BLOCK": 2 * arguments["BLOCK"]}, expected)
    assert not trial.is_right(arguments | {"BLOCK": arguments["BLOCK"] // 2}, expected)
    assert not trial.is_right(arguments | {"BLOCK": 100}, expected)


def test_wrong_input_is_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "tune", "--only", "swigloo"]) == 1
    assert "no case has that in its name" in capsys.readouterr().err
    assert main(["bench", "tune", "--only", "swiglu"]) == 1
    assert "torch sees no GPU here" in capsys.readouterr().err
