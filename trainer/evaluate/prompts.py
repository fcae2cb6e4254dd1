"""Prompting strategies: a question as a prompt and the continuations to choose between, in token ids.

The border between prompt and continuation is in token space, where the chat template puts it, so a model is asked
exactly what it was tuned on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_uppercase

from tokenmill.data import chat
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.evaluate.tasks import Question


@dataclass(frozen=True)
class Choice:
    prompt: list[int]
    continuations: list[list[int]]  # one an option


def by_text(question: Question, tokenizer: Tokenizer, template: str) -> Choice:
    """The question alone; its continuations are the options' texts, each with EOS. What even a tiny model can do."""
    prompt, answers = _answered(question.question, question.options, tokenizer, template)
    return Choice(prompt, answers)


def by_letter(question: Question, tokenizer: Tokenizer, template: str) -> Choice:
    """The question with its options lettered; its continuations are the letters, without EOS: whether the model would
    stop or explain says nothing about its choice. Raises ValueError above 26 options."""
    if len(question.options) > len(ascii_uppercase):
        raise ValueError(f"{question.id}: {len(question.options)} options, but only {len(ascii_uppercase)} letters")
    letters = ascii_uppercase[: len(question.options)]
    listed = [f"{letter}. {option}" for letter, option in zip(letters, question.options, strict=True)]
    asked = "\n".join([question.question, *listed, "Answer with the letter of the right option."])
    prompt, answers = _answered(asked, letters, tokenizer, template)
    return Choice(prompt, [answer[:-1] for answer in answers])


STRATEGIES: dict[str, Callable[[Question, Tokenizer, str], Choice]] = {"text": by_text, "letter": by_letter}


def _answered(
    asked: str, answers: tuple[str, ...] | str, tokenizer: Tokenizer, template: str
) -> tuple[list[int], list[list[int]]]:
    """The prompt, and what each answer adds to it when the template renders it in full."""
    messages = [{"role": "user", "content": asked}]
    prompt = chat.prompt(messages, tokenizer, template)
    rendered = [chat.render([*messages, {"role": "assistant", "content": a}], tokenizer, template)[0] for a in answers]
    return prompt, [ids[len(prompt) :] for ids in rendered]
