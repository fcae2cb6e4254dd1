"""A model's answers: read from what it generated, put back in the file's order, and joined to one by a majority."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tokenmill.trainer.evaluate.prompts import Style, Text, letters
from tokenmill.trainer.evaluate.tasks import Question

CONCLUSION = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*:)", re.IGNORECASE)
CONCLUDED = re.compile(r"\W*(?:(?i:option|choice|letter)\W+)?([A-Z])\b(?!['-])")  # "(B)", "B because"
LETTER = re.compile(r"\W*([A-Z])(?:[.):,*\]]|\s*(?:\n|$))")  # "B", "B. blood"; but not "A boy", "B-cells"
# A word as in data/words.py, or a sign that tells answers apart. A minus is one before a word, behind it or in brackets
# ("-5", "Cl-", "(-)"); a hyphen between words ("beta-blocker", "3-5"), a dash and a bullet are not.
WORD = re.compile(r"(?:(?<![\w-])-)?[^\W_]+|(?<=[\w(])-(?![\w-])|[+<>≤≥↑↓%]")


@dataclass(frozen=True)
class Vote:
    """One prompt and what the model made of it."""

    prompt: Text
    choice: int | str | None  # the option, by its index in the file; of an open question the words; None: no answer
    order: tuple[int, ...] | None = None  # the options as the prompt listed them, by their indices in the file
    logprobs: tuple[float, ...] | None = None  # of the options in the file's order, nats
    generated: str | None = None
    forced: bool = False  # the chain of thought came to no answer: the letter is the likeliest after "The answer is"


@dataclass(frozen=True)
class Answer:
    question: Question
    prediction: int | str | None
    confidence: float | None  # None: the one answer was generated
    shots: int  # in its prompts
    votes: tuple[Vote, ...]

    @property
    def correct(self) -> bool:
        """Whether it is the right option, or the words of a right answer."""
        return is_right(self.question, self.prediction)


def is_right(question: Question, prediction: int | str | None) -> bool:
    if question.options or prediction is None:
        return prediction == question.answer
    return any(normal(str(prediction)) == normal(reference) for reference in question.references)


def normal(text: str) -> tuple[str, ...]:
    """What counts of an answer: words and signs, but neither case nor punctuation nor layout (unless there is nothing
    else)."""
    return tuple(WORD.findall(text.lower().replace("\N{MINUS SIGN}", "-"))) or (text.strip(),)


def read(generated: str, question: Question, style: Style) -> int | str | None:
    """The answer in a generated text: the option's index as listed, or the words; None where there is none.

    Of a choice, it is the option whose text or letter follows the last "answer is"; without that, the one whose letter
    (or text, where it looks like a letter) begins the answer; else the only option whose text occurs. Options that
    `normal` makes equal are told apart by their letters alone. A chain of thought's answer follows its last "answer
    is": without one a choice has none, and an open question's is the last line.
    """
    concluded = list(CONCLUSION.finditer(generated))
    told = generated[concluded[-1].end() :].strip() if concluded else generated.strip()
    if not question.options:
        if not style.reason:
            return generated.strip() or None
        return (told if concluded else told.splitlines()[-1] if told else "") or None
    if style.reason and not concluded:
        return None
    listed = letters(question)
    options = [" ".join(normal(option)) for option in question.options]
    # An option that is itself a letter of the list (a point in a figure) is known by no text: the prompt asks for a
    # letter, so "C" is what stands beside C. Nor is one known by a text that others share.
    places = {
        option: i if options.count(option) == 1 else None
        for i, option in enumerate(options)
        if option.upper() not in tuple(listed)
    }
    text = f" {' '.join(normal(told))} "
    found = (CONCLUDED if concluded else LETTER).match(told)
    begun = [option for option in places if text.startswith(f" {option} ")]
    if begun and (found or concluded):  # before the letter: "C. difficile colitis" and "A loud S1" begin like one
        return places[max(begun, key=len)]
    if found and found[1] in listed:
        return listed.index(found[1])
    named = [option for option in places if f" {option} " in text]
    # "diabetes insipidus" names diabetes as well: the longer one is meant.
    meant = [
        option for option in named if not any(option != other and f" {option} " in f" {other} " for other in named)
    ]
    return places[meant[0]] if len(meant) == 1 else None


def majority(votes: Sequence[Vote]) -> tuple[int | str | None, float]:
    """The answer that most votes came to by themselves, and the share of all votes that did: those that are forced, or
    without an answer, count against it (samples without an answer have no vote in Wang et al. 2022). Where there are
    forced ones alone, the answer is theirs and its share 0: the model never concluded it.

    A tie goes to the answer that was voted for first. That favours no option where the order of the options differs
    from vote to vote, as the lowest letter would. Answers in words agree where they are equal as `normal` sees them.
    """
    answered = [vote for vote in votes if vote.choice is not None]
    concluded = [vote for vote in answered if not vote.forced]
    voted = [vote.choice for vote in concluded or answered]
    if not voted:
        return None, 0.0
    keys = [normal(choice) if isinstance(choice, str) else choice for choice in voted]
    key, count = Counter(keys).most_common(1)[0]  # of equal counts, the one met first
    return voted[keys.index(key)], count / len(votes) if concluded else 0.0
