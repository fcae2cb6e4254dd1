"""Supervised fine-tuning: the same loss on answers only (the stream's loss mask), with NEFTune's noise."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.data.batch import Batch
from tokenmill.kernels.embedding import Noise
from tokenmill.trainer.model import Transformer
from tokenmill.trainer.objectives.pretrain import StepContext, StepLoss, pretrain


@dataclass(frozen=True)
class Sft:
    """NEFTune (Jain et al., 2023): uniform noise on the embeddings, a function of seed, step, document and place."""

    seed: int

    def __call__(self, model: Transformer, batch: Batch, context: StepContext) -> StepLoss:
        alpha = context.loss.neftune_alpha
        noise = Noise(alpha=alpha, seed=self.seed, step=context.step) if alpha else None
        return pretrain(model, batch, context, noise=noise)
