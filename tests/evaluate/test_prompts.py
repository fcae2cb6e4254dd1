"""A question as token ids: exactly what the chat template makes of the whole conversation, cut in token space."""

from __future__ import annotations

import pytest

from tokenmill.data import chat
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.evaluate.prompts import Shot, Style, answers, ask, content, letters, reply, stops
from tokenmill.trainer.evaluate.tasks import Question

QUESTION = Question('Which chapter does "Polyp of vulva" belong to?', ("Neoplasms", " Diseases </s>"), 1, "q:1")
EARLIER = Question("What is\n\nred?", ("the sky", "blood", "grass "), 1, "q:2")
OPEN = Question("What is red?", (), -1, "q:3", ("blood", "a rose"))


@pytest.fixture(scope="module", params=["mistral-v1", "mistral-v3"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer.open(request.param)


@pytest.mark.parametrize("shots", [[], [Shot(EARLIER, "blood"), Shot(QUESTION, "Neoplasms")]])
@pytest.mark.parametrize("question", [QUESTION, EARLIER])
def test_options_follow_the_prompt_as_the_answer_would(tokenizer, shots, question):
    style = Style("text")
    prompt = ask(question, shots, tokenizer, style)
    conversation = []
    for option, continuation in zip(question.options, answers(question, tokenizer, style), strict=True):
        conversation = []
        for asked, said in [*((shot.question.question, shot.reply) for shot in shots), (question.question, option)]:
            conversation += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        ids, _ = chat.render(conversation, tokenizer, "auto")
        assert prompt.ids + continuation == ids
    assert prompt.text == conversation[:-1]


def test_letters_are_the_answers_and_the_options_are_in_the_prompt(tokenizer):
    style = Style("letter")
    assert answers(QUESTION, tokenizer, style) == [tokenizer.encode("A"), tokenizer.encode("B")]
    prompt = ask(QUESTION, [], tokenizer, style)
    text = tokenizer.decode(prompt.ids)
    assert "\nA. Neoplasms\nB.  Diseases </s>\n" in text
    assert tokenizer.eos_id not in prompt.ids
    assert reply(QUESTION, style) == "B"
    assert reply(QUESTION, Style("text")) == " Diseases </s>"
    assert reply(OPEN, Style("generate")) == "blood"


def test_what_is_asked_for():
    assert content(QUESTION, Style("text")) == QUESTION.question
    assert content(QUESTION, Style("generate")).endswith("\nAnswer with the letter of the right option.")
    assert "Think step by step" in content(QUESTION, Style("generate", reason=True)).splitlines()[-1]
    assert content(OPEN, Style("generate")) == "What is red?"
    assert content(OPEN, Style("generate", reason=True)).endswith('then end with "The answer is" and the answer.')


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (Style("text", template="plain"), "Question: What is\n\nred?\nAnswer: blood\n\nQuestion: {q}\nAnswer:"),
        (
            Style("letter", template="plain"),
            "Question: What is\n\nred?\nA. the sky\nB. blood\nC. grass \nAnswer: blood\n\n"
            "Question: {q}\nA. Neoplasms\nB.  Diseases </s>\nAnswer:",
        ),
    ],
)
def test_the_plain_form(tokenizer, style, text):
    """With an answer behind it, the ids are those of the whole text: the border adds or takes nothing."""
    prompt = ask(QUESTION, [Shot(EARLIER, "blood")], tokenizer, style)
    assert prompt.text == text.format(q=QUESTION.question)
    said = QUESTION.options if style.by == "text" else "AB"
    for option, continuation in zip(said, answers(QUESTION, tokenizer, style), strict=True):
        assert prompt.ids + continuation == [tokenizer.bos_id, *tokenizer.encode(f"{prompt.text} {option}")]


def test_a_plain_chain_of_thought_is_one_line(tokenizer):
    style = Style("generate", reason=True, template="plain")
    text = ask(OPEN, [Shot(OPEN, "Roses\n\nare red.\nThe answer is a rose.")], tokenizer, style).text
    assert text == (
        "Question: What is red?\nAnswer: Let's think step by step. Roses are red. The answer is a rose.\n\n"
        "Question: What is red?\nAnswer: Let's think step by step."
    )


def test_where_an_answer_stops(tokenizer):
    assert stops(tokenizer, Style()) == {tokenizer.eos_id}
    ends = stops(tokenizer, Style(template="plain"))
    assert tokenizer.eos_id in ends
    for text in ("B\n", "B\n\n", "Roses are red.\nThe"):
        assert ends & set(tokenizer.encode(text))
    assert not ends & set(tokenizer.encode("Roses are red. The answer is B."))


def test_letters_run_out():
    question = Question("?", tuple(f"option {i}" for i in range(27)), 0, "file:7")
    with pytest.raises(ValueError, match="file:7: 27 options"):
        letters(question)
    with pytest.raises(ValueError, match="file:7: 27 options"):
        ask(question, [], Tokenizer.open("mistral-v1"), Style("letter"))
