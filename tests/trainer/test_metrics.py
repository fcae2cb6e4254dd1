"""What a step is said to cost, against torch's own count and a dense mask."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenmill.data.batch import Batch
from tokenmill.trainer.config import LogSection
from tokenmill.trainer.metrics import MetricsLog, StepRecord, exact_flops, flatten
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


def test_every_number_of_a_record_has_a_name():
    record = {"loss": 2, "mfu": None, "expert_load": [[0.25, 0.75]], "validation": {"notes": 1.5}}
    expected = {"loss": 2.0, "expert_load/0/0": 0.25, "expert_load/0/1": 0.75, "validation/notes": 1.5}
    assert flatten(record) == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_what_the_json_lines_hold(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0, 2, "lines", LogSection(tensorboard=True))
    record = StepRecord(1, 10, 3.5, 1.0, 0.5, 1e-3, 100.0, 0.1, None, None, 0.0, 0.5, 0, [[0.5, 0.5]])
    log.step(record)
    log.validation(1, 10, {"notes": 3.0})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        for name, value in flatten({k: v for k, v in json.loads(line).items() if k != "step"}).items():
            assert value in [pytest.approx(e.value) for e in board.Scalars(name)], name
