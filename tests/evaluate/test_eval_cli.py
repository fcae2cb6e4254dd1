"""`tokenmill eval` and `compare` as their users meet them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokenmill.data.tokenizer import train_tokenizer
from tokenmill.trainer.adapters import Base
from tokenmill.trainer.checkpoint import save_checkpoint
from tokenmill.trainer.cli import main
from tokenmill.trainer.model import ModelConfig, Transformer

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, questions, and others to take shots from."""
    folder = tmp_path_factory.mktemp("evaluation")
    texts = [f"What is as {colour} as number {i}? It is {colour}." for i in range(30) for colour in COLOURS]
    train_tokenizer(texts, 320, folder / "tokenizer.model")
    model = Transformer(
        ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=320)
    )
    model.initialise(0)
    save_checkpoint(folder / "model", model, tokenizer_from=folder)

    def rows(numbers):
        options = dict(zip("ABCD", COLOURS, strict=True))
        return [{"question": f"What is number {i}?", "options": options, "answer": "ABCD"[i % 4]} for i in numbers]

    for name, found in {
        "questions": rows(range(9)),
        "others": rows(range(20, 40)),
        "notes": [{"text": f"It is {colour}.", "summary": colour} for colour in COLOURS],
    }.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))
    (folder / "blank.jsonl").write_text("\n \n")
    return folder


def run(folder: Path, command: str) -> int:
    return main(command.format(t=folder).split())


EVALUATE = "eval {t}/model {t}/questions.jsonl --max-new-tokens=6"


@pytest.mark.parametrize("template", ["auto", "plain"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "zero-shot by text, chance 0.250, 9 questions"),
        ("--by=letter --limit=5", "zero-shot by letter, chance 0.250, 5 questions"),
        ("--strategy=few-shot --shots={t}/others.jsonl --k=2", "few-shot by text, 2 shots"),
        ("--strategy=knn --by=generate --shots={t}/others.jsonl", "knn by generate, 5 shots"),
        ("--strategy=chain-of-thought", "chain-of-thought by generate, chance"),
        ("--strategy=self-consistency --votes=3 --temperature=1", "self-consistency by generate, chance"),
        ("--strategy=medprompt --shots={t}/others.jsonl --votes=2", "medprompt by generate"),
    ],
)
def test_every_strategy(folder, tmp_path, capsys, template, options, said):
    assert run(folder, f"{EVALUATE} {options} --template={template} --output={tmp_path}/a.jsonl") == 0
    line, head, *_ = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{folder}/questions.jsonl: {said}")
    assert head.startswith("| run")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"{folder}/questions.jsonl:{i + 1}" for i in range(len(rows))]
    assert all(row["votes"] and row["votes"][0]["prompt"] for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_summaries_and_a_comparison(folder, tmp_path, capsys):
    notes = f"eval {{t}}/model {{t}}/notes.jsonl --max-new-tokens=6 --output={tmp_path}"
    assert run(folder, f"{notes}/a.jsonl") == 0
    assert "exact match" in capsys.readouterr().out
    assert run(folder, f"{notes}/b.jsonl --temperature=1 --seed=3 --against {tmp_path}/a.jsonl") == 0
    printed = capsys.readouterr().out
    assert "| b - a" in printed
    assert run(folder, f"compare {tmp_path}/a.jsonl {tmp_path}/b.jsonl --seed=3") == 0
    assert printed.endswith(capsys.readouterr().out)
    assert run(folder, f"{EVALUATE} --against {tmp_path}/a.jsonl") == 1
    assert "their lines 1 differ in 'question'" in capsys.readouterr().err
    assert run(folder, f"{notes}/other/a.jsonl --against {tmp_path}/a.jsonl") == 0
    assert f"| {tmp_path}/other/a.jsonl - {tmp_path}/a.jsonl |" in capsys.readouterr().out


def test_the_seed_alone_decides(folder, tmp_path):
    command = f"{EVALUATE} --strategy=self-consistency --output={tmp_path}"
    for name, options in {"a": "", "b": "--tokens-per-batch=40", "c": "--seed=1"}.items():
        assert run(folder, f"{command}/{name}.jsonl {options}") == 0
    first, second, other = (
        [
            [vote["generated"] for vote in json.loads(line)["votes"]]
            for line in (tmp_path / name).read_text().splitlines()
        ]
        for name in ("a.jsonl", "b.jsonl", "c.jsonl")
    )
    assert first == second
    assert first != other


WRONG = {
    "eval {t}/model {t}/nowhere.jsonl": "nowhere.jsonl: no such file",
    "eval {t}/model {t}/questions.jsonl --strategy=knn": "0 questions to take 5 shots from",
    "eval {t}/model {t}/questions.jsonl --strategy=knn --shots={t}/questions.jsonl": ".jsonl:1: is to be answered too",
    "eval {t}/model {t}/questions.jsonl --strategy=medprompt --by=text --shots={t}/others.jsonl": "is generated",
    "eval {t}/model {t}/questions.jsonl --k=3": "zero-shot takes no shots",
    "eval {t}/model {t}/questions.jsonl --output={t}/x.txt": "x.txt: expected a file that ends in .jsonl",
    "eval {t}/model {t}/questions.jsonl --output={t}/others.jsonl": "others.jsonl: is there already",
    "eval {t}/model {t}/questions.jsonl --against {t}/others.jsonl": "others.jsonl:1: the key 'id' is missing",
    "eval {t}/model {t}/questions.jsonl --template=chatml": "needs the control pieces <|im_start|> and <|im_end|>",
    "eval {t}/model {t}/questions.jsonl --temperature=-1": "temperature is -1.0: expected 0",
    "eval {t}/model {t}/questions.jsonl --strategy=self-consistency --temperature=nan": "temperature is nan: expected",
    "eval {t}/model {t}/questions.jsonl --strategy=medprompt --shots={t}/others.jsonl --template=alpaca": "no shots",
    "eval {t} {t}/questions.jsonl": "expected a checkpoint",
    "compare {t}/questions.jsonl": "questions.jsonl:1: the key 'id' is missing",
    "compare {t}/blank.jsonl": "blank.jsonl: holds no answer: expected a file that tokenmill eval wrote",
    "eval {t}/model {t}/questions.jsonl --against {t}/blank.jsonl": "blank.jsonl: holds no answer",
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(folder, capsys, command):
    before = sorted(folder.iterdir())
    assert run(folder, command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tokenmill: error: ")
    assert WRONG[command] in line
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("command", [command for command in WRONG if "/nowhere" in command or "--s" in command])
def test_what_needs_no_model_is_said_before_one_is_loaded(folder, capsys, monkeypatch, command):
    monkeypatch.setattr("tokenmill.trainer.inference.resolve_model", lambda *_: pytest.fail("a model was loaded"))
    assert run(folder, command) == 1
    assert WRONG[command] in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval {t}/model {t}/questions.jsonl", "compare {t}/blank.jsonl"])
def test_a_seed_that_cannot_be(folder, capsys, command):
    for seed in (-1, 2**63):
        with pytest.raises(SystemExit):
            run(folder, f"{command} --seed={seed}")
        assert f"argument --seed: expected 0 to 2**63 - 1, got {seed}" in capsys.readouterr().err


def test_a_line_says_which_weights_answered(folder, tmp_path):
    """Also where the same path holds others later."""
    for name, options in {"a": "", "b": "--dtype=bf16"}.items():
        assert run(folder, f"{EVALUATE} --output={tmp_path}/{name}.jsonl {options}") == 0
    one, half = (json.loads((tmp_path / name).read_text().splitlines()[0])["run"] for name in ("a.jsonl", "b.jsonl"))
    weights = Base.of(folder / "model").fingerprint
    assert one["fingerprint"] == half["fingerprint"] == weights
    assert (one["dtype"], half["dtype"]) == ("fp32", "bf16")
    assert one["tokenizer"] is None


def test_questions_of_one_stem(folder, tmp_path, capsys):
    """As in MedMCQA: the options tell them apart, in whichever order."""

    def write(name, *lists):
        keys = ("opa", "opb", "opc", "opd")
        rows = [
            {"question": "All are true except", **dict(zip(keys, options, strict=True)), "cop": i % 4}
            for i, options in enumerate(lists)
        ]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))

    a, b = ("iron", "zinc", "lead", "gold"), ("-1", "+1", "+2", "-2")
    write("q.jsonl", a, b)
    write("others.jsonl", ("iron", "zinc", "lead", "tin"), ("1", "2", "3", "4"))
    write("same.jsonl", ("iron", "zinc", "lead", "tin"), ("Gold.", "iron", "lead", "zinc"))
    ask = f"eval {{t}}/model {tmp_path}/q.jsonl --strategy=knn --k=2 --shots={tmp_path}"
    assert run(folder, f"{ask}/others.jsonl") == 0
    capsys.readouterr()
    assert run(folder, f"{ask}/same.jsonl") == 1
    assert f"same.jsonl:2: is to be answered too ({tmp_path}/q.jsonl:1)" in capsys.readouterr().err


def test_stopped_in_the_middle_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    """Answers are written at the end, under another name first; of replies (test_replies.py) there are none yet."""

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenmill.trainer.evaluate.replies.stream", stop)
    assert run(folder, f"{EVALUATE} --strategy=chain-of-thought --output={tmp_path}/a.jsonl") == 130
    assert list(tmp_path.iterdir()) == []
