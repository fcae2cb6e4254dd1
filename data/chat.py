"""Conversations to token ids by a template, each segment encoded by itself, loss on the answers alone.

| template | a turn | the system prompt |
| --- | --- | --- |
| mistral-v1 | `[INST] {user} [/INST]` as text, answer, EOS | `{system}\\n\\n` before the first question |
| mistral-v2, mistral-v3 | the same with control pieces, no spaces around them | before the last question |
| chatml | `<|im_start|>{role}\\n{text}<|im_end|>\\n` with control pieces; no EOS | a turn of its own |
| alpaca | Stanford's prompt as text, answer, EOS; one turn alone | in place of the prompt's first lines |

All begin with BOS. The border between a prompt and its answer lies in token space: `render` is `prompt` and then the
answer, for every turn. User text that spells a control piece stays text, since control pieces are placed by id.

Mistral's are mistral-common's ids. ChatML's and Alpaca's are those of transformers' Llama tokenizer with `legacy=True`
(as Mistral's own files have it), but where a text spells a control piece, and where an answer begins with what makes
one piece with the colon before it (Alpaca): there theirs have no border. With `legacy=False`, transformers puts no
space in front of a text that follows a control piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tokenmill.data.errors import DataError
from tokenmill.data.tokenizer import Tokenizer

# {"role": "system" | "user" | "assistant", "content": str}; a user's may have an "input", as an Alpaca row has.
Message = Mapping[str, Any]
LossOn = Literal["all", "last"]  # of a conversation's answers
Segment = tuple[list[int], bool]  # ids, and whether they are an answer's

ROLES = ("user", "assistant")
SHAREGPT = {"system": "system"}  # our roles by ShareGPT's
SHAREGPT |= dict.fromkeys(("human", "user"), "user")
SHAREGPT |= dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant")

ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
ALPACA_INPUT = ", paired with an input that provides further context"


@dataclass(frozen=True)
class Turn:
    role: str  # "user" or "assistant"
    content: str
    input: str = ""  # what an instruction is about: the Alpaca template has a place for it

    @property
    def text(self) -> str:
        return f"{self.content}\n\n{self.input}" if self.input else self.content


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, template: str = "auto", loss_on: LossOn = "all"
) -> tuple[list[int], list[int]]:
    """A conversation that ends with an answer: its ids from BOS to the end of that answer, and a mask, 1 on the tokens
    of the answers (or of the last one) and the EOS or `<|im_end|>` that ends each.

    System messages become one system prompt; neighbours of one role become one message (two line breaks between, as
    mistral-common has it). Raises DataError where a message is malformed, the conversation does not begin with a user
    and end with an assistant, or `resolve` does.
    """
    if loss_on not in get_args(LossOn):
        raise DataError(f"loss on {loss_on!r}, expected one of {list(get_args(LossOn))}")
    system, turns = parse(messages)
    if turns[-1].role != "assistant":
        raise DataError("the conversation ends with a user's message: the last one must be the assistant's")
    segments = list(_segments(system, turns, tokenizer, template))
    ids, mask = [tokenizer.bos_id], [0]
    for i, (segment, is_answer) in enumerate(segments, 1):
        ids += segment
        mask += [int(is_answer and (loss_on == "all" or i == len(segments)))] * len(segment)
    return ids, mask


def prompt(messages: Sequence[Message], tokenizer: Tokenizer, template: str = "auto") -> list[int]:
    """The ids of a conversation up to where the next answer begins. Raises as `render`, but it ends with a user."""
    system, turns = parse(messages)
    if turns[-1].role != "user":
        raise DataError("the conversation ends with an answer: the last message must be the user's")
    return [tokenizer.bos_id, *(token for ids, _ in _segments(system, turns, tokenizer, template) for token in ids)]


def end_id(tokenizer: Tokenizer, template: str = "auto") -> int:
    """The id that ends an answer: where generation stops. Raises as `resolve`."""
    if resolve(tokenizer, template) == "chatml":
        return _control_ids(tokenizer, "chatml")[1]
    return tokenizer.eos_id


def resolve(tokenizer: Tokenizer, template: str = "auto") -> str:
    """The template that is meant: "auto" is ChatML where the tokenizer has its control pieces, else Mistral's own, by
    whether it has `[INST]`; v2 is v3.

    Raises DataError where there is no such template, or the tokenizer lacks its control pieces.
    """
    if template == "auto":
        return next(name for name in ("chatml", "mistral-v3", "mistral-v1") if not _lacks(tokenizer, name))
    if template not in TEMPLATES:
        raise DataError(f"template {template!r} is not one of {['auto', *TEMPLATES]}")
    if _lacks(tokenizer, template):
        first, second = CONTROL_PIECES[template]
        remedy = "use 'mistral-v1' or 'auto'"
        if template == "chatml":
            remedy = (
                f"add them with `tokenmill import MODEL OUTPUT --add-tokens '{first}' '{second}'`, and name OUTPUT as "
                "the tokenizer"
            )
        raise DataError(
            f"template {template!r} needs the control pieces {first} and {second}, which tokenizer {tokenizer.name!r} "
            f"does not have: {remedy}"
        )
    return "mistral-v3" if template == "mistral-v2" else template  # they differ in tool calls only


def alpaca_messages(row: Mapping[str, Any]) -> list[Message]:
    """The messages of an Alpaca row: `instruction`, `input` (may be empty or missing) and `output`, and where it has
    them `system` and `history`, earlier pairs of an instruction and its output."""
    texts = {key: row.get(key) or "" for key in ("instruction", "input", "output", "system")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise DataError(f"{key!r} is a {type(value).__name__}, expected a string")
        if not value.strip() and key in ("instruction", "output"):
            raise DataError(f"{key!r} is empty")
    history = row.get("history") or []
    if not _is_list(history) or not all(_is_list(pair) and len(pair) == 2 for pair in history):
        raise DataError("'history' must be a list of pairs, an instruction and its output each")
    return [
        *([{"role": "system", "content": texts["system"]}] if texts["system"] else []),
        *({"role": role, "content": text} for pair in history for role, text in zip(ROLES, pair, strict=True)),
        {"role": "user", "content": texts["instruction"], "input": texts["input"]},
        {"role": "assistant", "content": texts["output"]},
    ]


def sharegpt_messages(row: Mapping[str, Any]) -> list[Message]:
    """The messages of a ShareGPT row: `conversations`, a list of `from` and `value` (or `role` and `content`), and
    where it has one `system`.

    Raises DataError where one is from nobody known, or two in a row are of one side: these are logs of turns, in which
    one was lost. FastChat refuses such a row too, LLaMA-Factory leaves it out.
    """
    found = row["conversations"]
    if not _is_list(found):
        raise DataError(f"'conversations' is a {type(found).__name__}, expected a list")
    messages: list[Message] = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for i, message in enumerate(found):
        if not isinstance(message, Mapping):
            raise DataError(f"message {i} is a {type(message).__name__}, expected an object with 'from' and 'value'")
        name = message.get("from", message.get("role"))
        role = SHAREGPT.get(name) if isinstance(name, str) else None
        if role is None:
            raise DataError(
                f"message {i} is from {name!r}, expected 'human', 'gpt' or 'system': tools have no place in a "
                "template, leave the conversation out"
            )
        if role in ROLES and messages and messages[-1]["role"] == role:
            raise DataError(
                f"messages {i - 1} and {i} are both from {name!r}: 'conversations' must alternate; make one message of "
                "the two, or leave the row out"
            )
        messages.append({"role": role, "content": message.get("value", message.get("content"))})
    return messages


def with_system(messages: Sequence[Message], row: Mapping[str, Any]) -> Sequence[Message]:
    """The messages of a row, behind the system prompt that it may have beside them under `system`.

    Raises DataError where they are no list, or hold another one.
    """
    if not _is_list(messages):
        raise DataError(f"'messages' is a {type(messages).__name__}, expected a list")
    system = row.get("system")
    if not system:
        return messages
    if not isinstance(system, str):
        raise DataError(f"'system' is a {type(system).__name__}, expected a string")
    own = [m["content"] for m in messages if isinstance(m, Mapping) and m.get("role") == "system" and m.get("content")]
    if own and own != [system]:
        raise DataError("'system' is not the system message among the row's messages: leave one of the two out")
    return messages if own else [{"role": "system", "content": system}, *messages]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def parse(messages: Sequence[Message]) -> tuple[str, list[Turn]]:
    """The system prompt ("" where there is none), and turns that alternate from a user's on.

    Raises DataError where a message is malformed or no user begins.
    """
    system: list[str] = []
    turns: list[Turn] = []
    if not _is_list(messages):
        raise DataError(f"'messages' is a {type(messages).__name__}, expected a list")
    for i, message in enumerate(messages):
        message = message if isinstance(message, Mapping) else {}
        role, content = message.get("role"), message.get("content")
        about = message.get("input", "") if role == "user" else ""
        if role not in ("system", *ROLES):
            raise DataError(f"message {i} has role {role!r}, expected 'system', 'user' or 'assistant'")
        if message.get("tool_calls"):
            raise DataError(f"message {i} calls tools, which have no place in a template: leave the conversation out")
        if not isinstance(content, str) or (not content.strip() and role != "system"):
            raise DataError(f"message {i} ({role}) has no text: 'content' must be a string that is not empty")
        if not isinstance(about, str):
            raise DataError(f"message {i} ({role}) has an 'input' that is a {type(about).__name__}, expected a string")
        if role == "system":
            system += [content] if content else []
        elif turns and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].text}\n\n{content}", about)
        else:
            turns.append(Turn(role, content, about))
    if not turns or turns[0].role != "user":
        raise DataError("the conversation has no user's message to begin with")
    return "\n\n".join(system), turns


def _mistral_v1(system: str, turns: list[Turn], tokenizer: Tokenizer) -> Iterator[Segment]:
    for i, turn in enumerate(turns):
        if turn.role == "user":
            text = f"{system}\n\n{turn.text}" if system and i == 0 else turn.text
            yield tokenizer.encode(f"[INST] {text} [/INST]"), False
        else:
            yield [*tokenizer.encode(turn.text), tokenizer.eos_id], True


def _mistral_v3(system: str, turns: list[Turn], tokenizer: Tokenizer) -> Iterator[Segment]:
    begin, end = _control_ids(tokenizer, "mistral-v3")
    last = max(i for i, turn in enumerate(turns) if turn.role == "user")
    for i, turn in enumerate(turns):
        if turn.role == "user":
            text = f"{system}\n\n{turn.text}" if system and i == last else turn.text
            yield [begin, *tokenizer.encode(text), end], False
        else:
            yield [*tokenizer.encode(turn.text.rstrip(" ")), tokenizer.eos_id], True


def _chatml(system: str, turns: list[Turn], tokenizer: Tokenizer) -> Iterator[Segment]:
    start, end = _control_ids(tokenizer, "chatml")
    line = tokenizer.encode("\n")
    before = [start, *tokenizer.encode(f"system\n{system}"), end, *line] if system else []
    answer = [end, *line, start, *tokenizer.encode("assistant\n")]
    for turn in turns:
        if turn.role == "user":
            yield [*before, start, *tokenizer.encode(f"user\n{turn.text}"), *answer], False
        else:
            yield [*tokenizer.encode(turn.text, continues=True), end], True
            before = line  # the line break behind an answer, which nothing after the last one needs


def _alpaca(system: str, turns: list[Turn], tokenizer: Tokenizer) -> Iterator[Segment]:
    question, *answers = turns
    if len(answers) > 1:
        raise DataError(
            f"template 'alpaca' holds one question and its answer, this conversation has {len(turns)} turns: use "
            "another template"
        )
    first = system or ALPACA.format(ALPACA_INPUT if question.input else "")
    about = f"\n\n### Input:\n{question.input}" if question.input else ""
    yield tokenizer.encode(f"{first}\n\n### Instruction:\n{question.content}{about}\n\n### Response:"), False
    for answer in answers:
        yield [*tokenizer.encode(answer.text, continues=True), tokenizer.eos_id], True


Template = Callable[[str, list[Turn], Tokenizer], Iterator[Segment]]
TEMPLATES: dict[str, Template] = {
    "mistral-v1": _mistral_v1,
    "mistral-v2": _mistral_v3,
    "mistral-v3": _mistral_v3,
    "alpaca": _alpaca,
    "chatml": _chatml,
}
CONTROL_PIECES = {
    "mistral-v2": ("[INST]", "[/INST]"),
    "mistral-v3": ("[INST]", "[/INST]"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}


def _segments(system: str, turns: list[Turn], tokenizer: Tokenizer, template: str) -> Iterator[Segment]:
    return TEMPLATES[resolve(tokenizer, template)](system, turns, tokenizer)


def _control_ids(tokenizer: Tokenizer, template: str) -> list[int]:
    """Those of a template's control pieces that the tokenizer has."""
    ids = (tokenizer.control_id(piece) for piece in CONTROL_PIECES.get(template, ()))
    return [token for token in ids if token is not None]


def _lacks(tokenizer: Tokenizer, template: str) -> bool:
    return len(_control_ids(tokenizer, template)) < len(CONTROL_PIECES.get(template, ()))
