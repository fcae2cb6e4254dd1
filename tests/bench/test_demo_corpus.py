"""The demo's material: the same each time, nothing held out is trained on, and no question answers itself."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import simple_icd_10_cm as icd

from tokenmill.bench.demo import corpus
from tokenmill.trainer.evaluate.score import wilson
from tokenmill.trainer.evaluate.tasks import load_questions

SENTENCE = re.compile(r"(.+?)\. Category: (.+?)\. Chapter: (.+?)\.(?: |$)")
ASKED = re.compile(r'Which chapter does "(.+)" belong to\?')


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "text"
    counts = corpus.write(folder)
    assert counts == {path.name: len(path.read_text().splitlines()) for path in folder.iterdir()}
    return folder


@pytest.fixture(scope="module")
def home() -> dict[str, tuple[str, str]]:
    """Description -> (category, chapter), read from the classification by the shape of the codes alone."""
    found = {}
    for code in icd.get_all_codes(True):
        if re.fullmatch(r"[A-Z]\w\w(\.\w{1,3})?", code):
            chapter = icd.get_description(icd.get_ancestors(code)[-1])
            found[" ".join(icd.get_description(code).split())] = code[:3], re.sub(r" \([^()]*\)$", "", chapter)
    return found


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def named(folder: Path, name: str) -> list[tuple[str, str, str]]:
    """Every (code's description, category, chapter) of a clinical file."""
    return [found for row in rows(folder, name) for found in SENTENCE.findall(row["text"])]


def asked(text: str) -> str:
    match = ASKED.fullmatch(text)
    assert match, text
    return match[1]


def test_there_is_enough_of_each(folder):
    characters = {name: sum(len(row["text"]) for row in rows(folder, name)) for name in ("clinical", "general")}
    assert characters["clinical"] > 3_500_000  # about 5 characters a token of 4,096 pieces: 700,000 tokens
    assert characters["general"] > 200_000
    assert len(rows(folder, "clinical_heldout")) == 200
    assert len(rows(folder, "general_heldout")) > 20
    assert len(rows(folder, "tuning")) > 5000
    assert len(rows(folder, "questions")) == 500


def test_a_pure_function_of_the_seed(folder, tmp_path):
    corpus.write(tmp_path / "again")
    corpus.write(tmp_path / "other", seed=1)
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
        if not path.name.startswith("general"):
            assert (tmp_path / "other" / path.name).read_bytes() != path.read_bytes()


def test_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="text already exists"):
        corpus.write(folder)
    monkeypatch.setattr(corpus.json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        corpus.write(tmp_path / "text")
    assert not list(tmp_path.iterdir())


def test_clinical_documents_say_what_the_classification_says(folder, home):
    for name in ("clinical", "clinical_heldout"):
        for row in rows(folder, name):
            found = SENTENCE.findall(row["text"])
            assert 1 <= len(found) <= 3
            assert len({category for _, category, _ in found}) == 1
            assert sum(len(f"{c}. Category: {k}. Chapter: {h}. ") for c, k, h in found) == len(row["text"]) + 1
            for code, category, chapter in found:
                assert home[code][1] == chapter
                assert icd.get_description(home[code][0]) == category
    assert len({row["text"] for row in rows(folder, "clinical")}) == len(rows(folder, "clinical"))
    assert {home[code][0] for code, _, _ in named(folder, "clinical")} == {category for category, _ in home.values()}


def test_nothing_held_out_is_trained_on(folder, home):
    held_out = {code for code, _, _ in named(folder, "clinical_heldout")}
    assert not held_out & {code for code, _, _ in named(folder, "clinical")}
    taught = {asked(row["messages"][0]["content"]) for row in rows(folder, "tuning")}
    tested = {asked(row["question"]) for row in rows(folder, "questions")}
    assert not held_out & (taught | tested)
    assert not {home[code][0] for code in taught} & {home[code][0] for code in tested}
    paragraphs = {
        name: {p for row in rows(folder, name) for p in row["text"].split("\n")}
        for name in ("general", "general_heldout")
    }
    assert not paragraphs["general"] & paragraphs["general_heldout"]


def test_tuning_and_questions_are_answered_by_the_text(folder, home):
    told = {code: chapter for code, _, chapter in named(folder, "clinical")}
    for row in rows(folder, "tuning"):
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert told[asked(question["content"])] == answer["content"]
    for question in load_questions(folder / "questions.jsonl"):
        assert len(set(question.options)) == 4
        assert question.options[question.answer] == told[asked(question.question)]


def test_questions_cannot_be_answered_without_reading_them(folder, home):
    """Neither the letter nor the commonest chapter among the categories does better than chance."""
    questions = load_questions(folder / "questions.jsonl")
    size = Counter(chapter for _, chapter in dict.fromkeys(home.values()))
    largest = sum(max(q.options, key=lambda option: size[option]) == q.options[q.answer] for q in questions)
    letters = Counter(question.answer for question in questions)
    for right in (largest, *letters.values()):
        low, high = wilson(right, len(questions))
        assert low - 0.02 < 0.25 < high + 0.02


def test_general_text_is_plain(folder):
    for name in ("general", "general_heldout"):
        for row in rows(folder, name):
            assert len(row["text"]) <= corpus.PARAGRAPHS_TO + 1 or "\n" not in row["text"]
            for paragraph in row["text"].split("\n"):
                assert paragraph == " ".join(paragraph.split())
                assert re.search(r"[a-zA-Z0-9]", paragraph)
                assert not re.search(r"[*=+-]{5,}", paragraph[:40]), paragraph
