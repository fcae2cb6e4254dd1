"""Batches made by hand, against a loop that says what each row is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokenmill.data.batch import IGNORE, Batch
from tokenmill.data.unfold import unfold
from tokenmill.kernels.layout import GHOST

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
MASK = [[0.0, 1.0, 0.5], [1.0], [1.0, 0.0, 0.0, 2.0]]


def rows(documents, masks):
    for document, mask in zip(documents, masks, strict=True):
        for i, token in enumerate(document):
            weight = mask[i + 1] if i + 1 < len(document) else 0.0
            yield token, document[i + 1] if weight else IGNORE, weight, i


@pytest.mark.parametrize("mask", [None, MASK])
def test_rows(mask):
    batch = Batch.from_documents(DOCUMENTS, mask, document_ids=[7, 8, 9], source_ids=[0, 1, 0])
    tokens, targets, weights, positions = zip(
        *rows(DOCUMENTS, mask or [[1.0] * len(d) for d in DOCUMENTS]), strict=True
    )
    assert batch.tokens.tolist() == list(tokens)
    assert batch.targets.tolist() == list(targets)
    assert batch.weights.tolist() == list(weights)
    assert batch.layout.positions.tolist() == list(positions)
    assert batch.layout.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert batch.layout.document_ids.tolist() == [7, 8, 9]
    assert batch.layout.document_lengths.tolist() == [3, 1, 4]
    assert batch.source_ids.tolist() == [0, 1, 0]
    assert batch.target_rows.tolist() == [i for i, weight in enumerate(weights) if weight]
    types = [getattr(batch, name).dtype for name in ("tokens", "targets", "weights", "target_rows", "source_ids")]
    assert types == [torch.int32, torch.int64, torch.float32, torch.int32, torch.int32]


def test_from_shards_is_from_documents():
    shard = np.array([t for d in DOCUMENTS for t in d], np.uint16)
    silent = np.array([[0, 1], [5, 7]], np.uint64)
    start, length = np.array([0, 3, 4]), np.array([3, 1, 4])
    ids = np.array([7, 8, 9])
    got = Batch.from_shards([shard], [silent], start * 0, start, length, document_ids=ids, source_ids=ids - 7)
    mask = [[0, 1, 1], [1], [1, 0, 0, 1]]
    want = Batch.from_documents(DOCUMENTS, mask, document_ids=[7, 8, 9], source_ids=[0, 1, 2])
    for name in ("tokens", "targets", "weights", "target_rows", "source_ids"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    for name in ("positions", "cu_seqlens", "document_ids", "document_lengths"):
        assert torch.equal(getattr(got.layout, name), getattr(want.layout, name))
        assert getattr(got.layout, name).dtype == getattr(want.layout, name).dtype
    assert got.layout.max_seqlen == want.layout.max_seqlen


def test_padded_adds_one_ghost_and_changes_nothing_else():
    batch = Batch.from_documents(DOCUMENTS, MASK)
    padded = batch.padded(tokens=13, documents=6)
    assert torch.equal(padded.tokens[:8], batch.tokens)
    assert padded.targets.tolist() == batch.targets.tolist() + [IGNORE] * 5
    assert padded.weights.tolist() == batch.weights.tolist() + [0] * 5
    assert padded.target_rows.tolist() == list(range(13))
    assert padded.layout.cu_seqlens.tolist() == [0, 3, 4, 8, 13, 13, 13]
    assert padded.layout.document_ids.tolist() == [0, 1, 2, GHOST, GHOST, GHOST]
    assert padded.layout.document_lengths.tolist() == [3, 1, 4, 5, 0, 0]
    assert padded.layout.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert padded.layout.real_rows.tolist() == [True] * 8 + [False] * 5


def test_ghost_weighs_nothing_and_goes_through_the_loss():
    ghost = Batch.ghost()
    assert float(ghost.weights.sum()) == 0
    assert set(ghost.targets.tolist()) == {IGNORE}
    assert ghost.target_rows.tolist() == list(range(16))
    assert not ghost.layout.real_rows.any()


def test_bad_input():
    with pytest.raises(ValueError, match="must be positive, got 0"):
        Batch.from_documents([[1, 2], []])
    with pytest.raises(ValueError, match=r"loss_mask has lengths \[1\], the documents \[2\]"):
        Batch.from_documents([[1, 2]], [[1.0]])
    with pytest.raises(ValueError, match="1 documents but 2 document_ids"):
        Batch.from_documents([[1, 2]], document_ids=[1, 2])
    for size in ({"tokens": 7, "documents": 9}, {"tokens": 9, "documents": 3}):
        with pytest.raises(ValueError, match="does not fit"):
            Batch.from_documents(DOCUMENTS).padded(**size)
    shared = unfold(Batch.from_documents([[1, 2, 3, 4, 2, 5, 6]], [[0, 0, 1, 1, 0, 1, 1]]))
    with pytest.raises(ValueError, match="cannot be padded"):
        shared.padded(tokens=16, documents=9)
