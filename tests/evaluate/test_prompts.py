"""A question as token ids: exactly what the chat template makes of the whole conversation, cut in token space."""

from __future__ import annotations

import pytest

from tokenmill.data import chat
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.evaluate.prompts import by_letter, by_text
from tokenmill.trainer.evaluate.tasks import Question

QUESTION = Question('Which chapter does "Polyp of vulva" belong to?', ("Neoplasms", " Diseases </s>"), 1, "q:1")


@pytest.fixture(scope="module", params=["mistral-v1", "mistral-v3"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer.open(request.param)


def test_options_follow_the_prompt_as_the_answer_would(tokenizer):
    choice = by_text(QUESTION, tokenizer, "auto")
    for option, continuation in zip(QUESTION.options, choice.continuations, strict=True):
        conversation = [{"role": "user", "content": QUESTION.question}, {"role": "assistant", "content": option}]
        ids, mask = chat.render(conversation, tokenizer, "auto")
        assert choice.prompt + continuation == ids
        assert [0] * len(choice.prompt) + [1] * len(continuation) == mask
        assert continuation == [*tokenizer.encode(option), tokenizer.eos_id]


def test_letters_are_the_continuations_and_the_options_are_in_the_prompt(tokenizer):
    choice = by_letter(QUESTION, tokenizer, "auto")
    assert choice.continuations == [tokenizer.encode("A"), tokenizer.encode("B")]
    text = tokenizer.decode(choice.prompt)
    assert "\nA. Neoplasms\nB.  Diseases </s>\n" in text
    assert tokenizer.eos_id not in choice.prompt


def test_letters_run_out():
    question = Question("?", tuple(f"option {i}" for i in range(27)), 0, "file:7")
    with pytest.raises(ValueError, match="file:7: 27 options"):
        by_letter(question, Tokenizer.open("mistral-v1"), "auto")
