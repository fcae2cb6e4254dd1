"""ROUGE-L against a plain dynamic programme, and the search against comparing with everything."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from tokenmill.data.rouge import Unlike, rouge_l

WORDS = st.lists(st.sampled_from("abcde"), max_size=90)  # beyond a machine word


def common(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(WORDS, WORDS)
def test_the_plain_dynamic_programme(a, b):
    expected = 2 * common(a, b) / (len(a) + len(b)) if a or b else 0.0
    assert rouge_l(" ".join(a), " ".join(b)) == expected == rouge_l(" ".join(b), " ".join(a))


@given(st.text("aB1 ,.-_'\n", max_size=60), st.text("aB1 ,.-_'\n", max_size=60))
def test_words_of_ascii_are_those_of_rouge_score(a, b):
    first, second = (re.sub(r"[^a-z0-9]+", " ", text.lower()).split() for text in (a, b))
    assert rouge_l(a, b) == 2 * common(first, second) / (len(first) + len(second) or 1)


def test_what_a_word_is():
    assert rouge_l("Où est l'Hôpital?", "ou est l hôpital") == 0.75
    assert rouge_l("", "") == rouge_l("...", "!") == rouge_l("a", "") == 0.0
    assert rouge_l("the cat sat on the mat", "on the mat sat the cat") == 0.5


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=9), max_size=40), st.sampled_from([0.0, 0.5, 0.7, 0.95]))
def test_the_search_finds_what_comparing_with_all_finds(texts, threshold):
    unlike, kept = Unlike(threshold), []
    for text in map(" ".join, texts):
        alike = [rouge_l(text, other) for other in kept if rouge_l(text, other) > threshold]
        found = unlike.find(text)
        assert (found is None) == (not alike)
        if found is None:
            kept.append(text)
            unlike.add(text)
        else:
            assert found[0] == rouge_l(text, found[1]) in alike
    assert len(unlike) == len(kept)


def test_the_threshold_itself_is_no_resemblance():
    unlike = Unlike(0.7)
    unlike.add("a b c d e f g h i j")
    assert unlike.find("a b c d e f g x y z") is None  # 0.7
    assert unlike.find("a b c d e f g h y z") == (0.8, "a b c d e f g h i j")
