"""How likely a model finds texts after a prompt: the prompt is computed once for all of its continuations.

Each prompt but for its last token is a segment of the flat axis, and each continuation another, which begins with a
copy of that token and sees the prompt's keys before its own (`layout.keys`). So a continuation costs its own length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from tokenmill.data.batch import Batch
from tokenmill.kernels.layout import IGNORE, Layout
from tokenmill.trainer.distributed import World
from tokenmill.trainer.model import Transformer

Ids = Sequence[int]


class Likelihood(NamedTuple):
    """Of a text after another."""

    logprob: float  # the sum over its tokens, nats
    greedy: bool  # whether each of them is the most likely one


def continuation_logprobs(
    model: Transformer,
    prefixes: Sequence[Ids],
    continuations: Sequence[Sequence[Ids]],
    *,
    tokens_per_batch: int = 8192,
    progress: bool = False,
    world: World | None = None,
) -> list[list[float]]:
    """`likelihoods`, without whether they are greedy."""
    options = dict(tokens_per_batch=tokens_per_batch, progress=progress, world=world)
    found = likelihoods(model, prefixes, continuations, **options)  # type: ignore[arg-type]
    return [[likelihood.logprob for likelihood in row] for row in found]


@torch.no_grad()
def likelihoods(
    model: Transformer,
    prefixes: Sequence[Ids],
    continuations: Sequence[Sequence[Ids]],
    *,
    tokens_per_batch: int = 8192,
    progress: bool = False,
    world: World | None = None,
) -> list[list[Likelihood]]:
    """For each prefix, how likely each of its continuations is.

    Prefixes go through the model with their continuations, longest first, in batches of at most `tokens_per_batch`
    tokens (a longer one is a batch of its own), on the model's device. Results are in the order given, and the same
    whatever the batches, up to rounding. The ranks of a `world` call this together, share the batches and all get all
    results.

    Raises ValueError where a prefix or a continuation is empty, or together they exceed the model's positions.
    """
    world = world or World()
    most = model.config.max_positions
    for i, (prefix, options) in enumerate(zip(prefixes, continuations, strict=True)):
        if not len(prefix) or not all(map(len, options)):
            raise ValueError(f"prefix {i} or one of its continuations is empty: each needs a token")
        if len(prefix) - 1 + max(map(len, options), default=0) > most:
            longest = max(map(len, options))
            raise ValueError(
                f"prefix {i} has {len(prefix)} tokens, which with a continuation of {longest} exceeds the model's "
                f"{most} positions: shorten it"
            )
    device = next(model.parameters()).device
    sizes = [len(prefix) - 1 + sum(map(len, options)) for prefix, options in zip(prefixes, continuations, strict=True)]
    bounds = np.cumsum([0, *map(len, continuations)])
    found = torch.zeros(2, int(bounds[-1]), dtype=torch.float64)  # log-probabilities, and tokens that are not greedy
    groups = list(batches(sizes, tokens_per_batch))
    with tqdm(total=len(prefixes), desc="score", unit="prompt", disable=not progress) as bar:
        for turn in range(0, len(groups), world.size):
            # A sharded model runs on all ranks or on none: those without a batch run a ghost.
            group = groups[turn + world.rank] if turn + world.rank < len(groups) else []
            batch = Batch.ghost()
            if group:
                batch = shared_prefixes([prefixes[i] for i in group], [continuations[i] for i in group])
            moved = batch.to(device)
            hidden = model(moved.tokens, moved.layout).hidden
            output = model.head.loss(hidden, moved.targets, token_weights=moved.weights, rows=moved.target_rows)
            rows = torch.stack([-output.nll.double(), (~output.correct).double()]).cpu()
            # Summed on the host: on a GPU the order of additions into one place is not fixed.
            sums = iter([part.sum(1) for part in rows.split(batch.layout.cu_seqlens.diff().tolist(), 1)])
            for i in group:
                next(sums)  # the prefix's own segment has no targets
                for continuation in range(bounds[i], bounds[i + 1]):
                    found[:, continuation] = next(sums)
            bar.update(sum(map(len, groups[turn : turn + world.size])))
    logprobs, misses = world.sum(found.to(device)).tolist()
    flat = [Likelihood(logprob, not missed) for logprob, missed in zip(logprobs, misses, strict=True)]
    return [flat[begin:end] for begin, end in pairwise(bounds.tolist())]


def batches(sizes: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of items of these sizes, longest first, in groups of at most `tokens` in all; a larger item is alone.

    Items of one length together keep the kernels' tiles full, and the first group shows whether memory suffices.
    """
    group: list[int] = []
    total = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if group and total + sizes[i] > tokens:
            yield group
            group, total = [], 0
        group.append(i)
        total += sizes[i]
    if group:
        yield group


def shared_prefixes(prefixes: Sequence[Ids], continuations: Sequence[Sequence[Ids]]) -> Batch:
    """The batch, on the CPU: of each prefix (L tokens) a segment of its first L - 1, perhaps empty, and then a segment
    for each continuation, whose rows have its tokens as targets."""
    tokens: list[int] = []
    targets: list[int] = []
    for prefix, options in zip(prefixes, continuations, strict=True):
        tokens += prefix[:-1]
        targets += [IGNORE] * (len(prefix) - 1)
        for option in options:
            tokens += [prefix[-1], *option[:-1]]
            targets += option
    wanted = torch.tensor(targets)
    weights = (wanted != IGNORE).float()
    branches = [list(map(len, options)) for options in continuations]
    layout = Layout.branching([len(prefix) - 1 for prefix in prefixes], branches)
    return Batch(
        torch.tensor(tokens, dtype=torch.int32),
        wanted,
        weights,
        weights.nonzero()[:, 0].int(),
        torch.zeros(len(layout.document_ids), dtype=torch.int32),
        layout,
    )
