"""Prompts in files and as text to answers as text."""

import io
import json
from typing import Any

import numpy as np
import pytest

from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.cli import main
from tokenmill.trainer.completion import Completion, Prompt, encode, read_prompts
from tokenmill.trainer.loop import train
from tokenmill.trainer.model import ModelConfig, Transformer
from tokenmill.trainer.model.generate import Sampling, Step, generate

HOT = Sampling(temperature=1.5, seed=3)


@pytest.fixture
def tokenizer(streams):
    return Tokenizer.open(streams)


@pytest.fixture
def model():
    """Of random weights, at home in bytes that make no characters as much as in words."""
    made = Transformer(ModelConfig(32, 2, 4, 2, 8, 48, 320, sliding_window=9, max_positions=100))
    made.initialise(0)
    return made


def ask(*texts):
    return [Prompt(f"prompt {i}", {"prompt": text}) for i, text in enumerate(texts)]


def test_answers_are_what_was_generated_in_order(model, tokenizer):
    prompts = ask("fever for days", "rash", "what is iron?")
    completion = Completion(model, tokenizer, prompts, sampling=HOT, max_new_tokens=30)
    ids = [encode(prompt, tokenizer, "auto") for prompt in prompts]
    stop = {tokenizer.eos_id, ids[0][-1]}
    completion.stop = stop  # some answers end
    expected = generate(model, ids, max_new_tokens=30, stop=stop, sampling=HOT, samples=4)
    found = list(completion.answers(samples=4))
    assert [(answer.prompt, answer.sample) for answer in found] == [(p, s) for p in range(3) for s in range(4)]
    for answer in found:
        of = expected[answer.prompt][answer.sample]
        assert (answer.text, answer.tokens) == (tokenizer.decode(of), len(of))
        assert answer.stopped == (len(of) < 30)
    assert {answer.stopped for answer in found} == {False, True}


@pytest.mark.parametrize("template", ["auto", None])
def test_pieces_make_up_the_answer(model, tokenizer, template):
    for text in ("fever", "a dose of iron"):
        completion = Completion(model, tokenizer, ask(text), template, sampling=HOT, max_new_tokens=60)
        pieces = list(completion.pieces())
        (answer,) = completion.answers()
        assert "".join(pieces) == answer.text
        assert len(pieces) > 20
        assert any(ord(c) > 127 for c in answer.text)


def test_a_character_comes_when_it_is_whole(model, tokenizer, monkeypatch):
    ids = tokenizer.encode("ab é\u4e16!")  # bytes, for want of pieces
    steps = iter(ids)

    def one_after_another(*args, **kwargs):
        for i, token in enumerate(steps):
            yield Step(np.array([0]), np.array([token]), np.array([False]), np.array([i == len(ids) - 1]))

    monkeypatch.setattr("tokenmill.trainer.completion.stream", one_after_another)
    pieces = list(Completion(model, tokenizer, ask("x")).pieces())
    assert "".join(pieces) == "ab é\u4e16!"
    assert {"\u4e16", "!"} <= set(pieces)


def test_plain_text_goes_on(model, tokenizer):
    """With the space before the next word, which decoding the new ids alone would lose."""
    prompt = "fever for"
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    options: dict[str, Any] = dict(sampling=HOT, max_new_tokens=6)
    answers = list(Completion(model, tokenizer, ask(prompt), None, **options).answers(samples=20))
    (expected,) = generate(model, [ids], stop=[tokenizer.eos_id], samples=20, **options)
    assert [prompt + answer.text for answer in answers] == [tokenizer.decode(ids + new) for new in expected]
    assert any(answer.text.startswith(" ") for answer in answers)


def test_an_answer_ends_where_the_template_says(model, tokenizer, monkeypatch):
    monkeypatch.setattr("tokenmill.data.chat.end_id", lambda tokenizer, template: {"auto": 7}[template])
    assert Completion(model, tokenizer, ask("a")).stop == {tokenizer.eos_id, 7}
    assert Completion(model, tokenizer, ask("a"), None).stop == {tokenizer.eos_id}


def test_as_many_tokens_as_there_are_positions(model, tokenizer):
    prompts = ask("fever " * 5, "rash")
    completion = Completion(model, tokenizer, prompts)
    completion.stop = set()
    longest = max(len(encode(prompt, tokenizer, "auto")) for prompt in prompts)
    assert {answer.tokens for answer in completion.answers()} == {100 - longest}


def test_prompts_in_files(tmp_path, tokenizer):
    (tmp_path / "one.txt").write_text("fever,\nfor days\n")
    assert [prompt.row for prompt in read_prompts(tmp_path / "one.txt")] == [{"prompt": "fever,\nfor days"}]
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {"prompt": "pain", "id": 7},
        {"messages": [system, {"role": "user", "content": "pain"}]},
        {"instruction": "Name it.", "input": "pain"},
    ]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = read_prompts(tmp_path / "many.jsonl")
    assert [prompt.row for prompt in prompts] == rows
    texts = [tokenizer.decode(encode(prompt, tokenizer, "mistral-v1")) for prompt in prompts]
    assert texts == ["[INST] pain [/INST]", "[INST] Be brief.\n\npain [/INST]", "[INST] Name it.\n\npain [/INST]"]


def test_plain_text_has_all_of_an_instruction(tokenizer):
    row = {"instruction": "Name it.", "input": "pain", "output": "not looked at"}
    assert tokenizer.decode(encode(Prompt("x", row), tokenizer, None)) == "Name it.\n\npain"
    assert tokenizer.decode(encode(Prompt("x", {**row, "input": ""}), tokenizer, None)) == "Name it."
    with pytest.raises(ValueError, match=r"x: message 0 \(user\) has an 'input' that is a int"):
        encode(Prompt("x", {**row, "input": 7}), tokenizer, None)


def test_a_file_without_prompts_is_refused_and_standard_input_not_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "blank.jsonl").write_text("\n\n")
    monkeypatch.setattr("sys.stdin", None)
    assert main(["generate", str(tmp_path), f"--file={tmp_path}/blank.jsonl"]) == 1
    assert capsys.readouterr().err.endswith("blank.jsonl: holds no prompt; expected one JSON object a line\n")


def test_what_cannot_be_drawn_is_said_before_work(tmp_path, capsys):
    for temperature in ("nan", "inf", "-1"):
        assert main(["generate", str(tmp_path / "no"), "--prompt=a", f"--temperature={temperature}"]) == 1
        assert f"error: temperature is {float(temperature)}: expected 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", str(tmp_path / "no"), "--prompt=a", "--seed=-1"])
    assert "argument --seed: expected 0 to 2**63 - 1, got -1" in capsys.readouterr().err


WRONG = {
    "no key": ({"question": "x"}, "rows.jsonl:2: no text under the key 'prompt' or 'instruction'"),
    "no text": ({"prompt": 7}, "rows.jsonl:2: no text under the key 'prompt'"),
    "empty": ({"prompt": " "}, "rows.jsonl:2: message 0 (user) has no text"),
    "answered": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "rows.jsonl:2: the conversation ends with an answer",
    ),
    "too long": ({"prompt": "fever " * 99}, "exceeds the model's 100 positions"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_rows_are_named(kind, tmp_path, model, tokenizer):
    row, message = WRONG[kind]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match=message.replace("(", "\\(").replace(")", "\\)")):
        list(Completion(model, tokenizer, read_prompts(tmp_path / "rows.jsonl")).answers())


def test_another_tokenizer_is_refused(tokenizer):
    small = Transformer(ModelConfig(32, 1, 4, 2, 8, 48, 300))
    with pytest.raises(ValueError, match="320 pieces do not fit the model's vocabulary of 300"):
        Completion(small, tokenizer, ask("a"))


def test_the_command(make_recipe, monkeypatch, capsys):
    recipe = make_recipe("--train.steps=1")
    train(recipe)
    capsys.readouterr()
    command = ["generate", recipe.output, "--max-new-tokens=5"]
    assert main([*command, "--prompt", "fever for days"]) == 0
    whole = capsys.readouterr().out
    assert main([*command, "--prompt", "fever for days", "rash", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert whole == first["text"] + "\n"
    assert first | second == second
    assert second["row"] == {"prompt": "rash"}
    assert [first["prompt"], second["prompt"], first["sample"]] == [0, 1, 0]
    monkeypatch.setattr("sys.stdin", io.StringIO("fever for days\n"))
    assert main(command) == 0
    assert capsys.readouterr().out == whole
    assert (
        main([*command, "--prompt=fever", "--samples=2", "--temperature=2", "--top-p=0.9", "--seed=1", "--plain"]) == 0
    )
    assert "==> prompt 0, sample 1 <==" in capsys.readouterr().out
    assert main([*command, "--prompt=fever", "--top-p=2"]) == 1
    assert "error: top_p is 2.0" in capsys.readouterr().err
