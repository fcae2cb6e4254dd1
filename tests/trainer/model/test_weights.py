"""Our model against transformers' on the same weights, and the way there and back."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from tokenmill.data.batch import Batch
from tokenmill.trainer.model.weights import layout_of, load_hf, read_hf_config, save_hf, view_of

SHAPES = {
    "mistral": dict(hidden_size=48, intermediate_size=80, num_attention_heads=6, num_key_value_heads=2, head_dim=16),
    "mistral-mha": dict(hidden_size=32, intermediate_size=33, num_attention_heads=2, num_key_value_heads=2),
    "mixtral": dict(
        hidden_size=32, intermediate_size=56, num_attention_heads=4, num_key_value_heads=2, num_local_experts=5
    ),
    "mixtral-window": dict(
        hidden_size=40, intermediate_size=24, num_attention_heads=5, num_key_value_heads=1, sliding_window=9
    ),
}


def make(name, folder, seed=0, **options):
    torch.manual_seed(seed)
    kinds = {"mistral": (MistralConfig, MistralForCausalLM), "mixtral": (MixtralConfig, MixtralForCausalLM)}
    config_class, model_class = kinds[name.split("-")[0]]
    shape = {"vocab_size": 97, "num_hidden_layers": 2, "rope_theta": 1e4, "rms_norm_eps": 1e-5, "sliding_window": 7}
    shape |= {"sliding_window": None} if name == "mixtral" else {}
    model = model_class(config_class(**(shape | SHAPES[name] | options), initializer_range=0.2))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model.eval()


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_gradients_equal_transformers(name, tmp_path):
    theirs = make(name, tmp_path / "hf")
    ours, config = load_hf(tmp_path / "hf", torch.float32)
    document = torch.randint(0, 97, (41,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = Batch.from_documents([document])

    ids = torch.tensor([document])
    expected = theirs(ids, labels=ids)
    torch.testing.assert_close(ours.logits(batch), expected.logits[0], rtol=0, atol=1e-5)

    expected.loss.backward()
    hidden = ours(batch.tokens, batch.layout).hidden
    weights = batch.weights / batch.weights.sum()
    output = ours.head.loss(hidden, batch.targets, token_weights=weights, rows=batch.target_rows)
    torch.testing.assert_close(output.loss, expected.loss.detach(), rtol=1e-6, atol=1e-6)
    output.loss.backward()

    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    fused = {n: p.grad for n, p in theirs.named_parameters() if "experts" in n}
    where = layout_of(config)
    for name, parameter in theirs.named_parameters():
        if name in fused:
            continue
        mine = view_of(gradients, where[name.replace("mlp.gate.weight", "block_sparse_moe.gate.weight")])
        assert (mine - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
    for name, gradient in fused.items():
        layer = name.split(".")[2]
        mine = gradients[f"blocks.{layer}.feed_forward.{'w_gate_up' if 'gate_up' in name else 'w_down'}"]
        assert (mine - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_then_export_is_bit_identical(name, dtype, tmp_path):
    original = make(name, tmp_path / "hf").to(dtype)
    original.save_pretrained(tmp_path / "cast", max_shard_size="20KB")
    model, config = load_hf(tmp_path / "cast", dtype)
    save_hf(model, tmp_path / "out")
    again = load_file(tmp_path / "out" / "model.safetensors")
    index = json.loads((tmp_path / "cast" / "model.safetensors.index.json").read_text())["weight_map"]
    assert again.keys() == index.keys()
    for tensor, file in index.items():
        with safe_open(tmp_path / "cast" / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(tensor), again[tensor]), tensor
    assert read_hf_config(tmp_path / "out") == config

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, a), b in zip(loaded.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.dtype == dtype


def test_export_in_several_shards(tmp_path, monkeypatch):
    make("mixtral", tmp_path / "hf")
    model, _ = load_hf(tmp_path / "hf")
    monkeypatch.setattr("tokenmill.trainer.model.weights.SHARD_BYTES", 30_000)
    save_hf(model, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    again, _ = load_hf(tmp_path / "out")
    for (name, a), b in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_wrong_folders_are_named(tmp_path):
    make("mixtral", tmp_path / "hf")
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))

    def refuse(match):
        with pytest.raises(ValueError, match=match):
            load_hf(tmp_path / "hf")

    with pytest.raises(ValueError, match="nowhere"):
        load_hf(tmp_path / "nowhere")
    whole = shards[1].read_bytes()
    shards[1].unlink()
    refuse(f"{shards[1].name} is missing")
    shards[1].write_bytes(whole[:-5])
    refuse(f"{shards[1].name}: not a whole safetensors file")
    tensors = load_file(shards[0])
    shards[1].write_bytes(whole)
    name = next(iter(tensors))
    save_file(tensors | {"extra.weight": torch.zeros(3)}, shards[0])
    refuse("'extra.weight' is not part")
    save_file({n: t for n, t in tensors.items() if n != name}, shards[0])
    refuse(f"1 tensors are missing, the first is '{name}'")
    save_file(tensors | {name: tensors[name][:-1].clone()}, shards[0])
    refuse(f"'{name}' has shape .*, expected")
    save_file(tensors, shards[0])

    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    for key, value in (
        ("model_type", "llama"),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", True),
        ("hidden_size", None),
    ):
        path.write_text(json.dumps(config | {key: value}))
        refuse(key)
    for key, value in (("hidden_size", "48"), ("sliding_window", 7.5), ("num_local_experts", "4"), ("rope_theta", {})):
        path.write_text(json.dumps(config | {key: value}))
        refuse(r"config.json: ")
    path.write_text("{")
    refuse("not valid JSON")
    path.write_text("[]")
    refuse("expected an object, found list")
    path.write_text(json.dumps(config | {"bos_token_id": None, "eos_token_id": [7, 8]}))
    assert read_hf_config(tmp_path / "hf").bos_id is None
    assert read_hf_config(tmp_path / "hf").eos_id == 7
    index = tmp_path / "hf" / "model.safetensors.index.json"
    for text in ("[]", '{"weight_map": []}', '{"weight_map": {"a": "../b"}}'):
        index.write_text(text)
        refuse("index.json: ")


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    make("mistral", tmp_path / "hf")
    model, _ = load_hf(tmp_path / "hf")

    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("tokenmill.trainer.model.weights.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        save_hf(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    save_hf(model, tmp_path / "out")  # an empty folder is as good as none
    with pytest.raises(FileExistsError, match="out already exists"):
        save_hf(model, tmp_path / "out")
