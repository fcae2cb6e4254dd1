"""The cache in front of a tokenizer, with a toy for one: the ids of a part are its bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill import _C

SPACES = np.ones((256, 256), np.uint8)  # a text is cut before each space, and nowhere else
SPACES[:, ord(" ")] = 0


class Bytes:
    """The toy, which remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def __call__(self, words: list[bytes]) -> list[list[int]]:
        self.asked += words
        return [list(word) for word in words]


def check(cache: _C.PieceCache, texts: list[str], encode_words=None, *, lead: bytes = b"") -> None:
    ids, offsets = cache.encode(texts, encode_words or Bytes())
    expected = [lead + text.encode() if text else b"" for text in texts]
    assert (ids.dtype, offsets.dtype) == (np.int32, np.int64)
    assert ids.tolist() == list(b"".join(expected))
    assert offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.text("ab ,\n\0é\u2581日", max_size=80), max_size=5), max_size=3),
    st.integers(0, 100),
    st.booleans(),
)
def test_all_of_the_text_in_order(batches, percent, adds_space):
    joins = (np.random.default_rng(0).integers(0, 100, (256, 256)) < percent).astype(np.uint8)
    cache = _C.PieceCache(joins, adds_space)
    for texts in batches:
        check(cache, texts, lead=b" " if adds_space else b"")


def test_cuts_where_nothing_joins():
    toy = Bytes()
    check(_C.PieceCache(SPACES, adds_space=False), ["a  fever, a cough ", "", " "], toy)
    assert sorted(toy.asked) == sorted([b"a", b" ", b" fever,", b" a", b" cough"])
    toy = Bytes()
    check(_C.PieceCache(SPACES, adds_space=True), ["a fever", " a", "", "a"], toy, lead=b" ")
    assert sorted(toy.asked) == sorted([b" a", b" fever", b" "])


def test_a_part_is_asked_for_once_but_long_ones():
    cache, toy = _C.PieceCache(SPACES, adds_space=False), Bytes()
    long = " " + "x" * 64
    for _ in range(3):
        check(cache, [f"a fever{long} a fever"], toy)
    assert toy.asked.count(b" fever") == 1
    assert toy.asked.count(long.encode()) == 3
    assert len(cache) == 3
    check(cache, ["y" * 1_000_000], toy)
    assert len(cache) == 3


def test_begins_afresh_when_full():
    cache = _C.PieceCache(SPACES, adds_space=True, limit=1 << 16)
    sizes = []
    for batch in range(60):
        check(cache, [" ".join(f"{batch}-{i}" for i in range(40))] * 3, lead=b" ")
        sizes.append(len(cache))
    assert max(sizes) < 1000
    assert sizes != sorted(sizes)


def test_a_tokenizer_that_fails_leaves_no_trace():
    cache = _C.PieceCache(SPACES, adds_space=False)

    def fails(words):
        raise RuntimeError("no tokenizer today")

    check(cache, ["a b"])
    with pytest.raises(RuntimeError, match="no tokenizer today"):
        cache.encode(["a b c"], fails)
    with pytest.raises(ValueError, match="ids of 0 words came back for 1"):
        cache.encode([" c"], lambda words: [])
    with pytest.raises(RuntimeError):
        cache.encode([" c"], lambda words: ["x"])  # pyright: ignore[reportArgumentType]
    check(cache, ["a b c"])


def test_threads_take_turns():
    cache = _C.PieceCache(SPACES, adds_space=False, limit=1 << 14)
    texts = [[f"{thread} {i % 7} {i * thread}" for i in range(500)] for thread in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(check, cache, batch) for _ in range(5) for batch in texts]:
            done.result()


def test_bad_input():
    with pytest.raises(ValueError, match="joins must have an entry for each of 256 \\* 256 pairs of bytes, got 4"):
        _C.PieceCache(np.ones((2, 2), np.uint8), adds_space=False)
    with pytest.raises(TypeError):
        _C.PieceCache(np.ones((256, 256)), adds_space=False)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="limit must be between 4096 and"):
        _C.PieceCache(SPACES, adds_space=False, limit=1)
    cache = _C.PieceCache(SPACES, adds_space=False)
    with pytest.raises(TypeError, match=r"texts\[1\] is a bytes, expected a str"):
        cache.encode(["a", b"b"], Bytes())  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError):
        cache.encode("abc", Bytes())  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        cache.encode(["a", "b\ud800"], Bytes())
    check(cache, [])
