"""The command line as its users meet it: the whole way, and wrong input, which is one line and a non-zero exit."""

import json
import shutil
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tokenmill.trainer.cli import main

WORDS = "the patient has had a fever for three days and takes iron every morning".split()  # noqa: SIM905


@pytest.fixture
def text(tmp_path):
    """A folder to work in, with texts, a tokenizer and a stream."""
    rows = [{"text": " ".join(WORDS[i % 5 : 5 + i % 9])} for i in range(60)]
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert (
        main(["train-tokenizer", str(tmp_path / "notes.jsonl"), "--vocab-size=290", f"--output={tmp_path}/t.model"])
        == 0
    )
    prepare(tmp_path, "notes.jsonl", "stream")
    (tmp_path / "recipe.toml").write_text(
        f"""
objective = "pretrain"
output = "{tmp_path}/run"
model.new = {{ dim = 16, n_layers = 1, n_heads = 2, n_kv_heads = 1, head_dim = 8, hidden_dim = 24, vocab_size = 300 }}
data = {{ sequence_length = 32, packs_per_step = 2, sources = [{{ stream = "{tmp_path}/stream" }}] }}
train = {{ steps = 2 }}
optimizer = {{ learning_rate = 1e-3 }}
"""
    )
    return tmp_path


def prepare(folder, name, output):
    command = ["prepare", str(folder / name), f"--tokenizer={folder}/t.model", f"--output={folder / output}"]
    return main(command)


def test_the_whole_way(text, capsys):
    assert main(["inspect", f"{text}/stream"]) == 0
    assert "60" in capsys.readouterr().out
    assert main(["verify", f"{text}/stream"]) == 0
    assert main(["train", f"{text}/recipe.toml", "--train.steps=3"]) == 0
    out = capsys.readouterr().out
    assert "step 3/3" in out
    assert f"trained: {text}/run/checkpoints/step-00000003" in out
    questions = [{"question": "who?", "options": {"A": "the patient", "B": "iron"}, "answer": "A"}] * 3
    (text / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    for by in ("text", "letter"):
        assert main(["eval", f"{text}/run", f"{text}/q.jsonl", f"--by={by}"]) == 0
        assert "chance 0.500, 3 questions" in capsys.readouterr().out
    assert main(["export", f"{text}/run", f"{text}/hf"]) == 0
    theirs = MistralForCausalLM.from_pretrained(text / "hf")
    assert theirs.config.vocab_size == 300
    assert main(["import", f"{text}/hf", f"{text}/again", "--dtype=fp32"]) == 0
    assert main(["export", f"{text}/again", f"{text}/hf2"]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        assert (text / "hf" / name).read_bytes() == (text / "hf2" / name).read_bytes(), name


def test_streams_appended_merged_and_converted(text, capsys):
    add = ["prepare", f"{text}/notes.jsonl", f"--tokenizer={text}/t.model", f"--output={text}/more", "--workers=1"]
    assert main(add) == 0
    assert main([*add, "--append"]) == 0
    assert main(["merge", f"{text}/stream", f"{text}/more", f"--output={text}/all"]) == 0
    assert "all: 180 documents" in capsys.readouterr().out
    assert main(["convert", f"{text}/all", f"{text}/megatron"]) == 0
    assert main(["convert", f"{text}/megatron.bin", f"{text}/again", f"--tokenizer={text}/t.model"]) == 0
    assert "again: 180 documents" in capsys.readouterr().out
    assert main(["verify", f"{text}/again"]) == 0


def damaged(text):
    shard = max((text / "stream").glob("*tokens*"), key=lambda p: p.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-2])


def small_model(text):
    recipe = (text / "recipe.toml").read_text()
    (text / "recipe.toml").write_text(recipe.replace("vocab_size = 300", "vocab_size = 280"))


def hugging_face(text, remove):
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=290)
    shape |= dict(num_key_value_heads=1, num_hidden_layers=1)
    MistralForCausalLM(MistralConfig(**shape)).save_pretrained(text / "hf", max_shard_size="10KB")
    (min((text / "hf").glob(remove))).unlink()


WRONG = {
    "missing file": (None, "prepare no.jsonl --tokenizer {t}/t.model --output {t}/x", "no.jsonl: no such file"),
    "missing recipe": (None, "train nowhere.toml", "nowhere.toml: no such recipe"),
    "missing tokenizer": (None, "prepare {t}/notes.jsonl --tokenizer {t}/no.model --output {t}/x", "no.model"),
    "misspelt key": (None, "train {t}/recipe.toml --optimizer.learning_rat=1", "did you mean optimizer.learning_rate"),
    "missing stream": (lambda t: shutil.rmtree(t / "stream"), "train {t}/recipe.toml", "stream"),
    "truncated shard": (damaged, "train {t}/recipe.toml", "expected"),
    "small vocabulary": (small_model, "train {t}/recipe.toml", "290 pieces, the model's vocabulary only 280"),
    "empty corpus": (
        lambda t: (t / "e.jsonl").write_text(""),
        "prepare {t}/e.jsonl --tokenizer {t}/t.model --output {t}/x",
        "e.jsonl: is empty",
    ),
    "empty answer": (
        lambda t: (t / "e.jsonl").write_text('{"text": "a"}\n{"instruction": "a", "output": ""}'),
        "prepare {t}/e.jsonl --tokenizer {t}/t.model --output {t}/x",
        "e.jsonl:2: 'output' is empty",
    ),
    "missing shard": (
        lambda t: hugging_face(t, "model-00001-of-*.safetensors"),
        "import {t}/hf {t}/x",
        "hf: shard model-00001-of-",
    ),
    "missing config": (lambda t: hugging_face(t, "config.json"), "import {t}/hf {t}/x", "expected a checkpoint"),
    "no model": (None, "export {t} {t}/x", "expected a checkpoint"),
    "no questions": (None, "eval {t} {t}/q.jsonl", "expected a checkpoint"),
    "no seed tasks": (
        None,
        "instruct {t}/no.jsonl --output {t}/x.jsonl --endpoint http://127.0.0.1:1/v1 --model m",
        "no.jsonl: no such file",
    ),
    "no server": (
        None,
        "rewrite {t}/notes.jsonl --output {t}/x.jsonl --endpoint http://127.0.0.1:1/v1 --model m",
        "http://127.0.0.1:1/v1/chat/completions: cannot be reached",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(text, capsys, kind):
    spoil, command, message = WRONG[kind]
    if spoil:
        spoil(text)
    before = sorted(p.name for p in text.iterdir())
    capsys.readouterr()
    assert main(command.format(t=text).split()) == 1
    captured = capsys.readouterr()
    (line,) = [s for s in captured.err.splitlines() if "error" in s]
    assert line.startswith("tokenmill: error: ")
    assert message in line
    assert sorted(p.name for p in text.iterdir() if p.name != "run") == before


def test_another_tokenizer_under_a_run_is_refused(text, capsys):
    assert main(["train", f"{text}/recipe.toml"]) == 0
    other = [{"text": f"{i} Something quite different, about wholly other matters"} for i in range(99)]
    (text / "other.jsonl").write_text("\n".join(map(json.dumps, other)))
    main(["train-tokenizer", f"{text}/other.jsonl", "--vocab-size=295", f"--output={text}/t2.model"])
    main(["prepare", f"{text}/other.jsonl", f"--tokenizer={text}/t2.model", f"--output={text}/stream2"])
    recipe = (text / "recipe.toml").read_text().splitlines()
    recipe = [f'model.path = "{text}/run"' if line.startswith("model.new") else line for line in recipe]
    (text / "tune.toml").write_text("\n".join(recipe))
    assert main(["train", f"{text}/tune.toml", f"--output={text}/b", f"--data.sources.0.stream={text}/stream2"]) == 1
    assert "stream2: was prepared with another tokenizer" in capsys.readouterr().err


def test_unknown_arguments_are_refused(text):
    with pytest.raises(SystemExit):
        main(["prepare", "a.txt", "--tokenizer=b", "--output=c", "--colour=blue"])
