"""Continued pre-training: next-token prediction, and with experts the losses that keep routing healthy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tokenmill.data.batch import Batch
from tokenmill.kernels.embedding import Noise
from tokenmill.kernels.moe import Routing
from tokenmill.trainer.config import LossSection
from tokenmill.trainer.model import Transformer


@dataclass(frozen=True)
class StepContext:
    """What a micro-batch must know of its whole optimizer step, so that how it was cut changes nothing."""

    step: int
    total_weight: float  # of the targets of all micro-batches and ranks; of preferences, the number of pairs
    total_tokens: int  # rows of real documents, likewise
    expert_fractions: Tensor | None  # (layers, E): share of the tokens that each expert got in the previous step
    loss: LossSection


@dataclass(frozen=True)
class StepLoss:
    total: Tensor  # () what to call backward on: this micro-batch's share of the step's loss
    language: Tensor  # () detached: its share of the mean negative log-likelihood of a target, or loss of a pair
    balance: Tensor  # () detached: likewise of the load-balancing loss, 1 when balanced
    expert_counts: Tensor | None  # (layers, E) detached: tokens that each expert got
    router_entropy: Tensor | None  # (layers,) detached: its share of the mean entropy of a token's routing, nats
    preference: Tensor | None = None  # (3,) detached: of the mean rewards, chosen and rejected, and of the accuracy


class Objective(Protocol):
    def __call__(self, model: Transformer, batch: Batch, context: StepContext) -> StepLoss: ...


def pretrain(model: Transformer, batch: Batch, context: StepContext, *, noise: Noise | None = None) -> StepLoss:
    """`sum(weights * nll) / W` over the whole step, plus routing losses.

    Load balancing (Fedus et al., 2021, equation 4): `E * sum_e f_e P_e`, averaged over layers, with `P_e` the mean
    router probability and `f_e` the share of tokens of expert e *in the previous optimizer step*, over all its
    micro-batches and ranks: the exact gradient of this step's own f would need micro-batches that are still to come.
    Router z-loss (Zoph et al., 2022, equation 5): the mean squared log-sum-exp of the routers' logits.
    """
    hidden, routing = model(batch.tokens, batch.layout, noise=noise)
    output = model.head.loss(
        hidden,
        batch.targets,
        token_weights=batch.weights / context.total_weight,
        rows=batch.target_rows,
        z_loss=context.loss.z,
    )
    language = (output.nll * batch.weights).sum() / context.total_weight
    return step_loss(output.loss, language, routing, context)


def step_loss(
    loss: Tensor, language: Tensor, routing: tuple[Routing, ...], context: StepContext, preference: Tensor | None = None
) -> StepLoss:
    """An objective's loss with those that keep routing healthy, if there are experts, and what a step reports."""
    balance = loss.new_zeros(())
    counts = entropy = None
    if routing:
        balance = balance_loss(routing, context.expert_fractions) / context.total_tokens
        router_z = torch.stack([r.lse_squared_sum for r in routing]).mean() / context.total_tokens
        loss = loss + context.loss.balance * balance + context.loss.router_z * router_z
        counts = torch.stack([r.counts for r in routing]).detach()
        entropy = torch.stack([r.entropy_sum for r in routing]).detach() / context.total_tokens
    return StepLoss(loss, language, balance.detach(), counts, entropy, preference)


def balance_loss(routing: tuple[Routing, ...], fractions: Tensor | None) -> Tensor:
    """`E * sum_e f_e * sum_t p_te`, the mean over layers; `fractions` (layers, E), None: even."""
    probability_sums = torch.stack([r.probability_sums for r in routing])
    if fractions is None:  # the first step: even shares, whose loss is constant and pulls nowhere
        return probability_sums.sum(1).mean()
    return probability_sums.shape[1] * (fractions * probability_sums).sum(1).mean()
