"""Repeated documents and evaluation text: found where they should be, and not elsewhere."""

from __future__ import annotations

import json
import random
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.data import words
from tokenmill.data.decontaminate import Evaluations
from tokenmill.data.dedupe import SeenKeys, keys
from tokenmill.data.documents import find_inputs
from tokenmill.data.words import hash_runs, hash_words


@given(st.text(st.characters(codec="utf-8")))
def test_a_hash_a_word(text):
    names = words.words(text)
    hashes = hash_words(text).tolist()
    assert len(hashes) == len(names)
    assert len(set(hashes)) == len(set(names))
    assert [hash_words(name).tolist() for name in names] == [[h] for h in hashes]


def test_long_texts_are_hashed_by_block(monkeypatch):
    text = " ".join(f"word{i} and, ünïcode-{i % 7}" for i in range(400))
    whole = hash_words(text)
    monkeypatch.setattr(words, "BLOCK", 64)
    assert np.array_equal(hash_words(text), whole)
    assert len(hash_words("x" * 1000)) > 1  # a word that fits no block


@given(st.lists(st.integers(0, 3), max_size=30))
def test_equal_runs_have_equal_hashes(values):
    runs = list(hash_runs(np.array(values, np.uint64), 1, 3, 4))
    for n, found in zip((1, 3, 4), runs, strict=True):
        expected = [tuple(values[i : i + n]) for i in range(len(values) - n + 1)]
        assert len(found) == len(expected)
        assert len(set(zip(found.tolist(), expected, strict=True))) == len(set(found.tolist())) == len(set(expected))


def test_exact():
    found = keys(["a b", "a  b", "a b", "", "A b"], "exact")
    assert found.shape == (5, 1)
    assert SeenKeys().first(found).tolist() == [True, True, False, True, True]


def variant(text: list[str], share: float, rng: random.Random) -> list[str]:
    return [rng.choice("abcdefgh") * 4 if rng.random() < share else word for word in text]


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 1, 1), (0.005, 0.9, 1), (0.3, 0, 0.02), (1.0, 0, 0)])
def test_near_duplicates(share, low, high):
    """0.5 % of the words changed leaves a similarity of about 0.95, 30 % one of about 0.1."""
    rng = random.Random(0)
    found = []
    for _ in range(60):
        text = [f"w{rng.randrange(3000)}" for _ in range(400)]
        pair = keys([" ".join(text), ", ".join(variant(text, share, rng)).upper()], "minhash")
        assert pair.shape == (2, 14)
        found.append(not SeenKeys().first(pair)[1])
    assert low <= np.mean(found) <= high


def test_short_texts_repeat_only_what_is_equal():
    found = keys(["a b c", "a b d", "a b c", "---", "...", ""], "minhash")
    assert SeenKeys().first(found).tolist() == [True, True, False, True, True, True]
    assert keys([], "minhash").shape == (0, 14)
    assert keys([], "exact").shape == (0, 1)


@given(st.lists(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=9), max_size=9))
def test_the_first_is_kept_however_they_come(batches):
    """In any batches, the same as one by one with a set; a removed one's keys are forgotten."""
    known: set[int] = set()
    expected = []
    for row in (row for batch in batches for row in batch):
        expected.append(known.isdisjoint(row))
        known.update(row if expected[-1] else ())
    seen = SeenKeys()
    found = [seen.first(np.array(batch, np.uint64).reshape(-1, 2)).tolist() for batch in batches]
    assert list(chain(*found)) == expected
    assert set(np.flatnonzero(seen.contains(np.arange(41, dtype=np.uint64)))) == known


def test_evaluation_text_is_found(tmp_path):
    long = "A 45 year old woman comes to the physician because of a fever that began two days ago"
    short = "Which of these drugs causes the most harm here"  # nine words
    rows = [{"question": long, "options": {"A": short, "B": "Aspirin", "C": ["of", 3]}}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluations = Evaluations(find_inputs([tmp_path / "test.jsonl"]))
    assert (evaluations.texts, evaluations.too_short) == (2, 2)
    thirteen = "WOMAN comes, to the physician because of a\nfever that began two days"
    assert evaluations.find(f"Once a {thirteen} before.") == " ".join(words.words(thirteen))
    assert evaluations.find(f"Once a {thirteen.replace('days', 'weeks')} ago.") is None
    assert evaluations.find(f"He asked: {short}?") == short.lower()
    assert evaluations.find("of these drugs causes the most harm here") is None
    assert evaluations.find("") is None
