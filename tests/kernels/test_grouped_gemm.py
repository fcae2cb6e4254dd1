"""Products over the rows of each expert, under the interpreter, against loops in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.kernels import launch
from tokenmill.kernels.moe import grouped_gemm, torch_gemm

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter

DIM, HIDDEN = 24, 40  # of two tiles of 16 columns, one not full; and of three
# Rows of each expert: one row in all; none, exactly a tile, several tiles, less than a tile, none at the end
COUNTS = [[1], [0, 16, 0, 37, 2, 0]]


@pytest.fixture(autouse=True, params=["descriptors", "pointers", "library"])
def _small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a matrix, fewer programs than tiles, and every buffer NaN before it is written."""
    small = dict(ROWS=16, COLUMNS=16, INNER=16, GROUP=2, DESCRIPTORS=request.param == "descriptors")
    small["LIBRARY"] = request.param == "library"
    monkeypatch.setattr(
        launch, "settings", lambda _, sizes, default: default | {k: small[k] for k in default if k in small}
    )

    new_empty = Tensor.new_empty

    def poison(*args: Any, **kwargs: Any) -> Tensor:
        made = new_empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poison)


def rows_of(counts: list[int]) -> tuple[Tensor, list[slice]]:
    """offsets (E,), and where each expert's rows are."""
    ends = torch.tensor(counts).cumsum(0)
    return ends.int(), [slice(end - count, end) for count, end in zip(counts, ends.tolist(), strict=True)]


def assert_close(value: Tensor, exact: Tensor, dtype: torch.dtype, rounded: torch.dtype | None = None) -> None:
    """`rounded`: the dtype of what it was made of, where that is coarser."""
    bound = {torch.float32: 1e-6, torch.float16: 1e-3}[rounded or dtype]
    assert value.dtype == dtype
    assert (value.double() - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_product(counts: list[int], transposed: bool, dtype: torch.dtype):
    offsets, rows = rows_of(counts)
    x = torch.randn(sum(counts), DIM).to(dtype)
    w = torch.randn(len(counts), HIDDEN, DIM).to(dtype)
    y = grouped_gemm.product(x, w if transposed else w.mT.contiguous(), offsets, transposed)
    exact = torch.cat([x[at].double() @ w[e].double().T for e, at in enumerate(rows)])
    assert_close(y, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_gate_up(counts: list[int], dtype: torch.dtype):
    offsets, rows = rows_of(counts)
    x = torch.randn(sum(counts), DIM).to(dtype)
    w = torch.randn(len(counts), 2 * HIDDEN, DIM).to(dtype) / DIM**0.5
    gate_up, h = grouped_gemm.gate_up(x, w, offsets, True)
    exact = torch.cat([x[at].double() @ w[e].double().T for e, at in enumerate(rows)])
    gate, up = exact.chunk(2, -1)
    assert_close(gate_up, exact, dtype)
    assert_close(h, F.silu(gate) * up, dtype)
    nothing, again = grouped_gemm.gate_up(x, w, offsets, False)
    assert nothing.numel() == 0
    assert torch.equal(again, h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_hidden_gradient(counts: list[int], weighted: bool, dtype: torch.dtype, request: pytest.FixtureRequest):
    offsets, rows = rows_of(counts)
    dy = torch.randn(sum(counts), DIM).to(dtype)
    w = (torch.randn(len(counts), DIM, HIDDEN) / DIM**0.5).to(dtype)
    gate_up = torch.randn(sum(counts), 2 * HIDDEN).to(dtype)
    p = torch.rand(sum(counts)) if weighted else None
    exact_gate_up = gate_up.double().requires_grad_()
    exact_p = torch.ones(sum(counts), dtype=torch.float64) if p is None else p.double()
    exact_p.requires_grad_()
    gate, up = exact_gate_up.chunk(2, -1)
    ph = exact_p[:, None] * F.silu(gate) * up
    y = torch.cat([ph[at] @ w[e].double().T for e, at in enumerate(rows)])
    exact = torch.autograd.grad(y, (exact_gate_up, exact_p), dy.double())
    d_gate_up, h, d_p = grouped_gemm.hidden_gradient(dy, w, gate_up, offsets, p)
    assert_close(d_gate_up, exact[0], dtype)
    assert_close(h, ph.detach(), dtype)
    if d_p is None:
        assert not weighted
    else:
        in_library = request.node.callspec.params["_small_tiles"] == "library"
        assert_close(d_p, exact[1], torch.float32, rounded=dtype if in_library else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_weight_gradient(counts: list[int], dtype: torch.dtype):
    offsets, rows = rows_of(counts)
    a, b = torch.randn(sum(counts), HIDDEN).to(dtype), torch.randn(sum(counts), DIM).to(dtype)
    out = grouped_gemm.weight_gradient(a, b, offsets)
    exact = torch.stack([a[at].double().T @ b[at].double() for at in rows])
    assert_close(out, exact, dtype)
    assert not out[torch.tensor(counts) == 0].any()
    total = torch.randn(out.shape)
    before = total.clone()
    assert grouped_gemm.weight_gradient(a, b, offsets, total) is total
    assert_close(total, before + exact, torch.float32)  # whatever the products are made of


def test_what_a_product_leaves_of_empty_experts_is_cleared():
    out = torch.full((4, 24, 40), float("nan"))
    offsets = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    torch_gemm._clear_kernel[(30, 4)](out, offsets, 24 * 40, BLOCK=32)  # type: ignore[arg-type]
    assert not out[[0, 2]].any()
    assert out[[1, 3]].isnan().all()


def test_arguments_are_those_of_a_dtype(monkeypatch: pytest.MonkeyPatch):
    """What is fast in bfloat16 would spill in float32, and PyTorch's product waits for the host in all but that."""
    asked = []
    monkeypatch.setattr(launch, "settings", lambda kernel, shape, default: asked.append(shape) or default)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "architecture", lambda: 90)
    made = {dtype: launch.grouped_gemm("moe_gate_up", (8, 4, 2), dtype) for dtype in (torch.bfloat16, torch.float32)}
    assert asked == [[8, 4, 2, "bfloat16"], [8, 4, 2, "float32"]]
    assert "LIBRARY" in made[torch.bfloat16]
    assert "LIBRARY" not in made[torch.float32]
    monkeypatch.setattr(launch, "architecture", lambda: 80)
    assert "LIBRARY" not in launch.grouped_gemm("moe_gate_up", (8, 4, 2), torch.bfloat16)


def test_no_rows_at_all():
    offsets = torch.zeros(3, dtype=torch.int32)
    w, none = torch.randn(3, 2 * HIDDEN, DIM), torch.empty(0, DIM)
    gate_up, h = grouped_gemm.gate_up(none, w, offsets, True)
    assert gate_up.shape == (0, 2 * HIDDEN)
    assert grouped_gemm.product(h, torch.randn(3, DIM, HIDDEN), offsets, True).shape == (0, DIM)
    gradient = grouped_gemm.weight_gradient(gate_up, none, offsets)
    assert gradient.shape == w.shape
    assert not gradient.any()
