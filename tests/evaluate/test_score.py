"""The score of a model that knows, of one that errs, and the interval of a share."""

from __future__ import annotations

import math

import pytest
import torch

from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.evaluate.score import chance, multiple_choice, wilson
from tokenmill.trainer.evaluate.strategies import Asker, evaluate
from tokenmill.trainer.evaluate.tasks import Question
from tokenmill.trainer.model import ModelConfig, Transformer

QUESTIONS = [
    Question("Which is red?", ("the sky", "blood", "grass"), 1, "q:1"),
    Question("Which chapter names a fever?", ("Neoplasms", "Certain infectious and parasitic diseases"), 0, "q:2"),
    Question("What is the plural of mouse?", ("mouses", "mice", "meese", "a mouse", "many of them"), 1, "q:3"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.open("mistral-v1")


@pytest.fixture
def model(tokenizer: Tokenizer) -> Transformer:
    config = ModelConfig(
        dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=tokenizer.vocab_size,
        sliding_window=32,
    )  # fmt: skip
    model = Transformer(config)
    model.initialise(0)
    return model


@pytest.mark.parametrize("by", ["text", "letter"])
def test_it_is_zero_shot_evaluation_in_one_number(model, tokenizer, by):
    result = multiple_choice(model, tokenizer, QUESTIONS, by=by, tokens_per_batch=50, progress=False)
    answers = evaluate(Asker(model, tokenizer), QUESTIONS, by=by)
    assert list(result.predictions) == [answer.prediction for answer in answers]
    assert result.n == 3
    assert result.accuracy == sum(answer.correct for answer in answers) / 3
    assert result.chance == chance(QUESTIONS) == pytest.approx((1 / 3 + 1 / 2 + 1 / 5) / 3)
    assert (result.low, result.high) == wilson(round(3 * result.accuracy), 3)


def test_a_model_that_knows_is_right_and_one_that_errs_is_wrong(model, tokenizer):
    """An option's tokens made likely (or, of the right one, unlikely) everywhere decide the score."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.weight[:] = 1.0
        model.embed.weight[:] = 1.0
        for question in QUESTIONS[:2]:
            model.head.weight[tokenizer.encode(question.options[question.answer])] = 1.0
    assert multiple_choice(model, tokenizer, QUESTIONS[:2], progress=False).accuracy == 1.0
    with torch.no_grad():
        model.head.weight.neg_()
    assert multiple_choice(model, tokenizer, QUESTIONS[:2], progress=False).accuracy == 0.0


def test_wilson_against_its_definition():
    """The ends are the proportions p from which the one observed is just z standard errors away."""
    for successes, n in ((8, 10), (1, 300), (150, 300), (299, 300)):
        for end in wilson(successes, n):
            assert abs(successes / n - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / n))
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-7)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-7)
    assert wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-7)
