"""A model's answers: read from what it generated, put back in the file's order, and joined to one by a majority."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tokenmill.data.words import words
from tokenmill.trainer.evaluate.prompts import Style, Text, letters
from tokenmill.trainer.evaluate.tasks import Question

CONCLUSION = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*:)", re.IGNORECASE)
CONCLUDED = re.compile(r"\W*(?:(?i:option|choice|letter)\W+)?([A-Z])\b(?!['-])")  # "(B)", "B because"
LETTER = re.compile(r"\W*([A-Z])(?:[.):,*\]]|\s*(?:\n|$))")  # "B", "B. blood"; but not "A boy", "B-cells"


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
    """What counts of an answer in words: neither case nor punctuation nor layout (unless there is nothing else)."""
    return tuple(words(text)) or (text.strip(),)


def read(generated: str, question: Question, style: Style) -> int | str | None:
    """The answer in a generated text: the option's index as listed, or the words; None where there is none.

    Of a choice, it is the option whose text is given; else a letter, after the last "answer is" or at the beginning;
    else the only option whose text occurs. A chain of thought's answer follows its last "answer is": without one a
    choice has none, and an open question's is the last line.
    """
    concluded = list(CONCLUSION.finditer(generated))
    told = generated[concluded[-1].end() :].strip() if concluded else generated.strip()
    if not question.options:
        if not style.reason:
            return generated.strip() or None
        return (told if concluded else told.splitlines()[-1] if told else "") or None
    if style.reason and not concluded:
        return None
    options = [" ".join(normal(option)) for option in question.options]
    text = " ".join(normal(told))
    if text in options:
        return options.index(text)
    if found := (CONCLUDED if concluded else LETTER).match(told):
        index = letters(question).find(found[1])
        if index >= 0:
            return index
    named = [option for option in options if f" {option} " in f" {text} "]
    # "diabetes insipidus" names diabetes as well: the longer one is meant.
    meant = {option for option in named if not any(option != other and option in other for other in named)}
    return options.index(meant.pop()) if len(meant) == 1 else None


def majority(votes: Sequence[Vote]) -> tuple[int | str | None, float]:
    """The answer that most votes agree on, and their share of all votes, those without an answer included.

    A tie goes to the answer that was voted for first. That favours no option where the order of the options differs
    from vote to vote, as the lowest letter would. Answers in words agree where they are equal as `normal` sees them.
    """
    voted = [vote.choice for vote in votes if vote.choice is not None]
    if not voted:
        return None, 0.0
    keys = [normal(choice) if isinstance(choice, str) else choice for choice in voted]
    key, count = Counter(keys).most_common(1)[0]  # of equal counts, the one met first
    return voted[keys.index(key)], count / len(votes)
