"""Questions as prompts: turns of user and assistant, rendered by a chat template or as plain text, in token ids.

The border between prompt and answer is in token space, where the template puts it, so a model is asked exactly what it
was tuned on. Worked examples ("shots") are earlier turns. The plain form is for models that know no template:

    Question: Which is red?
    A. the sky
    B. blood
    Answer: B

    Question: ...
    Answer:
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Literal

from tokenmill.data import chat
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.evaluate.tasks import Question

TEMPLATES = ("auto", *chat.TEMPLATES, "plain")
LETTER = "Answer with the letter of the right option."
REASON_CHOICE = 'Think step by step, then end with "The answer is" and the letter of the right option.'
REASON_OPEN = 'Think step by step, then end with "The answer is" and the answer.'
STEPS = "Let's think step by step."  # how an answer with a chain of thought begins in the plain form

Text = str | list[dict[str, str]]  # a plain prompt, or a chat's messages
By = Literal["text", "letter", "generate"]


@dataclass(frozen=True)
class Style:
    """How questions are asked, and what an answer is."""

    by: By = "text"  # text: options are not shown, the answer is one's text. Else shown, lettered; the answer a letter
    reason: bool = False  # the answer is a chain of thought that ends with it
    template: str = "auto"


@dataclass(frozen=True)
class Shot:
    """A question with the answer that a prompt shows for it."""

    question: Question
    reply: str


@dataclass(frozen=True)
class Prompt:
    text: Text
    ids: list[int]


def ask(question: Question, shots: Sequence[Shot], tokenizer: Tokenizer, style: Style) -> Prompt:
    """The prompt of a question after shots, up to where the answer begins. Raises ValueError above 26 options."""
    if style.template == "plain":
        text = "".join(f"{_plain(shot.question, style)} {' '.join(shot.reply.split())}\n\n" for shot in shots)
        text += _plain(question, style)
        return Prompt(text, [tokenizer.bos_id, *tokenizer.encode(text)])
    messages: list[dict[str, str]] = []
    for shot in shots:
        messages.append({"role": "user", "content": content(shot.question, style)})
        messages.append({"role": "assistant", "content": shot.reply})
    messages.append({"role": "user", "content": content(question, style)})
    return Prompt(messages, chat.prompt(messages, tokenizer, style.template))


def answers(question: Question, tokenizer: Tokenizer, style: Style) -> list[list[int]]:
    """The ids of each option as the answer: letters without EOS, as whether the model would stop or explain says
    nothing about its choice; texts with what ends an answer, but in the plain form, where several things could."""
    texts = letters(question) if style.by == "letter" else question.options
    if style.template == "plain":
        return [tokenizer.encode(f" {text}", continues=True) for text in texts]
    # A template encodes each answer by itself, so its ids are the same after any question.
    asked = [{"role": "user", "content": "?"}]
    begin = len(chat.prompt(asked, tokenizer, style.template))
    found = [
        chat.render([*asked, {"role": "assistant", "content": text}], tokenizer, style.template)[0][begin:]
        for text in texts
    ]
    return [ids[:-1] for ids in found] if style.by == "letter" else found


def reply(question: Question, style: Style) -> str:
    """The right answer, in the form that the style asks for (but without a chain of thought)."""
    shown = question.options and style.by != "text"
    return letters(question)[question.answer] if shown else question.reply


def content(question: Question, style: Style) -> str:
    """What the user says in a chat."""
    lines = [question.question]
    if question.options and style.by != "text":
        lines += [*_listed(question), REASON_CHOICE if style.reason else LETTER]
    elif style.reason:
        lines.append(REASON_OPEN)
    return "\n".join(lines)


def letters(question: Question) -> str:
    """A letter an option. Raises ValueError above 26 options."""
    if len(question.options) > len(ascii_uppercase):
        raise ValueError(f"{question.id}: {len(question.options)} options, but only {len(ascii_uppercase)} letters")
    return ascii_uppercase[: len(question.options)]


def stops(tokenizer: Tokenizer, style: Style) -> set[int]:
    """The ids that end a generated answer: EOS, and what ends one in the template (in the plain form, a line)."""
    if style.template == "plain":
        return {tokenizer.eos_id, *(tokenizer.encode(f"A{end}")[-1] for end in ("\n", "\n\n"))}
    return {tokenizer.eos_id, chat.end_id(tokenizer, style.template)}


def _listed(question: Question) -> list[str]:
    return [f"{letter}. {option}" for letter, option in zip(letters(question), question.options, strict=True)]


def _plain(question: Question, style: Style) -> str:
    lines = [f"Question: {question.question}"]
    if question.options and style.by != "text":
        lines += _listed(question)
    return "\n".join([*lines, f"Answer: {STEPS}" if style.reason else "Answer:"])
