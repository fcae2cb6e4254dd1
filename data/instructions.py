"""Instruction data made by a model: new tasks after the manner of seed tasks, and their answers.

The way of AlpaCare (Zhang et al. 2023, arXiv 2310.14558), after Self-Instruct (Wang et al. 2023):

1. Each request shows a generator a few seed tasks and asks for new ones. Which it shows is a function of the request's
   number alone, so requests need not wait for one another.
2. The tasks are read from the answers, in the order of the requests. One whose instruction has a ROUGE-L above 0.7 with
   that of a seed task, or of a task accepted before, is dropped.
3. Each accepted task is answered, and what repeats an earlier row, exactly or nearly, is left out.

The rows are Alpaca's, which `tokenmill prepare` reads. Documents rewritten as questions and answers: data/rewrite.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tqdm import tqdm

from tokenmill import _C
from tokenmill.data.dedupe import Dedupe
from tokenmill.data.documents import find_inputs, pieces, rows
from tokenmill.data.errors import DataError
from tokenmill.data.fields import read_records
from tokenmill.data.journal import Answer, Generator, Journal, Request
from tokenmill.data.rouge import Unlike
from tokenmill.data.synthesis import Report, check_output, check_prompt, fill, journal_path, request, spoken, write_rows

KINDS = ("topic", "type", "view", "difficulty")  # what a task may say of itself
FIELDS = (*KINDS, "instruction", "input", "output")
NOTHING = {"", "none", "noinput", "no input", "na", "nil", "empty"}  # how an input says that there is none
IDLE = 100  # requests in a row without a new task, after which no more are made

TASKS_PROMPT = """\
Write {count} new tasks that a person could give to an expert assistant, in the field of the examples at the end.

- The tasks are unlike the examples and unlike each other. Vary what they are about, what has to be done, who asks, \
how hard it is (from 1, easy, to 5, hard), their wording and their length.
- Each can be done by reading and writing alone: without images, sound, files, tools or the internet.
- Where a task works on a text, such as a report, a conversation or a list of choices, the whole text comes after \
"Input:". Make it up, true to life and without names of real people. Other tasks have "Input: none".
- Do not solve the tasks.

Write every task like this, and nothing besides:

### Task
Topic: its subject
Type: the kind of work, such as a question, a summary, a classification, a conversation
View: who asks
Difficulty: a number
Instruction: what to do
Input: the text to work on, or none

Examples:

{examples}
"""

ANSWER_PROMPT = """\
Carry out this task as an expert in its field would. Be correct and clear, as complete as the task needs, and say so \
where something cannot be known. Reply with the answer alone.

{task}
"""


@dataclass(frozen=True)
class Task:
    instruction: str
    input: str
    kinds: Mapping[str, str]  # those of KINDS that are given

    @property
    def row(self) -> dict[str, str]:
        """The fields, as a row has them."""
        return {**self.kinds, "instruction": self.instruction, "input": self.input}


def instruct(
    seeds: Sequence[str | Path],
    output: str | Path,
    generator: Generator,
    *,
    answerer: Generator | None = None,
    tasks: int = 1000,
    shots: int = 3,
    per_request: int = 10,
    threshold: float = 0.7,
    dedupe: Dedupe = "minhash",
    prompt: str = TASKS_PROMPT,
    answer_prompt: str = ANSWER_PROMPT,
    temperature: float = 1.0,
    max_tokens: int = 4096,
    answer_tokens: int = 2048,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Make `tasks` new tasks after the seed tasks in files (JSON lines of `instruction`, and where there are any
    `input`, `topic`, `type`, `view`, `difficulty`), have them answered, and write them to `output`, a `.jsonl` file.

    A request shows `shots` seed tasks in place of `{examples}` in the prompt and asks for `per_request` new ones,
    `{count}`; an answer prompt has `{task}`. Answers, of `answerer` or else the generator, are its likeliest; tasks are
    drawn at `temperature`.

    Answers that came are kept in `{output}.journal`: started again, also for more tasks or with another threshold, it
    asks for the others only. With a generator that is a function of its requests, the rows are the same however often
    it was stopped and whatever is worked on at once.

    Raises DataError where seeds or output cannot be used, or no task is made.
    """
    output = Path(output)
    check_output(output, overwrite)
    check_prompt(prompt, "examples", "count")
    check_prompt(answer_prompt, "task")
    if seed < 0:
        raise DataError(f"seed is {seed}: expected 0 or more")
    examples = read_seeds(seeds)
    unlike = Unlike(threshold)
    for example in examples:
        unlike.add(example.instruction)
    report = Report()

    def task_request(number: int) -> Request:
        order = _C.permutation(len(examples), _C.derive_key(seed, 0, number), 0, min(shots, len(examples)))
        shown = "\n\n".join(f"### Task\n{_written(examples[i])}" for i in order.tolist())
        text = fill(prompt, examples=shown, count=str(per_request))
        return request(f"task request {number}", text, max_tokens, temperature, seed + number)

    def answer_request(number: int) -> Request:
        task = accepted[number]
        text = fill(answer_prompt, task=f"{task.instruction}\n\n{task.input}".strip())
        return request(f"answer {number}", text, answer_tokens, 0.0, seed)

    with Journal(journal_path(output)) as journal:
        with tqdm(total=tasks, desc="tasks", unit="task", disable=not progress) as bar:
            accepted = _accepted(journal.answers(generator, map(task_request, count())), tasks, unlike, report, bar)
        with tqdm(total=len(accepted), desc="answers", unit="task", disable=not progress) as bar:
            answers = journal.answers(answerer or generator, map(answer_request, range(len(accepted))))
            made = _answered(accepted, answers, report, bar)
        report.used(journal)
    write_rows(made, output, dedupe, report)
    return report


def _accepted(answers: Iterator[Answer], tasks: int, unlike: Unlike, report: Report, bar: tqdm) -> list[Task]:
    """The tasks in answers that are like no other, until there are so many."""
    accepted: list[Task] = []
    idle = 0
    while len(accepted) < tasks and idle < IDLE:
        answer = next(answers)
        report.answered(answer, "task requests")
        before = len(accepted)
        for task in _read_tasks(answer, report):
            if len(accepted) == tasks:
                break
            report.counts["tasks read"] += 1
            if (alike := unlike.find(task.instruction)) is not None:
                score, other = alike
                report.drop("like another task", f"{task.instruction} [{score:.2f} with: {other}]")
                continue
            unlike.add(task.instruction)
            accepted.append(task)
        bar.update(len(accepted) - before)
        idle = 0 if len(accepted) > before else idle + 1
    report.counts["tasks accepted"] = len(accepted)
    if idle == IDLE:
        report.notes.append(f"{IDLE} requests in a row brought no new task: only {len(accepted):,} were made")
    return accepted


def _read_tasks(answer: Answer, report: Report) -> Iterator[Task]:
    records = read_records(spoken(answer), FIELDS, "task")
    if not answer.whole:
        report.drop("cut short", str(records.pop()) if records else answer.text)
    elif not records and not answer.refused:
        report.drop("no task in the answer", answer.text)
    for record in records:
        if (task := _task(record)) is None:
            report.drop("without an instruction", str(record))
        else:
            yield task


def _answered(tasks: Sequence[Task], answers: Iterator[Answer], report: Report, bar: tqdm) -> list[dict[str, str]]:
    """The rows of the tasks that have a whole answer."""
    made: list[dict[str, str]] = []
    for task, answer in zip(tasks, answers, strict=True):
        report.answered(answer, "answer requests")
        text = spoken(answer)
        if not answer.whole:
            report.drop("cut short", text)
        elif text:
            made.append({**task.row, "output": text})
        elif not answer.refused:
            report.drop("empty answer", task.instruction)
        bar.update()
    return made


def read_seeds(inputs: Sequence[str | Path]) -> list[Task]:
    """The seed tasks in files. Raises DataError naming file, line and key where a row is none."""
    seeds: list[Task] = []
    for file in find_inputs(inputs):
        for piece in pieces(file):
            for where, row in rows(piece, "instruction"):
                for key in ("instruction", "input", *KINDS):
                    if not isinstance(row.get(key) or "", str | int):
                        raise DataError(f"{where}: {key!r} is a {type(row[key]).__name__}, expected a string")
                task = _task({key: str(row.get(key) or "") for key in FIELDS})
                if task is None:
                    raise DataError(f"{where}: 'instruction' is missing or empty: a seed task needs one")
                seeds.append(task)
    return seeds


def _task(record: Mapping[str, str]) -> Task | None:
    """The task of a record; None without an instruction."""
    values = {key: value.strip() for key, value in record.items()}
    instruction, context = values.get("instruction", ""), values.get("input", "")
    if not any(map(str.isalnum, instruction)):
        return None
    kinds = {key: values[key] for key in KINDS if values.get(key)}
    nothing = re.sub(r"[^\w ]", "", context).strip().lower() in NOTHING
    return Task(instruction, "" if nothing else context, kinds)


def _written(task: Task) -> str:
    return "\n".join(f"{key.capitalize()}: {value or 'none'}" for key, value in task.row.items())
