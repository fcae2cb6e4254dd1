"""Pieces of text files to token ids: the work of `prepare` that its processes share."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokenmill.data import dedupe
from tokenmill.data.chat import LossOn, render, resolve
from tokenmill.data.decontaminate import Evaluations
from tokenmill.data.documents import Piece, content, rows, texts, utf8_size
from tokenmill.data.errors import DataError
from tokenmill.data.preference import Pair, render_pair
from tokenmill.data.shard import Documents, silent_spans, token_dtype
from tokenmill.data.tokenizer import Tokenizer

T = TypeVar("T")

MIXED = "preference pairs and other documents do not go into one stream: prepare each for itself"


@dataclass(frozen=True)
class Encoded:
    """The documents of some pieces, in order, without empty ones and those that hold text of an evaluation."""

    documents: Documents
    sizes: NDArray[np.int64]  # (N,) bytes of text
    keys: NDArray[np.uint64] | None  # (N, K) of data/dedupe.py
    places: list[str]  # N, for a message
    contaminated: list[tuple[str, str, str]]  # source, place and what is shared, of each left out
    empty: list[tuple[str, str]]  # source and place of each text without a word, which is left out too
    pairs: bool | None  # whether they are preference pairs; None where there are none
    chat: dict[str, str] | None  # how conversations and pairs were rendered; None where there are none


@dataclass(frozen=True)
class Encoder:
    """How documents are made of rows. A plain one is BOS, its text, EOS; a conversation or a pair is rendered."""

    tokenizer: Tokenizer
    text_key: str | None
    source_key: str | None
    template: str
    loss_on: LossOn
    dedupe: dedupe.Dedupe | None
    evaluations: Evaluations | None

    def __call__(self, pieces: Sequence[Piece]) -> Encoded:
        """Raises DataError naming file, line and key where a row cannot be used."""
        plain: list[str] = []
        chats: dict[int, tuple[list[int], list[int]]] = {}  # by document: ids and mask
        sources: dict[str, int] = {}
        whole: list[str] = []  # all the text of each document
        source_ids, sizes, places, contaminated, empty = [], [], [], [], []
        pairs: bool | None = None
        for piece in pieces:
            for where, row in rows(piece, self.text_key):
                try:
                    found = content(row, self.text_key)
                    text = found if isinstance(found, str) else "\n".join(texts(found))
                    size = utf8_size(text)
                    source = piece.input.source if self.source_key is None else _source(row, self.source_key)
                    if not text.strip():  # a conversation never is
                        empty.append((source, where))
                        continue
                    if self.evaluations and (shared := self.evaluations.find(text)):
                        contaminated.append((source, where, f"shares {shared!r}"))
                        continue
                    if pairs is None:
                        pairs = isinstance(found, Pair)
                    if pairs != isinstance(found, Pair):
                        raise DataError(MIXED)
                    if isinstance(found, str):
                        plain.append(found)
                    elif isinstance(found, Pair):
                        chats[len(places)] = render_pair(found, self.tokenizer, self.template)
                    else:
                        chats[len(places)] = render(found, self.tokenizer, self.template, self.loss_on)
                except DataError as error:
                    raise DataError(f"{where}: {error}") from None
                source_ids.append(sources.setdefault(source, len(sources)))
                sizes.append(size)
                places.append(where)
                if self.dedupe:
                    whole.append(text)
        tokens, lengths, silent = _framed(plain, self.tokenizer)
        chat = None
        if chats:
            tokens, lengths, silent = _with_chats(tokens, lengths, chats)
            chat = {"template": resolve(self.tokenizer, self.template), "loss_on": "last" if pairs else self.loss_on}
        return Encoded(
            Documents(tokens, lengths, silent, np.array(source_ids, np.int64), list(sources)),
            np.array(sizes, np.int64),
            dedupe.keys(whole, self.dedupe) if self.dedupe else None,
            places,
            contaminated,
            empty,
            pairs,
            chat,
        )


def _source(row: dict[str, Any], key: str) -> str:
    source = row.get(key)
    if not isinstance(source, str) or not source:
        raise DataError(f"{key!r} is {source!r}, expected the name of a source (--source-key)")
    return source


def _framed(plain: list[str], tokenizer: Tokenizer) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Tokens, lengths and silent spans of plain documents."""
    ids, offsets = tokenizer.encode_batch(plain)
    begins = offsets[:-1] + 2 * np.arange(len(plain))
    ends = offsets[1:] + 2 * np.arange(1, len(plain) + 1)
    tokens = np.empty(len(ids) + 2 * len(plain), token_dtype(tokenizer.vocab_size))
    text = np.ones(len(tokens), np.bool_)
    text[begins] = text[ends - 1] = False
    tokens[text] = ids
    tokens[begins], tokens[ends - 1] = tokenizer.bos_id, tokenizer.eos_id
    return tokens, ends - begins, np.empty((0, 2), np.int64)


def _with_chats(
    tokens: NDArray[Any], lengths: NDArray[np.int64], chats: dict[int, tuple[list[int], list[int]]]
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """The same with conversations put at their places among the documents."""
    plain = iter(np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else [])
    found, silent, start = [], [], 0
    for i in range(len(lengths) + len(chats)):
        if i in chats:
            ids, mask = chats[i]
            found.append(np.array(ids, tokens.dtype))
            silent.append(silent_spans(mask) + start)
        else:
            found.append(next(plain))
        start += len(found[-1])
    return np.concatenate(found), np.array(list(map(len, found)), np.int64), np.concatenate(silent)


_encoder: Encoder  # of a worker process


def encode(chunks: Iterable[tuple[T, list[Piece]]], encoder: Encoder, workers: int) -> Iterator[tuple[T, Encoded]]:
    """Encode chunks of pieces, in order, in so many processes (0 or 1: in this one).

    Raises DataError as the encoder does, and ChildProcessError where a process was ended from outside.
    """
    if workers < 2:
        for tag, pieces in chunks:
            yield tag, encoder(pieces)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (encoder,)) as pool:
        waiting: deque[tuple[T, Future[Encoded]]] = deque()
        try:
            for tag, pieces in chunks:
                waiting.append((tag, pool.submit(_work, pieces)))
                if len(waiting) > 2 * workers:  # enough for all to be busy; more would only fill memory
                    tag, future = waiting.popleft()
                    yield tag, future.result()
            while waiting:
                tag, future = waiting.popleft()
                yield tag, future.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker process was ended from outside, often for want of memory: try again with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:  # a parent that is killed tells nobody
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _encoder = encoder


def _work(pieces: list[Piece]) -> Encoded:
    return _encoder(pieces)
