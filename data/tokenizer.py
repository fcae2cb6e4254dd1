"""Text to token ids and back: sentencepiece models, Mistral's own among them, and training a new one."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from tokenmill.data.errors import DataError

MODEL_FILE = "tokenizer.model"

# Mistral's models by name, as the package mistral-common ships them.
NAMED = {
    "mistral-v1": "tokenizer.model.v1",
    "mistral-v2": "mistral_instruct_tokenizer_240216.model.v2",
    "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3",
}


class Tokenizer:
    """A sentencepiece model. Control pieces (BOS, EOS, [INST], ...) are never made from text, only placed by id."""

    def __init__(self, path: Path, name: str) -> None:
        try:
            self.model = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: cannot read the tokenizer ({error.strerror}): pass a sentencepiece model"
            ) from None
        processor = SentencePieceProcessor()
        try:
            # An empty model loads without complaint and then encodes nothing.
            loaded = bool(self.model) and processor.LoadFromSerializedProto(self.model)
        except (RuntimeError, ValueError):
            loaded = False
        if not loaded:
            raise DataError(f"{path}: not a sentencepiece model: pass a file made by sentencepiece")
        self.path = path
        self.name = name
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        self.vocab_size: int = processor.vocab_size()
        self.bos_id: int = processor.bos_id()
        self.eos_id: int = processor.eos_id()
        for what, token in (("BOS", self.bos_id), ("EOS", self.eos_id)):
            if token < 0:
                raise DataError(f"{path}: the model has no {what} piece: train one with bos_id and eos_id set")
        self._processor = processor

    @staticmethod
    def open(path_or_name: str | Path) -> Tokenizer:
        """A model file, a folder that holds `tokenizer.model`, or a name: mistral-v1, mistral-v2, mistral-v3.

        Raises DataError where there is no such file, it is not a sentencepiece model, or it has no BOS or EOS.
        """
        if path_or_name in NAMED:
            name = str(path_or_name)
            package = find_spec("mistral_common")
            if package is None or not package.submodule_search_locations:
                raise DataError(
                    f"tokenizer {name!r} comes with the package mistral-common, which is not installed: "
                    "pip install mistral-common, or pass a sentencepiece model file"
                )
            return Tokenizer(Path(package.submodule_search_locations[0]) / "data" / NAMED[name], name)
        path = Path(path_or_name)
        if not path.exists():
            raise DataError(f"{path}: no such tokenizer: expected a sentencepiece model, its folder, or {list(NAMED)}")
        if path.is_dir():
            return Tokenizer(path / MODEL_FILE, path.resolve().name)
        return Tokenizer(path, path.name)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS and EOS. Raises DataError where the text is not valid Unicode."""
        try:
            return self._processor.encode(text)
        except (UnicodeEncodeError, RuntimeError):  # a lone surrogate, which JSON can smuggle in
            raise DataError(f"{text[:40]!r}: holds half of a surrogate pair, which is not text") from None

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as `encode` makes them."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control pieces give nothing."""
        return self._processor.decode([int(token) for token in ids])

    def control_id(self, piece: str) -> int | None:
        """The id of a control piece such as `[INST]`, None where the model has no such control piece."""
        token = self._processor.piece_to_id(piece)
        return token if self._processor.is_control(token) else None


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: str | Path) -> Tokenizer:
    """Train a BPE model of Mistral's kind on texts and write it to `output`, a file, whole or not at all.

    Byte fallback, so that every text can be encoded; identity normalisation and no stripping, so that nothing is lost;
    digits split; ids of unk, bos, eos = 0, 1, 2. The same texts give the same file.

    Raises DataError where the texts cannot give a vocabulary of that size.
    """
    output = Path(output)
    if output.is_dir():
        raise DataError(f"{output}: is a folder: pass the model file to write, such as {output / MODEL_FILE}")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines() if line.strip()),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=1 << 20,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip()  # without the file, line and condition of sentencepiece
        raise DataError(
            f"{output}: no vocabulary of {vocab_size} pieces can be trained on these texts: {reason}"
        ) from None
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(model.getvalue())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return Tokenizer.open(output)
