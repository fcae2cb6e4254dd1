"""Recipes: every wrong key, type and value is an error that names the key."""

from importlib.resources import files

import pytest

from tokenmill.trainer.config import ConfigError, load_recipe

RECIPE = """
objective = "sft"
output = "runs/x"
model.path = "somewhere"
data = { sources = [{ stream = "a" }, { stream = "b", weight = 2 }], sequence_length = 64, packs_per_step = 2 }
train = { steps = 10 }
optimizer = { learning_rate = 1e-3, betas = [0.9, 0.99] }
"""


NEW = "dim=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, hidden_dim=8, vocab_size=9"


def load(tmp_path, *overrides, text=RECIPE):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(path, overrides)


def test_overlong_documents_by_objective(tmp_path):
    for objective, expected in (("pretrain", "split"), ("sft", "reject"), ("dpo", "error")):
        assert load(tmp_path, f"--objective={objective}").overlong == expected
        assert load(tmp_path, f"--objective={objective}", "--data.overlong=split").overlong == "split"


def test_values_defaults_and_overrides(tmp_path):
    recipe = load(
        tmp_path, "--loss.neftune_alpha=5", "--output=runs/y", "--data.sources.1.stream=c d", "--train.validate_every=3"
    )
    assert recipe.output == "runs/y"
    assert recipe.loss.neftune_alpha == 5.0
    assert isinstance(recipe.loss.neftune_alpha, float)
    assert [s.stream for s in recipe.data.sources] == ["a", "c d"]
    assert recipe.data.sources[1].weight == 2.0
    assert recipe.optimizer.betas == (0.9, 0.99)
    assert recipe.train.validate_every == 3
    assert recipe.schedule.kind == "cosine"
    recipe = load(tmp_path, "--data.sources.0.weight=[[0, 1], [8, 0.5]]", "--data.sources.1.epochs=1.5")
    assert recipe.data.sources[0].weight == ((0, 1.0), (8, 0.5))
    assert [s.epochs for s in recipe.data.sources] == [None, 1.5]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--optimizer.learning_rat=1", "unknown key optimizer.learning_rat; did you mean optimizer.learning_rate"),
        ("--optimiser.learning_rate=1", "unknown key optimiser; did you mean optimizer"),
        ("--train.steps=ten", "train.steps: expected an integer, got 'ten'"),
        ("--train.steps=1.5", "train.steps: expected an integer, got 1.5"),
        ("--train.steps=true", "train.steps: expected an integer"),
        ("--train.steps=0", "train.steps: expected a positive number"),
        ("--train.epochs=1", "train: expected exactly one of steps, tokens and epochs"),
        ("--optimizer.eps=-1", "optimizer.eps: expected > 0, got -1.0"),
        ("--optimizer.betas=[0.9, 1.0]", "optimizer.betas: expected two numbers from 0 to below 1"),
        ("--optimizer.weight_decay=-0.1", "optimizer.weight_decay: expected 0 or more"),
        ("--data.validation_tokens=0", "data.validation_tokens: expected a positive integer"),
        (
            f"--model.new={{{NEW}}}",
            "model: .*either model.path or model.new, not both, got 'model.path and model.new'$",
        ),
        ("--objective=tune", "objective: expected 'pretrain' or 'sft' or 'dpo'"),
        ("--objective=pretrain", None),
        ("--schedule.kind=linear", "schedule.kind: expected 'cosine' or 'wsd' or 'constant'"),
        ("--data.sources=[]", "data.sources: expected at least one source"),
        ("--data.sources.2.stream=z", "'2' is not an index below 2"),
        ("--data.sources.0.weight=-1", r"data.sources.0.weight: expected a positive number"),
        (
            "--data.sources.0.weight=[[0, 1], [8]]",
            "data.sources.0.weight.1: expected a list of an integer and a number",
        ),
        ("--data.sources.0.weight=[[5, 1]]", "data.sources.0.weight: expected steps from 0 on"),
        ("--data.sources.0.weight=[]", "data.sources.0.weight: expected steps from 0 on"),
        ("--data.sources.0.epochs=0", "data.sources.0.epochs: expected"),
        ("--data.overlong=cut", "data.overlong: expected 'split' or 'reject' or 'error'"),
        ("--data.sequence_length=1", "data.sequence_length: expected at least 2"),
        ("--optimizer.betas=[1]", "optimizer.betas: expected a list of a number"),
        ("--model.new.dim=4", "model.new.n_layers is missing"),
        ("--output.folder=4", "'output' is a value, not a section"),
        ("--schedule={kind='wsd', warmup=0.9}", "warmup [+] decay"),
        ("--schedule.warmup=0.9", None),
        ("--seed=-1", "seed: expected 0 to"),
        ('--data.validation=["a/x", "b/x"]', "data.validation: expected folders with different names"),
        ("steps", "expected --section.key=value"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, override, message):
    if message is None:
        load(tmp_path, override)
        return
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, override)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.toml: no such recipe"):
        load_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="recipe.toml"):
        load(tmp_path, text="objective = ")
    with pytest.raises(ConfigError, match="key output is missing"):
        load(tmp_path, text=RECIPE.replace('output = "runs/x"', ""))
    with pytest.raises(ConfigError, match="either model.path or model.new"):
        load(tmp_path, text=RECIPE.replace('model.path = "somewhere"', "model = {}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--objective=dpo", "--loss.z=0.1"], "loss.z: expected 0 with objective = 'dpo'"),
        (["--dpo.beta=0.2"], "dpo: expected no such section unless objective = 'dpo', got {'beta': 0.2}"),
        (["--objective=pretrain", "--dpo.loss=ipo"], "dpo: expected no such section .* got {'loss': 'ipo'}"),
        (["--adapter.quantise_experts=false"], "adapter: expected quantise = 'nf4' .* got {'quantise_experts': False}"),
        (["--adapter.quantise_router=true"], "adapter: expected quantise = 'nf4' .* got {'quantise_router': True}"),
        (["--objective=dpo", "--dpo.gamma=0.3"], "dpo.gamma: expected no such key unless dpo.loss is simpo, got 0.3"),
        (["--objective=dpo", "--dpo.beta=0.2"], None),
        (["--objective=dpo", "--dpo.loss=simpo", "--dpo.gamma=0.3"], None),
        (["--dpo.beta=0.1", "--loss.z=0.1"], None),
        (["--adapter.quantise=nf4", "--adapter.quantise_experts=false", "--adapter.quantise_router=true"], None),
    ],
)
def test_what_would_have_no_effect_is_refused(tmp_path, overrides, message):
    if message is None:
        load(tmp_path, *overrides)
        return
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, *overrides)


def test_neftune_belongs_to_tuning(tmp_path):
    with pytest.raises(ConfigError, match="loss.neftune_alpha"):
        load(tmp_path, "--objective=pretrain", "--loss.neftune_alpha=5")


RECIPES = [path for path in (files("tokenmill.trainer") / "recipes").iterdir() if path.is_file()]


@pytest.mark.parametrize("path", sorted(RECIPES, key=str), ids=str)
def test_shipped_recipes_are_right(path):
    load_recipe(str(path))
