"""What a checkpoint of adapters says of them: their shape, and the frozen weights that they belong to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmill.trainer import shards
from tokenmill.trainer.config import ConfigError, build
from tokenmill.trainer.distributed import World
from tokenmill.trainer.model.config import AdapterConfig, ModelConfig
from tokenmill.trainer.model.weights import read_hf_config
from tokenmill.trainer.shards import MANIFEST, read_manifest, shard_name


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
                sums[i] = shards.crc32(files[i])
            facts = [(f.name, f.stat().st_size, crc) for f, crc in zip(files, world.sum(sums).tolist(), strict=True)]
        return Base(str(folder.resolve()), hashlib.sha256(json.dumps(facts).encode()).hexdigest())


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
    with shards.open_shard(folder / shard_name("model", 0)) as shard:
        names = sorted(shard.keys())
    return {name: shards.whole(folder, ranks, name) for name in names}


def hugging_face_base(folder: Path, base: Base, named: str | None = None) -> str | None:
    """What PEFT is to call the base of the adapters in `folder`: as `named`, a Hugging Face folder of its shape or a
    name on the hub; else its own path, None where a checkpoint of ours is there.

    Raises ValueError naming the folder that is none of Hugging Face's, or has another shape.
    """
    if named is None:
        return None if (Path(base.path) / MANIFEST).is_file() else base.path
    if (there := Path(named)).exists():
        config, ours = read_hf_config(there), build(ModelConfig, read_manifest(folder).get("model") or {}, "model.")
        for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "moe"):
            if (theirs := getattr(config, key)) != (expected := getattr(ours, key)):
                raise ValueError(f"{there}: its model has {key} = {theirs}, that beneath the adapters {expected}")
    elif named.count("/") > 1 or named.startswith((".", "/", "~")):
        raise ValueError(
            f"{named}: no such folder; expected one of Hugging Face's, or a name on the hub, as owner/name"
        )
    return named


def check_base(folder: Path, base: Base) -> None:
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


def check_adapter(folder: Path, adapter: AdapterConfig | None, base: Base | None) -> None:
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
