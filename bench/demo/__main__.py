"""`make demo`: clinical text to a trained, tuned and measured model, on a CPU in minutes.

A tiny Mixtral learns general text, goes on to clinical text with a little replay, and is tuned on questions about
half of the ICD-10 categories, with and without NEFTune, and for comparison from the general model too. After each
stage it answers questions about the other half. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

from tokenmill.bench.demo import corpus, report
from tokenmill.bench.step import compare, summary
from tokenmill.data.documents import read_texts
from tokenmill.data.files import replace_file
from tokenmill.data.loader import Loader, Source
from tokenmill.data.prepare import prepare
from tokenmill.data.stream import TokenStream
from tokenmill.data.tokenizer import Tokenizer, train_tokenizer
from tokenmill.trainer.checkpoint import load_model
from tokenmill.trainer.config import Recipe, load_recipe
from tokenmill.trainer.evaluate.score import multiple_choice
from tokenmill.trainer.evaluate.tasks import load_questions
from tokenmill.trainer.loop import train

STREAMS = ("general", "general_heldout", "clinical", "clinical_heldout", "tuning")
STAGES = {  # name: (recipe, the stage it starts from, NEFTune's alpha)
    "base": ("demo_base", None, 0.0),
    "cpt": ("demo_cpt", "base", 0.0),
    "base_sft": ("demo_sft", "base", 0.0),
    "cpt_sft": ("demo_sft", "cpt", 0.0),
    "cpt_sft_neftune": ("demo_sft", "cpt", 5.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="tokenmill.bench.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--tokenizer", help="a sentencepiece model or mistral-v1 .. v3; default: one trained on the text"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the stages' tokens, for a quick look")
    options = parser.parse_args()
    material(options.output, options.tokenizer)
    rows, records = [], {}
    for stage in STAGES:
        rows.append(run(options.output, stage, options.scale))
        lines = (options.output / stage / "metrics.jsonl").read_text().splitlines()
        records[stage] = [json.loads(line) for line in lines]
    table = report.table(rows)
    print(f"\n{table}\n")
    replace_file(options.output / "table.md", table + "\n")
    report.plots(records, options.output)
    print(f"plots: {', '.join(str(p) for p in sorted(options.output.glob('*.png')))}\n")
    peers(options.output)


def material(output: Path, tokenizer: str | None) -> None:
    """Text, tokenizer and token streams, those that are not there yet."""
    text = output / "text"
    if not text.is_dir():
        corpus.write(text)
    model = output / "tokenizer.model"
    if tokenizer is None and not model.is_file():
        train_tokenizer(read_texts([text / "general.jsonl", text / "clinical.jsonl"]), 4096, model)
    for name in STREAMS:
        if not (output / "streams" / name).is_dir():
            prepare([text / f"{name}.jsonl"], tokenizer or model, output / "streams" / name)


def stage_recipe(output: Path, stage: str, scale: float) -> Recipe:
    """A stage's recipe with this run's folders."""
    name, parent, alpha = STAGES[stage]
    vocabulary = TokenStream.open(output / "streams" / "general").vocab_size
    streams = output / "streams"
    recipe = load_recipe(str(files("tokenmill.trainer") / "recipes" / f"{name}.toml"))
    recipe = replace(
        recipe,
        output=str(output / stage),
        data=replace(
            recipe.data,
            sources=tuple(replace(s, stream=str(streams / Path(s.stream).name)) for s in recipe.data.sources),
            validation=tuple(str(streams / Path(v).name) for v in recipe.data.validation),
        ),
        train=replace(recipe.train, tokens=int((recipe.train.tokens or 0) * scale)),
        loss=replace(recipe.loss, neftune_alpha=alpha),
    )
    if parent is not None:
        return replace(recipe, model=replace(recipe.model, path=str(output / parent)))
    assert recipe.model.new is not None
    return replace(recipe, model=replace(recipe.model, new=replace(recipe.model.new, vocab_size=vocabulary)))


def run(output: Path, stage: str, scale: float) -> dict:
    """Train and score one stage, or read what an earlier call found."""
    found = output / stage / "result.json"
    if not found.is_file():
        model = load_model(train(stage_recipe(output, stage, scale), console="bar"))
        tokenizer = Tokenizer.open(output / "streams" / "general")
        score = multiple_choice(model, tokenizer, load_questions(output / "text" / "questions.jsonl"))
        lines = [json.loads(line) for line in (output / stage / "metrics.jsonl").read_text().splitlines()]
        rates = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
        result = {
            "stage": stage,
            "losses": lines[-1]["validation"],
            "tokens_per_second": rates[len(rates) // 2],
            "score": asdict(score),
        }
        replace_file(found, json.dumps(result, indent=2) + "\n")
    return json.loads(found.read_text())


def peers(output: Path) -> None:
    """Tokens a second beside transformers' Mixtral: the same weights, documents and precision, in turn."""
    recipe = stage_recipe(output, "cpt", 1.0)
    loader = Loader(
        [Source(TokenStream.open(s.stream), s.weight) for s in recipe.data.sources],
        sequence_length=recipe.data.sequence_length,
        packs_per_step=recipe.data.packs_per_step,
        packs_per_micro_batch=recipe.data.packs_per_step,
        seed=recipe.seed,
    )
    batches = [next(loader).micro_batches[0] for _ in range(8)]
    result = compare(load_model(output / "base"), batches, recipe.optimizer)
    print(f"The same steps through Hugging Face's Trainer, in turn in one run:\n{summary(batches, result)}")


if __name__ == "__main__":
    main()
