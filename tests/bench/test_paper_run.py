"""The paper's experiment, tiny: all of it runs, goes on where it was, and gives the same files again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tokenmill.bench.paper import __main__ as paper
from tokenmill.bench.paper import experiment, report, world
from tokenmill.data.files import locked
from tokenmill.trainer import pipeline
from tokenmill.trainer.evaluate.strategies import STRATEGIES

SIZE, SEED = 12, 3
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def stages_file(tmp_path_factory) -> Path:
    """The shipped stages, with a model and numbers of steps that take a moment."""
    file = Path(pipeline.__file__).parent / "recipes" / "pipelines" / "paper.toml"
    text = re.sub(r"steps = \d+", "steps = 4", file.read_text())
    text = text.replace("at = [100, 300, ", "at = [2, ").replace("validate_every = ", "validate_every = 2 # ")
    text = re.sub(r"train = \{ steps = 4, validate_every = 2 .*", "train = { steps = 4, validate_every = 2 }", text)
    for key, value in {"packs_per_step": 2, "dim": 16, "n_layers": 1, "head_dim": 4, "hidden_dim": 16}.items():
        text = re.sub(rf"^{key} = \d+", f"{key} = {value}", text, flags=re.MULTILINE)
    tiny = tmp_path_factory.mktemp("stages") / "tiny.toml"
    tiny.write_text(text.replace("vocab_size = 1280", "vocab_size = 700"))
    return tiny


@pytest.fixture(scope="module")
def output(tmp_path_factory, stages_file) -> Path:
    output = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # as for each test
        patch.setattr(world, "RENDERINGS", 32)
        patch.setattr(world, "HELD_OUT", 20)
        patch.setattr(world, "TUNING_CONVERSATIONS", 8)
        experiment.run_seed(paper.folder(output, SEED), stages_file, SEED, SIZE)
    return output


def files(output: Path) -> dict[str, tuple[int, bytes]]:
    """The time and content of every file of answers and weights."""
    found = [*output.rglob("*.jsonl"), *output.rglob("*.safetensors")]
    return {str(file.relative_to(output)): (file.stat().st_mtime_ns, file.read_bytes()) for file in found}


def test_a_seed_is_worked_on_by_one_process(output, stages_file):
    with locked(paper.folder(output, SEED)), pytest.raises(ValueError, match="seed-3: another process is at work"):
        experiment.run_seed(paper.folder(output, SEED), stages_file, SEED, SIZE)


def test_every_arm_is_asked_by_every_strategy(output):
    found = experiment.arms(pipeline.plan(paper.folder(output, SEED) / "pipeline.toml"))
    by_name = {arm.name: arm for arm in found}
    assert {*by_name} == {*report.ARMS, "cpt-2", "cpt-tuned-2"}
    for arm in found:
        curve = arm.name not in report.ARMS
        assert arm.strategies == (("zero-shot",) if curve else tuple(STRATEGIES))
        for strategy in arm.strategies:
            rows = [json.loads(line) for line in (arm.answers / f"{strategy}.jsonl").read_text().splitlines()]
            assert [row["hops"] for row in rows] == [1] * (SIZE // 2 * 4) + [2] * (SIZE // 2)
            assert {row["run"]["template"] for row in rows} == {arm.template}
            for row in rows:
                assert row["correct"] == (row["prediction"] == row["answer"])
    assert {name for name, arm in by_name.items() if arm.template == "plain"} == {"base", "cpt", "cpt-2"}
    tokens = {name: arm.cpt_tokens for name, arm in by_name.items()}
    assert tokens["cpt-2"] == tokens["cpt-tuned-2"] != tokens["cpt-tuned"] == tokens["cpt"]
    assert tokens["base"] == tokens["base-tuned"] == 0
    assert tokens["cpt-neftune"] is tokens["cpt-dpo"] is None


def test_no_prompt_shows_a_tested_answer(output):
    """Neither the shots nor the chains of thought in them are about a disease of the test."""
    tested = world.World.make(SEED, SIZE)
    names = [tested.clinical.names[i] for i in tested.tested]
    for file in output.rglob("answers/*/*.jsonl"):
        if file.name == "people.jsonl":
            continue
        for row in map(json.loads, file.read_text().splitlines()):
            (asked,) = [name for name in names if name in row["question"]]
            for vote in row["votes"]:
                prompt = vote["prompt"] if isinstance(vote["prompt"], str) else json.dumps(vote["prompt"])
                assert [name for name in names if name in prompt] == [asked]
                assert prompt.count(asked) == 1


def test_what_is_done_is_not_done_again_and_what_is_missing_is(output, stages_file):
    folder = paper.folder(output, SEED)
    before = files(output)
    experiment.run_seed(folder, stages_file, SEED, SIZE)
    assert files(output) == before
    answers = next(folder.glob("stages/cpt-neftune/answers/*/medprompt.jsonl"))
    answers.unlink()
    shutil.rmtree(folder / "stages" / "cpt-dpo")
    experiment.run_seed(folder, stages_file, SEED, SIZE)
    after = files(output)
    again = {name for name in before if after[name][0] != before[name][0]}
    assert {name: content for name, (_, content) in before.items() if not name.endswith("metrics.jsonl")} == {
        name: content for name, (_, content) in after.items() if not name.endswith("metrics.jsonl")
    }
    assert all("cpt-dpo" in name or name == str(answers.relative_to(output)) for name in again)


def test_another_world_under_the_output_is_refused(output, stages_file):
    with pytest.raises(ValueError, match=r"text: is of the world .*'size': 12}, expected seed 3 and --size 16"):
        experiment.run_seed(paper.folder(output, SEED), stages_file, SEED, 16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda text: text.replace('name = "cpt-dpo"', 'name = "other"'), "no stage is called 'cpt-dpo'"),
        (
            lambda text: text.replace('at = [2, "last"]', 'at = ["last"]'),
            r"stages\.cpt-tuned\.at is \['last'\], expected",
        ),
        (lambda text: text.replace("\nseed = 0\n", "\n"), r"set\.seed is not there"),
    ],
)
def test_a_pipeline_that_cannot_be_reported_is_refused_at_once(stages_file, tmp_path, wrong, message):
    file = tmp_path / "wrong.toml"
    file.write_text(wrong(stages_file.read_text()))
    with pytest.raises(ValueError, match=message):
        experiment.check(file, [0], SIZE)


def test_a_seed_is_set_whatever_follows_it(stages_file, tmp_path, output):
    file = tmp_path / "commented.toml"
    file.write_text(stages_file.read_text().replace("\nseed = 0\n", "\nseed = 0  # mine\n"))
    shutil.copytree(paper.folder(output, SEED), tmp_path / "seed-3", ignore=shutil.ignore_patterns("stages", ".lock"))
    assert "\nseed = 3  # mine\n" in experiment.material(tmp_path / "seed-3", file, SEED, SIZE).read_text()


def test_the_report_is_the_same_twice(output):
    summary = paper.summarise(output, [SEED], SIZE)
    written = {name: (output / name).read_bytes() for name in ("report.md", "results.json")}
    assert paper.summarise(output, [SEED], SIZE) == summary == written["report.md"].decode()
    assert {name: (output / name).read_bytes() for name in written} == written
    for name in ("accuracy_by_tokens.png", "losses.png", "strategies.png"):
        assert name in summary
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert "A world of 12 people and 12 diseases" in summary
    assert "A base learns the general half of the world" in summary
    numbers = json.loads(written["results.json"])
    assert {e["outcome"] for e in numbers["expectations"]} <= {"came", "did not come", "open"}


@pytest.mark.slow  # four processes that import torch
def test_the_command_line_runs_each_seed_and_names_what_fails(output, stages_file, tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "tokenmill.bench.paper", "--pipeline", str(stages_file), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)

    done = run("--output", str(output), "--seeds", str(SEED), "--size", str(SIZE))
    assert done.returncode == 0, done.stderr
    assert "## Expected, and what came of it" in done.stdout
    wrong = run("--output", str(tmp_path / "no"), "--seeds", "0", "--size", "2")
    assert wrong.returncode == 1
    assert len(wrong.stderr.strip().splitlines()) == 1
    assert "--size" in wrong.stderr
