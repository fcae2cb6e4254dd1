"""Processes and sharding: beside the model, never in it.

Under `torchrun` every process holds a shard of each parameter (FSDP2: Zhao et al., 2023): a block's weights are
gathered when it runs, its gradients summed and scattered when it is done. The losses are already divided by the whole
step's weight, so gradients are summed over ranks, not averaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from tokenmill.data.batch import Batch
from tokenmill.data.files import locked
from tokenmill.trainer.model import Transformer

# How long a rank waits for the others: they may be writing or checking a large checkpoint. One that fails does not
# keep them waiting, since torchrun then ends them all.
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class World:
    """This process among the others of a run; alone unless told otherwise."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None  # None: a single process that shards nothing

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> list[Tensor]:
        """Each rank's values, all of one shape, in the order of ranks."""
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        if self.size == 1:
            return [values]
        dist.all_gather(gathered, values)
        return gathered

    def any(self, flag: bool) -> bool:
        """Whether it is true on a rank."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item())

    def first(self, number: int) -> int:
        """Rank 0's number."""
        return int(self.sum(torch.tensor(number if self.rank == 0 else 0, device=self.device)).item())

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def __str__(self) -> str:
        return f"{self.size} x {self.device.type}"


@contextmanager
def join(device: str, *, sharded: bool = False) -> Iterator[World]:
    """Join the processes that `torchrun` started (without it: a world of one), and leave them at the end; after an
    error, whose traceback then names the rank, without waiting for the others. Within another `join`, its group is
    used: torchrun's store serves for one.

    `device`: auto (a GPU where there is one), cpu or cuda. `sharded` makes a mesh even of one process, for what only
    sharding offers. Raises ValueError where the device is not there.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    kind = pick_device(device).type
    local = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(local)
    if size == 1 and not sharded:
        yield World(rank, size, local, None)
        return
    if dist.is_initialized():
        yield World(rank, size, local, init_device_mesh(kind, (size,), mesh_dim_names=("shard",)))
        return
    group: dict[str, Any] = dict(backend="gloo") if kind == "cpu" else dict(backend="nccl", device_id=local)
    if "RANK" not in os.environ:
        group |= dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(timeout=PATIENCE, **group)
    try:
        yield World(rank, size, local, init_device_mesh(kind, (size,), mesh_dim_names=("shard",)))
    except SystemExit:  # all leave together
        dist.destroy_process_group()
        raise
    except BaseException as error:
        error.add_note(f"on rank {rank} of {size}")
        if size == 1:  # others may sit in a collective, for which NCCL would wait: leaving ends this process instead
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def alone(output: Path, world: World) -> Iterator[None]:
    """Nothing else that trains writes into a run's output folder, or all ranks say that something does."""
    with locked(output) if world.rank == 0 else nullcontext(True) as free:
        if world.any(not free):
            raise ValueError(
                f"{output}: another run is writing into it; wait until it has ended, stop it, or choose another output"
            )
        yield


def deal(batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    """Every world-th of the batches, a ghost where this rank has none: a sharded model runs on all ranks or on none."""
    for turn in zip_longest(*[iter(batches)] * world.size):
        yield turn[world.rank] or Batch.ghost()


def pick_device(name: str) -> torch.device:
    """`auto`: a GPU where there is one. Raises ValueError where the device is not known or not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no GPU; set device to auto or cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def shard(model: Transformer, world: World, precision: str) -> None:
    """FSDP2, one block a unit. The head is a unit of its own: its forward is the whole loss of a micro-batch, so it is
    gathered once for all of the loss's chunks.
    """
    if world.mesh is None:
        return
    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        model.choose_backends(world.device, torch.bfloat16)
    for unit in [model.embed, *model.blocks, model.head, model]:
        # Also the root, which by default stays whole until a backward that validation never makes.
        fully_shard(unit, mesh=world.mesh, mp_policy=policy, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Not a reduction that multiplies by the factor on the way, which gloo lacks and NCCL would do in vain.
            module.set_force_sum_reduction_for_comms(True)
