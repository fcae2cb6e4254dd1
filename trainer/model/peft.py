"""Adapters in PEFT's format and back: `adapter_config.json` and `adapter_model.safetensors`.

The names are those of the projections in a Hugging Face checkpoint: an expert's are `experts.3.w1`, `w3` and `w2`. PEFT
itself, on transformers from 5 on, where all experts of a layer are one parameter, reads these names and converts them,
and writes others, where the gate and up of all experts have one pair of factors: these are read here as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenmill.data.files import replace_folder
from tokenmill.trainer.model import lora
from tokenmill.trainer.model.config import AdapterConfig, ModelConfig
from tokenmill.trainer.model.rows import local_part
from tokenmill.trainer.model.transformer import Transformer

# Ways to begin of PEFT's (`init_lora_weights`) that leave the base alone: not PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA.
_ON_THE_BASE_AS_IT_IS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_SUFFIXES = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def names(config: ModelConfig, adapter: AdapterConfig) -> dict[str, tuple[str, int | None]]:
    """PEFT's name of each tensor: the name of our parameter, and of an expert's its number."""
    kinds = ("a", "b", "magnitude") if adapter.kind == "dora" else ("a", "b")
    found: dict[str, tuple[str, int | None]] = {}
    for projection in lora.select(config, adapter.targets).values():
        for e, theirs in enumerate(projection.theirs):
            expert = e if ".experts." in theirs else None
            for kind in kinds:
                name = f"base_model.model.{theirs.removesuffix('weight')}{_SUFFIXES[kind]}"
                found[name] = projection.factor(kind), expert
    return found


def save_peft(
    tensors: Mapping[str, Tensor], config: ModelConfig, adapter: AdapterConfig, folder: str | Path, base: str | None
) -> None:
    """Write adapters, whole tensors by our names, as a folder that `PeftModel.from_pretrained` reads. `base` names the
    model that they belong to. Raises FileExistsError where the folder is there.
    """
    theirs = {
        name: (tensors[ours] if expert is None else tensors[ours][expert]).contiguous().cpu().clone()
        for name, (ours, expert) in names(config, adapter).items()
    }
    # PEFT joins an expert's gate and up to one adapter of twice the rank and twice alpha, which leaves alpha / rank as
    # it was, but not alpha / sqrt(rank): so that is written as an alpha of its own.
    scaled = adapter.rank_stabilised and any(".experts." in name for name in theirs)
    raw: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.scale * adapter.rank if scaled else adapter.alpha,
        "use_rslora": adapter.rank_stabilised and not scaled,
        "use_dora": adapter.kind == "dora",
        "target_modules": _target_modules(config, adapter),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with replace_folder(Path(folder)) as temporary:
        save_file(theirs, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(raw, indent=2) + "\n")


def _target_modules(config: ModelConfig, adapter: AdapterConfig) -> list[str]:
    """A projection by its last name where every block has it, by its whole one elsewhere."""
    leaves: dict[str, list[str]] = {}
    for projection in lora.select(config, adapter.targets).values():
        for theirs in projection.theirs:
            module = theirs.removesuffix(".weight")
            leaves.setdefault(module.rpartition(".")[2], []).append(module)
    experts = config.moe.n_experts if config.moe else 1
    found = []
    for leaf, modules in leaves.items():
        everywhere = config.n_layers * (experts if leaf in ("w1", "w2", "w3") else 1)
        found += [leaf] if len(modules) == everywhere else modules
    return found


@torch.no_grad()
def load_peft(model: Transformer, folder: str | Path) -> None:
    """Copy adapters that PEFT wrote into those of `model`, sharded or not.

    Raises ValueError naming the file and what of it does not agree with the model's adapters.
    """
    folder, adapter = Path(folder), model.adapter
    assert adapter is not None
    path = folder / "adapter_config.json"
    try:
        raw = json.loads(path.read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a folder that PEFT wrote ({error})") from None
    start = raw.get("init_lora_weights", True)
    if start not in _ON_THE_BASE_AS_IT_IS:
        raise ValueError(
            f"{path}: init_lora_weights is {start!r}: such adapters belong to a base that was changed when they were "
            "made; save them with PEFT's path_initial_model_for_weight_conversion, as LoRA of the base as it was"
        )
    scale = raw.get("lora_alpha", 8) / raw.get("r", 8) ** (0.5 if raw.get("use_rslora") else 1)
    facts: list[tuple[str, Any, Any]] = [
        ("peft_type", raw.get("peft_type"), "LORA"),
        ("r", raw.get("r"), adapter.rank),
        ("use_dora", raw.get("use_dora", False), adapter.kind == "dora"),
        ("lora_alpha / r (or its square root)", round(scale, 9), round(adapter.scale, 9)),
        ("rank_pattern", raw.get("rank_pattern") or {}, {}),
        ("alpha_pattern", raw.get("alpha_pattern") or {}, {}),
        ("modules_to_save", raw.get("modules_to_save") or [], []),
        ("bias", raw.get("bias", "none"), "none"),
    ]
    for key, value, expected in facts:
        if value != expected:
            raise ValueError(f"{path}: {key} is {value!r}, the recipe's adapters have {expected!r}")
    tensors = _split_experts(tensors, model.config)
    expected = names(model.config, adapter)
    if odd := tensors.keys() ^ expected.keys():
        there = "there" if min(odd) in tensors else "missing"
        raise ValueError(f"{folder}: tensors are not those of adapter.targets, for example {min(odd)!r} is {there}")
    parameters = dict(model.named_parameters())
    for name, (ours, expert) in expected.items():
        local, first = local_part(parameters[ours].data)
        shape = parameters[ours].shape[0 if expert is None else 1 :]
        if tensors[name].shape != shape:
            raise ValueError(f"{folder}: {name!r} has shape {[*tensors[name].shape]}, expected {[*shape]}")
        if expert is None:
            local.copy_(tensors[name][first : first + len(local)])
        elif first <= expert < first + len(local):
            local[expert - first].copy_(tensors[name])


def _split_experts(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The names of a checkpoint for those of a model in memory, where all experts are one parameter: A is (E * r,
    inputs), an expert's rows together; B (outputs, r * E), an expert's columns E apart. Gate and up have one A.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        head, _, tail = name.partition(".mlp.experts.")
        if not tail or config.moe is None:
            renamed = name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if config.moe else name
            found[renamed] = tensor
            continue
        experts, suffix = config.moe.n_experts, tail.removeprefix("base_layer.")
        of_gate_up = suffix != tail  # PEFT wraps that parameter first
        if suffix == _SUFFIXES["a"]:
            parts = {w: tensor.view(experts, -1, tensor.shape[-1]) for w in (("w1", "w3") if of_gate_up else ("w2",))}
        else:
            b = tensor.view(len(tensor), -1, experts).permute(2, 0, 1)
            parts = dict(zip(("w1", "w3"), b.chunk(2, dim=1), strict=True)) if of_gate_up else {"w2": b}
        for w, part in parts.items():
            for e in range(experts):
                found[f"{head}.block_sparse_moe.experts.{e}.{w}.{suffix}"] = part[e]
    return found
