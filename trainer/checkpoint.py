"""Checkpoints: tensors in safetensors, the rest in JSON, whole or not at all. Loading one executes nothing of it.

A checkpoint is a folder `step-00000100` with `checkpoint.json` (what it is, the model's shape, the training state,
the recipe, size and CRC-32 of each file), `model.safetensors` and `optimizer.safetensors` by our parameters' names,
and the tokenizer. An imported model is the same folder without an optimizer.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenmill.trainer.config import ConfigError, Recipe, build
from tokenmill.trainer.files import replace_folder
from tokenmill.trainer.model import ModelConfig, Transformer
from tokenmill.trainer.model.weights import copy_tokenizer, load_hf
from tokenmill.trainer.state import TrainState

FORMAT = "tokenmill-checkpoint-1"
MANIFEST = "checkpoint.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save_checkpoint(
    folder: Path,
    model: Transformer,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    state: TrainState | None = None,
    recipe: Recipe | None = None,
    tokenizer_from: Path | None = None,
) -> None:
    """Write a checkpoint that appears whole or not at all. Raises FileExistsError where `folder` is there."""
    with replace_folder(folder) as temporary:
        tensors = {name: parameter.data for name, parameter in model.named_parameters()}
        save_file(tensors, temporary / "model.safetensors")
        if optimizer is not None:
            save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
        copy_tokenizer(tokenizer_from, temporary)
        manifest = {
            "format": FORMAT,
            "model": dataclasses.asdict(model.config),
            "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
            "state": None if state is None else state.to_json(),
            "recipe": None if recipe is None else dataclasses.asdict(recipe),
            "files": {f.name: {"bytes": f.stat().st_size, "crc32": _crc32(f)} for f in sorted(temporary.iterdir())},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def save_step(run: Path, keep: int, model: Transformer, **parts: Any) -> Path:
    """The checkpoint of a running job: `run/checkpoints/step-N`, of which the last `keep` stay."""
    folder = run / "checkpoints" / f"step-{parts['state'].step:08d}"
    if folder.exists():  # a damaged one that a resume passed over
        shutil.rmtree(folder)
    save_checkpoint(folder, model, **parts)
    for old in _steps(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are passed over with a warning."""
    for folder in reversed(_steps(run)):
        try:
            read_manifest(folder)
            return folder
        except ValueError as error:
            warnings.warn(f"{error}; passing over this checkpoint", stacklevel=2)
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, once every file has the size and the checksum that it names.

    Raises ValueError naming the file.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        kind, files = manifest["format"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error})") from None
    if kind != FORMAT:
        raise ValueError(f"{path}: format is {kind!r}, expected {FORMAT!r}")
    for name, expected in files.items():
        file = folder / Path(name).name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != expected["bytes"] or _crc32(file) != expected["crc32"]:
            raise ValueError(f"{file}: damaged, size or checksum differ from {MANIFEST}'s")
    return manifest


def resolve_model(path: str | Path) -> Path:
    """The folder with the weights that `path` means: itself, or a run's newest checkpoint.

    Raises ValueError where there is none.
    """
    folder = Path(path)
    if (folder / "checkpoints").is_dir():
        newest = latest_checkpoint(folder)
        if newest is None:
            raise ValueError(f"{folder}/checkpoints: holds no whole checkpoint")
        return newest
    if not (folder / MANIFEST).is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: expected a checkpoint ({MANIFEST}), a run's output or a Hugging Face folder")
    return folder


def load_model(
    path: str | Path, dtype: torch.dtype | None = torch.float32, *, attention: str = "auto", moe: str = "auto"
) -> Transformer:
    """The model in a checkpoint, a run's output folder (its newest checkpoint) or a Hugging Face folder, on the CPU.

    `dtype` None keeps a checkpoint's own (fp32 for a Hugging Face folder). Raises ValueError naming the file, key or
    tensor.
    """
    folder = resolve_model(path)
    if not (folder / MANIFEST).is_file():
        return load_hf(folder, dtype or torch.float32, attention=attention, moe=moe)[0]
    manifest = read_manifest(folder)
    try:
        config = build(ModelConfig, manifest.get("model") or {}, "model.")
        dtype = dtype or DTYPES[manifest["dtype"]]
    except (ConfigError, KeyError) as error:
        raise ValueError(f"{folder / MANIFEST}: {error}") from None
    model = Transformer(config, attention=attention, moe=moe, dtype=dtype)
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    _copy_in(folder / "model.safetensors", parameters)
    return model


def load_training(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> TrainState:
    """Put a checkpoint's weights and moments into `model` and `optimizer`, and return its state.

    Raises ValueError naming the file or tensor; `model` and `optimizer` are then undefined.
    """
    manifest = read_manifest(folder)
    if manifest.get("state") is None:
        raise ValueError(f"{folder / MANIFEST}: holds a model only, there is no training to resume")
    _copy_in(folder / "model.safetensors", {name: p.data for name, p in model.named_parameters()})
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for key, tensor in _read_tensors(folder / "optimizer.safetensors").items():
        kind, _, name = key.partition("/")
        if name not in names:
            raise ValueError(f"{folder / 'optimizer.safetensors'}: {key!r} belongs to no parameter of the model")
        optimizer.state[names[name]][kind] = tensor if kind == "step" else tensor.to(names[name].device)
    return TrainState.from_json(manifest["state"])


def _optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = {name: optimizer.state.get(p, {}) for name, p in model.named_parameters()}
    return {f"{key}/{name}": value for name, state in states.items() for key, value in state.items()}


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def _copy_in(file: Path, parameters: dict[str, Tensor]) -> None:
    tensors = _read_tensors(file)
    if odd := tensors.keys() ^ parameters.keys():
        raise ValueError(f"{file}: tensors do not match the model's, for example {min(odd)!r}")
    for name, tensor in tensors.items():
        if tensor.shape != parameters[name].shape:
            raise ValueError(
                f"{file}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {tuple(parameters[name].shape)}"
            )
        parameters[name].copy_(tensor)


def _steps(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-[0-9]*"))


def _crc32(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
