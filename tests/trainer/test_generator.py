"""A checkpoint that answers requests: the same answer in any company, and what it cannot take is refused."""

import re
import shutil

import pytest

from tokenmill.data.errors import DataError
from tokenmill.data.journal import Journal, Request
from tokenmill.data.rewrite import rewrite
from tokenmill.trainer.checkpoint import save_checkpoint
from tokenmill.trainer.cli import main
from tokenmill.trainer.generator import CheckpointGenerator
from tokenmill.trainer.model import ModelConfig, Transformer


def save(folder, streams, seed):
    config = ModelConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=320, max_positions=120
    )
    model = Transformer(config)
    model.initialise(seed)
    save_checkpoint(folder, model, tokenizer_from=streams)
    return folder


@pytest.fixture(scope="module")
def checkpoint(streams, tmp_path_factory):
    return save(tmp_path_factory.mktemp("generator") / "model", streams, 1)


def asked(i, **options):
    text = "fever for days " * (i % 4) + f"dose {i}"
    return Request(f"request {i}", ({"role": "user", "content": text},), 8, **options)


def test_answers_do_not_depend_on_their_company(checkpoint, tmp_path):
    requests = [asked(i, temperature=0.9 * (i % 2), seed=i // 6) for i in range(9)]
    found = []
    for width in (1, 4, 9):
        with Journal(tmp_path / f"{width}") as journal:
            found.append(list(journal.answers(CheckpointGenerator(checkpoint, width=width), requests)))
    assert found[0] == found[1] == found[2]
    assert len({answer.text for answer in found[0]}) > 4
    assert all(answer.text and not answer.refused for answer in found[0])
    assert not all(answer.whole for answer in found[0])
    with Journal(tmp_path / "1") as journal:
        again = [asked(1, temperature=0.9, seed=seed) for seed in (0, 5)]
        first, other = journal.answers(CheckpointGenerator(checkpoint), again)
        assert first == found[0][1] != other
        assert (journal.known, journal.asked) == (1, 1)


def test_another_model_in_its_place_is_asked_anew(checkpoint, streams, tmp_path):
    """An answer is known by what wrote it: the weights wherever they lie, and the template."""

    def answer(folder, template="auto"):
        with Journal(tmp_path / "journal") as journal:
            (found,) = journal.answers(CheckpointGenerator(folder, template=template), [asked(1)])
        return found.text, journal.asked

    place = tmp_path / "model"
    shutil.copytree(checkpoint, place)
    first = answer(place)
    assert first[1] == 1
    assert answer(place, "mistral-v1") == answer(checkpoint) == (first[0], 0)  # what auto stands for; a copy
    other = answer(place, "alpaca")
    shutil.rmtree(place)
    again = answer(save(place, streams, 2))
    assert other[1] == again[1] == 1
    assert len({text for text, _ in (first, other, again)}) == 3


def test_a_text_too_long_is_refused_alone(checkpoint, tmp_path):
    long = Request("long", ({"role": "user", "content": "fever " * 200},), 8)
    with Journal(tmp_path / "journal") as journal:
        answers = list(journal.answers(CheckpointGenerator(checkpoint), [asked(0), long, asked(1)]))
    assert [bool(answer.refused) for answer in answers] == [False, True, False]
    assert "and 8 new ones exceed the model's 120 positions" in answers[1].refused


def test_on_the_command_line(checkpoint, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("A fever.")
    (tmp_path / "prompt.txt").write_text("Ask: {document}")
    command = f"rewrite {tmp_path}/notes.txt --output {tmp_path}/out.jsonl --prompt {tmp_path}/prompt.txt"
    assert main([*command.split(), f"--model={checkpoint}", "--max-tokens=9"]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/out.jsonl: nothing to write: no answer was of use (cut short:" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "out.jsonl.journal", "prompt.txt"]
    assert main([*command.split(), f"--model={tmp_path}"]) == 1
    assert "expected a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["rewrite"],
        ["instruct"],
        ["instruct", "--max-tokens=9", "--answer-tokens=120"],
        ["instruct", "--max-tokens=9", "--answer-tokens=120", "--answer-model={0}"],
    ],
)
def test_a_model_with_too_few_positions_is_an_error_at_once(checkpoint, tmp_path, capsys, options):
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "Explain a fever.", "text": "A fever."}')
    command, *options = (option.format(checkpoint) for option in options)
    inputs = [f"{tmp_path}/seeds.jsonl", f"--output={tmp_path}/out.jsonl"]
    assert main([command, *inputs, f"--model={checkpoint}", *options]) == 1
    said = r"has 120 positions, which \d+ tokens of an answer leave no prompt in; ask for fewer \(--max-tokens"
    assert re.search(said, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["seeds.jsonl"]


def test_any_other_generator_will_do(checkpoint, tmp_path):
    """What a checkpoint is asked through is what an endpoint is: rewrite knows neither."""
    (tmp_path / "notes.txt").write_text("A fever.")
    generator = CheckpointGenerator(checkpoint)
    with pytest.raises(DataError, match="refused: .*and 200 new ones exceed"):
        rewrite([tmp_path / "notes.txt"], tmp_path / "out.jsonl", generator, max_tokens=200, progress=False)
