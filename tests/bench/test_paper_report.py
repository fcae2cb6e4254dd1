"""Intervals over seeds and questions, and what an expectation is said to have come to."""

from __future__ import annotations

import numpy as np
import pytest

from tokenmill.bench.paper.expectations import Expectation, expectations
from tokenmill.bench.paper.intervals import Draws
from tokenmill.trainer.evaluate.metrics import Estimate, estimate, mean


def alike(questions: int) -> np.ndarray:
    return np.zeros(questions)


def test_one_seed_is_the_bootstrap_over_questions():
    right = (np.random.default_rng(1).random((1, 300)) < 0.4).astype(float)
    ours, theirs = Draws(1, alike(300)).mean(right), estimate(mean("accuracy", right[0]))
    assert ours.value == pytest.approx(theirs.value, abs=0)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_seeds_that_differ_widen_the_interval():
    same = np.tile(np.arange(200) % 2, (4, 1)).astype(float)
    differ = np.repeat([[0.0], [0.0], [1.0], [1.0]], 200, axis=1)
    narrow, wide = Draws(4, alike(200)).mean(same), Draws(4, alike(200)).mean(differ)
    assert narrow.value == wide.value == 0.5
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * 0.5 / 800**0.5, rel=0.15)
    assert (wide.low, wide.high) == (0, 1)  # with four seeds, all of one kind are drawn in 6 % of the resamples a side


def test_an_interval_covers_the_truth():
    """Over worlds whose accuracies differ as those of other seeds would; with four, rather less often than in 95 %."""
    for seeds, least in ((4, 80), (8, 85)):
        rng, covered = np.random.default_rng(3), 0
        for _ in range(100):
            chances = 0.5 + rng.normal(0, 0.05, (seeds, 1))
            found = Draws(seeds, alike(320), resamples=400).mean(rng.random((seeds, 320)) < chances)
            covered += found.low <= 0.5 <= found.high
        assert covered >= least


def test_a_difference_is_paired():
    rng = np.random.default_rng(0)
    first = (rng.random((3, 200)) < 0.5).astype(float)
    second = np.where(rng.random((3, 200)) < 0.05, 1 - first, first)
    found = Draws(3, alike(200)).mean(first - second)
    assert found.high - found.low < 0.06  # unpaired it would be 0.11


def test_a_kind_of_question_is_in_every_resample():
    kinds = np.arange(50) == 7  # one of its kind, which a draw from all would miss in a third of the cases
    assert Draws(2, kinds).mean(kinds[None].repeat(2, 0), kinds) == Estimate(1, 1, 1)


def test_a_part_of_the_questions():
    values = np.zeros((2, 10))
    values[:, 6:] = 1
    which = np.arange(10) >= 6
    assert Draws(2, which).mean(values, which) == Estimate(1, 1, 1)
    assert Draws(2, which).mean(values, ~which) == Estimate(0, 0, 0)


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (-0.05, 0.05, "came"),
        (-0.1, 0.1, "came"),
        (0.05, 0.15, "open"),
        (0.05, 0.4, "open"),
        (-0.2, 0.2, "open"),
        (0.11, 0.2, "did not come"),
        (-0.3, -0.2, "did not come"),
    ],
)
def test_an_outcome_is_of_the_whole_interval(low, high, outcome):
    near = Expectation("near", ("a", "b"), ("c", "d"), -0.1, 0.1)
    assert near.outcome(Estimate((low + high) / 2, low, high)) == outcome


def test_expectations_are_those_written_down():
    """They stay as they were before the first run, whatever came of it."""
    found = expectations("cpt-100", "cpt-tuned-100")
    bounds = [(" ".join(e.arm), " ".join(e.than), e.low, e.high, e.hops) for e in found]
    inf, both = float("inf"), (1, 2)
    assert bounds == [
        ("cpt zero-shot", "base zero-shot", -0.1, 0.1, both),
        ("base-tuned zero-shot", "base zero-shot", -0.1, 0.1, both),
        ("cpt-tuned zero-shot", "base zero-shot", 0.1, inf, both),
        ("cpt-tuned zero-shot", "cpt zero-shot", 0.1, inf, both),
        ("cpt-tuned zero-shot", "base-tuned zero-shot", 0.1, inf, both),
        ("cpt-tuned zero-shot", "cpt-tuned-100 zero-shot", 0, inf, both),
        ("cpt zero-shot", "cpt-100 zero-shot", -0.1, 0.1, both),
        ("cpt-neftune zero-shot", "cpt-tuned zero-shot", 0, 0.1, both),
        ("cpt-dpo zero-shot", "cpt-tuned zero-shot", -0.1, 0.1, both),
        ("cpt-tuned knn", "cpt-tuned few-shot", 0, inf, both),
        ("cpt-tuned medprompt", "cpt-tuned knn", 0, inf, both),
        ("cpt-tuned chain-of-thought", "cpt-tuned zero-shot", 0, inf, (2,)),
    ]
