"""`make paper`: does continued pre-training lay the ground for tuning? A closed world, several seeds, on a CPU.

Each seed makes a world (world.py), trains every arm on it and asks it by every prompting strategy (experiment.py);
the report compares what came of it with what was expected (expectations.py, report.py). Seeds are independent, so as
many run at once as there are cores, each on one thread: how many that are changes no number. Interrupted, the same
command goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

from tokenmill.bench.paper import experiment, report, world
from tokenmill.trainer import pipeline

POLL = 1.0  # seconds
ERROR = "paper: error: "


def main() -> int:
    parser = argparse.ArgumentParser(prog="tokenmill.bench.paper", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/paper"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    shipped = Path(str(files("tokenmill.trainer"))) / "recipes" / "pipelines" / "paper.toml"
    parser.add_argument("--pipeline", type=Path, default=shipped, help="the stages (trainer/recipes/pipelines)")
    parser.add_argument("--size", type=int, default=world.SIZE, help=f"people, and diseases, of a world ({world.SIZE})")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="seeds at once (the cores)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        experiment.check(options.pipeline, options.seeds, options.size)
        if options.child:
            (seed,) = options.seeds
            experiment.run_seed(folder(options.output, seed), options.pipeline, seed, options.size)
            return 0
        if (status := _run_all(options)) != 0:
            return status
        print(summarise(options.output, options.seeds, options.size))
        print(f"\nwritten: {', '.join(str(options.output / name) for name in ('report.md', 'results.json'))}, figures")
    except (ValueError, OSError) as error:
        print(f"{ERROR}{error}", file=sys.stderr)
        return 1
    return 0


def folder(output: Path, seed: int) -> Path:
    return output / f"seed-{seed}"


def _run_all(options: argparse.Namespace) -> int:
    """A process a seed, so many at a time; the exit status of the first that fails, which stops the others."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(os.EX_TEMPFAIL))  # so that they are stopped too
    waiting, running = list(dict.fromkeys(options.seeds)), {}
    begun = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < max(1, options.jobs):
                seed = waiting.pop(0)
                log = folder(options.output, seed) / "log.txt"
                log.parent.mkdir(parents=True, exist_ok=True)
                print(f"seed {seed}: begun, see {log}", flush=True)
                arguments = {
                    "seeds": seed,
                    "output": options.output,
                    "size": options.size,
                    "pipeline": options.pipeline,
                }
                running[seed] = subprocess.Popen(
                    [sys.executable, "-m", "tokenmill.bench.paper", "--child"]
                    + [f"--{key}={value}" for key, value in arguments.items()],
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdout=log.open("a"),
                    stderr=subprocess.STDOUT,
                )
            time.sleep(POLL)
            for seed, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[seed]
                minutes = (time.monotonic() - begun) / 60
                if process.returncode:
                    log = folder(options.output, seed) / "log.txt"
                    last = (log.read_text().strip().splitlines() or ["it wrote nothing"])[-1]
                    print(f"{ERROR}seed {seed}: {last.removeprefix(ERROR)} (see {log})", file=sys.stderr)
                    return process.returncode if process.returncode > 0 else 1
                print(f"seed {seed}: done after {minutes:.1f} minutes", flush=True)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return 0


def summarise(output: Path, seeds: list[int], size: int) -> str:
    """Write the report of seeds that are done; returns it."""
    stages = {seed: pipeline.plan(folder(output, seed) / "pipeline.toml") for seed in seeds}
    by_seed = {seed: experiment.results(found, experiment.arms(found)) for seed, found in stages.items()}
    return report.write(output, by_seed, experiment.about(stages[seeds[0]], size))


if __name__ == "__main__":
    sys.exit(main())
