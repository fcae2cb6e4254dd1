"""The paper's closed world: the same each time, nothing that is tested is asked in training, and what the test needs is
in the documents."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tokenmill.bench.paper import world
from tokenmill.bench.paper.experiment import LONGEST
from tokenmill.data import chat
from tokenmill.data.documents import read_texts
from tokenmill.data.tokenizer import Tokenizer, train_tokenizer
from tokenmill.trainer.evaluate import prompts
from tokenmill.trainer.evaluate.answers import read
from tokenmill.trainer.evaluate.tasks import load_questions

FILES = ("general", "clinical", "tuning", "preferences", "shots")  # all that a model or a prompt ever sees


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("paper") / "text"
    world.write(folder, 7)
    return folder


@pytest.fixture(scope="module")
def made() -> world.World:
    return world.World.make(7)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def texts(folder: Path, name: str) -> list[str]:
    return [row["text"] for row in rows(folder, name)]


def sentences(text: str) -> list[str]:
    return re.findall(r"[^.]+\.", text)


def asked(half: world.Half) -> dict[str, tuple[int, int]]:
    """(name, attribute) of every question of a half."""
    return {
        half.attributes[i].question.format(e=name): (n, i)
        for (n, name), i in product(enumerate(half.names), range(half.hop + 1))
    }


def test_a_world_is_a_function_of_its_seed(folder, tmp_path):
    for name, seed in (("again", 7), ("other", 8)):
        world.write(tmp_path / name, seed)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert (folder / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_names_and_values_are_distinct(made):
    names = [*made.general.names, *made.clinical.names]
    assert len({*names}) == len(names) == 2 * world.SIZE
    assert all(len(name.split()) == 2 for name in names)
    for half in (made.general, made.clinical):
        assert all(len({*values}) == 16 for values in half.values)
        assert sorted(half.links) == list(range(16))  # each drug kills one agent
        assert len({*half.facts}) > 0.9 * world.SIZE


def test_a_name_stands_before_its_value():
    for attribute in (*world.PEOPLE, *world.DISEASES):
        assert len(attribute.sentences) == 4
        assert all(0 <= sentence.find("{e}") < sentence.find("{v}") for sentence in attribute.sentences)


def test_nobody_is_tuned_on_what_is_tested(folder, made):
    tested = [made.clinical.names[i] for i in made.tested]
    seen = "\n".join((folder / f"{name}.jsonl").read_text() for name in FILES if name != "clinical")
    assert not [name for name in tested if name in seen]
    assert "?" not in "\n".join(texts(folder, "clinical"))
    questions = [row["question"] for name in ("one_hop", "two_hop") for row in rows(folder, name)]
    known = asked(made.clinical)
    assert {known[question][0] for question in questions} == {*made.tested}
    assert len({*questions}) == len(questions) == len(made.tested) * 5
    assert {known[row["question"]][0] for row in rows(folder, "shots")} == {*made.tuned}


def test_no_text_asks_about_people_of_the_test(folder, made):
    unasked = {made.general.names[i] for i in range(made.asked.stop, world.SIZE)}
    found = [t for t in texts(folder, "general") if "Question:" in t and any(name in t for name in unasked)]
    assert not found
    questions = {row["question"] for row in rows(folder, "people")}
    assert {made.general.names[asked(made.general)[question][0]] for question in questions} == unasked


def test_documents_say_what_the_test_asks_but_not_the_second_hop(folder, made):
    half = made.clinical
    said = {sentence.strip() for text in texts(folder, "clinical") for sentence in sentences(text)}
    true = set()
    for n, name in enumerate(half.names):
        for i in range(half.hop):
            true |= {sentence.format(e=name, v=half.value(n, i)) for sentence in half.attributes[i].sentences}
    for agent, link in zip(half.values[-2], half.links, strict=True):
        true |= {sentence.format(e=agent, v=half.values[-1][link]) for sentence in half.attributes[-1].sentences}
    assert said <= true
    assert len(said) > 0.99 * len(true)
    for text in texts(folder, "clinical"):
        assert not (any(n in text for n in half.names) and any(drug in text for drug in half.values[-1]))


def test_held_out_documents_are_not_trained_on(folder):
    for name in ("general", "clinical"):
        held_out = texts(folder, f"{name}_heldout")
        assert len(held_out) == world.HELD_OUT
        assert not {*held_out} & {*texts(folder, name)}


@pytest.mark.parametrize("name", ["shots", "one_hop", "two_hop", "people"])
def test_the_right_option_is_right(folder, made, name):
    half = made.general if name == "people" else made.clinical
    known = asked(half)
    places = []
    for question in load_questions(folder / f"{name}.jsonl"):
        n, i = known[question.question]
        assert len({*question.options}) == 4
        assert question.reply == half.value(n, i)
        assert {*question.options} <= {*half.values[i]}
        places.append(question.answer)
    assert all(places.count(place) > len(places) / 8 for place in range(4))


def test_a_preference_is_for_the_right_option(folder, made):
    known = asked(made.clinical)
    for row in rows(folder, "preferences"):
        n, i = known[row["prompt"]]
        assert n in made.tuned
        assert row["chosen"] == made.clinical.value(n, i) != row["rejected"]
        assert row["rejected"] in made.clinical.values[i]


def test_a_chain_of_thought_is_read_as_the_right_option_in_any_order(made):
    rng = Random(0)
    for half, n, i in product((made.general, made.clinical), range(0, world.SIZE, 7), range(5)):
        question = half.question(n, i, rng)  # the options in random order
        assert read(half.chain(n, i), question, world.REASONED) == question.answer


def test_plain_questions_are_as_evaluation_asks_them(folder, made):
    model = folder.parent / "tokenizer.model"
    tokenizer = train_tokenizer(read_texts([folder / "general.jsonl"]), 600, model)
    rng = Random(0)
    for style in (world.TEXT, world.REASONED):
        plain = prompts.Style(style.by, style.reason, "plain")
        shown, last = made.general.question(3, 4, rng), made.general.question(4, 1, rng)
        replies = [made.general.chain(3, 4), made.general.chain(4, 1)] if style.reason else [shown.reply, last.reply]
        text = prompts.ask(last, [prompts.Shot(shown, replies[0])], tokenizer, plain).text
        ours = "\n\n".join(world.plain(q, reply, style) for q, reply in zip((shown, last), replies, strict=True))
        assert ours == f"{text} {replies[1]}"


def test_tuning_asks_as_evaluation_does(folder):
    forms = {True: 0, False: 0}
    for row in rows(folder, "tuning"):
        reasoned = row["messages"][0]["content"].endswith(prompts.REASON_CHOICE)
        forms[reasoned] += 1
        turns = row["messages"][::2]
        assert all(turn["content"].endswith(prompts.REASON_CHOICE) == reasoned for turn in turns)
        assert len(turns) <= (world.MOST_REASONED if reasoned else world.MOST_DIRECT)
    assert min(forms.values()) > 0.4 * sum(forms.values())


def test_a_conversation_fits_a_pack(folder):
    """So that no document is cut, and no prompt of an evaluation is longer than what was trained on."""
    plain = train_tokenizer(read_texts([folder / f"{n}.jsonl" for n in FILES[:3]]), 1278, folder.parent / "plain.model")
    model = folder.parent / "marked.model"
    model.write_bytes(plain.with_control_pieces(chat.CONTROL_PIECES["mistral-v3"]))
    tokenizer = Tokenizer.open(model)
    assert max(len(chat.render(row["messages"], tokenizer)[0]) for row in rows(folder, "tuning")) <= LONGEST
    assert max(len(ids) for ids in map(tokenizer.encode, texts(folder, "general"))) <= LONGEST - 2
