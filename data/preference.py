"""Preference rows, two answers to one prompt of which one is the better, as documents of a token stream.

A pair is one document: prompt, chosen answer, the prompt's last token once more, rejected answer, with loss on the
answers alone. So its rows are those that a batch needs (data/unfold.py): each answer follows a token that predicts its
first, and the prompt is there once. Rows come as Hugging Face's data sets have them:

| `chosen`, `rejected` | the prompt |
| --- | --- |
| texts | `prompt` (or `question`), a text or messages |
| messages, the last one the answer | their other messages, the same in both; else `prompt` as above |

A `system` prompt in a field of its own comes before any of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenmill.data import chat
from tokenmill.data.chat import Message
from tokenmill.data.errors import DataError
from tokenmill.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pair:
    prompt: list[Message]  # ends with the user's
    chosen: str
    rejected: str

    def texts(self) -> list[str]:
        """The system prompt, if any, each turn of the prompt, and the answers."""
        system, turns = chat.parse(self.prompt)
        return [text for text in (system, *(turn.text for turn in turns), self.chosen, self.rejected) if text]


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row holds preferences."""
    return "chosen" in row and "rejected" in row


def parse_pair(row: Mapping[str, Any]) -> Pair:
    """The pair in a row. Raises DataError where an answer is empty, the prompt is missing, or the answers' prompts are
    not the same."""
    (before, chosen), (before_rejected, rejected) = (_answer(row[key], key) for key in ("chosen", "rejected"))
    if before != before_rejected:
        raise DataError("'chosen' and 'rejected' answer different prompts: all messages but the last must be the same")
    prompt = _prompt(row)
    if before:
        text = prompt[-1].get("content") if prompt and isinstance(prompt[-1], Mapping) else None
        if prompt and text not in [message.get("content") for message in before]:
            raise DataError("'prompt' is none of the messages before the answers: leave it out, or the messages")
        prompt = before
    if not prompt:
        raise DataError("no prompt: expected 'prompt', or messages before the answer in 'chosen' and 'rejected'")
    prompt = list(chat.with_system(prompt, row))
    if chat.parse(prompt)[1][-1].role != "user":
        raise DataError("the prompt ends with an answer: its last message must be the user's")
    return Pair(prompt, chosen, rejected)


def _answer(value: Any, key: str) -> tuple[list[Message], str]:
    """The messages before an answer, and its text."""
    before: list[Message] = []
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value or not isinstance(value[-1], Mapping) or value[-1].get("role") != "assistant":
            raise DataError(f"{key!r} must end with a message of the assistant's")
        *before, last = value
        if not all(isinstance(message, Mapping) for message in before):
            raise DataError(f"{key!r} holds something that is not a message")
        value = last.get("content")
    if not isinstance(value, str):
        raise DataError(f"{key!r} is a {type(value).__name__}, expected a text or messages")
    if not value.strip():
        raise DataError(f"{key!r} is empty")
    return before, value


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    """The messages of a prompt that has a field of its own; none where there is no such field."""
    prompt = row.get("prompt", row.get("question"))
    if not prompt:
        return []
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return list(prompt)
    if not isinstance(prompt, str):
        raise DataError(f"'prompt' is a {type(prompt).__name__}, expected a text or messages")
    return [{"role": "user", "content": prompt}]


def render_pair(pair: Pair, tokenizer: Tokenizer, template: str = "auto") -> tuple[list[int], list[int]]:
    """The ids of a pair's document, from BOS to the second answer's EOS, and a mask, 1 on the answers and their EOS.

    Raises DataError as `chat.render` does.
    """
    prompt = chat.prompt(pair.prompt, tokenizer, template)
    answers = []
    for text in (pair.chosen, pair.rejected):
        ids, _ = chat.render([*pair.prompt, {"role": "assistant", "content": text}], tokenizer, template)
        answers.append(ids[len(prompt) :])  # what is before it are the prompt's ids: the border lies in token space
    chosen, rejected = answers
    ids = [*prompt, *chosen, prompt[-1], *rejected]
    return ids, [0] * len(prompt) + [1] * len(chosen) + [0] + [1] * len(rejected)
