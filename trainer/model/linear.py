"""A product with a weight, as it is trained: whole, or frozen in 4 bits, with or without an adapter beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmill.trainer.model.quantise import dense


class Linear(nn.Module):
    """x W^T of rows x (T, inputs), without a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.adapters = nn.ModuleDict()  # of `weight`, if it has one: see lora.py

    def forward(self, x: Tensor) -> Tensor:
        return product(self, "weight", x)


def product(
    owner: nn.Module,
    name: str,
    x: Tensor,
    grouped: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """x times the owner's weight of that name (outputs, inputs), and times its adapter's. With `offsets` (E,), the ends
    of the experts' rows, the weight is a stack of theirs, and `grouped` the product that takes each row to its own.
    """

    def linear(rows: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(rows, matrix) if grouped is None or offsets is None else grouped(rows, matrix, offsets)

    weight = dense(getattr(owner, name), x.dtype)
    y = linear(x, weight)
    adapters = owner.adapters
    assert isinstance(adapters, nn.ModuleDict)
    return adapters[name](x, y, weight, linear, offsets) if name in adapters else y
