"""The benchmark compares like with like: the same documents, and at every step the same loss on all sides."""

import pytest

from tokenmill.bench.step import OURS, compare, documents, summary, tiny
from tokenmill.trainer.config import OptimizerSection


@pytest.mark.filterwarnings("ignore")  # what transformers' Trainer warns of is its own
@pytest.mark.parametrize(
    ("experts", "recompute", "precision", "apart"),
    [(None, "full", "fp32", 1e-5), (3, "none", "fp32", 1e-5), (3, "selective", "fp32", 1e-5),
     (None, "none", "bf16-mixed", 1e-3)],
)  # fmt: skip
def test_all_sides_take_the_same_steps(experts, recompute, precision, apart):
    model = tiny(experts, window=16)
    batches = documents(150, 3, model.config.vocab_size)
    assert [batch.tokens.numel() for batch in batches] == [150] * 3
    result = compare(model, batches, OptimizerSection(1e-3), rounds=1, recompute=recompute, precision=precision)
    assert len(result) == 3
    for side, steps in result.items():
        for (_, ours), (_, theirs) in zip(result[OURS], steps, strict=True):
            assert theirs == pytest.approx(ours, rel=apart), side
    assert "HF Trainer, packed" in summary(batches, result)
