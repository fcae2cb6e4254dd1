"""A tiny Mixtral's recipe on two small streams, as an argument list over one TOML file."""

from __future__ import annotations

import random

import pytest

from tokenmill.data.prepare import prepare
from tokenmill.data.tokenizer import train_tokenizer
from tokenmill.trainer.config import Recipe, load_recipe

RECIPE = """
objective = "pretrain"
output = "{folder}/run"
train = {{ steps = 12, checkpoint_every = 5, validate_every = 6 }}
optimizer = {{ learning_rate = 3e-3 }}

[model.new]
dim = 32
n_layers = 2
n_heads = 4
n_kv_heads = 2
head_dim = 8
hidden_dim = 48
vocab_size = 320
sliding_window = 9
moe = {{ n_experts = 4 }}

[data]
sequence_length = 64
packs_per_step = 4
packs_per_micro_batch = 2
sources = [{{ stream = "{folder}/notes", weight = 3 }}, {{ stream = "{folder}/talks" }}]
validation = ["{folder}/notes"]
validation_tokens = 500
"""


@pytest.fixture(scope="session")
def streams(tmp_path_factory):
    """A folder with a tokenizer of 320 pieces and two streams, notes (plain text) and talks (with loss masks)."""
    import json

    folder = tmp_path_factory.mktemp("streams")
    draw = random.Random(0)
    words = "fever cough pain rash given for days after morning dose iron scan".split()  # noqa: SIM905
    notes = [" ".join(draw.choices(words, k=draw.randrange(3, 60))) + "." for _ in range(150)]
    model = train_tokenizer(notes, 320, folder / "tokenizer.model")
    (folder / "notes.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in notes))
    talks = [{"instruction": t[:40], "output": t[40:80] or "none"} for t in notes]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    for name in ("notes", "talks"):
        prepare([folder / f"{name}.jsonl"], model, folder / name, progress=False)
    return folder


@pytest.fixture
def make_recipe(streams, tmp_path):
    """A function from overrides to a recipe whose output lies in the test's own folder."""

    def make(*overrides: str) -> Recipe:
        path = tmp_path / "recipe.toml"
        path.write_text(RECIPE.format(folder=streams))
        return load_recipe(path, [f"--output={tmp_path / 'run'}", *overrides])

    return make
