"""Everything that a resumed run needs beside the weights and the optimizer's moments."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class TrainState:
    """The learning rate, the noise and the order of the data are functions of these, so nothing else is kept: there
    is no random state.
    """

    step: int = 0  # optimizer steps done, skipped ones included
    tokens: int = 0  # rows of real documents seen, over all ranks
    skipped: int = 0  # steps whose loss or gradient was not finite
    data: dict[str, Any] | None = None  # the loader's: samples consumed, seed, fingerprint
    expert_fractions: Tensor | None = None  # (layers, E) fp32: share of tokens of each expert in the previous step

    def to_json(self) -> dict[str, Any]:
        fractions = None if self.expert_fractions is None else self.expert_fractions.tolist()
        return asdict(self) | {"expert_fractions": fractions}

    @staticmethod
    def from_json(raw: dict[str, Any]) -> TrainState:
        fractions = raw["expert_fractions"]
        state = TrainState(**raw)
        state.expert_fractions = None if fractions is None else torch.tensor(fractions)
        return state
