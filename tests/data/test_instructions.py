"""Instruction data from a made-up model: what is read from its answers, dropped and kept, and that a run can be killed
at any moment without a trace in what it ends with."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.data.errors import DataError
from tokenmill.data.fields import read_records
from tokenmill.data.instructions import FIELDS, IDLE, instruct, read_seeds
from tokenmill.data.journal import Answer, Request
from tokenmill.data.prepare import prepare
from tokenmill.data.rewrite import rewrite, split
from tokenmill.data.rouge import rouge_l
from tokenmill.data.synthesis import fill, read_prompt

WORDS = "compare list describe causes treatment of acute renal failure in adults with fever before and after surgery"


class Model:
    """A generator whose answers are a function of the request: tasks, answers or a question, now and then spoilt."""

    identity = "made up"

    def __init__(self, width: int = 4, stop_after: int | None = None) -> None:
        self.width = width
        self.pending: list[Request] = []
        self.requests: list[Request] = []
        self.stop_after = stop_after
        self.order = random.Random(width)

    @property
    def free(self) -> bool:
        return len(self.pending) < self.width

    def submit(self, request: Request) -> None:
        self.pending.append(request)

    def collect(self) -> list[tuple[Request, Answer]]:
        """Any one of those that it has, in its own order."""
        if len(self.requests) == self.stop_after:
            raise KeyboardInterrupt
        request = self.pending.pop(self.order.randrange(len(self.pending)))
        self.requests.append(request)
        return [(request, self.answer(request))]

    def answer(self, request: Request) -> Answer:
        text = request.messages[-1]["content"]
        draw = random.Random(sha256(f"{text} {request.seed}".encode()).digest())
        spoilt = draw.random()
        if spoilt < 0.1:
            return Answer("", refused="status 400, 'filtered'")
        if spoilt < 0.2:
            return Answer("As a model, I cannot." * (spoilt < 0.15))
        if "new tasks" in text:
            tasks = [f"### Task {i}\nTopic: t{i}\nInstruction: {self.words(draw)}\nInput: none" for i in range(4)]
            tasks.append(f"### Task\nInstruction: Explain what {draw.choice(WORDS.split())} asthma is.\nInput: a text")
            return Answer("Sure!\n\n" + "\n\n".join(tasks), whole=spoilt > 0.3)
        if "Question:" in text:
            return Answer(
                f"**Question:** Why {self.words(draw)}?\n\n**Answer:** {self.words(draw)}", whole=spoilt > 0.3
            )
        return Answer(f"<think>so</think>\n{self.words(draw)}", whole=spoilt > 0.3)

    def words(self, draw: random.Random) -> str:
        return " ".join(draw.choices(WORDS.split(), k=draw.randrange(5, 12)))


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {
            "instruction": "Explain what asthma is.",
            "input": "",
            "output": "not shown",
            "topic": "Lungs",
            "difficulty": 1,
        },
        {"instruction": "Classify the finding.", "input": "Blood pressure {count} 180/110", "type": "Classification"},
        {"instruction": "Explain cardiac failure in children", "view": "Student"},
        {"instruction": "List three drugs that lower blood sugar", "input": "<noinput>"},
    ]
    (tmp_path / "seeds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "seeds.jsonl"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tasks_answers_rows(seeds, tmp_path, small):
    model, out = Model(), tmp_path / "out.jsonl"
    report = instruct([seeds], out, model, tasks=60, shots=3, progress=False)
    rows = lines(out)
    tasks = [r for r in model.requests if r.name.startswith("task")]
    answers = [r for r in model.requests if r.name.startswith("answer")]
    assert len({r.seed for r in tasks}) == len(tasks)
    assert {(r.temperature, r.max_tokens) for r in tasks} == {(1.0, 4096)}
    assert {(r.temperature, r.max_tokens) for r in answers} == {(0.0, 2048)}
    first = tasks[0].messages[0]["content"]
    assert "Write 10 new tasks" in first
    assert first.count("### Task") == 1 + 3  # the form, and three seed tasks
    assert "not shown" not in first
    shown = " ".join(r.messages[0]["content"] for r in tasks)
    assert "Topic: Lungs\nDifficulty: 1\nInstruction: Explain what asthma is.\nInput: none" in shown
    assert "Blood pressure {count} 180/110" in shown
    assert len({re.findall("Instruction: (.*)", r.messages[0]["content"])[1] for r in tasks}) == 4
    assert any(r.messages[0]["content"].endswith(f"\n\n{rows[0]['instruction']}\n") for r in answers)
    # What is there resembles nothing else that is there, and what is missing is in the report.
    instructions = [row["instruction"] for row in lines(seeds) + rows]
    assert max(rouge_l(a, b) for i, a in enumerate(instructions) for b in instructions[:i]) <= 0.7
    assert all(set(row) == {"topic", "instruction", "input", "output"} for row in rows)
    assert not any("think" in row["output"] or not row["output"] for row in rows)
    assert report.counts["tasks accepted"] == report.counts["answer requests"] == 60
    reasons = ["refused", "no task in the answer", "cut short", "empty answer", "like another task"]
    assert set(report.dropped) == set(reasons)
    assert report.counts["rows written"] == len(rows)
    assert report.counts["tasks read"] == 60 + report.dropped["like another task"]
    assert len(prepare([out], small, tmp_path / "stream", source_key="topic", progress=False)) == len(rows)
    assert str(report).isprintable() or all(line.isprintable() for line in str(report).splitlines())


def test_any_width_and_any_stops_end_with_the_same_rows(seeds, tmp_path):
    expected = tmp_path / "1.jsonl"
    alone = Model(1)
    instruct([seeds], expected, alone, tasks=30, progress=False)
    for width in (3, 16):
        out = tmp_path / f"{width}.jsonl"
        asked: list[str] = []
        for stop in (0, 1, 5, 7, 20, None):
            model = Model(width, stop)
            try:
                instruct([seeds], out, model, tasks=30, progress=False)
            except KeyboardInterrupt:
                assert not out.exists()
            asked += [str(r) for r in model.requests if not model.answer(r).refused]
        assert out.read_bytes() == expected.read_bytes()
        assert len(asked) == len(set(asked))  # none twice
        needed = {str(r) for r in alone.requests}
        assert len(set(asked) - needed) <= 2 * width  # little beyond what one at a time asks for


def test_more_tasks_and_another_threshold_ask_for_the_new_only(seeds, tmp_path):
    out = tmp_path / "out.jsonl"
    first = Model()
    instruct([seeds], out, first, tasks=20, progress=False)
    twenty = lines(out)
    with pytest.raises(DataError, match="out.jsonl: already exists"):
        instruct([seeds], out, first, tasks=40, progress=False)
    second = Model()
    report = instruct([seeds], out, second, tasks=40, overwrite=True, progress=False)
    assert lines(out)[: len(twenty)] == twenty
    assert not {str(r) for r in first.requests if not first.answer(r).refused} & {str(r) for r in second.requests}
    assert f"answers from {out}.journal" in str(report)
    instruct([seeds], tmp_path / "strict.jsonl", Model(), tasks=20, threshold=0.4, progress=False)
    instructions = [row["instruction"] for row in lines(tmp_path / "strict.jsonl")]
    assert max(rouge_l(a, b) for i, a in enumerate(instructions) for b in instructions[:i]) <= 0.4


def test_what_is_cut_short_is_not_kept(seeds, tmp_path):
    class Cut(Model):
        def answer(self, request: Request) -> Answer:
            text = request.messages[-1]["content"]
            if "new tasks" in text:
                return Answer(
                    "Instruction: whole\nInput: none\nInstruction: also good\nInstruction: cut of", whole=False
                )
            return Answer("A beginning", whole="whole" not in text)

    report = instruct([seeds], tmp_path / "out.jsonl", Cut(1), tasks=3, progress=False)
    assert lines(tmp_path / "out.jsonl") == [{"instruction": "also good", "input": "", "output": "A beginning"}]
    assert report.counts["tasks accepted"] == 2
    assert report.dropped["cut short"] == report.counts["task requests"] + 1
    assert report.examples["cut short"] == repr(str({"instruction": "cut of"}))


def test_another_model_answers(seeds, tmp_path):
    tasks, answers = Model(), Model()
    answers.identity = "another"
    instruct([seeds], tmp_path / "out.jsonl", tasks, answerer=answers, tasks=5, progress=False)
    assert all(r.name.startswith("task") for r in tasks.requests)
    assert len(answers.requests) == 5


def test_a_model_that_has_no_more_to_say(seeds, tmp_path):
    class Parrot(Model):
        def answer(self, request: Request) -> Answer:
            return Answer(
                '[{"instruction": "Say \\u001b[31m something else"}]' if "new tasks" in str(request) else "Well"
            )

    model = Parrot()
    report = instruct([seeds], tmp_path / "out.jsonl", model, tasks=10, progress=False)
    assert len([r for r in model.requests if "task" in r.name]) <= IDLE + 1 + 2 * model.width
    assert lines(tmp_path / "out.jsonl") == [
        {"instruction": "Say \x1b[31m something else", "input": "", "output": "Well"}
    ]
    assert "only 1 were made" in str(report)
    assert "\x1b" not in str(report)


def test_a_model_that_says_nothing_of_use(seeds, tmp_path):
    class Mute(Model):
        def answer(self, request: Request) -> Answer:
            return Answer("\x1bGreat question!")

    with pytest.raises(DataError, match=r"nothing to write: .*no task in the answer: '\\x1bGreat question!'"):
        instruct([seeds], tmp_path / "out.jsonl", Mute(), progress=False)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "x"}, "seeds.jsonl:1: 'instruction' is missing or empty"),
        ({"instruction": " - "}, "seeds.jsonl:1: 'instruction' is missing or empty"),
        ({"instruction": ["x"]}, "seeds.jsonl:1: 'instruction' is a list, expected a string"),
        ({"instruction": "x", "topic": {"a": 1}}, "seeds.jsonl:1: 'topic' is a dict, expected a string"),
    ],
)
def test_wrong_seeds(tmp_path, row, message):
    (tmp_path / "seeds.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        read_seeds([tmp_path / "seeds.jsonl"])


def test_wrong_arguments(seeds, tmp_path):
    model = Model()
    with pytest.raises(DataError, match=r"out.txt: expected a name that ends in .jsonl"):
        instruct([seeds], tmp_path / "out.txt", model)
    with pytest.raises(DataError, match=r"has no \{count\}"):
        instruct([seeds], tmp_path / "out.jsonl", model, prompt="{examples}")
    with pytest.raises(DataError, match=r"has no \{document\}"):
        rewrite([seeds], tmp_path / "out.jsonl", model, prompt="{examples}")
    with pytest.raises(DataError, match="out.jsonl: there is no folder .*/none: make it first"):
        rewrite([seeds], tmp_path / "none" / "out.jsonl", model)
    with pytest.raises(DataError, match="threshold is 7: expected a ROUGE-L"):
        instruct([seeds], tmp_path / "out.jsonl", model, threshold=7)
    with pytest.raises(DataError, match="temperature is -1: expected 0"):
        instruct([seeds], tmp_path / "out.jsonl", model, temperature=-1)
    (tmp_path / "prompt.txt").write_bytes(b"{document} \xff")
    with pytest.raises(DataError, match="prompt.txt: not UTF-8"):
        read_prompt(tmp_path / "prompt.txt", "document")
    (tmp_path / "prompt.txt").unlink()
    with pytest.raises(DataError, match="prompt.txt: no such prompt"):
        read_prompt(tmp_path / "prompt.txt", "document")
    with pytest.raises(DataError, match="seed is -1"):
        instruct([seeds], tmp_path / "out.jsonl", model, seed=-1)
    assert not model.requests
    assert [p.name for p in tmp_path.iterdir()] == ["seeds.jsonl"]


def read(text: str) -> list[dict[str, str]]:
    return read_records(text, FIELDS, "task")


FORMS = {
    "as asked": "### Task\nTopic: t\nInstruction: do a\nand b\nInput: none\n\n### Task\nTopic: u\nInstruction: do c\n",
    "bold": "Here you are:\n\n**Task 1:**\n**Topic:** t\n**Instruction**: do a\nand b\n- **Input:** none\n---\n"
    "**Task 2:**\n**Topic**: u\n**Instruction:** do c\n\n***\n",
    "numbered": "1. Topic: t\nInstruction: do a\nand b\nInput: none\n\n2. Topic: u\nInstruction: do c\n3.",
    "plain": "topic: t\nINSTRUCTION:do a\nand b\ninput:none\ntopic: u\ninstruction: do c",
    "JSON": '[{"topic": "t", "instruction": "do a\\nand b", "input": "none"}, {"Topic": "u", "Instruction": "do c"}]',
    "JSON in prose": 'Sure:\n```json\n{"tasks": [{"topic": "t", "instruction": "do a\\nand b", "input": "none"},\n'
    '{"topic": "u", "instruction": "do c"}]}\n```\nAnything else?',
    "JSON lines": '{"topic": "t", "instruction": "do a\\nand b", "input": "none"}\n'
    '{"topic": "u", "instruction": "do c"}',
}


@pytest.mark.parametrize("form", FORMS)
def test_tasks_are_read_in_many_forms(form):
    assert read(FORMS[form]) == [
        {"topic": "t", "instruction": "do a\nand b", "input": "none"},
        {"topic": "u", "instruction": "do c"},
    ]


def test_labels_within_a_text_belong_to_it():
    note = "Doctor's note\nType: 2 diabetes\nView: chest, from behind\n1. iron\n2. rest\nBP 120/80"
    text = f"### Task\nTopic: t\nType: q\nInstruction: sum up\nInput: {note}\nOutput: solved\n### Task\nTopic: u"
    assert read(text) == [
        {"topic": "t", "type": "q", "instruction": "sum up", "input": note, "output": "solved"},
        {"topic": "u"},
    ]
    answer = "Question: why?\nAnswer: as follows.\nAnswer: is also a word\n2. two"
    expected = {"question": "why?", "answer": "as follows.\nAnswer: is also a word\n2. two"}
    assert read_records(answer, ("question", "answer"), "pair") == [expected]


PIECES = ["\n", " ", "#", "*", "1.", "task", "topic", "instruction:", "input", ":", "[", "{", '"', "a"]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_nothing_that_a_model_writes_is_an_error(text):
    for record in read(text):
        assert set(record) <= set(FIELDS)


NONSENSE = [
    "[" * 10**5,
    "[" * 10**5 + "]" * 10**5,
    "task" + " " * 10**6 + "x",
    "\n" * 10**6,
    "#" * 10**6,
    "input:" * 10**5,
]


@pytest.mark.parametrize("text", NONSENSE)
def test_long_nonsense_is_read_at_once(text):
    begin = time.process_time()
    (record,) = read(f"Instruction: a\n{text}\nOutput: b")
    assert set(record) <= {"instruction", "input", "output"}
    assert time.process_time() - begin < 2


def test_values_are_not_searched_for_places():
    assert fill("{a} {b} {c} {}", a="{b}", b="{a}\\1") == "{b} {a}\\1 {c} {}"


def documents(folder: Path, texts: Sequence[str]) -> Path:
    (folder / "web.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder / "web.jsonl"


def test_documents_are_rewritten(tmp_path, small):
    texts = [f"Text {i}. " + "It goes on and on. " * (60 if i == 3 else 1) for i in range(40)]
    model, out = Model(), tmp_path / "out.jsonl"
    report = rewrite([documents(tmp_path, texts)], out, model, characters=400, progress=False)
    rows = lines(out)
    names = sorted(r.name.split("web.jsonl")[1] for r in model.requests)
    assert [name for name in names if ":4" in name and "part" in name] == [f":4, part {i} of 3" for i in (1, 2, 3)]
    assert len(model.requests) == len({r.messages for r in map(frozen, model.requests)})
    assert all(row["instruction"].startswith("Why ") and row["source"] == "web" for row in rows)
    assert set(report.dropped) == {"refused", "no question in the answer", "cut short"}
    assert report.counts["requests"] == len(rows) + report.dropped.total() == 42
    assert len(prepare([out], small, tmp_path / "stream", source_key="source", progress=False)) == len(rows)
    again = Model(9)
    rewrite([tmp_path / "web.jsonl"], out, again, characters=400, overwrite=True, progress=False)
    assert lines(out) == rows
    assert len(again.requests) == report.dropped["refused"]
    rewrite([tmp_path / "web.jsonl"], tmp_path / "few.jsonl", few := Model(), limit=7, characters=9999, progress=False)
    assert len(few.requests) == 7


def frozen(request: Request) -> Request:
    messages: Any = tuple(tuple(sorted(message.items())) for message in request.messages)
    return Request(request.name, messages, request.max_tokens)


def test_repeated_rows_are_left_out(tmp_path):
    class Same(Model):
        def answer(self, request: Request) -> Answer:
            return Answer("Question: What is it?\nAnswer: The same as ever.")

    report = rewrite([documents(tmp_path, ["a", "b"])], tmp_path / "out.jsonl", Same(), progress=False)
    assert len(lines(tmp_path / "out.jsonl")) == 1
    assert report.dropped == {"like an earlier row": 1}


def test_rows_know_their_source_and_halves_are_left_out(tmp_path):
    class Echo(Model):
        def answer(self, request: Request) -> Answer:
            document = request.messages[-1]["content"].strip().split("\n")[-1]
            spoilt = {"half": "Question: why?", "empty": "Question:\nAnswer: so", "cut": "Question: one\nAnswer: o"}
            return Answer(spoilt.get(document, f"Question: {document}?\nAnswer: yes"), whole=document != "cut")

    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(20)))
    inputs = [tmp_path / "one.jsonl", documents(tmp_path, ["half", "empty", "cut"]), tmp_path / "two.jsonl"]
    report = rewrite(inputs, tmp_path / "out.jsonl", Echo(8), progress=False)
    expected = [(f"{name} {i}?", name) for name in ("one", "two") for i in range(20)]
    assert [(row["instruction"], row["source"]) for row in lines(tmp_path / "out.jsonl")] == expected
    assert report.dropped == {"without a question or an answer": 2, "cut short": 1}


def test_conversations_are_no_documents(tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    with pytest.raises(DataError, match=r"chat.jsonl:1: a conversation, expected a document under the key 'text'"):
        rewrite([tmp_path / "chat.jsonl"], tmp_path / "out.jsonl", Model(), progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["chat.jsonl"]


@given(st.one_of(st.text("ab. \n", max_size=300), st.text("ab", max_size=300)), st.integers(8, 60))
def test_parts_of_a_document(text, characters):
    parts = list(split(text, characters))
    assert all(0 < len(part) <= characters for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())
    if "  " not in text and "\n" not in text:
        assert len(parts) <= 1 + 3 * len(text) // characters


def test_parts_end_where_a_paragraph_does():
    paragraphs = ["One. " * 20, "Two. " * 30, "Three. " * 15]
    assert list(split("\n\n".join(paragraphs), 200)) == [p.strip() for p in paragraphs]


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from test_instructions import Model
from tokenmill.data.instructions import instruct
class Slow(Model):
    def collect(self):
        time.sleep(0.01)
        return super().collect()
instruct([{seeds!r}], {out!r}, Slow(3), tasks=40, progress=False)
"""


def test_killed_at_random_moments(seeds, tmp_path):
    out = tmp_path / "out.jsonl"
    code = CHILD.format(tests=str(Path(__file__).parent), seeds=str(seeds), out=str(out))
    for i in range(20):
        process = subprocess.Popen([sys.executable, "-c", code])
        journal = Path(f"{out}.journal")
        before = journal.stat().st_size if journal.exists() else 0
        while process.poll() is None and (
            not journal.exists() or journal.stat().st_size < before + 4000 + 1999 * (i % 3)
        ):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
    else:
        pytest.fail("never came to an end")
    assert i > 1
    instruct([seeds], tmp_path / "expected.jsonl", Model(1), tasks=40, progress=False)
    assert out.read_bytes() == (tmp_path / "expected.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path)) == [
        "expected.jsonl", "expected.jsonl.journal", "out.jsonl", "out.jsonl.journal", "seeds.jsonl"
    ]  # fmt: skip
