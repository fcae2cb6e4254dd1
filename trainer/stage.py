"""One stage of a pipeline: what decides its weights, and the record of it and of what came of it, beside its
checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tokenmill.data.files import replace_file
from tokenmill.data.stream import read_manifest as read_stream
from tokenmill.trainer.adapters import Base
from tokenmill.trainer.checkpoint import find_model
from tokenmill.trainer.config import ConfigError, KernelsSection, LogSection, Recipe, build
from tokenmill.trainer.lineage import total_tokens
from tokenmill.trainer.model import ModelConfig
from tokenmill.trainer.shards import MANIFEST, read_manifest

RECORD = "stage.json"
GONE = "gone"


@dataclass(frozen=True)
class Result:
    """What came of a stage that is done."""

    step: int
    tokens: int
    total_tokens: int  # those of the models that it comes from included
    validation: dict  # losses, nats, at the last step

    @staticmethod
    def of(checkpoint: Path) -> Result:
        """Of a run's last checkpoint."""
        metrics = checkpoint.parents[1] / "metrics.jsonl"
        last = json.loads(metrics.read_text().splitlines()[-1])
        state = read_manifest(checkpoint)["state"]
        return Result(state["step"], state["tokens"], total_tokens(checkpoint), last.get("validation", {}))


@dataclass(frozen=True)
class Record:
    """What `stage.json` holds."""

    inputs: dict  # a recipe without what does not change the weights
    fingerprint: str  # of that, and so of all the stages before
    result: Result | None = None  # None: not done

    @staticmethod
    def of(recipe: Recipe, begins: str | None) -> Record:
        """For the stage that is about to be; `begins` names what it begins from where that is an earlier stage."""
        inputs = inputs_of(recipe, begins)
        return Record(inputs, hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest())

    @staticmethod
    def read(output: Path) -> Record | None:
        """None where no stage has begun. Raises ValueError where the folder holds something else."""
        path = output / RECORD
        if not path.is_file():
            if (output / "checkpoints").exists():
                raise ValueError(f"{output}: holds a run that no pipeline began; give the pipeline another output")
            return None
        try:
            return build(Record, json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path}: not a readable record of a stage ({error}); remove {output}") from None

    def write(self, output: Path) -> None:
        replace_file(output / RECORD, json.dumps(asdict(self), indent=2) + "\n")

    def check(self, output: Path, now: Record) -> None:
        """Raises ValueError naming what has changed, where the stage would be another one `now`."""
        path = output / RECORD
        try:
            was = asdict(build(Recipe, self.inputs))  # with the defaults of keys that there were not then
        except ConfigError as error:
            raise ValueError(f"{path}: was written by another version of tokenmill ({error})") from None
        before, after = dict(_leaves(was)), dict(_leaves(asdict(build(Recipe, now.inputs))))
        keys = [key for key in before | after if before.get(key) != after.get(key) != GONE]
        if keys:
            changes = ", ".join(f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in keys[:3])
            more = f" and {len(keys) - 3} more" if keys[3:] else ""
            raise ValueError(
                f"{output}: was begun with other inputs: {changes}{more}; put them back, remove that folder to train "
                "it again, or give the pipeline another output"
            )


@dataclass(frozen=True)
class Stage:
    """A run as it is planned."""

    name: str
    recipe: Recipe
    origin: str | None  # the stage and the step that it begins from, for people; None: the recipe's own model
    steps: int
    record: Record
    shape: ModelConfig | None = None  # of its model; None: it is done
    tokenizer: Path | None = None  # the folder of its tokenizer


def inputs_of(recipe: Recipe, begins: str | None) -> dict[str, Any]:
    """What decides the weights that a recipe makes: streams and models by what they hold, and without its output, what
    it reports and keeps, and what only makes it faster or smaller, so that all those may differ when it is resumed.
    """
    data, train, path = recipe.data, recipe.train, recipe.model.path
    begins = begins or (path and _model(path))
    moments = begins if recipe.optimizer.moments == path else recipe.optimizer.moments
    decisive = replace(
        recipe,
        output="",
        device="auto",
        kernels=KernelsSection(),
        log=LogSection(),
        evaluate=(),
        model=replace(recipe.model, path=begins),
        optimizer=replace(recipe.optimizer, moments=moments),
        data=replace(
            data,
            packs_per_micro_batch=1,
            sources=tuple(replace(source, stream=_stream(source.stream)) for source in data.sources),
            validation=(),
            validation_tokens=None,
        ),
        train=replace(
            train,
            recompute="none",
            deterministic=False,
            validate_every=None,
            checkpoint_every=None,
            keep_checkpoints=1,
            checkpoint_at=(),
        ),
    )
    return json.loads(json.dumps(asdict(decisive)))


def _stream(path: str) -> str:
    try:
        return f"content {read_stream(Path(path))['fingerprint'][:16]}"
    except (ValueError, OSError):
        return GONE  # a stage that is done no longer needs it


def _model(path: str) -> str:
    """A Hugging Face folder is named by its files' sizes: all of it is read only when training begins."""
    try:
        folder = find_model(path)
        if (folder / MANIFEST).is_file():
            return f"content {Base.of(folder).fingerprint[:16]}"
        sizes = [(file.name, file.stat().st_size) for file in sorted(folder.glob("*.safetensors"))]
        return f"content {hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]}"
    except (ValueError, OSError):
        return GONE


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested section by its path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    if not items:
        yield key, value
    for name, item in items:
        yield from _leaves(item, f"{key}.{name}" if key else str(name))
