"""Pairwise judging by a made-up judge behind a server on this machine: what it is asked, what its words come to, and
that a run can be stopped and begun again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tokenmill.data.errors import DataError
from tokenmill.trainer.cli import main
from tokenmill.trainer.evaluate.judge import read_answers, read_verdict

Words = Callable[[str, str, str], str | None]  # of a task and the answers as shown; None: the server is broken


@pytest.fixture
def serve() -> Iterator[Callable[[Words], tuple[str, list[str]]]]:
    """A function from what a judge says to its server's address and the list of what it was asked."""
    servers = []

    def start(words: Words) -> tuple[str, list[str]]:
        seen: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                seen.append(text)
                task, rest = text.split("=== Task ===\n")[1].split("\n\n=== Answer 1 ===\n")
                first, second = rest.rstrip("\n").split("\n\n=== Answer 2 ===\n")
                said = words(task, first, second)
                choice = {"message": {"content": said}, "finish_reason": "length" if said == "cut" else "stop"}
                content = json.dumps({"choices": [choice]}).encode()
                self.send_response(200 if said is not None else 401)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def write(path: Path, answers: list[str], prompts: list[str] | None = None) -> Path:
    """As `generate --json` writes them."""
    prompts = prompts or [f"prompt {i}" for i in range(len(answers))]
    rows = [
        {"prompt": i, "sample": 0, "text": text, "tokens": 3, "stopped": True, "row": {"prompt": prompt}}
        for i, (prompt, text) in enumerate(zip(prompts, answers, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def by_length(task: str, first: str, second: str) -> str:
    """A judge that likes the longer answer, and of equal ones the first."""
    return f"They differ in {{first}}.\n**Verdict:** {1 if len(first) >= len(second) else 2}"


def command(folder: Path, url: str, *more: str) -> list[str]:
    files = [f"{folder}/a.jsonl", f"{folder}/b.jsonl"]
    return ["judge", *files, "--endpoint", url, "--model=m", f"--output={folder}/out.jsonl", *more]


def test_both_orders_and_ties_half(tmp_path, serve, capsys):
    url, seen = serve(by_length)
    write(tmp_path / "a.jsonl", ["long {second} answer", "a", "four", "the same", "long as well", "x"])
    write(tmp_path / "b.jsonl", ["short", "longer", "five", "the same", "no", "yy"])
    assert main(command(tmp_path, url)) == 0
    # Won, lost, a place's win, the same, won, lost: (1 + 0 + 1/2 + 1/2 + 1 + 0) / 6.
    printed = capsys.readouterr().out
    first = printed.splitlines()[0]
    assert first.startswith("win rate           0.500 (")
    assert first.endswith(f" of {tmp_path}/a.jsonl")
    for line in ("pairs the same     1", "won in both        2", "lost in both       2", "first place won    1"):
        assert line in printed
    assert "verdicts           10" in printed
    assert len(seen) == 10
    assert "long {second} answer" in seen[0]  # an answer's braces are its own
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [1, 0, 0.5, 0.5, 1, 0]
    assert rows[2]["scores"] == [1, 0]
    assert rows[2]["verdicts"] == [by_length("", "four", "five")] * 2
    assert rows[3]["verdicts"] == []
    assert [row["a"] for row in rows][:2] == ["long {second} answer", "a"]
    # The files the other way round: the rate is what is left of 1.
    (tmp_path / "a.jsonl").rename(tmp_path / "c.jsonl")
    (tmp_path / "b.jsonl").rename(tmp_path / "a.jsonl")
    (tmp_path / "c.jsonl").rename(tmp_path / "b.jsonl")
    assert main(command(tmp_path, url, "--overwrite")) == 0
    assert "0 requests made, 10 answers from" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [0, 1, 0.5, 0.5, 0, 1]


def test_unreadable_verdicts_have_no_score(tmp_path, serve, capsys):
    said = {"p0": "Verdict: 1", "p1": "I cannot say.", "p2": "cut", "p3": "Verdict: 1 or 2"}

    def words(task: str, first: str, second: str) -> str:
        return said[task] if first.startswith("a") else "Verdict: 2"

    url, _ = serve(words)
    write(tmp_path / "a.jsonl", [f"a{i}" for i in range(4)], [f"p{i}" for i in range(4)])
    write(tmp_path / "b.jsonl", [f"b{i}" for i in range(4)], [f"p{i}" for i in range(4)])
    assert main(command(tmp_path, url)) == 0
    printed = capsys.readouterr().out
    assert "win rate           1.000 (1.000 to 1.000)" in printed
    assert "pairs judged       1" in printed
    assert "2 dropped, no verdict in the answer, such as 'I cannot say.'" in printed
    assert "1 dropped, cut short before a verdict" in printed
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [1, None, None, None]
    assert rows[1]["scores"] == [None, 1]


def test_goes_on_where_it_stopped(tmp_path, serve, capsys):
    answers = [f"answer {'x' * i}" for i in range(12)]
    write(tmp_path / "a.jsonl", answers)
    write(tmp_path / "b.jsonl", answers[::-1])
    left = [9]

    def stops(task: str, first: str, second: str) -> str | None:
        left[0] -= 1
        return by_length(task, first, second) if left[0] >= 0 else None  # then the key is refused

    url, seen = serve(stops)
    assert main(command(tmp_path, url, "--concurrency=2")) == 1
    assert "status 401" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    kept = len((tmp_path / "out.jsonl.journal").read_text().splitlines())
    assert kept == 9
    seen.clear()
    left[0] = 100
    assert main(command(tmp_path, url)) == 0
    assert len(seen) == 24 - kept
    assert f"{24 - kept} requests made, {kept} answers" in capsys.readouterr().out
    whole = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "out.jsonl.journal").unlink()
    assert main(command(tmp_path, url, "--overwrite", "--concurrency=1")) == 0
    assert (tmp_path / "out.jsonl").read_text() == whole


def test_a_prompt_of_ones_own(tmp_path, serve, capsys):
    write(tmp_path / "a.jsonl", ["one"])
    write(tmp_path / "b.jsonl", ["two two"])
    (tmp_path / "p.txt").write_text(
        "Rate {{these}}.\n=== Task ===\n{task}\n\n=== Answer 1 ===\n{first}\n\n=== Answer 2 ===\n{second}\n"
    )
    url, seen = serve(by_length)
    assert main(command(tmp_path, url, f"--prompt={tmp_path}/p.txt")) == 0
    assert seen[0].startswith("Rate {{these}}.\n")
    (tmp_path / "p.txt").write_text("{task} {first}")
    assert main(command(tmp_path, url, f"--prompt={tmp_path}/p.txt", "--overwrite")) == 1
    assert "p.txt: has no {second}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Verdict: 1", 1),
        ("First verdict: 1. On reflection...\nVerdict: 2", 0),
        ("**Final Verdict:**\n\n[[Tie]]", 0.5),
        ("verdict is a draw.", 0.5),
        ("Verdict: Answer 2, as it is safe", 0),
        ("Both are good.\n\n**2**", 0),
        ("It is so.\ntie.", 0.5),
        ("Verdict: 1 or 2", None),
        ("Verdict: 1/2", None),
        ("Verdict: 12", None),
        ("Answer 2 is better", None),
        ("Verdict:", None),
        ("", None),
    ],
)
def test_verdicts(text, score):
    assert read_verdict(text) == score


EVAL = {"question": "Q?", "options": ["x", "y"], "votes": [{"generated": "B", "choice": 1}]}
SAMPLES = EVAL | {
    "votes": [
        {"generated": "C, by force", "choice": 2, "forced": True},
        {"generated": "A, by force", "choice": 0, "forced": True},
        {"generated": "no idea", "forced": False},
        {"generated": "B, I conclude", "choice": 1, "forced": False},
        {"generated": "B again", "choice": 1, "forced": False},
        {"generated": "A, at last", "choice": 0, "forced": False},
    ]
}


def test_both_kinds_of_files(tmp_path):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    for row, expected in [
        (EVAL, ("Q?\nA. x\nB. y", "B")),
        (EVAL | {"options": []}, ("Q?", "B")),
        (SAMPLES | {"prediction": 1}, ("Q?\nA. x\nB. y", "B, I conclude")),  # the first of the majority's
        (SAMPLES | {"prediction": 0}, ("Q?\nA. x\nB. y", "A, at last")),  # one that was not forced, if there is one
        (SAMPLES | {"prediction": 2}, ("Q?\nA. x\nB. y", "C, by force")),
        (SAMPLES | {"prediction": None}, ("Q?\nA. x\nB. y", "no idea")),
        ({"text": "yes", "row": {"instruction": "Do", "input": "this"}}, ("Do\n\nthis", "yes")),
        ({"text": "", "row": {"messages": messages}}, ("system: Be kind.\n\nuser: Hi", "")),
        ({"text": "yes", "row": {"messages": messages[1:]}}, ("Hi", "yes")),
    ]:
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        assert read_answers(tmp_path / "a.jsonl") == [(f"{tmp_path}/a.jsonl:1", *expected)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "no more"}, "a.jsonl:1: its keys are 'text'; expected a line of `generate --json`"),
        (EVAL | {"votes": [{"logprobs": [1, 2]}]}, "a.jsonl:1: has no text under 'votes[].generated'"),
        (EVAL | {"votes": 3}, "a.jsonl:1: has no text under 'votes[].generated'"),
        (EVAL | {"votes": []}, "a.jsonl:1: has no text under 'votes[].generated'"),
        (EVAL | {"votes": [3]}, "a.jsonl:1: has no text under 'votes[].generated'"),
        (EVAL | {"votes": [{"generated": "B", "order": [1, 0]}]}, "a.jsonl:1: its options were shuffled"),
        ({"text": 3, "row": {"prompt": "a"}}, "a.jsonl:1: has no text under 'text'"),
        ({"text": "a", "row": {}}, "a.jsonl:1: has no prompt"),
        ({"text": "a", "row": [1]}, "a.jsonl:1: has no prompt"),
    ],
)
def test_other_files(tmp_path, row, said):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError) as error:
        read_answers(tmp_path / "a.jsonl")
    assert said in str(error.value)


def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, capsys):
    write(tmp_path / "a.jsonl", ["a", "b"])
    for prompts, said in [
        (["prompt 0", "other"], "a.jsonl:2 and"),
        (["prompt 0"], "a.jsonl has 2 answers,"),
    ]:
        write(tmp_path / "b.jsonl", ["c"] * len(prompts), prompts)
        assert main(command(tmp_path, "http://127.0.0.1:9/v1")) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    write(tmp_path / "b.jsonl", ["c", "d"])
    assert main(command(tmp_path, "http://127.0.0.1:9/v1")) == 1
    assert "cannot be reached" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]
