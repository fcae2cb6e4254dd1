"""Every way of training on the same tokens and from the same weights, in turn: ours, and TRL's where it is installed.

    cpt         all tokens of a document are learned
    sft         its answers alone; and again with NEFTune's noise
    dpo         the same rows as preference pairs, both answers behind one copy of their prompt
    lora        sft of adapters on every projection
    qlora       with the frozen weights in 4 bits

A document is a pair without its chosen answer's end: prompt[:-1], chosen, rejected, the rows that our dpo computes. Tokens
a second are of these rows on every side, whatever it makes of them: TRL reads a prompt once for each answer. What the
reference says of the answers is computed before, on both sides. Losses are compared at every step of a first round, in
which nothing is timed but memory is watched: on a GPU by its allocator, on a CPU by PyTorch's events of every
tensor that is allocated and freed, the weights included.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from tokenmill.bench import step
from tokenmill.bench.step import NO_ROUTING, OURS, Precision, Steps
from tokenmill.data.batch import IGNORE, Batch
from tokenmill.data.loader import PART_BITS
from tokenmill.data.unfold import unfold
from tokenmill.trainer.config import (
    DataSection,
    DpoSection,
    ModelSection,
    OptimizerSection,
    Recipe,
    StreamSection,
    TrainSection,
)
from tokenmill.trainer.distributed import join, pick_device
from tokenmill.trainer.loop import build_model
from tokenmill.trainer.model import Transformer, lora
from tokenmill.trainer.model.config import AdapterConfig
from tokenmill.trainer.model.peft import save_peft
from tokenmill.trainer.model.recompute import Recompute
from tokenmill.trainer.model.weights import load_hf, save_hf
from tokenmill.trainer.objectives import Dpo, Objective, Sft, pretrain
from tokenmill.trainer.objectives.dpo import answer_logprobs

Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected
LORA = AdapterConfig(rank=16)


@dataclass(frozen=True)
class Way:
    """A way of training."""

    name: str
    objective: Literal["pretrain", "sft", "dpo"]
    neftune_alpha: float = 0.0
    adapter: AdapterConfig | None = None

    @property
    def loss(self):  # noqa: ANN201
        return replace(NO_ROUTING, neftune_alpha=self.neftune_alpha)


WAYS = {
    "cpt": [Way("cpt", "pretrain")],
    "sft": [Way("sft", "sft"), Way("sft, NEFTune", "sft", neftune_alpha=5.0)],
    "dpo": [Way("dpo", "dpo")],
    "lora": [Way("lora", "sft", adapter=LORA)],
    "qlora": [Way("qlora", "sft", adapter=replace(LORA, quantise="nf4"))],
}
