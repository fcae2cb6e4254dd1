"""The nearest questions against a plain statement of the search, and embeddings against texts alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokenmill.data.batch import Batch
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.evaluate import neighbours
from tokenmill.trainer.evaluate.neighbours import embeddings, nearest
from tokenmill.trainer.model import ModelConfig, Transformer


def plain(queries, pool, k):
    """One pair after the other; a stable sort keeps the first of equals first."""
    found = []
    for query in queries:
        similar = [float(query @ row) / float(np.linalg.norm(query) * np.linalg.norm(row)) for row in pool]
        found.append(sorted(range(len(pool)), key=lambda i: -round(similar[i], 12))[:k])
    return found


@pytest.mark.parametrize(("n", "pool", "k"), [(1, 1, 5), (7, 3, 5), (40, 130, 5), (9, 200, 1)])
def test_nearest_is_exact(n, pool, k):
    generator = np.random.default_rng(n)
    queries, rows = (
        generator.normal(size=(n, 13)),
        generator.normal(size=(pool, 13)) * generator.lognormal(size=(pool, 1)),
    )
    found = nearest(queries, rows, k)
    assert found.tolist() == plain(queries, rows, k)
    assert found.shape == (n, min(k, pool))


def test_cosine_ignores_length_and_the_first_of_equals_wins(monkeypatch):
    pool = np.array([[0.0, 9.0], [2.0, 2.0], [1.0, 0.0], [50.0, 50.0], [-1.0, 0.0]])
    queries = np.array([[3.0, 3.0], [1.0, 0.1], [0.0, 0.01]])
    expected = [[1, 3, 0, 2, 4], [2, 1, 3, 0, 4], [0, 1, 3, 2, 4]]
    assert nearest(queries, pool, 5).tolist() == expected
    monkeypatch.setattr(neighbours, "AT_ONCE", 5)  # a query at a time
    assert nearest(queries, pool, 5).tolist() == expected


def test_of_many_equals_the_first_ones_win():
    near = np.random.default_rng(0).random(500) < 0.5
    pool = np.where(near[:, None], [[4.0, 2.0]], [[1.0, 2.0]])
    assert nearest(np.array([[2.0, 1.0]]), pool, 40).tolist() == [np.flatnonzero(near)[:40].tolist()]


@pytest.mark.parametrize("size", [7, 33, 130])
def test_of_identical_rows_among_others_the_first_ones_win(size):
    generator = np.random.default_rng(96 + size)
    row, pool = generator.normal(size=96), generator.normal(size=(size, 96))
    same = [i for i in range(size) if i % 3]
    pool[same] = row
    for n in range(1, 9):  # how a matrix product rounds which rows depends on its sizes
        found = nearest(np.stack([row, *generator.normal(size=(n - 1, 96))]), pool, size).tolist()
        assert found[0][: len(same)] == same
        for places in found:
            assert [i for i in places if i % 3] == same
            assert sorted(places) == list(range(size))


@pytest.mark.parametrize("tokens_per_batch", [1, 20, 8192])
def test_embeddings_as_when_alone(tokens_per_batch):
    tokenizer = Tokenizer.open("mistral-v1")
    config = ModelConfig(
        dim=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=tokenizer.vocab_size,
        sliding_window=5,
    )  # fmt: skip
    model = Transformer(config)
    model.initialise(0)
    texts = ["Which is red?", "What?", "A 67-year-old man with transitional cell carcinoma of the bladder comes in."]
    found = embeddings(model, tokenizer, texts, tokens_per_batch=tokens_per_batch)
    for text, row in zip(texts, found, strict=True):
        batch = Batch.from_documents([[1, *tokenizer.encode(text)]])
        hidden = model(batch.tokens, batch.layout).hidden.detach()
        assert row == pytest.approx(hidden[1:].mean(0).numpy(), rel=1e-5, abs=1e-6)
    assert torch.is_grad_enabled()
