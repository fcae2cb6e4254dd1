"""Adapters against PEFT's, in memory and in files, and what they leave alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from tokenmill.data.batch import Batch
from tokenmill.kernels.moe import Backend, megablocks
from tokenmill.trainer.model import Transformer, lora
from tokenmill.trainer.model.config import AdapterConfig
from tokenmill.trainer.model.moe import MoELayer
from tokenmill.trainer.model.peft import load_peft, names, save_peft
from tokenmill.trainer.model.weights import base_weights, load_hf, load_weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers

SIZES: dict[str, Any] = dict(
    vocab_size=97, num_hidden_layers=2, hidden_size=48, intermediate_size=80, num_attention_heads=6
)
DOCUMENT = torch.randint(0, 97, (41,), generator=torch.Generator().manual_seed(0)).tolist()
ALL = ("attention", "feed_forward")


def make(kind, folder: Path):
    """A model of transformers', in memory and in `folder`."""
    torch.manual_seed(0)
    if kind == "mistral":
        config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=7, initializer_range=0.2)
        model = MistralForCausalLM(config)
    else:
        sizes: dict[str, Any] = SIZES | dict(num_local_experts=4, initializer_range=0.2)
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2))
    model.save_pretrained(folder)
    return model.eval()


def adapted(folder: Path, config: AdapterConfig, seed=0, moe="auto") -> Transformer:
    """Our model with adapters that do something."""
    model, _ = load_hf(folder, torch.float32, moe=moe)
    lora.attach(model, config)
    lora.initialise(model, seed)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                parameter.normal_(std=0.05, generator=draw)
            elif name.endswith(".magnitude"):
                parameter.mul_(torch.empty(parameter.shape).uniform_(0.8, 1.2, generator=draw))
    return model


def factors(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def ours_of(model: Transformer):
    """Logits and the gradients of all factors."""
    batch = Batch.from_documents([DOCUMENT])
    hidden = model(batch.tokens, batch.layout).hidden
    weights = batch.weights / batch.weights.sum()
    output = model.head.loss(hidden, batch.targets, token_weights=weights, rows=batch.target_rows)
    output.loss.backward()
    return model.logits(batch).detach()


def close(a, b, bound=1e-5):
    return (a - b).norm() <= bound * b.norm()


CONFIGS = {
    "lora": AdapterConfig(rank=4, alpha=8, targets=ALL),
    "some": AdapterConfig(rank=3, alpha=8, targets=("q", "v", "blocks.1.feed_forward.up")),
    "stabilised": AdapterConfig(rank=5, alpha=8, targets=ALL, rank_stabilised=True),
    "dora": AdapterConfig(kind="dora", rank=4, alpha=8, targets=("k", "out", "feed_forward")),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_reads_ours_and_computes_the_same(name, tmp_path):
    theirs = make("mistral", tmp_path / "hf")
    model = adapted(tmp_path / "hf", CONFIGS[name])
    save_peft(factors(model), model.config, CONFIGS[name], tmp_path / "peft", "hf")
    peft = PeftModel.from_pretrained(theirs, tmp_path / "peft", is_trainable=True)  # a key too many is a warning
    ids = torch.tensor([DOCUMENT])
    expected = peft(ids, labels=ids)
    expected.loss.backward()
    torch.testing.assert_close(ours_of(model), expected.logits[0].detach(), rtol=0, atol=1e-5)
    gradients = {n.replace(".default", ""): p.grad for n, p in peft.named_parameters() if p.requires_grad}
    where = names(model.config, CONFIGS[name])
    # In memory PEFT's magnitude is a module's weight, in its files the vector itself.
    assert {n.replace("magnitude_vector.weight", "magnitude_vector") for n in gradients} == where.keys()
    mine = factors(model)
    assert {ours for ours, _ in where.values()} == mine.keys()
    for theirs_name, gradient in gradients.items():
        ours, _ = where[theirs_name.replace("magnitude_vector.weight", "magnitude_vector")]
        assert close(mine[ours].grad, gradient), ours


@pytest.mark.parametrize("name", CONFIGS)
def test_ours_reads_peft(name, tmp_path):
    theirs, config = make("mistral", tmp_path / "hf"), CONFIGS[name]
    targets = {"some": r".*(q_proj|v_proj|layers\.1\.mlp\.up_proj)", "dora": r".*(k_proj|o_proj|mlp\..*_proj)"}
    peft = get_peft_model(
        theirs,
        LoraConfig(
            task_type="CAUSAL_LM", r=config.rank, lora_alpha=int(config.alpha), use_rslora=config.rank_stabilised,
            use_dora=config.kind == "dora", target_modules=targets.get(name, "all-linear"), init_lora_weights=False,
        ),
    )  # fmt: skip
    peft.save_pretrained(tmp_path / "peft")
    model, _ = load_hf(tmp_path / "hf", torch.float32)
    lora.attach(model, config)
    load_peft(model, tmp_path / "peft")
    expected = peft(torch.tensor([DOCUMENT])).logits[0].detach()
    torch.testing.assert_close(ours_of(model), expected, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # PEFT's own, and not ignored
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("stabilised", [False, True])
def test_peft_reads_our_experts_and_router(stabilised, tmp_path):
    """It joins the gate's and up's factors of each expert, and computes the same."""
    theirs = make("mixtral", tmp_path / "hf")
    config = AdapterConfig(rank=4, alpha=8, targets=ALL, rank_stabilised=stabilised)
    model = adapted(tmp_path / "hf", config)
    save_peft(factors(model), model.config, config, tmp_path / "peft", "hf")
    peft = PeftModel.from_pretrained(theirs, tmp_path / "peft")
    expected = peft(torch.tensor([DOCUMENT])).logits[0].detach()
    torch.testing.assert_close(ours_of(model), expected, rtol=0, atol=2e-5)

    again, _ = load_hf(tmp_path / "hf", torch.float32)
    lora.attach(again, config)
    load_peft(again, tmp_path / "peft")
    for name, factor in factors(again).items():
        assert torch.equal(factor, factors(model)[name]), name


def test_ours_reads_pefts_experts(tmp_path):
    theirs = make("mixtral", tmp_path / "hf")
    peft = get_peft_model(
        theirs,
        LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False,
            target_parameters=["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
        ),
    )  # fmt: skip
    peft.save_pretrained(tmp_path / "peft")
    model, _ = load_hf(tmp_path / "hf", torch.float32)
    lora.attach(model, AdapterConfig(rank=4, alpha=8, targets=("q", "feed_forward")))
    load_peft(model, tmp_path / "peft")
    expected = peft(torch.tensor([DOCUMENT])).logits[0].detach()
    torch.testing.assert_close(ours_of(model), expected, rtol=0, atol=2e-5)


def whole(kind, folder, config):
    """A model without adapters, with those of `adapted` merged into it."""
    model, _ = load_hf(folder, torch.float32)
    targets = lora.merging(base_weights(model), model.config, config, factors(adapted(folder, config)))
    load_weights(model, folder, targets)
    return model


KINDS = {
    "mistral": AdapterConfig(rank=8, targets=ALL),
    "mixtral": AdapterConfig(rank=8, targets=("v", "router", "experts.up", "experts.down")),
    "mistral-dora": AdapterConfig(kind="dora", rank=8, targets=("q", "v", "feed_forward")),
    "mixtral-dora": AdapterConfig(kind="dora", rank=8, targets=("attention", "experts")),
}


@pytest.mark.parametrize("name", KINDS)
def test_new_adapters_change_nothing_and_merged_ones_are_the_same(name, tmp_path):
    kind, config, batch = name.split("-")[0], KINDS[name], Batch.from_documents([DOCUMENT, DOCUMENT[:1]])
    make(kind, tmp_path)
    base, _ = load_hf(tmp_path, torch.float32)
    plain = base.logits(batch)
    lora.attach(base, config)
    lora.initialise(base, 0)
    assert torch.equal(base.logits(batch), plain)

    model = adapted(tmp_path, config)
    logits = model.logits(batch)
    assert not torch.allclose(logits, plain, atol=1e-2)
    torch.testing.assert_close(whole(kind, tmp_path, config).logits(batch), logits, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter
@pytest.mark.parametrize("name", ["mixtral", "mixtral-dora"])
def test_backends_of_adapted_experts_agree(name, tmp_path):
    make("mixtral", tmp_path)
    results = []
    for backend in ("reference", "grouped_mm", "triton"):
        model = adapted(tmp_path, KINDS[name], moe=backend)
        logits = ours_of(model)
        results.append([logits, *(p.grad for p in factors(model).values())])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert close(a, b, 2e-6)


def test_a_backend_without_a_product_alone_is_named(tmp_path):
    make("mixtral", tmp_path)
    model, _ = load_hf(tmp_path, torch.float32)
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.backend = Backend("megablocks", megablocks.experts)  # what `choose` makes of it where it is there
    with pytest.raises(ValueError, match='moe = "megablocks" has no product .* choose "triton", "grouped_mm"'):
        lora.attach(model, KINDS["mixtral"])
    lora.attach(model, AdapterConfig(targets=("attention", "router")))


@pytest.mark.parametrize("name", KINDS)
def test_only_adapters_have_gradients(name, tmp_path):
    """No product in the backward pass makes a gradient of a frozen weight."""
    make(name.split("-")[0], tmp_path)
    model = adapted(tmp_path, KINDS[name])
    frozen = {tuple(p.shape) for p in model.parameters() if not p.requires_grad and p.dim() > 1}
    frozen |= {shape[1:] for shape in frozen if len(shape) == 3}
    made = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            made.append((str(function), result := function(*arguments, **(keywords or {}))))
            return result

    batch = Batch.from_documents([DOCUMENT])
    hidden = model(batch.tokens, batch.layout).hidden
    output = model.head.loss(hidden, batch.targets, token_weights=batch.weights, rows=batch.target_rows)
    with Record():
        output.loss.backward()
    shapes = {tuple(r.shape) for f, r in made if "mm" in f and isinstance(r, torch.Tensor)}
    assert not shapes & frozen, shapes & frozen
    assert all((p.grad is None) != p.requires_grad for p in model.parameters())


def test_targets(tmp_path):
    make("mixtral", tmp_path / "mixtral")
    make("mistral", tmp_path / "mistral")
    _, mixtral = load_hf(tmp_path / "mixtral")
    _, mistral = load_hf(tmp_path / "mistral")
    short = {n.split(".", 2)[2] for n in lora.select(mixtral, ALL)}
    attention = {f"attention.{n}" for n in ("q", "k", "v", "out")}
    experts = {f"feed_forward.experts.{n}" for n in ("gate", "up", "down")}
    assert short == attention | experts | {"feed_forward.router"}
    assert {*lora.select(mixtral, ("experts.*", "blocks.1.attention.q"))} == {
        *(f"blocks.{i}.{name}" for i in (0, 1) for name in experts),
        "blocks.1.attention.q",
    }
    assert len(lora.select(mistral, ("gate", "blocks.0"))) == 1 + 7
    for unknown in ("router", "q_proj", "head", "blocks.2"):
        with pytest.raises(ValueError, match=f"'{unknown}' names no .* attention.q, attention.k, .* feed_forward.down"):
            lora.select(mistral, (unknown,))


def test_wrong_peft_folders_are_named(tmp_path):
    make("mistral", tmp_path / "hf")
    config = AdapterConfig(rank=4, targets=("q",))
    model = adapted(tmp_path / "hf", config)
    save_peft(factors(model), model.config, config, tmp_path / "peft", None)
    load_peft(model, tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    good = json.loads(path.read_text())
    for key, value in (("r", 8), ("lora_alpha", 1), ("use_rslora", True), ("use_dora", True), ("peft_type", "IA3")):
        path.write_text(json.dumps(good | {key: value}))
        with pytest.raises(ValueError, match=f"adapter_config.json: .*{key if key != 'use_rslora' else 'lora_alpha'}"):
            load_peft(model, tmp_path / "peft")
    for start in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"):
        path.write_text(json.dumps(good | {"init_lora_weights": start}))
        with pytest.raises(
            ValueError, match=f"adapter_config.json: init_lora_weights is '{start}': .* a base that was"
        ):
            load_peft(model, tmp_path / "peft")
    for start in (False, "gaussian"):
        path.write_text(json.dumps(good | {"init_lora_weights": start}))
        load_peft(model, tmp_path / "peft")
    path.write_text(json.dumps(good))
    other = load_hf(tmp_path / "hf")[0]
    lora.attach(other, AdapterConfig(rank=4, targets=("q", "v")))
    with pytest.raises(ValueError, match=r"tensors are not those .*v_proj.* is missing"):
        load_peft(other, tmp_path / "peft")
    (tmp_path / "peft" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a folder that PEFT wrote"):
        load_peft(model, tmp_path / "peft")
