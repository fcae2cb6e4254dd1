"""What a step is said to cost, against torch's own count and a dense mask."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenmill.data.batch import Batch
from tokenmill.trainer.metrics import exact_flops
from tokenmill.trainer.model import ModelConfig, Transformer
from tokenmill.trainer.model.config import attended_pairs


@pytest.mark.parametrize("window", [None, 1, 4, 9, 20])
@pytest.mark.parametrize("length", [1, 4, 9, 10, 33])
def test_attended_pairs_are_those_of_a_dense_mask(length, window):
    mask = torch.ones(length, length).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    assert attended_pairs(length, window) == mask.sum()


def test_flops_are_those_that_torch_counts():
    config = ModelConfig(32, 2, 4, 2, 8, 48, 64, sliding_window=5)
    model = Transformer(config, attention="reference")
    batch = Batch.from_documents([[1] * 40])
    with FlopCounterMode(display=False) as counter:
        model.logits(batch).sum().backward()
    dense = 3 * config.n_layers * 2 * 2 * config.n_heads * config.head_dim * 40 * 40  # the reference visits all pairs
    pairs = 3 * config.n_layers * 2 * 2 * config.n_heads * config.head_dim * attended_pairs(40, 5)
    assert exact_flops(config, [batch]) == counter.get_total_flops() - dense + pairs
