"""The optimizer of bf16 parameters: its memory, its shards, and what comes back from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tokenmill.kernels.adamw import adamw_
from tokenmill.trainer.checkpoint import load_training, save_checkpoint
from tokenmill.trainer.config import OptimizerSection
from tokenmill.trainer.distributed import World, join, shard
from tokenmill.trainer.model import ModelConfig, MoEConfig, Transformer, lora
from tokenmill.trainer.model.config import AdapterConfig
from tokenmill.trainer.optim import StochasticAdamW, build_optimizer
from tokenmill.trainer.state import TrainState

CONFIG = ModelConfig(16, 2, 2, 1, 8, 24, 51, sliding_window=4)
SECTION = OptimizerSection(1e-2)


def make(seed: int = 0, world: World | None = None) -> tuple[Transformer, torch.optim.Optimizer]:
    model = Transformer(CONFIG, dtype=torch.bfloat16)
    model.initialise(seed)
    shard(model, world or World(), "bf16")
    return model, build_optimizer(model, SECTION, "bf16", seed=3)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    torch.manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_precision_chooses():
    model = Transformer(CONFIG)
    for precision in ("fp32", "bf16-mixed"):
        assert isinstance(build_optimizer(model, SECTION, precision), torch.optim.AdamW)
    assert isinstance(build_optimizer(model, SECTION, "bf16"), StochasticAdamW)


def test_eight_bytes_a_parameter():
    model, optimizer = make()
    step(model, optimizer, 0)
    held: list[Tensor] = [*model.parameters(), *model.parameters()]  # gradients have their dtype
    held += [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert sum(t.nbytes for t in held) == 8 * sum(p.numel() for p in model.parameters())


def test_lengths_are_not_decayed():
    """Norms' gains and DoRA's magnitudes, also those of experts, which have two dimensions; all else is."""
    model = Transformer(dataclasses.replace(CONFIG, moe=MoEConfig(3)), moe="reference")
    lora.attach(model, AdapterConfig(kind="dora", rank=2, targets=("attention", "experts", "router")))
    model.requires_grad_()
    decayed, others = ({id(p) for p in group["params"]} for group in build_optimizer(model, SECTION).param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    assert names.keys() == decayed | others
    of_experts = {name for i, name in names.items() if i in others and model.get_parameter(name).dim() == 2}
    assert of_experts == {
        f"blocks.{block}.feed_forward.adapters.{weight}.magnitude"
        for block in range(CONFIG.n_layers)
        for weight in ("w_gate_up.gate", "w_gate_up.up", "w_down.down")
    }
    assert {names[i].rpartition(".")[2] for i in decayed} == {"weight", "w_gate_up", "w_down", "a", "b"}
    assert not {names[i] for i in decayed if "norm" in names[i]}


def test_each_parameter_has_its_number_decay_and_steps():
    """Norms are not decayed; one without a gradient keeps its number, and counts no step."""
    _, optimizer = make()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected = [[p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)] for p in parameters]
    steps = [0] * len(parameters)
    for round_ in range(3):
        for number, parameter in enumerate(parameters):
            parameter.grad = None if round_ == 1 and number % 3 == 0 else torch.randn_like(parameter)
            if parameter.grad is not None:
                steps[number] += 1
                p, m, v = expected[number]
                decay = SECTION.weight_decay if parameter.dim() > 1 else 0.0
                adamw_(
                    p, parameter.grad, m, v, lr=SECTION.learning_rate, beta1=SECTION.betas[0], beta2=SECTION.betas[1],
                    eps=SECTION.eps, weight_decay=decay, step=steps[number], seed=3, tensor_id=number,
                )  # fmt: skip
        optimizer.step()
    for parameter, (p, *_) in zip(parameters, expected, strict=True):
        assert torch.equal(parameter, p)


def test_learns_where_rounding_to_nearest_stalls():
    """A regression from weights of 1 to weights of 0.8, in steps of less than half a bf16 ulp."""
    inputs = torch.randn(256, 24)

    def loss_of(weight: Tensor) -> Tensor:
        return (inputs @ (weight.float() - 0.8)).square().mean()

    def train(optimizer_class: type[StochasticAdamW] | type[torch.optim.AdamW]) -> float:
        weight = nn.Parameter(torch.ones(24, dtype=torch.bfloat16))
        optimizer = optimizer_class([weight], lr=5e-4, betas=(0.9, 0.95), weight_decay=0.0)
        for _ in range(600):
            loss_of(weight).backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss_of(weight).item()

    start = loss_of(torch.ones(24)).item()
    assert train(torch.optim.AdamW) == pytest.approx(start)
    assert train(StochasticAdamW) < 0.01 * start


def test_a_checkpoint_resumes_bit_by_bit(tmp_path):
    model, optimizer = make()
    for number in range(2):
        step(model, optimizer, number)
    save_checkpoint(tmp_path / "at-2", model, optimizer=optimizer, state=TrainState(step=2))
    other, fresh = make(seed=1)
    load_training(tmp_path / "at-2", other, fresh)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[a].items():
            assert value.dtype == fresh.state[b][key].dtype
            assert torch.equal(value, fresh.state[b][key]), key
    step(model, optimizer, 2)
    step(other, fresh, 2)
    assert_same(model, other)


def test_sharded_by_fsdp(tmp_path):
    """A world of one, with every parameter a DTensor, and its checkpoint read by a model that is not sharded."""
    whole, optimizer = make()
    gradients = [torch.randn_like(p) for p in whole.parameters()]
    with join("cpu", sharded=True) as world:
        model, sharded = make(world=world)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert isinstance(parameter, DTensor)
            parameter.grad = DTensor.from_local(gradient.clone(), parameter.device_mesh, parameter.placements)
        sharded.step()
        save_checkpoint(tmp_path / "at-1", model, world, optimizer=sharded, state=TrainState(step=1))
    for parameter, gradient in zip(whole.parameters(), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    other, fresh = make(seed=1)
    load_training(tmp_path / "at-1", other, fresh)
    assert_same(whole, other)
    step(whole, optimizer, 2)
    step(other, fresh, 2)
    assert_same(whole, other)


@pytest.fixture(params=range(3))
def rank_of_three(request: pytest.FixtureRequest) -> Iterator[int]:
    """This process as one of three, of which the others are not there: nothing here communicates."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=request.param, world_size=3)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(7, 5), (8,), (4, 3, 5)], ids=str)  # of (4, ...), the third rank holds nothing
def test_a_rank_updates_its_rows_of_the_whole(rank_of_three: int, shape: tuple[int, ...]):
    mesh = init_device_mesh("cpu", (3,))
    value, gradients = torch.randn(shape).bfloat16(), torch.randn(3, *shape).bfloat16()
    whole = nn.Parameter(value.clone())
    rows = [list(t.chunk(3)) for t in (value, *gradients)]
    empty = value.new_empty(0, *shape[1:])
    mine = [(r[rank_of_three] if rank_of_three < len(r) else empty).clone() for r in rows]

    def wrap(local: Tensor) -> DTensor:
        return DTensor.from_local(local, mesh, [Shard(0)], shape=value.shape, stride=value.stride())

    part = nn.Parameter(wrap(mine[0]))
    optimizers = [StochasticAdamW([p], lr=1e-2, seed=3) for p in (whole, part)]
    for gradient, local in zip(gradients, mine[1:], strict=True):
        whole.grad, part.grad = gradient, wrap(local)
        for optimizer in optimizers:
            optimizer.step()
    expected = [*whole.detach().chunk(3), empty][rank_of_three]
    assert isinstance(part.data, DTensor)
    assert torch.equal(part.data.to_local(), expected)
