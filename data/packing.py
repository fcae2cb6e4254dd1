"""The plan of a stream: documents into parts that fit a sequence, and parts into packs. A pack is a sample.

A document longer than the sequence is cut into parts, each a document of its own from then on. Neighbouring parts
share one token, the last of one and the first of the next, so that every token of the document is predicted exactly
once and no part is a single token. Parts without a token to learn from are left out. Where parts of a document would be
of no use, longer ones are rejected instead, or an error.

The plan is made once and kept beside the stream, so that runs and ranks map it instead of making it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tokenmill import _C
from tokenmill.data.errors import DataError
from tokenmill.data.stream import TokenStream

VERSION = 1  # of how parts are cut and packed: another one is another plan
Overlong = Literal["split", "reject", "error"]  # what becomes of documents longer than the sequence
ARRAYS = ("documents", "begins", "lengths", "offsets", "items", "weights", "tokens")


@dataclass(frozen=True, eq=False)
class Plan:
    """P parts, numbered in the order of the stream, in K packs."""

    sequence_length: int
    fingerprint: str  # of the stream, the sequence length and the way of packing
    documents: NDArray[np.int64]  # (P,) the document that part p is of
    begins: NDArray[np.int64]  # (P,) its first token, counted within the document
    lengths: NDArray[np.int64]  # (P,) its tokens, from 2 to sequence_length
    offsets: NDArray[np.int64]  # (K + 1,) pack k holds the parts items[offsets[k]:offsets[k + 1]], increasing
    items: NDArray[np.int64]  # (P,)
    weights: NDArray[np.float64]  # (K,) total loss weight of each pack, known before it is read
    tokens: NDArray[np.int64]  # (K,) tokens of each pack

    def __len__(self) -> int:
        return len(self.tokens)

    def parts(self, pack: int) -> NDArray[np.int64]:
        """The parts in a pack, increasing."""
        return self.items[self.offsets[pack] : self.offsets[pack + 1]]

    def counts(self, packs: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many parts each of some packs holds."""
        return self.offsets[packs + 1] - self.offsets[packs]

    @staticmethod
    def make(
        stream: TokenStream, sequence_length: int, folder: str | Path | None = None, *, overlong: Overlong = "split"
    ) -> Plan:
        """The plan of a stream, mapped from `folder` (the stream's own if None) where it was made before, else made
        and kept there; kept in memory only where that folder cannot be written.

        Raises DataError where sequence_length is below 2, no document has a token to learn from, or one is overlong
        and that is an error.
        """
        if sequence_length < 2:
            raise DataError(f"sequence_length is {sequence_length}: at least 2 tokens are needed to predict one")
        if overlong == "error" and (count := count_overlong(stream, sequence_length)):
            raise DataError(
                f"{stream.folder}: {count:,} of {len(stream):,} documents have more than {sequence_length:,} tokens "
                f"(the longest {stream.lengths.max():,}): split or reject them, or choose a longer sequence"
            )
        if overlong != "reject" or not count_overlong(stream, sequence_length):
            overlong = "split"  # without overlong documents it is the same plan either way
        name = f"plan-{sequence_length}" + ("-reject" if overlong == "reject" else "")
        home = Path(stream.folder if folder is None else folder) / name
        content = f"{VERSION} {stream.fingerprint} {sequence_length} {overlong}"
        fingerprint = hashlib.sha256(content.encode()).hexdigest()
        plan = _load(home, sequence_length, fingerprint)
        if plan is None:
            plan = _make(stream, sequence_length, overlong, fingerprint)
            _save(plan, home)
        return plan


def count_overlong(stream: TokenStream, sequence_length: int) -> int:
    """How many documents do not fit a sequence."""
    return int((stream.lengths > sequence_length).sum())


def cut(stream: TokenStream, sequence_length: int, overlong: Overlong = "split") -> tuple[NDArray[np.int64], ...]:
    """The parts of a stream in order, those without loss left out: documents, begins, lengths and how many tokens of
    each are predicted with loss, (P,) each."""
    stride = sequence_length - 1
    count = -(-(stream.lengths - 1) // stride)
    if overlong == "reject":
        count[count > 1] = 0
    documents = np.repeat(np.arange(len(stream)), count)
    first = np.repeat(np.cumsum(count) - count, count)
    begins = (np.arange(len(documents)) - first) * stride
    lengths = np.minimum(stream.lengths[documents] - begins, sequence_length)
    loss = stream.loss_tokens(documents, begins + 1, begins + lengths)  # a part's first token is never predicted
    taught = loss > 0
    return documents[taught], begins[taught], lengths[taught], loss[taught]


def _make(stream: TokenStream, sequence_length: int, overlong: Overlong, fingerprint: str) -> Plan:
    documents, begins, lengths, loss = cut(stream, sequence_length, overlong)
    if not len(documents):
        fits = f" and fits {sequence_length} tokens" if overlong == "reject" else ""
        raise DataError(
            f"{stream.folder}: no document has a token with loss after its first{fits}: nothing to learn from"
        )
    offsets, items = _C.pack(lengths, sequence_length)
    return Plan(
        sequence_length,
        fingerprint,
        documents,
        begins,
        lengths,
        offsets,
        items,
        weights=np.add.reduceat(loss[items], offsets[:-1]).astype(np.float64),
        tokens=np.add.reduceat(lengths[items], offsets[:-1]),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(home: Path, sequence_length: int, fingerprint: str) -> Plan | None:
    """The plan kept in a folder; None where it is missing, another stream's, or damaged: then it is made again."""
    try:
        record = json.loads((home / "plan.json").read_bytes())
        if record["fingerprint"] != fingerprint:
            return None
        if any(_sha256(home / f"{name}.npy") != record["sha256"][name] for name in ARRAYS):
            return None
        # Plain arrays over the maps: to index a memmap costs several times what it costs to index those.
        arrays = {name: np.asarray(np.load(home / f"{name}.npy", mmap_mode="r")) for name in ARRAYS}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return Plan(sequence_length, fingerprint, **arrays)


def _save(plan: Plan, home: Path) -> None:
    """Keep a plan in a folder that appears whole, unless the place cannot be written or another rank was first."""
    temporary = home.with_name(f".{home.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name in ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(plan, name))
        record = {
            "fingerprint": plan.fingerprint,
            "sequence_length": plan.sequence_length,
            "sha256": {name: _sha256(temporary / f"{name}.npy") for name in ARRAYS},
        }
        (temporary / "plan.json").write_text(json.dumps(record, indent=1))
        if home.exists() and _load(home, plan.sequence_length, plan.fingerprint) is None:
            shutil.rmtree(home)  # of another stream, or damaged
        temporary.rename(home)
    except OSError:
        pass  # the plan is in memory; it is only made again next time
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
