"""The tuner: what it tries, what it takes, and what it leaves in the table."""

from __future__ import annotations

import json
from typing import Any

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
    base = {"BLOCK": 64, "STAGES": 1, "FLATTEN": False, "ONCE": False, "num_warps": 1}
    others = [base | {"STAGES": 2}, base | {"FLATTEN": True}, base | {"num_warps": 2}]
    blocks = [base | {"BLOCK": 32}, base | {"BLOCK": 128}]
    assert list(tune.neighbours("swiglu", base)) == blocks + others
    assert list(tune.neighbours("rms_norm", base)) == others  # which holds a row in a block
    assert list(tune.neighbours("cross_entropy_row", base | {"ONCE": True})) == [x | {"ONCE": True} for x in others]
    assert list(tune.neighbours("rotary", {"Q_BLOCK": 32, "K_BLOCK": 8, "HALF_BLOCK": 64})) == []


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


@pytest.mark.parametrize(("of_library", "taken"), [(0.5, True), (0.99, False)])
def test_the_library_comes_last(monkeypatch, of_library, taken):
    """Only once our own arguments are the best; by its own time."""

    def clock(self, candidates, rounds):
        return [of_library if c["LIBRARY"] else 1 + abs(c["GROUP"] - 4) for c in candidates]

    monkeypatch.setattr(tune._Trial, "milliseconds", clock)
    monkeypatch.setattr(tune._Trial, "is_right", lambda self, arguments, expected: True)
    case = CASES["experts, fp32"]
    (found,) = [(s, a) for kernel, s, a in tune.asked(case, "cpu", True) if kernel == "moe_gate_up"]
    best, _, _ = tune._tuned(case, "cpu", True, "sm_90", "moe_gate_up", *found, 1)
    assert (best["GROUP"], best["LIBRARY"]) == (4, taken)


def test_the_library_is_timed_and_right():
    case = CASES["experts, fp32"]
    found = {kernel: (shape, a) for kernel, shape, a in tune.asked(case, "cpu", True) if "LIBRARY" in a}
    assert set(found) == {
        "moe_product", "moe_product_t", "moe_gate_up", "moe_hidden_gradient", "moe_weight_gradient"
    }  # fmt: skip
    for kernel, (shape, arguments) in found.items():
        trial = tune._Trial(case("cpu", True), kernel, shape)
        expected = trial.result(arguments)
        assert trial.is_right(arguments | {"LIBRARY": True}, expected)
        assert trial.marks


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


def test_what_is_left_out_shows():
    """Half the heads, in memory that held the whole result before."""
    case = CASES["rotary, fp32"]
    ((kernel, shape, arguments),) = tune.asked(case, "cpu", True)
    trial = tune._Trial(case("cpu", True), kernel, shape)
    expected = trial.result(arguments)
    assert trial.is_right(arguments, expected)
    for name in ("Q_BLOCK", "K_BLOCK", "HALF_BLOCK"):
        half = arguments | {name: arguments[name] // 2}
        assert any(x.isnan().any() for x in trial.result(half))
        assert not trial.is_right(half, expected)


def test_an_update_in_place_is_compared():
    case = CASES["adamw"]
    ((kernel, shape, arguments),) = tune.asked(case, "cpu", True)
    trial = tune._Trial(case("cpu", True), kernel, shape)
    expected = trial.result(arguments)
    assert len(expected) == 3
    assert trial.is_right(arguments | {"BLOCK": arguments["BLOCK"] // 2}, expected)  # each run has the same state
    expected[0] = expected[0] * 1.1
    assert not trial.is_right(arguments, expected)
    with pytest.raises(ValueError, match="the case of adamw returns nothing"):
        tune._Trial(lambda: (), kernel, shape).result(arguments)


def test_only_its_own_launches_count(monkeypatch):
    launched = []
    compiler: Any = tune.JITFunction
    monkeypatch.setattr(compiler, "run", lambda kernel, **given: launched.append(kernel))

    def run() -> tuple[torch.Tensor]:
        for kernel, size in (("norm", 4), ("norm", 8), ("other", 4), ("norm", 4)):
            settings = launch.settings(kernel, [size], {"BLOCK": 16, "PROGRAMS": 2})
            del settings["PROGRAMS"]  # is for the launcher
            for name in ("first", "second"):
                compiler.run(f"{kernel} {size} {name}", **settings, DIM=size)
            compiler.run("asks nothing", BLOCK=4096)
        return (torch.ones(1),)

    trial = tune._Trial(run, "norm", "4")
    trial.result({"BLOCK": 32, "PROGRAMS": 1})
    assert len(launched) == 12
    assert len(trial.marks) == 4  # of two launches, twice


def test_wrong_input_is_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "tune", "--only", "swigloo"]) == 1
    assert "no case has that in its name" in capsys.readouterr().err
    assert main(["bench", "tune", "--only", "swiglu"]) == 1
    assert "torch sees no GPU here" in capsys.readouterr().err
