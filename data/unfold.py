"""A batch of preference documents to one in which both answers of a pair follow the same copy of their prompt.

A pair's document (data/preference.py) is prompt, chosen answer, the prompt's last token again, rejected answer. Its
batch has three segments: the prompt but for its last token; and each answer, from its own copy of that token to the
token before its EOS, so that every row of an answer has one target. An answer's queries see the prompt's keys and then
its own (`layout.keys`), and its positions go on from the prompt's. So each answer is computed as in a document of its
own, and the prompt is read once for both.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from tokenmill.data.batch import Batch
from tokenmill.data.errors import DataError
from tokenmill.kernels.layout import GHOST, KeyLayout, Layout, bucket

SEGMENTS = 3  # of a pair: prompt, chosen, rejected, at 3 i, 3 i + 1 and 3 i + 2


def unfold(batch: Batch) -> Batch:
    """`batch` holds whole documents of pairs, on the CPU; of its T rows, 2 a pair are left out (the answers' EOS).

    Segments of one pair have its document id. An answer's document length is that of prompt and answer; the shared
    prompt has the longer of the two. A ghost stays one, in as many segments.

    Raises DataError where a document is not a preference pair.
    """
    layout = batch.layout
    if (layout.document_ids == GHOST).all():
        return _ghost(batch)
    bounds = layout.cu_seqlens.numpy().astype(np.int64)
    begins, ends = bounds[:-1], bounds[1:]
    taught = np.concatenate([[False], batch.weights.numpy() > 0, [False]])
    runs = np.flatnonzero(np.diff(taught)).reshape(-1, 2)  # rows with a target: each run is an answer
    of_run = np.searchsorted(ends, runs[:, 0], side="right")
    if not np.array_equal(of_run, np.repeat(np.arange(len(begins)), 2)):
        wrong = int(np.flatnonzero(np.bincount(of_run, minlength=len(begins)) != 2)[0])
        raise _not_a_pair(batch, wrong)
    (first, first_end), (second, second_end) = runs[0::2].T, runs[1::2].T
    tokens = batch.tokens.numpy()
    pairs = (second == first_end + 1) & (second_end == ends - 1)
    pairs &= tokens[np.minimum(second, len(tokens) - 1)] == tokens[first]
    if not pairs.all():
        raise _not_a_pair(batch, int(np.flatnonzero(~pairs)[0]))

    prompt = first - begins
    lengths = np.stack([prompt, first_end - first, second_end - second], 1)  # (N, 3)
    kept = np.ones(len(tokens), np.bool_)
    kept[first_end] = kept[second_end] = False
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    starts = cu_seqlens[:-1].reshape(-1, SEGMENTS)
    before = prompt[:, None] * np.array([0, 1, 1])  # keys that come before a segment's own
    key_lengths = before + lengths
    within = _count(lengths)
    positions = within + np.repeat(before, lengths.ravel())
    place = _count(key_lengths)
    own = place >= np.repeat(before, key_lengths.ravel())
    gather = place + np.where(
        own, np.repeat(starts - before, key_lengths.ravel()), np.repeat(starts[:, :1], key_lengths.sum(1))
    )
    whole = prompt[:, None] + 1 + lengths[:, 1:]  # prompt and answer: (N, 2)
    document_lengths = np.concatenate([whole.max(1, keepdims=True), whole], 1)
    weights = batch.weights[torch.from_numpy(kept)]
    rows = torch.from_numpy(kept)
    return Batch(
        batch.tokens[rows],
        batch.targets[rows],
        weights,
        weights.nonzero()[:, 0].to(torch.int32),
        batch.source_ids.repeat_interleave(SEGMENTS),
        Layout(
            _int32(positions),
            _int32(cu_seqlens),
            bucket(int(lengths.max())),
            layout.document_ids.repeat_interleave(SEGMENTS),
            _int32(document_lengths.ravel()),
            KeyLayout(
                torch.from_numpy(gather),
                _int32(np.concatenate([[0], np.cumsum(key_lengths)])),
                bucket(int(key_lengths.max())),
            ),
        ),
    )


def _ghost(batch: Batch) -> Batch:
    """All rows are its prompt's."""
    layout = batch.layout
    rows = len(batch.tokens)
    return replace(
        batch,
        source_ids=batch.source_ids.repeat_interleave(SEGMENTS),
        layout=Layout(
            layout.positions,
            torch.tensor([0, rows, rows, rows], dtype=torch.int32),
            layout.max_seqlen,
            layout.document_ids.repeat_interleave(SEGMENTS),
            layout.document_lengths.repeat_interleave(SEGMENTS),
        ),
    )


def _count(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... within each of so many lengths, end to end."""
    flat = lengths.ravel()
    return np.arange(flat.sum()) - np.repeat(np.cumsum(flat) - flat, flat)


def _int32(values: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32))


def _not_a_pair(batch: Batch, document: int) -> DataError:
    return DataError(
        f"document {int(batch.layout.document_ids[document])} of the batch is not a preference pair: expected prompt, "
        "answer, the prompt's last token, answer; prepare the stream from rows with 'chosen' and 'rejected'"
    )
