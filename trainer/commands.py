"""What each command of the command line does with its arguments. Imports are made where they are needed, so that a
command does not wait for those of another.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenmill.data.journal import Generator


def prepare(options: argparse.Namespace) -> None:
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


def merge(options: argparse.Namespace) -> None:
    from tokenmill.data.merge import merge

    stream = merge(options.streams, options.output)
    print(f"{options.output}: {len(stream):,} documents, {stream.tokens:,} tokens")


def convert(options: argparse.Namespace) -> None:
    from tokenmill.data.convert import export_megatron, import_tokens
    from tokenmill.data.stream import MANIFEST

    if (Path(options.source) / MANIFEST).is_file():
        export_megatron(options.source, options.output)
        print(f"{options.output}.bin, {options.output}.idx")
        return
    if options.tokenizer is None:
        raise ValueError(f"{options.source}: is no token stream: name the tokenizer of its ids (--tokenizer)")
    given = dict(dtype=options.dtype, delimiter=options.delimiter)
    stream = import_tokens(options.source, options.tokenizer, options.output, **given)
    print(f"{options.output}: {len(stream):,} documents, {stream.tokens:,} tokens")


def instruct(options: argparse.Namespace) -> None:
    from tokenmill.data.instructions import ANSWER_PROMPT, TASKS_PROMPT, instruct
    from tokenmill.data.synthesis import read_prompt

    prompt = read_prompt(options.prompt, "examples", "count") if options.prompt else TASKS_PROMPT
    answer_prompt = read_prompt(options.answer_prompt, "task") if options.answer_prompt else ANSWER_PROMPT
    max_tokens, answer_tokens = options.max_tokens or 4096, options.answer_tokens
    answerer = _generator(options, options.answer_model, answer_tokens) if options.answer_model else None
    report = instruct(
        options.seeds,
        options.output,
        _generator(options, options.model, max_tokens if answerer else max(max_tokens, answer_tokens)),
        answerer=answerer,
        tasks=options.tasks,
        shots=options.shots,
        per_request=options.per_request,
        threshold=options.threshold,
        dedupe=options.dedupe,
        prompt=prompt,
        answer_prompt=answer_prompt,
        temperature=options.temperature,
        max_tokens=max_tokens,
        answer_tokens=answer_tokens,
        seed=options.seed,
        overwrite=options.overwrite,
        progress=sys.stderr.isatty(),
    )
    print(f"{report}\n{options.output}")


def rewrite(options: argparse.Namespace) -> None:
    from tokenmill.data.rewrite import REWRITE_PROMPT, rewrite
    from tokenmill.data.synthesis import read_prompt

    max_tokens = options.max_tokens or 2048
    report = rewrite(
        options.inputs,
        options.output,
        _generator(options, options.model, max_tokens),
        text_key=options.text_key,
        characters=options.characters,
        limit=options.limit,
        dedupe=options.dedupe,
        prompt=read_prompt(options.prompt, "document") if options.prompt else REWRITE_PROMPT,
        temperature=options.temperature,
        max_tokens=max_tokens,
        seed=options.seed,
        overwrite=options.overwrite,
        progress=sys.stderr.isatty(),
    )
    print(f"{report}\n{options.output}")


def _generator(options: argparse.Namespace, model: str, max_tokens: int) -> Generator:
    """What writes the text: a model behind an endpoint, or a checkpoint; at most so many tokens at a time."""
    if options.endpoint:
        from tokenmill.data.endpoint import Endpoint

        return Endpoint(
            options.endpoint,
            model,
            key_variable=options.key_variable,
            concurrency=options.concurrency,
            timeout=options.timeout,
            omit=options.omit,
            max_tokens_field=options.max_tokens_field,
        )
    from tokenmill.trainer.generator import CheckpointGenerator

    width = options.concurrency
    return CheckpointGenerator(model, template=options.template, width=width, max_tokens=max_tokens)


def inspect(options: argparse.Namespace) -> None:
    from tokenmill.data import report
    from tokenmill.trainer import lineage, shards
    from tokenmill.trainer.checkpoint import find_model

    folder = Path(options.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a token stream, a checkpoint or a run's output")
    if (folder / shards.MANIFEST).is_file() or (folder / "checkpoints").is_dir():
        print(lineage.inspect(find_model(folder)))
    else:
        print(report.inspect(folder))


def verify(options: argparse.Namespace) -> None:
    from tokenmill.data.stream import TokenStream

    stream = TokenStream.open(options.stream)
    stream.verify()
    print(f"{options.stream}: {len(stream):,} documents, {stream.tokens:,} tokens, every checksum holds")


def train_tokenizer(options: argparse.Namespace) -> None:
    from tokenmill.data.documents import read_texts
    from tokenmill.data.tokenizer import train_tokenizer

    train_tokenizer(read_texts(options.inputs, options.text_key), options.vocab_size, options.output)
    print(f"{options.output}: {options.vocab_size:,} pieces")


def train(options: argparse.Namespace) -> None:
    from tokenmill.trainer.config import load_recipe
    from tokenmill.trainer.loop import train

    train(load_recipe(options.recipe, options.overrides))


def run(options: argparse.Namespace) -> None:
    from tokenmill.trainer.pipeline import run

    run(options.pipeline, options.overrides)


def profile(options: argparse.Namespace) -> None:
    from tokenmill.trainer.config import load_recipe
    from tokenmill.trainer.profile import profile

    if table := profile(load_recipe(options.recipe, options.overrides), Path(options.output), steps=options.steps):
        print(table)


def evaluate(options: argparse.Namespace) -> None:
    from contextlib import ExitStack
    from dataclasses import asdict

    from tokenmill.data.files import replace_file
    from tokenmill.trainer.adapters import Base
    from tokenmill.trainer.checkpoint import find_model, resolve_model
    from tokenmill.trainer.evaluate import report
    from tokenmill.trainer.evaluate.replies import Replies
    from tokenmill.trainer.evaluate.strategies import Asker, check, evaluate, named, usual
    from tokenmill.trainer.evaluate.tasks import load_questions
    from tokenmill.trainer.inference import DTYPES, open_model, tokens_at_once

    find_model(options.model)
    strategy = named(options.strategy, k=options.k, votes=options.votes, temperature=options.temperature)
    if options.output:
        report.check_output(options.output)
    questions = load_questions(options.questions)[: options.limit]
    earlier = report.read_runs(options.against)
    report.check_same({options.questions: [report.asked(question) for question in questions], **earlier})
    pool = load_questions(options.shots) if options.shots else []
    check(questions, strategy, by=options.by, pool=pool, template=options.template)
    options.by = options.by or usual(questions, strategy)
    folder = resolve_model(options.model)
    fingerprint = Base.of(folder).fingerprint if options.output else ""
    with ExitStack() as stack:
        replies = None
        if options.output and options.by == "generate":
            replies = stack.enter_context(Replies(report.replies_path(options.output), fingerprint))
        model, tokenizer = open_model(folder, tokenizer=options.tokenizer, dtype=options.dtype)
        options.dtype = next(name for name, dtype in DTYPES.items() if dtype == model.embed.weight.dtype)
        asker = Asker(
            model,
            tokenizer,
            options.template,
            options.seed,
            options.max_new_tokens,
            options.tokens_per_batch or tokens_at_once(model),
            progress=sys.stderr.isatty(),
            replies=replies,
        )
        start = time.monotonic()
        answers = evaluate(asker, questions, strategy, by=options.by, pool=pool)
        keys = ("model", "tokenizer", "dtype", "questions", "limit", "strategy", "by", "template", "shots")
        run = {key: getattr(options, key) for key in (*keys, "max_new_tokens", "seed")}
        rows = report.to_rows(answers, run | {"fingerprint": fingerprint, "settings": asdict(strategy)})
        if options.output:
            replace_file(Path(options.output), report.to_json(rows))
    runs = {**earlier, f"{options.strategy} by {options.by}": rows}
    if options.output:
        runs = report.read_runs([*options.against, options.output])
    print(f"{options.questions}: {report.summary(rows)}, in {time.monotonic() - start:.1f} s")
    print(report.tables(runs, seed=options.seed))


def compare(options: argparse.Namespace) -> None:
    from tokenmill.trainer.evaluate import report

    print(report.tables(report.read_runs(options.results), seed=options.seed))


def judge(options: argparse.Namespace) -> None:
    from tokenmill.data.synthesis import read_prompt
    from tokenmill.trainer.evaluate.judge import JUDGE_PROMPT, judge

    max_tokens = options.max_tokens or 1024
    judgement = judge(
        options.a,
        options.b,
        options.output,
        _generator(options, options.model, max_tokens),
        prompt=read_prompt(options.prompt, "task", "first", "second") if options.prompt else JUDGE_PROMPT,
        max_tokens=max_tokens,
        seed=options.seed,
        overwrite=options.overwrite,
        progress=sys.stderr.isatty(),
    )
    print(f"{judgement}\n{options.output}")


def generate(options: argparse.Namespace) -> None:
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


def import_model(options: argparse.Namespace) -> None:
    from tokenmill.trainer.adapters import Base
    from tokenmill.trainer.checkpoint import load_model, resolve_model, save_checkpoint
    from tokenmill.trainer.inference import DTYPES
    from tokenmill.trainer.lineage import lineage, parent
    from tokenmill.trainer.model.upcycle import upcycle
    from tokenmill.trainer.state import TrainState
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
        state = None if model.balance_bias is None else TrainState(balance_bias=model.balance_bias)
        save_checkpoint(Path(options.output), model, state=state, tokenizer_from=tokenizer, lineage=before)
    print(f"{options.output}: {model.config.parameters():,} parameters, {model.embed.weight.dtype}")
    for token, text in zip(added.ids, options.add_tokens, strict=True) if added else ():
        print(f"token {token:,}: {text}")


def merge_models(options: argparse.Namespace) -> None:
    from tokenmill.trainer.merge import Merge, merge_models

    merge = Merge(options.method, options.weights, options.scale, options.density, options.seed)
    config, dtype = merge_models(options.models, options.output, merge, base=options.base, progress=sys.stderr.isatty())
    print(f"{options.output}: {config.parameters():,} parameters, {dtype}")


def export(options: argparse.Namespace) -> None:
    from tokenmill.trainer.adapters import adapter_tensors, hugging_face_base, read_adapter
    from tokenmill.trainer.chat_export import write_chat_files
    from tokenmill.trainer.checkpoint import load_model, read_config, resolve_model
    from tokenmill.trainer.model.peft import save_peft
    from tokenmill.trainer.model.weights import save_hf

    folder = resolve_model(options.source)
    if options.adapter:
        if (adapted := read_adapter(folder)) is None:
            raise ValueError(f"{folder}: holds no adapters; leave out --adapter to export the model")
        adapter, base = adapted
        found = hugging_face_base(folder, base, options.base)
        save_peft(adapter_tensors(folder), read_config(folder), adapter, options.output, found)
        print(f"{options.output}: adapters of {found or base.path}")
        if found is None:
            print(
                f"PEFT cannot open {base.path}, a checkpoint of tokenmill's, so adapter_config.json names no base: "
                f"`tokenmill export {base.path} HF_FOLDER`, and export the adapters again with --base HF_FOLDER"
            )
        return
    if options.base:
        raise ValueError("--base names the model beneath adapters: give it together with --adapter")
    model = load_model(folder, dtype=None)
    with TemporaryDirectory() as temporary:
        write_chat_files(folder, Path(temporary))
        save_hf(model, options.output, tokenizer_from=temporary)
    print(f"{options.output}: {model.config.parameters():,} parameters")
