"""Everything that a resumed run needs beside the weights and the optimizer's moments."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

_TENSORS = ("expert_fractions", "balance_bias")


@dataclass
class TrainState:
    """The learning rate, the noise and the order of the data are functions of these, so nothing else is kept: there
    is no random state.
    """

    step: int = 0  # optimizer steps done, skipped ones included
    tokens: int = 0  # rows of real documents seen, over all ranks
    skipped: int = 0  # steps whose loss or gradient was not finite
    data: dict[str, Any] | None = None  # the loader's: samples consumed, seed, fingerprint
    expert_fractions: Tensor | None = None  # (layers, E) fp32: share of choices of each expert in the previous step
    balance_bias: Tensor | None = None  # (layers, E) fp32: added to the routers' probabilities for the choice
    reference: str | None = None  # the fingerprint of the model that preference tuning compares with

    def to_json(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return asdict(self) | {name: None if t is None else t.tolist() for name, t in tensors.items()}

    @staticmethod
    def from_json(raw: dict[str, Any]) -> TrainState:
        """Bitwise what `to_json` was given: JSON keeps every bit of a number."""
        state = TrainState(**raw)
        for name in _TENSORS:
            setattr(state, name, None if raw.get(name) is None else torch.tensor(raw[name]))
        return state
