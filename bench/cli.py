"""The commands of `tokenmill bench`: each parses its arguments and calls one function."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="WHAT")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=function)
        return sub

    c = command("step", _step, "The same training step through ours and through Hugging Face's Trainer, in turn.")
    text = "ways of training side by side instead, and TRL's: some of cpt,sft,dpo,lora,qlora, with commas between"
    c.add_argument("--objective", metavar="LIST", help=text)
    c.add_argument("--recompute", choices=["none", "selective", "full"], default="none", help="as in a recipe")
    c.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="larger models on a GPU")

    text = "Compile every kernel for each architecture, without a GPU, and read registers, spills and instructions."
    c = command("static", _static, text)
    c.add_argument("--arch", action="append", choices=["sm_80", "sm_90", "sm_100"], help="only this one (may repeat)")
    c.add_argument("--only", default="", metavar="TEXT", help="only the cases that have TEXT in their name")
    c.add_argument("--json", action="store_true", help="a list of objects instead of a table")

    c = command("ops", _ops, "Each operation beside bare products, a copy, PyTorch and the peers that are installed.")
    c.add_argument("--output", default="runs/ops", help="folder for gpu.json, ops.csv and ops.png (default: runs/ops)")
    c.add_argument("--only", nargs="+", metavar="OPERATION", help="such as cross_entropy; default: all")
    c.add_argument("--rehearse", action="store_true", help="every line of it on a CPU, at tiny shapes")

    c = command("moe", _moe, "A layer of experts under every routing, on every backend and installed peer.")
    c.add_argument("--output", default="runs/moe", help="folder for gpu.json, moe.csv and moe.png (default: runs/moe)")
    c.add_argument("--rehearse", action="store_true", help="every line of it on a CPU, at tiny shapes")

    c = command("generation", _generation, "Options scored and answers generated, beside transformers.")
    c.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="Mistral-7B's shape on a GPU")

    c = command("data", _data, "Text to batches, each part of the way beside other projects' tools, on one core.")
    c.add_argument("inputs", nargs="*", metavar="INPUT", help="plain documents, as for prepare (default: made ones)")
    c.add_argument("--tokenizer", default="mistral-v1", help="as for prepare (default: mistral-v1)")
    c.add_argument("--peers", metavar="DIR", help="where pip makes an environment for each peer (default: no peers)")
    c.add_argument("--output", default="runs/data", help="folder for data.csv and data.png (default: runs/data)")
    c.add_argument("--only", nargs="+", metavar="CASE", help="such as encoder; default: all")
    c.add_argument("--seconds", type=float, default=20, help="of turns for a case, at least three turns (default: 20)")
    c.add_argument("--rehearse", action="store_true", help="every line of it, at tiny sizes")

    c = command("tune", _tune, "The fastest launch arguments on the GPU at hand, into the package's table of them.")
    c.add_argument("--only", default="", metavar="TEXT", help="only the cases that have TEXT in their name")
    c.add_argument("--output", metavar="FILE", help="default: tuned.json in the package")

    c = command("gpu", _gpu, "All there is to check and to measure on one bare GPU machine.")
    c.add_argument("--output", default="runs/gpu", help="folder for the results (default: runs/gpu)")
    c.add_argument("--budget", type=float, default=520, help="seconds that it may take (default: 520)")
    c.add_argument("--rehearse", action="store_true", help="every line of it on a CPU, at tiny shapes")


def _step(options: argparse.Namespace) -> None:
    from tokenmill.bench import objectives, step

    if options.objective is None:
        step.main(options.recompute, options.device)
    else:
        objectives.main(options.objective.split(","), options.recompute, options.device)


def _static(options: argparse.Namespace) -> None:
    from tokenmill.bench import static

    archs = [int(arch.removeprefix("sm_")) for arch in options.arch or []]
    static.main(archs or tuple(static.SHARED_LIMIT), options.json, options.only)


def _ops(options: argparse.Namespace) -> None:
    from tokenmill.bench import gpu

    parts = [*gpu.OPERATIONS, *gpu.MORE]
    names = [part.function.partition(":")[2] for part in parts]
    if unknown := sorted({*options.only} - {*names}) if options.only else []:
        raise ValueError(f"--only {unknown[0]}: expected some of {', '.join(names)}")
    chosen = [p for p, name in zip(parts, names, strict=True) if not options.only or name in options.only]
    _measure("ops", chosen, options)


def _moe(options: argparse.Namespace) -> None:
    from tokenmill.bench import gpu

    _measure("moe", gpu.EXPERTS, options)


def _generation(options: argparse.Namespace) -> None:
    from tokenmill.bench import generation

    generation.main(options.device)


def _measure(name: str, parts: Any, options: argparse.Namespace) -> None:
    from tokenmill.bench import gpu, report

    output = Path(options.output)
    status = gpu.visit(output, 3600, options.rehearse, parts)
    result = json.loads((output / "gpu.json").read_text())
    report.write_csv(result, output / f"{name}.csv")
    report.plot(result, output / f"{name}.png")
    if status:
        raise ValueError(f"{output}/gpu.json: a part failed; it says where")


def _data(options: argparse.Namespace) -> None:
    from tokenmill.bench import data

    data.main(
        options.inputs,
        Path(options.output),
        tokenizer=options.tokenizer,
        environments=Path(options.peers) if options.peers else None,
        only=options.only,
        seconds=options.seconds,
        small=options.rehearse,
    )


def _tune(options: argparse.Namespace) -> None:
    from tokenmill.bench import tune

    tune.tune(only=options.only, table=Path(options.output) if options.output else tune.launch.TABLE)


def _gpu(options: argparse.Namespace) -> None:
    from tokenmill.bench import gpu

    if gpu.visit(Path(options.output), options.budget, options.rehearse):
        raise ValueError(f"{options.output}/gpu.json: a part failed or a check did not hold; it names which")
