"""ROUGE-L, how much of two texts is the same words in the same order (Lin 2004), and texts that no other resembles.

Over the words of data/words.py, in lower case and without stemming. With L the length of the longest common
subsequence of m and n words, precision is L / m, recall L / n, and ROUGE-L their F-measure 2 L / (m + n): symmetrical,
1 for equal words, 0 where a text has none.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from tokenmill.data.errors import DataError
from tokenmill.data.words import words


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L of two texts, from 0 to 1."""
    first, second = words(a), words(b)
    total = len(first) + len(second)
    return 2 * _common(_masks(first), len(first), second) / total if total else 0.0


def _masks(sequence: Sequence[str]) -> dict[str, int]:
    """By word, an integer with a bit for each place where it stands."""
    masks: dict[str, int] = {}
    for i, word in enumerate(sequence):
        masks[word] = masks.get(word, 0) | 1 << i
    return masks


def _common(masks: Mapping[str, int], m: int, other: Sequence[str]) -> int:
    """The length of the longest common subsequence of a text of m words, given by its masks, and another: a row of the
    dynamic programme at a time, as the bits of an integer that are 0 where the row grows (Hyyrö 2004)."""
    whole = (1 << m) - 1
    row = whole
    for word in other:
        here = row & masks.get(word, 0)
        row = (row + here | row - here) & whole
    return m - row.bit_count()


class Unlike:
    """A set of texts of which no new one may resemble another.

    Words in common bound the longest common subsequence from above, so only texts that share enough of them, counted
    for all texts at once by an index from word to texts, are compared. Nothing is approximate.
    """

    def __init__(self, threshold: float) -> None:
        """Texts with a ROUGE-L above `threshold` resemble each other. Raises DataError where it is not in [0, 1]."""
        if not 0 <= threshold <= 1:
            raise DataError(f"threshold is {threshold}: expected a ROUGE-L, from 0 to 1")
        self._threshold = threshold
        self._texts: list[str] = []
        self._lengths = array("I")
        # A word's second place in a text is an entry of its own: what is counted is the overlap of multisets.
        self._index: dict[Hashable, array[int]] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        """Add a text, whatever it resembles."""
        sequence = words(text)
        for entry in _entries(sequence):
            self._index.setdefault(entry, array("I")).append(len(self._texts))
        self._texts.append(text)
        self._lengths.append(len(sequence))

    def find(self, text: str) -> tuple[float, str] | None:
        """A text of the set that this one resembles, and their ROUGE-L; None where there is none."""
        sequence = words(text)
        texts = [np.frombuffer(self._index[entry], np.uint32) for entry in _entries(sequence) if entry in self._index]
        if not texts:
            return None
        overlaps = np.bincount(np.concatenate(texts), minlength=len(self))
        bounds = 2 * overlaps / (np.frombuffer(self._lengths, np.uint32) + float(len(sequence)))
        likely = np.flatnonzero(bounds > self._threshold)
        masks = _masks(sequence)
        for i in likely[np.argsort(-bounds[likely], kind="stable")].tolist():
            other = words(self._texts[i])
            score = 2 * _common(masks, len(sequence), other) / (len(sequence) + len(other))
            if score > self._threshold:
                return score, self._texts[i]
        return None


def _entries(sequence: Sequence[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    entries = []
    for word in sequence:
        entries.append((word, seen[word]))
        seen[word] += 1
    return entries
