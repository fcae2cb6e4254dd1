"""The command line: each command parses its arguments and calls one function."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tokenmill.bench import cli as bench


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; wrong input is one line on stderr and exit status 1 (TOKENMILL_DEBUG=1 shows where it arose)."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [a for a in rest if options.command in (_train, _profile) and a.startswith("--") and "=" in a]
    if odd := [a for a in rest if a not in overrides]:
        parser.error(f"unrecognized arguments: {' '.join(odd)} (a recipe's keys are given as --section.key=value)")
    options.overrides = overrides
    try:
        options.command(options)
    except BrokenPipeError:  # `tokenmill inspect ... | head` has read enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (else Python complains again when it ends)
        return 0
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("TOKENMILL_DEBUG"):
            raise
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"tokenmill: error: {rank}{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tokenmill: interrupted", file=sys.stderr)
        return 130
    return 0


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {number}")
    return number


def _parser() -> argparse.ArgumentParser:
    templates = ["auto", "mistral-v1", "mistral-v2", "mistral-v3"]
    parser = argparse.ArgumentParser(prog="tokenmill", description="Token streams to trained models.")
    parser.add_argument("--version", action="version", version=f"tokenmill {version('tokenmill')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=function)
        return sub

    c = command("prepare", _prepare, "Text to a token stream.")
    inputs = "a file (.txt, .jsonl, each also .gz or .zst, .parquet), folder or pattern; NAME=... names its source"
    c.add_argument("inputs", nargs="+", metavar="INPUT", help=inputs)
    c.add_argument("--tokenizer", required=True, help="a sentencepiece model, or mistral-v1, mistral-v2, mistral-v3")
    c.add_argument("--output", required=True, help="folder of the stream")
    c.add_argument("--text-key", default="text", help="key of a plain row's text (default: text)")
    c.add_argument("--source-key", help="key of a row's source (default: a source for each input)")
    c.add_argument("--template", default="auto", choices=templates, help="of chats (default: by the tokenizer)")
    c.add_argument("--dedupe", choices=["exact", "minhash"], help="leave out what repeats an earlier document")
    text = "leave out documents that share 13 words in a row with these evaluation files"
    c.add_argument("--decontaminate", nargs="+", default=[], metavar="INPUT", help=text)
    c.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: the cores)")
    c.add_argument("--overwrite", action="store_true", help="replace a stream that is there")
    c.add_argument("--append", action="store_true", help="add to the stream that is there")

    c = command("merge", _merge, "Token streams to one, which shares their files.")
    c.add_argument("streams", nargs="+", metavar="STREAM")
    c.add_argument("--output", required=True, help="folder of the new stream")

    c = command("convert", _convert, "Other trainers' token files to a stream, or a stream to Megatron's.")
    c.add_argument("source", help="a stream; or Megatron's .bin with its .idx, .npy, or a file of ids (.bin)")
    c.add_argument("output", help="folder of the stream; or Megatron's prefix, where the source is a stream")
    c.add_argument("--tokenizer", help="of the ids, where the source is no stream")
    c.add_argument("--dtype", choices=["uint16", "uint32", "int32"], help="of a file of ids (default: by vocabulary)")

    c = command("inspect", _inspect, "What a token stream holds.")
    c.add_argument("stream")

    c = command("verify", _verify, "Check every checksum of a token stream.")
    c.add_argument("stream")

    c = command("train-tokenizer", _train_tokenizer, "A sentencepiece model from a corpus.")
    c.add_argument("inputs", nargs="+", metavar="INPUT", help=inputs)
    c.add_argument("--vocab-size", type=int, required=True)
    c.add_argument("--output", required=True, help="the model file to write")
    c.add_argument("--text-key", default="text")

    c = command("train", _train, "Run a recipe, from where it stopped if it did.")
    c.add_argument("recipe", help="a TOML file; any key of it can be given as --section.key=value")

    c = command("profile", _profile, "Where the time of a recipe's step goes: a table, a trace, a memory snapshot.")
    c.add_argument("recipe")
    c.add_argument("--output", default="runs/profile", help="folder for the trace and the table (runs/profile)")
    c.add_argument("--steps", type=_positive, default=5)

    c = command("bench", None, "Measurements.")
    bench.add_commands(c)

    c = command("eval", _eval, "Multiple-choice accuracy of a model.")
    c.add_argument("model", help="a run's output, a checkpoint or a Hugging Face folder")
    c.add_argument("questions", help="JSON lines (.gz too) of question, options and answer")
    c.add_argument("--by", choices=["text", "letter"], default="text", help="score option texts or letters")
    c.add_argument("--tokenizer", help="default: the model folder's tokenizer.model")
    c.add_argument("--template", default="auto", choices=templates)
    c.add_argument("--limit", type=_positive, help="only the first LIMIT questions")

    c = command("import", _import, "A model to a checkpoint without an optimizer; --upcycle gives it experts.")
    c.add_argument("source", help="a Hugging Face folder, a checkpoint or a run's output")
    c.add_argument("output")
    c.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: the files' own")
    c.add_argument("--upcycle", type=_positive, metavar="EXPERTS", help="so many copies of each dense network")
    c.add_argument("--top-k", type=_positive, default=2, help="upcycle: experts that act on a token (2)")
    text = "upcycle: normal noise on the copies, relative to each weight's standard deviation (0)"
    c.add_argument("--noise", type=float, default=0.0, metavar="STD", help=text)
    c.add_argument("--seed", type=int, default=0, help="upcycle: of noise and routers (0)")

    c = command("export", _export, "A checkpoint to a Hugging Face folder.")
    c.add_argument("source", metavar="CHECKPOINT")
    c.add_argument("output", metavar="HF_FOLDER")
    c.add_argument("--adapter", action="store_true", help="the adapters alone, in PEFT's format (default: merged)")
    return parser


def _prepare(options: argparse.Namespace) -> None:
    from tokenmill.data.prepare import prepare
    from tokenmill.data.report import inspect

    prepare(
        options.inputs,
        options.tokenizer,
        options.output,
        text_key=options.text_key,
        source_key=options.source_key,
        template=options.template,
        dedupe=options.dedupe,
        decontaminate=options.decontaminate,
        overwrite=options.overwrite,
        append=options.append,
        workers=options.workers,
        progress=sys.stderr.isatty(),
    )
    print(inspect(options.output))


def _merge(options: argparse.Namespace) -> None:
    from tokenmill.data.merge import merge

    stream = merge(options.streams, options.output)
    print(f"{options.output}: {len(stream):,} documents, {stream.tokens:,} tokens")


def _convert(options: argparse.Namespace) -> None:
    from tokenmill.data.convert import export_megatron, import_tokens
    from tokenmill.data.stream import MANIFEST

    if (Path(options.source) / MANIFEST).is_file():
        export_megatron(options.source, options.output)
        print(f"{options.output}.bin, {options.output}.idx")
        return
    if options.tokenizer is None:
        raise ValueError(f"{options.source}: is no token stream: name the tokenizer of its ids (--tokenizer)")
    stream = import_tokens(options.source, options.tokenizer, options.output, dtype=options.dtype)
    print(f"{options.output}: {len(stream):,} documents, {stream.tokens:,} tokens")


def _inspect(options: argparse.Namespace) -> None:
    from tokenmill.data.report import inspect

    print(inspect(options.stream))


def _verify(options: argparse.Namespace) -> None:
    from tokenmill.data.stream import TokenStream

    stream = TokenStream.open(options.stream)
    stream.verify()
    print(f"{options.stream}: {len(stream):,} documents, {stream.tokens:,} tokens, every checksum holds")


def _train_tokenizer(options: argparse.Namespace) -> None:
    from tokenmill.data.documents import read_texts
    from tokenmill.data.tokenizer import train_tokenizer

    train_tokenizer(read_texts(options.inputs, options.text_key), options.vocab_size, options.output)
    print(f"{options.output}: {options.vocab_size:,} pieces")


def _train(options: argparse.Namespace) -> None:
    from tokenmill.trainer.config import load_recipe
    from tokenmill.trainer.loop import train

    train(load_recipe(options.recipe, options.overrides))


def _profile(options: argparse.Namespace) -> None:
    from tokenmill.trainer.config import load_recipe
    from tokenmill.trainer.profile import profile

    if table := profile(load_recipe(options.recipe, options.overrides), Path(options.output), steps=options.steps):
        print(table)


def _eval(options: argparse.Namespace) -> None:
    from tokenmill.data.tokenizer import Tokenizer
    from tokenmill.trainer.checkpoint import load_model, resolve_model
    from tokenmill.trainer.distributed import pick_device
    from tokenmill.trainer.evaluate.score import multiple_choice
    from tokenmill.trainer.evaluate.tasks import load_questions

    folder = resolve_model(options.model)
    tokenizer = Tokenizer.open(options.tokenizer or folder)
    model = load_model(folder).to(pick_device("auto"))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{tokenizer.path}: {tokenizer.vocab_size} pieces do not fit the model's vocabulary of "
            f"{model.config.vocab_size}; give the model's own with --tokenizer"
        )
    questions = load_questions(options.questions)[: options.limit]
    score = multiple_choice(model, tokenizer, questions, by=options.by, template=options.template)
    print(
        f"{options.questions}: accuracy {score.accuracy:.3f} (95 % interval {score.low:.3f} to {score.high:.3f}, "
        f"chance {score.chance:.3f}, {score.n} questions, by {options.by})"
    )


def _import(options: argparse.Namespace) -> None:
    import torch

    from tokenmill.trainer.checkpoint import load_model, resolve_model, save_checkpoint
    from tokenmill.trainer.model.upcycle import upcycle

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    folder = resolve_model(options.source)
    model = load_model(folder, dtypes.get(options.dtype))
    if options.upcycle:
        model = upcycle(model, options.upcycle, options.top_k, noise=options.noise, seed=options.seed)
    save_checkpoint(Path(options.output), model, tokenizer_from=folder)
    print(f"{options.output}: {model.config.parameters():,} parameters, {model.embed.weight.dtype}")


def _export(options: argparse.Namespace) -> None:
    from tokenmill.trainer.adapters import adapter_tensors, read_adapter
    from tokenmill.trainer.checkpoint import load_model, read_config, resolve_model
    from tokenmill.trainer.model.peft import save_peft
    from tokenmill.trainer.model.weights import save_hf

    folder = resolve_model(options.source)
    if options.adapter:
        if (adapted := read_adapter(folder)) is None:
            raise ValueError(f"{folder}: holds no adapters; leave out --adapter to export the model")
        adapter, base = adapted
        save_peft(adapter_tensors(folder), read_config(folder), adapter, options.output, base.path)
        print(f"{options.output}: adapters of {base.path}")
        return
    model = load_model(folder, dtype=None)
    save_hf(model, options.output, tokenizer_from=folder)
    print(f"{options.output}: {model.config.parameters():,} parameters")
