"""The benchmark of answering compares what both sides find before it times them."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tokenmill.bench import generation
from tokenmill.bench.gpu import Place


@pytest.mark.parametrize("part", [generation.scoring, generation.generating])
def test_both_sides_find_the_same(tmp_path, part):
    rows = part(Place(torch.device("cpu"), True, tmp_path))
    assert len(rows) in (2, 4)
    for row in rows:
        assert row.get("same choice", row.get("same ids")) == 1
        assert row["s"] > 0


def test_without_transformers_ours_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ours, theirs = generation.scoring(Place(torch.device("cpu"), True, tmp_path))
    assert ours["questions/s"] > 0
    assert theirs["s"] == "not measured: it is not installed"
