"""A dense model with its networks copied into experts: the same function, and one that trains on."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tokenmill.data.batch import Batch
from tokenmill.trainer.checkpoint import load_model
from tokenmill.trainer.cli import main
from tokenmill.trainer.config import LossSection
from tokenmill.trainer.model import ModelConfig, Transformer
from tokenmill.trainer.model.upcycle import upcycle
from tokenmill.trainer.model.weights import save_hf
from tokenmill.trainer.objectives.pretrain import StepContext, pretrain

CONFIG = ModelConfig(32, 2, 4, 2, 8, 48, 64, sliding_window=9)


def dense(dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(CONFIG, dtype=dtype)
    model.initialise(3)
    return model


def batch() -> Batch:
    return Batch.from_documents([torch.randint(64, (n,)).tolist() for n in (1, 17, 40)])


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 2), (6, 6)])
def test_it_begins_as_the_dense_function(experts, top_k):
    some = batch()
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        expected = dense(dtype).logits(some)
        sparse = upcycle(dense(dtype), experts, top_k)
        assert (sparse.logits(some) - expected).norm() <= bound * expected.norm()
        assert sum(p.numel() for p in sparse.parameters()) == sparse.config.parameters()
        router: torch.Tensor = sparse.blocks[0].feed_forward.router.weight.data  # type: ignore[union-attr, assignment]
        assert float(router.std()) == pytest.approx(0.02, rel=0.3)


def test_noise_is_relative_and_a_function_of_the_seed():
    source = dense()
    before: torch.Tensor = source.blocks[1].feed_forward.gate_up.weight.data  # type: ignore[union-attr, assignment]
    before[48:] *= 10
    one, other = (upcycle(model, 4, noise=0.5, seed=7) for model in (source, dense()))
    noise = one.blocks[1].feed_forward.w_gate_up.data - before  # type: ignore[union-attr]
    for expert in noise:
        for part, scale in zip(expert.chunk(2), (1, 10), strict=True):
            assert float(part.std()) == pytest.approx(0.5 * 0.02 * scale, rel=0.1)
    assert noise.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.1  # each copy its own
    same = upcycle(dense(), 4, noise=0.5, seed=7)
    for (name, a), b in zip(other.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_it_trains_on():
    model, some = upcycle(dense(), 4), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(8):
        context = StepContext(0, float(some.weights.sum()), some.tokens.numel(), None, LossSection())
        loss = pretrain(model, some, context)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.language))
    assert losses[-1] < losses[0] - 0.05
    first, second = model.blocks[0].feed_forward.w_down[:2]  # type: ignore[union-attr]
    assert not torch.equal(first, second)


def test_the_command_writes_a_mixtral(tmp_path, capsys):
    some = batch()
    save_hf(dense(), tmp_path / "hf")
    expected = dense().logits(some)
    assert main(["import", f"{tmp_path}/hf", f"{tmp_path}/dense"]) == 0
    for source in ("hf", "dense"):
        output = f"{tmp_path}/from_{source}"
        assert main(["import", f"{tmp_path}/{source}", output, "--upcycle=4", "--top-k=3"]) == 0
        sparse = load_model(output)
        assert sparse.config.moe is not None
        assert (sparse.config.moe.n_experts, sparse.config.moe.top_k) == (4, 3)
        assert (sparse.logits(some) - expected).norm() <= 1e-6 * expected.norm()
    assert main(["export", f"{tmp_path}/from_hf", f"{tmp_path}/mixtral"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral")
    ids = some.tokens[1:18].long()  # the second document
    assert (theirs(ids[None]).logits[0] - expected[1:18]).norm() <= 1e-5 * expected[1:18].norm()

    capsys.readouterr()
    assert main(["import", f"{tmp_path}/from_hf", f"{tmp_path}/x", "--upcycle=4"]) == 1
    assert "begins from a dense model, this one has 4 experts" in capsys.readouterr().err
    assert main(["import", f"{tmp_path}/hf", f"{tmp_path}/x", "--upcycle=4", "--noise=-1"]) == 1
    assert "noise is -1.0, expected" in capsys.readouterr().err
