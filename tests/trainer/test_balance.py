"""Balanced experts: losses and bias are the same however a step is cut, the bias evens loads out and is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import ENVIRONMENT

from tokenmill.trainer import loop
from tokenmill.trainer.balance import PATIENCE, Watch, updated_bias
from tokenmill.trainer.checkpoint import load_model
from tokenmill.trainer.cli import main
from tokenmill.trainer.config import LogSection
from tokenmill.trainer.distributed import World
from tokenmill.trainer.metrics import MetricsLog, StepRecord
from tokenmill.trainer.model.weights import save_hf


def test_the_bias_moves_against_the_violation():
    bias = torch.tensor([[0.5, 0.0, -0.25, 0.0]])
    counts = torch.tensor([[9.0, 2.0, 1.0, 3.0]], dtype=torch.float64)  # an even share is 3.75
    assert torch.equal(updated_bias(bias, counts, 0.25), torch.tensor([[0.25, 0.25, 0.0, 0.25]]))
    assert torch.equal(updated_bias(bias, torch.full((1, 4), 5.0), 0.25), bias)
    assert torch.equal(updated_bias(bias, counts, 0.0), bias)


# Steps whose update is too small to be seen, so that the gradients of the second, whose balancing loss weighs the
# experts by the first's counts, can be compared within rounding.
QUIET = ["--train.steps=2", "--optimizer.learning_rate=1e-12", "--optimizer.clip_norm=1e9"]
BALANCED = ["--loss.balance=2.0", "--loss.router_z=0.5", "--loss.balance_bias=0.003"]
GRADIENTS = """
import sys
from safetensors.torch import save_file
from tokenmill.trainer import loop
from tokenmill.trainer.config import load_recipe
from tokenmill.trainer.distributed import join

with join("cpu") as world:
    trainer = loop.Trainer(load_recipe(sys.argv[1], sys.argv[3:]), world)
    update, found = trainer.optimizer.step, {}
    def keep():
        for name, p in trainer.model.named_parameters():
            found[name] = (p.grad.full_tensor() if world.size > 1 else p.grad).clone()
        update()
    trainer.optimizer.step = keep
    records = [trainer.step() for _ in range(2)]
    found["balance"] = trainer.model.embed.weight.new_tensor([r.balance for r in records])
    found["entropy"] = trainer.model.embed.weight.new_tensor([r.router_entropy for r in records])
    found["fractions"], found["bias"] = trainer.state.expert_fractions, trainer.state.balance_bias
    if world.rank == 0:
        save_file(found, sys.argv[2])
    world.barrier()
    trainer.log.close()
"""


@pytest.mark.parametrize(
    "cuts",  # (ranks, packs of a micro-batch, recomputation)
    [
        [(1, 4, "none"), (1, 1, "selective"), (2, 1, "full")],
        pytest.param([(1, 4, "none"), (1, 2, "full"), (2, 2, "none"), (4, 1, "selective")], marks=pytest.mark.slow),
    ],
)
def test_balancing_is_the_same_however_a_step_is_cut(make_recipe, tmp_path, cuts):
    make_recipe()
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    results = []
    for ranks, size, mode in cuts:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        options = [f"--data.packs_per_micro_batch={size}", f"--train.recompute={mode}", *QUIET, *BALANCED]
        output = tmp_path / f"{len(results)}.safetensors"
        command = [sys.executable, *launch, str(tmp_path / "gradients.py"), str(tmp_path / "recipe.toml"), str(output)]
        done = subprocess.run(
            [*command, *options, f"--output={tmp_path / output.stem}"],
            env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        results.append(load_file(output))
    expected, *others = results
    assert expected["bias"].abs().max() == pytest.approx(0.006)
    for got in others:
        for name in ("bias", "fractions"):
            assert torch.equal(got[name], expected[name])
        for name, tensor in expected.items():
            assert (got[name] - tensor).norm() <= 2e-6 * tensor.norm(), name


def records(recipe):
    lines = (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def test_a_bias_evens_loads_out_and_stays_with_the_model(make_recipe, tmp_path):
    fullest = {}
    for speed in (0.0, 0.002):
        options = ["--train.steps=20", "--train.validate_every=20", "--optimizer.learning_rate=1e-5"]
        options += ["--loss.balance=0.0", f"--loss.balance_bias={speed}", f"--output={tmp_path / str(speed)}"]
        recipe = make_recipe(*options)
        loop.train(recipe)
        last = records(recipe)[-10:]
        fullest[speed] = sum(record["fullest_expert"] for record in last) / 10
        for record in last:
            assert record["fullest_expert"] == max(max(load) for load in record["expert_load"])
            assert all(1.3 < entropy < 1.3863 for entropy in record["router_entropy"])  # nearly log 4: still unlearnt
    assert fullest[0.002] - 0.25 < 0.5 * (fullest[0.0] - 0.25)

    model = load_model(tmp_path / "0.002")
    assert model.balance_bias is not None
    assert model.balance_bias.any()
    with pytest.warns(UserWarning, match=r"no place for the bias .*loss\.balance_bias"):
        save_hf(model, tmp_path / "hf")
    assert main(["import", str(tmp_path / "0.002"), str(tmp_path / "imported")]) == 0
    imported = load_model(tmp_path / "imported").balance_bias
    assert imported is not None
    assert torch.equal(imported, model.balance_bias)
    tuned = replace(make_recipe(), model=replace(make_recipe().model, new=None, path=str(tmp_path / "0.002")))
    trainer = loop.Trainer(tuned, World())
    trainer.log.close()
    assert trainer.state.balance_bias is not None
    assert torch.equal(trainer.state.balance_bias, model.balance_bias)
    for block, row in zip(trainer.model.blocks, model.balance_bias, strict=True):
        assert torch.equal(block.feed_forward.balance_bias, row)  # type: ignore[union-attr]


def test_a_starving_expert_is_named_once(tmp_path, capsys):
    watch = Watch()
    hungry, fed = [[0.5, 0.4751, 0.0249, 0.0]], [[0.25] * 4]  # a tenth of an even share is 0.025
    for loads in [hungry] * (PATIENCE - 1) + [fed] + [hungry] * (PATIENCE - 1):
        assert watch.step(loads) == []
    assert watch.step(hungry) == [(0, 2), (0, 3)]
    assert watch.step(hungry) == []
    assert watch.step([]) == []  # a step that was left out, or a dense model

    log = MetricsLog(tmp_path, 0, 40, "lines", LogSection())
    for step in range(1, 40):
        log.step(StepRecord(step, 10, 1.0, 1.0, 1.0, 1e-3, 1.0, 1.0, None, None, 0.0, 1.0, 0, hungry, 0.5, [1.0]))
    log.close()
    shown = capsys.readouterr()
    assert "step 20: expert 3 of layer 0 starves, with less than 2.50% of the tokens for 20 steps" in shown.err
    assert shown.err.count("starves") == 2
    assert "fullest expert 50%" in shown.out
