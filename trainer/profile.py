"""Where a step's time goes: a few steps of a recipe under torch's profiler, as a trace and as a table by kind.

The kinds come from scopes around the model's modules and the step's other parts, which stand only while this runs.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from tokenmill.data.batch import Batch
from tokenmill.data.files import replace_file
from tokenmill.data.prefetch import Prefetch
from tokenmill.trainer.config import Recipe
from tokenmill.trainer.distributed import World, join
from tokenmill.trainer.loop import Trainer
from tokenmill.trainer.model import Transformer, attention
from tokenmill.trainer.model.attention import Attention
from tokenmill.trainer.model.linear import Linear
from tokenmill.trainer.model.moe import MoELayer
from tokenmill.trainer.model.transformer import Embedding, Head, RMSNorm
from tokenmill.trainer.trace import SCOPE, WINDOW, Gemm, account

KINDS = {
    "gemm": "products of the linear layers",
    "attention": "without its linear layers and rotary embedding",
    "experts": "routing, permutation, the experts' products",
    "loss": "the head's products, cross-entropy, balancing",
    "norm": "RMSNorm and the residual additions in it",
    "rotary": "",
    "swiglu": "the experts' too",
    "embedding": "",
    "optimizer": "accumulating gradients, clipping, the update",
    "communication": "collectives, with their copies and waits",
    "data": "making batches, copying them to the device",
    "other": "",
    "idle": "CPU: Python, in no operator; GPU: gaps between kernels",
}
TOLERANCE = 0.03  # of a step's time, between the sum of the rows and the clock
GEMM_ROWS = 24  # in the printed table; all are in profile.json


@dataclass(frozen=True)
class KindRow:
    kind: str
    ms: float  # a step
    peak_mib: float  # allocated by it in the profiled steps, and alive when most is


@dataclass(frozen=True)
class GemmRow:
    gemm: Gemm
    calls: int  # in all profiled steps
    ms: float  # a step, as a part of its kind's
    tflops: float  # achieved TFLOP/s


@dataclass(frozen=True)
class Profile:
    """What `profile.json` holds. Times are milliseconds a step, on rank 0."""

    device: str
    torch: str
    ranks: int
    steps: int
    step_ms: float  # by the clock, under the profiler
    plain_step_ms: float  # the fastest step before, without it
    data_wait_ms: float
    sum_ms: float  # of the rows
    kinds: list[KindRow]
    gemms: list[GemmRow]  # the longest first
    widths: list[int]  # the sizes of the model's weights; any other size in a product is a number of tokens


_MODULES: dict[type[nn.Module], str] = {
    Transformer: "other",  # what its parts leave, lest it count for the objective that calls it
    Embedding: "embedding",
    RMSNorm: "norm",
    Attention: "attention",
    MoELayer: "experts",
    Linear: "gemm",
    Head: "loss",
}


def profile(recipe: Recipe, output: Path, steps: int = 5, warmup: int = 2) -> str:
    """Profile `steps` optimizer steps of a recipe, after `warmup` others. Returns the table; on ranks but 0, "".

    The run begins afresh and touches nothing in the recipe's own folder. Into `output` rank 0 writes `trace.json` (for
    ui.perfetto.dev), `profile.json` (a `Profile`), and on a GPU `memory.pickle` (for pytorch.org/memory_viz).

    Raises ValueError where steps or warmup is not positive, or `output` lies in the recipe's own folder.
    """
    if steps < 1 or warmup < 1:
        raise ValueError(f"profile: steps and warmup must be at least 1, got {steps} and {warmup}")
    if Path(recipe.output).resolve() in (output.resolve(), *output.resolve().parents):
        raise ValueError(f"profile: {output} lies in the run's own folder {recipe.output}; choose another")
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        length = replace(recipe.train, steps=warmup + steps + 1, tokens=None, epochs=None)
        world = stack.enter_context(join(recipe.device, sharded=recipe.train.precision == "bf16-mixed"))
        trainer = Trainer(replace(recipe, output=scratch, train=length), world)
        stack.callback(trainer.log.close)
        stack.enter_context(_scopes(trainer))
        plain_seconds = min(_timed_steps(trainer, 1)[0] for _ in range(warmup))
        if world.rank > 0:
            _timed_steps(trainer, steps)
            _memory_snapshot(trainer, None)
            return ""
        output.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (world.device.type == "cuda")
        with torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=True, acc_events=True
        ) as profiler:
            seconds, data_wait = _timed_steps(trainer, steps)
        _memory_snapshot(trainer, output / "memory.pickle")
    profiler.export_chrome_trace(str(output / "trace.json"))
    found = account(json.loads((output / "trace.json").read_text()), world.device.type)
    result = Profile(
        device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        torch=torch.__version__,
        ranks=world.size,
        steps=steps,
        step_ms=seconds * 1e3,
        plain_step_ms=plain_seconds * 1e3,
        data_wait_ms=data_wait * 1e3,
        sum_ms=found.times.total() / steps / 1e6,
        kinds=[KindRow(kind, found.times[kind] / steps / 1e6, found.peak_bytes[kind] / 2**20) for kind in KINDS],
        gemms=[
            GemmRow(gemm, found.gemm_calls[gemm], ns / steps / 1e6, found.gemm_calls[gemm] * gemm.flops / ns / 1e3)
            for gemm, ns in found.gemm_times.most_common()
        ],
        widths=sorted({size for parameter in trainer.model.parameters() for size in parameter.shape}),
    )
    replace_file(output / "profile.json", json.dumps(asdict(result), indent=1) + "\n")
    return table(result)


def _timed_steps(trainer: Trainer, steps: int) -> tuple[float, float]:
    """Seconds a step, the device's work included, and the seconds of them that it waited for data."""
    _synchronize(trainer.world)
    begin = time.perf_counter()
    with record_function(WINDOW):
        waits = [trainer.step().data_wait for _ in range(steps)]
        _synchronize(trainer.world)
    return (time.perf_counter() - begin) / steps, sum(waits) / steps


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _memory_snapshot(trainer: Trainer, file: Path | None) -> None:
    """On a GPU, one more step, whose allocations are recorded with their stacks (too slow for a step that is timed)
    and written to `file`; None: a rank that only takes the step."""
    if trainer.world.device.type != "cuda":
        return
    if file is None:
        trainer.step()
        return
    torch.cuda.memory._record_memory_history()
    try:
        trainer.step()
        torch.cuda.memory._dump_snapshot(str(file))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def _scopes(trainer: Trainer) -> Iterator[None]:
    """While it lasts, the parts of the step run in scopes named by their kinds."""
    functions = [
        (Prefetch, "__next__", "data"),
        (Batch, "to", "data"),
        (trainer, "objective", "loss"),
        (attention, "apply_rotary", "rotary"),  # a function in the midst of a module
        (torch.nn.utils, "clip_grad_norm_", "optimizer"),
        (World, "sum", "communication"),
    ]
    with ExitStack() as stack:
        for owner, name, kind in functions:
            original = getattr(owner, name)
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, _in_scope(original, kind))
        for module in trainer.model.modules():
            for cls, kind in _MODULES.items():
                if isinstance(module, cls):
                    for handle in _hooks(module, kind):
                        stack.callback(handle.remove)
        yield


def _in_scope(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    @wraps(function)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        with record_function(SCOPE + kind):
            return function(*args, **kwargs)

    return scoped


def _hooks(module: nn.Module, kind: str) -> list[Any]:
    """Open a scope before the module's forward and close it after; the handles that undo it."""
    scopes: list[record_function] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        scopes.append(record_function(SCOPE + kind))
        scopes[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        scopes.pop().__exit__(None, None, None)

    # Also when the forward is cut short: a recomputed one ends, by an exception, as soon as it has made what is needed.
    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def table(result: Profile) -> str:
    """The profile for people: a row a kind, and the products that took longest."""
    apart = result.sum_ms / result.step_ms - 1
    lines = [
        f"profile of {result.steps} steps on {result.device}, rank 0 of {result.ranks}, torch {result.torch}: "
        f"{result.step_ms:.2f} ms a step ({result.plain_step_ms:.2f} without the profiler), "
        f"of which {result.data_wait_ms:.2f} waiting for data",
        "",
        f"{'kind':<14}{'ms a step':>10}{'share':>8}{'MiB at peak':>13}",
    ]
    for row in result.kinds:
        share = row.ms / result.step_ms
        lines.append(f"{row.kind:<14}{row.ms:>10.3f}{share:>8.1%}{row.peak_mib:>13.1f}  {KINDS[row.kind]}".rstrip())
    peak = sum(row.peak_mib for row in result.kinds)
    negative = [row.kind for row in result.kinds if row.ms < 0]
    verdict = f"{apart:+.2%} of the clock's" + ("" if abs(apart) <= TOLERANCE else ": the rows miss something")
    verdict += f"; less than nothing for {', '.join(negative)}: do not trust this table" if negative else ""
    lines += [
        f"{'sum':<14}{result.sum_ms:>10.3f}{result.sum_ms / result.step_ms:>8.1%}{peak:>13.1f}  {verdict}",
        "",
        f"{'M x N x K':<26}{'in':<12}{'calls a step':>12}{'ms a step':>11}{'TFLOP/s':>9}",
    ]
    groups: dict[Any, list[GemmRow]] = defaultdict(list)  # packs are never quite full: what differs only in tokens
    for row in result.gemms:
        g = row.gemm
        groups[g.kind, g.batch, *(size if size in result.widths else None for size in (g.m, g.n, g.k))].append(row)
    by_time = sorted(groups.values(), key=lambda rows: -sum(row.ms for row in rows))
    lines += [_gemm_line(_shape(rows), rows[0].gemm.kind, rows, result.steps) for rows in by_time[:GEMM_ROWS]]
    if rest := [row for rows in by_time[GEMM_ROWS:] for row in rows]:
        lines.append(_gemm_line(f"{len(by_time) - GEMM_ROWS} others", "", rest, result.steps))
    return "\n".join(lines)


def _shape(rows: list[GemmRow]) -> str:
    """M x N x K, with the mean of a size in which calls differ."""
    calls = sum(row.calls for row in rows)
    sizes = []
    for name in ("m", "n", "k"):
        mean = sum(getattr(row.gemm, name) * row.calls for row in rows) / calls
        sizes.append(f"{'~' * (len({getattr(row.gemm, name) for row in rows}) > 1)}{mean:.0f}")
    batch = rows[0].gemm.batch
    return " x ".join(sizes) + (f" ({batch} times)" if batch > 1 else "")


def _gemm_line(shape: str, kind: str, rows: list[GemmRow], steps: int) -> str:
    calls, ms = sum(row.calls for row in rows) / steps, sum(row.ms for row in rows)
    tflops = sum(row.calls * row.gemm.flops for row in rows) / steps / ms / 1e9
    return f"{shape:<26}{kind:<12}{calls:>12.1f}{ms:>11.3f}{tflops:>9.3g}"
