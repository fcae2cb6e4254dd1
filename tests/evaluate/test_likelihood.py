"""Continuations behind a prefix computed once, against each scored alone, in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tokenmill.data.batch import Batch
from tokenmill.trainer.distributed import World
from tokenmill.trainer.evaluate.likelihood import batches, continuation_logprobs, likelihoods, shared_prefixes
from tokenmill.trainer.model import ModelConfig, MoEConfig, Transformer

PREFIXES = [[1], [1, 5, 9, 40, 3, 3, 7, 21, 8, 30, 11, 2], [1, 44], list(range(1, 24))]
CONTINUATIONS = [
    [[7], [8, 9]],
    [[4, 2], [4], list(range(20, 33)), [4, 2]],
    [[5, 6, 7]],
    [[9, 1], [33]],
]


def tiny(attention: str, moe: bool = True) -> Transformer:
    config = ModelConfig(
        dim=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=24, vocab_size=48,
        sliding_window=7, moe=MoEConfig(4, 2) if moe else None,
    )  # fmt: skip
    model = Transformer(config, attention=attention)
    model.initialise(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from the small weights at which all tokens are nearly equal
    return model


def alone(model: Transformer, prefix: list[int], continuation: list[int]) -> float:
    """The log-probability of a continuation in a document of its own with the prefix."""
    logits = model.logits(Batch.from_documents([prefix + continuation])).detach()
    rows = logits[len(prefix) - 1 : -1].log_softmax(-1)
    return rows.gather(1, torch.tensor(continuation)[:, None]).sum().item()


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("tokens_per_batch", [1, 30, 8192])
def test_each_continuation_as_when_alone(attention, moe, tokens_per_batch):
    """The prefix is longer and shorter than the window, and a single token; results are in the order given."""
    model = tiny(attention, moe)
    rows = []
    model.register_forward_hook(lambda _, arguments, __: rows.append(len(arguments[0])))
    found = continuation_logprobs(model, PREFIXES, CONTINUATIONS, tokens_per_batch=tokens_per_batch)
    sizes = [len(p) - 1 + sum(map(len, c)) for p, c in zip(PREFIXES, CONTINUATIONS, strict=True)]
    assert sum(rows) == sum(sizes), "a prefix was computed more than once"
    assert max(rows) <= max(tokens_per_batch, *sizes)
    assert rows[0] == {1: max(sizes), 8192: sum(sizes)}.get(tokens_per_batch, rows[0]), "the longest comes first"
    exact = tiny("reference", moe).double()
    for prefix, options, logprobs in zip(PREFIXES, CONTINUATIONS, found, strict=True):
        assert logprobs == pytest.approx([alone(exact, prefix, option) for option in options], rel=2e-5)
    assert found[1][0] == found[1][3]


def test_the_prefix_is_shared():
    """The layout itself: an option sees the prefix's keys, then its own, and no other option's."""
    batch = shared_prefixes([[1, 2, 3], [4]], [[[5, 6], [7]], [[8, 9]]])
    layout, keys = batch.layout, batch.layout.keys
    assert keys is not None
    assert batch.tokens.tolist() == [1, 2, 3, 5, 3, 4, 8]
    assert batch.targets.tolist() == [-100, -100, 5, 6, 7, 8, 9]
    assert batch.target_rows.tolist() == [2, 3, 4, 5, 6]
    assert layout.positions.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert layout.cu_seqlens.tolist() == [0, 2, 4, 5, 5, 7]
    assert [part.tolist() for part in keys.gather.split(keys.cu_seqlens.diff().tolist())] == [
        [0, 1], [0, 1, 2, 3], [0, 1, 4], [], [5, 6],
    ]  # fmt: skip


def test_nothing_to_score():
    model = tiny("sdpa")
    assert continuation_logprobs(model, [], []) == []
    assert continuation_logprobs(model, [[1, 2]], [[]]) == [[]]
    for prefixes, options in (([[]], [[[1]]]), ([[1]], [[[1], []]])):
        with pytest.raises(ValueError, match="prefix 0 or one of its continuations is empty"):
            continuation_logprobs(model, prefixes, options)


def test_at_most_the_models_positions():
    model = tiny("sdpa")
    model.config = replace(model.config, max_positions=6)
    assert len(continuation_logprobs(model, [[1, 2, 3], [1]], [[[4, 5, 6, 7]], [[2] * 6]])) == 2
    with pytest.raises(ValueError, match="prefix 1 has 3 tokens, which with a continuation of 5 exceeds the model's 6"):
        continuation_logprobs(model, [[1], [1, 2, 3]], [[[2]], [[1], [4, 5, 6, 7, 8]]])


def test_greedy_continuations():
    model = tiny("reference")
    prefix = [1, 5, 9]
    logits = model.logits(Batch.from_documents([prefix])).detach()
    first, second = logits[-1].topk(2).indices.tolist()
    then = int(model.logits(Batch.from_documents([[*prefix, first]])).detach()[-1].argmax())
    ((a, b, c, d),) = likelihoods(model, [prefix], [[[first], [second], [first, then], [second, then]]])
    assert [found.greedy for found in (a, b, c, d)] == [True, False, True, False]
    assert a.logprob > b.logprob


def test_ranks_share_the_batches():
    """Each computes every second batch, or a ghost; together they have all results."""
    model = tiny("sdpa")
    alone = continuation_logprobs(model, PREFIXES, CONTINUATIONS, tokens_per_batch=1)
    parts: list[torch.Tensor] = []

    class Half(World):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            parts.append(values.clone())
            return values

    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    for rank in range(3):
        continuation_logprobs(model, PREFIXES, CONTINUATIONS, tokens_per_batch=1, world=Half(rank, 3))
    assert len(passes) == 3 * 2  # four batches in two turns of three
    total = torch.stack(parts).sum(0)[0]
    assert total.tolist() == [logprob for row in alone for logprob in row]
    assert (torch.stack(parts)[:, 0] != 0).sum() == len(total)


def test_batches_hold_everything_once():
    sizes = np.random.default_rng(0).integers(1, 60, 200).tolist()
    groups = list(batches(sizes, 100))
    assert sorted(i for group in groups for i in group) == list(range(200))
    assert all(sum(sizes[i] for i in group) <= 100 for group in groups)
    flat = [sizes[i] for group in groups for i in group]
    assert flat == sorted(flat, reverse=True)
    assert list(batches([5, 500, 7], 10)) == [[1], [2], [0]]
    assert list(batches([], 10)) == []
    assert math.ceil(sum(sizes) / 100) <= len(groups)
