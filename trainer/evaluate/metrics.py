"""Metrics and how sure they are: each is a function of sums over questions, so a resample is a vector of counts.

Intervals are the 95 % percentiles of the bootstrap (Efron 1979) over questions. Two models that answered the same
questions are compared on the same resamples ("paired"), so that what makes a question hard for both cancels.

Two limits: an accuracy of 0 or 1 is the same in every resample, so its interval has no width however few the questions;
and noise makes a calibration error larger, so its interval never reaches 0 and is rough near it (in simulations of 300
questions it held a true error of 0.1 in 88 to 96 of 100 cases).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
LEVEL = 0.95
BINS = 10  # of confidence
AT_ONCE = 1 << 22  # counts of resamples, 32 MiB of them


@dataclass(frozen=True)
class Metric:
    name: str
    questions: Floats  # (N, C) what each question adds to each of C sums
    value: Callable[[Floats], Floats]  # (B, C) sums of N questions each -> (B,)

    @property
    def observed(self) -> float:
        return float(self.value(self.questions.sum(0, keepdims=True))[0])


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def mean(name: str, values: ArrayLike) -> Metric:
    """The mean over questions: accuracy, exact match, ROUGE-L."""
    column = np.asarray(values, np.float64)[:, None]
    return Metric(name, column, lambda sums: sums[:, 0] / len(column))


def macro_f1(predictions: Sequence[int | None], answers: Sequence[int]) -> Metric:
    """The mean over labels of F1 = 2 TP / (predicted + actual), over the labels that a prediction or an answer names.
    No prediction (None) counts as one of no label."""
    labels = np.arange(max([*(p for p in predictions if p is not None), *answers]) + 1)
    predicted = np.array([-1 if p is None else p for p in predictions])[:, None] == labels
    actual = np.array(answers)[:, None] == labels
    named = np.concatenate([predicted & actual, predicted.astype(int) + actual], axis=1).astype(np.float64)

    def value(sums: Floats) -> Floats:
        both, either = np.split(sums, 2, axis=1)
        f1 = np.divide(2 * both, either, out=np.zeros_like(both), where=either > 0)
        return f1.sum(1) / (either > 0).sum(1)

    return Metric("macro-F1", named, value)


def calibration_error(confidences: ArrayLike, correct: ArrayLike) -> Metric:
    """The expected calibration error (Guo et al. 2017): over 10 equal bins of confidence, the mean distance of
    confidence and accuracy, weighted by the questions in the bin."""
    confidence, right = np.asarray(confidences, np.float64), np.asarray(correct, np.float64)
    bins = np.clip(np.ceil(confidence * BINS) - 1, 0, BINS - 1)[:, None] == np.arange(BINS)  # (low, high]
    n = len(confidence)
    return Metric("calibration error", bins * (right - confidence)[:, None], lambda sums: np.abs(sums).sum(1) / n)


def estimate(metric: Metric, *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """A metric and its 95 % interval: the same for the same seed."""
    return difference(metric, None, seed=seed, resamples=resamples)


def difference(metric: Metric, baseline: Metric | None, *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """`metric` minus `baseline` (None: 0), of answers to the same questions in the same order, with its 95 % interval.

    Raises ValueError where there is no question, or they answered different numbers of them.
    """
    of = [metric] if baseline is None else [metric, baseline]
    n = len(metric.questions)
    if not n or any(len(m.questions) != n for m in of):
        counts = " and ".join(str(len(m.questions)) for m in of)
        raise ValueError(f"{metric.name}: is of {counts} questions; expected the same ones, at least one")

    def value(counts: Floats) -> Floats:
        first, *second = (m.value(counts @ m.questions) for m in of)
        return first - second[0] if second else first

    observed = float(value(np.ones((1, n)))[0])
    drawn = np.concatenate([value(counts) for counts in _resamples(n, resamples, seed)])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(observed, float(low), float(high))


def _resamples(n: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each of n questions is drawn in each resample, (resamples, n) in parts."""
    generator = np.random.default_rng(seed)
    step = max(1, AT_ONCE // n)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = generator.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
