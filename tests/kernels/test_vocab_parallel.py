"""A head split over ranks gives each of them what the whole head gives one process."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, library

from tokenmill.kernels import launch, logits, vocab_parallel
from tokenmill.kernels.backends import Backend
from tokenmill.kernels.cross_entropy import IGNORE, LossOutput, linear_cross_entropy
from tokenmill.kernels.vocab_parallel import vocab_parallel_cross_entropy

ROWS, DIM, VOCAB = 37, 20, 301
# The first row of each rank's slice: even, uneven, one row long.
SPLITS = [(0, 151), (0, 101, 202), (0, 300), (0, 1, 280)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """hidden, the whole weight, and everything else; equal logits on either side of every split."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, DIM), torch.randn(VOCAB, DIM) / 2
    weight[[100, 101, 299, 300]] = weight[0].clone()
    targets = torch.randint(VOCAB, (ROWS,))
    targets[:6] = torch.tensor([0, 100, 101, 299, 300, IGNORE])
    rows = torch.arange(0, ROWS - 3, dtype=torch.int32)
    return hidden.to(dtype), weight.to(dtype), dict(targets=targets, token_weights=torch.rand(ROWS), rows=rows)


def flat(out: LossOutput, *gradients: Tensor | None) -> list[Tensor]:
    return [out.loss.detach(), out.nll, out.correct, out.entropy, *(g for g in gradients if g is not None)]


def of_slice(
    dtype: torch.dtype, group: dist.ProcessGroup, bounds: tuple[int, ...], rank: int, backend: Backend = "torch"
):
    hidden, weight, rest = problem(dtype)
    first, last = bounds[rank], (*bounds, VOCAB)[rank + 1]
    hidden, weight = hidden.requires_grad_(), weight[first:last].clone().requires_grad_()
    out = vocab_parallel_cross_entropy(hidden, weight, group=group, first=first, z_loss=0.01, backend=backend, **rest)
    (out.loss * 0.3).backward()
    return flat(out, hidden.grad, weight.grad)


def of_whole(dtype: torch.dtype) -> list[Tensor]:
    hidden, weight, rest = problem(dtype)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    out = linear_cross_entropy(hidden, weight, z_loss=0.01, backend="torch", **rest)
    (out.loss * 0.3).backward()
    return flat(out, hidden.grad, weight.grad)


def worker(rank: int, folder: str) -> None:
    """One of three processes: every split, over as many of them as it has parts."""
    torch.set_num_threads(1)
    launch.cross_entropy_chunk = lambda *_: 7
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3)}
    results = {}
    for bounds in SPLITS:
        group = groups[len(bounds)]
        if rank < len(bounds) and isinstance(group, dist.ProcessGroup):
            results |= {(bounds, dtype): of_slice(dtype, group, bounds, rank) for dtype in DTYPES}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("vocab_parallel")
    mp.start_processes(worker, (str(folder),), nprocs=3, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bounds", SPLITS)
def test_ranks_are_one_process(ranks, bounds, dtype):
    results = [rank[bounds, dtype] for rank in ranks[: len(bounds)]]
    exact, peer = of_whole(torch.float64), of_whole(dtype)
    for result in results[1:]:  # all but the weight's gradient is the same, bit by bit
        assert all(torch.equal(a, b) for a, b in zip(results[0][:5], result[:5], strict=True))
    joined = [*results[0][:5], torch.cat([result[5] for result in results])]
    for index, (value, same, truth) in enumerate(zip(joined, peer, exact, strict=True)):
        if value.dtype == torch.bool:
            assert torch.equal(value, same)
            continue
        # bf16: each rank's part of d_hidden is rounded, and so is their sum
        bound = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 8e-3 if index == 4 else 0}[dtype]
        assert error(value, truth) <= max(2 * error(same, truth), bound), index


@pytest.fixture
def alone(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_rank_is_the_whole(alone, backend):
    for value, exact in zip(of_slice(torch.float32, alone, (0,), 0, backend), of_whole(torch.float64), strict=True):
        assert torch.equal(value, exact) if value.dtype == torch.bool else error(value, exact) <= 2e-6
    repeated = [of_slice(torch.float32, alone, (0,), 0, backend) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*repeated, strict=True))


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parts_of_a_row_combine(use_triton, dtype):
    """In one process: what three ranks would gather, and the gradient that each makes with the lse of all."""
    bounds = (0, 120, 121, VOCAB)
    x = (torch.randn(17, VOCAB) * 3).to(dtype)
    x[3] = 1.0  # all equal
    targets, weights = torch.randint(VOCAB, (17,)), torch.rand(17)
    targets[:4] = torch.tensor([IGNORE, 120, VOCAB, 0])
    weights[0] = 0.0
    pieces = []
    for begin, end in pairwise(bounds):
        stride = logits.padded(end - begin) if use_triton else end - begin
        piece = torch.full((17, stride), torch.nan, dtype=dtype)[:, : end - begin]
        pieces.append((piece.copy_(x[:, begin:end]), torch.where(targets == IGNORE, IGNORE, targets - begin)))
    parts = torch.stack([logits.statistics(piece, own, use_triton) for piece, own in pieces])
    out = logits.combine(parts, targets)

    whole = x.double().requires_grad_()
    lse = whole.logsumexp(-1)
    kept = (targets != IGNORE) & (targets < VOCAB)
    nll = torch.where(kept, lse - whole.gather(1, torch.where(kept, targets, 0)[:, None])[:, 0], 0)
    (weights * torch.where(kept, nll + 0.1 * lse**2, 0)).sum().backward()
    for piece, own in pieces:
        logits.gradient(piece, own, weights * kept, out.lse, 0.1, use_triton)
    gradient = torch.cat([piece for piece, _ in pieces], 1)
    assert whole.grad is not None
    assert out.nll[2].isnan()
    keep = torch.arange(17) != 2
    assert error(out.nll[keep], nll.detach()[keep]) <= 2e-6
    entropy = torch.distributions.Categorical(logits=whole.detach()).entropy() * (targets != IGNORE)
    assert error(out.entropy, entropy) <= 2e-6
    assert error(gradient, whole.grad) <= (2e-6 if dtype == torch.float32 else 5e-4)
    assert torch.equal(out.correct, x.argmax(-1) == targets)


def test_operator_is_well_formed_and_compiles(alone):
    hidden, weight, rest = problem(torch.float32)
    args = (hidden, weight, rest["targets"], rest["token_weights"], rest["rows"], 0.1, True, True, 0, alone.group_name)
    library.opcheck(vocab_parallel._vocab_parallel_cross_entropy, (*args, False))

    def step(h: Tensor, w: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(h * 2, w, rest["targets"], alone, first=0).loss / 3

    leaves = [[t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2)]
    step(*leaves[0]).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves[1]).backward()
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_wrong_input(alone):
    hidden, weight, rest = problem(torch.float32)
    with pytest.raises(ValueError, match="at least one row"):
        vocab_parallel_cross_entropy(hidden, weight[:0], rest["targets"], alone, first=0)
    with pytest.raises(ValueError, match="targets: expected torch.int64"):
        vocab_parallel_cross_entropy(hidden, weight, rest["targets"].int(), alone, first=0)
