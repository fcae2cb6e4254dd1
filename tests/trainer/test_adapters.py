"""Runs that train adapters: what they keep, how they resume, and what comes out of them."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from test_distributed import run, start, stop_at
from torch.distributed.tensor import DTensor

from tokenmill.data.batch import Batch
from tokenmill.trainer import loop
from tokenmill.trainer.checkpoint import latest_checkpoint, load_model, resolve_model, save_checkpoint
from tokenmill.trainer.cli import main
from tokenmill.trainer.config import ConfigError, load_recipe
from tokenmill.trainer.distributed import World, join
from tokenmill.trainer.model import Transformer
from tokenmill.trainer.model.weights import load_hf, save_hf

LORA = "rank = 4"
NF4 = f'{LORA}, quantise = "nf4", quantise_router = true'
KINDS = {"lora": LORA, "dora": f'{LORA}, kind = "dora"', "nf4": NF4}
BATCH = Batch.from_documents([[5, 9, 300, 41, 7, 8], [17, 3]])


@pytest.fixture
def recipe(make_recipe, streams, tmp_path) -> Callable[..., Path]:
    """A function from the keys of [adapter] to a recipe's file: it tunes the model in tmp_path/base."""
    made = make_recipe()
    model = Transformer(made.model.new)
    model.initialise(0)
    save_hf(model, tmp_path / "base", tokenizer_from=streams)
    text = (tmp_path / "recipe.toml").read_text()
    text = re.sub(r"\[model.new\].*?\n\n", "", text, flags=re.DOTALL)
    text = re.sub(r"output = .*", f'output = "{tmp_path / "run"}"', text).replace(
        'objective = "pretrain"', f'objective = "sft"\nmodel.path = "{tmp_path / "base"}"\nloss.neftune_alpha = 5'
    )

    def write(keys: str = LORA) -> Path:
        path = tmp_path / "adapters.toml"
        path.write_text(text.replace("train = {", f"adapter = {{ {keys} }}\ntrain = {{"))
        return path

    return write


@pytest.fixture
def trainer() -> Iterator[Callable[..., loop.Trainer]]:
    """A function from a recipe's file and overrides to its trainer."""
    made: list[loop.Trainer] = []

    def make(path: Path, *overrides: str) -> loop.Trainer:
        made.append(loop.Trainer(load_recipe(path, overrides), World()))
        return made[-1]

    yield make
    for trainer in made:
        trainer.log.close()


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_keeps_adapters_only(kind, recipe, trainer, tmp_path):
    out = tmp_path / "run"
    options = ("--optimizer.learning_rate=1e-2", "--train.steps=20", "--data.overlong=split")
    run = trainer(recipe(KINDS[kind]), f"--output={out}", *options)
    before = load_model(tmp_path / "base").logits(BATCH)
    run.train()
    assert losses(out)[-1] < losses(out)[0] - 0.1
    checkpoint = latest_checkpoint(out)
    assert checkpoint is not None
    trained = {n: p.detach() for n, p in run.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 8 * (3 if kind == "dora" else 2)  # projections of 2 layers, factors of each
    with safe_open(checkpoint / "model-00000.safetensors", "pt") as file:
        assert {*file.keys()} == {*trained}
        for name, parameter in trained.items():
            assert torch.equal(file.get_tensor(name), parameter), name
    with safe_open(checkpoint / "optimizer-00000.safetensors", "pt") as file:
        assert {key.partition("/")[2] for key in file.keys()} == {*trained}  # noqa: SIM118
    assert torch.equal(load_model(tmp_path / "base").logits(BATCH), before)

    logits = run.model.eval().logits(BATCH).detach()
    assert not torch.allclose(logits, before, atol=0.05)
    torch.testing.assert_close(load_model(out).logits(BATCH), logits, rtol=0, atol=1e-5)  # merged into its base


@pytest.mark.parametrize("kind", [LORA, f'{NF4}, kind = "dora"'])
def test_merged_in_another_dtype_is_rounded_once(kind, recipe, trainer, tmp_path):
    """What is quantised, and what adapters are added to, are the numbers of the base's files, here in fp32."""
    trainer(recipe(kind), "--train.steps=3", "--optimizer.learning_rate=1e-2").train()
    exact = load_model(tmp_path / "run")
    rounded = load_model(tmp_path / "run", torch.bfloat16)
    for (name, one), other in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(one.bfloat16(), other), name
    with join("cpu", sharded=True) as world:
        options = (f"--model.path={tmp_path / 'run'}", "--train.precision=bf16")
        plain = replace(load_recipe(recipe(kind), options), adapter=None)
        model = loop.build_model(plain, world, resolve_model(tmp_path / "run"))
        for one, other in zip(rounded.parameters(), model.parameters(), strict=True):
            assert isinstance(other, DTensor)
            assert torch.equal(one, other.full_tensor())


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_is_bitwise_the_same(kind, recipe, trainer, tmp_path):
    path = recipe(KINDS[kind])
    whole = trainer(path, f"--output={tmp_path / 'whole'}")
    whole.train()
    first = trainer(path)
    for _ in range(7):
        first.log.step(first.step())
        if first.state.step == 5:
            first.save()
    first.log.close()
    second = trainer(path)
    assert second.state.step == 5
    second.train()
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_killed_and_resumed_is_bitwise_the_same(recipe, tmp_path):
    path = recipe()
    run(path, 1, f"--output={tmp_path / 'whole'}")
    options = (f"--output={tmp_path / 'run'}", "--train.checkpoint_every=1")
    stop_at(start(path, 1, *options), 4, signal.SIGKILL)
    assert "resuming from" in run(path, 1, *options)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for (name, a), b in zip(
        load_model(tmp_path / "run").named_parameters(), load_model(tmp_path / "whole").parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_two_ranks_are_one(recipe, trainer, tmp_path):
    path = recipe(f'{NF4}, kind = "dora"')
    trainer(path, f"--output={tmp_path / 'one'}").train()
    run(path, 2, f"--output={tmp_path / 'two'}")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-6)
    one, two = (load_model(tmp_path / name).logits(BATCH) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
    resumed = trainer(path, f"--output={tmp_path / 'two'}", "--train.steps=13")  # what two wrote, one reads
    assert resumed.state.step == 12


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("kind", ["dora", "nf4"])
def test_recomputation_changes_nothing(kind, recompute, recipe, trainer, tmp_path):
    path = recipe(KINDS[kind])
    for mode in ("none", recompute):
        trainer(path, f"--output={tmp_path / mode}", f"--train.recompute={mode}", "--train.steps=3").train()
    assert losses(tmp_path / recompute) == losses(tmp_path / "none")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_precisions_train_close_to_fp32(kind, precision, recipe, trainer, tmp_path):
    path = recipe(KINDS[kind])
    trainer(path, f"--output={tmp_path / 'fp32'}", "--train.steps=6").train()
    loop.train(
        load_recipe(path, [f"--output={tmp_path / 'other'}", "--train.steps=6", f"--train.precision={precision}"])
    )
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)
    with safe_open(tmp_path / "other/checkpoints/step-00000006/model-00000.safetensors", "pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert dtypes == {torch.float32 if precision == "bf16-mixed" else torch.bfloat16}


def test_export_merges_or_writes_pefts_folder_which_starts_another_run(recipe, trainer, tmp_path, capsys):
    path = recipe()
    trained = trainer(path)
    trained.train()
    out = trained.output
    assert main(["export", str(out), str(tmp_path / "merged")]) == 0
    logits = trained.model.eval().logits(BATCH).detach()
    torch.testing.assert_close(load_hf(tmp_path / "merged")[0].logits(BATCH), logits, rtol=0, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.model").is_file()
    assert main(["export", str(out), str(tmp_path / "peft"), "--adapter"]) == 0
    again = trainer(path, f"--adapter.path={tmp_path / 'peft'}", f"--output={tmp_path / 'again'}")
    assert torch.equal(again.model.eval().logits(BATCH), logits)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "base"), str(tmp_path / "other"), "--adapter"]) == 1
    assert "holds no adapters" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # PEFT's own
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_base_of_exported_adapters_is_one_that_peft_can_open(recipe, trainer, tmp_path, capsys):
    path, ours, hf, peft = recipe(), tmp_path / "ours", tmp_path / "ours_hf", tmp_path / "peft"
    assert main(["import", str(tmp_path / "base"), str(ours)]) == 0
    assert main(["export", str(ours), str(hf)]) == 0
    run = trainer(path, "--train.steps=1", f"--model.path={ours}").train()
    capsys.readouterr()

    def named(*options: str) -> str | None:
        shutil.rmtree(peft, ignore_errors=True)
        assert main(["export", str(run), str(peft), "--adapter", *options]) == 0
        return json.loads((peft / "adapter_config.json").read_text())["base_model_name_or_path"]

    assert named() is None
    assert f"`tokenmill export {ours} HF_FOLDER`, and export the adapters again with --base" in capsys.readouterr().out
    assert named("--base=mistralai/Mistral-7B-v0.1") == "mistralai/Mistral-7B-v0.1"
    assert named(f"--base={hf}") == str(hf)
    tuned = AutoPeftModelForCausalLM.from_pretrained(peft)
    ids = torch.tensor([[5, 9, 300, 41, 7, 8]])
    torch.testing.assert_close(
        load_model(run).logits(Batch.from_documents(ids.tolist())), tuned(ids).logits[0], rtol=0, atol=1e-5
    )

    shutil.rmtree(peft)
    config = json.loads((hf / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"vocab_size": 321}))
    capsys.readouterr()
    for options, message in (
        (
            ["--adapter", f"--base={tmp_path}/other"],
            "other: its model has vocab_size = 321, that beneath the adapters 320",
        ),
        (["--adapter", f"--base={ours}"], "ours/config.json is missing; expected a Hugging Face model folder"),
        (["--adapter", f"--base={tmp_path}/gone"], "gone: no such folder; expected one of Hugging Face's, or a name"),
        ([f"--base={hf}"], "--base names the model beneath adapters: give it together with --adapter"),
    ):
        assert main(["export", str(run), str(peft), *options]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not peft.exists()


def test_a_run_starts_from_anothers_merged_adapters(recipe, trainer, tmp_path):
    path = recipe()
    first = trainer(path, f"--output={tmp_path / 'first'}")
    first.train()
    logits = first.model.eval().logits(BATCH).detach()
    options = (f"--model.path={tmp_path / 'first'}", f"--output={tmp_path / 'second'}", "--train.steps=2")
    second = trainer(path, *options)
    torch.testing.assert_close(second.model.eval().logits(BATCH), logits, rtol=0, atol=1e-5)
    second.train()
    after = second.model.eval().logits(BATCH).detach()
    torch.testing.assert_close(load_model(tmp_path / "second").logits(BATCH), after, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="cannot be merged into weights in 4 bits"):
        trainer(recipe(NF4), *options, f"--output={tmp_path / 'third'}")


def test_a_checkpoint_of_ours_as_the_base(recipe, trainer, tmp_path):
    """Quantised tensor by tensor as a Hugging Face folder is, to the same bits."""
    path = recipe(NF4)
    save_checkpoint(tmp_path / "ours", load_hf(tmp_path / "base")[0], tokenizer_from=tmp_path / "base")
    a = trainer(path, f"--output={tmp_path / 'a'}").model
    b = trainer(path, f"--output={tmp_path / 'b'}", f"--model.path={tmp_path / 'ours'}").model
    for (name, one), (_, other) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_what_does_not_fit_is_named(recipe, trainer, tmp_path, make_recipe):
    path = recipe()
    trainer(path, "--train.steps=1").train()
    for override, match in (
        ("--adapter.rank=8", "adapter.rank = 4, the recipe's is 8"),
        ("--adapter.alpha=1.5", "adapter.alpha = 32.0"),
        ('--adapter.targets=["attention"]', "adapter.targets"),
    ):
        with pytest.raises(ValueError, match=match):
            trainer(path, override)
    with pytest.raises(ValueError, match="names no projection"):
        trainer(path, '--adapter.targets=["lm_head"]')
    with pytest.raises(ValueError, match="holds  ?adapters, the recipe wants none"):
        loop.Trainer(replace(load_recipe(path), adapter=None), World())
    for text in ("rank = 0", "alpha = 0", 'kind = "ia3"', "targets = []"):
        with pytest.raises(ConfigError, match=f"adapter.{text.split()[0]}"):
            load_recipe(recipe(text))
    with pytest.raises(ConfigError, match="adapter: expected model.path"):
        make_recipe("--adapter={rank = 4}")

    model, _ = load_hf(tmp_path / "base")
    model.initialise(1)
    (tmp_path / "base").rename(tmp_path / "before")
    with pytest.raises(ValueError, match="base"):
        load_model(tmp_path / "run")
    save_hf(model, tmp_path / "base")
    for attempt in (lambda: load_model(tmp_path / "run"), lambda: trainer(recipe())):
        with pytest.raises(ValueError, match="its adapters belong to"):
            attempt()
