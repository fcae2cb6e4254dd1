"""Peers beside our operations: what one says costs no other, and what it changes is not ours."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmill.bench import head, ops
from tokenmill.bench.gpu import Place
from tokenmill.bench.peers import Peer

PACKAGES = {
    "quack": "raise RuntimeError('no such luck')",
    "cut_cross_entropy": """
        import torch.nn.functional as F

        def linear_cross_entropy(e, c, targets, *, reduction, filter_eps, impl):
            assert impl in ("cce", "torch_compile") and filter_eps is None
            return F.cross_entropy((e @ c.T).float(), targets, reduction=reduction)
    """,
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return Place(torch.device("cpu"), True, tmp_path)


def test_a_peer_costs_only_its_own_timing(place, tmp_path: Path, monkeypatch):
    for name, text in PACKAGES.items():
        (tmp_path / f"{name}.py").write_text(dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    rows = {row["what"]: row for row in head.cross_entropy(place)}
    assert rows["quack"]["ms"].startswith("not measured: ")
    assert rows["cut-cross-entropy"]["ms"] > 0
    assert rows["cut-cross-entropy"]["difference"] < 1e-5
    assert rows["linear_cross_entropy"]["of the products"] > 0


def test_another_result_is_marked():
    x = torch.randn(5, requires_grad=True)

    def raises(x: Tensor) -> Any:
        raise RuntimeError("no such luck\nand more")

    others = {
        "same": Peer(lambda x: x * 2, (x,)),
        "of other tensors": Peer(lambda a, b: torch.cat((a, b)) * 2, x.detach().split((2, 3))),
        "twice": Peer(lambda x: x * 4, (x,)),
        "other gradient": Peer(lambda x: x + x.detach(), (x,)),
        "other shape": Peer(lambda x: x[:3] * 2, (x,)),
        "raises": Peer(raises, (x,)),
    }
    found, said = ops.running(Peer(lambda x: x * 2, (x,)), others)
    assert found.keys() == others.keys() - {"raises"}
    assert said["raises"] == {"what": "raises", "ms": "not measured: RuntimeError: no such luck"}
    assert {name for name, row in said.items() if "note" in row} == {"twice", "other gradient", "other shape"}
    assert said["same"] == said["of other tensors"] == {"difference": 0}
    assert said["twice"]["difference"] == pytest.approx(1)


_SEEN: list[Tensor] = []


class _InPlace(torch.autograd.Function):
    """x * x, whose gradient takes the place of what it saved, which is its input."""

    @staticmethod
    def forward(ctx, x):
        _SEEN.append(x.clone())
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, *grad_outputs):
        (dy,), (x,) = grad_outputs, ctx.saved_tensors
        x.data.mul_(2 * dy)
        return x.clone()


def test_a_peer_that_overwrites_gets_copies(place):
    x = torch.randn(7, requires_grad=True)
    before = x.detach().clone()
    peer = Peer(_InPlace.apply, (x,), overwrites=True)
    _SEEN.clear()
    times = ops.timed(place, {"forward": ops._forward(peer), "backward": ops._backward(peer)})
    assert times.keys() == {"forward", "backward"}
    assert torch.equal(x, before)
    assert len(_SEEN) == 10
    assert all(torch.equal(seen, before) for seen in _SEEN)
