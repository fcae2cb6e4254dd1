"""Tokenizers against sentencepiece itself, on real text where it is at hand; and training one."""

from __future__ import annotations

import gzip
import hashlib
import io
import json

import pytest
from conftest import SHARED
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
]


@pytest.mark.parametrize(("name", "vocab_size"), [("mistral-v1", 32000), ("mistral-v2", 32768), ("mistral-v3", 32768)])
def test_mistral_models_by_name(name, vocab_size):
    tokenizer = Tokenizer.open(name)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (name, vocab_size, 1, 2)
    assert tokenizer.sha256 == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    reference = SentencePieceProcessor(model_file=str(tokenizer.path))
    for text in HARD:
        assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.encode_many(HARD) == [reference.encode(text) for text in HARD]
    assert tokenizer.decode(tokenizer.encode("A fever of 39.5 °C.")) == "A fever of 39.5 °C."
    assert not {1, 2, 3, 4} & set(tokenizer.encode("<s></s>[INST][/INST]")) or name == "mistral-v1"
    assert tokenizer.control_id("[INST]") == (None if name == "mistral-v1" else 3)


def medquad() -> list[str]:
    path = SHARED / "medquad_documents.jsonl.gz"
    if not path.is_file():
        pytest.skip("needs the MedQuAD documents")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def check_medquad(name: str, step: int) -> None:
    tokenizer = Tokenizer.open(name)
    texts = medquad()[::step]
    reference = SentencePieceProcessor(model_file=str(tokenizer.path)).encode(texts)
    assert tokenizer.encode_many(texts) == reference


@pytest.mark.parametrize("name", NAMED)
def test_medquad_sample(name):
    check_medquad(name, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_medquad_whole(name):
    check_medquad(name, 1)


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


def test_training_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match=r"x\.model: no vocabulary of 5000 pieces .* Vocabulary size too high"):
        train_tokenizer(["a b c"], 5000, tmp_path / "x.model")
    with pytest.raises(DataError, match="no vocabulary of 300 pieces"):
        train_tokenizer([], 300, tmp_path / "x.model")
    with pytest.raises(DataError, match="is a folder"):
        train_tokenizer(["a b c"], 300, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_errors(tmp_path, small, monkeypatch):
    with pytest.raises(DataError, match=r"nowhere: no such tokenizer: expected .*mistral-v1"):
        Tokenizer.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"tokenizer\.model: cannot read"):
        Tokenizer.open(tmp_path)
    for content in (b"", b"not a model", small.model[: len(small.model) // 2]):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.model: not a sentencepiece model"):
            Tokenizer.open(tmp_path / "bad.model")
    with pytest.raises(DataError, match="surrogate"):
        small.encode("a \ud800 b")
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
