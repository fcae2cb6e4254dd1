"""The commands of `tokenmill bench`: each parses its arguments and calls one function."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="WHAT")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=function)
        return sub

    c = command("step", _step, "The same training step through ours and through Hugging Face's Trainer, in turn.")
    c.add_argument("--recompute", choices=["none", "selective", "full"], default="none", help="as in a recipe")
    c.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="larger models on a GPU")

    c = command("gpu", _gpu, "All there is to check and to measure on one bare GPU machine.")
    c.add_argument("--output", default="runs/gpu", help="folder for the results (default: runs/gpu)")
    c.add_argument("--budget", type=float, default=520, help="seconds that it may take (default: 520)")
    c.add_argument("--rehearse", action="store_true", help="every line of it on a CPU, at tiny shapes")


def _step(options: argparse.Namespace) -> None:
    from tokenmill.bench import step

    step.main(options.recompute, options.device)


def _gpu(options: argparse.Namespace) -> None:
    from tokenmill.bench import gpu

    if gpu.visit(Path(options.output), options.budget, options.rehearse):
        raise ValueError(f"{options.output}/gpu.json: a part failed or a check did not hold; it names which")
