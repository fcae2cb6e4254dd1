"""Hugging Face folders to our model and back, tensor by tensor and bit by bit.

Each of our tensors is a stack, by rows, of one or more of theirs (`layout_of`): the query, key and value
projections are one matrix here, and so are gate and up, and all experts of a layer. Loading copies rows in, saving
copies rows out, and both check that no tensor was missed or invented.
"""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenmill.data.files import replace_folder
from tokenmill.trainer.model.config import ModelConfig, MoEConfig
from tokenmill.trainer.model.quantise import NF4Weight
from tokenmill.trainer.model.rows import local_rows
from tokenmill.trainer.model.transformer import Transformer

SHARD_BYTES = 5 * 2**30
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CHAT_FILES = ("chat_template.jinja", "generation_config.json")  # how it is talked to; no tokenizer by themselves


class Rows(NamedTuple):
    """One of their tensors inside one of ours: `count` rows from `start`, ours seen as a matrix."""

    ours: str
    start: int
    shape: tuple[int, ...]


class Filled(Protocol):
    """What takes a weight in the place of a tensor, in the dtype of its file."""

    shape: torch.Size

    def fill(self, start: int, weight: Tensor) -> None:
        """Take one of their tensors, which begins at the row `start` of ours."""
        ...


def layout_of(config: ModelConfig) -> dict[str, Rows]:
    """Where each tensor of a Hugging Face checkpoint lies in our parameters, by their names."""
    d, f, v = config.dim, config.hidden_dim, config.vocab_size
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    where: dict[str, Rows] = {}

    def stack(ours: str, *theirs: tuple[str, tuple[int, ...]]) -> None:
        start = 0
        for name, shape in theirs:
            where[name] = Rows(ours, start, shape)
            start += shape[0]

    stack("embed.weight", ("model.embed_tokens.weight", (v, d)))
    for i in range(config.n_layers):
        us, them = f"blocks.{i}.", f"model.layers.{i}."
        stack(us + "attention_norm.weight", (them + "input_layernorm.weight", (d,)))
        stack(us + "feed_forward_norm.weight", (them + "post_attention_layernorm.weight", (d,)))
        projections = [("q", q), ("k", kv), ("v", kv)]
        stack(
            us + "attention.qkv.weight", *((f"{them}self_attn.{n}_proj.weight", (rows, d)) for n, rows in projections)
        )
        stack(us + "attention.out.weight", (them + "self_attn.o_proj.weight", (d, q)))
        us += "feed_forward."
        if config.moe is None:
            gate_up = ("gate", "up")
            stack(us + "gate_up.weight", *((f"{them}mlp.{n}_proj.weight", (f, d)) for n in gate_up))
            stack(us + "down.weight", (them + "mlp.down_proj.weight", (d, f)))
        else:
            them += "block_sparse_moe."
            experts = range(config.moe.n_experts)
            stack(us + "router.weight", (them + "gate.weight", (config.moe.n_experts, d)))
            gate_up = [(f"{them}experts.{e}.{w}.weight", (f, d)) for e in experts for w in ("w1", "w3")]
            stack(us + "w_gate_up", *gate_up)
            stack(us + "w_down", *((f"{them}experts.{e}.w2.weight", (d, f)) for e in experts))
    stack("norm.weight", ("model.norm.weight", (d,)))
    stack("head.weight", ("lm_head.weight", (v, d)))
    return where


def view_of(parameters: Mapping[str, Tensor], rows: Rows) -> Tensor:
    """The part of our parameter that holds one of their tensors, as a view of their shape."""
    ours = parameters[rows.ours]
    if len(rows.shape) == 1:
        return ours
    return ours.view(-1, rows.shape[-1])[rows.start : rows.start + rows.shape[0]]


def base_weights(model: Transformer) -> dict[str, Tensor | NF4Weight]:
    """The model's own weights by their names, whatever holds them; without adapters."""
    found: dict[str, Tensor | NF4Weight] = {n: m for n, m in model.named_modules() if isinstance(m, NF4Weight)}
    return found | {n: p.data for n, p in model.named_parameters() if ".adapters." not in n}


def read_hf_config(folder: str | Path) -> ModelConfig:
    """`config.json` of a Mistral or Mixtral folder.

    Raises ValueError naming the file and the key, where a key is missing or says what this model cannot do.
    """
    path = Path(folder) / "config.json"
    raw = _read_json(path)
    try:
        return _config_of(raw)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:  # also a text where a number belongs
        raise ValueError(f"{path}: {error}") from None


def _config_of(raw: dict[str, Any]) -> ModelConfig:
    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise ValueError(f"key {key!r} is missing")
        return raw[key]

    kind = raw.get("model_type")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    for key, value, supported in (
        ("model_type", kind, ("mistral", "mixtral")),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), ("default",)),
        ("hidden_act", raw.get("hidden_act", "silu"), ("silu",)),
        ("tie_word_embeddings", bool(raw.get("tie_word_embeddings", False)), (False,)),
    ):
        if value not in supported:
            raise ValueError(f"{key} is {value!r}, supported is {' or '.join(map(repr, supported))}")
    theta = raw.get("rope_theta", rope.get("rope_theta"))
    if theta is None:
        raise ValueError("key 'rope_theta' is missing")
    dim, heads = need("hidden_size"), need("num_attention_heads")
    eos = raw.get("eos_token_id", 2)
    return ModelConfig(
        dim=dim,
        n_layers=need("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=need("num_key_value_heads"),
        head_dim=raw.get("head_dim") or dim // heads,
        hidden_dim=need("intermediate_size"),
        vocab_size=need("vocab_size"),
        norm_eps=float(need("rms_norm_eps")),
        rope_theta=float(theta),
        sliding_window=raw.get("sliding_window"),
        moe=MoEConfig(need("num_local_experts"), need("num_experts_per_tok")) if kind == "mixtral" else None,
        max_positions=raw.get("max_position_embeddings", 32768),
        bos_id=raw.get("bos_token_id", 1),
        eos_id=next(iter(eos), None) if isinstance(eos, list) else eos,
    )


def hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` that transformers reads."""
    kind = "Mixtral" if config.moe else "Mistral"
    raw: dict[str, Any] = {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if config.moe:
        raw |= {"num_local_experts": config.moe.n_experts, "num_experts_per_tok": config.moe.top_k}
    return raw


def load_weights(model: Transformer, folder: str | Path, targets: Mapping[str, Tensor | Filled] | None = None) -> None:
    """Copy a folder's safetensors into `model`, sharded or not, a tensor at a time, in the model's dtype or 4 bits;
    or into what else takes each of its weights, by its name.

    Raises ValueError naming the file or the tensor: a shard or a tensor is missing, is there twice or is not the
    model's, or a shape differs. The model's weights are then undefined.
    """
    folder = Path(folder)
    where = layout_of(model.config)
    targets = base_weights(model) if targets is None else targets
    missing = dict.fromkeys(where)
    for file, name, tensor in slices(folder):
        if name.endswith("rotary_emb.inv_freq"):
            continue  # old exports stored this constant
        if name not in where:
            raise ValueError(f"{file}: tensor {name!r} is not part of a model with {folder}/config.json's shape")
        if name not in missing:
            raise ValueError(f"{file}: tensor {name!r} is there a second time")
        shape = tuple(tensor.get_shape())
        if shape != where[name].shape:
            raise ValueError(f"{file}: tensor {name!r} has shape {shape}, expected {where[name].shape}")
        target, start = targets[where[name].ours], where[name].start
        del missing[name]
        if not isinstance(target, Tensor):
            target.fill(start, tensor[:])
            continue
        local, first = local_rows(target)
        begin, end = max(start, first), min(start + shape[0], first + local.shape[0])
        if begin < end:  # of a sharded model, only the rows that are here are read
            local[begin - first : end - first] = tensor[begin - start : end - start].view(end - begin, -1)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first is {next(iter(missing))!r}")


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The dtype of a folder's tensors; of mixed ones that which holds them all."""
    dtypes = {tensor[:0].dtype for _, _, tensor in slices(Path(folder))}
    return functools.reduce(torch.promote_types, dtypes)


def load_hf(
    folder: str | Path, dtype: torch.dtype | None = None, *, attention: str = "auto", moe: str = "auto"
) -> tuple[Transformer, ModelConfig]:
    """A Hugging Face Mistral or Mixtral folder as our model, on the CPU; `dtype` None keeps the files' own.

    Raises as `load_weights` does.
    """
    config = read_hf_config(folder)
    model = Transformer(config, attention=attention, moe=moe, dtype=dtype or stored_dtype(folder))
    load_weights(model, folder)
    return model, config


def save_hf(model: Transformer, folder: str | Path, *, tokenizer_from: str | Path | None = None) -> None:
    """Write `model` as a folder that `from_pretrained` reads: safetensors of at most 5 GiB and an index.

    The folder appears whole or not at all. Raises FileExistsError where it is there already. `tokenizer_from`: a
    folder whose tokenizer files are copied along.
    """
    if model.balance_bias is not None:
        text = f"{folder}: Mixtral's format has no place for the bias that balances the experts (loss.balance_bias)"
        warnings.warn(f"{text}: without it, tokens are routed otherwise", stacklevel=2)
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    where = layout_of(model.config)
    if left := parameters.keys() - {rows.ours for rows in where.values()}:
        raise ValueError(f"tensors without a name in the Hugging Face format: {sorted(left)}")
    with replace_folder(Path(folder)) as temporary:
        shards: list[dict[str, Tensor]] = [{}]
        size = total = 0
        for name, rows in where.items():
            tensor = view_of(parameters, rows)
            if size and size + tensor.nbytes > SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][name] = tensor
            size += tensor.nbytes
            total += tensor.nbytes
        weight_map = {}
        for i, shard in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            # Clones: a view shares its storage with its neighbours, which the format refuses.
            save_file({n: t.cpu().clone() for n, t in shard.items()}, temporary / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        config = hf_config(model.config, next(iter(parameters.values())).dtype)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_tokenizer(tokenizer_from, temporary)


def copy_tokenizer(source: str | Path | None, folder: Path) -> None:
    """Copy the files of tokenizer and chat, those that are there, so that a model folder stays usable by itself."""
    for name in (*TOKENIZER_FILES, *CHAT_FILES) if source is not None else ():
        if (file := Path(source or ".") / name).is_file():
            shutil.copyfile(file, folder / name)


def slices(folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """(file, name, a safetensors slice: nothing is read yet) of every tensor of a folder."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index}: expected an object from tensors to files under 'weight_map'")
        files = sorted(set(weight_map.values()))
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{index}: shard name {name!r} leads out of the folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: shard {name} is missing")
    for name in files:
        try:
            with safe_open(folder / name, "pt") as shard:
                for key in shard.keys():  # noqa: SIM118  (not a dict)
                    yield folder / name, key, shard.get_slice(key)
        except SafetensorError as error:
            raise ValueError(f"{folder / name}: not a whole safetensors file ({error}); copy it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected a Hugging Face model folder") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected an object, found {type(raw).__name__}")
    return raw
