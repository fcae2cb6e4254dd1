"""Answers as JSON lines, as a table of metrics, and compared between runs.

A line holds a question with its right answer, the prediction, and each vote: the prompt, the order in which it listed
the options, their log-probabilities or the generated text, and the choice read from it. Options are named by their
index.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenmill.data.documents import find_inputs, pieces, rows
from tokenmill.data.errors import DataError
from tokenmill.data.rouge import rouge_l
from tokenmill.trainer.evaluate.answers import Answer
from tokenmill.trainer.evaluate.metrics import Metric, calibration_error, difference, estimate, macro_f1, mean
from tokenmill.trainer.evaluate.tasks import Question

Row = dict[str, Any]
KEYS = ("id", "question", "options", "answer", "prediction", "correct", "confidence", "shots", "votes", "run")
ASKED = ("question", "options", "answer")  # what two runs that are compared must have in common


def to_rows(answers: Sequence[Answer], run: Mapping[str, Any]) -> list[Row]:
    """A line an answer. `run` says how the answers came about, and is repeated in each, so that lines of several runs
    can be read as one table."""
    found = []
    for answer in answers:
        row = asked(answer.question)
        row |= {"prediction": answer.prediction, "correct": answer.correct, "confidence": answer.confidence}
        if references := answer.question.references:
            row["rouge_l"] = max(rouge_l(str(answer.prediction or ""), reference) for reference in references)
        votes = [{key: value for key, value in asdict(vote).items() if value is not None} for vote in answer.votes]
        found.append(row | {"shots": answer.shots, "votes": votes, "run": dict(run)})
    return found


def asked(question: Question) -> Row:
    """The part of a line that is known before the answer."""
    answer = question.answer if question.options else list(question.references)
    return {"id": question.id, "question": question.question, "options": list(question.options), "answer": answer}


def to_json(found: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)


def check_output(path: str | Path) -> None:
    """Before the work: raises ValueError where answers cannot be written to `path`, or would replace what is there."""
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(f"{path}: expected a file that ends in .jsonl, for answers as JSON lines")
    if path.exists():
        raise ValueError(f"{path}: is there already; remove it or choose another name")


def replies_path(output: str | Path) -> Path:
    """Where the replies are kept that the answers in `output` are read from, until it is written."""
    return Path(output).with_name(f".{Path(output).name}.replies")


def read_runs(paths: Sequence[str | Path]) -> dict[str, list[Row]]:
    """The rows of files that `tokenmill eval` wrote, by their names without suffix (with folders, where two are alike).
    Raises DataError naming file, line and key."""
    files = [Path(path) for path in paths]
    alike = len({file.stem for file in files}) < len(files)
    return {str(file) if alike else file.stem: _read(file) for file in files}


def _read(path: Path) -> list[Row]:
    found = []
    for where, row in (row for file in find_inputs([path]) for piece in pieces(file) for row in rows(piece)):
        for key in KEYS:
            if key not in row:
                raise DataError(f"{where}: the key {key!r} is missing: expected a file that tokenmill eval wrote")
        found.append(row)
    if not found:
        raise DataError(f"{path}: holds no answer: expected a file that tokenmill eval wrote")
    return found


def summary(found: Sequence[Row]) -> str:
    """One line: how the questions were asked, what is random chance, and how many there were."""
    run = found[0]["run"]
    shots = {row["shots"] for row in found}
    parts = [f"{run['strategy']} by {run['by']}"]
    if shots != {0}:
        least, most = min(shots), max(shots)
        parts.append(f"{most} shots" if least == most else f"{least} to {most} shots")
    if found[0]["options"]:
        parts.append(f"chance {sum(1 / len(row['options']) for row in found) / len(found):.3f}")
    return ", ".join([*parts, f"{len(found)} questions"])


def tables(runs: Mapping[str, Sequence[Row]], *, seed: int = 0) -> str:
    """Every run's metrics, and of several runs, how the later ones differ from the first."""
    return "\n\n".join([table(runs, seed=seed), *([comparison(runs, seed=seed)] if len(runs) > 1 else [])])


def metrics(found: Sequence[Row]) -> list[Metric]:
    """What is measured of answers to choices: accuracy; macro-F1 where all have the same options; where there are
    confidences, the calibration error; where answers were generated, the share of votes that came to an answer by
    themselves. Of open questions: exact match and ROUGE-L, the best over the references.
    """
    right = [row["correct"] for row in found]
    if not found[0]["options"]:
        return [mean("exact match", right), mean("ROUGE-L", [row["rouge_l"] for row in found])]
    measured = [mean("accuracy", right)]
    if all(row["options"] == found[0]["options"] for row in found):
        measured.append(macro_f1([row["prediction"] for row in found], [row["answer"] for row in found]))
    if all(row["confidence"] is not None for row in found):
        measured.append(calibration_error([row["confidence"] for row in found], right))
    if "generated" in found[0]["votes"][0]:
        decided = [
            sum("choice" in vote and not vote["forced"] for vote in row["votes"]) / len(row["votes"]) for row in found
        ]
        measured.append(mean("answered", decided))
    return measured


def table(runs: Mapping[str, Sequence[Row]], *, seed: int = 0) -> str:
    """A Markdown table whose columns are also aligned as plain text: a row a run, its metrics with 95 % intervals."""
    measured = {name: {m.name: str(estimate(m, seed=seed)) for m in metrics(found)} for name, found in runs.items()}
    return _markdown("run", measured)


def comparison(runs: Mapping[str, Sequence[Row]], *, seed: int = 0) -> str:
    """A table of each later run's metrics minus the first one's, with paired 95 % intervals. Raises as `check_same`."""
    check_same(runs)
    (base, first), *others = runs.items()
    of_base = {m.name: m for m in metrics(first)}
    measured = {}
    for name, found in others:
        both = [m for m in metrics(found) if m.name in of_base]
        measured[f"{name} - {base}"] = {m.name: str(difference(m, of_base[m.name], seed=seed)) for m in both}
    return _markdown("difference", measured)


def check_same(runs: Mapping[str, Sequence[Row]]) -> None:
    """Raises ValueError where two runs are not about the same questions in the same order."""
    (base, first), *others = runs.items()
    for name, found in others:
        for number, (row, other) in enumerate(zip(first, found, strict=False), start=1):
            if different := [key for key in ASKED if row[key] != other[key]]:
                raise ValueError(
                    f"{base} and {name} are not about the same questions: their lines {number} differ in "
                    f"{different[0]!r} ({row['id']}, {other['id']}); compare runs of one file, with one --limit"
                )
        if len(first) != len(found):
            counts = f"{base} has {len(first)} questions, {name} {len(found)}"
            raise ValueError(f"{counts}: compare runs of one file, with one --limit")


def _markdown(label: str, measured: Mapping[str, Mapping[str, str]]) -> str:
    names = list(dict.fromkeys(name for cells in measured.values() for name in cells))
    lines = [[label, *names], *([run, *(cells.get(n, "-") for n in names)] for run, cells in measured.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names) + 1)]

    def line(cells: Sequence[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *numbers])} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(lines[0]), f"|{rule}|", *map(line, lines[1:])])
