"""Documents that hold text of an evaluation: those that share a run of 13 words with it, as for GPT-3 (Brown et al.
2020, appendix C).

Each string of an evaluation's rows counts by itself (a question, an option, the content of a message). One of 8 to 12
words counts where a document holds all of it; a shorter one says too little to be told from chance, and is only
counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.data.documents import Input, pieces, rows
from tokenmill.data.words import hash_runs, hash_words, words

RUN = 13
SHORTEST = 8
TABLE = 1 << 22  # entries of a table that answers most look-ups: 4 MB


class Evaluations:
    """The runs of words of evaluation files.

    Attributes: `texts`, how many strings are looked for; `too_short`, how many are not.
    """

    def __init__(self, files: Sequence[Input]) -> None:
        """Read the files. Raises DataError where one cannot be read."""
        self.texts = self.too_short = 0
        runs: dict[int, list[NDArray[np.uint64]]] = {}
        for file in files:
            for piece in pieces(file):
                for _, row in rows(piece):
                    for text in _strings(row):
                        hashes = hash_words(text)
                        n = min(len(hashes), RUN)
                        if n < SHORTEST:
                            self.too_short += 1
                        else:
                            self.texts += 1
                            runs.setdefault(n, []).extend(hash_runs(hashes, n))
        self._runs = {n: np.unique(np.concatenate(found)) for n, found in sorted(runs.items())}
        self._tables = {n: np.zeros(TABLE, np.bool_) for n in self._runs}
        for n, found in self._runs.items():
            self._tables[n][found & np.uint64(TABLE - 1)] = True

    def find(self, text: str) -> str | None:
        """The first run of words that a document shares with an evaluation, None where there is none."""
        hashes = hash_words(text)
        for (n, known), runs in zip(self._runs.items(), hash_runs(hashes, *self._runs), strict=True):
            likely = np.flatnonzero(self._tables[n][runs & np.uint64(TABLE - 1)])
            at = np.minimum(np.searchsorted(known, runs[likely]), len(known) - 1)
            shared = likely[known[at] == runs[likely]]
            if len(shared):
                return " ".join(words(text)[shared[0] : shared[0] + n])
        return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
