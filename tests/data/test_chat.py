"""Mistral's chat templates against mistral-common's own request encoder, token for token; and the rows of chats."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from tokenmill.data.chat import Turn, alpaca_messages, parse, prompt, render, sharegpt_messages
from tokenmill.data.documents import texts
from tokenmill.data.errors import DataError
from tokenmill.data.tokenizer import Tokenizer

TEMPLATES = ["mistral-v1", "mistral-v2", "mistral-v3"]


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


CONVERSATIONS = {
    "one turn": chat("What is a fever?", "A high temperature."),
    "several turns": chat("Hi", "Hello.", "And now?", "Still here.", "Bye", "Goodbye!"),
    "system": chat("Hi", "Hello.", system="Be brief."),
    "system, several turns": chat("Hi", "Hello.", "And now?", "Still\n here.", system="Be brief.\nAnd kind."),
    "empty system": chat("Hi", "Hello.", system=""),
    "spaces": chat("  Hi  ", "  Hello.  ", "a\n", "\nb \n"),
    "control pieces as text": chat("say </s> and [INST] [/INST] <s>", "</s>[INST]", "again", "no </s>"),
    "unicode": chat("naïve 日本語 ☃?", "µg → 3.5 ℃", "\u2581e\u0301\u200d", "👩\u200d⚕️ ﬁ \ufeff", system="Ⅳ"),
    "hardly anything": chat(".", "\u200b", "\u200b\n", "0", system="\n"),
    "every kind of piece as text": chat("<unk><0x0A>[TOOL_CALLS]", "[AVAILABLE_TOOLS][INST]", "▁", "▁a"),
    "two of a role": [
        {"role": "user", "content": "One."},
        {"role": "user", "content": "Two."},
        {"role": "assistant", "content": "Three."},
    ],
    "system later": [*chat("One.", "Two."), {"role": "system", "content": "Late."}, *chat("Three.", "Four.")],
}


@pytest.fixture(scope="module", params=TEMPLATES)
def pair(request):
    return request.param, Tokenizer.open(request.param), getattr(MistralTokenizer, request.param[-2:])()


def reference(encoder, messages) -> list[int]:
    classes = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    request = ChatCompletionRequest(messages=[classes[m["role"]](content=m["content"]) for m in messages])
    normalized = encoder._instruct_request_normalizer.from_chat_completion_request(request)
    return encoder.instruct_tokenizer.encode_instruct(normalized).tokens


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_same_ids_as_mistral_common(pair, name):
    template, tokenizer, encoder = pair
    messages = CONVERSATIONS[name]
    assert render(messages, tokenizer, template)[0] == reference(encoder, messages)
    assert prompt(messages[:-1], tokenizer, template) == reference(encoder, messages[:-1])
    assert render(messages, tokenizer) == render(messages, tokenizer, template)  # "auto"


@settings(deadline=None, max_examples=100)
@given(texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=5), system=st.none() | st.text())
def test_any_text(pair, texts, system):
    template, tokenizer, encoder = pair
    messages = chat(*texts, system=system)
    encode = prompt if len(texts) % 2 else lambda *arguments: render(*arguments)[0]
    assert encode(messages, tokenizer, template) == reference(encoder, messages)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_loss_on_the_answers_and_their_eos_alone(pair, name):
    template, tokenizer, _ = pair
    messages = CONVERSATIONS[name]
    ids, mask = render(messages, tokenizer, template)
    assert len(mask) == len(ids)
    learned = [token for token, loss in zip(ids, mask, strict=True) if loss]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    stripped = [a if template == "mistral-v1" else a.rstrip(" ") for a in answers]
    assert learned == [token for answer in stripped for token in [*tokenizer.encode(answer), tokenizer.eos_id]]
    before = prompt(messages[:-1], tokenizer, template)
    assert ids[: len(before)] == before  # the border between prompt and answer is one of tokens
    assert mask[len(before) :] == [1] * (len(ids) - len(before))
    assert mask[len(before) - 1] == 0


def test_loss_on_the_last_answer(pair):
    template, tokenizer, _ = pair
    messages = CONVERSATIONS["system, several turns"]
    ids, mask = render(messages, tokenizer, template, "last")
    assert ids == render(messages, tokenizer, template)[0]
    before = len(prompt(messages[:-1], tokenizer, template))
    assert mask == [0] * before + [1] * (len(ids) - before)


def test_known_ids_of_v1():
    tokenizer = Tokenizer.open("mistral-v1")
    ids, mask = render(chat("Hi", "Yes"), tokenizer)
    assert ids == [1, 733, 16289, 28793, 15359, 733, 28748, 16289, 28793, 5592, 2]
    assert mask == [0] * 9 + [1, 1]


def test_text_never_makes_a_control_id():
    tokenizer = Tokenizer.open("mistral-v3")
    ids, _ = render(chat("</s>[/INST]", "[INST]</s>"), tokenizer)
    assert [token for token in ids if token < 10] == [1, 3, 4, 2]


def test_alpaca_rows():
    row = {"instruction": "Name it.", "input": "A bone.", "output": "Femur."}
    assert parse(alpaca_messages(row)) == ("", [Turn("user", "Name it.", "A bone."), Turn("assistant", "Femur.")])
    assert texts(alpaca_messages(row)) == ["Name it.\n\nA bone.", "Femur."]
    assert texts(alpaca_messages({**row, "input": ""})) == ["Name it.", "Femur."]
    assert texts(alpaca_messages({"instruction": "Name it.", "output": "Femur."})) == ["Name it.", "Femur."]
    earlier = {"system": "Be brief.", "history": [["Hi", "Hello."], ["And?", "Ask."]]}
    expected = ["Be brief.", "Hi", "Hello.", "And?", "Ask.", "Name it.\n\nA bone.", "Femur."]
    assert texts(alpaca_messages({**row, **earlier})) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "", "output": "x"}, "'instruction' is empty"),
        ({"instruction": "x", "output": " "}, "'output' is empty"),
        ({"instruction": "x", "input": 3, "output": "x"}, "'input' is a int"),
        ({"instruction": "x", "output": "x", "system": ["x"]}, "'system' is a list"),
        ({"instruction": "x", "output": "x", "history": "xx"}, "'history' must be a list of pairs"),
        ({"instruction": "x", "output": "x", "history": ["xx"]}, "'history' must be a list of pairs"),
        ({"instruction": "x", "output": "x", "history": [["x", "y", "z"]]}, "'history' must be a list of pairs"),
        ({"instruction": "x", "output": "x", "history": [["x", None]]}, r"message 1 \(assistant\) has no text"),
    ],
)
def test_bad_alpaca_rows(row, message):
    with pytest.raises(DataError, match=message):
        parse(alpaca_messages(row))


def test_sharegpt_rows():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    assert sharegpt_messages({"conversations": turns}) == chat("Hi", "Hello.")
    said = chat("Hi", "Hello.", system="Be brief.")
    assert sharegpt_messages({"conversations": turns, "system": "Be brief."}) == said
    assert sharegpt_messages({"conversations": [{"from": "system", "value": "Be brief."}, *turns]}) == said
    assert sharegpt_messages({"conversations": said}) == said  # OpenAI's names under ShareGPT's key
    for name in ("chatgpt", "bing", "bard", "model", "assistant"):
        assert sharegpt_messages({"conversations": [turns[0], {"from": name, "value": "Hello."}]}) == chat(
            "Hi", "Hello."
        )


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        ("text", "'conversations' is a str"),
        (["x"], "message 0 is a str, expected an object with 'from' and 'value'"),
        (["human", "human", "gpt"], r"messages 0 and 1 are both from 'human': .*must alternate"),
        (["human", "gpt", "gpt"], r"messages 1 and 2 are both from 'gpt'"),
        (
            ["human", "function_call", "observation", "gpt"],
            "message 1 is from 'function_call', expected 'human', 'gpt'",
        ),
        (["human", None], "message 1 is from None"),
        (["human", ["gpt"]], r"message 1 is from \['gpt'\]"),
        (["gpt", "human", "gpt"], "no user's message to begin with"),
        (["human", "gpt", "human"], "ends with a user's message"),
        (["system"], "no user's message"),
    ],
)
def test_bad_sharegpt_rows(small, conversations, message):
    if isinstance(conversations, list) and conversations != ["x"]:
        conversations = [{"from": name, "value": "Text."} for name in conversations]
    with pytest.raises(DataError, match=message):
        render(sharegpt_messages({"conversations": conversations}), small)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("text", "'messages' is a str"),
        (3, "'messages' is a int"),
        ([], "no user's message"),
        (["x"], "message 0 has role None"),
        ([{"role": "tool", "content": "x"}], "message 0 has role 'tool'"),
        ([{"role": "user", "content": "x", "input": 3}], r"message 0 \(user\) has an 'input' that is a int"),
        ([*chat("Hi"), {"role": "assistant", "content": "x", "tool_calls": [{}]}], "message 1 calls tools"),
        (chat("Hi", ""), r"message 1 \(assistant\) has no text"),
        ([{"role": "user"}], r"message 0 \(user\) has no text"),
        ([{"role": "user", "content": ["x"]}], r"message 0 \(user\) has no text"),
        (chat("Hi"), "ends with a user's message"),
        ([{"role": "assistant", "content": "x"}], "no user's message to begin with"),
    ],
)
def test_bad_conversations(small, messages, message):
    with pytest.raises(DataError, match=message):
        render(messages, small)


def test_bad_templates(small):
    with pytest.raises(DataError, match="the last message must be the user's"):
        prompt(chat("Hi", "Hello."), small)
    with pytest.raises(DataError, match=r"template 'mistral-v3' needs the control pieces .* 'tokenizer\.model'"):
        render(chat("Hi", "Hello."), small, "mistral-v3")
    with pytest.raises(DataError, match="loss on 'first', expected one of"):
        render(chat("Hi", "Hello."), small, loss_on="first")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="template 'vicuna' is not one of"):
        render(chat("Hi", "Hello."), small, "vicuna")
