"""Generation: prompts to the tokens that follow them, the most likely ones or drawn at random, from cached keys.

All sequences advance together, a token a pass, on the flat axis: nothing is padded, a sequence that has ended leaves,
and prompts that wait take its place as soon as the cache has room for them. What neighbouring prompts begin with, such
as the worked examples before a question, is computed once for all of them.

The random number that draws a token is a pure function of (seed, prompt, sample, position), by Philox4x32-10 (Salmon et
al. 2011), so that it does not depend on which sequences were computed together:

    key  = the first two words of philox(counter = ("SAMP", 0, 0, 0), key = (seed, seed >> 32))
    word = the first word of philox(counter = (prompt, prompt >> 32, sample, position), key)
    u    = (word + 0.5) / 2**32                                     uniform in (0, 1)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tokenmill.kernels.philox import halves, philox
from tokenmill.trainer.model.cache import Cache, Group
from tokenmill.trainer.model.transformer import Transformer

ROWS = 512  # whose logits are in memory at once
SEEN = 8  # times `tokens_per_batch`: how many keys of a layer the sequences that share some may see together
_SAMP = 0x53414D50  # "SAMP": keeps this use of a seed apart from any other


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the most likely (temperature 0), or drawn from softmax(logits / temperature), cut to its
    nucleus, the fewest tokens whose probabilities reach `top_p` (Holtzman et al., 2020).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: expected 0 (the most likely token) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected a probability above 0, at most 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: expected 0 to 2**63 - 1")


GREEDY = Sampling()


class Step(NamedTuple):
    """What one pass gave: a new token for each of some sequences, number prompt * samples + sample."""

    sequences: NDArray[np.int64]  # (n,)
    tokens: NDArray[np.int64]  # (n,)
    stopped: NDArray[np.bool_]  # (n,) whether it is a stop id, which is not part of the answer
    ended: NDArray[np.bool_]  # (n,) whether the sequence ends here, by a stop id or its length; set, it ends too


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Collection[int] = (),
    sampling: Sampling = GREEDY,
    samples: int = 1,
    tokens_per_batch: int = 8192,
    numbers: Sequence[int] | None = None,
    progress: bool = False,
) -> list[list[list[int]]]:
    """The tokens that follow each prompt, `samples` times: [prompt][sample] -> ids, up to but without a stop id.

    At most `tokens_per_batch` tokens of prompts are computed at once, and at most as many keys a layer are cached; a
    prompt that needs more, with all its samples, begins when nothing else does. Neighbouring prompts that begin alike
    share that beginning, in groups of at most half as much. `numbers` are what the prompts are
    called in random numbers, None: 0, 1, ... Waits for the device once a token.

    Raises ValueError where a prompt is empty, holds an id that is not in the vocabulary or, with the new tokens,
    exceeds the model's positions; and where logits are not finite.
    """
    options = dict(max_new_tokens=max_new_tokens, stop=stop, sampling=sampling, samples=samples, numbers=numbers)
    steps = []
    with tqdm(total=len(prompts) * samples, desc="generate", unit="answer", disable=not progress) as bar:
        for step in stream(model, prompts, **options, tokens_per_batch=tokens_per_batch):  # type: ignore[arg-type]
            steps.append(step)
            bar.update(int(step.ended.sum()))
    none = np.zeros(0, np.int64)
    sequences = np.concatenate([none, *(step.sequences[~step.stopped] for step in steps)])
    tokens = np.concatenate([none, *(step.tokens[~step.stopped] for step in steps)])
    counts = np.bincount(sequences, minlength=len(prompts) * samples)
    answers = np.split(tokens[np.argsort(sequences, kind="stable")], np.cumsum(counts)[:-1])
    return [[answers[i * samples + s].tolist() for s in range(samples)] for i in range(len(prompts))]


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Collection[int] = (),
    sampling: Sampling = GREEDY,
    samples: int = 1,
    tokens_per_batch: int = 8192,
    numbers: Sequence[int] | None = None,
) -> Iterator[Step]:
    """The same, as it comes: a `Step` a pass."""
    for name, value in dict(max_new_tokens=max_new_tokens, samples=samples, tokens_per_batch=tokens_per_batch).items():
        if value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")
    ids = [np.asarray(prompt, np.int64) for prompt in prompts]
    for i, prompt in enumerate(ids):
        _check(model, i, prompt, max_new_tokens)
    called = np.arange(len(ids)) if numbers is None else np.asarray(numbers, np.int64)
    if len(called) != len(ids):
        raise ValueError(f"numbers has {len(called)} entries, expected one for each of the {len(ids)} prompts")
    return _steps(model, ids, called, max_new_tokens, stop, sampling, samples, tokens_per_batch)


def _check(model: Transformer, number: int, prompt: NDArray[np.int64], max_new_tokens: int) -> None:
    vocab, most = model.config.vocab_size, model.config.max_positions
    if not len(prompt):
        raise ValueError(f"prompt {number} is empty: give at least one token, such as BOS")
    if not 0 <= prompt.min() <= prompt.max() < vocab:
        wrong = prompt[(prompt < 0) | (prompt >= vocab)][0]
        raise ValueError(f"prompt {number} holds the id {wrong}, the model's vocabulary ends at {vocab - 1}")
    if len(prompt) + max_new_tokens > most:
        raise ValueError(
            f"prompt {number} has {len(prompt)} tokens, which with {max_new_tokens} new ones exceeds the model's "
            f"{most} positions: shorten it, or ask for fewer new tokens"
        )


@torch.no_grad()
def _steps(
    model: Transformer,
    prompts: list[NDArray[np.int64]],
    called: NDArray[np.int64],
    max_new_tokens: int,
    stop: Collection[int],
    sampling: Sampling,
    samples: int,
    tokens_per_batch: int,
) -> Iterator[Step]:
    if not prompts:
        return
    device = next(model.parameters()).device
    stops = np.array(list(stop), np.int64)
    lengths = np.array([len(prompt) for prompt in prompts])
    growth = max_new_tokens - 1  # the last token is never read
    window = model.config.sliding_window
    groups = _groups(prompts, samples, growth, tokens_per_batch)
    cache = Cache(lengths, groups, window, samples=samples, growth=growth, rows=tokens_per_batch, device=device)
    parts = [  # of each group: what is shared, and what follows it in each prompt
        [prompts[first][:shared], *(prompt[shared:] for prompt in prompts[first:end])] for first, end, shared in groups
    ]
    sizes = np.array([sum(map(len, part)) for part in parts])

    waiting = 0  # the first group that has not begun
    sequences = np.zeros(0, np.int64)  # (N,) those that have, and not ended
    tokens = np.zeros(0, np.int64)  # (N,) the last of each
    while waiting < len(groups) or len(sequences):
        begun = len(sequences)
        ends = None
        if count := _how_many(sizes[waiting:], cache.needs[waiting:], tokens_per_batch, cache.free):
            starting = parts[waiting : waiting + count]
            pieces = [piece for part in starting for piece in part]
            of_pass = np.concatenate(pieces)
            layout = cache.begin(waiting, waiting + count)
            first, end = groups[waiting].first, groups[waiting + count - 1].end
            sequences = np.concatenate([sequences, np.arange(first * samples, end * samples)])
            waiting += count
            lasts = np.cumsum([len(piece) for piece in pieces]) - 1
            is_prompt = np.concatenate([np.arange(len(part)) > 0 for part in starting])
            ends = torch.from_numpy(lasts[is_prompt])
        else:
            of_pass, layout, begun = tokens, cache.advance(), 0
        hidden = model(torch.from_numpy(of_pass).int().to(device), layout, cache=cache).hidden
        if ends is not None:  # of a prompt, only the last row is needed, by each of its samples
            hidden = hidden[ends.to(device)].repeat_interleave(samples, 0)

        here, positions = sequences[begun:], cache.positions[begun:]
        chosen = []
        for start in range(0, len(here), ROWS):
            rows = slice(start, start + ROWS)
            of_rows = called[here[rows] // samples], here[rows] % samples, positions[rows]
            chosen.append(choose(model.head.logits(hidden[rows]), sampling, *of_rows))
        new = torch.cat(chosen).cpu().numpy()
        if (new < 0).any():
            prompt = here[new < 0][0] // samples
            raise ValueError(f"prompt {prompt}: the model's logits are not finite; its weights may have diverged")
        stopped = np.isin(new, stops)
        ended = stopped | (positions + 1 == lengths[here // samples] + max_new_tokens)
        yield Step(here, new, stopped, ended)
        going = np.concatenate([np.ones(begun, bool), ~ended])
        cache.keep(going)
        sequences, tokens = sequences[going], np.concatenate([tokens[:begun], new])[going]


def _groups(prompts: list[NDArray[np.int64]], samples: int, growth: int, tokens: int) -> list[Group]:
    """All prompts, in order. One joins the group before it if that saves computing half of it or more, and leaves room
    for another such group: within half of `tokens` rows of the cache, and `SEEN` times as many keys, each counted as
    often as it is seen, for attention gathers what every sequence sees.
    """
    groups = [Group(0, 1, len(prompts[0]) - 1)]
    rows, seen = _alone(prompts[0], samples, growth)  # of the last group
    for i, prompt in enumerate(prompts[1:], 1):
        first, _, before = groups[-1]
        shared = _shared(prompts[first][:before], prompt[:-1])
        members = i - first
        own, own_seen = _alone(prompt, samples, growth)
        grown = rows + (members - 1) * (before - shared) + own - shared
        fits = 2 * grown <= tokens and 2 * (seen + own_seen) <= SEEN * tokens
        if 2 * (members * shared - (members - 1) * before) >= len(prompt) and fits:
            groups[-1], rows, seen = Group(first, i + 1, shared), grown, seen + own_seen
        else:
            groups.append(Group(i, i + 1, len(prompt) - 1))
            rows, seen = own, own_seen
    return [group if group.end - group.first > 1 else group._replace(shared=0) for group in groups]


def _alone(prompt: NDArray[np.int64], samples: int, growth: int) -> tuple[int, int]:
    """Of a prompt by itself: its rows, and the keys that its samples see in the end."""
    return len(prompt) + samples * growth, samples * (len(prompt) + growth)


def _shared(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """How many tokens both begin with."""
    both = min(len(a), len(b))
    differ = np.flatnonzero(a[:both] != b[:both])
    return int(differ[0]) if len(differ) else both


def _how_many(lengths: NDArray[np.int64], needs: NDArray[np.int64], tokens: int, rows: int) -> int:
    """How many of the groups that wait begin now: the first ones, within so many tokens and rows; or the first alone
    where it has more tokens.
    """
    lengths, needs = lengths[:tokens], needs[:tokens]  # each has a token at least
    fits = (np.cumsum(lengths) <= tokens) & (np.cumsum(needs) <= rows)
    return int(fits.sum()) or int((needs[:1] <= rows).sum())


def choose(
    logits: Tensor,
    sampling: Sampling,
    prompts: NDArray[np.int64],
    samples: NDArray[np.int64],
    positions: NDArray[np.int64],
) -> Tensor:
    """A token for each row of logits (n, V), -1 where they are not finite: (n,) int64. Of n sequences, the prompts'
    and samples' numbers, and the positions that the tokens will have.
    """
    highest, most_likely = logits.max(-1)
    finite = highest.isfinite()
    if sampling.temperature == 0:
        return most_likely.where(finite, -1)
    # In float64, in which sums over the vocabulary are exact enough to be searched; relative to the highest logit, so
    # that no temperature is too low to divide by.
    relative = logits.where(finite[:, None], 0).double()
    relative = relative - relative.amax(-1, keepdim=True)
    probabilities = (relative / sampling.temperature).softmax(-1)
    u = uniform(sampling.seed, prompts, samples, positions).to(logits.device)[:, None]
    if sampling.top_p < 1:
        probabilities, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        cumulative = probabilities.cumsum(-1)
        last = torch.searchsorted(cumulative, sampling.top_p * cumulative[:, -1:])
        drawn = ids.gather(-1, torch.searchsorted(cumulative, u * cumulative.gather(-1, last)))
    else:
        cumulative = probabilities.cumsum(-1)
        drawn = torch.searchsorted(cumulative, u * cumulative[:, -1:])
    return drawn[:, 0].where(finite, -1)


def uniform(seed: int, prompts: NDArray[np.int64], samples: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
    """(n,) float64 in (0, 1), on the host: see the top of the file."""
    start = torch.tensor([_SAMP, 0, 0, 0])
    key = philox(list(start), halves(torch.tensor(seed)))
    counter = [*halves(torch.from_numpy(prompts)), torch.from_numpy(samples), torch.from_numpy(positions)]
    word = philox(counter, (key[0], key[1]))[0]
    return (word.double() + 0.5) / 2**32
