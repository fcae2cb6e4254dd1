"""tokenmill's host core (csrc/). Bad input raises ValueError; a type or integer range that does not fit, TypeError."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 of a counter of four 32-bit words and a key of two: four 32-bit words."""

def neftune_uniform(seed: int, step: int, document_id: int, position: int, count: int, dim: int) -> NDArray[np.float32]:
    """(count, dim) float32 in (-1, 1): NEFTune's noise, unscaled, for rows `position` to `position + count` of a
    document."""

def derive_key(seed: int, source: int, epoch: int) -> int:
    """The 64-bit key of a source's order in an epoch."""

def permute(index: int, n: int, key: int) -> int:
    """Where the keyed bijection of [0, n) sends `index`."""

def permutation(n: int, key: int, start: int, count: int) -> NDArray[np.uint64]:
    """(count,) uint64: where the keyed bijection of [0, n) sends `start` to `start + count`."""

def pack(lengths: ArrayLike, capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Best-fit-decreasing packing of (n,) lengths, each from 1 to `capacity`, which is at most 2**28.

    Returns offsets (K + 1,) int64 and items (n,) int64: pack k holds `items[offsets[k]:offsets[k + 1]]`, increasing.
    """

class Mixture:
    """Which of m sources each sample comes from; at every prefix counts are within 1 of the exact shares.

    An order's counts are its whole state: `seek` goes anywhere at once, `draw` at the price of what is before.
    """

    WHOLE: ClassVar[int]  # a share of 1

    def __init__(self, starts: NDArray[np.uint64], shares: NDArray[np.uint64]) -> None:
        """From sample `starts[p]` on (P,), source i has the share `shares[p, i]` (P, m), in units of 1 / WHOLE; each
        row adds up to WHOLE. A last row of zeros: the samples end there."""

    def draw(self, start: int, count: int) -> tuple[NDArray[np.uint16], NDArray[np.uint64]]:
        """Samples `start` to `start + count`: the source of each (count,) uint16, and how many samples of that source
        came before it (count,) uint64. A pure function of its arguments; going on from the last call is the cheap way.
        """

    def seek(self, position: int, counts: NDArray[np.uint64]) -> None:
        """Go on from sample `position`, where `counts` (m,) were those below.

        Raises ValueError where they cannot be.
        """

    @property
    def counts(self) -> NDArray[np.uint64]:
        """(m,) how many of the samples up to where it stands came from each source."""

class PieceCache:
    """An exact cache in front of a tokenizer whose ids of a text are those of its parts: texts are cut between any two
    bytes that no piece holds side by side. Calls from several threads take turns, without the GIL."""

    def __init__(self, joins: NDArray[np.uint8], adds_space: bool, limit: int = 1 << 27) -> None:
        """`joins` (256, 256): not 0 where some piece may hold the first byte before the second. `adds_space`: each text
        that is not empty is encoded behind a space. At most about `limit` bytes are kept."""

    def __len__(self) -> int:
        """How many parts are cached."""

    def encode(
        self, texts: list[str], encode_words: Callable[[list[bytes]], list[list[int]]]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The ids of texts laid end to end, (T,) int32, and where each begins, (N + 1,) int64.

        `encode_words` is asked once at most, for the ids of parts that are not cached. Raises UnicodeEncodeError where
        a text holds half of a surrogate pair.
        """

def assemble(
    tokens: Sequence[NDArray[np.uint16] | NDArray[np.uint32]],
    silent: Sequence[NDArray[np.uint64]],
    shard: ArrayLike,
    start: ArrayLike,
    length: ArrayLike,
    out_tokens: NDArray[np.int32],
    targets: NDArray[np.int64],
    weights: NDArray[np.float32],
    positions: NDArray[np.int32],
    target_rows: NDArray[np.int32],
    cu_seqlens: NDArray[np.int32],
) -> int:
    """Documents (or parts) gathered from shards: part i is `tokens[shard[i]][start[i]:start[i] + length[i]]`.

    `silent[s]` (S, 2) uint64 are the spans of shard s that carry no loss, sorted and not overlapping. Fills the last
    six, (T,) each and cu_seqlens (P + 1,), as `Batch.from_documents` would, target_rows as far as there are any.
    Returns how many of them there are.
    """

def find_damaged(
    tokens: Sequence[NDArray[np.uint16] | NDArray[np.uint32]],
    crc32: Sequence[NDArray[np.uint32]],
    checked: Sequence[NDArray[np.bool_]],
    shard: ArrayLike,
    start: ArrayLike,
    length: ArrayLike,
    block: int,
) -> int:
    """The first of the parts (as in `assemble`) that needs a block of `block` bytes whose checksum is not the one in
    `crc32[shard]`; -1 where there is none. Blocks with a True in `checked[shard]` are not read again, and those found
    good get one."""
