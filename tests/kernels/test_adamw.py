"""AdamW against PyTorch's; its rounding is unbiased, to a neighbour, the same in torch, Triton and every shard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmill import _C
from tokenmill.kernels import launch
from tokenmill.kernels.adamw import adamw_, random_bits, stochastic_round

BF16, FP32 = torch.bfloat16, torch.float32
SEED = 2**40 + 12345  # both halves matter
SETTINGS: dict[str, Any] = dict(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
NUMBERS: dict[str, Any] = SETTINGS | dict(step=3, seed=SEED, tensor_id=5)
DTYPES = [  # of parameter, gradient and moments
    (BF16, BF16, BF16),
    (BF16, FP32, BF16),
    (BF16, BF16, FP32),
    (FP32, BF16, FP32),
]


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "adamw", lambda count: {"BLOCK": 64, "num_warps": 1})


def tensors(*shape: int, dtypes: tuple[torch.dtype, ...] = DTYPES[0]) -> list[Tensor]:
    """A parameter, its gradient and moments."""
    parameter, gradient, moments = dtypes
    return [
        torch.randn(shape).to(parameter),
        torch.randn(shape).to(gradient),
        torch.randn(shape).to(moments),
        torch.rand(shape).to(moments),
    ]


def updated(arguments: list[Tensor], **numbers: Any) -> list[Tensor]:
    """What parameter and moments become."""
    parameter, gradient, exp_avg, exp_avg_sq = (t.clone() for t in arguments)
    adamw_(parameter, gradient, exp_avg, exp_avg_sq, **(NUMBERS | numbers))
    return [parameter, exp_avg, exp_avg_sq]


def exactly(arguments: list[Tensor], **numbers: Any) -> list[Tensor]:
    """The same before rounding, for inputs that fp32 holds."""
    return updated([t.float() for t in arguments], **numbers)


def neighbours(value: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 numbers at or next to fp32 values, in fp32: towards 0, and away from it."""
    cut = value.view(torch.int32) & -65536
    return cut.view(FP32), torch.where(cut == value.view(torch.int32), cut, cut + 65536).view(FP32)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


# ----------------------------------------------------------------------------------------------------- the update


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fp32_is_pytorchs_adamw(backend: str, weight_decay: float):
    """Over 20 steps, with at most twice the error of PyTorch's own against fp64."""
    start, gradients = torch.randn(129), torch.randn(20, 129)

    def theirs(dtype: torch.dtype) -> list[Tensor]:
        parameter = start.clone().to(dtype).requires_grad_()
        optimizer = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.95), weight_decay=weight_decay)
        for gradient in gradients:
            parameter.grad = gradient.to(dtype)
            optimizer.step()
        state = optimizer.state[parameter]
        return [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]

    parameter, exp_avg, exp_avg_sq = start.clone(), torch.zeros(129), torch.zeros(129)
    for step, gradient in enumerate(gradients, start=1):
        numbers: dict[str, Any] = NUMBERS | dict(lr=1e-2, weight_decay=weight_decay, step=step, backend=backend)
        adamw_(parameter, gradient, exp_avg, exp_avg_sq, **numbers)
    for ours, their, exact in zip((parameter, exp_avg, exp_avg_sq), theirs(FP32), theirs(torch.float64), strict=True):
        assert (ours - exact).norm() <= 2 * (their - exact).norm()


@pytest.mark.parametrize("count", [0, 1, 17, 1025])
@pytest.mark.parametrize("offset", [0, 1, 2**34 + 7])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_triton_has_the_bits_of_torch(count: int, offset: int, dtypes: tuple[torch.dtype, ...]):
    arguments = tensors(count, dtypes=dtypes)
    for seed in (0, SEED):
        results = [updated(arguments, offset=offset, seed=seed, backend=backend) for backend in ("torch", "triton")]
        assert same(*results)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("which", ["lr", "step", "both"])
def test_numbers_and_device_tensors_are_the_same(backend: str, which: str):
    arguments = tensors(65, dtypes=(FP32, FP32, FP32))
    arguments[0].zero_()  # so that nothing hides the last bit of the update
    numbers = {"lr": torch.tensor(SETTINGS["lr"], dtype=torch.float64), "step": torch.tensor(3)}
    chosen = numbers if which == "both" else {which: numbers[which]}
    assert same(updated(arguments, backend=backend, **chosen), updated(arguments, backend=backend))


def test_a_gradient_of_other_strides():
    arguments = tensors(7, 5)
    turned = [arguments[0], arguments[1].T.contiguous().T, *arguments[2:]]
    for backend in ("torch", "triton"):
        assert same(updated(turned, backend=backend), updated(arguments))


# --------------------------------------------------------------------------------------------------- the rounding


@pytest.mark.parametrize("value", [1.0, -1.00001, 0.3, -3e38, 1e-40, 0.0, -0.0, 2.0**-126])
def test_rounds_up_as_often_as_the_expectation_asks(value: float):
    """Over all 2**16 random numbers: the mean is the value itself, and what bf16 holds stays."""
    exact = torch.tensor(value)
    low, high = neighbours(exact)
    rounded = stochastic_round(exact.expand(65536), torch.arange(65536, dtype=torch.int32)).float()
    assert ((rounded == low) | (rounded == high)).all()
    assert rounded.double().mean() == pytest.approx(float(exact), rel=1e-12)
    assert (torch.signbit(rounded) == torch.signbit(exact)).all()


@pytest.mark.parametrize("bits", [0, 1, 0xFFFF])
def test_what_is_no_number_stays_so(bits: int):
    patterns = torch.tensor([0x7F800000, -0x800000, 0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32)
    rounded = stochastic_round(patterns.view(FP32), torch.full((6,), bits, dtype=torch.int32)).float()
    assert rounded[:2].tolist() == [float("inf"), float("-inf")]
    assert rounded[2:].isnan().all()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # NumPy's, interpreting
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_and_infinity_reach_what_they_touch_and_no_more(backend: str):
    arguments = tensors(64)
    arguments[1][:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    arguments[0][3:5] = torch.tensor([float("inf"), float("nan")])
    results = updated(arguments, backend=backend)
    for result, exact in zip(results, exactly(arguments), strict=True):
        assert torch.equal(result.isnan(), exact.isnan())
        assert torch.equal(result.isinf(), exact.isinf())
        assert result[5:].isfinite().all()
    assert same(results, updated(arguments))


def test_the_mean_over_seeds_is_the_fp32_update():
    """Each element's mean lies within its standard error, by a z-test; every result is a neighbour of the exact."""
    arguments, seeds = tensors(129), 400
    runs = [updated(arguments, seed=seed) for seed in range(seeds)]
    for results, exact in zip(zip(*runs, strict=True), exactly(arguments), strict=True):
        rounded = torch.stack(results).double()
        low, high = (n.double() for n in neighbours(exact))
        assert ((rounded == low) | (rounded == high)).all()
        share = (exact - low) / (high - low)
        z = (rounded.mean(0) - exact) / ((high - low) * (share * (1 - share) / seeds).sqrt())
        z = z[(share > 0.05) & (share < 0.95)]  # a binomial that is near enough a normal distribution
        assert z.abs().max() < 4
        assert z.square().mean() == pytest.approx(1.0, abs=0.4)


def test_bits_of_elements_tensors_steps_and_seeds_are_unlike():
    like = torch.empty(4096)
    base: dict[str, Any] = dict(seed=SEED, step=3, tensor_id=5, offset=0, like=like)
    changed = [{}, {"seed": SEED + 1}, {"seed": SEED + 2**32}, {"step": 4}, {"tensor_id": 6}, {"offset": 4096}]
    drawn = torch.stack([bits for change in changed for bits in random_bits(**(base | change))]).double()
    assert drawn.mean(1).sub(65535 / 2).abs().max() < 5 * 65536 / (12 * 4096) ** 0.5
    correlation = torch.corrcoef(drawn) - torch.eye(len(drawn))
    assert correlation.abs().max() < 5 / 4096**0.5
    neighbour = torch.corrcoef(torch.stack([drawn[0, :-1], drawn[0, 1:]]))[0, 1]
    assert abs(neighbour) < 5 / 4096**0.5


def test_updates_below_half_an_ulp_are_not_lost():
    """Rounded to nearest, a parameter of 1 never moves by steps of 1e-4; here it does, by their sum on average."""
    count, steps, lr = 4096, 50, 1e-4
    assert lr < torch.finfo(BF16).eps / 4  # the distance to the next number below 1 is eps / 2
    nearest, master = torch.ones(count, dtype=BF16), torch.ones(count)
    ours, gradient = torch.ones(count, dtype=BF16), torch.full((count,), 0.01, dtype=BF16)
    moments = [[torch.zeros(count), torch.zeros(count)] for _ in range(3)]
    for step in range(1, steps + 1):
        numbers: dict[str, Any] = NUMBERS | dict(lr=lr, weight_decay=0.0, step=step)
        adamw_(ours, gradient, *moments[0], **numbers)
        adamw_(master, gradient, *moments[1], **numbers)
        wide = nearest.float()
        adamw_(wide, gradient, *moments[2], **numbers)
        nearest = wide.to(BF16)
    assert (nearest == 1).all()
    assert master.mean() == pytest.approx(1 - steps * lr, abs=1e-5)
    error = float(ours.double().mean() - master.double().mean())
    assert abs(error) < 5 * (steps * lr * 2**-8 / count) ** 0.5  # variance of a step: at most lr * ulp


# ------------------------------------------------------------------------------------------- the same bits everywhere


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rows", [[1, 8], [4, 5], [3, 3, 3], [9, 0]], ids=str)
def test_shards_have_the_bits_of_the_whole(backend: str, rows: list[int]):
    arguments = tensors(9, 13)
    whole, first = updated(arguments, backend=backend), 0
    for part in zip(*[t.split(rows) for t in arguments], strict=True):
        result = updated(list(part), offset=first * 13, backend=backend)
        assert same(result, [t[first : first + len(part[0])] for t in whole])
        first += len(part[0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_repeatable_and_other_with_another_seed(backend: str):
    arguments = tensors(65)
    assert same(updated(arguments, backend=backend), updated(arguments, backend=backend))
    assert not same(updated(arguments, backend=backend), updated(arguments, seed=SEED + 1, backend=backend))


def test_bits_are_those_of_the_docstring():
    offset, count = 2**33 + 5, 9
    drawn = random_bits(SEED, 3, 5, offset, torch.empty(count))
    for i in range(count):
        pair = (offset + i) // 2
        words = _C.philox((pair & 0xFFFFFFFF, pair >> 32, 5, 3), (SEED & 0xFFFFFFFF, SEED >> 32))
        a, b = words[2:] if (offset + i) % 2 else words[:2]
        assert [int(bits[i]) for bits in drawn] == [a & 0xFFFF, a >> 16, b & 0xFFFF]


def test_wrong_input():
    parameter, gradient, exp_avg, exp_avg_sq = tensors(4, 6)
    with pytest.raises(ValueError, match=r"gradient is \[6\] on cpu, the parameter \[4, 6\]"):
        adamw_(parameter, gradient[0], exp_avg, exp_avg_sq, **NUMBERS)
    with pytest.raises(ValueError, match="exp_avg is torch.float16: expected torch.bfloat16 or torch.float32"):
        adamw_(parameter, gradient, exp_avg.half(), exp_avg_sq, **NUMBERS)
    with pytest.raises(ValueError, match="exp_avg_sq has strides .* expected a contiguous tensor"):
        adamw_(parameter, gradient, exp_avg, exp_avg_sq.T.contiguous().T, **NUMBERS)
    for name, value in (("step", 0), ("seed", -1), ("tensor_id", -1), ("offset", -1)):
        numbers: dict[str, Any] = NUMBERS | {name: value}
        with pytest.raises(ValueError, match=f"{name} is {value}: expected"):
            adamw_(parameter, gradient, exp_avg, exp_avg_sq, **numbers)
