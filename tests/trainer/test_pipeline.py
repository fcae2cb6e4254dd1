"""Pipelines: what they check before they begin, and that one is its stages' runs, however often it is stopped."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from tokenmill.data.prepare import prepare
from tokenmill.trainer import loop, pipeline
from tokenmill.trainer.adapters import Base, adapter_tensors, read_adapter
from tokenmill.trainer.checkpoint import load_model, load_moments, step_folder
from tokenmill.trainer.config import ConfigError, build, load_recipe, read_toml
from tokenmill.trainer.distributed import World
from tokenmill.trainer.optim import build_optimizer

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}

PIPELINE = """
output = "{folder}/out"
set.train.steps = 6

[[stages]]
name = "cpt"
recipe = "recipe.toml"

[[stages]]
name = "tune"
parent = "cpt"
at = [3, "last"]
recipe = "recipe.toml"
set = {{ objective = "sft", train.steps = 4, data.sources = [{{ stream = "{streams}/talks" }}] }}

[[stages]]
name = "again"
parent = "tune"
optimizer = "keep"
[stages.recipe]
objective = "sft"
data.sources = [{{ stream = "{streams}/talks" }}, {{ stream = "{streams}/notes", weight = 0.1 }}]
data.sequence_length = 64
data.packs_per_step = 4
optimizer.learning_rate = 1e-3
train.steps = 2
"""
NAMES = ["cpt", "tune-3", "tune-last", "again-3", "again-last"]


@pytest.fixture
def file(make_recipe, streams, tmp_path) -> Path:
    make_recipe()
    path = tmp_path / "pipeline.toml"
    path.write_text(PIPELINE.format(folder=tmp_path, streams=streams))
    return path


def short(*stages: str) -> list[str]:
    """Overrides for the first two stages only, without a fan-out: enough for most."""
    return ["--stages.1.at=last", *stages]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder).named_parameters())


def assert_same(a: Path, b: Path) -> None:
    for (name, p), q in zip(weights(a).items(), weights(b).values(), strict=True):
        assert torch.equal(p, q), name


def record(folder: Path) -> dict:
    return json.loads((folder / "stage.json").read_text())


def test_a_pipeline_is_its_stages_one_after_another(file, streams, tmp_path, capsys, monkeypatch):
    pipeline.run(file)
    out = tmp_path / "out"
    assert sorted(f.name for f in out.iterdir()) == sorted(NAMES)
    kept = [f.name for f in (out / "cpt" / "checkpoints").iterdir()]
    assert sorted(kept) == ["step-00000003", "step-00000005", "step-00000006"]
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert [line.split("|")[1].strip() for line in table] == ["stage", "-" * 12, *NAMES]
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in table)}
    assert rows["stage"] == ["from", "steps", "tokens", "in all", "notes"]
    assert rows["again-3"][:2] == ["tune-3 at step 4", "2"]
    own, total = (int(rows[name][k].replace(",", "")) for name, k in (("tune-3", 2), ("tune-3", 3)))
    before = json.loads((step_folder(out / "cpt", 3) / "checkpoint.json").read_text())["state"]["tokens"]
    assert total == own + before
    assert rows["cpt"][4] == f"{record(out / 'cpt')['result']['validation']['notes']:.4f}"
    assert rows["again-3"][4] == "-"

    options = ["--objective=sft", "--train.steps=4", f'--data.sources=[{{stream="{streams}/talks"}}]']
    by_hand = load_recipe(tmp_path / "recipe.toml", [*options, f"--output={tmp_path / 'by_hand'}"])
    parent = str(step_folder(out / "cpt", 3))
    loop.train(replace(by_hand, model=replace(by_hand.model, new=None, path=parent)))
    assert_same(tmp_path / "by_hand", out / "tune-3")

    monkeypatch.setattr(pipeline, "train", lambda *_, **__: pytest.fail("a stage that is done was trained again"))
    shutil.rmtree(out / "cpt" / "checkpoints")  # to make room: nothing that is left to do needs them
    pipeline.run(file)
    again = capsys.readouterr().out
    assert again.count(": done\n") == 5
    assert again.split("\n\n")[-1].splitlines() == table


def test_killed_in_its_second_stage_it_goes_on_to_the_same_bits(file, tmp_path, capsys):
    options = short("--set.train.checkpoint_every=2", "--stages.1.set.train.steps=40")
    command = [sys.executable, "-m", "tokenmill.trainer", "run", str(file), *options]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step 5/40"))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert record(tmp_path / "out" / "cpt")["result"]["step"] == 6
    assert record(tmp_path / "out" / "tune")["result"] is None
    pipeline.run(file, options)
    said = capsys.readouterr().out
    assert "stage 1 of 3: cpt: done\n" in said
    assert "resuming from" in said
    pipeline.run(file, [*options, f"--output={tmp_path / 'whole'}"])
    for name in ("cpt", "tune", "again"):
        assert_same(tmp_path / "out" / name, tmp_path / "whole" / name)
        assert record(tmp_path / "out" / name)["result"] == record(tmp_path / "whole" / name)["result"]


QLORA = """
output = "{folder}/qlora"
set.data = {{ sequence_length = 64, packs_per_step = 4 }}
set.optimizer.learning_rate = 1e-2
set.train = {{ steps = 4, checkpoint_every = 2 }}

[[stages]]
name = "cpt"
recipe = "recipe.toml"
set.data.validation = []

[[stages]]
name = "sft"
parent = "cpt"
[stages.recipe]
objective = "sft"
data.sources = [{{ stream = "{streams}/talks" }}]
adapter = {{ rank = 4, quantise = "nf4" }}

[[stages]]
name = "dpo"
parent = "sft"
[stages.recipe]
objective = "dpo"
data.sources = [{{ stream = "{folder}/pairs" }}]
adapter = {{ rank = 4, quantise = "nf4" }}
"""


@pytest.fixture
def qlora(make_recipe, streams, tmp_path) -> Path:
    """SFT and then DPO on weights in 4 bits."""
    make_recipe()
    row = {"prompt": "fever or pain?", "chosen": "dose given", "rejected": "iron scan"}
    (tmp_path / "pairs.jsonl").write_text("\n".join([json.dumps(row)] * 8))
    prepare([tmp_path / "pairs.jsonl"], streams / "tokenizer.model", tmp_path / "pairs", progress=False)
    path = tmp_path / "qlora.toml"
    path.write_text(QLORA.format(folder=tmp_path, streams=streams))
    return path


def test_adapters_on_weights_in_4_bits_are_trained_on_in_the_next_stage(qlora, tmp_path):
    pipeline.run(qlora)
    out = tmp_path / "qlora"
    base, sft, dpo = (step_folder(out / name, 4) for name in ("cpt", "sft", "dpo"))
    (adapter, beneath), (again, same) = (found for f in (sft, dpo) if (found := read_adapter(f)))
    assert beneath == same == Base.of(base)
    assert again == replace(adapter, path=str(sft))
    recipe = pipeline.plan(qlora)[-1].recipe
    model = loop.build_model(recipe, World(), base)
    for name, factor in adapter_tensors(sft).items():
        assert torch.equal(model.get_parameter(name), factor), name
    assert any(not torch.equal(factor, adapter_tensors(sft)[name]) for name, factor in adapter_tensors(dpo).items())
    first, *_, last = (json.loads(line) for line in (out / "dpo" / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)  # of what it begins from, which is its reference
    assert last.get("loss", 0) < first["loss"]
    assert record(out / "dpo")["result"]["total_tokens"] == sum(
        record(out / name)["result"]["tokens"] for name in ("cpt", "sft", "dpo")
    )

    whole = adapter_tensors(dpo)  # and from its middle on to the same bits
    shutil.rmtree(dpo)
    path = out / "dpo" / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"result": None}))
    pipeline.run(qlora)
    for name, factor in adapter_tensors(dpo).items():
        assert torch.equal(factor, whole[name]), name


@pytest.mark.parametrize("keys", ["{rank=8, quantise='nf4'}", "{rank=4, quantise='nf4', path='x'}"])
def test_other_adapters_on_weights_in_4_bits_are_refused(qlora, tmp_path, keys):
    with pytest.raises(
        ConfigError, match="stage 'dpo': parent: its adapters cannot be merged into weights in 4 bits; to"
    ):
        pipeline.run(qlora, [f"--stages.2.recipe.adapter={keys}"])
    assert not (tmp_path / "qlora").exists()


def test_killed_before_a_result_is_written_it_is_read_again(file, tmp_path, capsys):
    pipeline.run(file, short())
    path = tmp_path / "out" / "tune" / "stage.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {"result": None}))
    capsys.readouterr()
    pipeline.run(file, short())
    assert "nothing to do" in capsys.readouterr().out
    assert path.read_text() == whole


@pytest.mark.parametrize("stage", [0, 2])
def test_a_signal_in_a_stages_last_step_stops_the_pipeline(file, tmp_path, monkeypatch, stage):
    """In any but the last stage, whose work is then done."""
    validate = loop.Trainer.validate

    def then_a_signal(self, scores):
        if self.output.name == ("cpt", "tune", "again")[stage]:
            signal.raise_signal(signal.SIGTERM)
        return validate(self, scores)

    monkeypatch.setattr(loop.Trainer, "validate", then_a_signal)
    if stage:
        pipeline.run(file, short())
        return
    with pytest.raises(SystemExit) as left:
        pipeline.run(file, short())
    assert left.value.code == 75
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["cpt"]
    assert step_folder(tmp_path / "out" / "cpt", 6).is_dir()


def test_two_ranks_run_every_stage(file, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "tokenmill.trainer", "run", str(file), *short()]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stage 3 of 3: again, from tune at step 4\n") == 1  # rank 0 alone speaks
    pipeline.run(file, [*short(), f"--output={tmp_path / 'one'}"])
    for name in ("cpt", "tune", "again"):
        one, two = weights(tmp_path / "one" / name), weights(tmp_path / "out" / name)
        for key, p in one.items():
            assert ((p - two[key]).norm() / p.norm()).item() <= 1e-4, key


RESET = ["--stages.2.optimizer=reset"]
WRONG = {
    "no such file": (["--stages.2.recipe=no.toml"], "stage 'again-3': .*no.toml: no such recipe"),
    "misspelt key": (
        ["--stages.2.recipe.optimizer.learning_rat=1"],
        "stage 'again-3': unknown key optimizer.learning_rat; did you mean optimizer.learning_rate",
    ),
    "misspelt section": (["--stages.2.perent=cpt"], r"unknown key stages.2.perent; did you mean stages.2.parent\?"),
    "no stages": (["--stages=[]"], "stages: expected at least one"),
    "wrong type": (["--stages.0.recipe=7"], "stages.0.recipe: expected a string or a section, got 7"),
    "missing stream": (['--stages.2.recipe.data.sources=[{stream="no"}]'], "stage 'again-3': no: no token stream here"),
    "later parent": (["--stages.1.parent=again"], "stages.1.parent: no stage before 'tune' is called 'again'"),
    "beyond the end": (["--stages.1.at=[3, 7]"], "stage 'tune-7': at: 'cpt' ends at step 6, and has no step 7"),
    "no step": (["--stages.1.at=[0]"], "stages.1.at: expected steps from 1 on or 'last'"),
    "the first": (["--stages.1.at=first"], "stages.1.at: expected steps from 1 on or 'last'"),
    "twice": (["--stages.1.at=[3, 3]"], "stages.1: there is a stage 'tune-3' already"),
    "one name": (["--stages.2.name=tune-3"], "stages.2: there is a stage 'tune-3' already"),
    "a path": (["--stages.2.name=../x"], "stages.2.name: expected letters, digits"),
    "at alone": (["--stages.0.at=3"], "stages.0: at and optimizer say what is taken of a parent; 'cpt' has none"),
    "an output": (["--stages.1.set.output=x"], "stage 'tune-3': set.output: a stage's output is the pipeline's"),
    "a model": (["--stages.1.set.model.path=x"], "stage 'tune-3': set.model: the stage begins with the model of its"),
    "kept: kind": (
        ["--stages.2.set.optimizer={kind='rmsprop', weight_decay=0}"],
        "stage 'again-3': optimizer: 'keep' needs the parent's optimizer.kind, 'adamw', not 'rmsprop'",
    ),
    "kept: dtype": (["--stages.2.set.train.precision=bf16"], "'keep' needs moments of one dtype, .*'bf16', .*'fp32'"),
    "kept: adapters": (["--stages.2.set.adapter.rank=4"], "optimizer: 'keep' is not for adapters"),
    "adapters": (["--stages.1.set.adapter.targets=['attn']"], "stage 'tune-3': .*attn"),
    "4 bits": (
        ["--stages.1.set.adapter={rank=4}", "--stages.2.set.adapter={quantise='nf4'}", *RESET],
        "stage 'again-3': parent: its adapters cannot be merged",
    ),
    "pairs": (["--stages.2.recipe.objective=dpo"], "stage 'again-3': .*holds no preference pairs"),
    "devices": (["--stages.1.set.device=gpu"], "stage 'tune-3': device: expected auto, cpu or cuda"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_found_before_anything_begins(file, tmp_path, kind):
    overrides, message = WRONG[kind]
    with pytest.raises(ConfigError, match=message) as found:
        pipeline.run(file, overrides)
    assert str(found.value).startswith(f"{file}: ")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_in_a_later_stage_is_found_before_anything_begins(file, streams, tmp_path):
    from tokenmill.data.tokenizer import train_tokenizer

    other = train_tokenizer(["a completely different text about other things"] * 50, 280, tmp_path / "other.model")
    prepare([streams / "notes.jsonl"], other, tmp_path / "foreign", progress=False)
    with pytest.raises(ConfigError, match="stage 'again-3': .*foreign: was prepared with another tokenizer"):
        pipeline.run(file, [f'--stages.2.recipe.data.sources=[{{stream="{tmp_path / "foreign"}"}}]'])


def test_a_stage_whose_inputs_changed_is_refused(file, streams, tmp_path):
    notes = shutil.copytree(streams / "notes", tmp_path / "notes")
    options = [*short(), f'--stages.0.set.data.sources=[{{stream="{notes}"}}]']
    pipeline.run(file, options)
    out = tmp_path / "out"
    refused = {
        "--stages.0.set.optimizer.learning_rate=0.1": (
            "stage 'cpt': .*out/cpt: was begun with other inputs: optimizer.learning_rate was 0.003, is 0.1; put them "
            "back, remove that folder to train it again, or give the pipeline another output"
        ),
        "--stages.1.set.train.steps=5": "stage 'tune': .*train.steps was 4, is 5",
        "--stages.2.optimizer=reset": "stage 'again': .*optimizer.moments was 'tune at step 4 [(].*[)]', is None",
        "--stages.1.at=3": r"stage 'tune': .*model.path was 'cpt at step 6 [(](.*)[)]', is 'cpt at step 3 [(]\1[)]'",
    }
    for option, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            pipeline.run(file, [*options, option])
    pipeline.run(file, [*options, "--set.data.packs_per_micro_batch=1", "--set.log.tensorboard=true"])
    shutil.rmtree(out / "cpt")  # trained again, but otherwise: what came of it is another one too
    with pytest.raises(ConfigError, match="stage 'tune': .*model.path was 'cpt at step 6 [(].*is 'cpt at step 6"):
        pipeline.run(file, [*options, "--stages.0.set.seed=1"])
    prepare([streams / "talks.jsonl"], streams / "tokenizer.model", notes, progress=False, overwrite=True)
    with pytest.raises(ConfigError, match="stage 'tune': .*model.path was 'cpt at step 6"):
        pipeline.run(file, options)


def test_a_stream_that_changed_is_refused_and_one_that_is_gone_is_not(file, streams, tmp_path):
    notes = shutil.copytree(streams / "notes", tmp_path / "notes")
    options = [f'--stages.0.set.data.sources=[{{stream="{notes}"}}]', *short()]
    pipeline.run(file, options)
    prepare([streams / "talks.jsonl"], streams / "tokenizer.model", notes, progress=False, overwrite=True)
    with pytest.raises(ConfigError, match="data.sources.0.stream was 'content [0-9a-f]+', is 'content [0-9a-f]+';"):
        pipeline.run(file, options)
    shutil.rmtree(notes)
    pipeline.run(file, options)


def test_branches_that_come_later(file, tmp_path):
    options = short("--set.train.checkpoint_every=2")
    pipeline.run(file, options)
    options += ["--stages.2.name=more", "--stages.2.parent=cpt"]
    message = "stage 'more-3': at: .*out/cpt was trained past that step and holds no step-00000003 .but step-00000004, "
    with pytest.raises(ConfigError, match=message):
        pipeline.run(file, [*options, "--stages.2.at=[3]"])
    pipeline.run(file, [*options, "--stages.2.at=[4]", "--stages.2.optimizer=reset"])
    assert record(tmp_path / "out" / "more-4")["result"]["step"] == 2
    stopped = record(tmp_path / "out" / "cpt") | {"result": None}
    (tmp_path / "out" / "cpt" / "stage.json").write_text(json.dumps(stopped))
    with pytest.raises(ConfigError, match=message):
        pipeline.run(file, [*options, "--stages.2.at=[3]"])


def test_a_parent_whose_checkpoints_are_gone(file, tmp_path):
    pipeline.run(file, short())
    shutil.rmtree(tmp_path / "out" / "cpt" / "checkpoints")
    with pytest.raises(ConfigError, match="stage 'more': at: .*out/cpt was .* holds no step-00000006 .but none"):
        pipeline.run(file, short("--stages.2.name=more", "--stages.2.parent=cpt"))


def test_what_no_pipeline_began_is_left_alone(file, tmp_path):
    (tmp_path / "out" / "tune-3" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="stage 'tune-3': .*out/tune-3: holds a run that no pipeline began"):
        pipeline.run(file)
    (tmp_path / "out" / "tune-3" / "stage.json").write_text('{"inputs": 3}')
    with pytest.raises(ConfigError, match="tune-3/stage.json: not a readable record of a stage"):
        pipeline.run(file)


@pytest.mark.parametrize("kept", [True, False])
def test_moments_are_kept_and_nothing_else(make_recipe, tmp_path, kept):
    loop.train(make_recipe("--train.steps=3"))
    options = [f"--optimizer.moments={tmp_path / 'run'}"] if kept else []
    recipe = make_recipe(f"--output={tmp_path / 'second'}", *options)
    recipe = replace(recipe, model=replace(recipe.model, new=None, path=str(tmp_path / "run")))
    trainer = loop.Trainer(recipe, World())
    assert trainer.state.step == trainer.state.tokens == trainer.loader.samples == 0
    before = loop.Trainer(make_recipe("--train.steps=3"), World())
    for p, q in zip(trainer.model.parameters(), before.model.parameters(), strict=True):
        assert torch.equal(p, q)
        moments = before.optimizer.state[q]
        assert moments["step"] == 3
        assert trainer.optimizer.state.get(p, {}).keys() == (moments.keys() if kept else set())
        for name in moments if kept else ():
            assert torch.equal(trainer.optimizer.state[p][name], moments[name])
    for each in (trainer, before):
        each.prefetch.close()
        each.log.close()


def test_moments_of_something_else_are_refused(make_recipe, tmp_path):
    recipe = make_recipe("--train.steps=1", "--optimizer.kind=rmsprop", "--optimizer.weight_decay=0")
    checkpoint = loop.train(recipe)
    model = load_model(checkpoint)
    with pytest.raises(
        ValueError, match="step-00000001: was written with optimizer.kind = rmsprop, the recipe's is adamw"
    ):
        load_moments(checkpoint, model, build_optimizer(model, make_recipe().optimizer))
    smaller = make_recipe("--model.new.hidden_dim=40", "--optimizer.kind=rmsprop", "--optimizer.weight_decay=0")
    model = loop.build_model(smaller, World(), None)
    with pytest.raises(ValueError, match="optimizer-00000.safetensors: 'square_avg/.*has shape"):
        load_moments(checkpoint, model, build_optimizer(model, smaller.optimizer))


SHIPPED = sorted((files("tokenmill.trainer") / "recipes" / "pipelines").iterdir(), key=str)


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_shipped_pipelines_are_right(path, tmp_path, monkeypatch):
    file = build(pipeline.PipelineSection, read_toml(str(path)))
    for branch in pipeline.branches_of(file):
        pipeline.read_recipe(file, branch, Path(str(path)).parent)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="stage '.*': .*(expected a checkpoint|no token stream here)"):
        pipeline.run(str(path))
