"""Preference tuning: the better of two answers to a prompt is made likelier than the other."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.data.batch import Batch
from tokenmill.data.loader import PART_BITS
from tokenmill.data.unfold import SEGMENTS
from tokenmill.kernels.layout import GHOST
from tokenmill.trainer.config import DpoSection
from tokenmill.trainer.model import Transformer
from tokenmill.trainer.objectives.pretrain import StepContext, StepLoss, step_loss


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """(P,): one loss a pair, of the log-probabilities (P,) of whole answers, summed over their tokens.

    With h the log-ratio of policy and reference for the chosen answer, less that for the rejected one:
    sigmoid: `-log sigmoid(beta h)` (Rafailov et al., 2023, equation 7); with `label_smoothing` e, the share of pairs
    taken to be the wrong way round, `-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)` (conservative DPO,
    Mitchell, 2023); ipo: `(h - 1 / (2 beta))^2` (Azar et al., 2023, equation 17, beta its tau).

    Raises ValueError where beta or label_smoothing is out of range, or the latter is given to ipo.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}, expected a positive number")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and kind != "sigmoid"):
        raise ValueError(f"label_smoothing is {label_smoothing}: expected 0 to below 0.5, and 0 unless kind is sigmoid")
    h = (policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps)
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def simpo_loss(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, *, beta: float, gamma: float) -> Tensor:
    """(P,): `-log sigmoid(beta (chosen - rejected) - gamma)` of mean log-probabilities a token (P,), without a
    reference (Meng et al., 2024, equation 6)."""
    return -F.logsigmoid(beta * (chosen_mean_logps - rejected_mean_logps) - gamma)


def answer_logprobs(model: Transformer, batch: Batch) -> tuple[Tensor, tuple]:
    """(P, 2) log-probabilities of the chosen and the rejected answer of each pair of an unfolded batch, summed over
    tokens in fp64, where their differences are exact enough; and the layers' routing."""
    hidden, routing = model(batch.tokens, batch.layout)
    logprobs = model.head.logprobs(hidden, batch.targets, rows=batch.target_rows)
    return _sums(logprobs.double(), batch)[:, 1:], routing


def _sums(rows: Tensor, batch: Batch) -> Tensor:
    """(P, SEGMENTS): of the values (T,) on each segment's rows."""
    offsets = batch.layout.cu_seqlens.long()
    return torch.segment_reduce(rows, "sum", offsets=offsets, unsafe=True).view(-1, SEGMENTS)


class Dpo:
    """`reference`: (documents, 2) fp64 for each source, what `answer_logprobs` says of the model that training began
    from; None for a loss that has none. One copy of all of it is kept on `device`.
    """

    def __init__(self, section: DpoSection, reference: list[Tensor] | None, device: torch.device | str = "cpu") -> None:
        self.section = section
        self.reference = self._first = None
        if reference is not None:
            sizes = torch.tensor([0, *(len(table) for table in reference)])
            self._first = sizes.cumsum(0)[:-1].to(device)
            self.reference = torch.cat(reference).to(device)

    def __call__(self, model: Transformer, batch: Batch, context: StepContext) -> StepLoss:
        """Of an unfolded batch, in a step of `context.total_weight` pairs."""
        logps, routing = answer_logprobs(model, batch)
        loss, rewards = self.pair_losses(logps, batch)
        share = (batch.layout.document_ids[::SEGMENTS] != GHOST) / context.total_weight  # of the step's mean
        total = (loss * share).sum()
        correct = (rewards[:, 0] > rewards[:, 1]).to(rewards.dtype)
        preference = torch.cat([rewards, correct[:, None]], 1).mul(share[:, None]).sum(0)
        return step_loss(total, total.detach(), routing, context, preference=preference)

    def pair_losses(self, logps: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(P,) losses of answers' log-probabilities (P, 2), and detached (P, 2) rewards: `beta` times the log-ratio
        with the reference, or for simpo the mean log-probability a token. ipo, too, takes means a token: its paper does
        not say so, but the practice is that, since its square would grow with the answers."""
        section = self.section
        tokens = _sums(batch.weights.double(), batch)[:, 1:].clamp(min=1)  # a ghost has none
        if section.loss == "simpo":
            means = logps / tokens
            loss = simpo_loss(*means.unbind(1), beta=section.beta, gamma=section.gamma)
            return loss, section.beta * means.detach()
        reference = self._of_batch(batch)
        scale = tokens if section.loss == "ipo" else 1.0
        loss = dpo_loss(
            *(logps / scale).unbind(1),
            *(reference / scale).unbind(1),
            beta=section.beta,
            kind=section.loss,
            label_smoothing=section.label_smoothing,
        )
        return loss, section.beta * (logps.detach() - reference)

    def _of_batch(self, batch: Batch) -> Tensor:
        """(P, 2)."""
        assert self.reference is not None
        assert self._first is not None
        ids = batch.layout.document_ids[::SEGMENTS].clamp(min=0)  # a ghost's is not looked at
        return self.reference[self._first[ids >> PART_BITS] + (ids & (1 << PART_BITS) - 1)]
