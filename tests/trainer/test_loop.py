"""The loop: what a step is, that it learns, and that a run goes on as if it had never stopped."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import deterministic

from tokenmill.data.files import locked
from tokenmill.data.prepare import prepare
from tokenmill.data.stream import TokenStream
from tokenmill.trainer import loop, shards
from tokenmill.trainer.checkpoint import latest_checkpoint, load_model
from tokenmill.trainer.distributed import World
from tokenmill.trainer.model import Transformer


def Trainer(recipe):
    return loop.Trainer(recipe, World())


def weights(model: Transformer):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def lines(recipe):
    return [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_reports(make_recipe, capsys):
    recipe = make_recipe("--train.steps=40", "--train.validate_every=20")
    trainer = Trainer(recipe)
    before = trainer.validate()["notes"]
    trainer.train()
    records = [r for r in lines(recipe) if "loss" in r]
    validation = [r["validation"]["notes"] for r in lines(recipe) if "validation" in r]
    assert [r["step"] for r in records] == list(range(1, 41))
    assert before == pytest.approx(math.log(320), rel=0.05)
    assert validation[-1] < validation[1] < before
    assert records[-1]["tokens"] == trainer.state.tokens
    for record in records:
        assert record["skipped"] == 0
        assert record["mfu"] is None
        for load in record["expert_load"]:
            assert sum(load) == pytest.approx(1)
    out = capsys.readouterr().out
    assert "step 40/40" in out
    assert "attention sdpa" in out


def test_accumulation_does_not_change_the_run(make_recipe, tmp_path):
    runs = {}
    for size in (1, 4):
        recipe = make_recipe(f"--data.packs_per_micro_batch={size}", f"--output={tmp_path / str(size)}")
        trainer = Trainer(replace(recipe, train=replace(recipe.train, steps=3)))
        trainer.train()
        runs[size] = [r["loss"] for r in lines(recipe) if "loss" in r]
    assert runs[1] == pytest.approx(runs[4], rel=2e-6)


def test_stopped_and_resumed_is_bitwise_the_same(make_recipe, tmp_path):
    overrides = ["--objective=sft", "--loss.neftune_alpha=5", "--loss.balance_bias=0.001"]
    whole = Trainer(make_recipe(f"--output={tmp_path / 'whole'}", *overrides))
    whole.train()
    first = Trainer(make_recipe(*overrides))
    for _ in range(7):  # the checkpoint of step 5 is the last; steps 6 and 7 are lost, as by a kill
        first.log.step(first.step())
        if first.state.step == 5:
            first.save()
    first.log.close()
    second = Trainer(make_recipe(*overrides))
    assert second.state.step == 5
    second.train()
    for (name, a), b in zip(weights(whole.model).items(), weights(second.model).values(), strict=True):
        assert torch.equal(a, b), name
    assert whole.state.balance_bias is not None
    assert second.state.balance_bias is not None
    assert torch.equal(whole.state.balance_bias, second.state.balance_bias)
    a, b = ([{**r, **dict.fromkeys(TIMES)} for r in lines(t.recipe)] for t in (whole, second))
    assert a == b


TIMES = ("tokens_per_second", "tflops", "data_wait", "memory")


@pytest.mark.slow
def test_killed_at_ten_random_moments_is_bitwise_the_same(make_recipe, tmp_path):
    long = ("--train.steps=300", "--train.checkpoint_every=1")
    whole = Trainer(make_recipe(f"--output={tmp_path / 'whole'}", "--train.steps=300"))
    whole.train()
    make_recipe()
    draw = random.Random(1)
    command = [sys.executable, "-m", "tokenmill.trainer", str(tmp_path / "recipe.toml"), f"--output={tmp_path / 'run'}"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    for kills in range(11):
        process = subprocess.Popen([*command, *long], env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if kills < 10:
            next(line for line in process.stdout if line.startswith("step"))
            time.sleep(draw.uniform(0, 0.5))  # in a step, or in the writing of a checkpoint
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == (0 if kills == 10 else -signal.SIGKILL)
    again = load_model(tmp_path / "run")
    for (name, a), b in zip(weights(whole.model).items(), weights(again).values(), strict=True):
        assert torch.equal(a, b), name


def test_a_signal_that_comes_while_the_device_works_is_not_lost(make_recipe, monkeypatch):
    """After the flags were summed, as nearly any does on a GPU: it counts in the next step."""
    summed = loop.Trainer._sum_over_ranks

    def then_a_signal(self, *arguments):
        sums = summed(self, *arguments)
        if self.state.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return sums

    monkeypatch.setattr(loop.Trainer, "_sum_over_ranks", then_a_signal)
    recipe = make_recipe("--train.checkpoint_every=100")
    with pytest.raises(SystemExit) as left:
        loop.train(recipe)
    assert left.value.code == 75
    assert [f.name for f in (Path(recipe.output) / "checkpoints").iterdir()] == ["step-00000004"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_weights_that_change_and_sources_that_end(make_recipe, capsys):
    Trainer(make_recipe("--data.sources.0.weight=[[0, 1], [2, 0]]", "--train.steps=4")).log.close()
    assert "weight 1, 0 from step 2;" in capsys.readouterr().out
    ends = make_recipe("--data.sources.0.epochs=1", "--data.sources.1.epochs=1", "--train.steps=999")
    with pytest.raises(ValueError, match="train: 999 steps, but with their epochs the sources last for"):
        Trainer(ends)


def test_a_checkpoint_is_read_no_more_than_once(make_recipe, tmp_path, monkeypatch):
    read = []
    crc32 = shards.crc32
    monkeypatch.setattr(shards, "crc32", lambda file: read.append(file.name) or crc32(file))
    files = ["model-00000.safetensors", "optimizer-00000.safetensors", "tokenizer.model"]
    loop.train(make_recipe("--train.steps=2"))
    assert sorted(read) == files  # when it was written
    for overrides in (["--train.steps=2"], [f"--output={tmp_path / 'tuned'}", "--train.steps=2"]):
        read.clear()
        recipe = make_recipe(*overrides)
        if overrides[1:]:  # begins from the first run's
            recipe = replace(recipe, model=replace(recipe.model, new=None, path=str(tmp_path / "run")))
        Trainer(recipe).log.close()
        assert sorted(read) == files


def test_another_precision_under_a_checkpoint_is_refused(make_recipe, tmp_path):
    for first, second in (("bf16", "fp32"), ("fp32", "bf16")):
        options = ["--train.steps=1", f"--output={tmp_path / first}"]
        Trainer(make_recipe(*options, f"--train.precision={first}")).train()
        with pytest.raises(ValueError, match=rf"step-00000001: was written with train.precision = {first}.*model.path"):
            Trainer(make_recipe(*options, f"--train.precision={second}"))


def test_what_a_resume_passed_over_goes_with_its_first_checkpoint(make_recipe):
    every = ["--train.steps=9", "--train.validate_every=100"]
    Trainer(make_recipe(*every[1:], "--train.steps=6", "--train.checkpoint_every=2")).train()
    folder = Path(make_recipe().output) / "checkpoints"
    (folder / "step-00000006" / "model-00000.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="step-00000006.*passing over"):
        trainer = Trainer(make_recipe(*every, "--train.checkpoint_every=1", "--train.keep_checkpoints=1"))
    names = []
    save = trainer.save
    trainer.save = lambda: (save(), names.append([f.name for f in folder.iterdir()]))[0]
    trainer.train()
    assert names == [[f"step-0000000{step}"] for step in (5, 6, 7, 8, 9)]


def test_a_deterministic_run_asks_for_it_while_it_lasts(make_recipe, monkeypatch):
    recipe = make_recipe("--train.deterministic=true", "--train.steps=1")
    seen = []
    step = loop.Trainer.step
    monkeypatch.setattr(
        loop.Trainer, "step", lambda self: (seen.append(torch.are_deterministic_algorithms_enabled()), step(self))[1]
    )
    loop.train(recipe)
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    memory: Any = deterministic
    assert memory.fill_uninitialized_memory


def test_a_finished_run_is_left_as_it_is(make_recipe):
    recipe = make_recipe()
    Trainer(recipe).train()
    before = lines(recipe)
    assert Trainer(recipe).train() == latest_checkpoint(Path(recipe.output))
    assert lines(recipe) == before


def test_a_step_that_is_not_finite_is_skipped_and_counted(make_recipe):
    trainer = Trainer(make_recipe("--loss.balance_bias=0.01"))
    trainer.step()
    before = weights(trainer.model)
    bias = trainer.state.balance_bias
    assert bias is not None
    with torch.no_grad():
        trainer.model.norm.weight[0] = float("inf")
    record = trainer.step()
    assert record.skipped == trainer.state.skipped == 1
    assert record.expert_load is None
    assert torch.equal(trainer.state.balance_bias, bias)  # type: ignore[arg-type]
    with torch.no_grad():
        trainer.model.norm.weight[0] = before["norm.weight"][0]
    for name, a in weights(trainer.model).items():
        assert torch.equal(a, before[name]), name
    assert trainer.step().skipped == 1
    trainer.log.close()


def test_a_model_is_tuned_from_a_run(make_recipe, tmp_path):
    first = Trainer(make_recipe())
    first.train()
    recipe = make_recipe(f"--output={tmp_path / 'second'}")
    recipe = replace(recipe, objective="sft", model=replace(recipe.model, new=None, path=str(tmp_path / "run")))
    second = Trainer(recipe)
    for (name, a), b in zip(weights(first.model).items(), weights(second.model).values(), strict=True):
        assert torch.equal(a, b), name
    assert second.state.step == 0
    second.train()


def test_no_answer_is_tuned_without_its_instruction(make_recipe, streams, capsys):
    """By default nothing is cut in fine-tuning, and the banner says how much is left out."""
    options = ["--objective=sft", f'--data.sources=[{{stream="{streams}/talks"}}]', "--data.sequence_length=40"]
    stream = TokenStream.open(streams / "talks")
    overlong = int((stream.lengths > 40).sum())
    assert 0 < overlong < len(stream)
    for fate, said in (("reject", "left out"), ("split", "cut into parts")):
        trainer = Trainer(make_recipe(*options, *([] if fate == "reject" else [f"--data.overlong={fate}"])))
        trainer.log.close()
        assert f"{overlong} documents of more than 40 tokens are {said}" in capsys.readouterr().out
        begun = []
        for batch in next(trainer.loader).micro_batches:
            begun += batch.tokens[batch.layout.cu_seqlens[:-1].long()].tolist()
        assert (set(begun) == {stream.bos_id}) == (fate == "reject")


def test_streams_must_fit_the_model(make_recipe, streams, tmp_path):
    recipe = make_recipe()
    small = replace(recipe, model=replace(recipe.model, new=replace(recipe.model.new, vocab_size=300)))
    with pytest.raises(ValueError, match="notes: its tokenizer has 320 pieces, the model's vocabulary only 300"):
        Trainer(small)
    from tokenmill.data.tokenizer import train_tokenizer

    other = train_tokenizer(["a completely different text about other things"] * 50, 280, tmp_path / "other.model")
    prepare([streams / "notes.jsonl"], other, tmp_path / "foreign", progress=False)
    with pytest.raises(ValueError, match="foreign: was prepared with another tokenizer"):
        Trainer(make_recipe(f'--data.validation=["{tmp_path / "foreign"}"]'))
    Trainer(recipe).train()
    tuned = replace(
        make_recipe(f"--output={tmp_path / 'x'}", f'--data.sources=[{{stream="{tmp_path / "foreign"}"}}]'),
        model=replace(recipe.model, new=None, path=recipe.output),
    )
    with pytest.raises(ValueError, match="foreign: was prepared with another tokenizer"):
        Trainer(replace(tuned, data=replace(tuned.data, validation=())))


@pytest.mark.parametrize("step", [4, 12])
def test_what_a_stop_left_unmeasured_is_measured_by_the_resume(make_recipe, streams, tmp_path, monkeypatch, step):
    """Stopped after the checkpoint, before its validation; the last one too."""
    options = ("--train.checkpoint_every=2", "--train.validate_every=4", f'--data.validation=["{streams / "notes"}"]')
    whole = make_recipe(f"--output={tmp_path / 'whole'}", *options)
    loop.train(whole)
    recipe = make_recipe(*options)
    measure = loop.Trainer.measure

    def stop(self):
        if self.state.step == step:
            raise KeyboardInterrupt
        measure(self)

    monkeypatch.setattr(loop.Trainer, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        loop.train(recipe)
    monkeypatch.setattr(loop.Trainer, "measure", measure)
    assert not any("validation" in line for line in lines(recipe) if line["step"] == step)
    loop.train(recipe)
    measured = [(line["step"], line["validation"]) for line in lines(recipe) if "validation" in line]
    assert measured == [(line["step"], line["validation"]) for line in lines(whole) if "validation" in line]
    assert [at for at, _ in measured] == [4, 8, 12]


def test_two_runs_do_not_write_into_one_folder(make_recipe):
    """Nothing of the first is touched; once it has ended, however that was, the next goes on."""
    recipe = make_recipe()
    output = Path(recipe.output)
    with locked(output):
        with pytest.raises(ValueError, match="run: another run is writing into it"):
            loop.train(recipe)
        assert [path.name for path in output.iterdir()] == [".lock"]
    assert loop.train(recipe) == latest_checkpoint(output)


def test_a_recipe_that_is_wrong_leaves_no_folder(make_recipe, tmp_path):
    recipe = make_recipe(f"--output={tmp_path / 'none'}")
    small = replace(recipe, model=replace(recipe.model, new=replace(recipe.model.new, vocab_size=300)))
    with pytest.raises(ValueError, match="vocabulary"):
        loop.train(small)
    assert not (tmp_path / "none").exists()


def test_other_data_under_a_checkpoint_is_refused(make_recipe):
    Trainer(make_recipe()).train()
    with pytest.raises(ValueError, match=r"step-.*fingerprint.*; data\.sequence_length was 64 and is 32$"):
        Trainer(make_recipe("--data.sequence_length=32", "--train.steps=20"))


def test_the_stream_that_is_another_under_a_checkpoint_is_named(make_recipe, streams, tmp_path):
    """Prepared anew under the same path."""
    shutil.copytree(streams / "notes", tmp_path / "notes")
    source = f'--data.sources=[{{stream="{tmp_path / "notes"}"}}, {{stream="{streams / "talks"}"}}]'
    Trainer(make_recipe(source)).train()
    before = TokenStream.open(tmp_path / "notes")
    shutil.rmtree(tmp_path / "notes")
    rows = "".join((streams / "notes.jsonl").read_text().splitlines(keepends=True)[:-1])
    (tmp_path / "notes.jsonl").write_text(rows)
    after = prepare([tmp_path / "notes.jsonl"], streams / "tokenizer.model", tmp_path / "notes", progress=False)
    unlike = rf"; {tmp_path / 'notes'} was {before.fingerprint[:12]} and is {after.fingerprint[:12]}$"
    with pytest.raises(ValueError, match=unlike):
        Trainer(make_recipe(source, "--train.steps=20"))


def test_the_resolved_recipe_is_saved(make_recipe):
    recipe = make_recipe("--optimizer.eps=1e-6")
    Trainer(recipe).train()
    saved = json.loads((Path(recipe.output) / "recipe.json").read_text())
    assert saved == json.loads(json.dumps(asdict(recipe)))
    newest = latest_checkpoint(Path(recipe.output))
    assert newest is not None
    assert json.loads((newest / "checkpoint.json").read_text())["recipe"] == saved


def test_another_shape_under_a_checkpoint_is_refused(make_recipe):
    Trainer(make_recipe()).train()
    with pytest.raises(ValueError, match="its model has sliding_window = 9, the recipe's 5"):
        Trainer(make_recipe("--model.new.sliding_window=5", "--train.steps=20"))


def test_a_flipped_bit_is_not_trained_on(make_recipe, streams, tmp_path):
    shutil.copytree(streams / "notes", tmp_path / "notes")
    file = tmp_path / "notes" / "00000.tokens"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    trainer = Trainer(make_recipe(f'--data.sources=[{{stream="{tmp_path / "notes"}"}}]'))
    with pytest.raises(ValueError, match=r"00000.tokens: block 0 .* does not match its checksum"):
        trainer.train()


def test_validation_is_by_source(make_recipe, streams, tmp_path):

    files = [streams / "notes.jsonl", streams / "talks.jsonl"]
    prepare(files, streams / "tokenizer.model", tmp_path / "both", progress=False)
    singles = Trainer(make_recipe(f'--data.validation=["{streams}/notes", "{streams}/talks"]', *ALL))
    both = Trainer(make_recipe(f'--data.validation=["{tmp_path / "both"}"]', *ALL))
    expected = {f"both/{name}": loss for name, loss in singles.validate().items()}
    assert both.validate() == pytest.approx(expected, rel=1e-6)
    for trainer in (singles, both):
        trainer.log.close()


ALL = ["--data.validation_tokens=1000000"]
