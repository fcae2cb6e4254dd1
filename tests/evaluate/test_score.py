"""Multiple choice against each option scored alone, in fp64, one token at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenmill.data.batch import Batch
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.kernels.layout import Layout
from tokenmill.trainer.evaluate import score
from tokenmill.trainer.evaluate.prompts import STRATEGIES
from tokenmill.trainer.evaluate.score import multiple_choice, wilson
from tokenmill.trainer.evaluate.tasks import Question
from tokenmill.trainer.model import ModelConfig, MoEConfig, Transformer

QUESTIONS = [
    Question("Which is red?", ("the sky", "blood", "grass"), 1, "q:1"),
    Question("Which chapter names a fever?", ("Neoplasms", "Certain infectious and parasitic diseases"), 0, "q:2"),
    Question("What is the plural of mouse?", ("mouses", "mice", "meese", "a mouse", "many of them"), 1, "q:3"),
]


@dataclass
class Output:
    hidden: Tensor


class Head(nn.Module):
    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, dim))

    def logprobs(self, hidden: Tensor, targets: Tensor, *, rows: Tensor) -> Tensor:
        chosen = (hidden[rows] @ self.weight.T).log_softmax(-1).gather(1, targets[rows][:, None])[:, 0]
        return torch.zeros(len(hidden)).index_copy(0, rows.long(), chosen)


class RunningMean(nn.Module):
    """The model's interface over the plainest causal model: hidden is the mean of the document's embeddings so far."""

    def __init__(self, vocab_size: int, dim: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, dim))
        self.head = Head(vocab_size, dim)
        self.batches: list[int] = []

    def forward(self, tokens: Tensor, layout: Layout) -> Output:
        assert not torch.is_grad_enabled()
        self.batches.append(len(tokens))
        documents = self.weight[tokens].split(layout.cu_seqlens.diff().tolist())
        return Output(torch.cat([d.cumsum(0) / torch.arange(1, len(d) + 1)[:, None] for d in documents]))


@pytest.fixture
def model(tokenizer: Tokenizer) -> Any:
    return RunningMean(tokenizer.vocab_size)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.open("mistral-v1")


def alone(model: RunningMean, prompt: list[int], continuation: list[int]) -> float:
    """The continuation's log-probability in fp64, by the chain rule: one token after the other."""
    weight, head = model.weight.detach().double(), model.head.weight.detach().double()
    ids, total = list(prompt), 0.0
    for token in continuation:
        logits = head @ weight[ids].mean(0)
        total += float(logits[token] - logits.logsumexp(0))
        ids.append(token)
    return total


@pytest.mark.parametrize("by", ["text", "letter"])
@pytest.mark.parametrize("tokens_per_batch", [1, 50, 8192])
def test_likelihood_of_each_option_as_when_alone(model, tokenizer, by, tokens_per_batch):
    choices = [STRATEGIES[by](question, tokenizer, "auto") for question in QUESTIONS]
    pairs = [(choice.prompt, continuation) for choice in choices for continuation in choice.continuations]
    expected = [alone(model, *pair) for pair in pairs]
    found = list(score._logprobs(model, pairs, tokens_per_batch, progress=False))
    assert found == pytest.approx(expected, rel=1e-5)
    longest = max(len(p) + len(c) for p, c in pairs)
    assert max(model.batches) <= max(tokens_per_batch, longest)
    assert len(model.batches) == {1: len(pairs), 8192: 1}.get(tokens_per_batch, len(model.batches))


@pytest.mark.parametrize("by", ["text", "letter"])
def test_the_most_likely_option_is_the_answer(model, tokenizer, by):
    result = multiple_choice(model, tokenizer, QUESTIONS, by=by, tokens_per_batch=50, progress=False)
    best = []
    for question in QUESTIONS:
        choice = STRATEGIES[by](question, tokenizer, "auto")
        scores = [alone(model, choice.prompt, continuation) for continuation in choice.continuations]
        best.append(scores.index(max(scores)))
    assert list(result.predictions) == best
    assert result.n == 3
    assert result.accuracy == sum(b == q.answer for b, q in zip(best, QUESTIONS, strict=True)) / 3
    assert result.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 5) / 3)
    assert (result.low, result.high) == wilson(round(3 * result.accuracy), 3)


def test_a_model_that_knows_is_right_and_one_that_errs_is_wrong(model, tokenizer):
    """An option's tokens made likely (or, of the right one, unlikely) everywhere decide the score."""
    with torch.no_grad():
        model.weight[:] = 1.0
        model.head.weight[:] = 0.0
        for question in QUESTIONS[:2]:
            model.head.weight[tokenizer.encode(question.options[question.answer])] = 10.0
    assert multiple_choice(model, tokenizer, QUESTIONS[:2], progress=False).accuracy == 1.0
    with torch.no_grad():
        model.head.weight.neg_()
    assert multiple_choice(model, tokenizer, QUESTIONS[:2], progress=False).accuracy == 0.0


def test_the_real_model_has_the_interface(tokenizer):
    config = ModelConfig(
        dim=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=tokenizer.vocab_size,
        sliding_window=7, moe=MoEConfig(4, 2),
    )  # fmt: skip
    transformer = Transformer(config)
    transformer.initialise(3)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(4)  # far from the small weights at which all options are nearly equal
    choices = [STRATEGIES["text"](question, tokenizer, "auto") for question in QUESTIONS]
    pairs = [(choice.prompt, continuation) for choice in choices for continuation in choice.continuations]
    expected = []
    for prompt, continuation in pairs:
        logits = transformer.logits(Batch.from_documents([prompt + continuation])).detach().double()
        rows = logits[-1 - len(continuation) : -1].log_softmax(-1)
        expected.append(rows.gather(1, torch.tensor(continuation)[:, None]).sum().item())
    assert list(score._logprobs(transformer, pairs, 100, progress=False)) == pytest.approx(expected, rel=1e-5)


def test_wilson_against_its_definition():
    """The ends are the proportions p from which the one observed is just z standard errors away."""
    for successes, n in ((8, 10), (1, 300), (150, 300), (299, 300)):
        for end in wilson(successes, n):
            assert abs(successes / n - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / n))
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-7)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-7)
    assert wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-7)


def test_bad_calls_are_errors(model, tokenizer):
    with pytest.raises(ValueError, match="no prompting strategy 'texts': choose one of text, letter"):
        multiple_choice(model, tokenizer, QUESTIONS, by="texts", progress=False)
    with pytest.raises(ValueError, match="no questions"):
        multiple_choice(model, tokenizer, [], progress=False)
    with torch.no_grad():
        model.weight[:] = math.nan
    with pytest.raises(ValueError, match="q:1: the model's log-probabilities are NaN"):
        multiple_choice(model, tokenizer, QUESTIONS, progress=False)
