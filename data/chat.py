"""Conversations to token ids: Mistral's templates, each segment encoded by itself, loss on the answers alone.

The border between a prompt and its answer lies in token space: `render` is `prompt` and then the answer, for every
turn. User text that spells a control piece stays text, since control pieces are placed by id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenmill.data.errors import DataError
from tokenmill.data.tokenizer import Tokenizer

# v2 and v3 differ in tool calls only; text is laid out the same.
TEMPLATES = ("mistral-v1", "mistral-v2", "mistral-v3")

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant", "content": str}


def render(messages: Sequence[Message], tokenizer: Tokenizer, template: str = "auto") -> tuple[list[int], list[int]]:
    """A conversation that ends with an answer: its ids from BOS to the last EOS, and a mask, 1 on the tokens of the
    answers and the EOS that ends each.

    System messages become one system prompt; neighbours of one role become one message (two line breaks between).
    Raises DataError where a message is malformed, or the conversation does not begin with a user and end with an
    assistant.
    """
    system, turns = parse(messages)
    if turns[-1]["role"] != "assistant":
        raise DataError("the conversation ends with a user's message: the last one must be the assistant's")
    return _encode(system, turns, tokenizer, template)


def prompt(messages: Sequence[Message], tokenizer: Tokenizer, template: str = "auto") -> list[int]:
    """The ids of a conversation up to where the next answer begins. Raises as `render`, but it ends with a user."""
    system, turns = parse(messages)
    if turns[-1]["role"] != "user":
        raise DataError("the conversation ends with an answer: the last message must be the user's")
    return _encode(system, turns, tokenizer, template)[0]


def alpaca_messages(row: Mapping[str, Any]) -> list[Message]:
    """The messages of an Alpaca row: `instruction`, `input` (may be empty or missing) and `output`."""
    instruction, context, output = (row.get(key) or "" for key in ("instruction", "input", "output"))
    for key, value in (("instruction", instruction), ("input", context), ("output", output)):
        if not isinstance(value, str):
            raise DataError(f"{key!r} is a {type(value).__name__}, expected a string")
        if not value.strip() and key != "input":
            raise DataError(f"{key!r} is empty")
    question = f"{instruction}\n\n{context}" if context else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": output}]


def parse(messages: Sequence[Message]) -> tuple[str, list[dict[str, str]]]:
    """The system prompt ("" where there is none), and turns that alternate from a user's on.

    Raises DataError where a message is malformed or no user begins.
    """
    system: list[str] = []
    turns: list[dict[str, str]] = []
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(f"'messages' is a {type(messages).__name__}, expected a list")
    for i, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in ("system", "user", "assistant"):
            raise DataError(f"message {i} has role {role!r}, expected 'system', 'user' or 'assistant'")
        if not isinstance(content, str) or (not content.strip() and role != "system"):
            raise DataError(f"message {i} ({role}) has no text: 'content' must be a string that is not empty")
        if role == "system":
            system += [content] if content else []
        elif turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + content
        else:
            turns.append({"role": role, "content": content})
    if not turns or turns[0]["role"] != "user":
        raise DataError("the conversation has no user's message to begin with")
    return "\n\n".join(system), turns


def _encode(
    system: str, turns: list[dict[str, str]], tokenizer: Tokenizer, template: str
) -> tuple[list[int], list[int]]:
    begin, end = _control_ids(tokenizer, template)
    users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    system_turn = users[0] if begin is None else users[-1]  # v1 puts the system prompt first, v2 and v3 last
    ids, mask = [tokenizer.bos_id], [0]
    for i, turn in enumerate(turns):
        text = turn["content"]
        if i == system_turn and system:
            text = f"{system}\n\n{text}"
        if turn["role"] == "user":
            if begin is None or end is None:
                segment = tokenizer.encode(f"[INST] {text} [/INST]")
            else:
                segment = [begin, *tokenizer.encode(text), end]
            loss = 0
        else:
            answer = text if begin is None else text.rstrip(" ")
            segment, loss = [*tokenizer.encode(answer), tokenizer.eos_id], 1
        ids += segment
        mask += [loss] * len(segment)
    return ids, mask


def _control_ids(tokenizer: Tokenizer, template: str) -> tuple[int, int] | tuple[None, None]:
    """The ids of [INST] and [/INST], None where the template writes them as text (v1)."""
    begin, end = tokenizer.control_id("[INST]"), tokenizer.control_id("[/INST]")
    known = begin is not None and end is not None
    if template == "mistral-v1" or (template == "auto" and not known):
        return None, None
    if template not in ("auto", *TEMPLATES):
        raise DataError(f"template {template!r} is not one of {['auto', *TEMPLATES]}")
    if begin is None or end is None:
        raise DataError(
            f"template {template!r} needs the control pieces [INST] and [/INST], which tokenizer {tokenizer.name!r} "
            "does not have: use 'mistral-v1' or 'auto'"
        )
    return begin, end
