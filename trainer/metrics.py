"""What a step reports: one record, to the console and as a JSON line."""

from __future__ import annotations

import json
import math
import os
import resource
import secrets
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from tokenmill.data.batch import Batch
from tokenmill.data.files import replace_file
from tokenmill.trainer.balance import PATIENCE, STARVING, Watch
from tokenmill.trainer.config import LogSection
from tokenmill.trainer.model import ModelConfig
from tokenmill.trainer.model.config import attended_pairs

# Dense bf16 tensor-core peaks, FLOP/s, from the vendor's data sheets; the first name that matches counts.
PEAK_FLOPS = {
    "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12,
    "GB200": 2500e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
}  # fmt: skip


@dataclass(frozen=True)
class Preference:
    """Means over a step's pairs."""

    chosen: float  # reward: beta times the log-ratio with the reference; simpo: times the mean log-probability
    rejected: float
    accuracy: float  # share of the pairs whose chosen answer has the higher reward
    margin: float = field(init=False)  # chosen - rejected

    def __post_init__(self) -> None:
        object.__setattr__(self, "margin", self.chosen - self.rejected)


@dataclass(frozen=True)
class StepRecord:
    """In metrics.jsonl, a number that is not finite is null: JSON has no other name for it."""

    step: int  # optimizer steps done
    tokens: int  # rows of real documents, cumulative
    loss: float  # mean negative log-likelihood a target, nats; of preferences, mean loss a pair
    balance: float  # load-balancing loss, 1 when even; 0 for a dense model
    grad_norm: float  # before clipping
    lr: float
    tokens_per_second: float  # of this step, data wait included, over all ranks
    tflops: float  # TFLOP/s a device, exact count
    mfu: float | None  # 6 N tokens over the device's peak; None where the peak is not known
    mfu_exact: float | None  # windowed attention and active experts only
    data_wait: float  # seconds the step waited for its batch
    memory: float  # peak GiB: allocated on a GPU, resident on a CPU
    skipped: int  # steps left out so far, since a loss or gradient was not finite
    expert_load: list[list[float]] | None  # [layer][expert] share of this step's choices, k a token
    fullest_expert: float | None  # the largest of them
    router_entropy: list[float] | None  # [layer] mean over tokens, nats: log(E) when even, 0 when certain
    preference: Preference | None = None  # of objective = "dpo"


def exact_flops(config: ModelConfig, batches: list[Batch], *, frozen: bool = False) -> float:
    """Floating-point operations of a forward and backward pass over `batches` (still on the CPU)."""
    tokens = pairs = 0
    for layout in (batch.layout for batch in batches):
        rows = np.diff(layout.cu_seqlens.numpy())
        keys = rows if layout.keys is None else np.diff(layout.keys.cu_seqlens.numpy())
        tokens += int(rows.sum())
        for length, seen in zip(rows.tolist(), keys.tolist(), strict=True):  # queries are the last rows of their keys
            pairs += attended_pairs(seen, config.sliding_window) - attended_pairs(seen - length, config.sliding_window)
    return config.flops(tokens, pairs, frozen=frozen)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, where it is known."""
    if device.type != "cuda":
        return None
    return named_peak_flops(torch.cuda.get_device_name(device))


def named_peak_flops(name: str) -> float | None:
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process so far, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


Console = Literal["lines", "bar", "none"]
_INSTALL = "pip install 'tokenmill[log]' brings what it needs"


class MetricsLog:
    """`metrics.jsonl` and the console. A resumed run goes on where its checkpoint was: later lines are dropped.

    `console` none: another rank speaks, this one only warns.
    """

    def __init__(self, folder: Path, step: int, steps: int, console: Console, section: LogSection) -> None:
        self._file = self._bar = None
        self.validated = False  # whether there are validation losses of the step that the run goes on from
        self._steps = steps
        self._watch = Watch()
        self._silent = console == "none"
        self._boards: list[Callable[[dict[str, float], int], None]] = []
        self._closers: list[Callable[[], None]] = []
        if self._silent:
            return
        if section.tensorboard:
            self._add_tensorboard(folder / "tensorboard", step)
        if section.wandb is not None:
            self._add_wandb(section.wandb, folder, step)
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
            replace_file(path, "".join(kept) if step else "")
            self.validated = any("validation" in json.loads(line) for line in kept if _step_of(line) == step)
        self._file = path.open("a")
        if console == "bar":
            self._bar = tqdm(
                total=steps, initial=step, desc=folder.name, unit="step", dynamic_ncols=True, mininterval=1.0
            )

    def step(self, record: StepRecord) -> None:
        self._write(asdict(record))
        for layer, expert in [] if self._silent else self._watch.step(record.expert_load or []):
            share = STARVING / len((record.expert_load or [])[layer])
            self.warn(
                f"step {record.step}: expert {expert} of layer {layer} starves, with less than {share:.2%} of the "
                f"tokens for {PATIENCE} steps"
            )
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {record.loss:.3f}, {record.tokens_per_second:,.0f} tok/s", refresh=False)
            self._bar.update()
        if self._bar is not None or self._silent:
            return
        mfu = "" if record.mfu is None else f"  mfu {record.mfu:.1%} (exact {record.mfu_exact:.1%})"
        fullest = "" if record.fullest_expert is None else f"  fullest expert {record.fullest_expert:.0%}"
        liked = ""
        if (of := record.preference) is not None:
            liked = f"  rewards {of.chosen:.3f} {of.rejected:.3f}  margin {of.margin:.3f}  accuracy {of.accuracy:.1%}"
        skipped = f"  skipped {record.skipped}" if record.skipped else ""
        print(
            f"step {record.step}/{self._steps}  loss {record.loss:.4f}{liked}  norm {record.grad_norm:.3f}"
            f"  lr {record.lr:.2e}"
            f"  {record.tokens_per_second:,.0f} tok/s  {record.tflops:.3g} TFLOP/s{mfu}"
            f"  wait {record.data_wait * 1e3:.1f} ms  {record.memory:.2f} GiB{fullest}{skipped}",
            flush=True,
        )

    def validation(self, step: int, tokens: int, losses: dict[str, float]) -> None:
        self._write({"step": step, "tokens": tokens, "validation": losses})
        self.say(f"step {step}/{self._steps}  validation  " + "  ".join(f"{k} {v:.4f}" for k, v in losses.items()))

    def say(self, text: str) -> None:
        """A line for people, kept clear of the progress bar."""
        if self._silent:
            return
        if self._bar is None:
            print(text, flush=True)
        else:
            tqdm.write(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        """A line that every rank may write, since each knows of its own documents only."""
        tqdm.write(f"[rank {os.environ.get('RANK', '0')}] {text}", file=sys.stderr)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._bar is not None:
            self._bar.close()
        for close in self._closers:
            close()

    def _add_tensorboard(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ImportError(f"log.tensorboard: {error}; {_INSTALL}") from None

        writer = SummaryWriter(str(folder), purge_step=step + 1)  # drops what a resumed run does again

        def write(scalars: dict[str, float], at: int) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, at)

        self._boards.append(write)
        self._closers.append(writer.close)

    def _add_wandb(self, project: str, folder: Path, step: int) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(f"log.wandb: {error}; {_INSTALL}") from None

        known = folder / "wandb.id"  # a run that begins afresh, or elsewhere under the same name, is another one
        if not (step and known.is_file()):
            replace_file(known, secrets.token_hex(8) + "\n")
        name = known.read_text().strip()
        run = wandb.init(project=project, name=folder.name, dir=str(folder), resume="allow", id=name)
        self._boards.append(lambda scalars, at: run.log(scalars, step=at))
        self._closers.append(run.finish)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self._file.flush()
        if self._boards:
            scalars = flatten({k: v for k, v in record.items() if k != "step"})
            for write in self._boards:
                write(scalars, record["step"])


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def flatten(record: Any, prefix: str = "") -> dict[str, float]:
    """Every number of a record by its path: `expert_load/0/3`, `validation/notes`."""
    if isinstance(record, (int, float)):
        return {prefix: float(record)}
    items = record.items() if isinstance(record, dict) else enumerate(record or ())
    return {k: v for key, item in items for k, v in flatten(item, f"{prefix}/{key}" if prefix else str(key)).items()}


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line that a kill cut short
