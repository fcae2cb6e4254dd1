"""The data of a run: the streams of its recipe, opened and checked, and the number of steps they are trained on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenmill.data.errors import DataError
from tokenmill.data.loader import Loader, Source
from tokenmill.data.stream import TokenStream
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.config import Recipe
from tokenmill.trainer.distributed import World
from tokenmill.trainer.model import ModelConfig
from tokenmill.trainer.shards import read_manifest


def open_streams(recipe: Recipe) -> tuple[list[Source], dict[str, TokenStream]]:
    """The sources, and the streams to validate on by their names. Raises ValueError naming one that is not there."""
    sources = [Source(TokenStream.open(s.stream), s.weight, s.epochs) for s in recipe.data.sources]
    return sources, {Path(folder).name: TokenStream.open(folder) for folder in recipe.data.validation}


def make_loader(recipe: Recipe, sources: list[Source], world: World) -> Loader:
    """From the first sample on. Raises ValueError where the sources do not go together as the recipe says."""
    return Loader(
        sources,
        sequence_length=recipe.data.sequence_length,
        packs_per_step=recipe.data.packs_per_step,
        packs_per_micro_batch=recipe.data.packs_per_micro_batch,
        seed=recipe.seed,
        rank=world.rank,
        world=world.size,
        overlong=recipe.overlong,
        pinned=world.device.type == "cuda",
    )


def go_on(loader: Loader, state: dict[str, Any], checkpoint: Path, recipe: Recipe) -> None:
    """Let the loader go on where a checkpoint was written. Raises ValueError naming what the data is unlike in, where
    the order of samples would be another.
    """
    try:
        loader.load_state_dict(state)
    except DataError as error:
        manifest = read_manifest(checkpoint)
        then, now = (manifest.get("recipe") or {}).get("data") or {}, json.loads(json.dumps(asdict(recipe.data)))
        unlike = [
            f"data.{key} was {then[key]!r} and is {now[key]!r}"
            for key in ("sources", "sequence_length", "overlong")
            if key in then and then[key] != now[key]
        ]
        before = (manifest.get("lineage") or {}).get("data") or []
        unlike += [
            f"{source.stream.folder} was {stream['fingerprint'][:12]} and is {source.stream.fingerprint[:12]}"
            for source, stream in zip(loader.sources, before, strict=False)
            if stream["fingerprint"] != source.stream.fingerprint
        ]
        raise ValueError(f"{checkpoint}: {error}" + "".join(f"; {each}" for each in unlike)) from None


def check_streams(
    folder: Path | None, config: ModelConfig, sources: list[TokenStream], validation: dict[str, TokenStream]
) -> Path:
    """That streams and the model, which comes from `folder`, speak the same tokens; the folder that holds their
    tokenizer.

    Raises ValueError naming the stream, where its vocabulary does not fit the model's or its tokenizer is another.
    """
    for stream in [*sources, *validation.values()]:
        if stream.vocab_size > config.vocab_size:
            raise ValueError(
                f"{stream.folder}: its tokenizer has {stream.vocab_size} pieces, the model's vocabulary only "
                f"{config.vocab_size}; prepare it with the model's tokenizer"
            )
    if folder is None or not (folder / "tokenizer.model").is_file():
        folder = sources[0].folder
    expected = Tokenizer.open(folder).sha256
    for stream in [*sources, *validation.values()]:
        if stream.tokenizer_sha256 != expected:
            raise ValueError(
                f"{stream.folder}: was prepared with another tokenizer (sha256 {stream.tokenizer_sha256[:12]}) than "
                f"{folder / 'tokenizer.model'} ({expected[:12]}); prepare it with that one"
            )
    return folder


def planned_steps(recipe: Recipe, loader: Loader) -> int:
    """Optimizer steps of a run, from whichever way the recipe gives its length.

    Raises ValueError where the sources run out before.
    """
    train, data = recipe.train, recipe.data
    if train.steps is not None:
        steps = train.steps
    elif train.tokens is not None:
        steps = math.ceil(train.tokens / (data.packs_per_step * data.sequence_length))
    else:
        assert train.epochs is not None
        steps = max(1, math.ceil(train.epochs * loader.packs_per_epoch / data.packs_per_step))
    if loader.steps is not None and steps > loader.steps:
        raise ValueError(
            f"train: {steps:,} steps, but with their epochs the sources last for {loader.steps:,}: train for fewer, or "
            "give a source more epochs, or none, to let it begin again"
        )
    return steps
