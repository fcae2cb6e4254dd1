"""The command line: each command parses its arguments and calls one function."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tokenmill.bench import cli as bench

if TYPE_CHECKING:
    from tokenmill.data.journal import Generator


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; wrong input is one line on stderr and exit status 1 (TOKENMILL_DEBUG=1 shows where it arose)."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [a for a in rest if options.command in (_train, _run, _profile) and a.startswith("--") and "=" in a]
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


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers as in 0.3,0.7, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    templates = ["auto", "mistral-v1", "mistral-v2", "mistral-v3", "alpaca", "chatml"]
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
    c.add_argument("--loss-on", default="all", choices=["all", "last"], help="which answers of a chat to learn (all)")
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

    def by_model(c: argparse.ArgumentParser) -> None:
        """What the commands have in common that have a model write text."""
        c.add_argument("--output", required=True, metavar="FILE", help="Alpaca rows (.jsonl), for prepare")
        c.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server's, as http://localhost:8000/v1")
        c.add_argument("--model", required=True, help="its name at the endpoint; else a checkpoint, run or HF folder")
        text = "environment variable with the endpoint's key (TOKENMILL_API_KEY, where it is set)"
        c.add_argument("--key-variable", metavar="NAME", help=text)
        c.add_argument("--concurrency", type=_positive, default=8, help="requests at once (8)")
        c.add_argument("--timeout", type=float, default=600.0, help="seconds for a request to the endpoint (600)")
        c.add_argument("--template", default="auto", choices=templates, help="of a checkpoint's chats")
        c.add_argument("--max-tokens", type=_positive, help="of an answer with tasks or a question (4096, 2048)")
        c.add_argument("--dedupe", choices=["exact", "minhash"], default="minhash", help="of the rows (minhash)")
        c.add_argument("--seed", type=int, default=0)
        c.add_argument("--overwrite", action="store_true", help="replace an output that is there")

    c = command("instruct", _instruct, "Seed tasks to new tasks and their answers, by a model: instruction data.")
    c.add_argument("seeds", nargs="+", metavar="SEEDS", help="JSON lines of instruction, input, topic, type, ...")
    by_model(c)
    c.add_argument("--tasks", type=_positive, default=1000, help="new tasks to make (1000)")
    c.add_argument("--shots", type=_positive, default=3, help="seed tasks in a request (3)")
    c.add_argument("--per-request", type=_positive, default=10, help="new tasks to ask for in a request (10)")
    c.add_argument("--threshold", type=float, default=0.7, help="of ROUGE-L, above which a task is dropped (0.7)")
    c.add_argument("--temperature", type=float, default=1.0, help="of new tasks (1); answers are greedy")
    c.add_argument("--prompt", metavar="FILE", help="that asks for tasks, with {examples} and {count}")
    c.add_argument("--answer-prompt", metavar="FILE", help="that asks for an answer, with {task}")
    c.add_argument("--answer-model", help="another model, of the same kind, for the answers")
    c.add_argument("--answer-tokens", type=_positive, default=2048, help="at most, of an answer (2048)")

    c = command("rewrite", _rewrite, "Documents to questions and answers, by a model: instruction data.")
    c.add_argument("inputs", nargs="+", metavar="INPUT", help=inputs)
    by_model(c)
    c.add_argument("--text-key", default="text", help="key of a row's text (default: text)")
    c.add_argument("--characters", type=_positive, default=8000, help="of a document in a request, at most (8000)")
    c.add_argument("--limit", type=_positive, help="only the first LIMIT documents")
    c.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    c.add_argument("--prompt", metavar="FILE", help="that asks for a question and an answer, with {document}")

    c = command("inspect", _inspect, "What a token stream holds; or a checkpoint, and where it comes from.")
    c.add_argument("folder", help="a stream, a checkpoint or a run's output")

    c = command("verify", _verify, "Check every checksum of a token stream.")
    c.add_argument("stream")

    c = command("train-tokenizer", _train_tokenizer, "A sentencepiece model from a corpus.")
    c.add_argument("inputs", nargs="+", metavar="INPUT", help=inputs)
    c.add_argument("--vocab-size", type=int, required=True)
    c.add_argument("--output", required=True, help="the model file to write")
    c.add_argument("--text-key", default="text")

    c = command("train", _train, "Run a recipe, from where it stopped if it did.")
    c.add_argument("recipe", help="a TOML file; any key of it can be given as --section.key=value")

    c = command("run", _run, "Run the stages of a pipeline, from where it stopped if it did.")
    c.add_argument("pipeline", help="a TOML file; any key of it can be given as --section.key=value")

    c = command("profile", _profile, "Where the time of a recipe's step goes: a table, a trace, a memory snapshot.")
    c.add_argument("recipe")
    c.add_argument("--output", default="runs/profile", help="folder for the trace and the table (runs/profile)")
    c.add_argument("--steps", type=_positive, default=5)

    c = command("bench", None, "Measurements.")
    bench.add_commands(c)

    c = command("eval", _eval, "How well a model answers questions, by a prompting strategy.")
    c.add_argument("model", help="a run's output, a checkpoint or a Hugging Face folder")
    c.add_argument("questions", help="JSON lines (.gz too): choices, classification, extraction, summaries")
    strategies = ["zero-shot", "few-shot", "knn", "chain-of-thought", "self-consistency", "medprompt"]
    c.add_argument("--strategy", choices=strategies, default="zero-shot", help="of prompting (default: zero-shot)")
    text = "score option texts or letters, or read what is generated (default: text; generate where only that works)"
    c.add_argument("--by", choices=["text", "letter", "generate"], help=text)
    c.add_argument("--shots", metavar="FILE", help="other questions, to take worked examples from")
    c.add_argument("--k", type=_positive, help="examples in a prompt (5)")
    c.add_argument("--votes", type=_positive, help="samples of self-consistency, orders of medprompt (5)")
    c.add_argument("--temperature", type=float, help="of generated answers (self-consistency: 0.7; else 0, greedy)")
    c.add_argument("--max-new-tokens", type=_positive, help="of an answer (512; 32 without a chain of thought)")
    c.add_argument("--seed", type=int, default=0, help="of examples, samples, orders and intervals (0)")
    c.add_argument("--tokenizer", help="default: the model folder's tokenizer.model")
    c.add_argument("--template", default="auto", choices=[*templates, "plain"], help="plain: text, for a base model")
    c.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: bf16 on a GPU, fp32 on a CPU")
    text = "tokens computed at once, and cached in generation (65536 on a GPU, 8192 on a CPU)"
    c.add_argument("--tokens-per-batch", type=_positive, help=text)
    c.add_argument("--limit", type=_positive, help="only the first LIMIT questions")
    c.add_argument("--output", metavar="FILE", help="write every prompt and answer, as JSON lines (.jsonl)")
    text = "compare with earlier outputs on the same questions"
    c.add_argument("--against", nargs="+", default=[], metavar="FILE", help=text)

    c = command("compare", _compare, "Outputs of eval on the same questions, side by side; the first is the baseline.")
    c.add_argument("results", nargs="+", metavar="FILE")
    c.add_argument("--seed", type=int, default=0, help="of the intervals (0)")

    c = command("generate", _generate, "Text from a model.")
    c.add_argument("model", help="a run's output, a checkpoint or a Hugging Face folder")
    text = "(default: one, read from standard input)"
    c.add_argument("--prompt", nargs="+", action="extend", default=[], metavar="TEXT", help=text)
    c.add_argument("--file", help="of prompts: .txt is one, JSON lines hold prompt, messages or instruction")
    c.add_argument("--plain", action="store_true", help="go on with the text as it is, without a chat template")
    c.add_argument("--template", default="auto", choices=templates)
    c.add_argument("--max-new-tokens", type=_positive, help="default: 256, or as many as there are positions for")
    c.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token (default)")
    c.add_argument("--top-p", type=float, default=1.0, help="draw from the most likely tokens of this probability (1)")
    c.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    c.add_argument("--samples", type=_positive, default=1, help="answers to each prompt (1)")
    c.add_argument("--json", action="store_true", help="JSON lines: prompt, sample, text, tokens, stopped, row")
    c.add_argument("--tokenizer", help="default: the model folder's tokenizer.model")
    c.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: bf16 on a GPU, fp32 on a CPU")
    text = "tokens computed at once, and cached (65536 on a GPU, 8192 on a CPU)"
    c.add_argument("--tokens-per-batch", type=_positive, help=text)

    c = command("import", _import, "A model to a checkpoint without an optimizer; --upcycle gives it experts.")
    c.add_argument("source", help="a Hugging Face folder, a checkpoint or a run's output")
    c.add_argument("output")
    c.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: the files' own")
    text = "control pieces for the tokenizer; their rows begin as the mean of the others"
    c.add_argument("--add-tokens", nargs="+", metavar="TOKEN", help=text)
    c.add_argument("--upcycle", type=_positive, metavar="EXPERTS", help="so many copies of each dense network")
    c.add_argument("--top-k", type=_positive, default=2, help="upcycle: experts that act on a token (2)")
    text = "upcycle: normal noise on the copies, relative to each weight's standard deviation (0)"
    c.add_argument("--noise", type=float, default=0.0, metavar="STD", help=text)
    c.add_argument("--seed", type=int, default=0, help="upcycle: of noise and routers (0)")

    c = command("merge-models", _merge_models, "Models of one shape, or what each has learnt, merged into one.")
    text = "a run's output, a checkpoint or a Hugging Face folder"
    c.add_argument("models", nargs="+", metavar="MODEL", help=text)
    c.add_argument("--output", required=True, help="folder of the checkpoint, which has no optimizer")
    methods = ["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"]
    c.add_argument("--method", choices=methods, default="linear", help="default: linear")
    text = "one a model, as 0.3,0.7 (default: equal shares); of linear, slerp and ties only their ratios matter"
    c.add_argument("--weights", type=_numbers, default=(), help=text)
    c.add_argument("--base", help="the model that the others were tuned from; not for linear and slerp")
    text = "of all that was learnt, where there is a base; the papers' lambda (1)"
    c.add_argument("--scale", type=float, default=1.0, help=text)
    text = "share of what a model has learnt that ties and dare keep (0.5)"
    c.add_argument("--density", type=float, default=0.5, help=text)
    c.add_argument("--seed", type=int, default=0, help="of what dare drops (0)")

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
        loss_on=options.loss_on,
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


def _instruct(options: argparse.Namespace) -> None:
    from tokenmill.data.instructions import ANSWER_PROMPT, TASKS_PROMPT, instruct
    from tokenmill.data.synthesis import read_prompt

    prompt = read_prompt(options.prompt, "examples", "count") if options.prompt else TASKS_PROMPT
    answer_prompt = read_prompt(options.answer_prompt, "task") if options.answer_prompt else ANSWER_PROMPT
    report = instruct(
        options.seeds,
        options.output,
        _generator(options, options.model),
        answerer=_generator(options, options.answer_model) if options.answer_model else None,
        tasks=options.tasks,
        shots=options.shots,
        per_request=options.per_request,
        threshold=options.threshold,
        dedupe=options.dedupe,
        prompt=prompt,
        answer_prompt=answer_prompt,
        temperature=options.temperature,
        max_tokens=options.max_tokens or 4096,
        answer_tokens=options.answer_tokens,
        seed=options.seed,
        overwrite=options.overwrite,
        progress=sys.stderr.isatty(),
    )
    print(f"{report}\n{options.output}")


def _rewrite(options: argparse.Namespace) -> None:
    from tokenmill.data.rewrite import REWRITE_PROMPT, rewrite
    from tokenmill.data.synthesis import read_prompt

    report = rewrite(
        options.inputs,
        options.output,
        _generator(options, options.model),
        text_key=options.text_key,
        characters=options.characters,
        limit=options.limit,
        dedupe=options.dedupe,
        prompt=read_prompt(options.prompt, "document") if options.prompt else REWRITE_PROMPT,
        temperature=options.temperature,
        max_tokens=options.max_tokens or 2048,
        seed=options.seed,
        overwrite=options.overwrite,
        progress=sys.stderr.isatty(),
    )
    print(f"{report}\n{options.output}")


def _generator(options: argparse.Namespace, model: str) -> Generator:
    """What writes the text: a model behind an endpoint, or a checkpoint."""
    if options.endpoint:
        from tokenmill.data.endpoint import Endpoint

        return Endpoint(
            options.endpoint,
            model,
            key_variable=options.key_variable,
            concurrency=options.concurrency,
            timeout=options.timeout,
        )
    from tokenmill.trainer.generator import CheckpointGenerator

    return CheckpointGenerator(model, template=options.template, width=options.concurrency)


def _inspect(options: argparse.Namespace) -> None:
    from tokenmill.data import report
    from tokenmill.trainer import lineage, shards
    from tokenmill.trainer.checkpoint import find_model

    folder = Path(options.folder)
    if (folder / shards.MANIFEST).is_file() or (folder / "checkpoints").is_dir():
        print(lineage.inspect(find_model(folder)))
    else:
        print(report.inspect(folder))


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


def _run(options: argparse.Namespace) -> None:
    from tokenmill.trainer.pipeline import run

    run(options.pipeline, options.overrides)


def _profile(options: argparse.Namespace) -> None:
    from tokenmill.trainer.config import load_recipe
    from tokenmill.trainer.profile import profile

    if table := profile(load_recipe(options.recipe, options.overrides), Path(options.output), steps=options.steps):
        print(table)


def _eval(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from tokenmill.trainer.checkpoint import find_model
    from tokenmill.trainer.evaluate import report
    from tokenmill.trainer.evaluate.strategies import Asker, check, evaluate, named, usual
    from tokenmill.trainer.evaluate.tasks import load_questions
    from tokenmill.trainer.files import replace_file
    from tokenmill.trainer.inference import open_model, tokens_at_once

    find_model(options.model)
    strategy = named(options.strategy, k=options.k, votes=options.votes, temperature=options.temperature)
    if options.output:
        report.check_output(options.output)
    questions = load_questions(options.questions)[: options.limit]
    earlier = report.read_runs(options.against)
    report.check_same({options.questions: [report.asked(question) for question in questions], **earlier})
    pool = load_questions(options.shots) if options.shots else []
    check(questions, strategy, by=options.by, pool=pool)
    options.by = options.by or usual(questions, strategy)
    model, tokenizer = open_model(options.model, tokenizer=options.tokenizer, dtype=options.dtype)
    asker = Asker(
        model,
        tokenizer,
        options.template,
        options.seed,
        options.max_new_tokens,
        options.tokens_per_batch or tokens_at_once(model),
        progress=sys.stderr.isatty(),
    )
    start = time.monotonic()
    answers = evaluate(asker, questions, strategy, by=options.by, pool=pool)
    keys = ("model", "questions", "limit", "strategy", "by", "template", "shots", "max_new_tokens", "seed")
    rows = report.to_rows(answers, {key: getattr(options, key) for key in keys} | {"settings": asdict(strategy)})
    runs = {**earlier, f"{options.strategy} by {options.by}": rows}
    if options.output:
        replace_file(Path(options.output), report.to_json(rows))
        runs = report.read_runs([*options.against, options.output])
    print(f"{options.questions}: {report.summary(rows)}, in {time.monotonic() - start:.1f} s")
    print(report.tables(runs, seed=options.seed))


def _compare(options: argparse.Namespace) -> None:
    from tokenmill.trainer.evaluate import report

    print(report.tables(report.read_runs(options.results), seed=options.seed))


def _generate(options: argparse.Namespace) -> None:
    from tokenmill.trainer.completion import Completion, Prompt, read_prompts
    from tokenmill.trainer.inference import open_model, tokens_at_once
    from tokenmill.trainer.model.generate import Sampling

    sampling = Sampling(options.temperature, options.top_p, options.seed)
    prompts = [Prompt(f"prompt {i}", {"prompt": text}) for i, text in enumerate(options.prompt)]
    prompts += read_prompts(options.file) if options.file else []
    if not prompts:
        prompts = [Prompt("standard input", {"prompt": sys.stdin.read().removesuffix("\n")})]
    model, tokenizer = open_model(options.model, tokenizer=options.tokenizer, dtype=options.dtype)
    completion = Completion(
        model,
        tokenizer,
        prompts,
        None if options.plain else options.template,
        sampling=sampling,
        max_new_tokens=options.max_new_tokens,
        tokens_per_batch=options.tokens_per_batch or tokens_at_once(model),
    )
    if len(prompts) * options.samples == 1 and not options.json:
        for piece in completion.pieces():
            print(piece, end="", flush=True)
        print()
        return
    for answer in completion.answers(options.samples):
        if options.json:
            print(json.dumps(answer._asdict() | {"row": prompts[answer.prompt].row}, ensure_ascii=False), flush=True)
        else:
            print(f"==> prompt {answer.prompt}, sample {answer.sample} <==\n{answer.text}\n", flush=True)


def _import(options: argparse.Namespace) -> None:
    from tokenmill.trainer.adapters import Base
    from tokenmill.trainer.checkpoint import load_model, resolve_model, save_checkpoint
    from tokenmill.trainer.inference import DTYPES
    from tokenmill.trainer.lineage import lineage, parent
    from tokenmill.trainer.model.upcycle import upcycle
    from tokenmill.trainer.vocabulary import add_rows, add_tokens

    folder = resolve_model(options.source)
    with TemporaryDirectory() as temporary:
        tokenizer, added = folder, None
        if options.add_tokens:
            tokenizer = Path(temporary)
            added = add_tokens(folder, options.add_tokens, tokenizer)
        model = load_model(folder, DTYPES.get(options.dtype))
        if added:
            add_rows(model, added)
        if options.upcycle:
            model = upcycle(model, options.upcycle, options.top_k, noise=options.noise, seed=options.seed)
        before = lineage([parent(Base.of(folder))])
        save_checkpoint(Path(options.output), model, tokenizer_from=tokenizer, lineage=before)
    print(f"{options.output}: {model.config.parameters():,} parameters, {model.embed.weight.dtype}")
    for token, text in zip(added.ids, options.add_tokens, strict=True) if added else ():
        print(f"token {token:,}: {text}")


def _merge_models(options: argparse.Namespace) -> None:
    from tokenmill.trainer.merge import Merge, merge_models

    merge = Merge(options.method, options.weights, options.scale, options.density, options.seed)
    config, dtype = merge_models(options.models, options.output, merge, base=options.base, progress=sys.stderr.isatty())
    print(f"{options.output}: {config.parameters():,} parameters, {dtype}")


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
