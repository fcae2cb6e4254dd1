"""Answers as lines and back, the table of their metrics, and runs compared."""

from __future__ import annotations

import json

import pytest

from tokenmill.trainer.evaluate import report
from tokenmill.trainer.evaluate.answers import Answer, Vote
from tokenmill.trainer.evaluate.tasks import Question

RUN = {"strategy": "zero-shot", "by": "letter", "seed": 0}
LABELS = ("fever", "pain", "rash")


def choices(*predictions: int | None, shots: int = 0) -> list[Answer]:
    """Answers to as many questions, of which the right one is 0, 1, 2, 0, ..."""
    return [
        Answer(
            Question(f"{i}?", LABELS, i % 3, f"f:{i}"),
            prediction,
            0.9,
            shots,
            (Vote("…", prediction, logprobs=(-1.0, -2.0, -3.0)),),
        )
        for i, prediction in enumerate(predictions)
    ]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_lines_hold_every_prompt_and_answer(tmp_path):
    question = Question("Which?", (), -1, "f:1", ("fever", "a fever of 39 °C"))
    votes = (Vote([{"role": "user", "content": "Which?"}], "Fever.", generated="Fever."), Vote("Q", None, generated=""))
    rows = report.to_rows([Answer(question, "Fever.", 0.5, 2, votes)], RUN)
    path = tmp_path / "a.jsonl"
    path.write_text(report.to_json(rows), encoding="utf-8")
    (row,) = report.read_runs([path])["a"]
    assert row == {
        "id": "f:1", "question": "Which?", "options": [], "answer": ["fever", "a fever of 39 °C"],
        "prediction": "Fever.", "correct": True, "confidence": 0.5, "rouge_l": 1.0, "shots": 2,
        "votes": [
            {"prompt": votes[0].prompt, "choice": "Fever.", "generated": "Fever.", "forced": False},
            {"prompt": "Q", "generated": "", "forced": False},
        ],
        "run": RUN,
    }  # fmt: skip
    assert "°" in path.read_text(encoding="utf-8")


def test_metrics_of_choices():
    rows = report.to_rows(choices(0, 1, 1, None), RUN)
    by_name = {metric.name: metric for metric in report.metrics(rows)}
    assert list(by_name) == ["accuracy", "macro-F1", "calibration error"]
    head, _, line = cells(report.table({"run one": rows}))
    assert head == ["run", "accuracy", "macro-F1", "calibration error"]
    assert line[:2] == ["run one", "0.500 (0.000 to 1.000)"]
    assert line[2].startswith("0.444 (")  # of fever, pain and rash 2/3, 2/3 and 0
    assert line[3].startswith("0.400 (")
    assert report.summary(rows) == "zero-shot by letter, chance 0.333, 4 questions"


def test_metrics_follow_what_is_there():
    rows = report.to_rows(choices(0, 1), RUN)
    rows[1]["options"] = ["fever", "pain", "itch"]
    assert [m.name for m in report.metrics(rows)] == ["accuracy", "calibration error"]
    rows[0]["confidence"] = None
    assert [m.name for m in report.metrics(rows)] == ["accuracy"]
    question = choices(0)[0].question
    votes = [Vote("…", 0, generated="A"), Vote("…", 0, generated="? A", forced=True), Vote("…", None, generated="?")]
    generated = report.to_rows([Answer(question, 0, 2 / 3, 4, tuple(votes))], RUN)
    found = {m.name: m for m in report.metrics(generated)}
    assert found["answered"].questions.tolist() == [[1 / 3]]
    assert "4 shots" in report.summary(generated)
    mixed = [*generated, *report.to_rows(choices(0, shots=2), RUN)]
    assert "2 to 4 shots" in report.summary(mixed)


def test_metrics_of_open_questions():
    answers = [
        Answer(
            Question("Which?", (), -1, f"f:{i}", references), said, None, 0, (Vote("…", said, generated=said or ""),)
        )
        for i, (references, said) in enumerate([(("a b c d", "x y"), "Y x y"), (("one",), "One!"), (("one",), None)])
    ]
    exact, rouge = report.metrics(report.to_rows(answers, RUN))
    assert (exact.name, exact.questions[:, 0].tolist()) == ("exact match", [0, 1, 0])
    assert rouge.name == "ROUGE-L"
    assert rouge.questions[:, 0].tolist() == pytest.approx([2 * 2 / 5, 1, 0])
    assert "chance" not in report.summary(report.to_rows(answers, RUN))


def test_runs_are_compared_on_the_same_questions():
    base = report.to_rows(choices(*[0, 1, 1, 1] * 30), RUN)
    better = report.to_rows(choices(*[i % 3 for i in range(120)]), RUN)
    first, second = report.tables({"base": base, "better": better, "same": base}).split("\n\n")
    assert [line[0] for line in cells(first)[2:]] == ["base", "better", "same"]
    head, _, ours, none = cells(second)
    assert head == ["difference", "accuracy", "macro-F1", "calibration error"]
    assert ours[0] == "better - base"
    assert none == ["same - base", *["0.000 (0.000 to 0.000)"] * 3]
    accuracy = sum(row["correct"] for row in base) / 120
    assert ours[1].startswith(f"{1 - accuracy:.3f} (0.")
    bars = [[i for i, character in enumerate(line) if character == "|"] for line in second.splitlines()]
    assert all(b == bars[0] for b in bars)
    with pytest.raises(ValueError, match="base has 120 questions, few 3: compare runs of one file"):
        report.comparison({"base": base, "few": base[:3]})
    other = [*base[:7], {**base[7], "question": "another"}, *base[8:]]
    with pytest.raises(ValueError, match=r"their lines 8 differ in 'question' \(f:7, f:7\)"):
        report.comparison({"base": base, "other": other})


def test_names_of_runs(tmp_path):
    line = report.to_json(report.to_rows(choices(0), RUN))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text(line)
    assert list(report.read_runs([tmp_path / "a" / "x.jsonl"])) == ["x"]
    both = [tmp_path / folder / "x.jsonl" for folder in ("a", "b")]
    assert list(report.read_runs(both)) == [str(path) for path in both]
    (tmp_path / "y.jsonl").write_text(line + json.dumps({"question": "?"}))
    with pytest.raises(
        ValueError, match=r"y\.jsonl:2: the key 'id' is missing: expected a file that tokenmill eval wrote"
    ):
        report.read_runs([tmp_path / "y.jsonl"])


def test_outputs_that_cannot_be(tmp_path):
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(ValueError, match=r"x\.jsonl: is there already"):
        report.check_output(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match=r"x\.txt: expected a file that ends in \.jsonl"):
        report.check_output(tmp_path / "x.txt")
    report.check_output(tmp_path / "new" / "x.jsonl")
