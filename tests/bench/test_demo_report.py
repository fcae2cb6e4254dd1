"""The demo's table and plots, from records like those of a training run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from tokenmill.bench.demo.report import plots, table


def stage(steps: int, experts: bool = True) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        load = [[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]] if experts else None
        records.append(
            {"step": step, "tokens": 100 * step, "loss": 5 / step, "tokens_per_second": 900.0, "expert_load": load}
        )
        if step % 2 == 0:
            records.append(
                {"step": step, "tokens": 100 * step, "validation": {"clinical_heldout": 3.0, "general": 4.0}}
            )
    return records


def test_a_loss_that_was_not_finite_is_left_out(tmp_path):
    score = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "chance": 0.25, "n": 9, "predictions": [0]}
    losses = {"clinical": None, "general": 2.0}
    assert (
        "- " in table([{"stage": "base", "losses": losses, "score": score, "tokens_per_second": 1.0}]).splitlines()[2]
    )
    records = stage(6)
    records[0]["loss"] = records[2]["validation"]["general"] = None
    plots({"base": records}, tmp_path)


def test_table_is_markdown_with_aligned_columns():
    score = {"accuracy": 0.55, "low": 0.506, "high": 0.593, "chance": 0.25, "n": 500, "predictions": [0]}
    losses = {"clinical_heldout": 2.5, "general_heldout": 12.1234}
    lines = table(
        [
            {"stage": "base", "losses": losses, "score": score, "tokens_per_second": 999.6},
            {"stage": "a longer name", "losses": losses, "score": score, "tokens_per_second": 123456.0},
        ]
    ).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "stage", "clinical loss", "general loss", "accuracy (95 % interval)", "chance", "tokens/s",
    ]  # fmt: skip
    assert cells[2] == ["base", "2.500", "12.123", "0.550 (0.506 to 0.593)", "0.250", "1,000"]
    assert cells[3] == ["a longer name", "2.500", "12.123", "0.550 (0.506 to 0.593)", "0.250", "123,456"]
    bars = [[i for i, character in enumerate(line) if character == "|"] for line in lines]
    assert all(b == bars[0] for b in bars)
    assert set(lines[1]) == set("|-:")


def test_plots_are_pictures_with_something_on_them(tmp_path):
    found = plots({"base": stage(30), "tuning": stage(1)}, tmp_path / "new")
    assert [path.name for path in found] == ["loss.png", "throughput.png", "expert_load.png"]
    for path in found:
        picture = imread(path)[..., :3]
        assert min(picture.shape[:2]) > 200
        assert 0.005 < np.mean(picture.min(axis=2) < 0.9) < 0.9, path


def test_expert_load_is_coloured_by_the_share(tmp_path):
    """Three times an equal share is deep red, none of it deep blue."""
    records = [{"step": 1, "tokens": 100, "loss": 1.0, "tokens_per_second": 1.0, "expert_load": [[1.0, 0.0, 0.0]]}]
    picture = imread(plots({"base": records}, tmp_path)[2])[..., :3]
    panel = picture[:, : int(0.6 * picture.shape[1])].reshape(-1, 3)
    red = np.mean((panel[:, 0] > 0.35) & (panel[:, 1:].max(1) < 0.15))
    blue = np.mean((panel[:, 2] > 0.3) & (panel[:, 0] < 0.1))
    assert blue == pytest.approx(2 * red, rel=0.1)
    assert red > 0.05


def test_a_dense_model_has_no_expert_load(tmp_path):
    found = plots({"base": stage(4, experts=False)}, tmp_path)
    assert [path.name for path in found] == ["loss.png", "throughput.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "throughput.png"]
