"""Checkpoints: whole or not at all, damaged ones passed over, and nothing in one is ever executed."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tokenmill.trainer.checkpoint import (
    MANIFEST,
    latest_checkpoint,
    load_model,
    load_training,
    read_manifest,
    save_checkpoint,
    save_step,
)
from tokenmill.trainer.config import OptimizerSection
from tokenmill.trainer.distributed import World
from tokenmill.trainer.model import ModelConfig, MoEConfig, Transformer
from tokenmill.trainer.optim import build_optimizer
from tokenmill.trainer.state import TrainState

CONFIG = ModelConfig(16, 2, 2, 1, 8, 24, 50, sliding_window=4, moe=MoEConfig(3, 2))


@pytest.fixture
def job():
    """A model, its optimizer after a step, and a state with everything set."""
    model = Transformer(CONFIG)
    model.initialise(0)
    optimizer = build_optimizer(model, OptimizerSection(1e-3))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    data = {"samples": 12, "seed": 1, "fingerprint": "f"}
    return model, optimizer, TrainState(3, 1000, 1, data, torch.rand(2, 3))


def save(run, job, step, keep=5):
    model, optimizer, state = job
    state.step = step
    return save_step(run, keep, model, World(), optimizer=optimizer, state=state)


def test_everything_comes_back_bit_by_bit(job, tmp_path):
    model, optimizer, state = job
    folder = save(tmp_path, job, 3)
    other = Transformer(CONFIG)
    other.initialise(1)
    fresh = build_optimizer(other, OptimizerSection(1e-3))
    again = load_training(folder, other, fresh)
    assert again.expert_fractions is not None
    assert torch.equal(again.expert_fractions, state.expert_fractions)
    assert again.to_json() == state.to_json()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, fresh.state[b][key]), (name, key)
    for dtype in (None, torch.bfloat16):
        loaded = load_model(tmp_path, dtype)
        for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(a.to(dtype or a.dtype), b)


def test_only_the_last_are_kept(job, tmp_path):
    for step in (1, 2, 10, 11):
        save(tmp_path, job, step, keep=2)
    assert [f.name for f in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000010", "step-00000011"]


def cut(folder):
    file = folder / "optimizer-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(folder):
    file = folder / "model-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)


DAMAGES = {
    "bit": flip,
    "short": cut,
    "missing": lambda f: (f / "optimizer-00000.safetensors").unlink(),
    "manifest": lambda f: (f / MANIFEST).write_text("{"),
    "empty": lambda f: (f / MANIFEST).write_text("{}"),
    "array": lambda f: (f / MANIFEST).write_text("[]"),
    "format": lambda f: (f / MANIFEST).write_text('{"format": "x", "files": {}, "ranks": 1}'),
    "ranks": lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text().replace('"ranks": 1', '"ranks": 2')),
    "no manifest": lambda f: (f / MANIFEST).unlink(),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(job, tmp_path, kind):
    good, bad = save(tmp_path, job, 1), save(tmp_path, job, 2)
    DAMAGES[kind](bad)
    with pytest.warns(UserWarning, match="step-00000002.*passing over"):
        assert latest_checkpoint(tmp_path) == good
    save(tmp_path, job, 2)
    assert latest_checkpoint(tmp_path) == bad


def test_a_failure_leaves_nothing_half_written(job, tmp_path, monkeypatch):
    save(tmp_path, job, 1)
    monkeypatch.setattr("tokenmill.trainer.checkpoint._optimizer_tensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path, job, 2)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_a_forged_checkpoint_executes_nothing(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path, job, 1)
    for name in ("model-00000.safetensors", "optimizer-00000.safetensors", MANIFEST):
        forged = tmp_path / "forged"
        shutil.copytree(folder, forged)
        (forged / name).write_bytes(pickle.dumps(Bomb()))
        manifest = json.loads((folder / MANIFEST).read_text())
        if name != MANIFEST:
            import zlib

            content = (forged / name).read_bytes()
            manifest["files"][name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
            (forged / MANIFEST).write_text(json.dumps(manifest))
        model = Transformer(CONFIG)
        with pytest.raises(ValueError, match=name):
            load_training(forged, model, build_optimizer(model, OptimizerSection(1e-3)))
        shutil.rmtree(forged)
    assert not Path("exploded").exists()


def test_names_in_a_manifest_do_not_lead_out_of_the_folder(job, tmp_path):
    folder = save(tmp_path, job, 1)
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "crc32": 0}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="secret is missing"):
        read_manifest(folder)


def test_an_imported_model_has_no_training_to_resume(job, tmp_path):
    model, optimizer, _ = job
    save_checkpoint(tmp_path / "imported", model)
    load_model(tmp_path / "imported")
    with pytest.raises(ValueError, match="no training to resume"):
        load_training(tmp_path / "imported", model, optimizer)


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="expected a checkpoint"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        load_model(tmp_path / "run")
