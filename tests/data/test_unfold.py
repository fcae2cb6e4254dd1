"""Pairs behind one copy of their prompt, against each answer run alone as a whole document."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenmill.data.batch import Batch
from tokenmill.data.unfold import unfold
from tokenmill.trainer.model import ModelConfig, Transformer
from tokenmill.trainer.model.config import MoEConfig

Pair = tuple[list[int], list[int], list[int]]


def pairs_of(*lengths: tuple[int, int, int], vocabulary: int = 61) -> list[Pair]:
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(count)]

    return [(ids(prompt), ids(chosen), ids(rejected)) for prompt, chosen, rejected in lengths]


def folded(pairs: list[Pair], ids: list[int] | None = None) -> Batch:
    documents = [[*p, *c, p[-1], *r] for p, c, r in pairs]
    masks = [[0.0] * len(p) + [1.0] * len(c) + [0.0] + [1.0] * len(r) for p, c, r in pairs]
    return Batch.from_documents(documents, masks, document_ids=ids)


def alone(pairs: list[Pair]) -> list[Batch]:
    """Chosen and rejected of each pair, a whole document each."""
    return [Batch.from_documents([p + a], [[0.0] * len(p) + [1.0] * len(a)]) for p, c, r in pairs for a in (c, r)]


def make_model(dtype: torch.dtype, window: int | None, experts: int | None = None, attention: str = "auto"):
    moe = MoEConfig(experts) if experts else None
    model = Transformer(ModelConfig(32, 2, 4, 2, 8, 48, 61, sliding_window=window, moe=moe), attention=attention)
    model.initialise(0)
    return model.to(dtype)


def test_the_layout():
    pair = ([5, 6, 7], [8, 9], [10])
    batch = unfold(folded([pair, ([1], [2], [3, 4])], [7, 9]))
    assert batch.tokens.tolist() == [5, 6, 7, 8, 7, 1, 1, 3]
    assert batch.targets.tolist() == [-100, -100, 8, 9, 10, 2, 3, 4]
    assert batch.target_rows.tolist() == [2, 3, 4, 5, 6, 7]
    layout = batch.layout
    assert layout.positions.tolist() == [0, 1, 2, 3, 2, 0, 0, 1]
    assert layout.cu_seqlens.tolist() == [0, 2, 4, 5, 5, 6, 8]  # the second prompt has but its last token
    assert layout.document_ids.tolist() == [7, 7, 7, 9, 9, 9]
    assert layout.document_lengths.tolist() == [5, 5, 4, 3, 2, 3]
    assert layout.keys is not None
    assert layout.keys.gather.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7]
    assert layout.keys.cu_seqlens.tolist() == [0, 2, 6, 9, 9, 10, 12]
    for tensor in (layout.positions, layout.cu_seqlens, layout.document_lengths, layout.keys.cu_seqlens):
        assert tensor.dtype == torch.int32


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


MANY = [(17, 5, 9), (1, 1, 1), (40, 1, 33), (2, 30, 1), (65, 20, 21)]


@pytest.mark.parametrize("lengths", [MANY, [(1, 3, 2)], [(129, 17, 17)]], ids=["many", "no prompt", "one"])
@pytest.mark.parametrize("window", [None, 7, 1])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("attention", ["sdpa", "reference"])
def test_equals_each_answer_alone(lengths, window, dtype, bound, attention):
    pairs = pairs_of(*lengths)
    model = make_model(dtype, window, attention=attention)
    parameters = list(model.parameters())

    def run(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        hidden, _ = model(batch.tokens, batch.layout)
        logprobs = model.head.logprobs(hidden, batch.targets, rows=batch.target_rows)
        rows = batch.target_rows.long()
        return model.head.logits(hidden)[rows], logprobs[rows], hidden

    logits, logprobs, _ = run(unfold(folded(pairs)))
    parts = [run(batch) for batch in alone(pairs)]
    assert relative(logits, torch.cat([part[0] for part in parts])) <= bound
    expected = torch.cat([part[1] for part in parts])
    assert relative(logprobs, expected) <= bound
    upstream = torch.randn(len(expected), dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((logprobs * upstream).sum(), parameters)
    of_parts = torch.autograd.grad((expected * upstream).sum(), parameters)
    for parameter, a, b in zip(model.named_parameters(), gradients, of_parts, strict=True):
        # Where there is but one key, its score has no gradient, and both are rounding.
        assert relative(a, b) <= bound or b.norm() <= bound * 1e-3, parameter[0]


def test_equals_each_answer_alone_with_experts():
    pairs = pairs_of(*MANY)
    model = make_model(torch.float64, 7, experts=4)
    hidden, _ = model(*(lambda b: (b.tokens, b.layout))(batch := unfold(folded(pairs))))
    expected = torch.cat([model(b.tokens, b.layout).hidden[b.target_rows.long()] for b in alone(pairs)])
    assert relative(hidden[batch.target_rows.long()], expected) <= 1e-10


def test_a_ghost_stays_one():
    batch = unfold(Batch.ghost())
    assert batch.layout.cu_seqlens.tolist() == [0, 16, 16, 16]
    assert (batch.layout.document_ids == -1).all()
    assert not batch.weights.any()
    model = make_model(torch.float32, None)
    assert torch.isfinite(model(batch.tokens, batch.layout).hidden).all()


@pytest.mark.parametrize(
    "masks",
    [
        [0, 0, 0, 1, 1, 1, 1, 1, 1],  # one answer
        [0, 0, 0, 1, 0, 1, 0, 1, 1],  # three
        [0, 0, 0, 1, 1, 0, 0, 1, 1],  # two tokens between
        [0, 0, 0, 1, 1, 0, 1, 1, 0],  # something after
        [0, 0, 0, 1, 0, 1, 1, 1, 1],  # another token than the prompt's last
    ],
)
def test_other_documents_are_refused(masks):
    good = folded([([1, 2, 3], [4, 5], [6, 7, 8])])
    document = good.tokens.tolist()
    unfold(Batch.from_documents([document], [[0, 0, 0, 1, 1, 0, 1, 1, 1]]))
    two = Batch.from_documents([document, document], [[0, 0, 0, 1, 1, 0, 1, 1, 1], masks], document_ids=[3, 4])
    with pytest.raises(ValueError, match="document 4 of the batch is not a preference pair"):
        unfold(two)


def test_random_packs_against_a_loop():
    draw = np.random.default_rng(0)
    for _ in range(20):
        pairs = pairs_of(*(tuple(draw.integers(1, 9, 3).tolist()) for _ in range(int(draw.integers(1, 7)))))
        batch = unfold(folded(pairs))
        keys = batch.layout.keys
        assert keys is not None
        for n, (prompt, answer) in enumerate((p, a) for p, *answers in pairs for a in ([], *answers)):
            begin, end = batch.layout.cu_seqlens[n : n + 2].tolist()
            expected = (prompt + answer[:-1]) if n % 3 else prompt[:-1]
            seen = keys.gather[keys.cu_seqlens[n] : keys.cu_seqlens[n + 1]]
            assert batch.tokens[seen].tolist() == expected
            assert batch.layout.positions[seen].tolist() == list(range(len(expected)))
            assert batch.targets[begin:end].tolist() == (answer if n % 3 else [-100] * (len(prompt) - 1))
