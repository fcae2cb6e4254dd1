"""A checkpoint that answers requests: the same answer in any company, and what it cannot take is refused."""

import pytest

from tokenmill.data.errors import DataError
from tokenmill.data.journal import Journal, Request
from tokenmill.data.rewrite import rewrite
from tokenmill.trainer.checkpoint import save_checkpoint
from tokenmill.trainer.cli import main
from tokenmill.trainer.generator import CheckpointGenerator
from tokenmill.trainer.model import ModelConfig, Transformer


@pytest.fixture(scope="module")
def checkpoint(streams, tmp_path_factory):
    config = ModelConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=320, max_positions=120
    )
    model = Transformer(config)
    model.initialise(1)
    folder = tmp_path_factory.mktemp("generator") / "model"
    save_checkpoint(folder, model, tokenizer_from=streams)
    return folder


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


def test_any_other_generator_will_do(checkpoint, tmp_path):
    """What a checkpoint is asked through is what an endpoint is: rewrite knows neither."""
    (tmp_path / "notes.txt").write_text("A fever.")
    generator = CheckpointGenerator(checkpoint)
    with pytest.raises(DataError, match="refused by the server"):
        rewrite([tmp_path / "notes.txt"], tmp_path / "out.jsonl", generator, max_tokens=200, progress=False)
