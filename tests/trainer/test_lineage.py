"""Lineage: a checkpoint tells what it was made from, when all that is gone, and nothing of who made it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import pytest

from tokenmill.data.stream import TokenStream
from tokenmill.trainer import lineage, loop
from tokenmill.trainer.adapters import Base
from tokenmill.trainer.cli import main
from tokenmill.trainer.distributed import World
from tokenmill.trainer.lineage import parent, read_lineage, total_tokens
from tokenmill.trainer.model.config import AdapterConfig


@pytest.fixture(autouse=True)
def _ask_git_again():
    lineage._code.cache_clear()
    yield
    lineage._code.cache_clear()


def begin_from(recipe, folder):
    return replace(recipe, model=replace(recipe.model, new=None, path=str(folder)))


def test_a_checkpoint_tells_what_it_was_made_from(make_recipe, streams, tmp_path, capsys):
    first = loop.train(make_recipe("--train.steps=2"))
    second = loop.train(begin_from(make_recipe(f"--output={tmp_path / 'second'}", "--train.steps=3"), tmp_path / "run"))
    recipe = begin_from(make_recipe(f"--output={tmp_path / 'third'}", "--train.steps=1"), tmp_path / "second")
    third = loop.train(replace(recipe, objective="sft"))
    base = Base.of(first)
    tokens = [json.loads((c / "checkpoint.json").read_text())["state"]["tokens"] for c in (first, second, third)]
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "second")

    found = read_lineage(third)
    folders = [streams / "notes", streams / "talks"]
    data = [{"path": str(folder), "fingerprint": TokenStream.open(folder).fingerprint} for folder in folders]
    assert found["data"] == data
    assert found["versions"] == {name: version(name) for name in ("tokenmill", "torch", "triton")}
    (before,) = found["parents"]
    (at_first,) = before["parents"]
    assert (before["step"], at_first["step"]) == (3, 2)
    assert (before["data"], at_first["data"], at_first["parents"]) == (data, data, [])
    assert (at_first["path"], at_first["fingerprint"]) == (base.path, base.fingerprint)
    assert at_first["recipe"] == json.loads(json.dumps(asdict(make_recipe("--train.steps=2"))))
    assert total_tokens(third) == sum(tokens)

    assert main(["inspect", str(tmp_path / "third")]) == 0
    said = capsys.readouterr().out
    assert f"trained       sft, 1 steps, {tokens[2]:,} tokens" in said
    assert f"\n  from          {base.path} ({base.fingerprint[:12]})\n    trained       pretrain, 2 steps" in said


def test_tokens_of_a_shared_ancestor_are_counted_once(make_recipe, tmp_path):
    first = loop.train(make_recipe("--train.steps=2"))
    runs = [tmp_path / "a", tmp_path / "b"]
    for seed, run in enumerate(runs):
        loop.train(begin_from(make_recipe(f"--output={run}", "--train.steps=1", f"--seed={seed}"), first))
    assert main(["merge-models", *map(str, runs), "--output", str(tmp_path / "merged")]) == 0
    tuned = loop.train(
        begin_from(make_recipe(f"--output={tmp_path / 'tuned'}", "--train.steps=1"), tmp_path / "merged")
    )
    tokens = [
        json.loads((latest / "checkpoint.json").read_text())["state"]["tokens"]
        for latest in (first, *(run / "checkpoints/step-00000001" for run in runs), tuned)
    ]
    assert total_tokens(tuned) == sum(tokens)


def test_adapters_and_moments_that_it_began_with_are_told(make_recipe, tmp_path, capsys):
    first = loop.train(make_recipe("--train.steps=2", "--train.checkpoint_every=1"))
    before = first.with_name("step-00000001")

    def run(name, *options, folder=before):
        return loop.train(begin_from(make_recipe(f"--output={tmp_path / name}", "--train.steps=1", *options), folder))

    moments = run("moments", f"--optimizer.moments={tmp_path / 'run'}")
    assert read_lineage(moments)["parents"] == [parent(Base.of(before)), parent(Base.of(first), "moments")]
    own = json.loads((moments / "checkpoint.json").read_text())["state"]["tokens"]
    assert total_tokens(moments) == own + total_tokens(before)  # its weights have not seen the others
    same = run("same", f"--optimizer.moments={tmp_path / 'run'}", folder=first)  # another name of one checkpoint
    assert read_lineage(same)["parents"] == [parent(Base.of(first))]

    lora = AdapterConfig(rank=2, targets=("attention",))
    recipe = begin_from(make_recipe(f"--output={tmp_path / 'lora'}", "--train.steps=1"), first)
    loop.train(replace(recipe, adapter=lora))
    assert main(["export", str(tmp_path / "lora"), str(tmp_path / "peft"), "--adapter"]) == 0
    recipe = replace(recipe, output=str(tmp_path / "again"), adapter=replace(lora, path=str(tmp_path / "peft")))
    again = loop.train(recipe)
    adapters = Base.of(tmp_path / "peft")
    assert read_lineage(again)["parents"] == [parent(Base.of(first)), parent(adapters, "adapters")]
    capsys.readouterr()
    assert main(["inspect", str(again)]) == 0
    said = capsys.readouterr().out
    assert f"from          {adapters.path} ({adapters.fingerprint[:12]}), adapters alone" in said


def test_an_imported_model_has_one_too(make_recipe, tmp_path):
    first = loop.train(make_recipe("--train.steps=2"))
    assert main(["export", str(first), str(tmp_path / "hf")]) == 0
    for source in (first, tmp_path / "hf"):
        assert main(["import", str(source), str(tmp_path / "imported")]) == 0
        found = read_lineage(tmp_path / "imported")
        assert found["parents"] == [parent(Base.of(source))]
        assert found["parents"][0].get("step") == (2 if source == first else None)
        shutil.rmtree(tmp_path / "imported")


def test_a_resumed_run_keeps_the_parent_that_it_began_from(make_recipe, tmp_path):
    first = loop.train(make_recipe("--train.steps=2"))
    recipe = begin_from(make_recipe(f"--output={tmp_path / 'second'}", "--train.steps=2"), tmp_path / "run")
    began = read_lineage(loop.train(recipe))["parents"]
    assert began == [parent(Base.of(first))]
    loop.train(make_recipe("--train.steps=4"))  # so that the same path now means another checkpoint
    resumed = loop.train(replace(recipe, train=replace(recipe.train, steps=3)))
    assert read_lineage(resumed)["parents"] == began


def test_nothing_of_the_environment_or_the_user_is_told(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for name in ("USER", "LOGNAME", "HOSTNAME", "API_KEY", "GIT_AUTHOR_NAME"):
        monkeypatch.setenv(name, "a-name-like-no-other")
    first = loop.train(make_recipe("--train.steps=1"))
    told = lineage.lineage([parent(Base.of(first))], [])
    told["parents"][0].pop("recipe")  # holds paths as the user wrote them
    assert told["parents"][0]["path"] == f"~/{tmp_path.name}/run/checkpoints/step-00000001"
    assert "a-name-like-no-other" not in json.dumps(told)
    assert str(tmp_path) not in json.dumps(told)
    monkeypatch.chdir(tmp_path)
    assert parent(Base.of(first))["path"] == "run/checkpoints/step-00000001"


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_code_is_named_by_its_commit(tmp_path, monkeypatch):
    here = tmp_path / "repo" / "lineage.py"
    here.parent.mkdir()
    here.write_text("one")
    git(here.parent, "init")
    git(here.parent, "commit", "--allow-empty", "-m", "none")
    monkeypatch.setattr(lineage, "__file__", str(here))
    assert lineage._code() is None  # a file that git does not know lies in somebody else's checkout
    git(here.parent, "add", ".")
    git(here.parent, "commit", "-m", "one")
    git(here.parent, "tag", "-m", "v1", "v1")
    commit = git(here.parent, "rev-parse", "HEAD")
    lineage._code.cache_clear()
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert lineage._code() == {"commit": commit, "dirty": False}
    here.write_text("two")
    assert lineage._code() == {"commit": commit, "dirty": False}  # what this process runs
    lineage._code.cache_clear()
    assert lineage._code() == {"commit": commit, "dirty": True}


@pytest.mark.parametrize("script", [None, "#!/bin/sh\nexit 128\n", "#!/bin/sh\nexec sleep 60\n"])
def test_a_git_that_is_missing_fails_or_hangs_is_no_error(tmp_path, monkeypatch, script):
    monkeypatch.setattr(lineage, "PATIENCE", 0.2)
    if script is not None:
        (tmp_path / "git").write_text(script)
        (tmp_path / "git").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    assert lineage._code() is None
    assert lineage.lineage([])["code"] is None


def test_a_lineage_that_is_none_is_an_error_that_names_it(make_recipe, tmp_path, capsys):
    checkpoint = loop.train(make_recipe("--train.steps=1"))
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    for wrong in ([1], {"parents": 3}, {"parents": [3]}, {"data": [{}]}, {"versions": 7}):
        (checkpoint / "checkpoint.json").write_text(json.dumps(manifest | {"lineage": wrong}))
        assert main(["inspect", str(checkpoint)]) == 1
        assert "checkpoint.json: lineage: " in capsys.readouterr().err
    (checkpoint / "checkpoint.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "lineage"}))
    assert main(["inspect", str(checkpoint)]) == 0  # written before there were lineages
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: no such folder; expected a token stream, a checkpoint or a run's output" in capsys.readouterr().err
    loop.Trainer(make_recipe("--train.steps=1"), World()).train()
