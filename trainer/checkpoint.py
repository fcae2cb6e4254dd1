"""Checkpoints: tensors in safetensors, the rest in JSON, whole or not at all. Loading one executes nothing of it.

A checkpoint is a folder `step-00000100` with `checkpoint.json` (what it is, the model's shape, the training state,
the recipe, where it comes from (lineage.py), size and CRC-32 of each file), the weights and the optimizer's moments by
our parameters' names, and the tokenizer; how its files are laid out is in shards.py. An imported model is the same
folder without an optimizer.

Of a model with adapters these alone are there, and where the frozen weights are, with their fingerprint.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from tokenmill.data.files import replace_folder, sync
from tokenmill.trainer import shards
from tokenmill.trainer.adapters import Base, adapter_tensors, check_adapter, check_base, read_adapter
from tokenmill.trainer.config import ConfigError, Recipe, build
from tokenmill.trainer.distributed import World
from tokenmill.trainer.model import ModelConfig, Transformer, lora
from tokenmill.trainer.model.quantise import NF4Weight
from tokenmill.trainer.model.weights import (
    Filled,
    base_weights,
    copy_tokenizer,
    layout_of,
    load_weights,
    read_hf_config,
    stored_dtype,
)
from tokenmill.trainer.shards import FORMAT, MANIFEST, read_manifest, shard_name, verify
from tokenmill.trainer.state import TrainState

_PRECISIONS = {torch.float32: "fp32 or bf16-mixed", torch.bfloat16: "bf16"}  # by their moments' dtype


def save_checkpoint(
    folder: Path,
    model: Transformer,
    world: World | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    state: TrainState | None = None,
    recipe: Recipe | None = None,
    tokenizer_from: Path | None = None,
    base: Base | None = None,
    lineage: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint that appears whole or not at all; every rank calls this and writes its own shard. `base`: the
    frozen weights of a model with adapters; `lineage`: where the model comes from (lineage.py).

    Raises FileExistsError where `folder` is there, OSError naming the file that could not be written.
    """
    world = world or World()
    parts = {"model": _trained(model)}
    if optimizer is not None:
        parts["optimizer"] = _optimizer_tensors(model, optimizer)
    with ExitStack() as stack:
        temporary = folder.with_name(f".{folder.name}.tmp")
        if world.rank == 0:
            temporary = stack.enter_context(replace_folder(folder, temporary))
        world.barrier()
        facts = {}
        for kind, tensors in parts.items():
            file = temporary / shard_name(kind, world.rank)
            local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
            try:
                save_file(local, file)
            except SafetensorError as error:
                raise OSError(
                    f"{file}: cannot be written ({error}); the output must be a folder with room that all nodes share"
                ) from None
            sync(file)
            sizes = torch.tensor([file.stat().st_size, shards.crc32(file)], device=world.device)
            for rank, values in enumerate(world.gather(sizes)):
                facts[shard_name(kind, rank)] = dict(zip(("bytes", "crc32"), values.tolist(), strict=True))
        if world.rank == 0:
            copy_tokenizer(tokenizer_from, temporary)
            for file in temporary.iterdir():
                if file.name not in facts:  # the tokenizer; every rank has read its own files
                    facts[file.name] = {"bytes": file.stat().st_size, "crc32": shards.crc32(file)}
            manifest = {
                "format": FORMAT,
                "ranks": world.size,
                "model": dataclasses.asdict(model.config),
                "adapter": model.adapter and dataclasses.asdict(model.adapter),
                "base": base and dataclasses.asdict(base),
                "state": None if state is None else state.to_json(),
                "recipe": None if recipe is None else dataclasses.asdict(recipe),
                "lineage": lineage,
                "files": facts,
            }
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    world.barrier()


def save_step(
    run: Path,
    keep: int,
    model: Transformer,
    world: World,
    *,
    always: Collection[int] = (),
    passed_over: Sequence[Path] = (),
    **parts: Any,
) -> Path:
    """The checkpoint of a running job: `run/checkpoints/step-N`, of which the last `keep` stay, and those of the steps
    `always`. Those that were `passed_over` when it was resumed go, once the new one is there.
    """
    folder = step_folder(run, parts["state"].step)
    if world.rank == 0 and folder.exists():  # one of the damaged
        shutil.rmtree(folder)
    save_checkpoint(folder, model, world, **parts)
    if world.rank == 0:
        whole = [f for f in step_folders(run) if f == folder or f not in passed_over]
        for old in {*step_folders(run)} - {*whole[-keep:], *(f for f in whole if _step_of(f) in always)}:
            shutil.rmtree(old)
    return folder


def latest_checkpoint(run: Path, world: World | None = None) -> Path | None:
    """The newest whole checkpoint of a run, the same on every rank; damaged ones are passed over with a warning."""
    world = world or World()
    steps = step_folders(run) if world.rank == 0 else []
    while (step := world.first(_step_of(steps.pop()) if steps else -1)) >= 0:
        folder = step_folder(run, step)
        try:
            verify(folder, world)
            return folder
        except ValueError as error:
            warnings.warn(f"{error}; passing over this checkpoint", stacklevel=2)
    return None


def newer_checkpoints(run: Path, checkpoint: Path | None) -> list[Path]:
    """Those that `latest_checkpoint` passed over when it chose `checkpoint`."""
    return [folder for folder in step_folders(run) if checkpoint is None or folder > checkpoint]


def resolve_model(path: str | Path, world: World | None = None) -> Path:
    """`find_model`, verified, unless it is Hugging Face's; of a run the newest whole checkpoint.

    Raises ValueError where there is none, or it is damaged.
    """
    if (Path(path) / "checkpoints").is_dir():
        newest = latest_checkpoint(Path(path), world)
        if newest is None:
            raise ValueError(f"{path}/checkpoints: holds no whole checkpoint")
        return newest
    folder = find_model(path)
    if (folder / MANIFEST).is_file():
        verify(folder, world)
    return folder


def find_model(path: str | Path) -> Path:
    """The folder with the weights that `path` means: itself, or a run's newest checkpoint. They are not read.

    Raises ValueError where there is none.
    """
    folder = Path(path)
    if (folder / "checkpoints").is_dir():
        if not (steps := step_folders(folder)):
            raise ValueError(f"{folder}/checkpoints: holds no checkpoint")
        return steps[-1]
    if not (folder / MANIFEST).is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: expected a checkpoint ({MANIFEST}), a run's output or a Hugging Face folder")
    return folder


def read_config(folder: Path) -> ModelConfig:
    """The model's shape, of a checkpoint or of a Hugging Face folder. Raises ValueError naming file and key."""
    if not (folder / MANIFEST).is_file():
        return read_hf_config(folder)
    try:
        return build(ModelConfig, read_manifest(folder).get("model") or {}, "model.")
    except ConfigError as error:
        raise ValueError(f"{folder / MANIFEST}: {error}") from None


def fill_model(model: Transformer, folder: Path) -> None:
    """Copy the weights in `folder`, a checkpoint or a Hugging Face folder, into `model`, sharded or not.

    Raises ValueError naming the file or tensor; the model's weights are then undefined.
    """
    _fill(model, folder, base_weights(model))


def _fill(model: Transformer, folder: Path, targets: Mapping[str, Tensor | Filled]) -> None:
    if not (folder / MANIFEST).is_file():
        load_weights(model, folder, targets)
    elif adapted := read_adapter(folder):
        adapter, base = adapted
        check_base(folder, base)
        if any(isinstance(target, NF4Weight) for target in targets.values()):
            raise ValueError(
                f"{folder}: holds adapters, which cannot be merged into weights in 4 bits; `tokenmill export` it, and "
                "start from that"
            )
        _fill(model, Path(base.path), lora.merging(targets, model.config, adapter, adapter_tensors(folder)))
    else:
        ranks = read_manifest(folder)["ranks"]
        others = {name: target for name, target in targets.items() if not isinstance(target, Tensor)}
        shards.fill(folder, "model", ranks, {n: t for n, t in targets.items() if isinstance(t, Tensor)}, others.keys())
        where = layout_of(model.config).values() if others else ()
        for name, target in others.items():  # one at a time: the whole is never here
            matrix = shards.whole(folder, ranks, name).view(-1, target.shape[-1])
            for start, count in [(rows.start, rows.shape[0]) for rows in where if rows.ours == name]:
                target.fill(start, matrix[start : start + count])
    _set_balance_bias(model, folder)


def _set_balance_bias(model: Transformer, folder: Path) -> None:
    state = read_manifest(folder).get("state") if (folder / MANIFEST).is_file() else None
    if state is not None:
        model.set_balance_bias(TrainState.from_json(state).balance_bias)


def load_model(
    path: str | Path, dtype: torch.dtype | None = torch.float32, *, attention: str = "auto", moe: str = "auto"
) -> Transformer:
    """The model in a checkpoint, a run's output folder (its newest checkpoint) or a Hugging Face folder, on the CPU.

    `dtype` None keeps the files' own. Raises ValueError naming the file, key or tensor.
    """
    folder = resolve_model(path)
    model = Transformer(read_config(folder), attention=attention, moe=moe, dtype=dtype or _stored_dtype(folder))
    fill_model(model, folder)
    return model


def _stored_dtype(folder: Path) -> torch.dtype:
    if not (folder / MANIFEST).is_file():
        return stored_dtype(folder)
    if adapted := read_adapter(folder):
        return _stored_dtype(Path(adapted[1].path))
    with shards.open_shard(folder / shard_name("model", 0)) as shard:
        return shard.get_slice("embed.weight")[:0].dtype


def load_training(
    folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, base: Base | None = None
) -> TrainState:
    """Put a checkpoint's weights and moments into `model` and `optimizer`, and return its state. With adapters,
    the frozen weights must be in the model already, and `base` be what they are.

    Raises ValueError naming the file or tensor; `model` and `optimizer` are then undefined.
    """
    manifest = read_manifest(folder)
    if manifest.get("state") is None:
        raise ValueError(f"{folder / MANIFEST}: holds a model only, there is no training to resume")
    for key, value in dataclasses.asdict(model.config).items():
        if (stored := manifest["model"].get(key)) != value:
            raise ValueError(
                f"{folder}: its model has {key} = {stored!r}, the recipe's {value!r}; give the recipe another output"
            )
    check_adapter(folder, model.adapter, base)
    shards.fill(folder, "model", manifest["ranks"], _trained(model))
    _set_balance_bias(model, folder)
    load_moments(folder, model, optimizer)
    return TrainState.from_json(manifest["state"])


def load_adapters(folder: Path, model: Transformer, base: Base, world: World) -> None:
    """Begin with the adapters in a checkpoint: `model` must have such ones, on the same base.

    Raises ValueError naming the folder and what differs; the model's adapters are then undefined.
    """
    verify(folder, world)
    if (stored := read_adapter(folder)) is None:
        raise ValueError(
            f"{folder}: adapter.path: holds no adapters; name a checkpoint with some, or a folder of PEFT's"
        )
    assert model.adapter is not None
    check_adapter(folder, dataclasses.replace(model.adapter, path=stored[0].path), base)
    shards.fill(folder, "model", read_manifest(folder)["ranks"], _trained(model))
    _set_balance_bias(model, folder)


def load_moments(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's moments, and the count of steps that they are corrected by, into `optimizer`.

    Raises ValueError naming the file or tensor where they belong to other parameters, or to another kind of optimizer;
    `optimizer` is then undefined.
    """
    manifest = read_manifest(folder)
    if shard_name("optimizer", 0) not in manifest["files"]:
        raise ValueError(f"{folder}: holds a model only, there are no moments of an optimizer")
    file = folder / shard_name("optimizer", 0)
    adam = not isinstance(optimizer, torch.optim.RMSprop)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments: dict[str, Tensor] = {}
    with shards.open_shard(file) as shard:
        for key in shard.keys():  # noqa: SIM118  (not a dict)
            kind, _, name = key.partition("/")
            if name not in parameters:
                raise ValueError(f"{file}: {key!r} belongs to no parameter of the model")
            if kind != "step" and kind.startswith("exp_avg") != adam:
                was, ours = ("rmsprop", "adamw") if adam else ("adamw", "rmsprop")
                raise ValueError(
                    f"{folder}: was written with optimizer.kind = {was}, the recipe's is {ours}; use the same, or "
                    f"begin from its weights alone, in another output, with model.path = '{folder}'"
                )
            if shard.get_slice(key).get_shape():
                stored, ours = shard.get_slice(key)[:0].dtype, parameters[name].dtype
                if stored != ours:
                    raise ValueError(
                        f"{folder}: was written with train.precision = {_PRECISIONS.get(stored, stored)} (its moments "
                        f"are {stored}, the recipe's {ours}); use the same, or begin from its weights alone, in "
                        f"another output, with model.path = '{folder}'"
                    )
                moments[key] = torch.zeros_like(parameters[name])
            else:  # a count of steps: torch's fused optimizer wants it beside the parameter, ours on the host
                fused = optimizer.defaults.get("fused", False)
                moments[key] = shard.get_tensor(key).to(parameters[name].device if fused else "cpu")
            optimizer.state[parameters[name]][kind] = moments[key]
    shards.fill(folder, "optimizer", manifest["ranks"], {key: t.data for key, t in moments.items()})


def _trained(model: Transformer) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: everything, but of one with adapters these alone."""
    return {n: p.data for n, p in model.named_parameters() if model.adapter is None or p.requires_grad}


def _optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = {name: optimizer.state.get(p, {}) for name, p in model.named_parameters() if p.requires_grad}
    return {f"{key}/{name}": value for name, state in states.items() for key, value in state.items()}


def step_folders(run: Path) -> list[Path]:
    """A run's checkpoints, the newest last."""
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8))


def step_folder(run: Path, step: int) -> Path:
    """Where a run's checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
