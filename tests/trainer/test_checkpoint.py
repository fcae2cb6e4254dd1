"""Checkpoints: whole or not at all, damaged ones passed over, and nothing in one is ever executed."""

import json
import pickle
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tokenmill.trainer import shards
from tokenmill.trainer.checkpoint import (
    latest_checkpoint,
    load_model,
    load_training,
    newer_checkpoints,
    save_checkpoint,
    save_step,
)
from tokenmill.trainer.config import OptimizerSection
from tokenmill.trainer.distributed import World
from tokenmill.trainer.model import ModelConfig, MoEConfig, Transformer
from tokenmill.trainer.optim import build_optimizer
from tokenmill.trainer.shards import MANIFEST, verify
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
    return model, optimizer, TrainState(3, 1000, 1, data, torch.rand(2, 3), torch.randn(2, 3))


def save(run, job, step, keep=5, passed_over=()):
    model, optimizer, state = job
    state.step = step
    return save_step(run, keep, model, World(), passed_over=passed_over, optimizer=optimizer, state=state)


def test_everything_comes_back_bit_by_bit(job, tmp_path):
    model, optimizer, state = job
    folder = save(tmp_path, job, 3)
    other = Transformer(CONFIG)
    other.initialise(1)
    fresh = build_optimizer(other, OptimizerSection(1e-3))
    again = load_training(folder, other, fresh)
    assert again.expert_fractions is not None
    assert torch.equal(again.expert_fractions, state.expert_fractions)
    assert again.balance_bias is not None
    assert torch.equal(again.balance_bias, state.balance_bias)
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


def test_what_was_passed_over_does_not_count_and_goes(job, tmp_path):
    folders = [save(tmp_path, job, step) for step in (1, 2, 5, 7)]
    for bad in folders[2:]:
        flip(bad)
    with pytest.warns(UserWarning, match="step-0000000[57].*passing over"):
        newest = latest_checkpoint(tmp_path)
    assert newest == folders[1]
    passed_over = newer_checkpoints(tmp_path, newest)
    assert passed_over == folders[2:]
    save(tmp_path, job, 6, keep=2, passed_over=passed_over)
    assert [f.name for f in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000002", "step-00000006"]


@dataclass(frozen=True)
class OneOfTwo(World):
    """Rank 0 of two, of which the other is not there: `finds` says in which turns it would have found damage."""

    size: int = 2
    finds: list[bool] = field(default_factory=list)

    def sum(self, values):
        return values

    def any(self, flag):
        return flag or self.finds.pop(0)


def test_ranks_read_their_shares_and_choose_together(job, tmp_path, monkeypatch):
    folders = [save(tmp_path, job, step) for step in (1, 2, 3)]
    read = []
    crc32 = shards.crc32
    monkeypatch.setattr(shards, "crc32", lambda file: read.append(file) or crc32(file))
    with pytest.warns(UserWarning, match="step-00000003: damaged, as another rank has found; passing over"):
        assert latest_checkpoint(tmp_path, OneOfTwo(finds=[True, False])) == folders[1]
    assert read == [folder / "model-00000.safetensors" for folder in (folders[2], folders[1])]
    flip(folders[2])
    with pytest.warns(UserWarning, match="step-00000003/model-00000.safetensors: damaged.*passing over"):
        assert latest_checkpoint(tmp_path, OneOfTwo(finds=[False])) == folders[1]
    monkeypatch.setattr(shards, "crc32", lambda file: (tmp_path / "a read error").read_bytes())
    with pytest.warns(UserWarning, match="a read error.*passing over"):
        assert latest_checkpoint(tmp_path) is None


def test_counts_of_steps_lie_where_the_optimizer_wants_them(job, tmp_path):
    """torch's fused one beside the parameter, which a CPU alone does not tell from the host."""
    folder = save(tmp_path, job, 3)
    with torch.device("meta"):
        model = Transformer(CONFIG)
    for fused, device in ((True, "meta"), (False, "cpu")):
        optimizer = torch.optim.SGD(model.parameters())
        optimizer.defaults["fused"] = fused
        load_training(folder, model, optimizer)
        assert {state["step"].device.type for state in optimizer.state.values()} == {device}
        assert {state["exp_avg"].device.type for state in optimizer.state.values()} == {"meta"}


def test_a_folder_that_is_not_shared_is_named(job, tmp_path):
    """The second rank does not see the folder that the first has made."""
    with pytest.raises(OSError, match=r"model-00001.safetensors: cannot be written .* that all nodes share"):
        save_checkpoint(tmp_path / "there", job[0], World(rank=1))


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
        verify(folder)


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
