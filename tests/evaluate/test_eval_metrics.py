"""Metrics against plain statements of them, and intervals against how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tokenmill.trainer.evaluate.metrics import Metric, calibration_error, difference, estimate, macro_f1, mean


def plain_f1(predictions, answers):
    scores = []
    for label in sorted({*answers, *(p for p in predictions if p is not None)}):
        both = sum(p == a == label for p, a in zip(predictions, answers, strict=True))
        predicted, actual = sum(p == label for p in predictions), sum(a == label for a in answers)
        precision, recall = both / predicted if predicted else 0, both / actual if actual else 0
        scores.append(2 * precision * recall / (precision + recall) if both else 0)
    return sum(scores) / len(scores)


def plain_error(confidences, correct):
    total = 0.0
    for low in range(10):
        of = [i for i, c in enumerate(confidences) if low < math.ceil(c * 10) <= low + 1 or (low == 0 and c == 0)]
        if of:
            accuracy, confidence = (sum(values[i] for i in of) / len(of) for values in (correct, confidences))
            total += len(of) / len(correct) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("n", [1, 2, 17, 300])
@pytest.mark.parametrize("labels", [2, 5])
def test_values_against_plain_statements(n, labels):
    generator = np.random.default_rng(n)
    answers = generator.integers(0, labels, n).tolist()
    predictions = [None if generator.random() < 0.1 else int(generator.integers(0, labels + 1)) for _ in answers]
    correct = [p == a for p, a in zip(predictions, answers, strict=True)]
    confidences = np.round(generator.random(n), 2)  # also on the borders of bins
    assert estimate(mean("accuracy", correct)).value == pytest.approx(sum(correct) / n)
    assert estimate(macro_f1(predictions, answers)).value == pytest.approx(plain_f1(predictions, answers))
    assert estimate(calibration_error(confidences, correct)).value == pytest.approx(plain_error(confidences, correct))


def test_a_resample_is_the_metric_of_the_questions_drawn():
    """Whatever the metric: sums of counts are what a list with these questions repeated would give."""
    generator = np.random.default_rng(0)
    answers, predictions = generator.integers(0, 3, 40), generator.integers(0, 4, 40)
    confidences = generator.random(40)
    counts = np.bincount(generator.integers(0, 40, 40), minlength=40)
    drawn = np.repeat(np.arange(40), counts)

    def metrics(of):
        right = predictions[of] == answers[of]
        return [
            mean("m", right),
            macro_f1(predictions[of].tolist(), answers[of].tolist()),
            calibration_error(confidences[of], right),
        ]

    for whole, repeated in zip(metrics(np.arange(40)), metrics(drawn), strict=True):
        assert whole.value(counts[None] @ whole.questions)[0] == pytest.approx(estimate(repeated, resamples=2).value)


def test_known_values():
    assert estimate(macro_f1([0, 0, 1, 1], [0, 1, 1, 1])).value == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert estimate(macro_f1([None, None], [0, 1])).value == 0
    assert estimate(macro_f1([0, 3], [0, 3])).value == 1, "labels that nothing names do not count"
    assert estimate(calibration_error([1.0, 1.0, 0.0], [True, False, False])).value == pytest.approx(1 / 3)
    exact = estimate(mean("accuracy", [True] * 9))
    assert (exact.value, exact.low, exact.high) == (1, 1, 1)
    assert str(exact) == "1.000 (1.000 to 1.000)"
    half = estimate(mean("accuracy", [True, False] * 50))  # its standard error is 0.05
    assert (half.low, half.high) == pytest.approx((0.4, 0.6), abs=0.011)


def coverage(draw, truth: float, trials: int = 500) -> float:
    """How often the interval of `draw(generator)` holds the truth."""
    generator = np.random.default_rng(1)
    intervals = [draw(generator) for _ in range(trials)]
    return sum(interval.low <= truth <= interval.high for interval in intervals) / trials


def test_an_interval_holds_the_true_accuracy_in_19_of_20_cases():
    found = coverage(lambda g: estimate(mean("accuracy", g.random(120) < 0.7), resamples=400), 0.7)
    assert 0.91 < found < 0.98


def test_an_interval_holds_the_true_f1():
    """Of 1,000,000 questions like them."""

    def draw(generator, n=150):
        answers = generator.choice(3, n, p=[0.6, 0.3, 0.1])
        wrong = generator.random(n) > 0.7
        return macro_f1(np.where(wrong, generator.integers(0, 3, n), answers).tolist(), answers.tolist())

    many = draw(np.random.default_rng(7), 1_000_000)
    truth = float(many.value(many.questions.sum(0, keepdims=True))[0])
    assert 0.91 < coverage(lambda g: estimate(draw(g), resamples=400), truth) < 0.99


def test_an_interval_holds_the_true_calibration_error():
    """Confidences of 0.65 and 0.95 that are 0.6 and 0.8 in truth: an error of 0.1."""

    def draw(generator):
        sure = generator.random(300) < 0.5
        right = generator.random(300) < np.where(sure, 0.8, 0.6)
        return estimate(calibration_error(np.where(sure, 0.95, 0.65), right), resamples=400)

    assert 0.91 < coverage(draw, 0.1) < 0.99


def pair(generator, n=150) -> tuple[Metric, Metric]:
    """Two models of true accuracy 0.6 and 0.7 that find the same questions hard."""
    first = generator.random(n) < 0.6
    second = first | (generator.random(n) < 0.25)
    return mean("accuracy", second), mean("accuracy", first)


def test_a_paired_difference_holds_the_truth_and_is_narrower():
    assert 0.91 < coverage(lambda g: difference(*pair(g), resamples=400), 0.1) < 0.99
    second, first = pair(np.random.default_rng(0), 1000)
    paired = difference(second, first)
    shuffled = mean("accuracy", np.random.default_rng(1).permutation(first.questions[:, 0]))
    assert paired.value == pytest.approx(difference(second, shuffled).value)
    assert paired.high - paired.low < 0.7 * (difference(second, shuffled).high - difference(second, shuffled).low)
    assert paired.low > 0
    nothing = difference(first, first)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


def test_the_seed_decides():
    metric = mean("ROUGE-L", np.random.default_rng(0).random(50))
    assert estimate(metric, seed=3) == estimate(metric, seed=3)
    assert estimate(metric, seed=3) != estimate(metric, seed=4)


def test_resamples_are_the_same_in_any_parts(monkeypatch):
    metric = mean("ROUGE-L", np.random.default_rng(0).random(50))
    expected = estimate(metric)
    monkeypatch.setattr("tokenmill.trainer.evaluate.metrics.AT_ONCE", 700)
    found = estimate(metric)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_bad_calls_are_errors():
    with pytest.raises(ValueError, match="accuracy: is of 0 questions"):
        estimate(mean("accuracy", []))
    with pytest.raises(ValueError, match="accuracy: is of 2 and 3 questions; expected the same ones"):
        difference(mean("accuracy", [1, 0]), mean("accuracy", [1, 0, 0]))
