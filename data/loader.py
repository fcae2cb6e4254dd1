"""Batches of each optimizer step, for this rank, from weighted streams; and a stream in order, for evaluation.

A sample is a pack of a stream's plan. Step s takes the samples [s * packs_per_step, (s + 1) * packs_per_step) of one
global order, and each rank a slice of them. So the state of the data is a sample number, a seed and a fingerprint, and
a run goes on at any number of ranks with the samples that it would have seen. (How many of those samples each source
gave follows from their number; it is kept beside it, so that nothing has to be counted again.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill import _C
from tokenmill.data.batch import Batch
from tokenmill.data.errors import DataError
from tokenmill.data.mixture import Feed, SampleOrder
from tokenmill.data.packing import Overlong, Plan, count_overlong, cut
from tokenmill.data.shard import BLOCK
from tokenmill.data.stream import TokenStream

PART_BITS = 40  # a document's id in a batch is its source << PART_BITS | its part: the same in every layout


@dataclass(frozen=True)
class Source:
    """A stream and its share of the samples."""

    stream: TokenStream
    weight: float | Sequence[tuple[int, float]] = 1.0  # relative to the others'; or (step, weight from that step on)
    epochs: float | None = None  # passes over the stream, then it gives no more; None: begins again as often as asked

    @property
    def name(self) -> str:
        return self.stream.name

    @property
    def weights(self) -> list[tuple[int, float]]:
        """The weight from each step on. Raises DataError where that makes no sense."""
        if isinstance(self.weight, (int, float)):
            weights, sensible = [(0, float(self.weight))], self.weight > 0
        else:
            weights = [(int(step), float(weight)) for step, weight in self.weight]
            steps = [step for step, _ in weights]
            sensible = steps[:1] == [0] and all(a < b for a, b in pairwise(steps)) and any(w > 0 for _, w in weights)
        if not sensible or not all(np.isfinite(weight) and weight >= 0 for _, weight in weights):
            raise DataError(
                f"{self.stream.folder}: weight {self.weight}, expected a positive number, or pairs of a step and the "
                "weight from there on, from step 0 on, later and later, not all 0"
            )
        return weights


@dataclass(frozen=True)
class StepData:
    """This rank's part of one optimizer step, and totals over all ranks."""

    micro_batches: list[Batch]  # as many on every rank; a ghost where this rank has no sample left
    total_weight: float  # of all targets of the step, over all ranks and micro-batches: what the loss is divided by
    total_tokens: int  # of the step, over all ranks and micro-batches, ghosts not counted
    total_documents: int  # likewise, each part of a cut one counted
    samples: range  # the global sample numbers of the step, over all ranks
    state: dict[str, Any]  # of the data once this step is done with
    notices: list[str]  # what is worth a line in the log: a source begins again, or has no more


class Loader:
    """`next(loader)` is the next step. Sources begin again, in another order, when they run out; where all of them
    have an end, so has the loader."""

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
        overlong: Overlong = "split",
        pinned: bool = False,
    ) -> None:
        """`packs_per_step` counts over all ranks, `packs_per_micro_batch` on one; `samples` were consumed before.
        `overlong` documents are split, rejected or an error. `pinned` batches are in memory that a GPU copies from
        without the CPU.

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
            if source.stream.tokenizer_sha256 != first.tokenizer_sha256:
                raise DataError(
                    f"{first.folder} was made by tokenizer {first.tokenizer_name!r} ({first.tokenizer_sha256[:16]}), "
                    f"{source.stream.folder} by {source.stream.tokenizer_name!r} "
                    f"({source.stream.tokenizer_sha256[:16]}): prepare both with one tokenizer"
                )
        weights = [source.weights for source in sources]
        self.sources = list(sources)
        self.plans = [Plan.make(source.stream, sequence_length, overlong=overlong) for source in sources]
        self.sequence_length = sequence_length
        self.packs_per_step = packs_per_step
        self.packs_per_micro_batch = packs_per_micro_batch
        self.overlong: Overlong = overlong
        self.seed = seed
        self.rank = rank
        self.world = world
        self.samples = samples
        feeds = [
            Feed(
                len(plan),
                tuple((step * packs_per_step, weight) for step, weight in steps),
                _limit(source, len(plan)),
            )
            for source, plan, steps in zip(sources, self.plans, weights, strict=True)
        ]
        self.fingerprint = hashlib.sha256(
            repr([(plan.fingerprint, feed) for plan, feed in zip(self.plans, feeds, strict=True)]).encode()
        ).hexdigest()
        try:
            self._order = SampleOrder(feeds, seed)
        except ValueError as error:
            raise DataError(f"the weights and epochs of the sources do not fit: {error}") from None
        self._gather = _Gather([source.stream for source in sources], pinned)

    @property
    def packs_per_epoch(self) -> int:
        """Packs of all sources together, each once."""
        return sum(len(plan) for plan in self.plans)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all sources together, each once."""
        return sum(int(plan.tokens.sum()) for plan in self.plans)

    @property
    def steps(self) -> int | None:
        """Steps until all sources have run out, the last of which may be smaller; None where there is no end."""
        samples = self._order.samples
        return None if samples is None else math.ceil(samples / self.packs_per_step)

    def summary(self, steps: int) -> list[str]:
        """A line for each source: what of it is used, and how often in so many steps."""
        passes = self._order.share(steps * self.packs_per_step)
        lines = []
        for source, plan, share, end in zip(self.sources, self.plans, passes, self._order.ends, strict=True):
            stream, weights = source.stream, source.weights
            said = [f"weight {weights[0][1]:g}", *(f"{weight:g} from step {step:,}" for step, weight in weights[1:])]
            line = (
                f"{stream.folder}: {len(stream):,} documents, {stream.tokens:,} tokens in {len(plan):,} packs "
                f"({_padding(plan):.2%} padding), {', '.join(said)}; {share / len(plan):.2f} epochs in {steps:,} steps"
            )
            if end is not None and end < steps * self.packs_per_step:
                line += f", no more from step {end // self.packs_per_step:,} on"
            elif share > len(plan):
                line += ", so it begins again"
            if overlong := count_overlong(stream, self.sequence_length):
                fate = "left out" if self.overlong == "reject" else "cut into parts"
                line += f"; {overlong:,} documents of more than {self.sequence_length:,} tokens are {fate}"
            lines.append(line)
        return lines

    def state_dict(self) -> dict[str, Any]:
        """All there is to the state of the data: `samples`, `seed`, `fingerprint`; and `drawn`, how many of those
        samples each source gave."""
        drawn = self._order.drawn(self.samples).tolist()
        return {"samples": self.samples, "seed": self.seed, "fingerprint": self.fingerprint, "drawn": drawn}

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
        try:
            self._order.seek(state["samples"], state["drawn"])
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise DataError(f"the checkpoint's state of the data is damaged: {error}") from None
        self.samples = state["samples"]

    def __iter__(self) -> Iterator[StepData]:
        return self

    def __next__(self) -> StepData:
        start, end = self.samples, self._order.samples
        count = self.packs_per_step if end is None else min(self.packs_per_step, end - start)
        if count <= 0:
            raise StopIteration
        before = self._order.drawn(start)
        sources, packs = self._order.take(start, count)
        drawn = [(self.plans[s], packs[sources == s]) for s in np.unique(sources)]
        first, last = count * self.rank // self.world, count * (self.rank + 1) // self.world
        size = self.packs_per_micro_batch
        most = -(-count // self.world)  # packs of the rank that has the most
        micro_batches = [
            self._batch(sources[i : min(i + size, last)], packs[i : min(i + size, last)]) if i < last else Batch.ghost()
            for i in range(first, first + most, size)
        ]
        self.samples += count
        state = self.state_dict()
        return StepData(
            micro_batches,
            total_weight=sum(float(plan.weights[k].sum()) for plan, k in drawn),
            total_tokens=sum(int(plan.tokens[k].sum()) for plan, k in drawn),
            total_documents=sum(int(plan.counts(k).sum()) for plan, k in drawn),
            samples=range(start, start + count),
            state=state,
            notices=self._notices(before.tolist(), state["drawn"]),
        )

    def _notices(self, before: Sequence[int], after: Sequence[int]) -> list[str]:
        """What becomes of the sources that have given all their packs for the first time, or their last."""
        notices = []
        for source, plan, a, b in zip(self.sources, self.plans, before, after, strict=True):
            limit = _limit(source, len(plan))
            if a < b == limit:
                notices.append(f"{source.stream.folder}: has given its {source.epochs:g} epochs, and gives no more")
            elif a <= len(plan) < b:
                notices.append(f"{source.stream.folder}: has given all its {len(plan):,} packs, and begins again")
        return notices

    def _batch(self, sources: NDArray[np.int64], packs: NDArray[np.int64]) -> Batch:
        first, count = np.empty_like(packs), np.empty_like(packs)  # of each pack's entries among its plan's items
        for s in (present := np.unique(sources)):
            here, plan = sources == s, self.plans[s]
            first[here], count[here] = plan.offsets[packs[here]], plan.counts(packs[here])
        ends = np.cumsum(count)
        entries = np.arange(ends[-1]) + np.repeat(first - ends + count, count)
        source_ids = np.repeat(sources, count)
        parts, documents, begins, lengths = (np.empty_like(entries) for _ in range(4))
        for s in present:
            here, plan = source_ids == s, self.plans[s]
            parts[here] = of_source = plan.items[entries[here]]
            for made, known in ((documents, plan.documents), (begins, plan.begins), (lengths, plan.lengths)):
                made[here] = known[of_source]
        return self._gather(source_ids, documents, begins, lengths, source_ids << PART_BITS | parts, source_ids)


def _limit(source: Source, packs: int) -> int | None:
    """How many packs a source gives at most."""
    if source.epochs is None:
        return None
    if not 0 < source.epochs < 1e9:
        raise DataError(f"{source.stream.folder}: epochs {source.epochs}, expected a positive number")
    return max(1, round(source.epochs * packs))


def _padding(plan: Plan) -> float:
    return 1 - float(plan.tokens.sum()) / (len(plan) * plan.sequence_length)


def sequential_batches(
    stream: TokenStream,
    *,
    sequence_length: int,
    tokens_per_batch: int,
    max_tokens: int | None = None,
    overlong: Overlong = "split",
) -> Iterator[Batch]:
    """A stream from its beginning, in order and once, in batches of at most `tokens_per_batch` tokens, cut into the
    same parts, with the same numbers for ids, as its plan; up to the part that reaches `max_tokens` tokens where that
    is given.

    `source_ids` are the stream's own (indices into `stream.sources`). Raises DataError where a part may not fit a
    batch.
    """
    if not 2 <= sequence_length <= tokens_per_batch:
        raise DataError(
            f"sequence_length {sequence_length} must be from 2 to tokens_per_batch, which is {tokens_per_batch}"
        )
    return _sequential_batches(stream, sequence_length, tokens_per_batch, max_tokens, overlong)


def _sequential_batches(
    stream: TokenStream, sequence_length: int, tokens_per_batch: int, max_tokens: int | None, overlong: Overlong
) -> Iterator[Batch]:
    documents, begins, lengths, _ = cut(stream, sequence_length, overlong)
    ends = np.cumsum(lengths)
    stop = len(ends) if max_tokens is None else int(np.searchsorted(ends, max_tokens)) + 1
    gather = _Gather([stream], pinned=False)
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

    def __init__(self, streams: Sequence[TokenStream], pinned: bool) -> None:
        shards = [shard for stream in streams for shard in stream.shards]
        self._streams = streams
        self._pinned = pinned
        self._shards = shards
        self._crc32 = [np.asarray(shard.crc32, np.uint32) for shard in shards]
        self._place = np.zeros(len(shards), np.int64)  # of a shard among those that a batch needs
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
        start += begins
        needed = np.flatnonzero(np.bincount(shard, minlength=len(self._shards)))  # of perhaps thousands
        self._place[needed] = np.arange(len(needed))
        shard = self._place[shard]
        shards = [self._shards[i] for i in needed]
        tokens = [found.tokens for found in shards]
        crc32 = [self._crc32[i] for i in needed]
        damaged = _C.find_damaged(tokens, crc32, [found.checked for found in shards], shard, start, lengths, BLOCK)
        if damaged >= 0:
            begin = int(start[damaged])
            shards[shard[damaged]].check(begin, begin + int(lengths[damaged]))  # raises, naming file and block
        return Batch.from_shards(
            tokens,
            [found.silent for found in shards],
            shard,
            start,
            lengths,
            document_ids=document_ids,
            source_ids=source_ids,
            pinned=self._pinned,
        )
