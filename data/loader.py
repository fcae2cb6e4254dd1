"""Batches of each optimizer step, for this rank, from weighted streams; and a stream in order, for evaluation.

A sample is a pack of a stream's plan. Step s takes the samples [s * packs_per_step, (s + 1) * packs_per_step) of one
global order, and each rank a slice of them. So the state of the data is a sample number, a seed and a fingerprint, and
a run goes on at any number of ranks with the samples that it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.data.batch import Batch
from tokenmill.data.errors import DataError
from tokenmill.data.mixture import SampleOrder
from tokenmill.data.packing import Plan, cut
from tokenmill.data.stream import TokenStream

PART_BITS = 40  # a document's id in a batch is its source << PART_BITS | its part: the same in every layout


@dataclass(frozen=True)
class Source:
    """A stream and its share of the samples, relative to the other sources'."""

    stream: TokenStream
    weight: float = 1.0

    @property
    def name(self) -> str:
        return self.stream.name


@dataclass(frozen=True)
class StepData:
    """This rank's part of one optimizer step, and totals over all ranks."""

    micro_batches: list[Batch]  # as many on every rank; a ghost where this rank has no sample left
    total_weight: float  # of all targets of the step, over all ranks and micro-batches: what the loss is divided by
    total_tokens: int  # of the step, over all ranks and micro-batches, ghosts not counted
    samples: range  # the global sample numbers of the step, over all ranks


class Loader:
    """Endless: `next(loader)` is the next step. Sources begin again, in another order, when they run out."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        sequence_length: int,
        packs_per_step: int,
        packs_per_micro_batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        samples: int = 0,
    ) -> None:
        """`packs_per_step` counts over all ranks, `packs_per_micro_batch` on one; `samples` were consumed before.

        Raises DataError where there is no source, two were made by different tokenizers, or a number is out of range.
        """
        if not sources:
            raise DataError("no sources to load from: name at least one token stream")
        for name, value in (
            ("packs_per_step", packs_per_step),
            ("packs_per_micro_batch", packs_per_micro_batch),
            ("world", world),
        ):
            if value < 1:
                raise DataError(f"{name} is {value}, expected at least 1")
        if not 0 <= rank < world or samples < 0 or not 0 <= seed < 1 << 64:
            raise DataError(f"rank {rank} of {world}, samples {samples} or seed {seed} is out of range")
        first = sources[0].stream
        for source in sources:
            if not (np.isfinite(source.weight) and source.weight > 0):
                raise DataError(f"{source.stream.folder}: weight {source.weight}, expected a positive number")
            if source.stream.tokenizer_sha256 != first.tokenizer_sha256:
                raise DataError(
                    f"{first.folder} was made by tokenizer {first.tokenizer_name!r} ({first.tokenizer_sha256[:16]}), "
                    f"{source.stream.folder} by {source.stream.tokenizer_name!r} "
                    f"({source.stream.tokenizer_sha256[:16]}): prepare both with one tokenizer"
                )
        self.sources = list(sources)
        self.plans = [Plan.make(source.stream, sequence_length) for source in sources]
        self.packs_per_step = packs_per_step
        self.packs_per_micro_batch = packs_per_micro_batch
        self.seed = seed
        self.rank = rank
        self.world = world
        self.samples = samples
        weights = [float(source.weight) for source in sources]
        self.fingerprint = hashlib.sha256(
            repr([(plan.fingerprint, weight) for plan, weight in zip(self.plans, weights, strict=True)]).encode()
        ).hexdigest()
        self._order = SampleOrder(weights, [len(plan) for plan in self.plans], seed)
        self._gather = _Gather([source.stream for source in sources])

    @property
    def packs_per_epoch(self) -> int:
        """Packs of all sources together, each once."""
        return sum(len(plan) for plan in self.plans)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all sources together, each once."""
        return sum(int(plan.tokens.sum()) for plan in self.plans)

    def state_dict(self) -> dict[str, Any]:
        """All there is to the state of the data: `samples`, `seed`, `fingerprint`."""
        return {"samples": self.samples, "seed": self.seed, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, at whatever number of ranks.

        Raises DataError where the order of samples would be another: other streams, weights, sequence length or seed.
        """
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                f"the data's fingerprint is {self.fingerprint}, the checkpoint's {state['fingerprint']}: resume with "
                "the same streams, weights and sequence length, or start a new run"
            )
        if state["seed"] != self.seed:
            raise DataError(f"the data's seed is {self.seed}, the checkpoint's {state['seed']}: resume with the same")
        self.samples = state["samples"]

    def __iter__(self) -> Iterator[StepData]:
        return self

    def __next__(self) -> StepData:
        start, count = self.samples, self.packs_per_step
        sources, packs = self._order.take(start, count)
        totals = [(self.plans[s].weights[k], self.plans[s].tokens[k]) for s, k in zip(sources, packs, strict=True)]
        begin, end = count * self.rank // self.world, count * (self.rank + 1) // self.world
        size = self.packs_per_micro_batch
        most = -(-count // self.world)  # packs of the rank that has the most
        micro_batches = [
            self._batch(sources[i : min(i + size, end)], packs[i : min(i + size, end)]) if i < end else Batch.ghost()
            for i in range(begin, begin + most, size)
        ]
        self.samples += count
        return StepData(
            micro_batches,
            total_weight=float(sum(weight for weight, _ in totals)),
            total_tokens=int(sum(tokens for _, tokens in totals)),
            samples=range(start, start + count),
        )

    def _batch(self, sources: NDArray[np.int64], packs: NDArray[np.int64]) -> Batch:
        parts = [self.plans[s].parts(int(k)) for s, k in zip(sources, packs, strict=True)]
        source_ids = np.repeat(sources, [len(p) for p in parts])
        documents, begins, lengths = (
            np.concatenate([getattr(self.plans[s], name)[p] for s, p in zip(sources, parts, strict=True)])
            for name in ("documents", "begins", "lengths")
        )
        document_ids = source_ids << PART_BITS | np.concatenate(parts)
        return self._gather(source_ids, documents, begins, lengths, document_ids, source_ids)


def sequential_batches(
    stream: TokenStream, *, sequence_length: int, tokens_per_batch: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """A stream from its beginning, in order and once, in batches of at most `tokens_per_batch` tokens, cut into the
    same parts as its plan; up to the part that reaches `max_tokens` tokens where that is given.

    `source_ids` are the stream's own (indices into `stream.sources`). Raises DataError where a part may not fit a
    batch.
    """
    if not 2 <= sequence_length <= tokens_per_batch:
        raise DataError(
            f"sequence_length {sequence_length} must be from 2 to tokens_per_batch, which is {tokens_per_batch}"
        )
    return _sequential_batches(stream, sequence_length, tokens_per_batch, max_tokens)


def _sequential_batches(
    stream: TokenStream, sequence_length: int, tokens_per_batch: int, max_tokens: int | None
) -> Iterator[Batch]:
    documents, begins, lengths, _ = cut(stream, sequence_length)
    ends = np.cumsum(lengths)
    stop = len(ends) if max_tokens is None else int(np.searchsorted(ends, max_tokens)) + 1
    gather = _Gather([stream])
    first = 0
    while first < min(stop, len(ends)):
        before = ends[first] - lengths[first]
        last = min(int(np.searchsorted(ends, before + tokens_per_batch, side="right")), stop)
        part = slice(first, last)
        yield gather(
            np.zeros(last - first, np.int64),
            documents[part],
            begins[part],
            lengths[part],
            np.arange(first, last),
            stream.source_ids[documents[part]],
        )
        first = last


class _Gather:
    """Parts of the documents of several streams to one batch."""

    def __init__(self, streams: Sequence[TokenStream]) -> None:
        shards = [shard for stream in streams for shard in stream.shards]
        self._streams = streams
        self._shards = shards
        self._tokens = [shard.tokens for shard in shards]
        self._silent = [shard.silent for shard in shards]
        self._first_shard = np.cumsum([0] + [len(stream.shards) for stream in streams])

    def __call__(
        self,
        streams: NDArray[np.int64],
        documents: NDArray[np.int64],
        begins: NDArray[np.int64],
        lengths: NDArray[np.int64],
        document_ids: NDArray[np.int64],
        source_ids: NDArray[Any],
    ) -> Batch:
        """One entry a part, (P,) each: the stream and document that it is of, the tokens of it, and its ids."""
        shard, start = np.empty_like(documents), np.empty_like(documents)
        for i in np.unique(streams):
            here, stream = streams == i, self._streams[i]
            shard[here] = self._first_shard[i] + stream.shard_ids[documents[here]]
            start[here] = stream.starts[documents[here]]
        for i, begin, length in zip(shard, start + begins, lengths, strict=True):
            self._shards[i].check(int(begin), int(begin + length))
        return Batch.from_shards(
            self._tokens, self._silent, shard, start + begins, lengths, document_ids=document_ids, source_ids=source_ids
        )
