"""Questions from files: MedQA's and our own, and what is said of rows that are none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tokenmill.trainer.evaluate.tasks import load_questions

MEDQA = Path(__file__).parents[3] / "shared" / "data" / "medqa_us_test.jsonl.gz"
ROW = {"question": "Which is red?", "options": {"A": "sky", "B": "blood", "C": "grass"}, "answer": "B"}


def written(folder: Path, *lines: str) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_reads_plain_and_compressed_alike(tmp_path):
    lines = [json.dumps(ROW), "", json.dumps({**ROW, "answer": "C", "source": "ignored"})]
    plain = written(tmp_path, *lines)
    packed = tmp_path / "questions.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    first, second = load_questions(plain)
    assert (first.question, first.options, first.answer) == ("Which is red?", ("sky", "blood", "grass"), 1)
    assert first.id == f"{plain}:1"
    assert second.id == f"{plain}:3"
    assert second.answer == 2
    assert [(q.question, q.options, q.answer) for q in load_questions(str(packed))] == [
        (q.question, q.options, q.answer) for q in (first, second)
    ]


@pytest.mark.skipif(not MEDQA.exists(), reason="the MedQA file is not here")
def test_reads_medqa():
    questions = load_questions(MEDQA)
    assert len(questions) == 1273
    assert all(len(q.options) == 4 for q in questions)
    assert (
        questions[0].options[questions[0].answer] == "Tell the attending that he cannot fail to disclose this mistake"
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON object, got list"),
        (json.dumps({"question": "?", "options": {"A": "x", "B": "y"}}), "'answer' is missing"),
        (json.dumps({**ROW, "options": ["x", "y"]}), "'options' must hold a dict, not a list"),
        (json.dumps({**ROW, "question": " "}), "'question' is empty"),
        (json.dumps({**ROW, "options": {"B": "y"}}), "at least two"),
        (json.dumps({**ROW, "options": {"A": "x", "B": " "}}), "not empty"),
        (json.dumps({**ROW, "options": {"A": "x", "B": 2}}), "not empty"),
        (json.dumps({**ROW, "answer": "E"}), "'answer' is 'E', which is none of A, B, C"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, said):
    path = written(tmp_path, json.dumps(ROW), line)
    with pytest.raises(ValueError, match=said) as raised:
        load_questions(path)
    assert str(raised.value).startswith(f"{path}:2: ")
    assert "\n" not in str(raised.value)


def test_a_bad_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"questions\.jsonl: holds no question"):
        load_questions(written(tmp_path, ""))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        load_questions(tmp_path / "nowhere.jsonl")
    packed = gzip.compress("\n".join([json.dumps({**ROW, "question": f"{i}?"}) for i in range(99)]).encode())
    for damaged in (packed[:-30], b"not gzip", packed[:40] + bytes([packed[40] ^ 255]) + packed[41:]):
        path = tmp_path / "damaged.jsonl.gz"
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged\.jsonl\.gz"):
            load_questions(path)
