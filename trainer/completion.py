"""Text from a model: prompts, as text or in files, to token ids, and the ids that follow them to text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenmill.data import chat
from tokenmill.data.documents import find_inputs, pieces, rows
from tokenmill.data.errors import DataError
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.inference import check_tokenizer
from tokenmill.trainer.model import Transformer
from tokenmill.trainer.model.generate import GREEDY, Sampling, Step, stream

MAX_NEW_TOKENS = 256


class Prompt(NamedTuple):
    where: str  # for messages: its file and line
    row: Mapping[str, Any]  # {"prompt": text}, {"messages": [...]}, or an Alpaca row, whose output is not looked at


class Answer(NamedTuple):
    prompt: int  # numbers from 0
    sample: int
    text: str
    tokens: int
    stopped: bool  # at the end of an answer; False: cut off by its length


def read_prompts(file: str | Path) -> list[Prompt]:
    """The prompts in a file: of JSON lines or parquet a row each, of a `.txt` file all of it as one (without the line
    break at its end). Raises DataError as `find_inputs` and `rows` do, and where there is none.
    """
    found = []
    for input in find_inputs([file]):
        for piece in pieces(input):
            for where, row in rows(piece, "prompt"):
                whole = where == str(input.path)  # not a line of it
                found.append(Prompt(where, {"prompt": row["prompt"].removesuffix("\n")} if whole else row))
    if not found:
        raise DataError(f"{file}: holds no prompt; expected one JSON object a line")
    return found


def encode(prompt: Prompt, tokenizer: Tokenizer, template: str | None) -> list[int]:
    """The ids of a prompt by a chat template, or of plain text (None), from BOS on. Raises DataError, which says where,
    if the row is none of these.
    """
    row = prompt.row
    try:
        if "messages" in row and template is not None:
            return chat.prompt(chat.with_system(row["messages"], row), tokenizer, template)
        text = row.get("prompt", row.get("instruction"))
        if not isinstance(text, str):
            found = ", ".join(map(repr, row)) or "none"
            raise DataError(
                f"no text under the key 'prompt' or 'instruction', nor 'messages' for a chat template (keys: {found})"
            )
        messages = [{"role": "user", "content": text, "input": row.get("input") or ""}]
        if template is not None:
            return chat.prompt(messages, tokenizer, template)
        if row.get("input"):
            text = chat.parse(messages)[1][0].text  # both, as in the templates that have one place for them
        return [tokenizer.bos_id, *tokenizer.encode(text)]
    except DataError as error:
        raise DataError(f"{prompt.where}: {error}") from None


class Completion:
    """Answers of a model to prompts, by a chat template or to plain text (None)."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        template: str | None = "auto",
        *,
        sampling: Sampling = GREEDY,
        max_new_tokens: int | None = None,
        tokens_per_batch: int = 8192,
    ) -> None:
        """`max_new_tokens` None: 256, or as many as the model has positions for.

        Raises ValueError where the tokenizer does not fit the model, or a prompt is not one.
        """
        check_tokenizer(tokenizer, model.config)
        self.model, self.tokenizer = model, tokenizer
        self.prompts = [encode(prompt, tokenizer, template) for prompt in prompts]
        # Plain text goes on after its prompt: without that, the space before the first word would be lost.
        self.before = [ids if template is None else [] for ids in self.prompts]
        self.stop = {tokenizer.eos_id}
        if template is not None:
            self.stop.add(chat.end_id(tokenizer, template))
        self.sampling, self.tokens_per_batch = sampling, tokens_per_batch
        room = model.config.max_positions - max(map(len, self.prompts))
        self.max_new_tokens = max_new_tokens or max(1, min(MAX_NEW_TOKENS, room))

    def answers(self, samples: int = 1) -> Iterator[Answer]:
        """Each as soon as it and all before it are there, sample by sample. Raises ValueError as `generate`."""
        ids: dict[int, list[int]] = {}
        done: dict[int, Answer] = {}
        following = 0
        for step in self._steps(samples):
            for sequence, token, stopped, ended in zip(*(column.tolist() for column in step), strict=True):
                answer = ids.setdefault(sequence, [])
                if not stopped:
                    answer.append(token)
                if ended:
                    prompt, sample = divmod(sequence, samples)
                    done[sequence] = Answer(prompt, sample, self._text(prompt, ids.pop(sequence)), len(answer), stopped)
            while following in done:
                yield done.pop(following)
                following += 1

    def pieces(self) -> Iterator[str]:
        """The answer to the only prompt, as it comes. A character of several tokens comes when it is whole."""
        ids: list[int] = []
        given = 0
        for step in self._steps(samples=1):
            ids += step.tokens[~step.stopped].tolist()
            text = self._text(0, ids)
            whole = text if step.ended.all() else text.rstrip("\ufffd")
            if whole[given:]:
                yield whole[given:]
                given = len(whole)

    def _steps(self, samples: int) -> Iterator[Step]:
        return stream(
            self.model,
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            sampling=self.sampling,
            samples=samples,
            tokens_per_batch=self.tokens_per_batch,
        )

    def _text(self, prompt: int, ids: list[int]) -> str:
        before = self.before[prompt]
        return self.tokenizer.decode([*before, *ids])[len(self.tokenizer.decode(before)) :]
