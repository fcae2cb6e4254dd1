"""Checkpoints: tensors in safetensors, the rest in JSON, whole or not at all. Loading one executes nothing of it.

A checkpoint is a folder `step-00000100` with `checkpoint.json` (what it is, the model's shape, the training state,
the recipe, size and CRC-32 of each file), the weights and the optimizer's moments by our parameters' names, a file of
each for every rank that wrote, and the tokenizer. Rank r's file holds its shard: rows [begin, end) of the first
dimension, by FSDP2's rule. So any number of ranks can read what any number wrote, each only its own rows. An imported
model is the same folder without an optimizer.

Of a model with adapters these alone are there, and where the frozen weights are, with their fingerprint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import warnings
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from tokenmill.trainer.config import ConfigError, Recipe, build
from tokenmill.trainer.distributed import World
from tokenmill.trainer.files import replace_folder, sync
from tokenmill.trainer.model import ModelConfig, Transformer, lora
from tokenmill.trainer.model.config import AdapterConfig
from tokenmill.trainer.model.quantise import NF4Weight, dequantise, quantise
from tokenmill.trainer.model.rows import local_part, shard_bounds
from tokenmill.trainer.model.weights import (
    base_weights,
    copy_tokenizer,
    layout_of,
    load_weights,
    read_hf_config,
    stored_dtype,
    view_of,
)
from tokenmill.trainer.state import TrainState

FORMAT = "tokenmill-checkpoint-1"
MANIFEST = "checkpoint.json"
_PRECISIONS = {torch.float32: "fp32 or bf16-mixed", torch.bfloat16: "bf16"}  # by their moments' dtype


@dataclasses.dataclass(frozen=True)
class Base:
    """The frozen weights beneath adapters."""

    path: str  # of a Hugging Face folder or a checkpoint
    fingerprint: str  # of their files

    @staticmethod
    def of(folder: Path, world: World | None = None) -> Base:
        """Of a checkpoint by the checksums that it names, of a Hugging Face folder by reading it."""
        world = world or World()
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            facts: Any = [manifest.get("base"), sorted((n, f["crc32"]) for n, f in manifest["files"].items())]
        else:
            files = sorted(folder.glob("*.safetensors"))
            sums = torch.zeros(len(files), dtype=torch.int64, device=world.device)
            for i in range(world.rank, len(files), world.size):
                sums[i] = _crc32(files[i])
            facts = [(f.name, f.stat().st_size, crc) for f, crc in zip(files, world.sum(sums).tolist(), strict=True)]
        return Base(str(folder.resolve()), hashlib.sha256(json.dumps(facts).encode()).hexdigest())


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
) -> None:
    """Write a checkpoint that appears whole or not at all; every rank calls this and writes its own shard. `base`: the
    frozen weights of a model with adapters.

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
            file = temporary / _shard_name(kind, world.rank)
            local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
            try:
                save_file(local, file)
            except SafetensorError as error:
                raise OSError(
                    f"{file}: cannot be written ({error}); the output must be a folder with room that all nodes share"
                ) from None
            sync(file)
            sizes = torch.tensor([file.stat().st_size, _crc32(file)], device=world.device)
            for rank, values in enumerate(world.gather(sizes)):
                facts[_shard_name(kind, rank)] = dict(zip(("bytes", "crc32"), values.tolist(), strict=True))
        if world.rank == 0:
            copy_tokenizer(tokenizer_from, temporary)
            for file in temporary.iterdir():
                if file.name not in facts:  # the tokenizer; every rank has read its own files
                    facts[file.name] = {"bytes": file.stat().st_size, "crc32": _crc32(file)}
            manifest = {
                "format": FORMAT,
                "ranks": world.size,
                "model": dataclasses.asdict(model.config),
                "adapter": model.adapter and dataclasses.asdict(model.adapter),
                "base": base and dataclasses.asdict(base),
                "state": None if state is None else state.to_json(),
                "recipe": None if recipe is None else dataclasses.asdict(recipe),
                "files": facts,
            }
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    world.barrier()


def save_step(
    run: Path, keep: int, model: Transformer, world: World, *, passed_over: Sequence[Path] = (), **parts: Any
) -> Path:
    """The checkpoint of a running job: `run/checkpoints/step-N`, of which the last `keep` stay. Those that were
    `passed_over` when it was resumed go, once the new one is there.
    """
    folder = run / "checkpoints" / _step_name(parts["state"].step)
    if world.rank == 0 and folder.exists():  # one of the damaged
        shutil.rmtree(folder)
    save_checkpoint(folder, model, world, **parts)
    if world.rank == 0:
        whole = [f for f in _steps(run) if f == folder or f not in passed_over]
        for old in {*_steps(run)} - {*whole[-keep:]}:
            shutil.rmtree(old)
    return folder


def latest_checkpoint(run: Path, world: World | None = None) -> Path | None:
    """The newest whole checkpoint of a run, the same on every rank; damaged ones are passed over with a warning."""
    world = world or World()
    steps = _steps(run) if world.rank == 0 else []
    while (step := world.first(_step_of(steps.pop()) if steps else -1)) >= 0:
        folder = run / "checkpoints" / _step_name(step)
        try:
            verify(folder, world)
            return folder
        except ValueError as error:
            warnings.warn(f"{error}; passing over this checkpoint", stacklevel=2)
    return None


def newer_checkpoints(run: Path, checkpoint: Path | None) -> list[Path]:
    """Those that `latest_checkpoint` passed over when it chose `checkpoint`."""
    return [folder for folder in _steps(run) if checkpoint is None or folder > checkpoint]


def verify(folder: Path, world: World | None = None) -> None:
    """Check that every file of a checkpoint has the size and the checksum that it names. This reads all of it, each
    rank its share, and is done once, where a checkpoint is chosen.

    Raises ValueError on every rank, naming the file on those that found it.
    """
    world = world or World()
    error = None
    try:
        files = read_manifest(folder)["files"]
        for name in sorted(files)[world.rank :: world.size]:
            file = folder / Path(name).name
            if (file.stat().st_size, _crc32(file)) != (files[name]["bytes"], files[name]["crc32"]):
                raise ValueError(f"{file}: damaged, size or checksum differ from {MANIFEST}'s")
    except (OSError, ValueError) as found:
        error = found
    if world.any(error is not None):
        raise ValueError(str(error or f"{folder}: damaged, as another rank has found")) from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, once every file that it names is there.

    Raises ValueError naming the file.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        kind, ranks = manifest["format"], int(manifest["ranks"])
        files = {name: (facts["bytes"], facts["crc32"]) for name, facts in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error!r})") from None
    if kind != FORMAT:
        raise ValueError(f"{path}: format is {kind!r}, expected {FORMAT!r}")
    if odd := {_shard_name("model", rank) for rank in range(ranks)} - files.keys():
        raise ValueError(f"{path}: says that {ranks} ranks wrote, but lists no {min(odd)}")
    for name in sorted(files):
        if not (file := folder / Path(name).name).is_file():
            raise ValueError(f"{file} is missing")
    return manifest


def resolve_model(path: str | Path, world: World | None = None) -> Path:
    """The folder with the weights that `path` means: itself, or a run's newest checkpoint; verified, unless it is
    Hugging Face's.

    Raises ValueError where there is none, or it is damaged.
    """
    folder = Path(path)
    if (folder / "checkpoints").is_dir():
        newest = latest_checkpoint(folder, world)
        if newest is None:
            raise ValueError(f"{folder}/checkpoints: holds no whole checkpoint")
        return newest
    if not (folder / MANIFEST).is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: expected a checkpoint ({MANIFEST}), a run's output or a Hugging Face folder")
    if (folder / MANIFEST).is_file():
        verify(folder, world)
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
    if not (folder / MANIFEST).is_file():
        load_weights(model, folder)
    elif adapted := read_adapter(folder):
        _fill_merged(model, folder, *adapted)
    else:
        targets, ranks = base_weights(model), read_manifest(folder)["ranks"]
        packed = {name: target for name, target in targets.items() if isinstance(target, NF4Weight)}
        _fill(folder, "model", ranks, {n: t for n, t in targets.items() if isinstance(t, Tensor)}, packed.keys())
        where = layout_of(model.config).values() if packed else ()
        for name, target in packed.items():  # one at a time: the whole is never here but in 4 bits
            matrix = _whole(folder, ranks, name).view(-1, target.shape[-1])
            for start, count in [(rows.start, rows.shape[0]) for rows in where if rows.ours == name]:
                target.fill(start, matrix[start : start + count])
    _set_balance_bias(model, folder)


def _fill_merged(model: Transformer, folder: Path, adapter: AdapterConfig, base: Base) -> None:
    """The base's weights, as they were in training, with the adapters in `folder` merged into them."""
    _check_base(folder, base)
    fill_model(model, Path(base.path))
    targets = base_weights(model)
    quantised = adapter.quantise == "nf4"
    if any(isinstance(t, NF4Weight) or (quantised and isinstance(t, DTensor)) for t in targets.values()):
        raise ValueError(
            f"{folder}: holds adapters, which cannot be merged into weights in 4 bits, nor such into sharded ones; "
            f"`tokenmill export` it, and start from that"
        )
    if quantised:
        packed = lora.quantised_weights(model.config, adapter)
        for rows in layout_of(model.config).values():
            if rows.ours in packed:
                part = view_of(targets, rows)  # type: ignore[arg-type]
                part.copy_(dequantise(quantise(part), part.shape, part.dtype))
    lora.merge_into(model, adapter, adapter_tensors(folder))


def _check_base(folder: Path, base: Base) -> None:
    """Raises ValueError where the base of the adapters in `folder` is gone, or its weights are others by now."""
    try:
        there = Base.of(Path(base.path))
    except OSError as error:
        raise ValueError(f"{folder}: the base of its adapters cannot be read ({error})") from None
    if there.fingerprint != base.fingerprint:
        raise ValueError(
            f"{folder}: its adapters belong to other weights than those in {base.path}: the fingerprint was "
            f"{base.fingerprint[:12]}, and is {there.fingerprint[:12]}"
        )


def _set_balance_bias(model: Transformer, folder: Path) -> None:
    state = read_manifest(folder).get("state") if (folder / MANIFEST).is_file() else None
    if state is not None:
        model.set_balance_bias(TrainState.from_json(state).balance_bias)


def read_adapter(folder: Path) -> tuple[AdapterConfig, Base] | None:
    """What a checkpoint says of its adapters; None where it holds whole weights."""
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    if manifest.get("adapter") is None:
        return None
    try:
        return build(AdapterConfig, manifest["adapter"], "adapter."), build(Base, manifest.get("base") or {}, "base.")
    except ConfigError as error:
        raise ValueError(f"{folder / MANIFEST}: {error}") from None


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapters in a checkpoint, whole."""
    ranks = read_manifest(folder)["ranks"]
    with _open(folder / _shard_name("model", 0)) as shard:
        names = sorted(shard.keys())
    return {name: _whole(folder, ranks, name) for name in names}


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
    with _open(folder / _shard_name("model", 0)) as shard:
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
    _check_adapter(folder, model.adapter, base)
    file = folder / _shard_name("optimizer", 0)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments: dict[str, Tensor] = {}
    with _open(file) as shard:
        for key in shard.keys():  # noqa: SIM118  (not a dict)
            kind, _, name = key.partition("/")
            if name not in parameters:
                raise ValueError(f"{file}: {key!r} belongs to no parameter of the model")
            if shard.get_slice(key).get_shape():
                stored, ours = shard.get_slice(key)[:0].dtype, parameters[name].dtype
                if stored != ours:
                    raise ValueError(
                        f"{folder}: was written with train.precision = {_PRECISIONS.get(stored, stored)} (its moments "
                        f"are {stored}, the recipe's {ours}); resume with the same, or start another output from its "
                        f"weights with model.path = '{folder}'"
                    )
                moments[key] = torch.zeros_like(parameters[name])
            else:  # a count of steps: torch's fused optimizer wants it beside the parameter, ours on the host
                fused = optimizer.defaults.get("fused", False)
                moments[key] = shard.get_tensor(key).to(parameters[name].device if fused else "cpu")
            optimizer.state[parameters[name]][kind] = moments[key]
    _fill(folder, "model", manifest["ranks"], _trained(model))
    _set_balance_bias(model, folder)
    _fill(folder, "optimizer", manifest["ranks"], {key: t.data for key, t in moments.items()})
    return TrainState.from_json(manifest["state"])


def _check_adapter(folder: Path, adapter: AdapterConfig | None, base: Base | None) -> None:
    """Raises ValueError where a run's adapters, or the weights beneath, are not those of its checkpoint."""
    stored = read_adapter(folder)
    if (stored is None) != (adapter is None):
        said, wanted = ("no", "some") if stored is None else ("", "none")
        raise ValueError(f"{folder}: holds {said} adapters, the recipe wants {wanted}; give the recipe another output")
    if stored is None or base is None:
        return
    for key, value in dataclasses.asdict(adapter).items():  # type: ignore[arg-type]
        if (was := getattr(stored[0], key)) != value:
            raise ValueError(
                f"{folder}: was written with adapter.{key} = {was!r}, the recipe's is {value!r}; give it another output"
            )
    if stored[1].fingerprint != base.fingerprint:
        raise ValueError(
            f"{folder}: its adapters belong to the weights in {stored[1].path} ({stored[1].fingerprint[:12]}), not to "
            f"those in {base.path} ({base.fingerprint[:12]}); set model.path to them"
        )


def _trained(model: Transformer) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: everything, but of one with adapters these alone."""
    return {n: p.data for n, p in model.named_parameters() if model.adapter is None or p.requires_grad}


def _optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = {name: optimizer.state.get(p, {}) for name, p in model.named_parameters() if p.requires_grad}
    return {f"{key}/{name}": value for name, state in states.items() for key, value in state.items()}


def _whole(folder: Path, ranks: int, name: str) -> Tensor:
    """One of a model's tensors, out of the files that `ranks` ranks wrote."""
    parts = []
    for rank in range(ranks):
        with _open(folder / _shard_name("model", rank)) as shard:
            parts.append(shard.get_tensor(name))
    return torch.cat(parts)


def _fill(folder: Path, kind: str, ranks: int, tensors: Mapping[str, Tensor], others: Collection[str] = ()) -> None:
    """Copy the rows that are here of each tensor out of the files that `ranks` ranks wrote. They hold `others` too."""
    for rank in range(ranks):
        file = folder / _shard_name(kind, rank)
        with _open(file) as shard:
            if odd := set(shard.keys()) ^ {*tensors, *others}:
                raise ValueError(f"{file}: tensors do not match the model's, for example {min(odd)!r}")
            for name, tensor in tensors.items():
                if not tensor.dim():
                    continue  # a count, the same on every rank
                stored = shard.get_slice(name)
                begin, end = shard_bounds(tensor.shape[0], rank, ranks)
                if tuple(stored.get_shape()) != (expected := (end - begin, *tensor.shape[1:])):
                    raise ValueError(f"{file}: {name!r} has shape {tuple(stored.get_shape())}, expected {expected}")
                local, first = local_part(tensor)
                low, high = max(begin, first), min(end, first + local.shape[0])
                if low < high:
                    local[low - first : high - first] = stored[low - begin : high - begin]


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def _steps(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8))


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _shard_name(kind: str, rank: int) -> str:
    return f"{kind}-{rank:05d}.safetensors"


def _crc32(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
