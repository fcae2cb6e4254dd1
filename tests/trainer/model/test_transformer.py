"""What the flat token axis promises: documents do not see each other, and how they are cut changes nothing."""

import random
from typing import Any

import pytest
import torch

from tokenmill.data.batch import Batch
from tokenmill.kernels.embedding import Noise
from tokenmill.trainer.config import LossSection
from tokenmill.trainer.model import ModelConfig, MoEConfig, Transformer
from tokenmill.trainer.objectives.pretrain import StepContext, pretrain

BASE: dict[str, Any] = dict(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=89)
CONFIGS = {
    "dense": ModelConfig(**BASE, sliding_window=7),
    "experts": ModelConfig(**BASE, sliding_window=5, moe=MoEConfig(4, 2)),
    "no window": ModelConfig(**BASE, moe=MoEConfig(3, 1)),
}
LENGTHS = [1, 2, 23, 5, 40, 1, 17, 8]


def build(name, dtype=torch.float32):
    model = Transformer(CONFIGS[name], dtype=dtype)
    model.initialise(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # away from the small weights at which everything is nearly linear
    return model


def texts(lengths, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(89) for _ in range(n)] for n in lengths]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_are_as_when_alone(name):
    model, documents = build(name), texts(LENGTHS)
    packed = model.logits(Batch.from_documents(documents)).split(LENGTHS)
    for document, logits in zip(documents, packed, strict=True):
        assert relative(logits, model.logits(Batch.from_documents([document]))) <= 2e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_no_gradient_crosses_a_document(name):
    model, documents = build(name), texts(LENGTHS)
    batch = Batch.from_documents(documents)
    rows = []
    model.embed.register_forward_hook(lambda module, inputs, output: rows.append(output) or output.retain_grad())
    logits = model.logits(batch)
    for i in range(len(documents)):
        start, end = batch.layout.cu_seqlens[i : i + 2].tolist()
        (gradient,) = torch.autograd.grad(logits[start:end].square().sum(), rows[0], retain_graph=True)
        assert gradient[start:end].abs().sum() > 0
        assert torch.count_nonzero(gradient[:start]) == 0
        assert torch.count_nonzero(gradient[end:]) == 0


CUTS = [
    [[0, 1, 2, 3, 4, 5, 6, 7]],
    [[7, 2, 5, 0], [6, 1, 3, 4]],
    [[0], [1], [2], [3], [4], [5], [6], [7]],
    [[4, 2], [7, 6, 5, 3, 1, 0], []],
]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-10)])
def test_any_cut_gives_the_same_step(name, dtype, bound):
    documents = texts(LENGTHS)
    masks = [[random.Random(i).choice([0.0, 1.0, 0.5]) for _ in d] for i, d in enumerate(documents)]
    weight = sum(sum(mask[1:]) for mask in masks)
    config = CONFIGS[name]
    fractions = None
    if config.moe:
        fractions = torch.rand(config.n_layers, config.moe.n_experts, dtype=dtype)
        fractions /= fractions.sum(1, keepdim=True)
    loss_section = LossSection(balance=0.3, router_z=0.1, z=0.01, neftune_alpha=5.0)
    context = StepContext(7, weight, sum(LENGTHS), fractions, loss_section)
    results = []
    for cut in CUTS:
        for pad in (False, True):
            model = build(name, dtype)
            totals = []
            for part in cut:
                batch = Batch.ghost()
                if part:
                    batch = Batch.from_documents([documents[i] for i in part], [masks[i] for i in part], part)
                if pad:
                    batch = batch.padded(tokens=128, documents=9)
                loss = pretrain(model, batch, context, noise=Noise(alpha=5.0, seed=1, step=7))
                loss.total.backward()
                totals.append(torch.stack([loss.total.detach(), loss.language, loss.balance]))
            results.append(({n: p.grad for n, p in model.named_parameters()}, torch.stack(totals).sum(0)))
    gradients, totals = results[0]
    for other, other_totals in results[1:]:
        torch.testing.assert_close(other_totals, totals, rtol=5 * bound, atol=0)
        for parameter, gradient in gradients.items():
            assert relative(other[parameter], gradient) <= bound, parameter


def test_evaluation_and_alpha_zero_leave_no_trace():
    model = build("experts")
    batch = Batch.from_documents(texts(LENGTHS))
    plain = model(batch.tokens, batch.layout).hidden
    assert torch.equal(model(batch.tokens, batch.layout, noise=Noise(alpha=0.0, seed=1, step=2)).hidden, plain)
    noisy = model(batch.tokens, batch.layout, noise=Noise(alpha=5.0, seed=1, step=2)).hidden
    assert not torch.equal(noisy, plain)


def test_parameter_counts_of_the_published_models():
    mistral = ModelConfig(4096, 32, 32, 8, 128, 14336, 32000, sliding_window=4096)
    mixtral = ModelConfig(4096, 32, 32, 8, 128, 14336, 32000, rope_theta=1e6, moe=MoEConfig(8, 2))
    assert mistral.parameters() == mistral.parameters(active=True) == 7_241_732_096
    assert mixtral.parameters() == 46_702_792_704
    assert mixtral.parameters(active=True) == 12_879_925_248
    for config in CONFIGS.values():
        assert config.parameters() == sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("change", [{"n_kv_heads": 3}, {"head_dim": 7}, {"sliding_window": 0}, {"dim": 0}])
def test_impossible_shapes_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ModelConfig(**(BASE | change))


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputation_changes_nothing_but_memory(name, mode):
    """Bitwise the same loss and gradients, balancing included, from fewer saved bytes; routes are not chosen anew."""
    batch = Batch.from_documents(texts(LENGTHS * 4))
    config = CONFIGS[name]
    fractions = torch.rand(config.n_layers, config.moe.n_experts) if config.moe else None
    context = StepContext(0, float(batch.weights.sum()), batch.tokens.numel(), fractions, LossSection(balance=0.3))
    results, saved = [], []
    for recompute in ("none", mode):
        model = build(name)
        model.set_recompute(recompute)
        kept: dict[int, int] = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = pretrain(model, batch, context)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved.append(sum(size for pointer, size in kept.items() if pointer not in parameters))
        loss.total.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    assert torch.equal(results[0][0].total, results[1][0].total)
    if config.moe:
        assert torch.equal(results[0][0].expert_counts, results[1][0].expert_counts)
    for parameter, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][parameter]), parameter
    assert saved[1] < 0.8 * saved[0]
