"""What the experiment is expected to show, written down before the reported seeds were run and unchanged since.

An expectation compares two arms, or two strategies of one arm, on the same questions. It has come where the interval of
their difference lies within what was expected, has not come where it lies outside, and is open where it reaches both.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.trainer.evaluate.metrics import Estimate

NEAR = 0.1  # of accuracy: "near" is a difference within it, "clearly above" one beyond it


@dataclass(frozen=True)
class Expectation:
    text: str
    arm: tuple[str, str]  # its name and strategy
    than: tuple[str, str]
    low: float = float("-inf")  # of the expected difference in accuracy
    high: float = float("inf")
    hops: tuple[int, ...] = (1, 2)  # of the questions

    def outcome(self, difference: Estimate) -> str:
        if self.low <= difference.low and difference.high <= self.high:
            return "came"
        if difference.high < self.low or self.high < difference.low:
            return "did not come"
        return "open"


def expectations(first_cpt: str, first_tuned: str) -> list[Expectation]:
    """`first_cpt` and `first_tuned` are the arms of the earliest checkpoint of continued pre-training that tuning began
    from."""
    base, cpt, base_tuned, tuned = ((name, "zero-shot") for name in ("base", "cpt", "base-tuned", "cpt-tuned"))
    few_shot, knn, medprompt, chain = (
        ("cpt-tuned", strategy) for strategy in ("few-shot", "knn", "medprompt", "chain-of-thought")
    )
    return [
        Expectation("CPT alone is near the base", cpt, base, -NEAR, NEAR),
        Expectation("tuning alone is near the base", base_tuned, base, -NEAR, NEAR),
        Expectation("CPT and tuning together are clearly above the base", tuned, base, NEAR),
        Expectation("CPT and tuning together are clearly above CPT alone", tuned, cpt, NEAR),
        Expectation("CPT and tuning together are clearly above tuning alone", tuned, base_tuned, NEAR),
        Expectation("tuned accuracy rises with CPT tokens", tuned, (first_tuned, "zero-shot"), 0),
        Expectation("untuned accuracy stays with CPT tokens", cpt, (first_cpt, "zero-shot"), -NEAR, NEAR),
        Expectation("NEFTune adds a little", ("cpt-neftune", "zero-shot"), tuned, 0, NEAR),
        Expectation("DPO changes little where answers are recalled", ("cpt-dpo", "zero-shot"), tuned, -NEAR, NEAR),
        Expectation("kNN shots are not below random ones", knn, few_shot, 0),
        Expectation("MedPrompt is not below kNN shots", medprompt, knn, 0),
        Expectation("chains of thought help where an answer takes two hops", chain, tuned, 0, hops=(2,)),
    ]
