"""The demo's material: real clinical text and real general text, written as JSON lines.

The clinical text is the ICD-10-CM classification of diseases, which the package `simple-icd-10-cm` ships. Its
categories are dealt into two halves. The text for continued pre-training covers both; the questions for tuning come
from one half and the questions of the test from the other. So whoever answers the test knows the facts from the text
and the way of answering from the tuning. The general text is the language reference inside CPython (`pydoc_data`);
it differs a little between versions of Python, and the demo's numbers with it.

| file | rows |
| --- | --- |
| `general.jsonl`, `general_heldout.jsonl` | `{"text"}`: a few paragraphs; no paragraph is in both |
| `clinical.jsonl`, `clinical_heldout.jsonl` | `{"text"}`: 1 to 3 codes of a category; no code is in both |
| `tuning.jsonl` | `{"messages"}`: a question about a code of the first half, and its answer |
| `questions.jsonl` | `{"question", "options", "answer"}`: four options, about a code of the second half |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from typing import Any

import simple_icd_10_cm as icd

from tokenmill.data.files import replace_folder

DOCUMENTS_PER_CATEGORY = 8  # at most, each a different sample of the category's codes
CODES_PER_DOCUMENT = 3  # at most
TUNING_PER_CATEGORY = 8  # at most, each about a different code
QUESTIONS = 500  # a 95 % interval of about 0.04 either way
HELD_OUT_DOCUMENTS = 200
HELD_OUT_EVERY = 8  # topics of the general text
PARAGRAPHS_TO = 800  # characters: a general document is about as long as the demo's sequences
LETTERS = "ABCD"


@dataclass(frozen=True)
class Category:
    """A three-character category of the classification, such as C50, as its official descriptions."""

    name: str
    chapter: str
    codes: tuple[str, ...]  # what it divides into, without the seventh character that tells encounters apart


def write(folder: Path, *, seed: int = 0) -> dict[str, int]:
    """Write the six files into a new folder, all or nothing, and return the rows of each.

    A pure function of the seed, the version of `simple-icd-10-cm` and that of Python. Raises FileExistsError where the
    folder is there already.
    """
    rng = Random(seed)
    dealt = categories()
    rng.shuffle(dealt)
    text, held_out, known = clinical_documents(dealt, rng)
    half = len(known) // 2
    general, general_held_out = general_documents()
    files: dict[str, list[dict[str, Any]]] = {
        "general.jsonl": [{"text": document} for document in general],
        "general_heldout.jsonl": [{"text": document} for document in general_held_out],
        "clinical.jsonl": [{"text": document} for document in text],
        "clinical_heldout.jsonl": [{"text": document} for document in held_out],
        "tuning.jsonl": tuning_conversations(known[:half], rng),
        "questions.jsonl": multiple_choice_questions(known[half:], rng),
    }
    with replace_folder(folder) as temporary:
        for name, rows in files.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (temporary / name).write_text("".join(lines), encoding="utf-8")
    return {name: len(rows) for name, rows in files.items()}


def categories() -> list[Category]:
    """Every category of ICD-10-CM, about 1,900. One that has no subdivision is its own only code."""

    def category(code: str) -> Category:
        chapter = re.sub(r" \(\w+-\w+\)$", "", icd.get_description(icd.get_ancestors(code)[-1]))  # " (A00-B99)"
        below = [c for c in icd.get_descendants(code) if len(c) <= len("S72.001")]
        names = dict.fromkeys(" ".join(icd.get_description(c).split()) for c in below or [code])
        return Category(icd.get_description(code), chapter, tuple(names))

    codes = dict.fromkeys(icd.get_all_codes(True))  # the package lists some twice, which would put them in both halves
    return [category(code) for code in codes if icd.is_category(code)]


def clinical_documents(dealt: list[Category], rng: Random) -> tuple[list[str], list[str], list[Category]]:
    """The training text, the held-out text, and the categories with only those codes that the training text names.

    The chapter comes after the description, as it does in an answer to the questions: a causal model that reads the
    chapter first never has to recall it.
    """

    def document(category: Category, codes: Iterable[str]) -> str:
        return " ".join(f"{code}. Category: {category.name}. Chapter: {category.chapter}." for code in codes)

    large = [category for category in dealt if len(category.codes) >= 4 * CODES_PER_DOCUMENT]
    spared = rng.sample(large, HELD_OUT_DOCUMENTS)
    reserved = {category: rng.sample(category.codes, CODES_PER_DOCUMENT) for category in spared}
    held_out = [document(category, codes) for category, codes in reserved.items()]
    text: list[str] = []
    known: list[Category] = []
    for category in dealt:
        codes = [code for code in category.codes if code not in reserved.get(category, ())]
        samples: dict[frozenset[str], list[str]] = {}  # small categories soon repeat themselves: keep what differs
        for _ in range(DOCUMENTS_PER_CATEGORY):
            sample = rng.sample(codes, min(len(codes), rng.randint(1, CODES_PER_DOCUMENT)))
            samples.setdefault(frozenset(sample), sample)
        text += [document(category, sample) for sample in samples.values()]
        named = dict.fromkeys(code for sample in samples.values() for code in sample)
        known.append(Category(category.name, category.chapter, tuple(named)))
    return text, held_out, known


def general_documents() -> tuple[list[str], list[str]]:
    """The language reference in documents of a few paragraphs: for training, and held out (every eighth topic).

    Many topics repeat paragraphs of others word for word. Each is kept once, and in the held-out text if it is there,
    so that the held-out loss is of paragraphs never trained on.
    """
    seen: set[str] = set()

    def documents(names: Iterable[str]) -> list[str]:
        found: list[str] = []
        for name in names:
            document = ""
            for paragraph in map(_plain, re.split(r"\n\s*\n", topics[name])):
                if not paragraph or paragraph in seen:
                    continue
                seen.add(paragraph)
                if document and len(document) + len(paragraph) > PARAGRAPHS_TO:
                    found.append(document)
                    document = ""
                document = f"{document}\n{paragraph}" if document else paragraph
            if document:
                found.append(document)
        return found

    names = sorted(topics)
    held_out = documents(names[::HELD_OUT_EVERY])
    return documents(name for i, name in enumerate(names) if i % HELD_OUT_EVERY), held_out


def _plain(paragraph: str) -> str:
    """One line, without the rules under titles and between the rows of tables: what is easily predicted would only
    flatter the loss."""
    return " ".join(" ".join(line for line in paragraph.splitlines() if re.search(r"[^\W_]", line)).split())


def _question(code: str) -> str:
    return f'Which chapter does "{code}" belong to?'


def tuning_conversations(half: list[Category], rng: Random) -> list[dict[str, Any]]:
    """A question and its answer, the chapter's name, about several codes of each category."""
    return [
        {
            "messages": [
                {"role": "user", "content": _question(code)},
                {"role": "assistant", "content": category.chapter},
            ]
        }
        for category in half
        for code in rng.sample(category.codes, min(len(category.codes), TUNING_PER_CATEGORY))
    ]


def multiple_choice_questions(half: list[Category], rng: Random) -> list[dict[str, Any]]:
    """Questions with four chapters to choose from, in the form of MedQA.

    Four categories of different chapters are drawn, and one of the four at random is asked about. Each option is then
    as likely as the others before the question is read: to know which chapters are large scores no better than chance.
    """
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < QUESTIONS:
        drawn = rng.sample(half, len(LETTERS))
        options = {letter: category.chapter for letter, category in zip(LETTERS, drawn, strict=True)}
        answer = rng.randrange(len(LETTERS))
        question = _question(rng.choice(drawn[answer].codes))
        if len(set(options.values())) == len(LETTERS) and question not in rows:
            rows[question] = {"question": question, "options": options, "answer": LETTERS[answer]}
    return list(rows.values())
