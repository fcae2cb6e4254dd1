"""Preference tuning: the losses against their formulas, and runs."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenmill.data.loader import Loader, Source, sequential_batches
from tokenmill.data.prepare import prepare
from tokenmill.data.stream import TokenStream
from tokenmill.data.unfold import unfold
from tokenmill.trainer import loop, reference
from tokenmill.trainer.checkpoint import load_model
from tokenmill.trainer.config import ConfigError
from tokenmill.trainer.distributed import World
from tokenmill.trainer.metrics import exact_flops
from tokenmill.trainer.model import ModelConfig
from tokenmill.trainer.objectives.dpo import Dpo, dpo_loss, simpo_loss
from tokenmill.trainer.preference import unfold_step
from tokenmill.trainer.reference import fingerprint


def minus_log_sigmoid(x):
    return np.logaddexp(0, -x)


def log_probabilities(seed: int = 0, pairs: int = 17) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-50 * torch.rand(pairs, generator=generator, dtype=torch.float64) for _ in range(4)]


FORMULAS = {  # by h and beta
    "sigmoid": ({}, lambda h, beta: minus_log_sigmoid(beta * h)),
    "smoothed": (
        {"label_smoothing": 0.2},
        lambda h, beta: 0.8 * minus_log_sigmoid(beta * h) + 0.2 * minus_log_sigmoid(-beta * h),
    ),
    "ipo": ({"kind": "ipo"}, lambda h, beta: (h - 1 / (2 * beta)) ** 2),
}


@pytest.mark.parametrize(("options", "formula"), FORMULAS.values(), ids=FORMULAS)
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_losses_are_their_formulas(options, formula, beta):
    logps = [t.requires_grad_() for t in log_probabilities()]
    losses = dpo_loss(*logps, beta=beta, **options)
    pc, pr, rc, rr = (t.detach().numpy() for t in logps)
    h = np.log(np.exp(pc) / np.exp(rc)) - np.log(np.exp(pr) / np.exp(rr))
    np.testing.assert_allclose(losses.detach().numpy(), formula(h, beta), rtol=1e-9)
    gradients = torch.autograd.grad(losses.sum(), logps)
    slope = (formula(h + 1e-5, beta) - formula(h - 1e-5, beta)) / 2e-5
    for gradient, sign in zip(gradients, (1, -1, -1, 1), strict=True):
        np.testing.assert_allclose(gradient.numpy(), sign * slope, rtol=1e-5, atol=1e-7)
    single = dpo_loss(*(t.detach().float() for t in logps), beta=beta, **options)
    torch.testing.assert_close(single.double(), losses.detach(), rtol=1e-5, atol=1e-5)


def test_simpo_is_its_formula():
    chosen, rejected, *_ = (t / 40 for t in log_probabilities())
    expected = minus_log_sigmoid(2.0 * (chosen - rejected).numpy() - 0.7)
    np.testing.assert_allclose(simpo_loss(chosen, rejected, beta=2.0, gamma=0.7).numpy(), expected, rtol=1e-9)


def test_far_apart_is_finite():
    far = [torch.tensor([x]) for x in (-1e5, 0.0, 0.0, -1e5)]
    assert dpo_loss(*far, beta=0.1).isfinite().all()


@pytest.mark.parametrize(
    "options",
    [{"beta": 0.0}, {"beta": 0.1, "label_smoothing": 0.5}, {"beta": 0.1, "kind": "ipo", "label_smoothing": 0.1}],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=r"beta|label_smoothing"):
        dpo_loss(*log_probabilities(), **options)


RECIPE = (
    "--objective=dpo", '--data.sources=[{{stream="{0}/likes"}}]', '--data.validation=["{0}/likes_held_out"]',
    "--data.sequence_length=128", "--data.validation_tokens=4000", "--optimizer.learning_rate=1e-3",
)  # fmt: skip


@pytest.fixture
def likes(streams, tmp_path):
    """Streams of preferences: answers that say "dose" are better than those that say "scan"."""
    draw = random.Random(1)
    words = "fever cough pain rash given for days after morning iron".split()  # noqa: SIM905

    def row() -> dict[str, str]:
        prompt, *answers = (" ".join(draw.choices(words, k=draw.randrange(1, 9))) for _ in range(3))
        return {"prompt": prompt, "chosen": f"dose {answers[0]}", "rejected": f"scan {answers[1]}"}

    for name, count in (("likes", 60), ("likes_held_out", 20)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row()) for _ in range(count)))
        prepare([tmp_path / f"{name}.jsonl"], streams / "tokenizer.model", tmp_path / name, progress=False)
    return tmp_path


@pytest.fixture
def dpo_recipe(make_recipe, likes):
    def make(*overrides: str):
        return make_recipe(*(text.format(likes) for text in RECIPE), *overrides)

    return make


def train(recipe):
    trainer = loop.Trainer(recipe, World())
    trainer.train()
    records = [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]
    return trainer, [r for r in records if "loss" in r], [r["validation"] for r in records if "validation" in r]


def table_of(trainer: loop.Trainer) -> Tensor:
    assert isinstance(trainer.objective, Dpo)
    assert trainer.objective.reference is not None
    return trainer.objective.reference


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [["--dpo.loss=sigmoid"], ["--dpo.loss=ipo"], ["--dpo.loss=simpo", "--dpo.beta=2"]])
def test_it_learns(dpo_recipe, capsys, options):
    recipe = dpo_recipe("--train.steps=40", *options)
    trainer, records, validation = train(recipe)
    first, last = records[0]["preference"], records[-1]["preference"]
    if recipe.dpo.loss == "sigmoid":
        assert records[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)  # the policy is the reference
        assert first["chosen"] == pytest.approx(0, abs=1e-4)
        assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    assert last["margin"] == pytest.approx(last["chosen"] - last["rejected"])
    assert last["margin"] > first["margin"] + 0.3
    assert last["accuracy"] > 0.9
    assert validation[-1]["likes_held_out/accuracy"] > 0.9
    assert validation[-1]["likes_held_out"] < validation[0]["likes_held_out"]
    assert "accuracy 100.0%" in capsys.readouterr().out
    assert records[-1]["tokens"] == trainer.state.tokens


def test_cuts_change_nothing(dpo_recipe, tmp_path):
    runs = []
    for size in (1, 2, 4):
        recipe = dpo_recipe(
            f"--output={tmp_path / str(size)}", f"--data.packs_per_micro_batch={size}", "--train.steps=4"
        )
        runs.append([(r["loss"], r["tokens"], *r["preference"].values()) for r in train(recipe)[1]])
    for run in runs[1:]:
        np.testing.assert_allclose(run, runs[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose([r[0] for r in run], [r[0] for r in runs[0]], rtol=2e-6)


def test_a_step_counts_pairs_and_rows(likes):
    stream = TokenStream.open(likes / "likes")
    options: dict[str, Any] = dict(sequence_length=128, packs_per_step=100, packs_per_micro_batch=3, seed=0)
    loader = Loader([Source(stream)], **options)
    options["packs_per_step"] = loader.packs_per_epoch
    data = unfold_step(next(Loader([Source(stream)], **options)))
    assert data.total_weight == len(stream)
    assert data.total_tokens == stream.tokens - 2 * len(stream)


@pytest.mark.parametrize("window", [None, 9, 1])
def test_the_exact_count_sees_the_prompt(likes, window):
    stream = TokenStream.open(likes / "likes")
    batches = [unfold(b) for b in sequential_batches(stream, sequence_length=128, tokens_per_batch=512)]
    config = ModelConfig(32, 2, 4, 2, 8, 48, 320, sliding_window=window)
    seen = torch.cat([batch.layout.positions for batch in batches]).long() + 1  # keys of each row
    assert exact_flops(config, batches) == config.flops(len(seen), int(seen.clamp(max=window or 128).sum()))


def test_the_reference_is_computed_once(dpo_recipe, likes, monkeypatch):
    calls = []
    answer = reference.answer_logprobs
    monkeypatch.setattr(reference, "answer_logprobs", lambda *a: calls.append(1) or answer(*a))
    first, *_ = train(dpo_recipe("--train.steps=3", "--train.checkpoint_every=2"))
    assert calls
    assert len(list(likes.glob("likes*/reference-*.npz"))) == 2
    assert not list(likes.glob("likes*/.*"))
    calls.clear()
    resumed = loop.Trainer(dpo_recipe("--train.steps=6"), World())  # has other weights by now, and the same reference
    assert resumed.state.step == 3
    assert not calls
    resumed.log.close()
    assert torch.equal(table_of(resumed), table_of(first))
    loop.Trainer(dpo_recipe("--seed=1", f"--output={likes / 'other'}"), World()).log.close()  # other weights
    assert calls


def test_a_damaged_or_unfinished_cache_is_made_again(dpo_recipe, likes, monkeypatch):
    answer = reference.answer_logprobs

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reference, "answer_logprobs", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.Trainer(dpo_recipe(), World())
    assert not [*likes.glob("likes*/*reference*"), *likes.glob("likes*/.*")]
    calls = []
    monkeypatch.setattr(reference, "answer_logprobs", lambda *a: calls.append(1) or answer(*a))

    def made_again() -> Tensor:
        trainer = loop.Trainer(dpo_recipe(), World())
        trainer.log.close()
        return table_of(trainer)

    table = made_again()
    count = len(calls)
    for damage in (lambda raw: raw[:-40], lambda raw: raw[:300] + bytes([raw[300] ^ 1]) + raw[301:], lambda raw: b""):
        for file in likes.glob("likes*/reference-*.npz"):
            file.write_bytes(damage(file.read_bytes()))
        assert torch.equal(made_again(), table)
        assert len(calls) == 2 * count
        del calls[count:]


def test_a_fingerprint_names_every_weight(dpo_recipe):
    recipe = dpo_recipe()
    model = loop.build_model(recipe, World(), None)
    before = fingerprint(model, World(), "fp32")
    assert fingerprint(loop.build_model(recipe, World(), None), World(), "fp32") == before
    assert fingerprint(model, World(), "bf16-mixed") != before
    for parameter in model.parameters():
        with torch.no_grad():
            flat = parameter.view(-1)
            kept = flat.clone()
            flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
            assert fingerprint(model, World(), "fp32") != before
            flat.copy_(kept.flip(0))
            assert parameter.dim() == 1 or fingerprint(model, World(), "fp32") != before
            flat.copy_(kept)
    assert fingerprint(model, World(), "fp32") == before


def test_resumed_is_bitwise_the_same(dpo_recipe, tmp_path):
    whole, *_ = train(dpo_recipe(f"--output={tmp_path / 'whole'}", "--train.steps=6"))
    options = ("--train.steps=6", "--train.checkpoint_every=2")
    first = loop.Trainer(dpo_recipe(*options), World())
    for _ in range(3):
        first.log.step(first.step())
        if first.state.step == 2:
            first.save()
    first.log.close()
    second, *_ = train(dpo_recipe(*options))
    for (name, a), b in zip(weights(whole.model).items(), weights(second.model).values(), strict=True):
        assert torch.equal(a, b), name


def test_a_resume_with_another_reference_is_refused(dpo_recipe, make_recipe, likes, tmp_path):
    """A path that names a run means another checkpoint once that is trained further."""
    parent = make_recipe(f"--output={tmp_path / 'parent'}", "--train.steps=1")
    began = loop.train(parent)

    def tuned(path: Path, steps: int):
        recipe = dpo_recipe(f"--train.steps={steps}")
        return replace(recipe, model=replace(recipe.model, new=None, path=str(path)))

    checkpoint = loop.train(tuned(tmp_path / "parent", 2))
    state = json.loads((checkpoint / "checkpoint.json").read_text())["state"]
    tables = sorted(likes.glob("likes*/reference-*.npz"))
    loop.train(replace(parent, train=replace(parent.train, steps=2)))
    with pytest.raises(ValueError, match=f"{checkpoint}: its reference was {state['reference'][:12]}, the recipe's is"):
        loop.Trainer(tuned(tmp_path / "parent", 3), World())
    assert sorted(likes.glob("likes*/reference-*.npz")) == tables  # nor was it computed
    assert loop.train(tuned(began, 3)).name == "step-00000003"


def test_rmsprop(dpo_recipe, tmp_path):
    options = ("--optimizer.kind=rmsprop", "--optimizer.weight_decay=0.0", "--optimizer.betas=[0.0, 0.99]")
    for precision in ("fp32", "bf16-mixed"):
        recipe = dpo_recipe(*options, f"--train.precision={precision}", f"--output={tmp_path / precision}")
        loop.train(replace(recipe, train=replace(recipe.train, steps=8)))
        loop.train(replace(recipe, train=replace(recipe.train, steps=9)))  # its state comes back from the checkpoint
        assert all(torch.isfinite(p).all() for p in load_model(tmp_path / precision).parameters())
    for wrong, message in (
        ("--train.precision=bf16", "train.precision"),
        ("--optimizer.weight_decay=0.1", "weight_decay"),
    ):
        with pytest.raises(ConfigError, match=message):
            dpo_recipe(*options, wrong)


def test_streams_and_objectives_must_fit(dpo_recipe, make_recipe, likes):
    with pytest.raises(ValueError, match=r"likes: holds preference pairs, which only objective = 'dpo'"):
        loop.Trainer(dpo_recipe("--objective=sft"), World())
    with pytest.raises(ValueError, match=r"notes: holds no preference pairs"):
        loop.Trainer(make_recipe("--objective=dpo"), World())
    with pytest.raises(
        ValueError, match=r"likes: \d+ of 60 pairs are longer than data.sequence_length = 20.* set it to"
    ):
        loop.Trainer(dpo_recipe("--data.sequence_length=20"), World())
    with pytest.raises(ValueError, match="a pair is never cut; .* or leave them out by data.overlong = 'reject'"):
        loop.Trainer(dpo_recipe("--data.sequence_length=20", "--data.overlong=split"), World())
    with pytest.raises(ValueError, match="fits 8 tokens: nothing to learn from"):
        loop.Trainer(dpo_recipe("--data.sequence_length=8", "--data.overlong=reject"), World())


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_overlong_pairs_are_left_out_where_that_is_wanted(dpo_recipe, streams, likes, tmp_path, capsys, loss):
    """The same run, to the bit, as on streams without them."""
    longest, kept = 40, []
    for name in ("likes", "likes_held_out"):
        rows = (likes / f"{name}.jsonl").read_text().splitlines()
        lengths = TokenStream.open(likes / name).lengths
        fitting = [row for row, length in zip(rows, lengths, strict=True) if length <= longest]
        assert (lengths > longest)[: len(rows) // 2].any()  # so that others have another number than in the stream
        assert 0 < len(fitting) < len(rows)
        kept.append(f"{len(rows) - len(fitting)} ")
        folder = tmp_path / "fitting" / name
        folder.parent.mkdir(exist_ok=True)
        (tmp_path / "fitting.jsonl").write_text("\n".join(fitting))
        prepare([tmp_path / "fitting.jsonl"], streams / "tokenizer.model", folder, progress=False)
    options = (f"--data.sequence_length={longest}", "--train.steps=5", f"--dpo.loss={loss}")
    _, *whole = train(dpo_recipe(*options, "--data.overlong=reject"))
    banner = capsys.readouterr().out
    assert f"{kept[0]}documents of more than 40 tokens are left out" in banner
    assert f"likes_held_out: {kept[1]}of 20 pairs have more than 40 tokens: not validated on" in banner
    fitting = f'--data.sources=[{{stream="{tmp_path}/fitting/likes"}}]'
    held_out = f'--data.validation=["{tmp_path}/fitting/likes_held_out"]'
    _, *without = train(dpo_recipe(*options, fitting, held_out, f"--output={tmp_path / 'other'}"))
    for key in ("loss", "tokens", "preference"):
        assert [r[key] for r in whole[0]] == [r[key] for r in without[0]]
    assert whole[1] == without[1]


@pytest.mark.parametrize(
    "wrong", ["--dpo.beta=0", "--dpo.gamma=-1", "--dpo.label_smoothing=0.5", "--loss.neftune_alpha=5"]
)
def test_recipes_that_are_refused(dpo_recipe, wrong):
    with pytest.raises(ConfigError, match=wrong.removeprefix("--").partition("=")[0]):
        dpo_recipe(wrong)
    with pytest.raises(ConfigError, match="label_smoothing"):
        dpo_recipe("--dpo.loss=ipo", "--dpo.label_smoothing=0.1")


def test_two_ranks_are_one(dpo_recipe, tmp_path):
    """Three packs a step over two ranks: one of them runs a ghost."""
    options = [text.format(tmp_path) for text in RECIPE]
    options += ["--train.steps=5", "--data.packs_per_step=3", "--data.packs_per_micro_batch=1"]
    dpo_recipe()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    runs, kept = [], []
    for name, command in (("one", [sys.executable]), ("two", launch)):
        arguments = ["-m", "tokenmill.trainer", str(tmp_path / "recipe.toml"), *options, f"--output={tmp_path / name}"]
        subprocess.run([*command, *arguments], env=environment, check=True, capture_output=True, timeout=120)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        runs.append([(r["loss"], r["tokens"]) if "loss" in r else [*r["validation"].values()] for r in lines])
        kept.append(sorted(tmp_path.glob("likes*/reference-*.npz")))
        for file in kept[-1]:  # so that two ranks compute theirs
            file.unlink()
    assert kept[0] == kept[1]  # the weights have the same name however they are sharded
    for one, two in zip(*runs, strict=True):
        assert two == pytest.approx(one, rel=2e-6)
