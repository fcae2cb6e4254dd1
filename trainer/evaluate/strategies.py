"""Prompting strategies, from a plain question to MedPrompt (Nori et al. 2023): which shots, which answer, whose vote.

| strategy | shots | answer | votes |
| --- | --- | --- | --- |
| zero-shot | none | as asked (`by`) | one |
| few-shot | drawn at random for each question | as asked | one |
| knn | the nearest questions | as asked | one |
| chain-of-thought | none | a generated chain of thought | one |
| self-consistency | none | a chain of thought | of 5 samples (Wang et al. 2022) |
| medprompt | the nearest questions, with chains of thought | a chain of thought | of 5 orders of the options |

The chains of thought of shots are the model's own: it answers the whole pool of shots, and the questions to which its
chain does not come to the right answer leave the pool. "Nearest" is by cosine of the model's own embeddings
(neighbours.py). Where the model has no positions for all shots, a prompt goes without the farthest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from random import Random
from typing import Literal

import numpy as np

from tokenmill.data.tokenizer import Tokenizer
from tokenmill.data.words import words
from tokenmill.trainer.distributed import World
from tokenmill.trainer.evaluate import prompts
from tokenmill.trainer.evaluate.answers import Answer, Vote, is_right, majority, normal, read
from tokenmill.trainer.evaluate.likelihood import continuation_logprobs
from tokenmill.trainer.evaluate.neighbours import embeddings, nearest
from tokenmill.trainer.evaluate.prompts import By, Prompt, Shot, Style
from tokenmill.trainer.evaluate.replies import Replies
from tokenmill.trainer.evaluate.tasks import Question
from tokenmill.trainer.model import Transformer
from tokenmill.trainer.model.generate import Sampling, generate

CONCLUDE = "The answer is"
LETTERS = Style("letter", template="plain")  # how an answer goes on after that


@dataclass(frozen=True)
class Strategy:
    shots: Literal["none", "random", "nearest"] = "none"
    reason: bool = False  # by chains of thought
    samples: int = 1  # votes on each prompt
    orders: int = 0  # prompts a question, each with the options in another order; 0: one, in the file's order
    k: int = 5  # shots a prompt, at most
    temperature: float = 0.0  # 0: greedy


STRATEGIES = {
    "zero-shot": Strategy(),
    "few-shot": Strategy(shots="random"),
    "knn": Strategy(shots="nearest"),
    "chain-of-thought": Strategy(reason=True),
    "self-consistency": Strategy(reason=True, samples=5, temperature=0.7),
    "medprompt": Strategy(shots="nearest", reason=True, orders=5),
}


def named(name: str, *, k: int | None = None, votes: int | None = None, temperature: float | None = None) -> Strategy:
    """The strategy of that name, with other numbers where they are given: `votes` is how many it asks for.

    Raises ValueError where there is no such strategy, or it has no use for one of them.
    """
    if name not in STRATEGIES:
        raise ValueError(f"no strategy {name!r}: choose one of {', '.join(STRATEGIES)}")
    strategy = STRATEGIES[name]
    if k is not None and strategy.shots == "none":
        raise ValueError(f"{name} takes no shots, so it has no k: leave it out, or choose few-shot, knn or medprompt")
    if votes is not None and strategy.samples == 1 and not strategy.orders:
        raise ValueError(f"{name} takes no votes: leave them out, or choose self-consistency or medprompt")
    given = {"k": k, "orders" if strategy.orders else "samples": votes, "temperature": temperature}
    return replace(strategy, **{key: value for key, value in given.items() if value is not None})


@dataclass(frozen=True)
class Asker:
    """A model and how it is asked."""

    model: Transformer
    tokenizer: Tokenizer
    template: str = "auto"
    seed: int = 0
    max_new_tokens: int | None = None  # of a generated answer; None: 512, but 32 to name an option without reasoning
    tokens_per_batch: int = 8192
    progress: bool = False
    world: World | None = None  # whose ranks ask a sharded model together: by likelihood alone
    replies: Replies | None = None  # keep what is generated, for a run that goes on; None: only in memory


def evaluate(
    asker: Asker,
    questions: Sequence[Question],
    strategy: Strategy = STRATEGIES["zero-shot"],
    *,
    by: By | None = None,
    pool: Sequence[Question] = (),
) -> list[Answer]:
    """Answer every question by a strategy, in the order given.

    `by` is how an answer is taken: "text", the option whose text is the likeliest (the sum over its tokens, EOS
    included: the probability of the answer as the model would give it, which is what tuning trains); "letter", the
    likeliest letter, after the options; "generate", what the model writes after the options. None: by text, or
    generated where there is a chain of thought or an open question. Of equal likelihoods, the first option.

    `pool` holds the questions that shots are taken from. What is random (shots, orders, samples) is a pure function of
    the seed and a question's place.

    Raises ValueError as `check` does, where a prompt without shots and its answer exceed the model's positions, or a
    log-probability is NaN.
    """
    check(questions, strategy, by=by, pool=pool, template=asker.template)
    style = Style(by or usual(questions, strategy), strategy.reason, asker.template)
    orders = [
        _orders(question, strategy.orders, Random(f"{asker.seed} orders {i}")) for i, question in enumerate(questions)
    ]
    listed = [[_reordered(question, order) for order in of] for question, of in zip(questions, orders, strict=True)]
    tasks = list(chain.from_iterable(listed))
    check_lengths(asker, tasks, [prompts.ask(question, [], asker.tokenizer, style) for question in tasks], style)
    shots = choose_shots(asker, questions, pool, strategy, style)
    fitted = [_ask(asker, of, found, style) for of, found in zip(listed, shots, strict=True)]
    asked = [prompt for of, _ in fitted for prompt in of]
    if style.by == "generate":
        votes = iter(_generated(asker, tasks, asked, style, strategy))
    else:
        votes = iter(_likeliest(asker, tasks, asked, style))
    return [
        _answer(question, [_unmapped(vote, order) for order in of for vote in next(votes)], count)
        for question, of, (_, count) in zip(questions, orders, fitted, strict=True)
    ]


def usual(questions: Sequence[Question], strategy: Strategy) -> By:
    """How an answer is taken unless said otherwise."""
    return "generate" if strategy.reason or not all(question.options for question in questions) else "text"


def choose_shots(
    asker: Asker, questions: Sequence[Question], pool: Sequence[Question], strategy: Strategy, style: Style
) -> list[list[Shot]]:
    """For each question the shots of its prompt, the nearest last, beside the question; at most `strategy.k`, fewer
    where the pool, without those that the model's own chains of thought do not get right, holds fewer."""
    if strategy.shots == "none":
        return [[] for _ in questions]
    if strategy.reason:
        worked = [
            Shot(question, vote.generated or "")
            for question, (vote,) in zip(pool, _chains(asker, pool, style), strict=True)
            if is_right(question, vote.choice) and not vote.forced
        ]
    else:
        worked = [Shot(question, prompts.reply(question, style)) for question in pool]
    k = min(strategy.k, len(worked))
    if strategy.shots == "random":
        return [Random(f"{asker.seed} shots {i}").sample(worked, k) for i in range(len(questions))]
    if not worked:
        return [[] for _ in questions]
    wanted, there = (
        embeddings(asker.model, asker.tokenizer, [q.question for q in of], tokens_per_batch=asker.tokens_per_batch)
        for of in (questions, [shot.question for shot in worked])
    )
    if not (np.isfinite(wanted).all() and np.isfinite(there).all()):
        raise ValueError("the model's hidden states are not finite; its weights may have diverged")
    return [[worked[i] for i in reversed(row)] for row in nearest(wanted, there, k).tolist()]


def _chains(asker: Asker, pool: Sequence[Question], style: Style) -> list[list[Vote]]:
    """The model's own chain of thought for each question of the pool, without shots, greedy."""
    asked = [prompts.ask(question, [], asker.tokenizer, style) for question in pool]
    check_lengths(asker, pool, asked, style)
    return _generated(asker, pool, asked, style, Strategy(reason=True))


def _ask(asker: Asker, listed: Sequence[Question], shots: Sequence[Shot], style: Style) -> tuple[list[Prompt], int]:
    """The prompts of a question, one for each order of its options, and how many shots each has: the nearest, as many
    as all of them have room for."""
    for count in range(len(shots), -1, -1):
        asked = [prompts.ask(question, shots[len(shots) - count :], asker.tokenizer, style) for question in listed]
        if all(_excess(asker, *one, style) <= 0 for one in zip(listed, asked, strict=True)):
            return asked, count
    raise AssertionError("checked before: without shots they have room")


def _likeliest(asker: Asker, questions: Sequence[Question], asked: Sequence[Prompt], style: Style) -> list[list[Vote]]:
    """For each prompt, one vote for the likeliest option."""
    found = continuation_logprobs(
        asker.model,
        [prompt.ids for prompt in asked],
        [prompts.answers(question, asker.tokenizer, style) for question in questions],
        tokens_per_batch=asker.tokens_per_batch,
        progress=asker.progress,
        world=asker.world,
    )
    votes = []
    for question, prompt, logprobs in zip(questions, asked, found, strict=True):
        if any(map(math.isnan, logprobs)):
            raise ValueError(f"{question.id}: the model's log-probabilities are NaN; its weights may have diverged")
        votes.append([Vote(prompt.text, logprobs.index(max(logprobs)), logprobs=tuple(logprobs))])
    return votes


def _generated(
    asker: Asker, questions: Sequence[Question], asked: Sequence[Prompt], style: Style, strategy: Strategy
) -> list[list[Vote]]:
    """For each prompt, a vote for each of its samples, read from what the model writes.

    A chain of thought that comes to no answer is followed by "The answer is", and the likeliest letter is taken
    (Kojima et al. 2022).
    """
    tokenizer = asker.tokenizer
    write = asker.replies.generate if asker.replies else generate
    replies = write(
        asker.model,
        [prompt.ids for prompt in asked],
        max_new_tokens=_longest(asker, questions, style),
        stop=prompts.stops(tokenizer, style),
        sampling=Sampling(temperature=strategy.temperature, seed=asker.seed),
        samples=strategy.samples,
        tokens_per_batch=asker.tokens_per_batch,
        progress=asker.progress,
    )
    votes: list[list[Vote]] = []
    undecided: list[tuple[int, int]] = []
    for i, (question, prompt, samples) in enumerate(zip(questions, asked, replies, strict=True)):
        texts = [tokenizer.decode(ids).strip() for ids in samples]
        votes.append([Vote(prompt.text, read(text, question, style), generated=text) for text in texts])
        if question.options and style.reason:
            undecided += [(i, j) for j, vote in enumerate(votes[i]) if vote.choice is None]
    forced = continuation_logprobs(
        asker.model,
        [[*asked[i].ids, *replies[i][j], *_conclusion(asker)] for i, j in undecided],
        [prompts.answers(questions[i], tokenizer, LETTERS) for i, _ in undecided],
        tokens_per_batch=asker.tokens_per_batch,
    )
    for (i, j), logprobs in zip(undecided, forced, strict=True):
        choice = logprobs.index(max(logprobs))
        text = f"{votes[i][j].generated} {CONCLUDE} {prompts.letters(questions[i])[choice]}."
        votes[i][j] = replace(votes[i][j], choice=choice, generated=text, logprobs=tuple(logprobs), forced=True)
    return votes


def check_lengths(asker: Asker, questions: Sequence[Question], asked: Sequence[Prompt], style: Style) -> None:
    """Raises ValueError naming the question whose prompt, without shots, and answer exceed the model's positions."""
    most = asker.model.config.max_positions
    for question, prompt in zip(questions, asked, strict=True):
        if (excess := _excess(asker, question, prompt, style)) > 0:
            answer = most + excess - len(prompt.ids)
            raise ValueError(
                f"{question.id}: its prompt has {len(prompt.ids)} tokens, which with an answer of {answer} exceeds the "
                f"model's {most} positions: take fewer new tokens, or leave the question out"
            )


def _excess(asker: Asker, question: Question, prompt: Prompt, style: Style) -> int:
    """By how many tokens a prompt and its longest answer exceed the model's positions."""
    if style.by == "generate":
        # What may follow a chain of thought without an answer: its end, and a letter.
        letters = prompts.answers(question, asker.tokenizer, LETTERS) if style.reason else []
        after = len(_conclusion(asker)) + max(map(len, letters)) if letters else 0
        answer = _longest(asker, [question], style) + after
    else:
        answer = max(map(len, prompts.answers(question, asker.tokenizer, style)))
    return len(prompt.ids) + answer - asker.model.config.max_positions


def _conclusion(asker: Asker) -> list[int]:
    return asker.tokenizer.encode(f" {CONCLUDE}", continues=True)


def _longest(asker: Asker, questions: Sequence[Question], style: Style) -> int:
    """How many tokens a generated answer may have."""
    short = bool(questions and questions[0].options) and not style.reason
    return asker.max_new_tokens or (32 if short else 512)


def _orders(question: Question, n: int, random: Random) -> list[tuple[int, ...]] | list[None]:
    """n random orders of the options, no two the same as long as there are others; [None]: as they are."""
    if n == 0:
        return [None]
    found: list[tuple[int, ...]] = []
    while len(found) < n:
        order = tuple(random.sample(range(len(question.options)), len(question.options)))
        if order not in found or len(found) >= math.factorial(len(question.options)):
            found.append(order)
    return found


def _reordered(question: Question, order: tuple[int, ...] | None) -> Question:
    if order is None:
        return question
    return replace(question, options=tuple(question.options[i] for i in order), answer=order.index(question.answer))


def _unmapped(vote: Vote, order: tuple[int, ...] | None) -> Vote:
    """A vote on options in this order as one on those of the file."""
    if order is None:
        return vote
    choice = order[vote.choice] if isinstance(vote.choice, int) else None
    logprobs = vote.logprobs and tuple(vote.logprobs[order.index(i)] for i in range(len(order)))
    return replace(vote, choice=choice, order=order, logprobs=logprobs)


def _answer(question: Question, votes: list[Vote], shots: int) -> Answer:
    prediction, share = majority(votes)
    confidence = share if len(votes) > 1 else None
    if len(votes) == 1 and votes[0].generated is None and votes[0].logprobs:
        highest = max(votes[0].logprobs)
        confidence = 1 / sum(math.exp(logprob - highest) for logprob in votes[0].logprobs)
    return Answer(question, prediction, confidence, shots, tuple(votes))


def check(
    questions: Sequence[Question],
    strategy: Strategy,
    *,
    by: By | None = None,
    pool: Sequence[Question] = (),
    template: str = "auto",
) -> None:
    """Raises ValueError where strategy, `by`, pool, template and questions do not go together, or a pool's question is
    to be answered too, with the same options. It needs no model: for before one is loaded.
    """
    if not questions:
        raise ValueError("no questions to answer: give at least one")
    first = questions[0]
    by = by or usual(questions, strategy)
    for question in (*questions, *pool):
        if bool(question.options) != bool(first.options):
            raise ValueError(f"{question.id} and {first.id}: expected options in both questions, or in none")
    if by not in ("text", "letter", "generate"):
        raise ValueError(f"no way {by!r} to take an answer: choose one of text, letter, generate")
    if by != "generate" and (strategy.reason or not first.options):
        what = "a chain of thought" if strategy.reason else f"{first.id}: an answer without options"
        raise ValueError(f"{what} is generated, so it cannot be taken by {by}: choose generate")
    if strategy.orders and (not first.options or by == "text"):
        raise ValueError(f"{first.id}: no options in the prompt to shuffle: choose a strategy without, or by letter")
    if strategy.samples > 1 and (strategy.temperature == 0 or by != "generate"):
        raise ValueError(f"{strategy.samples} samples would be the same: give a temperature, and generate the answers")
    if strategy.samples < 1 or strategy.k < 1 or strategy.orders < 0:
        raise ValueError(f"{strategy}: expected positive samples and k, and no negative orders")
    if not 0 <= strategy.temperature < math.inf:
        raise ValueError(f"temperature is {strategy.temperature}: expected 0 (the most likely token) or more")
    if strategy.shots == "none" and pool:
        raise ValueError("the strategy takes no shots: leave them out, or choose few-shot, knn or medprompt")
    if strategy.shots != "none" and len(pool) < strategy.k:
        raise ValueError(f"{len(pool)} questions to take {strategy.k} shots from: give more (--shots), or a smaller k")
    if strategy.shots != "none" and template == "alpaca":
        raise ValueError("template 'alpaca' holds one question and no shots: choose another, or a strategy without")
    asked = {_identity(question): question for question in questions}
    for shot in pool:
        if same := asked.get(_identity(shot)):
            raise ValueError(f"{shot.id}: is to be answered too ({same.id}): take shots from another split of the data")


def _identity(question: Question) -> object:
    """What two questions have in common that are the same: in exams, many have one stem ("All are true except") and
    other options."""
    return tuple(words(question.question)), frozenset(map(normal, question.options))
