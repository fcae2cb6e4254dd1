"""Several processes are one run: the same losses and weights at any number of ranks, stopped and resumed at others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from tokenmill.data.files import locked
from tokenmill.trainer import distributed
from tokenmill.trainer.checkpoint import load_model

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}


def start(recipe: Path, ranks: int, *overrides: str) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [*(launch if ranks > 1 else [sys.executable, "-m"]), "tokenmill.trainer", str(recipe), *overrides]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(recipe: Path, ranks: int, *overrides: str) -> str:
    process = start(recipe, ranks, *overrides)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def stop_at(process: subprocess.Popen[str], step: int, number: signal.Signals) -> str:
    """Send a signal when a step is printed; the rest of the output."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(f"step {step}/"):
            process.send_signal(number)
    process.stdout.close()
    process.wait(timeout=120)
    return "".join(seen)


def records(folder: Path):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if "loss" in r], [r["validation"]["notes"] for r in lines if "validation" in r]


def assert_same(a: Path, b: Path) -> None:
    """Section 2's bound on every loss; weights by what twelve steps of AdamW make of it."""
    (steps, validation), (other_steps, other_validation) = records(a), records(b)
    for one, other in zip(steps, other_steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-6)
        assert one["tokens"] == other["tokens"]
    assert validation == pytest.approx(other_validation, rel=1e-5)
    for (name, p), q in zip(load_model(a).named_parameters(), load_model(b).parameters(), strict=True):
        assert ((p - q).norm() / q.norm()).item() <= 1e-4, name


@pytest.fixture
def recipe(make_recipe, tmp_path) -> Path:
    make_recipe()
    return tmp_path / "recipe.toml"


def test_two_ranks_are_one(recipe, tmp_path):
    run(recipe, 1, f"--output={tmp_path / 'one'}")
    output = run(recipe, 2, f"--output={tmp_path / 'two'}")
    assert output.count("step 12/12  loss") == 1  # rank 0 alone speaks
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_ranks_without_a_sample_and_other_sizes(recipe, tmp_path):
    """Four packs a step over three ranks, and over four with micro-batches of two: some ranks run ghosts."""
    run(recipe, 1, f"--output={tmp_path / 'one'}")
    for ranks in (3, 4):
        run(recipe, ranks, f"--output={tmp_path / str(ranks)}")
        assert_same(tmp_path / str(ranks), tmp_path / "one")


@pytest.mark.slow
def test_killed_and_resumed_at_other_sizes(recipe, tmp_path):
    run(recipe, 1, f"--output={tmp_path / 'one'}")
    options = (f"--output={tmp_path / 'many'}", "--train.checkpoint_every=1")
    for ranks, step in ((3, 3), (2, 6), (4, 9)):
        stop_at(start(recipe, ranks, *options), step, signal.SIGKILL)
    assert "resuming from" in run(recipe, 1, *options)
    assert_same(tmp_path / "many", tmp_path / "one")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_writes_a_checkpoint_and_leaves(recipe, tmp_path, number):
    options = (f"--output={tmp_path / 'run'}", "--train.checkpoint_every=100", "--train.steps=300")
    process = start(recipe, 1, *options)
    output = stop_at(process, 2, number)
    assert process.returncode == 75, output
    assert "on request, checkpoint written" in output
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


STOP_ONE = """
import os, signal, sys
from tokenmill.trainer import loop, metrics
from tokenmill.trainer.config import load_recipe

report = metrics.MetricsLog.step

def then_a_signal(self, record):
    report(self, record)
    if record.step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)

metrics.MetricsLog.step = then_a_signal
loop.train(load_recipe(sys.argv[1], sys.argv[2:]))
"""


def test_all_ranks_are_refused_where_another_run_writes(recipe, tmp_path):
    with locked(tmp_path / "taken"):
        process = start(recipe, 2, f"--output={tmp_path / 'taken'}")
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output.count("taken: another run is writing into it") == 2
    assert not (tmp_path / "taken").exists()


def test_a_signal_to_one_rank_between_two_steps_stops_all_together(recipe, tmp_path):
    (tmp_path / "stop_one.py").write_text(STOP_ONE)
    options = (f"--output={tmp_path / 'run'}", "--train.checkpoint_every=100")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(tmp_path / "stop_one.py"), str(recipe), *options]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert "stopped at step 4 of 12 on request, checkpoint written" in done.stdout
    assert done.returncode == 1  # torchrun's own: the work is not done
    assert "exitcode  : 75" in done.stderr
    assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]


def test_an_error_is_one_line_that_names_its_rank(recipe, tmp_path):
    process = start(recipe, 2, "--model.new.vocab_size=8")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    lines = [line for line in output.splitlines() if line.startswith("tokenmill: error:")]
    ranks = [" ".join(line.split()[2:4]) for line in lines]  # torchrun may end a rank before it has spoken
    assert ranks
    assert len({*ranks}) == len(ranks)
    assert {*ranks} <= {"rank 0:", "rank 1:"}
    assert all("vocabulary only 8" in line for line in lines)


def test_after_an_error_no_rank_waits_for_the_others(monkeypatch):
    options, left = {}, []
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda **given: options.update(given))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: left.append("cleanly"))
    monkeypatch.setattr(distributed, "init_device_mesh", lambda *_, **__: None)
    monkeypatch.setenv("RANK", "1")
    for size, expected in ((2, []), (1, ["cleanly"])):
        monkeypatch.setenv("WORLD_SIZE", str(size))
        with pytest.raises(RuntimeError) as error, distributed.join("cpu", sharded=True):
            raise RuntimeError("out of memory")
        assert error.value.__notes__ == [f"on rank 1 of {size}"]
        assert left == expected
    with distributed.join("cpu", sharded=True):
        pass
    assert left == ["cleanly"] * 2
    assert options["timeout"] >= timedelta(hours=1)


def test_bf16_mixed_trains_close_to_fp32(recipe, tmp_path):
    run(recipe, 1, f"--output={tmp_path / 'fp32'}")
    run(recipe, 1, f"--output={tmp_path / 'bf16'}", "--train.precision=bf16-mixed")
    fp32, bf16 = (records(tmp_path / name)[0] for name in ("fp32", "bf16"))
    for a, b in zip(fp32, bf16, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
    assert all(p.dtype == torch.float32 for p in load_model(tmp_path / "bf16", None).parameters())


def test_bf16_throughout_trains_close_to_fp32_and_resumes_on_two_ranks(recipe, tmp_path):
    run(recipe, 1, f"--output={tmp_path / 'fp32'}")
    options = (f"--output={tmp_path / 'bf16'}", "--train.precision=bf16", "--train.checkpoint_every=1")
    stop_at(start(recipe, 1, *options), 5, signal.SIGKILL)
    run(recipe, 2, *options)
    fp32, bf16 = (records(tmp_path / name)[0] for name in ("fp32", "bf16"))
    for a, b in zip(fp32, bf16, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)
    assert all(p.dtype == torch.bfloat16 for p in load_model(tmp_path / "bf16", None).parameters())
