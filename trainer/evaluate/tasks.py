"""A task: multiple-choice questions read from a file."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenmill.data.errors import DataError


@dataclass(frozen=True)
class Question:
    question: str
    options: tuple[str, ...]  # in the order of the file: A, B, ...
    answer: int  # index of the right option
    id: str  # file and line, for messages


def load_questions(path: str | Path) -> list[Question]:
    """Read questions from JSON lines, gzip-compressed where the name ends in `.gz`.

    A row is MedQA's: `{"question": "...", "options": {"A": "...", "B": "..."}, "answer": "B"}`; other keys are ignored.

    Raises DataError, which names file, line and key, where a row is not such a question, or the file holds none;
    OSError where it cannot be read.
    """
    path = Path(path)
    questions: list[Question] = []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    questions.append(_question(line, f"{path}:{number}"))
        except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a whole {path.suffix} file of UTF-8 text: {error}") from error
    if not questions:
        raise DataError(f"{path}: holds no question; expected one JSON object a line")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); expected one question a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    for key, kind in {"question": str, "options": dict, "answer": str}.items():
        if key not in row:
            raise DataError(f"{where}: the key {key!r} is missing; expected question, options and answer")
        if not isinstance(row[key], kind):
            raise DataError(f"{where}: the key {key!r} must hold a {kind.__name__}, not a {type(row[key]).__name__}")
    options: dict[str, Any] = row["options"]
    if not row["question"].strip():
        raise DataError(f"{where}: the key 'question' is empty")
    if len(options) < 2 or not all(isinstance(text, str) and text.strip() for text in options.values()):
        raise DataError(f"{where}: the key 'options' must hold at least two texts that are not empty")
    if row["answer"] not in options:
        raise DataError(f"{where}: the key 'answer' is {row['answer']!r}, which is none of {', '.join(options)}")
    return Question(row["question"], tuple(options.values()), list(options).index(row["answer"]), where)
