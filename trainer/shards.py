"""The files of a checkpoint: a manifest that names them with their checksums, and a safetensors file for every rank.

Rank r's file holds its shard of each tensor: rows [begin, end) of the first dimension, by FSDP2's rule. So any number
of ranks can read what any number wrote, each only its own rows.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenmill.trainer.distributed import World
from tokenmill.trainer.model.rows import local_part, shard_bounds

FORMAT = "tokenmill-checkpoint-1"
MANIFEST = "checkpoint.json"


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
    if odd := {shard_name("model", rank) for rank in range(ranks)} - files.keys():
        raise ValueError(f"{path}: says that {ranks} ranks wrote, but lists no {min(odd)}")
    for name in sorted(files):
        if not (file := folder / Path(name).name).is_file():
            raise ValueError(f"{file} is missing")
    return manifest


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
            if (file.stat().st_size, crc32(file)) != (files[name]["bytes"], files[name]["crc32"]):
                raise ValueError(f"{file}: damaged, size or checksum differ from {MANIFEST}'s")
    except (OSError, ValueError) as found:
        error = found
    if world.any(error is not None):
        raise ValueError(str(error or f"{folder}: damaged, as another rank has found")) from error


def whole(folder: Path, ranks: int, name: str) -> Tensor:
    """One of a model's tensors, out of the files that `ranks` ranks wrote."""
    parts = []
    for rank in range(ranks):
        with open_shard(folder / shard_name("model", rank)) as shard:
            parts.append(shard.get_tensor(name))
    return torch.cat(parts)


def fill(folder: Path, kind: str, ranks: int, tensors: Mapping[str, Tensor], others: Collection[str] = ()) -> None:
    """Copy the rows that are here of each tensor out of the files that `ranks` ranks wrote. They hold `others` too."""
    for rank in range(ranks):
        file = folder / shard_name(kind, rank)
        with open_shard(file) as shard:
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


def open_shard(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def shard_name(kind: str, rank: int) -> str:
    return f"{kind}-{rank:05d}.safetensors"


def crc32(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
