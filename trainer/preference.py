"""Preference tuning in the loop: its objective, steps that count pairs, and validation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tokenmill.data.batch import Batch
from tokenmill.data.loader import StepData
from tokenmill.data.packing import count_overlong
from tokenmill.data.stream import TokenStream
from tokenmill.data.unfold import SEGMENTS, unfold
from tokenmill.kernels.layout import GHOST
from tokenmill.trainer.config import Recipe
from tokenmill.trainer.distributed import World, deal
from tokenmill.trainer.model import Transformer
from tokenmill.trainer.objectives.dpo import Dpo, answer_logprobs
from tokenmill.trainer.reference import fingerprint, reference_logprobs
from tokenmill.trainer.shards import read_manifest
from tokenmill.trainer.state import TrainState


def check_pairs(recipe: Recipe, streams: Iterable[TokenStream]) -> None:
    """Raises ValueError naming the stream that holds pairs where the objective wants none, or none where it wants them,
    or one that is longer than the sequence, where that is not to be rejected: it cannot be cut."""
    wanted = recipe.objective == "dpo"
    longest = recipe.data.sequence_length
    for stream in streams:
        if stream.pairs != wanted:
            holds = "preference pairs, which only objective = 'dpo' learns from"
            if wanted:
                holds = "no preference pairs, which objective = 'dpo' needs: rows with 'chosen' and 'rejected'"
            raise ValueError(f"{stream.folder}: holds {holds}")
        if wanted and recipe.overlong != "reject" and (over := count_overlong(stream, longest)):
            raise ValueError(
                f"{stream.folder}: {over:,} of {len(stream):,} pairs are longer than data.sequence_length = {longest}, "
                f"and a pair is never cut; set it to {stream.lengths.max()}, or leave them out by data.overlong = "
                "'reject'"
            )


def reference_of(recipe: Recipe, model: Transformer, world: World, checkpoint: Path | None) -> str | None:
    """The fingerprint of the reference, which is `model` as it is now, adapters included where it has any; None where
    the loss needs none. `checkpoint`: the one that the run goes on from.

    Raises ValueError where that was trained against another: the model that a recipe names may have changed since.
    """
    if recipe.dpo.loss == "simpo":
        return None
    found = fingerprint(model, world, recipe.train.precision)
    state = read_manifest(checkpoint).get("state") if checkpoint is not None else None
    if state and (was := TrainState.from_json(state).reference) not in (None, found):
        raise ValueError(
            f"{checkpoint}: its reference was {was[:12]}, the recipe's is {found[:12]}: model.path, adapter or "
            f"train.precision is another, or what lies there has changed; name what it began from (`tokenmill inspect "
            f"{checkpoint}` tells), or give the recipe another output"
        )
    return found


def left_out(recipe: Recipe, validation: Iterable[TokenStream]) -> list[str]:
    """A line for each stream to validate on of which pairs are left out."""
    longest = recipe.data.sequence_length
    return [
        f"{stream.folder}: {over:,} of {len(stream):,} pairs have more than {longest:,} tokens: not validated on"
        for stream in validation
        if recipe.objective == "dpo" and (over := count_overlong(stream, longest))
    ]


def build_dpo(
    recipe: Recipe,
    model: Transformer,
    weights: str | None,
    world: World,
    sources: Sequence[TokenStream],
    validation: Sequence[TokenStream],
) -> tuple[Dpo, list[Dpo]]:
    """The objective on the sources together, and one for each stream to validate on. Their reference is `model`, as it
    is now, with the fingerprint `weights`; None: they need none."""
    if weights is None:
        return Dpo(recipe.dpo, None), [Dpo(recipe.dpo, None) for _ in validation]
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
