"""Questions from files: each shape of row, and what is said of rows that are none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tokenmill.trainer.evaluate.tasks import load_questions

DATA = Path(__file__).parents[3] / "shared" / "data"
MEDQA = DATA / "medqa_us_test.jsonl.gz"
ROW = {"question": "Which is red?", "options": {"A": "sky", "B": "blood", "C": "grass"}, "answer": "B"}
MCQ = {"question": "Red?", "opa": "sky", "opb": "blood", "opc": "grass", "opd": "ice", "cop": 1, "exp": "..."}
PUBMED = {"pubid": 7, "question": "Do statins help?", "context": {"contexts": ["We asked.", "They did."], "labels": []}}
LABEL = {"text": "It hurts.", "label": "pain"}
ASKED = {"question": "Which dose?", "context": "He takes 5 mg.", "answers": ["5 mg", "five milligrams"]}


def written(folder: Path, *rows: object) -> Path:
    path = folder / "questions.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_reads_plain_and_compressed_alike(tmp_path):
    plain = written(tmp_path, ROW, "", {**ROW, "answer": "C", "source": "ignored"})
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
    assert questions[0].reply == "Tell the attending that he cannot fail to disclose this mistake"


@pytest.mark.skipif(not DATA.exists(), reason="the shared data is not here")
def test_reads_conversations():
    (first, *_), medquad = (
        load_questions(DATA / f"{name}.jsonl.gz") for name in ("mts_dialog_messages", "medquad_alpaca")
    )
    assert first.question.startswith(
        "You write sections of clinical notes.\n\nSummarize this conversation as the GENHX"
    )
    assert first.options == ()
    assert len(first.references) == 1
    assert len(medquad) == 16359


def test_medqa_in_its_authors_form(tmp_path):
    row = {**ROW, "answer": "blood", "answer_idx": "B", "meta_info": "step1"}
    (question,) = load_questions(written(tmp_path, row))
    assert question.answer == 1
    assert question.reply == "blood"


@pytest.mark.parametrize(("cops", "answers"), [((0, 3, 1), [0, 3, 1]), ((1, 4, 2), [0, 3, 1])])
def test_medmcqa_counts_from_0_or_from_1(tmp_path, cops, answers):
    questions = load_questions(written(tmp_path, *({**MCQ, "cop": cop} for cop in cops)))
    assert [q.answer for q in questions] == answers
    assert questions[0].options == ("sky", "blood", "grass", "ice")


@pytest.mark.parametrize("cops", [(1, 2, 3), (0, 4)])
def test_medmcqa_that_does_not_tell(tmp_path, cops):
    with pytest.raises(
        ValueError, match=r"questions\.jsonl:1: the key 'cop' counts from 0 or from 1, and the file does"
    ):
        load_questions(written(tmp_path, *({**MCQ, "cop": cop} for cop in cops)))


def test_pubmedqa(tmp_path):
    rows = [{**PUBMED, "final_decision": decision} for decision in ("maybe", "yes", "no")]
    questions = load_questions(written(tmp_path, *rows))
    assert questions[0].question == "We asked.\n\nThey did.\n\nDo statins help?"
    assert [q.reply for q in questions] == ["maybe", "yes", "no"]
    assert {q.options for q in questions} == {("yes", "no", "maybe")}


def test_classification(tmp_path):
    rows = [LABEL, {**LABEL, "label": "fever", "instruction": "Name the complaint."}]
    first, second = load_questions(written(tmp_path, *rows))
    assert first.question == "Which label describes this text?\n\nIt hurts."
    assert second.question == "Name the complaint.\n\nIt hurts."
    assert first.options == second.options == ("fever", "pain")
    assert (first.reply, second.reply) == ("pain", "fever")


def test_open_questions(tmp_path):
    (asked,) = load_questions(written(tmp_path, ASKED))
    assert asked.question == "He takes 5 mg.\n\nWhich dose?"
    assert asked.references == ("5 mg", "five milligrams")
    assert (asked.options, asked.answer, asked.reply) == ((), -1, "5 mg")
    (alone,) = load_questions(written(tmp_path, {"question": "Which dose?", "answers": "5 mg"}))
    assert (alone.question, alone.references) == ("Which dose?", ("5 mg",))
    (summary,) = load_questions(written(tmp_path, {"text": "A long story.", "summary": "A story."}))
    assert (summary.question, summary.references) == ("Summarise this text.\n\nA long story.", ("A story.",))
    (alpaca,) = load_questions(written(tmp_path, {"instruction": "Name it.", "input": "red", "output": "blood"}))
    assert (alpaca.question, alpaca.references) == ("Name it.\n\nred", ("blood",))


@pytest.mark.parametrize(
    ("good", "line", "said"),
    [
        (ROW, "{", "not JSON"),
        (ROW, "[1]", "a list, expected an object"),
        (ROW, {"question": "?", "options": {"A": "x", "B": "y"}}, "'answer' is missing"),
        (ROW, {**ROW, "options": ["x", "y"]}, "'options' holds a list, expected dict"),
        (ROW, {**ROW, "question": " "}, "'question' is empty"),
        (ROW, {**ROW, "options": {"B": "y"}}, "at least two"),
        (ROW, {**ROW, "options": {"A": "x", "B": " "}}, "not empty"),
        (ROW, {**ROW, "options": {"A": "x", "B": 2}}, "not empty"),
        (ROW, {**ROW, "answer": "E"}, "'answer' is 'E', which is none of A, B, C"),
        (ROW, {**ROW, "answer": ["B"]}, "'answer' holds a list, expected str"),
        (ROW, LABEL, "'question' is missing"),
        ({**MCQ, "cop": 0}, {**MCQ, "cop": -1}, "'cop' is -1, which is none of 0, 1, 2, 3"),
        ({**MCQ, "cop": 0}, {**MCQ, "cop": "1"}, "'cop' holds a str, expected int"),
        ({**MCQ, "cop": 0}, {**MCQ, "opd": ""}, "'opd' is empty"),
        ({**PUBMED, "final_decision": "no"}, {**PUBMED, "final_decision": "perhaps"}, "none of yes, no, maybe"),
        ({**PUBMED, "final_decision": "no"}, {**PUBMED, "context": {}}, "'context' must hold a text or several"),
        (LABEL, {"text": "It hurts."}, "'label' is missing"),
        (ASKED, {**ASKED, "answers": []}, "'answers' must hold a text or several"),
        (ASKED, {**ASKED, "answers": 5}, "'answers' must hold a text or several"),
        ({"text": "x", "summary": "y"}, {"text": "x", "summary": " "}, "'summary' is empty"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}, "'output' is empty"),
        (
            {"instruction": "a", "output": "b"},
            {"messages": [{"role": "user", "content": "a"}]},
            "must hold one user's message and one assistant's",
        ),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path, good, line, said):
    path = written(tmp_path, good, line)
    with pytest.raises(ValueError, match=said) as raised:
        load_questions(path)
    assert str(raised.value).startswith(f"{path}:2: ")
    assert "\n" not in str(raised.value)


def test_a_bad_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"questions\.jsonl: holds no question"):
        load_questions(written(tmp_path, ""))
    with pytest.raises(
        ValueError, match=r"questions\.jsonl:1: its keys are 'prompt'; expected those of one of question"
    ):
        load_questions(written(tmp_path, {"prompt": "?"}))
    with pytest.raises(ValueError, match="every 'label' of the file is 'pain'"):
        load_questions(written(tmp_path, LABEL, LABEL))
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file"):
        load_questions(tmp_path / "nowhere.jsonl")
    packed = gzip.compress("\n".join([json.dumps({**ROW, "question": f"{i}?"}) for i in range(99)]).encode())
    for damaged in (packed[:-30], b"not gzip", packed[:40] + bytes([packed[40] ^ 255]) + packed[41:]):
        path = tmp_path / "damaged.jsonl.gz"
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged\.jsonl\.gz"):
            load_questions(path)
