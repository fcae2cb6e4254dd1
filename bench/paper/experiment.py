"""One seed of the experiment: its world, the stages of training, and every arm's answers by every strategy.

All of it is done by what a user has: `prepare`, a pipeline of recipes, `evaluate`. What is done already is passed over,
so that an interrupted seed goes on where it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from statistics import mean
from typing import Any

from tokenmill.bench.paper import world
from tokenmill.data import chat
from tokenmill.data.documents import read_texts
from tokenmill.data.files import locked, replace_file
from tokenmill.data.loader import sequential_batches
from tokenmill.data.prepare import prepare
from tokenmill.data.stream import TokenStream
from tokenmill.data.tokenizer import Tokenizer, train_tokenizer
from tokenmill.trainer import pipeline
from tokenmill.trainer.checkpoint import load_model, step_folder
from tokenmill.trainer.config import read_toml
from tokenmill.trainer.distributed import World, pick_device
from tokenmill.trainer.evaluate import report
from tokenmill.trainer.evaluate.strategies import STRATEGIES, Asker, evaluate
from tokenmill.trainer.evaluate.tasks import load_questions
from tokenmill.trainer.loop import mean_losses
from tokenmill.trainer.model import Transformer
from tokenmill.trainer.shards import read_manifest
from tokenmill.trainer.stage import Stage

STREAMS = ("general", "general_heldout", "clinical", "clinical_heldout", "tuning", "preferences")
HELD_OUT = {"clinical": "clinical_heldout", "general": "general_heldout"}
ARMS = ("base", "cpt", "base-tuned", "cpt-tuned", "cpt-neftune", "cpt-dpo")
SEED = r"^seed = \d+"  # in a pipeline's file
HOPS = {1: "one_hop", 2: "two_hop"}  # files of test questions by the facts that each takes
MARKS = chat.CONTROL_PIECES["mistral-v3"]
LEAST = 8  # people, and diseases
LONGEST = 256  # tokens of a document, at most
CHAIN = 48  # tokens of a chain of thought, at most: the world's own have up to 40
# A prompt holds no more questions than a document of the tuning data does.
SHOTS = {"few-shot": world.MOST_DIRECT - 1, "knn": world.MOST_DIRECT - 1, "medprompt": world.MOST_REASONED - 1}
ZERO_SHOT = "zero-shot"


@dataclass(frozen=True)
class Arm:
    """A model of the experiment, how it is asked, and by which strategies."""

    name: str
    checkpoint: Path
    template: str
    strategies: tuple[str, ...]
    cpt_tokens: int | None = None  # of a point of the curve: those of continued pre-training before it

    @property
    def answers(self) -> Path:
        """A folder that goes when the stage's own is removed."""
        run, step = self.checkpoint.parents[1], self.checkpoint.name
        return run / "answers" / step


def run_seed(folder: Path, pipeline_file: Path, seed: int, size: int) -> None:
    """Everything of a seed that is not there yet. Raises ValueError where another process works on it."""
    with locked(folder) as free:
        if not free:
            raise ValueError(f"{folder}: another process is at work there; wait until it has ended, or stop it")
        stages_file = material(folder, pipeline_file, seed, size)
        pipeline.run(stages_file)
        for arm in arms(pipeline.plan(stages_file)):
            answer(folder, arm, seed)


def check(pipeline_file: Path, seeds: Sequence[int], size: int) -> None:
    """Before any work: raises ValueError where an arm, the curve or the seed is missing, or the world too small."""
    if size < LEAST:
        raise ValueError(f"--size is {size}: expected at least {LEAST} people and diseases, for shots and a test")
    if min(seeds) < 0:
        raise ValueError(f"--seeds: {min(seeds)} is one; expected numbers from 0 on")
    raw = read_toml(pipeline_file, kind="pipeline")
    stages = {stage.get("name"): stage for stage in raw.get("stages", [])}
    copy = "change a copy of the shipped paper.toml"
    if missing := [name for name in ARMS if name not in stages]:
        raise ValueError(f"{pipeline_file}: no stage is called {missing[0]!r}; {copy}")
    at = stages["cpt-tuned"].get("at")
    if not isinstance(at, list) or len(at) < 2 or at[-1] != "last":
        raise ValueError(
            f"{pipeline_file}: stages.cpt-tuned.at is {at!r}, expected steps of cpt for the curve, then 'last'; {copy}"
        )
    if not re.search(SEED, pipeline_file.read_text(), re.MULTILINE):
        raise ValueError(f"{pipeline_file}: set.seed is not there, expected a line `seed = 0` below [set]; {copy}")


def material(folder: Path, pipeline_file: Path, seed: int, size: int) -> Path:
    """Text, tokenizer, streams and the pipeline's file with this folder and seed, which is returned. Raises ValueError
    where there is the text of another world."""
    text, tokenizer = folder / "text", folder / "tokenizer.model"
    if not text.is_dir():
        world.write(text, seed, size)
    made = json.loads((text / world.FACTS).read_text())
    if made != {"seed": seed, "size": size}:
        raise ValueError(
            f"{text}: is of the world {made}, expected seed {seed} and --size {size}: choose another --output"
        )
    raw = read_toml(pipeline_file, kind="pipeline")
    if not tokenizer.is_file():
        vocabulary = raw["stages"][0]["recipe"]["model"]["new"]["vocab_size"] - len(MARKS)
        texts = read_texts([text / f"{name}.jsonl" for name in ("general", "clinical", "tuning")])
        without_marks = folder / ".tokenizer.model"
        model = train_tokenizer(texts, vocabulary, without_marks).with_control_pieces(MARKS)
        replace_file(tokenizer, model)
        without_marks.unlink()
    for name in STREAMS:
        if not (folder / "streams" / name).is_dir():
            prepare([text / f"{name}.jsonl"], tokenizer, folder / "streams" / name)
    there = str(Path(raw["output"]).parent)
    stages = pipeline_file.read_text().replace(there, str(folder))
    replace_file(folder / "pipeline.toml", re.sub(SEED, f"seed = {seed}", stages, flags=re.MULTILINE))
    return folder / "pipeline.toml"


def arms(stages: Sequence[Stage]) -> list[Arm]:
    """The arms of a pipeline whose stages are done: the last checkpoint of each, and those of continued pre-training
    that tuning began from."""
    cpt = next(stage for stage in stages if stage.name == "cpt")
    tokens = {step: _state(cpt, step)["tokens"] for step in (*cpt.recipe.train.checkpoint_at, cpt.steps)}
    points = {f"cpt-tuned-{step}": tokens[step] for step in cpt.recipe.train.checkpoint_at}  # of the curve, tuned
    ends = {"base": 0, "base-tuned": 0, "cpt": tokens[cpt.steps], "cpt-tuned-last": tokens[cpt.steps]}
    found = []
    for stage in stages:
        template = "plain" if stage.recipe.objective == "pretrain" else "auto"
        strategies = (ZERO_SHOT,) if stage.name in points else tuple(STRATEGIES)
        checkpoint = step_folder(Path(stage.recipe.output), stage.steps)
        name = stage.name.removesuffix("-last")
        found.append(Arm(name, checkpoint, template, strategies, (points | ends).get(stage.name)))
    for step in cpt.recipe.train.checkpoint_at:
        checkpoint = step_folder(Path(cpt.recipe.output), step)
        found.append(Arm(f"cpt-{step}", checkpoint, "plain", (ZERO_SHOT,), tokens[step]))
    return found


def about(stages: Sequence[Stage], size: int) -> str:
    """What was run: the pipeline's own first lines, and the sizes."""
    lines = Path(stages[0].recipe.output).parents[1].joinpath("pipeline.toml").read_text().splitlines()
    comment = [line[2:] for line in takewhile(lambda line: line.startswith("# "), lines) if line[2] != " "]
    shape = stages[0].recipe.model.new
    assert shape is not None
    rows = [f"| {s.name} | {s.origin or ''} | {s.steps:,} | {_state(s, s.steps)['tokens']:,} |" for s in stages]
    return "\n".join(
        [
            *comment,
            "",
            f"A world of {size} people and {size} diseases, and a model of {shape.parameters():,} parameters.",
            "",
            "| stage | from | steps | tokens (first seed) |",
            "| --- | --- | --- | --- |",
            *rows,
        ]
    )


def _state(stage: Stage, step: int) -> dict[str, Any]:
    return read_manifest(step_folder(Path(stage.recipe.output), step))["state"]


def answer(folder: Path, arm: Arm, seed: int) -> None:
    """An arm's losses and its answers by each strategy, those that are not there yet."""
    files = [arm.answers / "losses.json", arm.answers / "people.jsonl"]
    files += [arm.answers / f"{strategy}.jsonl" for strategy in arm.strategies]
    if all(file.is_file() for file in files):
        return
    device = pick_device("auto")
    model = load_model(arm.checkpoint).to(device)
    model.eval()
    tokens = 65536 if device.type == "cuda" else 8192
    asker = Asker(model, Tokenizer.open(folder / "tokenizer.model"), arm.template, seed, CHAIN, tokens)
    losses, people, *_ = files
    if not losses.is_file():
        replace_file(losses, json.dumps(_losses(folder, model), indent=2) + "\n")
    if not people.is_file():
        found = evaluate(asker, load_questions(folder / "text" / "people.jsonl"))
        replace_file(people, report.to_json(report.to_rows(found, {"arm": arm.name, "strategy": ZERO_SHOT})))
    text = folder / "text"
    asked = [(hops, question) for hops, name in HOPS.items() for question in load_questions(text / f"{name}.jsonl")]
    for strategy in arm.strategies:
        file = arm.answers / f"{strategy}.jsonl"
        if file.is_file():
            continue
        settings = STRATEGIES[strategy]
        pool = load_questions(text / "shots.jsonl") if settings.shots != "none" else []
        settings = replace(settings, k=SHOTS.get(strategy, settings.k))
        found = evaluate(asker, [question for _, question in asked], settings, pool=pool)
        run = {"arm": arm.name, "strategy": strategy, "template": arm.template, "settings": asdict(settings)}
        rows = [row | {"hops": hops} for row, (hops, _) in zip(report.to_rows(found, run), asked, strict=True)]
        replace_file(file, report.to_json(rows))
        right = sum(row["correct"] for row in rows) / len(rows)
        print(f"{arm.name} {strategy}: {right:.3f} of {len(rows)} questions", flush=True)


def _losses(folder: Path, model: Transformer) -> dict[str, float]:
    """On the held-out documents of both halves, nats a token."""
    here = World(device=next(model.parameters()).device)
    streams = {name: TokenStream.open(folder / "streams" / held_out) for name, held_out in HELD_OUT.items()}
    return {
        name: mean_losses(model, sequential_batches(stream, sequence_length=LONGEST, tokens_per_batch=4096), here, 1)[0]
        for name, stream in streams.items()
    }


def results(stages: Sequence[Stage], found: Sequence[Arm]) -> dict[str, Any]:
    """What the report needs of a seed that is done."""
    measured: dict[str, Any] = {}
    for arm in found:
        by_strategy = {strategy: _rows(arm.answers / f"{strategy}.jsonl") for strategy in arm.strategies}
        measured[arm.name] = {
            "cpt_tokens": arm.cpt_tokens,
            "losses": json.loads((arm.answers / "losses.json").read_text()),
            "people": [row["correct"] for row in _rows(arm.answers / "people.jsonl")],
            "correct": {name: [row["correct"] for row in rows] for name, rows in by_strategy.items()},
            "concluded": {
                name: [_concluded(row) for row in rows]
                for name, rows in by_strategy.items()
                if "generated" in rows[0]["votes"][0]
            },
            "shots": {name: mean(row["shots"] for row in rows) for name, rows in by_strategy.items()},
        }
    return {
        "hops": [row["hops"] for row in _rows(found[0].answers / f"{ZERO_SHOT}.jsonl")],
        "arms": measured,
        "noise": _noise(stages),
        "validation": {stage.name: _validation(stage) for stage in stages if stage.name in ("base", "cpt")},
    }


def _noise(stages: Sequence[Stage]) -> dict[str, float]:
    """Root mean squares of NEFTune's noise in tuning, and of the embeddings that it is added to."""
    stage = next(stage for stage in stages if stage.name == "cpt-neftune")
    lengths = TokenStream.open(stage.recipe.data.sources[0].stream).lengths
    parent = next(stage for stage in stages if stage.name == "cpt")
    embeddings = load_model(step_folder(Path(parent.recipe.output), parent.steps)).embed.weight.detach()
    squares = stage.recipe.loss.neftune_alpha**2 / (3 * lengths * embeddings.shape[1])  # of U(-1, 1) it is 1 / 3
    noise = float((squares * lengths).sum() / lengths.sum()) ** 0.5
    return {"noise": noise, "embeddings": float(embeddings.square().mean()) ** 0.5}


def _validation(stage: Stage) -> list[dict[str, float]]:
    """The losses that a stage met on its way, by its tokens."""
    rows = _rows(Path(stage.recipe.output) / "metrics.jsonl")
    return [
        {"tokens": row["tokens"]} | {half: row["validation"][stream] for half, stream in HELD_OUT.items()}
        for row in rows
        if "validation" in row
    ]


def _concluded(row: dict[str, Any]) -> float:
    """The share of its chains of thought that came to one of the options by themselves."""
    return sum("choice" in vote and not vote["forced"] for vote in row["votes"]) / len(row["votes"])


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
