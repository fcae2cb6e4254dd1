"""Evaluations that are stopped, and go on from the replies that were kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tokenmill.data.tokenizer import train_tokenizer
from tokenmill.trainer.checkpoint import save_checkpoint
from tokenmill.trainer.cli import main
from tokenmill.trainer.evaluate import replies
from tokenmill.trainer.evaluate.replies import Replies
from tokenmill.trainer.model import ModelConfig, Transformer
from tokenmill.trainer.model.generate import stream

COLOURS = ("red", "green", "blue", "white")
SAMPLED = ("--strategy=self-consistency", "--votes=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two tiny models, questions, and others to take shots from: the chains of thought of some have an answer."""
    folder = tmp_path_factory.mktemp("replies")
    texts = [f"What is as {colour} as {i}? The answer is {'ABCD'[i % 4]}." for i in range(30) for colour in COLOURS]
    train_tokenizer(texts, 320, folder / "tokenizer.model")
    shape = ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=320)
    for name, seed in {"model": 0, "other": 1}.items():
        model = Transformer(shape)
        model.initialise(seed)
        save_checkpoint(folder / name, model, tokenizer_from=folder)
    options = dict(zip("ABCD", COLOURS, strict=True))
    for name, numbers in {"questions": range(12), "shots": range(20, 40)}.items():
        rows = [{"question": f"What is {i}?", "options": options, "answer": "ABCD"[i % 4]} for i in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def command(folder: Path, output: Path, *options: str, model: str = "model") -> list[str]:
    given = [str(folder / model), str(folder / "questions.jsonl"), f"--output={output}", "--tokens-per-batch=400"]
    return ["eval", *given, "--max-new-tokens=20", *options]


def medprompt(folder: Path) -> list[str]:
    return ["--strategy=medprompt", f"--shots={folder}/shots.jsonl", "--votes=3", "--k=2"]


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How many prompts the model was asked, a number each time."""
    counts: list[int] = []

    def counted(model, prompts, **options):
        counts.append(len(prompts))
        return stream(model, prompts, **options)

    monkeypatch.setattr(replies, "stream", counted)
    return counts


def stop_after(monkeypatch, steps: int) -> None:
    def stopped(model, prompts, **options):
        for i, step in enumerate(stream(model, prompts, **options)):
            if i == steps:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(replies, "stream", stopped)


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import tokenmill.trainer.commands, tokenmill.trainer.evaluate.strategies, tokenmill.trainer.inference
from tokenmill.trainer.cli import main

kept, draw = Path(sys.argv[1]), random.Random(7)
for _ in range(5):
    size = kept.stat().st_size if kept.exists() else 0
    child = os.fork()
    if not child:
        os._exit(main(sys.argv[2:]))
    while not kept.exists() or kept.stat().st_size <= size:  # there is more to come than in so short a time
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("strategy", ["self-consistency", "medprompt"])
def test_killed_at_random_moments(folder, tmp_path, strategy):
    options = SAMPLED if strategy == "self-consistency" else medprompt(folder)
    killed = command(folder, tmp_path / "a.jsonl", *options)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / ".a.jsonl.replies"), *killed],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(set(done.stderr.splitlines())) > 4, "each run knew more"
    assert main(command(folder, tmp_path / "b.jsonl", *options)) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


@pytest.fixture
def stopped(folder, tmp_path, monkeypatch) -> Path:
    """The file of a sampled run that was stopped in its middle."""
    with monkeypatch.context() as patch:
        stop_after(patch, 70)
        assert main(command(folder, tmp_path / "a.jsonl", *SAMPLED)) == 130
    return tmp_path / ".a.jsonl.replies"


def test_only_what_is_missing_is_asked(folder, tmp_path, stopped, asked, capsys):
    known = len(stopped.read_bytes().splitlines())
    assert 0 < known < 12
    kept = stopped.read_bytes()
    with stopped.open("ab") as file:
        file.write(kept.splitlines()[0][:50])  # as a process that is killed while it writes leaves it
    capsys.readouterr()
    assert main(command(folder, tmp_path / "a.jsonl", *SAMPLED)) == 0
    assert capsys.readouterr().err == f"going on: {3 * known} of 36 replies known\n"
    assert asked == [12 - known]
    assert not stopped.exists()
    assert main(command(folder, tmp_path / "whole.jsonl", *SAMPLED)) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert capsys.readouterr().err == ""
    # Stopped again after a torn line, it reads what it wrote behind it.
    stopped.write_bytes(kept + kept[:50])
    with Replies(stopped, "") as again:
        again._record("new", [[1], [], [2]])
        assert stopped.read_bytes() == kept + b'{"key": "new", "ids": [[1], [], [2]]}\n'


@pytest.mark.parametrize(
    "change", [["--seed=1"], ["--temperature=0.8"], ["--votes=2"], ["--max-new-tokens=21"], ["--dtype=bf16"], "other"]
)
def test_what_decides_a_reply_is_part_of_its_name(folder, tmp_path, stopped, asked, change):
    options, model = ([], change) if isinstance(change, str) else (change, "model")
    assert main(command(folder, tmp_path / "a.jsonl", *SAMPLED, *options, model=model)) == 0
    assert asked == [12]


def test_greedy_replies_have_no_seed(folder, tmp_path, monkeypatch, asked):
    options = medprompt(folder)
    with monkeypatch.context() as patch:
        stop_after(patch, 100)
        assert main(command(folder, tmp_path / "a.jsonl", *options)) == 130
    known = len((tmp_path / ".a.jsonl.replies").read_bytes().splitlines())
    assert known
    assert main(command(folder, tmp_path / "a.jsonl", *options, "--seed=1")) == 0  # other orders, the same chains
    assert asked == [20 - known, 36]


def test_two_at_once(folder, tmp_path, capsys):
    with Replies(tmp_path / ".a.jsonl.replies", "") as first:
        first._record("x", [[1]])
        assert main(command(folder, tmp_path / "a.jsonl", *SAMPLED)) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("tokenmill: error: ")
        assert line.endswith(".a.jsonl.replies: is in use by another process, which writes the same output")
        assert first.path.exists()


def test_a_file_of_something_else(folder, tmp_path, capsys):
    for text in ("notes\n", '{"key": 1}\n', "[]\n"):
        (tmp_path / ".a.jsonl.replies").write_text(text)
        assert main(command(folder, tmp_path / "a.jsonl", *SAMPLED)) == 1
        assert ".a.jsonl.replies:1: holds no replies: remove the line" in capsys.readouterr().err
        assert (tmp_path / ".a.jsonl.replies").read_text() == text


def test_a_full_disk_names_the_file(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with Replies(tmp_path / "r", "") as kept:
        os.dup2(os.open("/dev/full", os.O_WRONLY), kept._file.fileno())
        with pytest.raises(OSError, match="No space left on device: '.*/r'"):
            kept._record("x", [[1]])


def test_without_an_output_nothing_is_kept(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Replies, "__init__", lambda *_: pytest.fail("replies are kept"))
    arguments = [a for a in command(Path("data"), Path("no"), *SAMPLED) if not a.startswith("--output")]
    assert main(arguments) == 0
    assert sorted(tmp_path.rglob("*")) == before
