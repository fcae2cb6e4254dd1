"""`tokenmill bench tune`: the launch arguments that are fastest on the GPU at hand, for kernels/tuned.json.

For each kernel that a case of bench/cases.py launches, and each shape: beginning with the arguments that it has now,
every argument is halved and doubled (a count of stages: one less, one more; a switch: turned), the fastest is taken,
and so on from there until nothing is faster; where PyTorch has the operation too, that is tried last. A candidate that
does not compile, spills registers or gives another result is none; memory is full of NaN before the result is written,
so that what is left out shows. Only the kernel's own launches are timed, by the device's clock, from cold caches, the
candidates in turn; one has to be faster by more than the noise to be taken.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from tokenmill.bench.cases import CASES, Case, Results
from tokenmill.bench.checks import _error, poisoned
from tokenmill.data.files import replace_file
from tokenmill.kernels import launch

Arguments = dict[str, Any]

# What a result or its bits depend on, and sizes that have to cover an axis.
FIXED = ("enable_fp_fusion", "ONCE", "DESCRIPTORS", "LIBRARY", "Q_BLOCK", "K_BLOCK", "HALF_BLOCK", "SPAN")
WHOLE_ROWS = ("rms_norm", "rms_norm_backward")  # a BLOCK of theirs covers one, as wherever a row is read ONCE
LEAST_GAIN = 0.02  # of the time: less is noise
TOLERANCE = 1e-2  # relative, by norm: sums in another order, in bf16


def tune(
    device: str = "cuda", only: str = "", rounds: int = 20, small: bool = False, table: Path = launch.TABLE
) -> None:
    """Tune every kernel of the cases whose name contains `only`, and write `table` after each, so that a run that is
    ended keeps what it has found.

    Raises ValueError where no case has such a name, or there is no GPU.
    """
    cases = {name: case for name, case in CASES.items() if only in name}
    if not cases:
        raise ValueError(f"--only {only!r}: no case has that in its name: expected a part of {', '.join(CASES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench tune: torch sees no GPU here, and nothing else can say what is fast on one")
    arch = f"sm_{launch.architecture()}"
    done: set[tuple[str, str]] = set()
    for name, case in cases.items():
        for kernel, shape, arguments in asked(case, device, small):
            if (kernel, shape) in done:
                continue
            done.add((kernel, shape))
            best, before, after = _tuned(case, device, small, arch, kernel, shape, arguments, rounds)
            changed = {key: value for key, value in best.items() if value != arguments[key]}
            print(
                f"{kernel} {shape} ({name}): {before:.4f} ms, {after:.4f} ms with {changed or 'what it had'}",
                flush=True,
            )
            entry = launch.table().get(arch, {}).get(kernel, {}).get(shape, {}) | changed
            if entry:
                launch.table().setdefault(arch, {}).setdefault(kernel, {})[shape] = entry
                replace_file(table, json.dumps(launch.table(), indent=1, sort_keys=True) + "\n")


def asked(case: Case, device: str, small: bool) -> list[tuple[str, str, Arguments]]:
    """Kernel, shape and launch arguments of each launch of a case, in order."""
    seen: dict[tuple[str, str], Arguments] = {}
    settings = launch.settings

    def asking(kernel: str, shape: Sequence[int], default: Arguments) -> Arguments:
        chosen = settings(kernel, shape, default)
        seen.setdefault((kernel, "x".join(map(str, shape))), dict(chosen))
        return chosen

    with mock.patch.object(launch, "settings", asking):
        case(device, small)()
    return [(kernel, shape, arguments) for (kernel, shape), arguments in seen.items()]


def neighbours(kernel: str, arguments: Arguments) -> Iterator[Arguments]:
    """Arguments that differ in one."""
    whole = kernel in WHOLE_ROWS or arguments.get("ONCE", False)
    for key, value in arguments.items():
        if key in FIXED or (key == "BLOCK" and whole):
            continue
        if isinstance(value, bool):
            others: list[Any] = [not value]
        elif key.lower().endswith("stages"):
            others = [value - 1, value + 1]
        else:
            others = [value // 2, value * 2]
        yield from (arguments | {key: other} for other in others if other >= (0 if isinstance(other, bool) else 1))


def _tuned(
    case: Case, device: str, small: bool, arch: str, kernel: str, shape: str, arguments: Arguments, rounds: int
) -> tuple[Arguments, float, float]:
    """The best arguments, and the kernel's milliseconds before and with them."""
    run = case(device, small)
    trial = _Trial(run, kernel, shape)
    expected = trial.result(arguments)
    best, first, tried = arguments, None, [arguments]
    while True:
        candidates = [c for c in neighbours(kernel, best) if c not in tried]
        tried += candidates
        candidates = [c for c in candidates if trial.is_right(c, expected)]
        times = trial.milliseconds([best, *candidates], rounds)
        first = times[0] if first is None else first
        fastest = min(range(len(times)), key=times.__getitem__)
        if times[fastest] >= times[0] * (1 - LEAST_GAIN):
            break
        best = candidates[fastest - 1]
    library = best | {"LIBRARY": True}
    if best.get("LIBRARY") is False and trial.is_right(library, expected):
        times = trial.milliseconds([best, library], rounds)
        if times[1] < times[0] * (1 - LEAST_GAIN):
            return library, first, times[1]
    return best, first, times[0]


class _Trial:
    """A case whose kernel gets other launch arguments."""

    def __init__(self, run: Callable[[], Results], kernel: str, shape: str) -> None:
        self.run, self.kernel, self.shape = run, kernel, shape

    def result(self, arguments: Arguments) -> list[Tensor]:
        with self._launching(arguments), poisoned():
            made = self.run()
        if not made:
            raise ValueError(f"the case of {self.kernel} returns nothing: expected all that its kernels write")
        return [x.detach() for x in made]

    def is_right(self, arguments: Arguments, expected: list[Tensor]) -> bool:
        try:
            errors = [_error(a, b.double()) for a, b in zip(self.result(arguments), expected, strict=True)]
        except Exception:  # of any kind: what a compiler or a driver says of arguments that it does not take
            return False
        return all(error <= TOLERANCE for error in errors) and not self.spilled

    def milliseconds(self, candidates: list[Arguments], rounds: int) -> list[float]:
        """The median for each, in turn."""
        times: list[list[float]] = [[] for _ in candidates]
        for _ in range(rounds):
            for arguments, mine in zip(candidates, times, strict=True):
                mine.append(self._once(arguments))
        return [median(mine) for mine in times]

    def _once(self, arguments: Arguments) -> float:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.empty(256 << 20, dtype=torch.int8, device="cuda").zero_()  # several times the L2 cache
            torch.cuda._sleep(4_000_000)  # about 2 ms, in which the host runs ahead: its time does not count
        with self._launching(arguments):
            self.run()
        if on_gpu:
            torch.cuda.synchronize()
            return sum(begin.elapsed_time(end) for begin, end in self.marks)
        return sum((end - begin) * 1e3 for begin, end in self.marks)

    @contextlib.contextmanager
    def _launching(self, arguments: Arguments) -> Iterator[None]:
        """Gives the kernel these arguments, and marks the begin and end of its launches."""
        self.marks: list[tuple[Any, Any]] = []
        self.spilled = False
        given: Arguments | None = None  # what the last to ask was given, if it was for this kernel and shape
        settings, launched, library = launch.settings, JITFunction.run, launch.by_torch

        def asking(kernel: str, shape: Sequence[int], default: Arguments) -> Arguments:
            nonlocal given
            mine = (kernel, "x".join(map(str, shape))) == (self.kernel, self.shape)
            given = dict(arguments) if mine else None
            return settings(kernel, shape, default) if given is None else given

        def marking(function: Any, *args: Any, **kwargs: Any) -> Any:
            if given is None or not given.items() <= kwargs.items():  # one that did not ask has others
                return launched(function, *args, **kwargs)
            begin = _mark()
            made = launched(function, *args, **kwargs)
            self.marks.append((begin, _mark()))
            self.spilled |= bool(getattr(made, "n_spills", 0))
            return made

        def marking_library(function: Callable[..., Any], *args: Any) -> Any:
            if given is None:
                return library(function, *args)
            begin = _mark()
            made = library(function, *args)
            self.marks.append((begin, _mark()))
            return made

        with (
            mock.patch.object(launch, "settings", asking),
            mock.patch.object(launch, "by_torch", marking_library),
            mock.patch.object(JITFunction, "run", marking),
        ):
            yield


def _mark() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
