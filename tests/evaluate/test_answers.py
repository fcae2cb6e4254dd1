"""Answers read from generated text, and the vote among them."""

from __future__ import annotations

import pytest

from tokenmill.trainer.evaluate.answers import Vote, is_right, majority, normal, read
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


CAPITALS = [
    # of MedQA
    ("Cryptosporidiosis", "C. difficile colitis", "Bacillus cereus infection", "Norovirus infection"),
    ("Loud P2", "S3 gallop", "Absent S4", "A loud S1"),
    ("D cells", "G cells", "P/D1 cells", "L cells"),
    ("Neutrophil", "Human immunodeficiency virus", "B lymphocytes", "Macrophage"),
    (
        "An increase in right atrial pressure", "An increase in pulmonary capillary wedge pressure",
        "A reduction in the slope of the pacemaker potential", "A reduction in diastolic filling time",
    ),
    ("B-cell maturation", "V(D)J recombination", "Thymocyte formation", "Negative selection"),
    ("↓ ↓ ↓", "↑ ↓ normal", "↓ ↑ ↑", "↓ ↑ ↓"),
    ("LOD Score < 1", "LOD Score < 2", "LOD Score > 3", "LOD Score = 0"),
    ("T-score of 1.2", "T-score of -0.8", "Z-score of -2.0", "T-score of -1.6"),
    ("0.9% saline IV", "5% dextrose IV", "5% dextrose IV with 0.45% saline IV", "Oral free water replacement"),
    # made up
    ("B. fragilis", "E2", "Vitamin C", "C-reactive protein", "C. albicans", "E. coli"),
    ("T-score of 0.8", "T-score of -0.8", "LOD Score < 1", "LOD Score > 1", "5%", "5", "5 % dextrose"),
    ("A+", "A-", "B+", "B-", "AB+", "Group B strep"),
]  # fmt: skip


@pytest.mark.parametrize("reason", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        "The answer is {option}.", "The answer is {option}, given the history.", "The answer is {letter}.",
        "The answer is {letter}, given the history.", "The answer is {letter}. {option}", "The answer is ({letter})",
        "Answer: **({letter}) {option}**",
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", CAPITALS, ids=lambda options: options[0])
def test_options_that_begin_like_a_letter(options, form, reason):
    for i, (letter, option) in enumerate(zip("ABCDEFG", options, strict=False)):
        text = form.format(letter=letter, option=option)
        assert read(text, Question("Which?", options, 0, "q:3"), Style("generate", reason=reason)) == i


@pytest.mark.parametrize(
    ("options", "text", "option"),
    [
        # Points in a figure, of MedQA: the prompt lists them as "A. B", "B. C", ..., and asks for the first letter.
        (("B", "C", "D", "E"), "The answer is B.", 1),
        (("B", "C", "D", "E"), "C", 2),
        (("B", "C", "D", "E"), "The answer is D. E", 3),
        (("B", "C", "D", "E"), "The answer is E.", 3),  # no letter of the list
        (("A", "B", "C", "E"), "The answer is (E)", 3),
        (("Vitamin K", "C", "D", "A"), "The answer is C.", 2),
        (("Vitamin K", "C", "D", "A"), "I would give a lot of it.", None),  # an article is no option
        (("C. difficile", "C. difficile colitis", "X"), "C. difficile colitis, as there were antibiotics.", 1),
        (("iron", "zinc"), "The answer is iron, not zinc.", 0),
        (("iron", "environment"), "It is iron, or environment.", None),  # no longer name of the same thing
        # Nothing but case tells these apart: a text of theirs is no answer, nor one of the shorter option; a letter is.
        (("Iron deficiency", "iron deficiency", "iron"), "The answer is iron deficiency.", None),
        (("Iron deficiency", "iron deficiency", "iron"), "It is iron deficiency.", None),
        (("Iron deficiency", "iron deficiency", "iron"), "The answer is B. iron deficiency", 1),
        (("Iron deficiency", "iron deficiency", "iron"), "The answer is iron.", 2),
    ],
)
def test_letters_and_texts_that_clash(options, text, option):
    assert read(text, Question("Which?", options, 0, "q:4"), Style("generate")) == option


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


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("-5 mmol/l", "5 mmol/l"), ("↑ TSH", "↓ TSH"), ("↑ TSH", "TSH"), ("↓ TSH", "TSH"), ("+5", "-5"), ("+5", "5"),
        ("< 5 %", "5 %"), ("< 5", "> 5"), ("> 5", "5"), ("≤5", "5"), ("≥5", "5"), ("≤5", "≥5"), ("5%", "5"),
        ("Na+", "Na"), ("HCO3-", "HCO3"), ("A-", "A+"), ("ssRNA (-)", "ssRNA (+)"), ("ssRNA (-)", "ssRNA"),
        ("T-score of -0.8", "T-score of 0.8"),
    ],
)  # fmt: skip
def test_signs_tell_answers_apart(text, other):
    assert normal(text) != normal(other)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("beta-blocker", "Beta blocker"), ("3-5 mg", "3 5 mg"), ("-5 mmol/l", "\N{MINUS SIGN}5 mmol/l"), ("5 %", "5%"),
        ("iron - a metal", "iron, a metal"), ("- iron", "iron"), ("iron--a metal", "iron a metal"), ("↑TSH", "↑ tsh"),
        ("14-alpha-demethylase", "14 alpha demethylase"), ("---\niron", "iron"),
    ],
)  # fmt: skip
def test_layout_does_not(text, other):
    assert normal(text) == normal(other)


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


@pytest.mark.parametrize(
    ("concluded", "forced", "prediction", "share"),
    [
        ((1,), (0, 0, 0, 0), 1, 0.2),  # guesses have no vote beside a conclusion, and count against it
        ((2, 1, 1), (2, 2), 1, 0.4),
        ((1, None), (1, 1), 1, 0.25),  # those that agree were not come to either
        ((None,), (0, 3, 3), 3, 0.0),  # guesses alone
        ((), (2,), 2, 0.0),
    ],
)
def test_a_forced_guess_votes_only_where_there_is_no_other(concluded, forced, prediction, share):
    guesses = [Vote("", choice, forced=True) for choice in forced]
    assert majority([*votes(*concluded), *guesses]) == (prediction, share)
    assert majority([*guesses, *votes(*concluded)]) == (prediction, share)
