"""Preference tuning in the loop: its objective, steps that count pairs, and validation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from tokenmill.data.batch import Batch
from tokenmill.data.loader import StepData
from tokenmill.data.stream import TokenStream
from tokenmill.data.unfold import SEGMENTS, unfold
from tokenmill.kernels.layout import GHOST
from tokenmill.trainer.config import Recipe
from tokenmill.trainer.distributed import World, deal
from tokenmill.trainer.model import Transformer
from tokenmill.trainer.objectives.dpo import Dpo, answer_logprobs
from tokenmill.trainer.reference import fingerprint, reference_logprobs


def check_pairs(recipe: Recipe, streams: Iterable[TokenStream]) -> None:
    """Raises ValueError naming the stream that holds pairs where the objective wants none, or none where it wants them,
    or one that is longer than the sequence: it cannot be cut."""
    wanted = recipe.objective == "dpo"
    longest = recipe.data.sequence_length
    for stream in streams:
        if stream.pairs != wanted:
            holds = "preference pairs, which only objective = 'dpo' learns from"
            if wanted:
                holds = "no preference pairs, which objective = 'dpo' needs: rows with 'chosen' and 'rejected'"
            raise ValueError(f"{stream.folder}: holds {holds}")
        if wanted and stream.lengths.max() > longest:
            over = int((stream.lengths > longest).sum())
            raise ValueError(
                f"{stream.folder}: {over} of {len(stream)} pairs are longer than data.sequence_length = {longest}, and "
                f"a pair is never cut; set it to {stream.lengths.max()}, or leave those rows out of the stream"
            )


def build_dpo(
    recipe: Recipe, model: Transformer, world: World, sources: Sequence[TokenStream], validation: Sequence[TokenStream]
) -> tuple[Dpo, list[Dpo]]:
    """The objective on the sources together, and one for each stream to validate on. `model`, as it is now, is their
    reference, adapters included where it has any."""
    if recipe.dpo.loss == "simpo":
        return Dpo(recipe.dpo, None), [Dpo(recipe.dpo, None) for _ in validation]
    weights = fingerprint(model, world, recipe.train.precision)
    data = recipe.data
    tables = [
        reference_logprobs(
            model,
            weights,
            stream,
            sequence_length=data.sequence_length,
            tokens_per_batch=data.sequence_length * data.packs_per_micro_batch,
            world=world,
        )
        for stream in [*sources, *validation]
    ]
    held_out = [Dpo(recipe.dpo, [table], world.device) for table in tables[len(sources) :]]
    return Dpo(recipe.dpo, tables[: len(sources)], world.device), held_out


def unfold_step(data: StepData) -> StepData:
    """A step whose batches are unfolded, and whose weight is its number of pairs."""
    pairs = data.total_documents
    return replace(
        data,
        micro_batches=[unfold(batch) for batch in data.micro_batches],
        total_weight=float(pairs),
        total_tokens=data.total_tokens - 2 * pairs,  # the answers' EOS are no rows
    )


@torch.no_grad()
def mean_preferences(model: Transformer, objective: Dpo, batches: Iterable[Batch], world: World) -> tuple[float, float]:
    """Mean loss and accuracy of a pair over `batches` of pairs' documents; NaN where there is none."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)  # of losses, of right ones, of pairs
    for batch in deal(batches, world):
        batch = unfold(batch).to(world.device)
        logps, _ = answer_logprobs(model, batch)
        losses, rewards = objective.pair_losses(logps, batch)
        real = (batch.layout.document_ids[::SEGMENTS] != GHOST).double()
        correct = rewards[:, 0] > rewards[:, 1]
        sums += (torch.stack([losses, correct.double(), torch.ones_like(losses)]) * real).sum(1)
    loss, correct, pairs = world.sum(sums).tolist()
    return (loss / pairs, correct / pairs) if pairs else (math.nan, math.nan)
