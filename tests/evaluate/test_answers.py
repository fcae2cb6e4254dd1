"""Answers read from generated text, and the vote among them."""

from __future__ import annotations

import pytest

from tokenmill.trainer.evaluate.answers import Vote, is_right, majority, read
from tokenmill.trainer.evaluate.prompts import Style
from tokenmill.trainer.evaluate.tasks import Question

CHOICE = Question("Which?", ("diabetes", "diabetes insipidus", "C. difficile colitis", "B-cell lymphoma"), 1, "q:1")
OPEN = Question("Which?", (), -1, "q:2", ("3.5 mg of iron", "iron"))


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("B", 1), ("B.", 1), ("(C)", 2), (" D) B-cell lymphoma", 3), ("**A**", 0), ("B\nbecause", 1), ("B: yes", 1),
        ("diabetes insipidus", 1), ("Diabetes.", 0), ("C. difficile colitis", 2), ("B-cell lymphoma", 3),
        ("It is diabetes insipidus, surely.", 1), ("It is B-cell lymphoma.", 3),
        ("The answer is D because of B.", 3), ("Answer: C", 2), ("The answer is option B", 1),
        ("A 40-year-old man", None), ("", None), ("E", None), ("b", None), ("pneumonia", None),
        ("B-cell lymphoma or diabetes", None), ("nondiabetes", None), ("Because", None),
    ],
)  # fmt: skip
def test_a_choice_in_a_text(text, option):
    assert read(text, CHOICE, Style("generate")) == option


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("At first the answer is A. But no: the answer is B.", 1),
        ("B is wrong.\n\nThe answer is (C)", 2),
        ("So the answer is: **D**", 3),
        ("The answer is diabetes insipidus.", 1),
        ("The answer is B-cell lymphoma", 3),
        ("THE ANSWER IS C", 2),
        ("B", None),
        ("The answer is not known.", None),
        ("The answer is Z", None),
        ("A rash. The answer", None),
    ],
)
def test_a_choice_after_a_chain_of_thought(text, option):
    assert read(text, CHOICE, Style("generate", reason=True)) == option


def test_an_answer_in_words():
    assert read(" 3.5 mg \n", OPEN, Style("generate")) == "3.5 mg"
    assert read("  ", OPEN, Style("generate")) is None
    reasoned = Style("generate", reason=True)
    assert read("The pill is red.\nThe answer is iron.", OPEN, reasoned) == "iron."
    assert read("The pill is red.\nIron, then. \n", OPEN, reasoned) == "Iron, then."
    assert read("", OPEN, reasoned) is None


def test_what_is_right():
    assert is_right(CHOICE, 1)
    assert not is_right(CHOICE, 0)
    assert not is_right(CHOICE, None)
    assert is_right(OPEN, "Iron.")
    assert is_right(OPEN, " 3.5 MG, of iron")
    assert not is_right(OPEN, "35 mg of iron")
    assert not is_right(OPEN, "some iron")
    assert not is_right(OPEN, None)
    sign = Question("?", (), -1, "q:3", ("+",))
    assert is_right(sign, " + ")
    assert not is_right(sign, "-")


def votes(*choices: int | str | None) -> list[Vote]:
    return [Vote("", choice) for choice in choices]


@pytest.mark.parametrize(
    ("choices", "prediction", "share"),
    [
        ((1, 1, 1, 0, 2), 1, 0.6),  # the last answer, and the first of another order, would be wrong
        ((2, 1, 0, 1, 0, 1), 1, 0.5),
        ((3, 0, 0, 3, 2), 3, 0.4),  # a tie: the one voted for first, not the lowest and not the last
        ((0, 3, 3, 0, 2), 0, 0.4),
        ((2, None, None, None), 2, 0.25),  # no answer is no vote
        ((None, 0, 0, None, 1), 0, 0.4),
        ((None, None), None, 0.0),
        ((0,), 0, 1.0),
        (("Iron.", "zinc", "iron", "IRON"), "Iron.", 0.75),
    ],
)
def test_the_majority_wins(choices, prediction, share):
    assert majority(votes(*choices)) == (prediction, share)
