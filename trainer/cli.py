"""The command line: each command parses its arguments and calls one function of commands.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from tokenmill.bench import cli as bench
from tokenmill.trainer import commands
from tokenmill.trainer.merge_methods import METHODS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; wrong input is one line on stderr and exit status 1 (TOKENMILL_DEBUG=1 shows where it arose)."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [
        a
        for a in rest
        if options.command in (commands.train, commands.run, commands.profile) and a.startswith("--") and "=" in a
    ]
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


def _seed(text: str) -> int:
    if not 0 <= (number := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"expected 0 to 2**63 - 1, got {number}")
    return number


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers as in 0.3,0.7, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    templates = ["auto", "mistral-v1", "mistral-v2", "mistral-v3", "alpaca", "chatml"]
    parser = argparse.ArgumentParser(prog="tokenmill", description="Token streams to trained models.")
    parser.add_argument("--version", action="version", version=f"tokenmill {version('tokenmill')}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=function)
        return sub

    c = command("prepare", commands.prepare, "Text to a token stream.")
    inputs = "a file (.txt, .jsonl, each also .gz or .zst, .parquet), folder or pattern; NAME=... names its source"
    c.add_argument("inputs", nargs="+", metavar="INPUT", help=inputs)
    c.add_argument("--tokenizer", required=True, help="a sentencepiece model, or mistral-v1, mistral-v2, mistral-v3")
    c.add_argument("--output", required=True, help="folder of the stream")
    text_key = "key of a row's text (default: text, of a row without a conversation or preferences)"
    c.add_argument("--text-key", help=text_key)
    c.add_argument("--source-key", help="key of a row's source (default: a source for each input)")
    c.add_argument("--template", default="auto", choices=templates, help="of chats (default: by the tokenizer)")
    c.add_argument("--loss-on", default="all", choices=["all", "last"], help="which answers of a chat to learn (all)")
    c.add_argument("--dedupe", choices=["exact", "minhash"], help="leave out what repeats an earlier document")
    text = "leave out documents that share 13 words in a row with these evaluation files"
    c.add_argument("--decontaminate", nargs="+", default=[], metavar="INPUT", help=text)
    cores = len(os.sched_getaffinity(0))
    c.add_argument("--workers", type=_positive, default=cores, help="processes (default: the cores)")
    there = c.add_mutually_exclusive_group()
    there.add_argument("--overwrite", action="store_true", help="replace a stream that is there")
    there.add_argument("--append", action="store_true", help="add to the stream that is there")

    c = command("merge", commands.merge, "Token streams to one, which shares their files.")
    c.add_argument("streams", nargs="+", metavar="STREAM")
    c.add_argument("--output", required=True, help="folder of the new stream")

    c = command("convert", commands.convert, "Other trainers' token files to a stream, or a stream to Megatron's.")
    c.add_argument("source", help="a stream; or Megatron's .bin with its .idx, .npy, or a file of ids (.bin)")
    c.add_argument("output", help="folder of the stream; or Megatron's prefix, where the source is a stream")
    c.add_argument("--tokenizer", help="of the ids, where the source is no stream")
    c.add_argument("--dtype", choices=["uint16", "uint32", "int32"], help="of a file of ids (default: by vocabulary)")
    text = "what ends a document in a file of ids (eos), or begins it (bos)"
    c.add_argument("--delimiter", choices=["bos", "eos"], default="eos", help=text)

    def by_model(c: argparse.ArgumentParser, output: str = "Alpaca rows (.jsonl), for prepare") -> None:
        """What the commands have in common that have a model write text."""
        c.add_argument("--output", required=True, metavar="FILE", help=output)
        c.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server's, as http://localhost:8000/v1")
        c.add_argument("--model", required=True, help="its name at the endpoint; else a checkpoint, run or HF folder")
        text = "environment variable with the endpoint's key (TOKENMILL_API_KEY, where it is set)"
        c.add_argument("--key-variable", metavar="NAME", help=text)
        c.add_argument("--concurrency", type=_positive, default=8, help="requests at once (8)")
        c.add_argument("--timeout", type=float, default=600.0, help="seconds for a request to the endpoint (600)")
        text = "of a request that the endpoint refuses: max_tokens, temperature or seed; may be repeated"
        c.add_argument("--omit", action="append", default=[], metavar="FIELD", help=text)
        text = "the endpoint's name for it, such as max_completion_tokens (max_tokens)"
        c.add_argument("--max-tokens-field", default="max_tokens", metavar="NAME", help=text)
        c.add_argument("--template", default="auto", choices=templates, help="of a checkpoint's chats")
        text = "of an answer with tasks, a question or a verdict (4096, 2048, 1024)"
        c.add_argument("--max-tokens", type=_positive, help=text)
        c.add_argument("--seed", type=_seed, default=0)
        c.add_argument("--overwrite", action="store_true", help="replace an output that is there")

    c = command(
        "instruct", commands.instruct, "Seed tasks to new tasks and their answers, by a model: instruction data."
    )
    c.add_argument("seeds", nargs="+", metavar="SEEDS", help="JSON lines of instruction, input, topic, type, ...")
    by_model(c)
    c.add_argument("--dedupe", choices=["exact", "minhash"], default="minhash", help="of the rows (minhash)")
    c.add_argument("--tasks", type=_positive, default=1000, help="new tasks to make (1000)")
    c.add_argument("--shots", type=_positive, default=3, help="seed tasks in a request (3)")
    c.add_argument("--per-request", type=_positive, default=10, help="new tasks to ask for in a request (10)")
    c.add_argument("--threshold", type=float, default=0.7, help="of ROUGE-L, above which a task is dropped (0.7)")
    c.add_argument("--temperature", type=float, default=1.0, help="of new tasks (1); answers are greedy")
    c.add_argument("--prompt", metavar="FILE", help="that asks for tasks, with {examples} and {count}")
    c.add_argument("--answer-prompt", metavar="FILE", help="that asks for an answer, with {task}")
    c.add_argument("--answer-model", help="another model, of the same kind, for the answers")
    c.add_argument("--answer-tokens", type=_positive, default=2048, help="at most, of an answer (2048)")

    c = command("rewrite", commands.rewrite, "Documents to questions and answers, by a model: instruction data.")
    c.add_argument("inputs", nargs="+", metavar="INPUT", help=inputs)
    by_model(c)
    c.add_argument("--dedupe", choices=["exact", "minhash"], default="minhash", help="of the rows (minhash)")
    c.add_argument("--text-key", default="text", help="key of a row's text (default: text)")
    c.add_argument("--characters", type=_positive, default=8000, help="of a document in a request, at most (8000)")
    c.add_argument("--limit", type=_positive, help="only the first LIMIT documents")
    c.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    c.add_argument("--prompt", metavar="FILE", help="that asks for a question and an answer, with {document}")

    c = command("inspect", commands.inspect, "What a token stream holds; or a checkpoint, and where it comes from.")
    c.add_argument("folder", help="a stream, a checkpoint or a run's output")

    c = command("verify", commands.verify, "Check every checksum of a token stream.")
    c.add_argument("stream")

    c = command("train-tokenizer", commands.train_tokenizer, "A sentencepiece model from a corpus.")
    c.add_argument("inputs", nargs="+", metavar="INPUT", help=inputs)
    c.add_argument("--vocab-size", type=_positive, required=True)
    c.add_argument("--output", required=True, help="the model file to write")
    c.add_argument("--text-key", help=text_key)

    c = command("train", commands.train, "Run a recipe, from where it stopped if it did.")
    c.add_argument("recipe", help="a TOML file; any key of it can be given as --section.key=value")

    c = command("run", commands.run, "Run the stages of a pipeline, from where it stopped if it did.")
    c.add_argument("pipeline", help="a TOML file; any key of it can be given as --section.key=value")

    c = command(
        "profile", commands.profile, "Where the time of a recipe's step goes: a table, a trace, a memory snapshot."
    )
    c.add_argument("recipe")
    c.add_argument("--output", default="runs/profile", help="folder for the trace and the table (runs/profile)")
    c.add_argument("--steps", type=_positive, default=5)

    c = command("bench", None, "Measurements.")
    bench.add_commands(c)

    c = command("eval", commands.evaluate, "How well a model answers questions, by a prompting strategy.")
    c.add_argument("model", help="a run's output, a checkpoint or a Hugging Face folder")
    c.add_argument("questions", help="JSON lines (.gz too): choices, classification, extraction, summaries")
    strategies = ["zero-shot", "few-shot", "knn", "chain-of-thought", "self-consistency", "medprompt"]
    c.add_argument("--strategy", choices=strategies, default="zero-shot", help="of prompting (default: zero-shot)")
    text = "score option texts or letters, or read what is generated (default: text; generate where only that works)"
    c.add_argument("--by", choices=["text", "letter", "generate"], help=text)
    c.add_argument("--shots", metavar="FILE", help="other questions, to take worked examples from")
    c.add_argument("--k", type=_positive, help="examples in a prompt, as long as there are positions for them (5)")
    c.add_argument("--votes", type=_positive, help="samples of self-consistency, orders of medprompt (5)")
    c.add_argument("--temperature", type=float, help="of generated answers (self-consistency: 0.7; else 0, greedy)")
    c.add_argument("--max-new-tokens", type=_positive, help="of an answer (512; 32 without a chain of thought)")
    c.add_argument("--seed", type=_seed, default=0, help="of examples, samples, orders and intervals (0)")
    c.add_argument("--tokenizer", help="default: the model folder's tokenizer.model")
    c.add_argument("--template", default="auto", choices=[*templates, "plain"], help="plain: text, for a base model")
    c.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: bf16 on a GPU, fp32 on a CPU")
    text = "tokens computed at once, and cached in generation (65536 on a GPU, 8192 on a CPU)"
    c.add_argument("--tokens-per-batch", type=_positive, help=text)
    c.add_argument("--limit", type=_positive, help="only the first LIMIT questions")
    text = "write every prompt and answer, as JSON lines (.jsonl); killed and started again, it goes on"
    c.add_argument("--output", metavar="FILE", help=text)
    text = "compare with earlier outputs on the same questions"
    c.add_argument("--against", nargs="+", default=[], metavar="FILE", help=text)

    c = command(
        "compare", commands.compare, "Outputs of eval on the same questions, side by side; the first is the baseline."
    )
    c.add_argument("results", nargs="+", metavar="FILE")
    c.add_argument("--seed", type=_seed, default=0, help="of the intervals (0)")

    c = command("judge", commands.judge, "Two models' answers to the same prompts, compared by a third in both orders.")
    c.add_argument("a", metavar="A", help="answers of `generate --json`, or of `eval --by generate --output`")
    c.add_argument("b", metavar="B", help="the other model's, to the same prompts")
    by_model(c, "a line a pair, with both verdicts (.jsonl)")
    c.add_argument("--prompt", metavar="FILE", help="that asks for a verdict, with {task}, {first} and {second}")

    c = command("generate", commands.generate, "Text from a model.")
    c.add_argument("model", help="a run's output, a checkpoint or a Hugging Face folder")
    text = "(default: one, read from standard input)"
    c.add_argument("--prompt", nargs="+", action="extend", default=[], metavar="TEXT", help=text)
    c.add_argument("--file", help="of prompts: .txt is one, JSON lines hold prompt, messages or instruction")
    c.add_argument("--plain", action="store_true", help="go on with the text as it is, without a chat template")
    c.add_argument("--template", default="auto", choices=templates)
    c.add_argument("--max-new-tokens", type=_positive, help="default: 256, or as many as there are positions for")
    c.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token (default)")
    c.add_argument("--top-p", type=float, default=1.0, help="draw from the most likely tokens of this probability (1)")
    c.add_argument("--seed", type=_seed, default=0, help="of what is drawn (0)")
    c.add_argument("--samples", type=_positive, default=1, help="answers to each prompt (1)")
    c.add_argument("--json", action="store_true", help="JSON lines: prompt, sample, text, tokens, stopped, row")
    c.add_argument("--tokenizer", help="default: the model folder's tokenizer.model")
    c.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: bf16 on a GPU, fp32 on a CPU")
    text = "tokens computed at once, and cached (65536 on a GPU, 8192 on a CPU)"
    c.add_argument("--tokens-per-batch", type=_positive, help=text)

    c = command(
        "import", commands.import_model, "A model to a checkpoint without an optimizer; --upcycle gives it experts."
    )
    c.add_argument("source", help="a Hugging Face folder, a checkpoint or a run's output")
    c.add_argument("output")
    c.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: the files' own")
    text = "control pieces for the tokenizer; their rows begin as the mean of the others"
    c.add_argument("--add-tokens", nargs="+", metavar="TOKEN", help=text)
    c.add_argument("--upcycle", type=_positive, metavar="EXPERTS", help="so many copies of each dense network")
    c.add_argument("--top-k", type=_positive, default=2, help="upcycle: experts that act on a token (2)")
    text = "upcycle: normal noise on the copies, relative to each weight's standard deviation (0)"
    c.add_argument("--noise", type=float, default=0.0, metavar="STD", help=text)
    c.add_argument("--seed", type=_seed, default=0, help="upcycle: of noise and routers (0)")

    c = command("merge-models", commands.merge_models, "Models of one shape, or what each has learnt, merged into one.")
    text = "a run's output, a checkpoint or a Hugging Face folder"
    c.add_argument("models", nargs="+", metavar="MODEL", help=text)
    c.add_argument("--output", required=True, help="folder of the checkpoint, which has no optimizer")
    c.add_argument("--method", choices=METHODS, default="linear", help="default: linear")
    text = (
        "one a model, as --weights=0.3,0.7 (with = before a negative one); of linear, slerp and ties only their ratios "
        "matter (default: equal); the others add up what was learnt, each times its weight (default: 1)"
    )
    c.add_argument("--weights", type=_numbers, default=(), help=text)
    c.add_argument("--base", help="the model that the others were tuned from; not for linear and slerp")
    text = "of all that was learnt, where there is a base; the papers' lambda (1)"
    c.add_argument("--scale", type=float, default=1.0, help=text)
    text = "share of what a model has learnt that ties and dare keep (0.5)"
    c.add_argument("--density", type=float, default=0.5, help=text)
    c.add_argument("--seed", type=_seed, default=0, help="of what dare drops (0)")

    c = command("export", commands.export, "A checkpoint to a Hugging Face folder.")
    c.add_argument("source", metavar="CHECKPOINT")
    c.add_argument("output", metavar="HF_FOLDER")
    c.add_argument("--adapter", action="store_true", help="the adapters alone, in PEFT's format (default: merged)")
    text = "of --adapter: the model they belong to, as PEFT is to find it (default: where training read it)"
    c.add_argument("--base", metavar="FOLDER_OR_NAME", help=text)
    return parser
