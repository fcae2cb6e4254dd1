"""Text to token ids and back: sentencepiece models, Mistral's own among them, and training a new one.

Most words of a text were encoded before, so a cache (csrc/piece_cache.hpp) stands in front of sentencepiece. It cuts a
text between any two bytes that no piece of the vocabulary holds side by side: before most spaces, around line ends and
punctuation. The ids are sentencepiece's own for every text, because the cache serves only models for which these are
provably the ids of what lies between the cuts, one after the other:

- The model is BPE. It merges neighbours by score, the leftmost first among equals. No merge reaches over a cut, as its
  result would be a piece that holds both bytes; so the merges on one side neither allow, forbid nor reorder those on
  the other. User-defined pieces, matched before the merges, do not reach over a cut either.
- Nothing is normalised but space to U+2581, and one is put in front of the text in some models: no charsmap, no extra
  spaces removed, none put behind. So a part is normalised alone as within its text. Cuts lie between ASCII bytes, thus
  between characters, and never beside a U+2581 in the text itself.
- Without byte fallback, unknown characters side by side become one id: then what follows a cut must be a known one.
- No piece is marked unused: sentencepiece takes those apart by the merge it saw last, anywhere in the text. None is a
  control piece of one character: before 0.2.3, a text that holds it came out empty.

A unigram model does not qualify: it adds scores along the whole text in fp32, and the rounding of a long sum decides
between segmentations that are nearly as good.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from tokenmill._C import PieceCache
from tokenmill.data.errors import DataError
from tokenmill.data.files import replace_file

MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"  # how sentencepiece writes a space

# A model is a message of sentencepiece_model.proto. Fields put behind its others add pieces, and override.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
CONTROL = b"\x18\x03"  # type of a piece
ADD_NO_SPACE = b"\x18\x00"  # add_dummy_prefix = false, of the normalizer

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
        self._cache = _Cache.of(self.model, processor)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path, str]]:
        """Pickled by path and opened anew: a process has a cache of its own."""
        return Tokenizer, (self.path, self.name)

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

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """The ids of a text, without BOS and EOS. `continues`: as what follows other text, so that a model which puts a
        space in front of each text puts none here. Raises DataError where the text is not valid Unicode."""
        return self._encode([text], *(self._continuing if continues else (self._processor, self._cache)))[0].tolist()

    def encode_batch(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The ids of texts, without BOS and EOS, laid end to end: text i is `ids[offsets[i]:offsets[i + 1]]`.

        ids (T,) int32, offsets (N + 1,) int64; the same as sentencepiece's, on one core. It runs without the GIL, but
        calls from several threads take turns: for parallel work, use processes. A batch is less than 2 GiB of text.

        Raises DataError where a text is not valid Unicode.
        """
        return self._encode(texts, self._processor, self._cache)

    @property
    def is_plain_bpe(self) -> bool:
        """Whether it is BPE of a text as it stands, without unused pieces: what `_Cache` and others can state anew."""
        return self._cache is not None

    @cached_property
    def _continuing(self) -> tuple[SentencePieceProcessor, _Cache | None]:
        """Of the same model, but that it puts no space in front of a text."""
        model = self.model + _field(NORMALIZER, ADD_NO_SPACE)
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(model)
        return processor, _Cache.of(model, processor)

    @staticmethod
    def _encode(
        texts: list[str], processor: SentencePieceProcessor, cache: _Cache | None
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        try:
            if cache is not None:
                return cache.encode(texts)
            ids = [np.array(processor.encode(text.encode()), np.int32) for text in texts]
        except UnicodeEncodeError as error:  # a lone surrogate, which JSON can smuggle in
            raise DataError(f"{error.object[:40]!r}: holds half of a surrogate pair, which is not text") from None
        return np.concatenate([np.zeros(0, np.int32), *ids]), np.cumsum([0, *map(len, ids)], dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control pieces give nothing."""
        return self._processor.decode([int(token) for token in ids])

    def control_id(self, piece: str) -> int | None:
        """The id of a control piece such as `[INST]`, None where the model has no such control piece."""
        token = self._processor.piece_to_id(piece)
        return token if self._processor.is_control(token) else None

    def with_control_pieces(self, pieces: Sequence[str]) -> bytes:
        """The model's file with control pieces behind the others: ids from `vocab_size` on, in order. All texts keep
        their ids.

        Raises DataError where one is there already or twice, is shorter than 2 characters, or holds a space.
        """
        model = self.model
        for i, piece in enumerate(pieces):
            if len(piece) < 2 or SPACE in piece or any(map(str.isspace, piece)):  # of one character: see _Cache
                raise DataError(f"{piece!r} cannot be a token: expected 2 characters or more without a space")
            if piece in pieces[:i] or self._processor.id_to_piece(self._processor.piece_to_id(piece)) == piece:
                raise DataError(f"{piece!r} is a piece of tokenizer {self.name!r} already: it cannot be added")
            model += _field(PIECES, _field(1, piece.encode()) + CONTROL)
        return model


class _Cache:
    """A cache for a model that qualifies (see above)."""

    def __init__(self, processor: SentencePieceProcessor, joins: NDArray[np.uint8], lead: bytes) -> None:
        # A model that puts a space before each text puts it before a part as well, so parts are encoded behind a byte
        # that joins with no other, and its ids (and the space's) are taken off again.
        self._processor = processor
        self._lead = lead
        self._lead_ids = len(processor.encode(lead))
        self._cache = PieceCache(joins, adds_space=bool(lead))

    @staticmethod
    def of(model: bytes, processor: SentencePieceProcessor) -> _Cache | None:
        """A cache for the model, None where it would not be exact."""
        specs = {TRAINER: b"", NORMALIZER: b""}
        for number, value in _fields(model):
            if number in specs and isinstance(value, bytes):
                specs[number] += value
        trainer, normalizer = dict(_fields(specs[TRAINER])), dict(_fields(specs[NORMALIZER]))
        tokens = list(range(processor.vocab_size()))
        if (
            trainer.get(3, 1) != 2  # model_type: BPE
            or trainer.get(24, 0)  # treat_whitespace_as_suffix
            or normalizer.get(2, b"")  # precompiled_charsmap
            or normalizer.get(4, 1)  # remove_extra_whitespaces
            or not normalizer.get(5, 1)  # escape_whitespaces
            or any(processor.is_unused(tokens))
        ):
            return None

        try:
            pieces: list[str] = processor.id_to_piece(tokens)
        except UnicodeDecodeError:
            return None
        if any(len(piece) == 1 and processor.is_control(token) for token, piece in enumerate(pieces)):
            return None
        known = np.zeros(256, bool)  # ASCII alone
        for byte in range(128):
            known[byte] = not processor.is_unknown(processor.piece_to_id(SPACE if byte == ord(" ") else chr(byte)))
        known[:128] |= bool(trainer.get(35, 0))  # byte_fallback
        # All pieces in one string, with a byte between them that is in no UTF-8.
        pairs = np.frombuffer(b"\xff".join(piece.replace(SPACE, " ").encode() for piece in pieces), np.uint8)
        joins = np.zeros((256, 256), np.uint8)
        joins[pairs[:-1], pairs[1:]] = 1
        alone = [byte for byte in range(1, 128) if known[byte] and not joins[byte, :128].any()]
        joins[128:] = 1
        joins[:, ~known] = 1
        if not normalizer.get(3, 1):  # add_dummy_prefix
            return _Cache(processor, joins, b"")
        return _Cache(processor, joins, bytes(alone[:1])) if alone else None

    def encode(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        return self._cache.encode(texts, self._encode_words)

    def _encode_words(self, words: list[bytes]) -> list[list[int]]:
        ids = self._processor.encode([self._lead + word for word in words], num_threads=1)
        return [row[self._lead_ids :] for row in ids]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a valid protobuf message, in order: number, and value as it stands there."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = varint() if key & 7 == 2 else 8 if key & 7 == 1 else 4
        at += size
        yield key >> 3, message[at - size : at]


def _field(number: int, value: bytes) -> bytes:
    """A field of a protobuf message, the opposite of `_fields`."""
    size, head = len(value), bytearray([number << 3 | 2])
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes(head) + bytes([size]) + value


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: str | Path) -> Tokenizer:
    """Train a BPE model of Mistral's kind on texts and write it to `output`, a file, whole or not at all.

    Byte fallback, so that every text can be encoded; identity normalisation and no stripping, so that nothing is lost;
    digits split; ids of unk, bos, eos = 0, 1, 2. The same texts give the same file.

    Raises DataError where the texts cannot give a vocabulary of that size, and whatever `texts` raises.
    """
    output = Path(output)
    longest = 1 << 20  # bytes of a line: longer ones are cut, as sentencepiece would leave them out
    stopped: list[BaseException] = []  # sentencepiece says what ended the texts in lines of its own

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                for line in text.splitlines():
                    parts = (line[i : i + longest // 4] for i in range(0, len(line), longest // 4))
                    yield from (part for part in parts if part.strip())
        except (Exception, KeyboardInterrupt) as error:
            stopped.append(error)
            raise

    if output.is_dir():
        raise DataError(f"{output}: is a folder: pass the model file to write, such as {output / MODEL_FILE}")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=longest,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if stopped:
            raise stopped[0] from None
        reason = str(error).rsplit("] ", 1)[-1].strip()  # without the file, line and condition of sentencepiece
        raise DataError(
            f"{output}: no vocabulary of {vocab_size} pieces can be trained on these texts: {reason}"
        ) from None
    replace_file(output, model.getvalue())
    return Tokenizer.open(output)
