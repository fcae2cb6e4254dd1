"""Several stages of training, each a recipe, that begin from one another: `tokenmill run PIPELINE.toml`.

    output = "runs/clinical"            # each stage's output is the folder of its name in it

    [[stages]]
    name = "cpt"
    recipe = "mistral_7b_cpt.toml"      # a file, seen from this one's folder; or a section: the recipe itself

    [[stages]]
    name = "tune"
    parent = "cpt"                      # begins with the weights of an earlier stage, its adapters merged into them;
                                        # or with its adapters, where those are the same here, on weights in 4 bits
    at = [100, 200, "last"]             # at each of these steps of it: the stages tune-100, tune-200 and tune-last
    recipe = "mistral_7b_sft.toml"
    set.optimizer.learning_rate = 2e-5  # keys that come over the recipe's

All stages are checked before the first begins. What each was begun with, and what came of it, is written beside its
checkpoints: the same command again passes over the stages that are done, and goes on in the one that was stopped.
"""

from __future__ import annotations

import gc
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tokenmill.trainer.checkpoint import find_model, read_config, step_folder, step_folders
from tokenmill.trainer.config import ConfigError, Recipe, build, read_toml
from tokenmill.trainer.distributed import World, join, pick_device
from tokenmill.trainer.evaluation import make_evaluations
from tokenmill.trainer.loop import empty_model, train
from tokenmill.trainer.preference import check_pairs
from tokenmill.trainer.stage import Record, Result, Stage
from tokenmill.trainer.streams import check_streams, make_loader, open_streams, planned_steps


@dataclass(frozen=True)
class StageSection:
    name: str
    recipe: str | dict  # a file, seen from the pipeline's folder; or the recipe itself
    set: dict = field(default_factory=dict)  # [stages.set]: keys that come over the recipe's
    parent: str | None = None  # the stage whose weights it begins with; None: the recipe's own model
    at: tuple[int | str, ...] | int | str = "last"  # steps of the parent; of a list, a run for each
    optimizer: Literal["reset", "keep"] = "reset"  # keep: begin with the parent's moments too


@dataclass(frozen=True)
class PipelineSection:
    output: str
    stages: tuple[StageSection, ...]  # [[stages]]
    set: dict = field(default_factory=dict)  # [set]: for every stage, over its recipe's file, under its own keys


@dataclass(frozen=True)
class Branch:
    """One run: a stage of the file, or of one that fans out, a way through it."""

    name: str
    section: StageSection
    parent: str | None
    at: int | str


def run(path: str | Path, overrides: Sequence[str] = (), console: Literal["lines", "bar"] = "lines") -> None:
    """Run the stages of a pipeline that are not done, on the processes that `torchrun` started, and print a table of
    all of them.

    Raises ValueError, before anything is trained, where a stage is not as it must be, and SystemExit with status 75
    where a scheduler asked to stop.
    """
    stages = plan(path, overrides)
    results = [stage.record.result for stage in stages]
    todo = [i for i, result in enumerate(results) if result is None]
    sharded = any(stages[i].recipe.train.precision == "bf16-mixed" for i in todo)
    with join(stages[0].recipe.device, sharded=sharded) as world:
        for i, stage in enumerate(stages):
            output = Path(stage.recipe.output)
            if world.rank == 0:
                origin = f", from {stage.origin}" if stage.origin else ""
                done = "" if i in todo else ": done"
                print(f"stage {i + 1} of {len(stages)}: {stage.name}{origin}{done}", flush=True)
            if i not in todo:
                continue
            if world.rank == 0:
                stage.record.write(output)
            checkpoint = train(stage.recipe, console, last=i == todo[-1])
            gc.collect()  # a model in a cycle of references would keep the memory that the next one needs
            if world.rank == 0:
                results[i] = Result.of(checkpoint)
                replace(stage.record, result=results[i]).write(output)
        if world.rank == 0:
            print(f"\n{table(stages, results)}", flush=True)


def table(stages: Sequence[Stage], results: Sequence[Result | None]) -> str:
    """Markdown, whose columns are also aligned as plain text: a row a stage, a column a validation stream."""
    streams = list(dict.fromkeys(name for result in results if result for name in result.validation))
    rows = [["stage", "from", "steps", "tokens", "in all", *streams]]
    for stage, result in zip(stages, results, strict=True):
        assert result is not None
        counts = [f"{count:,}" for count in (result.step, result.tokens, result.total_tokens)]
        losses = [result.validation.get(name) for name in streams]
        cells = ["-" if loss is None else f"{loss:.4f}" for loss in losses]
        rows.append([stage.name, stage.origin or "", *counts, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = "|".join("-" * (w + 2) if i < 2 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(rows[0]), f"|{rule}|", *map(line, rows[1:])])


def plan(path: str | Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """The runs of a pipeline in order, each checked as far as it can be without its weights: recipe, streams, shapes,
    what it begins from; and where it has begun already, that it is what it was. Overrides are as those of a recipe.

    Raises ConfigError naming the file, the stage and the key or folder.
    """
    path = Path(path)
    raw = read_toml(path, overrides, kind="pipeline")
    try:
        file = build(PipelineSection, raw)
        branches = branches_of(file)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    wanted: defaultdict[str | None, set[int]] = defaultdict(set)  # steps of each run that others begin at
    for branch in branches:
        wanted[branch.parent] |= {branch.at} if isinstance(branch.at, int) else set()
    stages: dict[str | None, Stage] = {}
    for branch in branches:
        try:
            recipe = read_recipe(file, branch, path.parent)
            at = (*recipe.train.checkpoint_at, *wanted[branch.name])
            recipe = replace(recipe, train=replace(recipe.train, checkpoint_at=tuple(sorted({*at}))))
            stages[branch.name] = plan_stage(branch, recipe, stages.get(branch.parent))
        except (ValueError, OSError) as error:
            raise ConfigError(f"{path}: stage {branch.name!r}: {error}") from None
    if len(devices := {pick_device(stage.recipe.device).type for stage in stages.values()}) > 1:
        raise ConfigError(f"{path}: device: expected the same in every stage, got {' and '.join(sorted(devices))}")
    return list(stages.values())


def branches_of(file: PipelineSection) -> list[Branch]:
    """The runs that a file's stages are: of one that begins at several steps, or whose parent has several runs, one for
    each. Raises ConfigError naming the key.
    """
    found: list[Branch] = []
    runs: dict[str, list[Branch]] = {}  # by every name that a later stage may call its parent
    for i, section in enumerate(file.stages):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", section.name):
            raise ConfigError(f"stages.{i}.name: expected letters, digits, '_', '-' and '.', got {section.name!r}")
        if section.parent is None and (section.at != "last" or section.optimizer != "reset"):
            raise ConfigError(f"stages.{i}: at and optimizer say what is taken of a parent; {section.name!r} has none")
        if section.parent is not None and section.parent not in runs:
            there = ", ".join(map(repr, runs)) or "none"
            raise ConfigError(
                f"stages.{i}.parent: no stage before {section.name!r} is called {section.parent!r}; there are {there}"
            )
        steps = section.at if isinstance(section.at, tuple) else (section.at,)
        if not steps or not all(step == "last" or (isinstance(step, int) and step > 0) for step in steps):
            raise ConfigError(f"stages.{i}.at: expected steps from 1 on or 'last', got {section.at!r}")
        branches = []
        for parent in [None] if section.parent is None else [branch.name for branch in runs[section.parent]]:
            way = "" if parent is None else parent.removeprefix(section.parent or "")
            for step in steps:
                name = section.name + way + (f"-{step}" if isinstance(section.at, tuple) else "")
                branches.append(Branch(name, section, parent, step))
        names = [branch.name for branch in branches]
        for name in names if section.name in names else [section.name, *names]:
            if name in runs:
                raise ConfigError(f"stages.{i}: there is a stage {name!r} already")
            runs[name] = [branch for branch in branches if name in (section.name, branch.name)]
        found += branches
    if not found:
        raise ConfigError("stages: expected at least one, as [[stages]]")
    return found


def read_recipe(file: PipelineSection, branch: Branch, folder: Path) -> Recipe:
    """A run's recipe, whose output is the pipeline's, but for what it begins from."""
    section = branch.section
    inline = section.recipe if isinstance(section.recipe, dict) else {}
    raw = {} if isinstance(section.recipe, dict) else read_toml(folder / section.recipe)
    for where, given in (("set", file.set), ("recipe", inline), ("set", section.set)):
        if "output" in given:
            raise ConfigError(f"{where}.output: a stage's output is the pipeline's, and in it the folder of its name")
        if "model" in given and branch.parent is not None:
            raise ConfigError(f"{where}.model: the stage begins with the model of its parent, {branch.parent!r}")
        raw = over(raw, given)
    raw["output"] = str(Path(file.output) / branch.name)
    if branch.parent is not None:
        raw["model"] = {"path": branch.parent}
    return build(Recipe, raw)


def over(section: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """A section with other values of some of its keys, and of those of the sections in it."""
    both = {k: over(section[k], v) for k, v in keys.items() if isinstance(v, dict) and isinstance(section.get(k), dict)}
    return section | keys | both


def plan_stage(branch: Branch, recipe: Recipe, parent: Stage | None) -> Stage:
    """Raises ValueError where a run cannot be, or its folder holds another one."""
    origin = begins = checkpoint = None
    if parent is not None:
        step = parent.steps if branch.at == "last" else int(branch.at)
        if step > parent.steps:
            raise ConfigError(f"at: {parent.name!r} ends at step {parent.steps:,}, and has no step {step:,}")
        origin = f"{parent.name} at step {step:,}"
        begins = f"{origin} ({parent.record.fingerprint[:16]})"
        checkpoint = step_folder(Path(parent.recipe.output), step)
        keep = branch.section.optimizer == "keep"
        recipe = replace(
            recipe,
            model=replace(recipe.model, path=str(checkpoint)),
            optimizer=replace(recipe.optimizer, moments=str(checkpoint) if keep else recipe.optimizer.moments),
        )
    record = Record.of(recipe, begins)
    if (earlier := Record.read(Path(recipe.output))) is not None:
        earlier.check(Path(recipe.output), record)
        record = earlier
    if parent is not None and recipe.adapter is not None and goes_on(recipe, parent.recipe):
        adapter = replace(recipe.adapter, path=str(checkpoint))
        recipe = replace(recipe, adapter=adapter, model=parent.recipe.model)
    if record.result is not None:
        return Stage(branch.name, recipe, origin, record.result.step, record)
    if parent is not None and checkpoint is not None:
        check_parent(recipe, parent, checkpoint, branch)
        shape, tokenizer = parent.shape or read_config(checkpoint), parent.tokenizer or checkpoint
    else:
        tokenizer = None if recipe.model.path is None else find_model(recipe.model.path)
        shape = recipe.model.new if tokenizer is None else read_config(tokenizer)
        assert shape is not None
    sources, validation = open_streams(recipe)
    streams = [source.stream for source in sources]
    tokenizer = check_streams(tokenizer, shape, streams, validation)
    check_pairs(recipe, [*streams, *validation.values()])
    model = empty_model(recipe, shape, pick_device(recipe.device))
    make_evaluations(recipe, model, tokenizer, World())
    steps = planned_steps(recipe, make_loader(recipe, sources, World()))
    return Stage(branch.name, recipe, origin, steps, record, shape, tokenizer)


def goes_on(recipe: Recipe, theirs: Recipe) -> bool:
    """Whether a stage trains its parent's adapters on, as nothing can be merged into weights in 4 bits. Any other one
    begins with the merged weights.
    """
    if recipe.adapter is None or theirs.adapter is None or recipe.adapter.quantise != "nf4":
        return False
    return recipe.adapter == replace(theirs.adapter, path=None)


def check_parent(recipe: Recipe, parent: Stage, checkpoint: Path, branch: Branch) -> None:
    """Raises ConfigError where a recipe cannot begin from its parent's checkpoint."""
    run, theirs = parent.recipe.output, parent.recipe
    there = step_folders(Path(run))
    if checkpoint not in there and (parent.record.result is not None or checkpoint < max(there, default=checkpoint)):
        names = ", ".join(folder.name for folder in there) or "none"
        raise ConfigError(
            f"at: {run} was trained past that step and holds no {checkpoint.name} (but {names}); begin at one of "
            "those, or remove that folder to train it again"
        )
    if branch.section.optimizer == "keep":
        if recipe.adapter or theirs.adapter:
            raise ConfigError(
                "optimizer: 'keep' is not for adapters: those of the parent are merged into the weights that a stage "
                "begins with, and new ones have no moments (nor are those in 4 bits trained on with them); set it to "
                "'reset'"
            )
        if recipe.optimizer.kind != theirs.optimizer.kind:
            raise ConfigError(
                f"optimizer: 'keep' needs the parent's optimizer.kind, {theirs.optimizer.kind!r}, not "
                f"{recipe.optimizer.kind!r}; set that, or optimizer to 'reset'"
            )
        if "bf16" in (both := {recipe.train.precision, theirs.train.precision}) and len(both) > 1:
            raise ConfigError(
                f"optimizer: 'keep' needs moments of one dtype, but train.precision is {recipe.train.precision!r}, the "
                f"parent's {theirs.train.precision!r}; set them the same, or optimizer to 'reset'"
            )
    ours = recipe.adapter
    if theirs.adapter and ours and ours.quantise == "nf4" and ours.path != str(checkpoint):
        raise ConfigError(
            "parent: its adapters cannot be merged into weights in 4 bits; to train them on, give [adapter] the keys "
            f"of the parent's; else end the pipeline there, `tokenmill export {run}`, and begin another one from that"
        )
