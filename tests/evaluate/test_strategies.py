"""Strategies as a whole: which shots a prompt shows, what is asked in which order, and what the votes come to.

The model that embeds and scores is real, tiny and random. Where an answer is generated, a student whose knowledge the
test sets writes it from the prompt alone, as a model would.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tokenmill.data import chat
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.evaluate import strategies
from tokenmill.trainer.evaluate.answers import Answer
from tokenmill.trainer.evaluate.neighbours import embeddings
from tokenmill.trainer.evaluate.prompts import Shot, Style
from tokenmill.trainer.evaluate.strategies import STRATEGIES, Asker, Strategy, evaluate, named
from tokenmill.trainer.evaluate.tasks import Question
from tokenmill.trainer.model import ModelConfig, MoEConfig, Transformer
from tokenmill.trainer.model.generate import Sampling

OPTIONS = ("sky", "blood", "grass", "ice")
QUESTIONS = [
    Question(f"Which is like a {what}?", OPTIONS, i % 4, f"q:{i}") for i, what in enumerate(["rose", "leaf"] * 2)
]
QUESTIONS = [replace(q, question=f"{i} {q.question}") for i, q in enumerate(QUESTIONS)]
POOL = [Question(f"What is as {how} as can be?", OPTIONS, i % 4, f"p:{i}") for i, how in enumerate(
    ["red", "green", "cold", "blue", "old and red", "new", "small", "far away", "loud", "sweet"]
)]  # fmt: skip
OPEN = [
    Question("What is red?", (), -1, "o:1", ("blood", "a rose")),
    Question("What is cold?", (), -1, "o:2", ("ice",)),
]


@pytest.fixture(scope="module")
def asker() -> Asker:
    tokenizer = Tokenizer.open("mistral-v1")
    config = ModelConfig(
        dim=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=tokenizer.vocab_size,
        sliding_window=32, moe=MoEConfig(4, 2),
    )  # fmt: skip
    model = Transformer(config)
    model.initialise(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return Asker(model, tokenizer, max_new_tokens=4)


class Student:
    """Stands for `generate`. `write(asked, listed, call, sample)` gives the answer to the last question of a prompt:
    its text, its options as listed, and how many prompts were answered before."""

    def __init__(self, asker: Asker, write: Callable[[str, list[str], int, int], str]) -> None:
        self.tokenizer = asker.tokenizer
        self.write = write
        self.calls: list[dict] = []

    def __call__(self, model, prompts, **options):
        first = sum(len(call["prompts"]) for call in self.calls)
        self.calls.append({**options, "prompts": [self.tokenizer.decode(ids) for ids in prompts]})
        found = []
        for number, prompt in enumerate(self.calls[-1]["prompts"], first):
            asked, *listed = prompt.rsplit("[INST] ", 1)[1].removesuffix(" [/INST]").split("\n")
            options_listed = [line[3:] for line in listed if re.match("[A-Z]\\. ", line)]
            texts = [self.write(asked, options_listed, number, s) for s in range(options["samples"])]
            found.append([self.tokenizer.encode(text) for text in texts])
        return found


@pytest.fixture
def taught(asker, monkeypatch):
    """A function that puts a student in the model's place."""

    def teach(write: Callable[[str, list[str], int, int], str]) -> Student:
        student = Student(asker, write)
        monkeypatch.setattr(strategies, "generate", student)
        return student

    return teach


def chain(listed: list[str], option: str) -> str:
    return f"Think of {option}.\nThe answer is {'ABCD'[listed.index(option)]}."


def votes_of(answer: Answer) -> list[Any]:
    """Untyped: a choice is an index or words, a prompt text or messages."""
    return list(answer.votes)


def shown(prompt) -> list[str]:
    """The questions of a prompt's shots."""
    return [m["content"].split("\n")[0] for m in prompt if m["role"] == "user"][:-1]


@pytest.mark.parametrize("by", ["text", "letter"])
def test_zero_shot_takes_the_likeliest(asker, by):
    answers = evaluate(asker, QUESTIONS, by=by)
    assert [answer.question for answer in answers] == QUESTIONS
    for answer in answers:
        (vote,) = votes_of(answer)
        assert answer.prediction == vote.choice == int(np.argmax(vote.logprobs))
        assert answer.confidence == pytest.approx(float(np.exp(vote.logprobs).max() / np.exp(vote.logprobs).sum()))
        assert answer.correct == (answer.prediction == answer.question.answer)
        assert len(vote.prompt) == 1
    small = evaluate(replace(asker, tokens_per_batch=1), QUESTIONS, by=by)
    assert [a.prediction for a in small] == [a.prediction for a in answers]
    assert [a.votes[0].logprobs for a in small] == [pytest.approx(a.votes[0].logprobs) for a in answers]


def test_random_shots_depend_on_the_seed_and_the_place_alone(asker):
    def shots(seed, questions=QUESTIONS):
        answers = evaluate(replace(asker, seed=seed), questions, named("few-shot", k=3), pool=POOL)
        assert all(answer.shots == 3 for answer in answers)
        return [shown(votes_of(answer)[0].prompt) for answer in answers]

    first = shots(0)
    assert first == shots(0)
    assert first[:2] == shots(0, QUESTIONS[:2])
    assert first != shots(1)
    assert len({tuple(names) for names in first}) > 1
    assert all(len(set(names)) == 3 for names in first)


def nearest_in_words(asker, questions, pool, k):
    """The most similar by cosine, found one by one, the nearest last."""
    vectors, rows = (embeddings(asker.model, asker.tokenizer, [q.question for q in of]) for of in (questions, pool))
    found = []
    for vector in vectors:
        similar = [vector @ row / np.linalg.norm(vector) / np.linalg.norm(row) for row in rows]
        found.append([pool[i].question for i in np.argsort(similar)[-k:]])
    return found


def test_knn_shows_the_nearest_last_with_their_answers(asker):
    answers = evaluate(asker, QUESTIONS, named("knn", k=4), by="letter", pool=POOL)
    expected = nearest_in_words(asker, QUESTIONS, POOL, 4)
    right = {q.question: "ABCD"[q.answer] for q in POOL}
    for answer, names in zip(answers, expected, strict=True):
        prompt = votes_of(answer)[0].prompt
        assert shown(prompt) == names
        assert [m["content"] for m in prompt if m["role"] == "assistant"] == [right[name] for name in names]


def test_self_consistency_is_a_majority_and_not_the_last(asker, taught):
    said = ["blood", "blood", "ice", "sky", "grass"]
    student = taught(lambda asked, listed, call, sample: chain(listed, said[sample]))
    answers = evaluate(asker, QUESTIONS, STRATEGIES["self-consistency"])
    for answer in answers:
        assert [OPTIONS[vote.choice] for vote in votes_of(answer)] == said
        assert answer.prediction == OPTIONS.index("blood")
        assert answer.confidence == 0.4
    (call,) = student.calls
    assert call["samples"] == 5
    assert call["sampling"] == Sampling(temperature=0.7, seed=0)


def test_medprompt_whole(asker, taught):
    """The pool's chains: right for some, wrong for some, without an answer for some. Then five orders of the options:
    the student knows the answer in three of them, and says the first or last option listed in the others."""
    wrong, silent = POOL[1].question, POOL[4].question
    key = {q.question: q.reply for q in (*POOL, *QUESTIONS)}

    def write(asked, listed, call, sample):
        if asked == silent:
            return f"{key[asked]}, perhaps"
        if asked == wrong:
            return chain(listed, next(o for o in listed if o != key[asked]))
        if asked in {q.question for q in QUESTIONS} and call % 5 >= 3:  # the pool's ten came before
            return chain(listed, [o for o in listed if o != key[asked]][-1])
        return chain(listed, key[asked])

    student = taught(write)
    answers = evaluate(replace(asker, seed=5), QUESTIONS, STRATEGIES["medprompt"], pool=POOL)
    first, second = student.calls
    assert len(first["prompts"]) == len(POOL)
    assert len(second["prompts"]) == 5 * len(QUESTIONS)
    assert first["sampling"] == second["sampling"] == Sampling(temperature=0.0, seed=5)
    kept = [q for q in POOL if q.question not in (wrong, silent)]
    expected = nearest_in_words(asker, QUESTIONS, kept, 5)
    for answer, names in zip(answers, expected, strict=True):
        orders = [vote.order for vote in votes_of(answer)]
        assert len(set(orders)) == 5
        assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
        for vote in votes_of(answer):
            assert shown(vote.prompt) == names
            shots = [m["content"] for m in vote.prompt if m["role"] == "assistant"]
            assert shots == [
                f"Think of {key[name]}.\nThe answer is {'ABCD'[OPTIONS.index(key[name])]}." for name in names
            ]
            listed = [line[3:] for line in vote.prompt[-1]["content"].split("\n")[1:5]]
            assert listed == [OPTIONS[i] for i in vote.order]
            # Un-mapped: the letter in the text is the order's, the choice the file's.
            said = re.search("The answer is (.)", vote.generated)
            assert said is not None
            assert listed["ABCD".index(said[1])] == OPTIONS[vote.choice]
        choices = [vote.choice for vote in votes_of(answer)]
        assert choices[:3] == [answer.question.answer] * 3
        assert answer.question.answer not in choices[3:]
        assert answer.prediction == answer.question.answer
        assert answer.correct
        assert answer.confidence == 0.6
        assert answer.shots == 5
    assert len({vote.order for answer in answers for vote in votes_of(answer)}) > 5, (
        "each question has orders of its own"
    )


def test_letters_in_many_orders_are_unmapped(asker):
    """By likelihood, without chains of thought: log-probabilities come back in the file's order."""
    answers = evaluate(asker, QUESTIONS, Strategy(orders=3), by="letter")
    for answer in answers:
        for vote in votes_of(answer):
            order, logprobs = vote.order, vote.logprobs
            listed = replace(answer.question, options=tuple(OPTIONS[i] for i in order))
            (alone,) = evaluate(asker, [listed], by="letter")
            assert [logprobs[i] for i in order] == pytest.approx(list(alone.votes[0].logprobs or ()))
            assert vote.choice == order[int(alone.prediction or 0)]


def test_orders_run_out():
    draw = strategies.Random(0)
    two = strategies._orders(replace(QUESTIONS[0], options=("yes", "no")), 5, draw)
    assert len(two) == 5
    assert set(two) == {(0, 1), (1, 0)}


def test_a_chain_without_an_answer_is_asked_for_a_letter(asker, taught):
    taught(lambda asked, listed, call, sample: "I do not know")
    answers = evaluate(asker, QUESTIONS, STRATEGIES["chain-of-thought"])
    for answer in answers:
        (vote,) = votes_of(answer)
        assert vote.forced
        assert vote.logprobs is not None
        assert vote.choice == int(np.argmax(vote.logprobs))
        assert vote.generated == f"I do not know The answer is {'ABCD'[vote.choice]}."
        assert answer.confidence is None
    nothing = evaluate(asker, QUESTIONS, named("medprompt", k=2), pool=POOL)
    assert all(answer.shots == 0 for answer in nothing), "no chain of the pool was right by itself"


def test_generated_without_a_chain(asker, taught):
    student = taught(lambda asked, listed, call, sample: "" if call == 1 else "B. blood")
    answers = evaluate(replace(asker, max_new_tokens=None), QUESTIONS, by="generate")
    assert [answer.prediction for answer in answers] == [1, None, 1, 1]
    assert not answers[1].correct
    assert student.calls[0]["max_new_tokens"] == 32
    assert student.calls[0]["stop"] == {asker.tokenizer.eos_id}


def test_open_questions_vote_by_their_words(asker, taught):
    said = ["Ice.", "a rose", "The answer is A ROSE!"]
    taught(lambda asked, listed, call, sample: said[sample])
    red, cold = evaluate(asker, OPEN, named("self-consistency", votes=3))
    assert red.prediction == cold.prediction == "a rose"
    assert red.correct
    assert not cold.correct
    taught(lambda asked, listed, call, sample: " ice ")
    (_, cold) = evaluate(
        asker, OPEN, named("few-shot", k=1), pool=[replace(OPEN[0], question="What is a rose?", id="p")]
    )
    assert cold.correct
    assert votes_of(cold)[0].prompt[1] == {"role": "assistant", "content": "blood"}


def test_the_real_generate_has_the_interface(asker):
    for template in ("auto", "plain"):
        for name in ("chain-of-thought", "self-consistency", "medprompt"):
            strategy = STRATEGIES[name]
            ask = replace(asker, template=template)
            answers = evaluate(ask, QUESTIONS, strategy, pool=POOL if strategy.shots != "none" else ())
            assert all(answer.prediction in range(4) for answer in answers)
            again = evaluate(
                replace(ask, tokens_per_batch=64), QUESTIONS, strategy, pool=POOL if strategy.shots != "none" else ()
            )
            assert [[v.generated for v in a.votes] for a in answers] == [[v.generated for v in a.votes] for a in again]


def test_names_and_numbers():
    assert named("knn", k=7) == Strategy(shots="nearest", k=7)
    assert named("medprompt", votes=3).orders == 3
    assert named("self-consistency", votes=3, temperature=1.0) == Strategy(reason=True, samples=3, temperature=1.0)
    for name, options, said in [
        ("cot", {}, "no strategy 'cot': choose one of zero-shot"),
        ("zero-shot", {"k": 3}, "zero-shot takes no shots, so it has no k"),
        ("knn", {"votes": 3}, "knn takes no votes"),
    ]:
        with pytest.raises(ValueError, match=said):
            named(name, **options)


@pytest.mark.parametrize(
    ("questions", "strategy", "options", "said"),
    [
        ([], "zero-shot", {}, "no questions"),
        (QUESTIONS, "zero-shot", {"by": "texts"}, "no way 'texts' to take an answer: choose one of text, letter"),
        (QUESTIONS, "chain-of-thought", {"by": "letter"}, "a chain of thought is generated"),
        (OPEN, "zero-shot", {"by": "letter"}, "o:1: an answer without options is generated"),
        ([*QUESTIONS, *OPEN], "zero-shot", {}, "o:1 and q:0: expected options in both"),
        (QUESTIONS, "knn", {"pool": OPEN * 3}, "o:1 and q:0: expected options in both"),
        (OPEN, "medprompt", {"pool": OPEN * 3}, "o:1: no options in the prompt to shuffle"),
        (QUESTIONS, "few-shot", {}, "0 questions to take 5 shots from"),
        (QUESTIONS, "knn", {"pool": POOL[:4]}, "4 questions to take 5 shots from"),
        (QUESTIONS, "zero-shot", {"pool": POOL}, "the strategy takes no shots"),
        (
            QUESTIONS,
            "knn",
            {"pool": [*POOL, Question("2: which is LIKE\na rose", OPTIONS, 0, "p:11")]},
            r"p:11: is to be answered too \(q:2\)",
        ),
        (
            QUESTIONS,
            "knn",
            {"pool": [*POOL, replace(QUESTIONS[2], options=("Ice!", *OPTIONS[:3]), answer=0, id="p:11")]},
            r"p:11: is to be answered too \(q:2\)",
        ),
        (OPEN, "knn", {"pool": [*OPEN * 2, replace(OPEN[1], references=("snow",), id="o:3")]}, "is to be answered too"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(asker, questions, strategy, options, said):
    with pytest.raises(ValueError, match=said):
        evaluate(asker, questions, STRATEGIES[strategy], **options)


def test_samples_that_would_be_the_same(asker):
    with pytest.raises(ValueError, match="3 samples would be the same"):
        evaluate(asker, QUESTIONS, named("self-consistency", votes=3, temperature=0.0))
    with pytest.raises(ValueError, match="expected positive samples and k"):
        evaluate(asker, QUESTIONS, Strategy(k=0))
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"temperature is {temperature}: expected 0"):
            strategies.check(QUESTIONS, Strategy(temperature=temperature, reason=True, samples=2))


def test_a_template_of_one_turn_has_no_shots(asker, taught):
    student = taught(lambda asked, listed, call, sample: chain(listed, "ice"))
    for name in ("few-shot", "knn", "medprompt"):
        with pytest.raises(ValueError, match="template 'alpaca' holds one question and no shots"):
            evaluate(replace(asker, template="alpaca"), QUESTIONS, STRATEGIES[name], pool=POOL)
    assert not student.calls, "said before the pool is answered"
    assert len(evaluate(replace(asker, template="alpaca"), QUESTIONS)) == len(QUESTIONS)


@pytest.mark.parametrize("name", ["few-shot", "knn", "medprompt"])
def test_shots_without_room_leave_the_farthest_first(asker, taught, name):
    questions = [*QUESTIONS[:2], replace(QUESTIONS[2], question=QUESTIONS[2].question * 6)]
    key = {q.question: q.reply for q in (*POOL, *questions)}
    taught(lambda asked, listed, call, sample: chain(listed, key[asked]))
    whole = evaluate(asker, questions, STRATEGIES[name], by="generate", pool=POOL)
    # Positions for three shots before the first question, the four tokens of an answer, and what may follow it.
    after = 4 + (len(asker.tokenizer.encode(" The answer is", continues=True)) + 1 if name == "medprompt" else 0)
    most = max(length(asker, vote.prompt[-7:]) for vote in votes_of(whole[0])) + after
    small = replace(asker, model=Transformer(replace(asker.model.config, max_positions=most)))
    small.model.load_state_dict(asker.model.state_dict())
    answers = evaluate(small, questions, STRATEGIES[name], by="generate", pool=POOL)
    assert answers[0].shots == 3
    assert answers[2].shots < 3, "a long question leaves less room"
    for answer, all_shots in zip(answers, whole, strict=True):
        assert all_shots.shots == 5
        assert 0 < answer.shots < 5
        lengths = []
        for vote, of_all in zip(votes_of(answer), votes_of(all_shots), strict=True):
            assert vote.order == of_all.order
            assert vote.prompt == of_all.prompt[-len(vote.prompt) :]
            assert len(vote.prompt) == 2 * answer.shots + 1
            assert length(asker, vote.prompt) + after <= most
            lengths.append(length(asker, of_all.prompt[-len(vote.prompt) - 2 :]) + after)
        assert max(lengths) > most, "there was no room for another one"


def test_a_question_has_as_many_shots_in_each_order(asker):
    small = replace(asker, model=Transformer(replace(asker.model.config, max_positions=150)))
    one, two = (replace(QUESTIONS[0], question=f"{'long ' * n}?") for n in (1, 50))
    shots, style = [Shot(question, "B") for question in POOL[:5]], Style("generate")
    (_, many), (_, few), (asked, both) = (strategies._ask(small, of, shots, style) for of in ([one], [two], [one, two]))
    assert many > few == both
    assert [len(shown(prompt.text)) for prompt in asked] == [both, both]


def length(asker, messages) -> int:
    return len(chat.prompt(messages, asker.tokenizer, "auto"))


@pytest.mark.parametrize("by", ["text", "letter", "generate"])
def test_a_prompt_that_is_too_long_is_named_before_the_model_runs(asker, by, monkeypatch):
    for name in ("generate", "continuation_logprobs"):
        monkeypatch.setattr(strategies, name, lambda *_, **__: pytest.fail("the model ran"))
    model = Transformer(replace(asker.model.config, max_positions=80))
    long = replace(QUESTIONS[2], question="Which of these? " * 40)
    with pytest.raises(ValueError, match="q:2: its prompt has .* exceeds the model's 80 positions"):
        evaluate(replace(asker, model=model), [*QUESTIONS[:2], long], by=by)
    with pytest.raises(ValueError, match="q:0: its prompt has .* tokens, which with an answer of 44 exceeds"):
        evaluate(replace(asker, model=model, max_new_tokens=40), QUESTIONS, STRATEGIES["chain-of-thought"])
    with pytest.raises(ValueError, match="q:2: its prompt has .* take fewer new tokens, or leave the question out"):
        evaluate(replace(asker, model=model), [*QUESTIONS[:2], long], STRATEGIES["medprompt"], pool=POOL)
    pool = [*POOL[:6], replace(long, id="p:6")]
    with pytest.raises(ValueError, match="p:6: its prompt has"):
        evaluate(replace(asker, model=model), QUESTIONS, STRATEGIES["medprompt"], pool=pool)


def test_weights_that_diverged(asker):
    model = Transformer(asker.model.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    broken = replace(asker, model=model)
    with pytest.raises(ValueError, match="q:0: the model's log-probabilities are NaN"):
        evaluate(broken, QUESTIONS)
    with pytest.raises(ValueError, match="hidden states are not finite"):
        evaluate(broken, QUESTIONS, STRATEGIES["knn"], pool=POOL)
