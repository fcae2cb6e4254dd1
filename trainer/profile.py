"""Where a step's time goes: a few steps of a recipe under torch's profiler, as a trace and as a table by kind.

Three parts, top to bottom: the run, whose scopes say which part of the model an operation belongs to; the accounting,
a pure function of the trace; the table. The accounting gives every nanosecond to exactly one kind:

- On a CPU, the time of the main thread: an operator's own, without that of the operators it calls. What is left, time
  in no operator, is Python's.
- On a GPU, the time of the device: a kernel belongs to the operator that launched it. Where kernels overlap, the time
  counts once, as computation if one of them computes: so communication is what nothing hides. What is left, gaps
  between kernels, is idle.

A backward operator has the kind of the forward one that it differentiates.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
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
from tokenmill.data.loader import Loader
from tokenmill.trainer.config import Recipe
from tokenmill.trainer.distributed import World, join
from tokenmill.trainer.files import replace_file
from tokenmill.trainer.loop import Trainer
from tokenmill.trainer.model import Transformer, attention
from tokenmill.trainer.model.attention import Attention
from tokenmill.trainer.model.moe import MoELayer
from tokenmill.trainer.model.transformer import Embedding, Head, RMSNorm

KINDS = {
    "attention": "softmax(q k^T) v, and the views and copies around it",
    "gemm": "products of the linear layers, the router's too",
    "experts": "routing, permutation, the experts' products",
    "loss": "the head's products, cross-entropy, balancing",
    "norm": "RMSNorm and the residual additions in it",
    "rotary": "",
    "swiglu": "of the experts too",
    "embedding": "with NEFTune's noise",
    "optimizer": "summing gradients, clipping, the update",
    "communication": "FSDP's gathers and reductions, with their copies",
    "data": "making batches, copying them to the device",
    "other": "",
    "idle": "CPU: Python, outside operators; GPU: gaps between kernels",
}
TOLERANCE = 0.03  # of the step, between what the rows sum to and what the clock says


def profile(recipe: Recipe, output: Path, steps: int = 5, warmup: int = 2) -> str:
    """Profile `steps` optimizer steps of a recipe after `warmup` others; returns the table, on ranks but 0 "".

    A fresh run: nothing is read from the recipe's output folder or written to it. On rank 0, whose time it is,
    `output` gets `trace.json` (Chrome's format, for ui.perfetto.dev), `profile.json` (the table as data, all shapes of
    products in it) and, on a GPU, `memory.pickle`, a memory snapshot of one more step (for pytorch.org/memory_viz).

    Raises ValueError where steps or warmup is not positive, or `output` lies in the recipe's own output folder.
    """
    if steps < 1 or warmup < 1:
        raise ValueError(f"profile: steps ({steps}) and warmup ({warmup}) must be at least 1")
    run = Path(recipe.output).resolve()
    if run in (output.resolve(), *output.resolve().parents):
        raise ValueError(f"profile: {output} lies in the run's own folder {recipe.output}; choose another")
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        # `steps` also keeps the learning rate's schedule from running out. Validation and checkpoints are `train`'s.
        length = replace(recipe.train, steps=warmup + steps + 1, tokens=None, epochs=None)
        world = stack.enter_context(join(recipe.device, sharded=recipe.train.precision == "bf16-mixed"))
        trainer = Trainer(replace(recipe, output=scratch, train=length), world)
        stack.callback(trainer.log.close)
        stack.enter_context(_scopes(trainer))
        plain = min(_timed(trainer, 1, world)[0] for _ in range(warmup))
        if world.rank > 0:
            _timed(trainer, steps, world)
            _snapshot(trainer, None)
            return ""
        output.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (world.device.type == "cuda")
        with torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
            seconds, data_wait = _timed(trainer, steps, world)
        _snapshot(trainer, output)
        profiler.export_chrome_trace(str(output / "trace.json"))
        found = account(json.loads((output / "trace.json").read_text()), world.device.type)
        result = Profile(
            device=torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
            torch=torch.__version__,
            ranks=world.size,
            steps=steps,
            step_ms=seconds * 1e3,
            plain_step_ms=plain * 1e3,
            data_wait_ms=data_wait * 1e3,
            sum_ms=sum(found.times.values()) / steps / 1e6,
            kinds=[
                KindRow(kind, found.times[kind] / steps / 1e6, found.peak_bytes[kind] / 2**20) for kind in KINDS
            ],
            gemms=[
                GemmRow(kind, *shape, calls, ns / steps / 1e6, calls * _flops(shape) / ns / 1e3 if ns else 0.0)
                for (kind, shape), (calls, ns) in sorted(found.gemms.items(), key=lambda item: -item[1][1])
            ],
        )
        replace_file(output / "profile.json", json.dumps(asdict(result), indent=1) + "\n")
        return f"{table(result)}\nwritten to {output}: {', '.join(sorted(f.name for f in output.iterdir()))}"


# ------------------------------------------------------------------------------------------------------------ the run

_SCOPE = "tokenmill.profile::"  # begins the names of our scopes; a kind follows
_WINDOW = f"{_SCOPE}window"  # the scope of all that is accounted for

_MODULES: dict[type[nn.Module], str] = {
    Transformer: "other",  # what its parts leave over, so that none of it counts for the objective around it
    Embedding: "embedding",
    RMSNorm: "norm",
    Attention: "attention",
    MoELayer: "experts",
    nn.Linear: "gemm",
    Head: "loss",
}


@contextmanager
def _scopes(trainer: Trainer) -> Iterator[None]:
    """While it lasts, the model's modules and the step's other parts run in scopes named by their kinds."""
    functions = [
        (Loader, "__next__", "data"),
        (Batch, "to", "data"),
        (trainer, "objective", "loss"),
        (attention, "apply_rotary", "rotary"),  # a function in the midst of a module
        (torch.nn.utils, "clip_grad_norm_", "optimizer"),
        (World, "sum", "communication"),  # where a rank waits for the others
    ]
    with ExitStack() as stack:
        for owner, name, kind in functions:
            original = getattr(owner, name)
            setattr(owner, name, _in_scope(original, kind))
            stack.callback(setattr, owner, name, original)
        for module in trainer.model.modules():
            kind = next((kind for cls, kind in _MODULES.items() if isinstance(module, cls)), None)
            if kind is not None:
                for handle in _hook(module, kind):
                    stack.callback(handle.remove)
        yield


def _in_scope(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    @wraps(function)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        with record_function(_SCOPE + kind):
            return function(*args, **kwargs)

    return scoped


def _hook(module: nn.Module, kind: str) -> list[Any]:
    """Open a scope before the module's forward and close it after; the handles that undo it."""
    scopes: list[record_function] = []

    def enter(module: nn.Module, args: Any) -> None:
        scopes.append(record_function(_SCOPE + kind))
        scopes[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        scopes.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _timed(trainer: Trainer, steps: int, world: World) -> tuple[float, float]:
    """Seconds a step, the device's work included, and those of them spent waiting for data."""
    _synchronize(world)
    begin = time.perf_counter()
    with record_function(_WINDOW):
        waits = [trainer.step().data_wait for _ in range(steps)]
        _synchronize(world)
    return (time.perf_counter() - begin) / steps, sum(waits) / steps


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _snapshot(trainer: Trainer, output: Path | None) -> None:
    """On a GPU, a step whose allocations are recorded with their stacks: too slow for one that is timed. Every rank
    takes the step, one of them writes."""
    if trainer.world.device.type != "cuda":
        return
    if output is not None:
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    trainer.step()
    if output is not None:
        torch.cuda.memory._dump_snapshot(str(output / "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)


# ----------------------------------------------------------------------------------------------------- the accounting

Shape = tuple[int, int, int, int]  # products in the call, M, N, K


@dataclass
class Account:
    times: Counter[str]  # by kind, ns of all steps; all of the window, "idle" included
    gemms: dict[tuple[str, Shape], tuple[int, int]]  # by kind and shape: calls, ns
    peak_bytes: Counter[str]  # by kind, allocated in the window and alive at the peak of them all


@dataclass(eq=False)
class _Span:
    """A stretch of a host thread: an operator, a scope, or a call that launches a kernel."""

    name: str
    thread: Any
    start: int  # ns
    end: int
    is_scope: bool
    args: dict[str, Any]
    kind: str = "idle"
    shape: Shape | None = None  # of the outermost product around it
    shared: int = 0  # ns of spans within it


def account(trace: dict[str, Any], device: str) -> Account:
    """Split the window of a Chrome trace by kind; `device` is "cpu" or "cuda".

    Raises ValueError where the trace has no window.
    """
    spans, windows = _host_spans(trace["traceEvents"])
    if not windows:
        raise ValueError("profile: the trace holds no profiled steps; was another profiler running?")
    window = windows[-1]
    inside = [s for s in spans if s.start >= window.start and s.end <= window.end]
    times: Counter[str] = Counter()
    gemm_times: Counter[tuple[str, Shape]] = Counter()
    used = _device_times(trace["traceEvents"], inside, window) if device == "cuda" else _own_times(inside, window)
    for span, kind, ns in used:
        times[kind] += ns
        if span.shape is not None:
            gemm_times[span.kind, span.shape] += ns
    times["idle"] += window.end - window.start - sum(times.values())
    calls = Counter((s.kind, s.shape) for s in inside if s.shape is not None and "first" in s.args)
    gemms = {key: (calls[key], ns) for key, ns in gemm_times.items()}  # pyright: ignore[reportArgumentType]
    return Account(times, gemms, _peak(trace["traceEvents"], inside, device))
