"""What a step is said to cost, against torch's own count and a dense mask."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenmill.data.batch import Batch
from tokenmill.trainer.config import LogSection
from tokenmill.trainer.metrics import MetricsLog, StepRecord, exact_flops, flatten, named_peak_flops
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


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA H20", None),
    ],
)
def test_peaks_are_told_apart(name, peak):
    assert named_peak_flops(name) == peak


def test_what_is_not_finite_is_null_in_the_json_lines(tmp_path, capsys):
    log = MetricsLog(tmp_path, 0, 2, "lines", LogSection())
    nan, infinity = float("nan"), float("inf")
    log.step(StepRecord(1, 10, nan, 1.0, infinity, 1e-3, 100.0, 0.1, None, None, 0.0, 0.5, 1, [[0.5, nan]], 0.5, [0.6]))
    log.validation(1, 10, {"notes": nan, "talks": 2.0})
    log.close()

    def not_json(text):
        raise AssertionError(text)

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    step, validation = (json.loads(line, parse_constant=not_json) for line in lines)
    assert (step["loss"], step["grad_norm"], step["expert_load"], step["lr"]) == (None, None, [[0.5, None]], 1e-3)
    assert validation["validation"] == {"notes": None, "talks": 2.0}
    assert "loss nan" in capsys.readouterr().out


def test_a_wandb_run_is_one_run_until_it_begins_afresh(tmp_path, monkeypatch):
    begun = []
    run = SimpleNamespace(log=lambda scalars, step: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: begun.append(options) or run))
    for folder, step in (("a/run", 0), ("a/run", 5), ("b/run", 0), ("a/run", 0)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        MetricsLog(tmp_path / folder, step, 9, "lines", LogSection(wandb="project")).close()
    first, resumed, elsewhere, again = [options["id"] for options in begun]
    assert first == resumed
    assert len({first, elsewhere, again}) == 3


@pytest.mark.parametrize(("key", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard.writer")])
def test_a_missing_package_is_named_with_its_cure(tmp_path, monkeypatch, key, module):
    monkeypatch.setitem(sys.modules, module, None)
    section = LogSection(wandb="project") if key == "wandb" else LogSection(tensorboard=True)
    with pytest.raises(ImportError, match=rf"log.{key}: .*{module}.*pip install 'tokenmill\[log\]'"):
        MetricsLog(tmp_path, 0, 2, "lines", section)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_what_the_json_lines_hold(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0, 2, "lines", LogSection(tensorboard=True))
    record = StepRecord(1, 10, 3.5, 1.0, 0.5, 1e-3, 100.0, 0.1, None, None, 0.0, 0.5, 0, [[0.5, 0.5]], 0.5, [0.6])
    log.step(record)
    log.validation(1, 10, {"notes": 3.0})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        for name, value in flatten({k: v for k, v in json.loads(line).items() if k != "step"}).items():
            assert value in [pytest.approx(e.value) for e in board.Scalars(name)], name
