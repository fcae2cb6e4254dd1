"""A task: questions read from a file, each with options to choose from or with an answer in free words.

| shape | keys of a row | becomes |
| --- | --- | --- |
| MedQA | `question`, `options` (an object: letter to text), `answer` (a letter) or `answer_idx` | a choice |
| MedMCQA | `question`, `opa`, `opb`, `opc`, `opd`, `cop` (0 to 3, or 1 to 4) | a choice |
| PubMedQA | `question`, `context` (with `contexts`, a list of texts), `final_decision` | a choice of yes, no, maybe |
| classification | `text`, `label`, perhaps `instruction` | a choice of the labels in the file |
| extraction | `question`, `answers` (a text or several that are right), perhaps `context` | an open question |
| summary | `text`, `summary`, perhaps `instruction` | an open question |
| instruction | an Alpaca row, or `messages`: a user's and the assistant's, perhaps the system's | an open question |

All rows of a file have one shape; other keys are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenmill.data.chat import alpaca_messages, parse
from tokenmill.data.documents import find_inputs, pieces, rows
from tokenmill.data.errors import DataError

DECISIONS = ("yes", "no", "maybe")  # PubMedQA's
CLASSIFY = "Which label describes this text?"
SUMMARISE = "Summarise this text."


@dataclass(frozen=True)
class Question:
    question: str
    options: tuple[str, ...]  # in the order of the file: A, B, ...; none: an open question
    answer: int  # index of the right option; -1 of an open question
    id: str  # file and line, for messages
    references: tuple[str, ...] = ()  # of an open question: the answers that are right

    @property
    def reply(self) -> str:
        """A right answer in words."""
        return self.options[self.answer] if self.options else self.references[0]


def load_questions(path: str | Path) -> list[Question]:
    """Read the questions of a file, `.jsonl` (also `.gz`, `.zst`) or `.parquet`, in its order; or those of a folder's
    or a pattern's files, as of one.

    Raises DataError, which names file, line and key, where a row is not such a question, or the file holds none.
    """
    found = [_Row(*row) for file in find_inputs([path]) for piece in pieces(file) for row in rows(piece)]
    if not found:
        raise DataError(f"{path}: holds no question; expected one JSON object a line")
    for keys, read in _SHAPES.items():
        if all(key in found[0].values for key in keys):
            return read(found)
    raise DataError(
        f"{found[0].where}: its keys are {', '.join(map(repr, found[0].values)) or 'none'}; expected those of one of "
        f"{'; '.join(', '.join(keys) for keys in _SHAPES)}"
    )


class _Row(NamedTuple):
    where: str
    values: dict[str, Any]

    def get(self, key: str, kind: type) -> Any:
        if key not in self.values:
            raise DataError(f"{self.where}: the key {key!r} is missing, which rows of its shape have")
        if type(self.values[key]) is not kind:
            found = type(self.values[key]).__name__
            raise DataError(f"{self.where}: the key {key!r} holds a {found}, expected {kind.__name__}")
        return self.values[key]

    def text(self, key: str, default: str | None = None) -> str:
        if default is not None and not self.values.get(key):
            return default
        if not (text := self.get(key, str)).strip():
            raise DataError(f"{self.where}: the key {key!r} is empty")
        return text

    def texts(self, key: str, values: Sequence[Any], at_least: int) -> tuple[str, ...]:
        if len(values) < at_least or not all(isinstance(text, str) and text.strip() for text in values):
            count = "at least two texts" if at_least == 2 else "a text or several"
            raise DataError(f"{self.where}: the key {key!r} must hold {count} that are not empty")
        return tuple(values)

    def choice(self, question: str, options: Sequence[str], key: str, letters: Sequence[Any]) -> Question:
        """The question whose right option is the one that `key` names, of so many `letters`."""
        answer = self.values.get(key)
        if answer not in letters:
            named = ", ".join(map(str, letters))
            raise DataError(f"{self.where}: the key {key!r} is {answer!r}, which is none of {named}")
        return Question(question, tuple(options), letters.index(answer), self.where)


def _medqa(found: list[_Row]) -> list[Question]:
    questions = []
    for row in found:
        question, options = row.text("question"), row.get("options", dict)
        texts = row.texts("options", list(options.values()), 2)
        # The authors' own release has the right option's text under `answer`, and its letter here.
        key = "answer_idx" if "answer_idx" in row.values else "answer"
        row.get(key, str)
        questions.append(row.choice(question, texts, key, list(options)))
    return questions


def _medmcqa(found: list[_Row]) -> list[Question]:
    """Hugging Face's files count the right option from 0, the authors' own from 1: the file as a whole tells which."""
    named = {row.get("cop", int): row.where for row in reversed(found)}
    first = 0 if 0 in named else 1
    if (0 in named) == (4 in named):
        raise DataError(
            f"{found[0].where}: the key 'cop' counts from 0 or from 1, and the file does not tell: expected that some "
            f"row holds 0, or some row 4, and not both (found {', '.join(map(str, sorted(named)))})"
        )
    questions = []
    for row in found:
        options = [row.text(key) for key in ("opa", "opb", "opc", "opd")]
        questions.append(row.choice(row.text("question"), options, "cop", list(range(first, first + 4))))
    return questions


def _pubmedqa(found: list[_Row]) -> list[Question]:
    questions = []
    for row in found:
        contexts = row.get("context", dict).get("contexts")
        parts = row.texts("context", contexts if isinstance(contexts, list) else [], 1)
        question = "\n\n".join([*parts, row.text("question")])
        questions.append(row.choice(question, DECISIONS, "final_decision", DECISIONS))
    return questions


def _classification(found: list[_Row]) -> list[Question]:
    labels = sorted({row.text("label") for row in found})
    if len(labels) < 2:
        raise DataError(f"{found[0].where}: every 'label' of the file is {labels[0]!r}: expected at least two")
    asked = [f"{row.text('instruction', CLASSIFY)}\n\n{row.text('text')}" for row in found]
    return [row.choice(question, labels, "label", labels) for row, question in zip(found, asked, strict=True)]


def _extraction(found: list[_Row]) -> list[Question]:
    questions = []
    for row in found:
        answers = row.values["answers"] if "answers" in row.values else row.get("answers", list)
        references = row.texts("answers", answers if isinstance(answers, list) else [answers], 1)
        question = "\n\n".join(filter(None, [row.text("context", ""), row.text("question")]))
        questions.append(Question(question, (), -1, row.where, references))
    return questions


def _summary(found: list[_Row]) -> list[Question]:
    return [
        Question(
            f"{row.text('instruction', SUMMARISE)}\n\n{row.text('text')}", (), -1, row.where, (row.text("summary"),)
        )
        for row in found
    ]


def _instruction(found: list[_Row]) -> list[Question]:
    questions = []
    for row in found:
        try:
            system, turns = parse(row.values["messages"] if "messages" in row.values else alpaca_messages(row.values))
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None
        if [turn.role for turn in turns] != ["user", "assistant"]:
            raise DataError(f"{row.where}: the key 'messages' must hold one user's message and one assistant's")
        # The templates put the system prompt before the user's text, with this between.
        question = f"{system}\n\n{turns[0].text}" if system else turns[0].text
        questions.append(Question(question, (), -1, row.where, (turns[1].text,)))
    return questions


_SHAPES: dict[tuple[str, ...], Callable[[list[_Row]], list[Question]]] = {
    ("question", "options"): _medqa,
    ("question", "opa"): _medmcqa,
    ("question", "final_decision"): _pubmedqa,
    ("question", "answers"): _extraction,
    ("text", "label"): _classification,
    ("text", "summary"): _summary,
    ("instruction", "output"): _instruction,
    ("messages",): _instruction,
}
