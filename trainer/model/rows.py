"""Which rows of a parameter are here: all of them, or under FSDP this rank's."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(parameter: Tensor) -> tuple[Tensor, int]:
    """The part of a parameter that this process holds, and where it begins along the first dimension."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    mesh = parameter.device_mesh
    return parameter.to_local(), shard_bounds(parameter.shape[0], mesh.get_local_rank(), mesh.size())[0]


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """The same, of the parameter seen as a matrix (rows, columns): columns are the last dimension, 1 of a vector."""
    local, first = local_part(parameter)
    columns = local.shape[-1] if local.dim() > 1 else 1
    rows_each = local.shape[1] if local.dim() > 2 else 1
    return local.view(local.shape[0] * rows_each, columns), first * rows_each


def shard_bounds(length: int, rank: int, size: int) -> tuple[int, int]:
    """[begin, end) of a first dimension of `length` on `rank` of `size`: FSDP2's rule, that of `torch.chunk`."""
    each = -(-length // size)
    return min(rank * each, length), min((rank + 1) * each, length)
