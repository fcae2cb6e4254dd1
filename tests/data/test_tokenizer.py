"""Tokenizers against sentencepiece itself, on real text where it is at hand; and training one."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
from itertools import chain
from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from tokenmill.data.errors import DataError
from tokenmill.data.tokenizer import NAMED, Tokenizer, train_tokenizer

HARD = [
    "",
    " ",
    "a  b",
    " a ",
    "\n\n\t",
    "naïve 3.14 µg/ml",
    "日本語",
    "</s> [INST] <unk>",
    "a\0b",
    "\u2581x",
    "é" * 300,
    "a\u2581 b \u2581 \u2581",
    "ACGT" * 3000,
    "  \n x=1;\r\n\r\n",
    "e\u0301 ﬁ Ⅳ \u200b\ufeff",
]


def check_batch(tokenizer: Tokenizer, reference: SentencePieceProcessor, texts: list[str]) -> None:
    expected = reference.encode(texts)
    ids, offsets = tokenizer.encode_batch(texts)
    assert (ids.dtype, offsets.dtype) == (np.int32, np.int64)
    assert np.array_equal(offsets, np.cumsum([0, *map(len, expected)]))
    assert np.array_equal(ids, np.fromiter(chain.from_iterable(expected), np.int32))


@pytest.mark.parametrize(("name", "vocab_size"), [("mistral-v1", 32000), ("mistral-v2", 32768), ("mistral-v3", 32768)])
def test_mistral_models_by_name(name, vocab_size):
    tokenizer = Tokenizer.open(name)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (name, vocab_size, 1, 2)
    assert tokenizer.sha256 == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    reference = SentencePieceProcessor(model_file=str(tokenizer.path))
    for text in HARD:
        assert tokenizer.encode(text) == reference.encode(text)
    check_batch(tokenizer, reference, HARD)
    check_batch(tokenizer, reference, [])
    assert tokenizer.decode(tokenizer.encode("A fever of 39.5 °C.")) == "A fever of 39.5 °C."
    assert not {1, 2, 3, 4} & set(tokenizer.encode("<s></s>[INST][/INST]")) or name == "mistral-v1"
    assert tokenizer.control_id("[INST]") == (None if name == "mistral-v1" else 3)


def documents(name: str) -> list[str]:
    if name == "pydoc":
        return list(topics.topics.values())
    path = Path(__file__).resolve().parents[2] / f"../shared/data/{name}_documents.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"needs {path.name}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def check_documents(name: str, texts: list[str]) -> None:
    tokenizer = Tokenizer.open(name)
    reference = SentencePieceProcessor(model_file=str(tokenizer.path))
    check_batch(tokenizer, reference, texts)  # nothing cached yet, then everything
    check_batch(tokenizer, reference, texts)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(("corpus", "step"), [("pydoc", 3), ("medquad", 80), ("openstax_nursing", 40)])
def test_documents_sample(name, corpus, step):
    check_documents(name, documents(corpus)[::step])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("corpus", ["pydoc", "medquad", "openstax_nursing"])
def test_documents_whole(name, corpus):
    check_documents(name, documents(corpus))


PLAIN = dict(model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False)
MODELS = {  # how a model is trained, and whether its ids can be cached
    "fallback": (PLAIN | dict(byte_fallback=True), True),
    "unknown": (PLAIN, True),
    "no prefix": (PLAIN | dict(byte_fallback=True, add_dummy_prefix=False), True),
    "no prefix, unknown": (PLAIN | dict(add_dummy_prefix=False), True),
    "across spaces": (PLAIN | dict(byte_fallback=True, split_by_whitespace=False), True),
    "runs of spaces": (PLAIN | dict(byte_fallback=True, allow_whitespace_only_pieces=True), True),
    "user defined": (PLAIN | dict(byte_fallback=True, user_defined_symbols=["a fe", "ver,\n", "x\u2581y", ";;"]), True),
    "control": (PLAIN | dict(byte_fallback=True, control_symbols=["[INST]", "a b"]), True),
    "control character": (PLAIN | dict(byte_fallback=True, control_symbols=["~"]), False),
    "suffix": (PLAIN | dict(byte_fallback=True, treat_whitespace_as_suffix=True), False),
    "extra spaces": (PLAIN | dict(byte_fallback=True, remove_extra_whitespaces=True), False),
    "nmt_nfkc": (PLAIN | dict(byte_fallback=True, normalization_rule_name="nmt_nfkc"), False),
    "unigram": (PLAIN | dict(byte_fallback=True, model_type="unigram"), False),
    "char": (PLAIN | dict(model_type="char"), False),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that trains a model of MODELS, or takes one, and opens it, with sentencepiece's own beside."""
    folder = tmp_path_factory.mktemp("trained")
    lines = [line for text in list(topics.topics.values())[:25] for line in text.splitlines() if line.strip()]
    lines += [f"A fever, {i} times;; 日本 naïve" for i in range(30)]

    def make(name: str) -> tuple[Tokenizer, SentencePieceProcessor]:
        path = folder / f"{name}.model"
        if not path.exists():
            options = dict(vocab_size=700, hard_vocab_limit=False, num_threads=1, minloglevel=2) | MODELS[name][0]
            model = io.BytesIO()
            SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
            path.write_bytes(model.getvalue())
        return Tokenizer.open(path), SentencePieceProcessor(model_file=str(path))

    return make


@pytest.mark.parametrize("name", MODELS)
def test_models_of_all_kinds(trained, name):
    tokenizer, reference = trained(name)
    assert (tokenizer._cache is not None) == MODELS[name][1]
    assert [tokenizer.encode(text) for text in HARD] == [reference.encode(text) for text in HARD]
    check_batch(tokenizer, reference, HARD + list(topics.topics.values())[::10])


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][1]])
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(" \n\t\0\x01\u2581aefvrxy~;,.19éï日本☃") | st.text(), max_size=6))
def test_any_text(trained, name, texts):
    tokenizer, reference = trained(name)
    check_batch(tokenizer, reference, texts)


def piece(text: bytes, kind: int) -> bytes:
    """A piece as a model's file holds it."""
    field = b"\x0a" + bytes([len(text)]) + text + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(field)]) + field


# A file of fields goes on with more: an unused piece, one that is not text, escape_whitespaces = false.
@pytest.mark.parametrize("fields", [piece(b"fever,", 5), piece(b"quin\xff", 1), b"\x1a\x02\x28\x00"])
def test_models_that_must_not_be_cached(trained, tmp_path, fields):
    model = trained("fallback")[0].model + fields
    (tmp_path / "odd.model").write_bytes(model)
    odd = Tokenizer.open(tmp_path / "odd.model")
    assert odd._cache is None
    check_batch(odd, SentencePieceProcessor(model_proto=model), HARD)


@pytest.mark.parametrize("name", ["fallback", "no prefix", "unigram"])
def test_text_that_goes_on(trained, name):
    """What is behind a line break, which joins with nothing."""
    tokenizer, reference = trained(name)
    line = reference.encode("\n")
    for text in HARD + list(topics.topics.values())[::20]:
        if name == "unigram" and text.startswith(("\n", " ", "\t")):
            continue  # its normalisation takes what is at the beginning
        ids = tokenizer.encode(text, continues=True)
        assert [*line, *ids] == reference.encode("\n" + text)
    assert tokenizer.encode("fever") == reference.encode("fever")


def test_control_pieces_behind_the_others(trained, tmp_path):
    tokenizer, _ = trained("fallback")
    long = f"<|{'x' * 200}|>"
    (tmp_path / "more.model").write_bytes(tokenizer.with_control_pieces(["<|im_start|>", "<é>", long]))
    more = Tokenizer.open(tmp_path / "more.model")
    reference = SentencePieceProcessor(model_file=str(more.path))
    first = tokenizer.vocab_size
    assert more.vocab_size == first + 3
    assert [more.control_id(piece) for piece in ("<|im_start|>", "<é>", long)] == [first, first + 1, first + 2]
    assert more._cache is not None
    texts = [*HARD, "<|im_start|>user", f"<é>{long}<|im_start|>", *list(topics.topics.values())[::20]]
    check_batch(more, reference, texts)
    assert [more.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    assert more.decode([first, *tokenizer.encode("a fever"), first + 2]) == "a fever"


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (["<a>", "<a>"], "'<a>' is a piece of tokenizer 'tokenizer.model' already"),
        (["</s>"], "'</s>' is a piece"),
        (["<0x0A>"], "'<0x0A>' is a piece"),
        (["<unk>"], "'<unk>' is a piece"),
        ([""], "'' cannot be a token"),
        (["x"], "'x' cannot be a token: expected 2 characters or more without a space"),
        (["a b"], "'a b' cannot be a token"),
        (["a\u2581b"], "cannot be a token"),
    ],
)
def test_control_pieces_that_cannot_be(small, pieces, message):
    with pytest.raises(DataError, match=message):
        small.with_control_pieces(pieces)


def test_pickled_by_path(small):
    again = pickle.loads(pickle.dumps(small))
    assert (again.path, again.name, again.sha256) == (small.path, small.name, small.sha256)
    assert again.encode("The patient") == small.encode("The patient")


def test_a_file_and_its_folder(small):
    assert Tokenizer.open(small.path).sha256 == small.sha256
    assert Tokenizer.open(small.path.parent).sha256 == small.sha256
    assert Tokenizer.open(str(small.path)).vocab_size == 300


def test_trained_model_loses_nothing(small):
    assert (small.bos_id, small.eos_id) == (1, 2)
    for text in ["The patient", "  two  spaces ", "12345", "日本\n\t", "\u00e9 e\u0301 ﬁ Ⅳ"]:
        assert small.decode(small.encode(text)) == text
    assert 0 not in small.encode("日本 unseen ☃")


def test_digits_are_split(tmp_path):
    digits = train_tokenizer(["1234 1234 abab abab"] * 20, 270, tmp_path / "digits.model")
    assert len(digits.encode("1234")) >= 4
    assert len(digits.encode("abab")) < 4


def test_training_repeats_itself(small, tmp_path):
    texts = [f"The patient number {i} has a fever of {36 + i % 5} degrees.\n" for i in range(200)]
    assert train_tokenizer(iter(texts), 300, tmp_path / "deep" / "again.model").sha256 == small.sha256


@pytest.mark.parametrize("stop", [DataError("notes.jsonl:3: 'text' is empty"), KeyboardInterrupt()])
def test_what_stops_the_texts_stops_the_training(tmp_path, stop):
    def texts():
        yield "The patient has a fever."
        raise stop

    with pytest.raises(type(stop)) as raised:
        train_tokenizer(texts(), 300, tmp_path / "x.model")
    assert raised.value is stop
    assert list(tmp_path.iterdir()) == []


def test_a_long_line_is_trained_on(tmp_path):
    line = "é" * (1 << 19) + "ü"  # of more bytes than sentencepiece takes
    tokenizer = train_tokenizer(["The patient.", line], 266, tmp_path / "x.model")
    assert len(tokenizer.encode("éé", continues=True)) == 1


def test_training_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match=r"x\.model: no vocabulary of 5000 pieces .* Vocabulary size too high"):
        train_tokenizer(["a b c"], 5000, tmp_path / "x.model")
    with pytest.raises(DataError, match="no vocabulary of 300 pieces"):
        train_tokenizer([], 300, tmp_path / "x.model")
    with pytest.raises(DataError, match="is a folder"):
        train_tokenizer(["a b c"], 300, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_errors(tmp_path, small, trained, monkeypatch):
    with pytest.raises(DataError, match=r"nowhere: no such tokenizer: expected .*mistral-v1"):
        Tokenizer.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"tokenizer\.model: cannot read"):
        Tokenizer.open(tmp_path)
    for content in (b"", b"not a model", small.model[: len(small.model) // 2]):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.model: not a sentencepiece model"):
            Tokenizer.open(tmp_path / "bad.model")
    for tokenizer in (small, trained("unigram")[0]):
        with pytest.raises(DataError, match="b.*surrogate"):
            tokenizer.encode_batch(["a", "b \ud800 c"])
    monkeypatch.setattr("tokenmill.data.tokenizer.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install mistral-common"):
        Tokenizer.open("mistral-v1")


@pytest.mark.parametrize("missing", ["bos", "eos"])
def test_a_model_without_bos_or_eos(tmp_path, missing):
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to train on"] * 10),
        model_writer=model,
        vocab_size=270,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
        bos_id=-1 if missing == "bos" else 1,
        eos_id=-1 if missing == "eos" else 2,
    )
    (tmp_path / "odd.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match=rf"odd\.model: the model has no {missing.upper()} piece"):
        Tokenizer.open(tmp_path / "odd.model")
