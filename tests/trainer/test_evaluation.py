"""Questions answered during training: when, with which result, on several processes, and after a resume."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.checkpoint import load_model
from tokenmill.trainer.cli import main
from tokenmill.trainer.config import ConfigError, EvaluateSection
from tokenmill.trainer.distributed import World
from tokenmill.trainer.evaluate.strategies import Asker, evaluate, named
from tokenmill.trainer.evaluate.tasks import load_questions
from tokenmill.trainer.loop import Trainer, train

WORDS = ("fever", "cough", "pain", "rash")


@pytest.fixture
def questions(tmp_path) -> Path:
    """Eleven questions; and others in a file beside."""
    for name, numbers in (("quiz", range(11)), ("others", range(20, 29))):
        rows = [
            {
                "question": f"What is number {i}?",
                "options": dict(zip("ABCD", WORDS, strict=True)),
                "answer": "ABCD"[i % 4],
            }
            for i in numbers
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "quiz.jsonl"


def sections(questions: Path) -> str:
    shots = f'"{questions.parent}/others.jsonl"'
    return (
        f'--evaluate=[{{questions = "{questions}", every = 5, template = "plain"}}, {{questions = "{questions}", '
        f'name = "near", every = 6, strategy = "knn", k = 2, by = "letter", shots = {shots}, limit = 7}}]'
    )


def measured(folder: Path):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation"] for line in lines if "validation" in line}


def run_on_two_ranks(recipe: Path, *overrides: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command = [*launch, "tokenmill.trainer", str(recipe), *overrides]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_at_its_steps_and_at_the_end_as_the_command_would(make_recipe, questions, tmp_path, capsys):
    recipe = make_recipe(sections(questions), "--train.checkpoint_at=[5]", "--log.tensorboard=true")
    trainer = Trainer(recipe, World())
    trainer.train()
    found = measured(tmp_path / "run")
    quiz, near = ([f"{n}/{m}" for m in ("accuracy", "macro-F1", "calibration_error")] for n in ("quiz", "near"))
    assert {step: list(values) for step, values in found.items()} == {
        5: quiz,
        6: ["notes", *near],
        10: quiz,
        12: ["notes", *quiz, *near],
    }
    printed = capsys.readouterr().out
    assert f"step 5/12  validation  quiz/accuracy {found[5]['quiz/accuracy']:.4f}  quiz/" in printed
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    # The same as on the checkpoints; training goes on in training mode.
    pool = load_questions(questions.parent / "others.jsonl")
    for step, template, options in (
        (5, "plain", {}),
        (12, "auto", {"strategy": named("knn", k=2), "by": "letter", "pool": pool}),
    ):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        asked = load_questions(questions)[: 7 if options else None]
        asker = Asker(load_model(folder), Tokenizer.open(folder), template)
        right = [answer.correct for answer in evaluate(asker, asked, **options)]
        assert found[step]["near/accuracy" if options else "quiz/accuracy"] == sum(right) / len(right)


def test_evaluation_changes_nothing_and_a_resume_gives_the_same(make_recipe, questions, tmp_path):
    without = Trainer(make_recipe(f"--output={tmp_path / 'without'}"), World())
    without.train()
    whole = Trainer(make_recipe(sections(questions), f"--output={tmp_path / 'whole'}"), World())
    whole.train()
    Trainer(make_recipe(sections(questions), "--train.checkpoint_at=[5]"), World()).train()
    for later in ("10", "12"):  # as if it had been killed after step 5
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-000000{later}")
    second = Trainer(make_recipe(sections(questions)), World())
    assert second.state.step == 5
    second.train()
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")
    for a, b, c in zip(*(t.model.parameters() for t in (without, whole, second)), strict=True):
        assert a.equal(b)
        assert b.equal(c)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_ranks_share_the_questions(make_recipe, questions, tmp_path, precision):
    """Batches of 128 tokens: three and more, which two ranks do not divide evenly."""
    options = (sections(questions), "--train.steps=4", f"--train.precision={precision}")
    train(make_recipe(*options, f"--output={tmp_path / '1'}"))
    run_on_two_ranks(tmp_path / "recipe.toml", *options, f"--output={tmp_path / '2'}")
    one, two = measured(tmp_path / "1"), measured(tmp_path / "2")
    assert one[4].keys() == two[4].keys()
    exact = precision == "fp32"
    for key, value in one[4].items():
        assert two[4][key] == pytest.approx(value, rel=1e-4 if exact else 0.02, abs=0 if exact else 0.1), key


def test_generated_answers_in_training(make_recipe, questions, tmp_path):
    section = EvaluateSection(str(questions), every=2, by="generate", max_new_tokens=3)
    recipe = replace(make_recipe("--train.steps=2"), evaluate=(section,))
    Trainer(recipe, World()).train()
    assert "quiz/answered" in measured(tmp_path / "run")[2]
    with pytest.raises(ValueError, match="evaluate.0: answers are generated one token at a time, which 2 processes"):
        Trainer(recipe, World(size=2))


def test_what_goes_wrong_later_does_not_stop_training(make_recipe, questions, tmp_path, monkeypatch, capsys):
    from tokenmill.trainer.evaluate import strategies

    monkeypatch.setattr(
        strategies, "continuation_logprobs", lambda model, asked, options, **_: [[float("nan")] * 4 for _ in asked]
    )
    Trainer(make_recipe(sections(questions)), World()).train()
    assert set(measured(tmp_path / "run")) == {6, 12}
    assert set(measured(tmp_path / "run")[12]) == {"notes"}
    assert f"step 5: quiz is not evaluated: {questions}:1: the model's log-prob" in capsys.readouterr().out


WRONG = {
    "evaluate=[{questions = 'nowhere.jsonl'}]": "evaluate.0: nowhere.jsonl: no such file",
    "evaluate=[{questions = '{q}', strategy = 'knn'}]": "evaluate.0: 0 questions to take 5 shots from",
    "evaluate=[{questions = '{q}', k = 3}]": "evaluate.0: zero-shot takes no shots",
    "evaluate=[{questions = '{q}', template = 'llama'}]": "evaluate.0: template 'llama' is not one of",
    "evaluate=[{questions = '{q}', by = 'generate', max_new_tokens = 90000}]": "evaluate.0: {q}:1: its prompt has",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_is_wrong_is_said_before_training(make_recipe, questions, tmp_path, capsys, override):
    make_recipe()
    given = f"--{override.replace('{q}', str(questions))}"
    assert main(["train", str(tmp_path / "recipe.toml"), given, f"--output={tmp_path / 'run'}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert WRONG[override].replace("{q}", str(questions)) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluate=[{questions = 'a.jsonl'}, {questions = 'b/a.jsonl.gz'}]", "evaluate: expected names that no other"),
        ("evaluate=[{questions = 'notes.jsonl'}]", "evaluate: expected names that no other"),
        ("evaluate=[{questions = 'a', every = 0}]", "evaluate.0.every: expected a positive integer, got 0"),
        ("evaluate=[{question = 'a'}]", "unknown key evaluate.0.question; did you mean evaluate.0.questions"),
        ("evaluate=[{questions = 'a', by = 'words'}]", "evaluate.0.by: expected 'text' or 'letter' or 'generate'"),
    ],
)
def test_wrong_sections(make_recipe, override, said):
    with pytest.raises(ConfigError) as error:
        make_recipe(f"--{override}")
    assert said in str(error.value)
