"""`tokenmill bench gpu`: everything worth doing on a bare GPU machine, in one visit of a few minutes.

    python3 bench/gpu.py --output runs/gpu               from a checkout, nothing installed, no network
    python3 bench/gpu.py --output runs/gpu --rehearse    the same lines without a GPU, at tiny shapes

Checks come first, then measurements, each kind in order of importance. A part runs in a process of its own kind: one
that raises, crashes or hangs costs its own result and no other, and `gpu.json` is written again after each. Nothing
here but the standard library is imported before a part runs, so that a checkout can build itself first.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "transformers", "flash-attn", "megablocks", "scattermoe", "liger-kernel", "quack-kernels", "cut-cross-entropy",
)  # whose versions matter where they are installed  # fmt: skip
LEAST_SECONDS = 10  # what a part needs left of the budget to be worth starting


@dataclass(frozen=True)
class Place:
    """Where a part runs."""

    device: torch.device
    small: bool  # tiny shapes: a rehearsal
    folder: Path  # for what does not fit into a row


@dataclass(frozen=True)
class Part:
    """A function of a Place that returns rows of results. A row that holds a key "held" is a check."""

    function: str  # module:name
    seconds: float  # after which it is ended
    check: bool = False  # without its result, the visit has not succeeded


def _parts(module: str, check: bool, seconds: dict[str, float]) -> list[Part]:
    return [Part(f"tokenmill.bench.{module}:{name}", limit, check) for name, limit in seconds.items()]


MACHINE = Part("tokenmill.bench.gpu:machine", 60)
OPERATIONS = [
    *_parts("ops", False, dict(ceilings=30)),
    *_parts("head", False, dict(cross_entropy=90)),
    *_parts("ops", False, dict(attention=60)),
    *_parts("moe", False, dict(moe=60)),
    *_parts("ops", False, dict(elementwise=90, embedding=40, optimizer=30)),
]
# The rest of `tokenmill bench ops`, for which a visit has no time.
MORE = [
    *_parts("head", False, dict(log_probabilities=90, vocabularies=90)),
    *_parts("ops", False, dict(flex_attention=240)),
]
EXPERTS = [OPERATIONS[0], *_parts("moe", False, dict(tokens_8192=400, tokens_32768=1200))]
PARTS = [
    *_parts("checks", True, dict(noise=40, cross_entropy=60, attention=60)),
    *_parts("checks_experts", True, dict(moe=60, routing=40, capturing=40)),
    *_parts("checks", True, dict(elementwise=40, embedding=40, optimizer=40, waiting=60)),
    *_parts("training", True, dict(mistral=90, mixtral=90)),
    *OPERATIONS[:4],
    *_parts("training", False, dict(step=90)),
    *OPERATIONS[4:],
    *_parts("checks", True, dict(compiling=120)),
    *_parts("generation", False, dict(scoring=90, generating=90)),
    *_parts("training", False, dict(beside_transformers=150)),
]


def visit(output: Path, budget: float = 520, rehearse: bool = False, parts: Sequence[Part] = PARTS) -> int:
    """Run `parts` within `budget` seconds and write `gpu.json` and `gpu.log` into `output`.

    `rehearse` runs them on the CPU, at tiny shapes and with interpreted kernels. Returns the exit status: 0 if every
    check ran and held, and no part failed. A measurement for which no time was left is recorded as not measured.
    """
    begin = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu.log").write_text("")
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rehearsal": rehearse,
        "budget": budget,
        "machine": None,
        "parts": {part.function: {"status": "not measured", "reason": "the visit ended before it"} for part in parts},
    }
    worker = None
    for part in [MACHINE, *parts]:
        limit = min(part.seconds, budget - (time.monotonic() - begin))
        if limit < min(LEAST_SECONDS, part.seconds):
            result = {"status": "not measured", "reason": f"the budget of {budget:g} s was spent"}
        else:
            if worker is None or not worker.process.is_alive():
                worker = _Worker(output, rehearse)
            result = worker.run(part.function, limit)
            if result["status"] == "failed":  # what it left behind, on the device too, ends with it
                worker.end()
                worker = None
        if part is MACHINE:
            report["machine"] = result
        else:
            report["parts"][part.function] = result
        print(_summary(part, result), flush=True)
        report["seconds"] = round(time.monotonic() - begin, 1)
        partial = output / "gpu.json.partial"
        partial.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(partial, output / "gpu.json")
        if part is MACHINE and result["status"] == "failed":
            return 1
    if worker is not None:
        worker.end()
    failed = [p.function for p in parts if not _succeeded(p, report["parts"][p.function])]
    outcome = f"failed: {', '.join(failed)}" if failed else "every check held"
    print(f"{output / 'gpu.json'}: {report['seconds']} s, {outcome}")
    return 1 if failed else 0


def _succeeded(part: Part, result: dict[str, Any]) -> bool:
    if result["status"] == "done":
        return all(row.get("held", True) is not False for row in result["rows"])
    return result["status"] == "not measured" and not part.check


def _summary(part: Part, result: dict[str, Any]) -> str:
    """A line for the part, one for each row, and a row's table below it."""
    said = result.get("reason") or result.get("error", "").strip().rpartition("\n")[2]
    seconds = f" in {result['seconds']} s" if "seconds" in result else ""
    lines = [f"{part.function.rpartition('.')[2]}: {result['status']}{seconds} {said}".rstrip()]
    for row in result.get("rows", []):
        cells = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
        lines.append(f"  {row['what']:<48} {'  '.join(c for c in cells if not c.startswith(('what ', 'table ')))}")
        lines += [f"    {line}" for line in row.get("table", [])]
    return "\n".join(lines)


class _Worker:
    """A process that runs one part after another."""

    def __init__(self, folder: Path, rehearse: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, folder, rehearse), daemon=True)
        self.process.start()
        theirs.close()  # so that the other end's death is the end of the stream

    def run(self, function: str, limit: float) -> dict[str, Any]:
        begin = time.monotonic()
        try:
            self.connection.send(function)
            if self.connection.poll(limit):
                result = self.connection.recv()
            else:
                os.kill(self.process.pid or 0, signal.SIGABRT)  # faulthandler writes where it was
                result = {"status": "failed", "error": f"ended after {limit:.0f} s; gpu.log says where it was"}
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            result = {"status": "failed", "error": f"its process died with exit code {code}; see gpu.log"}
        return result | {"seconds": round(time.monotonic() - begin, 1)}

    def end(self) -> None:
        self.connection.close()  # it leaves by itself when it waits for a part
        self.process.join(5)
        self.process.kill()
        self.process.join()


def _work(connection: Connection, folder: Path, rehearse: bool) -> None:
    log = os.open(folder / "gpu.log", os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    while True:
        try:
            function = connection.recv()
        except EOFError:
            return
        print(f"--- {function}", flush=True)
        connection.send(_attempt(function, folder, rehearse))


def _attempt(function: str, folder: Path, rehearse: bool) -> dict[str, Any]:
    try:
        import torch

        if not rehearse and not torch.cuda.is_available():
            raise ValueError("torch sees no GPU here: add --rehearse to run the same parts on the CPU")
        seed = time.time_ns() % 2**32  # fresh inputs each time, and a failure can be repeated
        torch.manual_seed(seed)
        module, _, name = function.partition(":")
        run: Callable[[Place], list[dict[str, Any]]] = getattr(importlib.import_module(module), name)
        place = Place(torch.device("cpu" if rehearse else "cuda"), rehearse, folder)
        return {"status": "done", "seed": seed, "rows": run(place)}
    except Exception:
        return {"status": "failed", "error": traceback.format_exc()}


def machine(place: Place) -> list[dict[str, Any]]:
    """What everything else was measured on: device, driver, versions."""
    import torch

    row: dict[str, Any] = {"what": "machine", "python": platform.python_version(), "cpus": os.cpu_count()}
    row |= {"torch": torch.__version__, "triton": importlib.metadata.version("triton"), "cuda": torch.version.cuda}
    row |= {name: _version(name) for name in PACKAGES}
    if place.device.type == "cuda":
        properties = torch.cuda.get_device_properties(place.device)
        row |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        row |= {"memory_gib": properties.total_memory / 2**30, "multiprocessors": properties.multi_processor_count}
        query = "driver_version,power.limit,clocks.max.sm,clocks.max.memory"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
            row |= dict(zip(query.split(","), answer.split(", "), strict=True))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            row["driver_version"] = f"not measured: {error}"
    else:
        row |= {"device": platform.processor() or platform.machine(), "driver_version": None}
    return [row]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build_and_restart() -> None:
    """From a checkout where tokenmill is not installed: build it into build/gpu with what is there, and run from it."""
    root = Path(__file__).resolve().parents[1]
    target = root / "build" / "gpu"
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--upgrade", "--target", str(target), "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(root)], check=True)
    path = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = [sys.executable, "-m", "tokenmill.bench.gpu", *sys.argv[1:]]
    os.execve(sys.executable, arguments, os.environ | {"PYTHONPATH": path})


def _main() -> int:
    parser = argparse.ArgumentParser(description="Checks and measurements on one bare GPU machine.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--budget", type=float, default=520, help="seconds for all parts (default: 520)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny shapes")
    parser.add_argument("--only", nargs="+", metavar="PART", help="such as ops:attention")
    options = parser.parse_args()
    names = {p.function.removeprefix("tokenmill.bench."): p for p in PARTS}
    if odd := [name for name in options.only or () if name not in names]:
        parser.error(f"--only: no part {', '.join(odd)}; the parts are {', '.join(names)}")
    if importlib.util.find_spec("tokenmill") is None:
        _build_and_restart()
    parts = [part for name, part in names.items() if options.only is None or name in options.only]
    return visit(options.output, options.budget, options.rehearse, parts)


if __name__ == "__main__":
    sys.exit(_main())
