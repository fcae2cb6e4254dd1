"""Documents to questions and answers: each, or each part of a long one, is rewritten by a model as a question that it
answers, and the answer (Apollo: Wang et al. 2024, arXiv 2403.03640, who rewrite a corpus for pre-training so).

The same machinery as data/instructions.py, with another prompt. The rows are Alpaca's, with the document's source.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tokenmill.data.dedupe import Dedupe
from tokenmill.data.documents import content, find_inputs, pieces, rows
from tokenmill.data.errors import DataError
from tokenmill.data.fields import read_records
from tokenmill.data.journal import Generator, Journal, Request
from tokenmill.data.synthesis import Report, check_output, check_prompt, fill, journal_path, request, spoken, write_rows

REWRITE_PROMPT = """\
Below the line is a text. Write one question about its main content that it answers, and the answer.

- The question names what it is about: it can be understood by someone who has not seen the text, and does not mention \
it.
- The answer holds what the text says to the question, all of it, explained, and nothing that the text does not say.
- Both are in the language of the text.

Reply in this form, and with nothing besides:

Question: the question
Answer: the answer

---
{document}
"""


class Part(NamedTuple):
    """A document, or what of it goes into one request."""

    source: str
    name: str
    text: str
    end: int  # bytes of the inputs up to the piece that it is of


def rewrite(
    inputs: Sequence[str | Path],
    output: str | Path,
    generator: Generator,
    *,
    text_key: str = "text",
    characters: int = 8000,
    limit: int | None = None,
    dedupe: Dedupe = "minhash",
    prompt: str = REWRITE_PROMPT,
    temperature: float = 0.0,
    max_tokens: int = 2048,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Have the documents in files (data/documents.py; the first `limit`) rewritten, and write questions and answers to
    `output`, a `.jsonl` file. One longer than `characters` is cut into parts, between paragraphs where it can be. The
    prompt has `{document}`.

    Stopped and started again, it goes on as `instruct` does. Raises DataError where inputs or output cannot be used, or
    nothing is made.
    """
    output = Path(output)
    check_output(output, overwrite)
    check_prompt(prompt, "document")
    report = Report()
    waiting: deque[Part] = deque()

    def requests() -> Iterator[Request]:
        for part in _parts(inputs, text_key, characters, limit):
            waiting.append(part)
            yield request(part.name, fill(prompt, document=part.text), max_tokens, temperature, seed)

    made: list[dict[str, str]] = []
    total = sum(file.size for file in find_inputs(inputs))
    with (
        Journal(journal_path(output)) as journal,
        tqdm(total=total, unit="B", unit_scale=True, desc="rewrite", disable=not progress) as bar,
    ):
        for answer in journal.answers(generator, requests()):
            part = waiting.popleft()
            report.answered(answer, "requests")
            found = read_records(spoken(answer), ("question", "answer"), "pair")
            if not answer.whole:
                report.drop("cut short", f"{part.name}: {answer.text}")
                del found[-1:]
            elif not found and not answer.refused:
                report.drop("no question in the answer", f"{part.name}: {answer.text}")
            for record in found:
                question, text = (record.get(key, "") for key in ("question", "answer"))
                if question and text:
                    made.append({"instruction": question, "input": "", "output": text, "source": part.source})
                else:
                    report.drop("without a question or an answer", f"{part.name}: {answer.text}")
            bar.update(part.end - bar.n)
        report.used(journal)
    report.counts["questions read"] = len(made)
    write_rows(made, output, dedupe, report)
    return report


def _parts(inputs: Sequence[str | Path], text_key: str, characters: int, limit: int | None) -> Iterator[Part]:
    before = documents = 0
    for file in find_inputs(inputs):
        for piece in pieces(file, [text_key]):
            for where, row in rows(piece, text_key):
                if documents == limit:
                    return
                documents += 1
                try:
                    text = content(row, text_key)
                except DataError as error:
                    raise DataError(f"{where}: {error}") from None
                if not isinstance(text, str):
                    raise DataError(f"{where}: a conversation, expected a document under the key {text_key!r}")
                cut = list(split(text, characters))
                for i, part in enumerate(cut, 1):
                    name = f"{where}, part {i} of {len(cut)}" if len(cut) > 1 else where
                    yield Part(file.source, name, part, before + piece.end)
        before += file.size


def split(text: str, characters: int) -> Iterator[str]:
    """A text in parts of at most so many characters and of similar length, cut at the end of a paragraph, a line, a
    sentence or a word, whichever of these is first found in the latter half of a part."""
    text = text.strip()
    while len(text) > characters:
        parts = -(-len(text) // characters)
        size = min(characters, len(text) // parts + characters // 8)  # room for a good place
        window = text[:size]
        cut = next(
            (at + len(end) for end in ("\n\n", "\n", ". ", "。", " ") if (at := window.rfind(end)) > size // 2), size
        )
        yield text[:cut].strip()
        text = text[cut:].strip()
    if text:
        yield text
