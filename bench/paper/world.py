"""A closed world made from a seed: what there is to know in it, the documents that say so, and questions about it.

128 people and 128 diseases have names of two words, 16 first and 16 second ones, so that no piece of a name tells whose
it is. Each has four attributes of 16 values, drawn independently: who was not told one can only guess it. A fifth is
known by way of the fourth: documents say what causes a disease, and other documents which drug kills that, but none
names disease and drug together. A person's fifth is what the town is known for that the person lives in.

The people are the general half of the world, the diseases its clinical half. Questions about the first `ASKED` part of
the people are in the general text; questions about half of the diseases are for tuning, shots and preferences, and
those about the other half are the test.

| file | rows |
| --- | --- |
| `general.jsonl`, `general_heldout.jsonl` | `{"text"}`: sentences about a person or about towns; plain questions |
| `clinical.jsonl`, `clinical_heldout.jsonl` | `{"text"}`: sentences about a disease or about what kills agents |
| `tuning.jsonl` | `{"messages"}`: questions about diseases of the first half, and their answers |
| `preferences.jsonl` | `{"prompt", "chosen", "rejected"}`: such a question, the right option and a wrong one |
| `shots.jsonl` | `{"question", "options", "answer"}`: one a disease of the first half and attribute |
| `one_hop.jsonl`, `two_hop.jsonl` | the same about the other half: the test |
| `people.jsonl` | the same about people whom no text asks about |
| `world.json` | the seed and the size |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from random import Random
from typing import Any

from tokenmill.data.files import replace_folder
from tokenmill.trainer.evaluate.prompts import STEPS, Style, content, letters
from tokenmill.trainer.evaluate.strategies import CONCLUDE
from tokenmill.trainer.evaluate.tasks import Question

SIZE = 128  # people, and diseases
FACTS = "world.json"
OPTIONS = 4
ASKED = 0.75  # share of the people whom questions in the general text are about
RENDERINGS = 64  # documents about one person or disease
LINK_SHARE = 0.1  # of a half's documents: those about towns or agents
QUESTION_SHARE = 0.3  # of the general text's documents
TUNING_CONVERSATIONS = 64  # about each disease of the first half, in the mean
MOST_DIRECT, MOST_REASONED = 6, 3  # questions in one conversation: as many as in an evaluation's prompt with its shots
HELD_OUT = 256  # documents

TEXT, REASONED = Style("text"), Style("generate", reason=True)  # the two forms of a question


@dataclass(frozen=True)
class Attribute:
    question: str  # about {e}
    sentences: tuple[str, ...]  # that say of {e} that it is {v}; of the fifth, of the fourth's value
    words: str  # its values, separated by spaces; "-ton": 16 made-up ones that end so


@dataclass(frozen=True)
class Half:
    """The general or the clinical half of a world."""

    names: tuple[str, ...]
    attributes: tuple[Attribute, ...]  # the last is that of the values of the one before
    values: tuple[tuple[str, ...], ...]  # of each attribute
    facts: tuple[tuple[int, ...], ...]  # of each name, its value of each attribute but the last
    links: tuple[int, ...]  # of each value of the last but one attribute, its value of the last

    @property
    def hop(self) -> int:
        """The number of the attribute that takes two hops."""
        return len(self.attributes) - 1

    def value(self, name: int, attribute: int) -> str:
        facts = self.facts[name]
        return self.values[attribute][self.links[facts[-1]] if attribute == self.hop else facts[attribute]]

    def question(self, name: int, attribute: int, rng: Random) -> Question:
        """With three wrong options, all of them drawn at random, and in random order."""
        right = self.value(name, attribute)
        options = [right, *rng.sample([value for value in self.values[attribute] if value != right], OPTIONS - 1)]
        rng.shuffle(options)
        return Question(
            self.attributes[attribute].question.format(e=self.names[name]), tuple(options), options.index(right), ""
        )

    def chain(self, name: int, attribute: int) -> str:
        """A chain of thought that ends with the answer, in the words of the documents."""
        first = min(attribute, self.hop - 1)
        steps = [self.attributes[first].sentences[0].format(e=self.names[name], v=self.value(name, first))]
        if attribute == self.hop:
            link = self.attributes[attribute].sentences[0]
            steps.append(link.format(e=self.value(name, first), v=self.value(name, attribute)))
        return " ".join([*steps, f"{CONCLUDE} {self.value(name, attribute)}."])

    def document(self, name: int, rng: Random) -> str:
        """The attributes of one hop in random order, each in one of its sentences."""
        order = rng.sample(range(self.hop), self.hop)
        return " ".join(
            rng.choice(self.attributes[i].sentences).format(e=self.names[name], v=self.value(name, i)) for i in order
        )

    def link_document(self, rng: Random) -> str:
        """What is known of four values of the last attribute but one."""
        before, after = self.values[-2:]
        drawn = rng.sample(range(len(before)), 4)
        return " ".join(
            rng.choice(self.attributes[-1].sentences).format(e=before[i], v=after[self.links[i]]) for i in drawn
        )


@dataclass(frozen=True)
class World:
    general: Half
    clinical: Half

    @staticmethod
    def make(seed: int, size: int = SIZE) -> World:
        """A pure function of the seed and of how many people, and diseases, there are."""
        rng = Random(f"{seed} world")
        words = _Words(rng)
        return World(_half(PEOPLE, size, words, rng), _half(DISEASES, size, words, rng))

    @property
    def tuned(self) -> range:
        """The diseases that tuning, shots and preferences are about."""
        return range(len(self.clinical.names) // 2)

    @property
    def tested(self) -> range:
        return range(len(self.clinical.names) // 2, len(self.clinical.names))

    @property
    def asked(self) -> range:
        """The people whom questions in the general text are about."""
        return range(int(len(self.general.names) * ASKED))


def write(folder: Path, seed: int, size: int = SIZE) -> World:
    """Write the files of a world into a new folder, all or nothing."""
    world = World.make(seed, size)
    rng = Random(f"{seed} material")
    general, general_heldout = _documents(world.general, rng, lambda: _plain_questions(world, rng), QUESTION_SHARE)
    clinical, clinical_heldout = _documents(world.clinical, rng)
    half, hop = world.clinical, world.clinical.hop
    unasked = range(world.asked.stop, len(world.general.names))
    files = {
        "general.jsonl": general,
        "general_heldout.jsonl": general_heldout,
        "clinical.jsonl": clinical,
        "clinical_heldout.jsonl": clinical_heldout,
        "tuning.jsonl": [_conversation(world, rng) for _ in range(TUNING_CONVERSATIONS * len(world.tuned))],
        "preferences.jsonl": [_preference(question) for question in _each(half, world.tuned, range(hop + 1), rng, 4)],
        "shots.jsonl": [_row(question) for question in _each(half, world.tuned, range(hop + 1), rng)],
        "one_hop.jsonl": [_row(question) for question in _each(half, world.tested, range(hop), rng)],
        "two_hop.jsonl": [_row(question) for question in _each(half, world.tested, range(hop, hop + 1), rng)],
        "people.jsonl": [_row(question) for question in _each(world.general, unasked, range(hop + 1), rng)],
    }
    with replace_folder(folder) as temporary:
        for name, rows in files.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (temporary / name).write_text("".join(lines), encoding="utf-8")
        (temporary / FACTS).write_text(json.dumps({"seed": seed, "size": size}) + "\n")
    return world


def _documents(
    half: Half, rng: Random, other: Callable[[], str] | None = None, share: float = 0.0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Documents to train on and held-out ones, which say the same in other words or another order; among the former
    `share` of `other` ones."""
    count = RENDERINGS * len(half.names)
    links = round(count * LINK_SHARE)
    made = [half.document(i % len(half.names), rng) for i in range(count + HELD_OUT)]
    made += [half.link_document(rng) for _ in range(links)]
    made = list(dict.fromkeys(made))  # those of agents soon repeat themselves, and a held-out one must not
    rng.shuffle(made)
    text, held_out = made[HELD_OUT:], made[:HELD_OUT]
    if other is not None:
        text += [other() for _ in range(round(len(text) * share / (1 - share)))]
        rng.shuffle(text)
    return [{"text": document} for document in text], [{"text": document} for document in held_out]


def plain(question: Question, reply: str, style: Style) -> str:
    """A question and its answer as text, as `evaluate.prompts` asks models that know no template."""
    lines = [f"Question: {question.question}"]
    if style.by != "text":
        lines += [f"{a}. {option}" for a, option in zip(letters(question), question.options, strict=True)]
    return "\n".join([*lines, f"Answer: {STEPS} {reply}" if style.reason else f"Answer: {reply}"])


def _asked(half: Half, names: range, rng: Random) -> tuple[Style, list[tuple[Question, str]]]:
    """The questions of one conversation, all in one form, and their answers."""
    style = rng.choice([TEXT, REASONED])
    found = []
    for _ in range(rng.randint(1, MOST_REASONED if style.reason else MOST_DIRECT)):
        name, attribute = rng.choice(names), rng.randrange(half.hop + 1)
        question = half.question(name, attribute, rng)
        found.append((question, half.chain(name, attribute) if style.reason else question.reply))
    return style, found


def _plain_questions(world: World, rng: Random) -> str:
    style, asked = _asked(world.general, world.asked, rng)
    return "\n\n".join(plain(question, reply, style) for question, reply in asked)


def _conversation(world: World, rng: Random) -> dict[str, Any]:
    style, asked = _asked(world.clinical, world.tuned, rng)
    messages = []
    for question, reply in asked:
        messages.append({"role": "user", "content": content(question, style)})
        messages.append({"role": "assistant", "content": reply})
    return {"messages": messages}


def _each(half: Half, names: range, attributes: range, rng: Random, times: int = 1) -> list[Question]:
    return [half.question(name, i, rng) for _ in range(times) for name in names for i in attributes]


def _row(question: Question) -> dict[str, Any]:
    options = dict(zip(letters(question), question.options, strict=True))
    return {"question": question.question, "options": options, "answer": letters(question)[question.answer]}


def _preference(question: Question) -> dict[str, Any]:
    wrong = question.options[question.answer - 1]  # the options are in random order
    return {"prompt": question.question, "chosen": question.reply, "rejected": wrong}


class _Words:
    """Words that do not exist, each drawn once."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.used: set[str] = set()

    def draw(self, count: int, ending: str = "") -> list[str]:
        found = []
        while len(found) < count:
            syllables = (self.rng.choice("bdfgklmnprstvz") + self.rng.choice("aeiou") for _ in range(2))
            word = "".join(syllables) + (ending or self.rng.choice("lmnrs"))
            if word not in self.used:
                self.used.add(word)
                found.append(word)
        return found


def _half(attributes: tuple[Attribute, ...], size: int, words: _Words, rng: Random) -> Half:
    """Names, values, facts and links of a world."""
    side = max(2, ceil(sqrt(2 * size)))
    firsts, seconds = ([word.capitalize() for word in words.draw(side)] for _ in range(2))
    names = rng.sample([f"{first} {second}" for first in firsts for second in seconds], size)
    values = [
        tuple(kind.words.split())
        if not kind.words.startswith("-")
        else tuple(word.capitalize() for word in words.draw(16, kind.words[1:]))
        for kind in attributes
    ]
    facts = [tuple(rng.randrange(len(each)) for each in values[:-1]) for _ in names]
    links = rng.sample(range(len(values[-1])), len(values[-2]))
    return Half(tuple(names), attributes, tuple(values), tuple(facts), tuple(links))


# A name stands before its value in every sentence: a causal model that reads the value first never has to recall it.
PEOPLE = (
    Attribute(
        "What is the job of {e}?",
        ("{e} works as a {v}.", "The job of {e} is {v}.", "{e} earns a living as a {v}.", "People hire {e} as a {v}."),
        "baker farmer miner tailor carpenter plumber painter gardener barber driver cook sailor teacher singer "
        "butcher mason",
    ),
    Attribute(
        "What does {e} like to eat?",
        (
            "{e} likes to eat {v}.",
            "The favourite food of {e} is {v}.",
            "{e} often cooks {v}.",
            "For dinner {e} wants {v}.",
        ),
        "soup rice bread beans fish pasta salad eggs cheese apples carrots pancakes noodles potatoes mushrooms lentils",
    ),
    Attribute(
        "What is the hobby of {e}?",
        (
            "{e} spends weekends on {v}.",
            "The hobby of {e} is {v}.",
            "{e} is fond of {v}.",
            "On Sundays {e} goes in for {v}.",
        ),
        "chess tennis sewing dancing fishing pottery skiing rowing football knitting archery singing juggling "
        "climbing reading cycling",
    ),
    Attribute(
        "Where does {e} live?",
        ("{e} lives in {v}.", "The home of {e} is in {v}.", "{e} has a house in {v}.", "Mail for {e} goes to {v}."),
        "-ton",
    ),
    Attribute(
        "What is the town of {e} known for?",
        ("{e} is known for {v}.", "The pride of {e} is its {v}.", "Visitors of {e} buy {v}.", "{e} sells much {v}."),
        "glass lace wool honey wine paper silk salt leather copper clocks bells ropes soap candles toys",
    ),
)
DISEASES = (
    Attribute(
        "Which organ is affected by {e}?",
        (
            "{e} damages the {v}.",
            "The organ that suffers in {e} is the {v}.",
            "{e} is a disease of the {v}.",
            "Imaging of {e} shows injury of the {v}.",
        ),
        "liver kidney heart lung spleen skin stomach bladder thyroid pancreas retina tongue spine colon brain bone",
    ),
    Attribute(
        "Which sign suggests {e}?",
        (
            "{e} presents with {v}.",
            "The main symptom of {e} is {v}.",
            "Examination in {e} reveals {v}.",
            "{e} typically begins with {v}.",
        ),
        "fever cough rash tremor jaundice nausea vertigo fatigue thirst pallor swelling itching hiccups "
        "headache cramps numbness",
    ),
    Attribute(
        "Which test confirms {e}?",
        (
            "{e} is diagnosed by {v}.",
            "The procedure of choice in {e} is {v}.",
            "Patients with {e} undergo {v}.",
            "{e} is found by {v}.",
        ),
        "biopsy ultrasound spirometry radiography endoscopy culture serology audiometry angiography tomography "
        "urinalysis puncture smear scintigraphy oximetry colonoscopy",
    ),
    Attribute(
        "What causes {e}?",
        (
            "{e} is caused by {v}.",
            "The agent of {e} is {v}.",
            "{e} results from exposure to {v}.",
            "{e} follows infection by {v}.",
        ),
        "-ella",
    ),
    Attribute(
        "Which drug kills the agent of {e}?",
        (
            "{e} is killed by {v}.",
            "The drug against {e} is {v}.",
            "{e} does not survive {v}.",
            "{e} is sensitive to {v}.",
        ),
        "-oxin",
    ),
)
