"""Recipes: frozen dataclasses read from TOML, overridden by `--section.key=value`, and checked to the last key."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from tokenmill.trainer.model.config import AdapterConfig, ModelConfig

T = TypeVar("T")

Overlong = Literal["split", "reject", "error"]  # what becomes of documents longer than the sequence


class ConfigError(ValueError):
    """A recipe that says something impossible; the message names the key and what was expected."""


@dataclass(frozen=True)
class ModelSection:
    """Where the weights come from: a folder, or a new model of a given shape."""

    path: str | None = None  # a Hugging Face folder, a checkpoint, or the output folder of an earlier run
    new: ModelConfig | None = None  # [model.new]: random weights, from `seed`


@dataclass(frozen=True)
class StreamSection:
    stream: str  # folder that `tokenmill prepare` wrote
    # share of the packs, relative to the other sources; or [[0, 0.9], [1000, 0.5]]: another from each step on
    weight: float | tuple[tuple[int, float], ...] = 1.0
    epochs: float | None = None  # passes over it, then it gives no more; None: it begins again as often as needed


@dataclass(frozen=True)
class DataSection:
    sources: tuple[StreamSection, ...]  # [[data.sources]]
    sequence_length: int  # tokens of a pack, and the longest part of a document
    packs_per_step: int  # over all micro-batches and ranks
    packs_per_micro_batch: int = 1
    # documents longer than sequence_length: cut into parts, left out, or an error. None: split in pretraining; reject
    # in sft, where an answer needs its instruction; error in dpo, where a pair is never split
    overlong: Overlong | None = None
    validation: tuple[str, ...] = ()  # streams whose losses are reported apart, under their folders' names
    validation_tokens: int | None = None  # of each; None: all


@dataclass(frozen=True)
class TrainSection:
    """How long: exactly one of steps, tokens (planned: packs times their length) and epochs."""

    steps: int | None = None
    tokens: int | None = None
    epochs: float | None = None
    # bf16-mixed: fp32 weights and moments, bf16 products, fp32 reductions; bf16: all in bf16, stochastically rounded
    precision: Literal["fp32", "bf16-mixed", "bf16"] = "fp32"
    recompute: Literal["none", "selective", "full"] = "none"  # activation checkpointing
    deterministic: bool = False  # on a GPU: the same bits every time, slower in attention; a CPU always gives them
    validate_every: int | None = None  # steps; None: at the end only
    checkpoint_every: int | None = None  # steps; None: at the end only
    keep_checkpoints: int = 2  # the newest ones
    checkpoint_at: tuple[int, ...] = ()  # steps whose checkpoints are written and kept in any case


@dataclass(frozen=True)
class OptimizerSection:
    learning_rate: float
    kind: Literal["adamw", "rmsprop"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the moments; rmsprop has the second alone
    eps: float = 1e-8
    weight_decay: float = 0.1  # of weights and adapters' factors; norms and DoRA's magnitudes are left alone
    clip_norm: float = 1.0
    moments: str | None = None  # a checkpoint, or a run's output, whose moments training begins with; None: zeros


@dataclass(frozen=True)
class ScheduleSection:
    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: float = 0.03  # share of all steps
    decay: float = 0.2  # wsd: share of all steps, at the end
    final: float = 0.1  # of the peak, what cosine and wsd go down to


@dataclass(frozen=True)
class LossSection:
    balance: float = 0.01  # weight of the load-balancing loss: 1 when tokens spread evenly over experts
    balance_bias: float = 0.0  # speed of a bias that evens loads out without a loss (DeepSeek-V3: 0.001); 0: off
    router_z: float = 0.001  # weight of the routers' mean squared log-sum-exp
    z: float = 0.0  # weight of the head's squared log-sum-exp
    neftune_alpha: float = 0.0  # sft only; the NEFTune paper uses 5, 10 or 15


@dataclass(frozen=True)
class DpoSection:
    """Of objective = "dpo" (trainer/objectives/dpo.py)."""

    loss: Literal["sigmoid", "ipo", "simpo"] = "sigmoid"  # simpo: by mean log-probabilities, without a reference
    beta: float = 0.1  # how far the policy is held to the reference; SimPO's paper uses 2 to 10
    label_smoothing: float = 0.0  # sigmoid: share of the pairs taken to be the wrong way round
    gamma: float = 0.5  # simpo: the margin asked for


@dataclass(frozen=True)
class EvaluateSection:
    """[[evaluate]]: questions to answer during training, as `tokenmill eval` does (trainer/evaluate); the metrics are
    reported with the validation losses, as `name/accuracy`.
    """

    questions: str  # a file of them
    name: str | None = None  # None: the file's, without what follows the first dot
    every: int | None = None  # steps; None: at the end only
    strategy: Literal["zero-shot", "few-shot", "knn", "chain-of-thought", "self-consistency", "medprompt"] = "zero-shot"
    by: Literal["text", "letter", "generate"] | None = None  # None: text, or generate where only that works
    template: str = "auto"
    shots: str | None = None  # a file of other questions, for worked examples
    k: int | None = None  # examples in a prompt; None: 5
    limit: int | None = None  # only the first questions
    max_new_tokens: int | None = None  # of a generated answer

    @property
    def title(self) -> str:
        return self.name or Path(self.questions).name.split(".")[0]


@dataclass(frozen=True)
class KernelsSection:
    attention: Literal["auto", "flash", "sdpa", "reference"] = "auto"
    moe: Literal["auto", "triton", "megablocks", "grouped_mm", "reference"] = "auto"


@dataclass(frozen=True)
class LogSection:
    """Beside the console and metrics.jsonl, from the same record."""

    tensorboard: bool = False  # needs the package tensorboard
    wandb: str | None = None  # a Weights & Biases project; needs the package wandb


@dataclass(frozen=True)
class Recipe:
    objective: Literal["pretrain", "sft", "dpo"]
    output: str  # folder for checkpoints, metrics.jsonl and the resolved recipe
    model: ModelSection
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection
    seed: int = 0
    device: str = "auto"  # cuda where there is one, else cpu
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    loss: LossSection = field(default_factory=LossSection)
    dpo: DpoSection = field(default_factory=DpoSection)
    adapter: AdapterConfig | None = None  # None: every weight is trained
    evaluate: tuple[EvaluateSection, ...] = ()
    kernels: KernelsSection = field(default_factory=KernelsSection)
    log: LogSection = field(default_factory=LogSection)

    @property
    def overlong(self) -> Overlong:
        """What becomes of the sources' documents that are longer than the sequence."""
        usual: dict[str, Overlong] = {"pretrain": "split", "sft": "reject", "dpo": "error"}
        return self.data.overlong or usual[self.objective]

    def __post_init__(self) -> None:
        def expect(condition: bool, key: str, expected: str, got: Any) -> None:
            if not condition:
                raise ConfigError(f"{key}: expected {expected}, got {got!r}")

        given = [k for k in ("steps", "tokens", "epochs") if getattr(self.train, k) is not None]
        expect(len(given) == 1, "train", "exactly one of steps, tokens and epochs", given)
        expect(
            getattr(self.train, given[0]) > 0, f"train.{given[0]}", "a positive number", getattr(self.train, given[0])
        )
        sources = [k for k in ("model.path", "model.new") if getattr(self.model, k.removeprefix("model.")) is not None]
        expect(len(sources) == 1, "model", "either model.path or model.new, not both", " and ".join(sources) or None)
        expect(self.adapter is None or not self.model.new, "adapter", "model.path, weights to adapt", "model.new")
        expect(len(self.data.sources) > 0, "data.sources", "at least one source", self.data.sources)
        for i, source in enumerate(self.data.sources):
            key = f"data.sources.{i}"
            if isinstance(source.weight, tuple):
                steps, weights = [step for step, _ in source.weight], [weight for _, weight in source.weight]
                increasing = steps[:1] == [0] and steps == sorted({*steps})
                expect(increasing, f"{key}.weight", "steps from 0 on, each later than the one before", steps)
                expect(min(weights) >= 0 < max(weights), f"{key}.weight", "weights of 0 or more, not all 0", weights)
            else:
                expect(source.weight > 0, f"{key}.weight", "a positive number", source.weight)
            expect(source.epochs is None or source.epochs > 0, f"{key}.epochs", "a positive number", source.epochs)
        for key in ("sequence_length", "packs_per_step", "packs_per_micro_batch"):
            expect(getattr(self.data, key) > 0, f"data.{key}", "a positive integer", getattr(self.data, key))
        length = self.data.sequence_length
        expect(2 <= length <= 2**28, "data.sequence_length", "at least 2 tokens, at most 2**28", length)
        tokens = self.data.validation_tokens
        expect(tokens is None or tokens > 0, "data.validation_tokens", "a positive integer", tokens)
        for key in ("validate_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self.train, key)
            expect(value is None or value > 0, f"train.{key}", "a positive integer", value)
        steps = self.train.checkpoint_at
        expect(min(steps, default=1) > 0, "train.checkpoint_at", "steps from 1 on", steps)
        for key in ("learning_rate", "eps", "clip_norm"):
            expect(getattr(self.optimizer, key) > 0, f"optimizer.{key}", "> 0", getattr(self.optimizer, key))
        expect(self.optimizer.weight_decay >= 0, "optimizer.weight_decay", "0 or more", self.optimizer.weight_decay)
        betas = self.optimizer.betas
        expect(all(0 <= beta < 1 for beta in betas), "optimizer.betas", "two numbers from 0 to below 1", betas)
        for key in ("warmup", "decay", "final"):
            value = getattr(self.schedule, key)
            expect(0 <= value <= 1, f"schedule.{key}", "a share between 0 and 1", value)
        if self.schedule.kind == "wsd":
            expect(self.schedule.warmup + self.schedule.decay <= 1, "schedule", "warmup + decay <= 1", self.schedule)
        expect(0 <= self.seed < 2**63, "seed", "0 to 2**63 - 1", self.seed)
        names = [Path(folder).name for folder in self.data.validation]
        expect(len({*names}) == len(names), "data.validation", "folders with different names, for the report", names)
        names += [section.title for section in self.evaluate]
        expect(len({*names}) == len(names), "evaluate", "names that no other and no validation stream has", names)
        for i, section in enumerate(self.evaluate):
            for key in ("every", "k", "limit", "max_new_tokens"):
                value = getattr(section, key)
                expect(value is None or value > 0, f"evaluate.{i}.{key}", "a positive integer", value)
        for key in ("balance", "balance_bias", "router_z", "z", "neftune_alpha"):
            expect(getattr(self.loss, key) >= 0, f"loss.{key}", "0 or more", getattr(self.loss, key))
        if self.loss.neftune_alpha and self.objective != "sft":
            raise ConfigError("loss.neftune_alpha: NEFTune belongs to fine-tuning; set objective = 'sft' or alpha to 0")
        if self.optimizer.kind == "rmsprop":
            precision, decay = self.train.precision, self.optimizer.weight_decay
            expect(precision != "bf16", "train.precision", "fp32 or bf16-mixed with rmsprop", precision)
            expect(decay == 0, "optimizer.weight_decay", "0 with rmsprop, which has no decoupled decay", decay)
        expect(self.dpo.beta > 0, "dpo.beta", "a positive number", self.dpo.beta)
        expect(self.dpo.gamma >= 0, "dpo.gamma", "0 or more", self.dpo.gamma)
        if self.dpo.loss != "simpo":
            changed = _changed(self.dpo).get("gamma")
            expect(changed is None, "dpo.gamma", "no such key unless dpo.loss is simpo", changed)
        smoothing = self.dpo.label_smoothing
        expect(0 <= smoothing < 0.5, "dpo.label_smoothing", "0 to below 0.5", smoothing)
        if self.dpo.loss != "sigmoid":
            expect(not smoothing, "dpo.label_smoothing", "0 unless dpo.loss is sigmoid", smoothing)
        if self.objective == "dpo":
            expect(not self.loss.z, "loss.z", "0 with objective = 'dpo', whose loss has no such term", self.loss.z)
        else:
            changed = _changed(self.dpo)
            expect(not changed, "dpo", "no such section unless objective = 'dpo'", changed)
        if self.adapter and self.adapter.quantise == "none":
            changed = {key: value for key, value in _changed(self.adapter).items() if key.startswith("quantise_")}
            expect(not changed, "adapter", "quantise = 'nf4' beside such keys", changed)


def _changed(section: Any) -> dict[str, Any]:
    """The values that are not their keys' defaults."""
    values = {f.name: (getattr(section, f.name), f.default) for f in dataclasses.fields(section)}
    return {name: value for name, (value, default) in values.items() if value != default}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides of the form `section.key=value` (a TOML value, or a bare string).

    Relative paths in a recipe are relative to where the command runs, as on the command line.
    Raises ConfigError naming the file and the key.
    """
    raw = read_toml(path, overrides)
    try:
        return build(Recipe, raw)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_toml(path: str | Path, overrides: Sequence[str] = (), *, kind: str = "recipe") -> dict[str, Any]:
    """A file's tables with overrides applied. Raises ConfigError naming the file where there is none, or no TOML."""
    try:
        raw = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {kind}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from None
    for override in overrides:
        _apply(raw, override)
    return raw


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.removeprefix("--").partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r}: expected --section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare string: --output=runs/one
    *parents, last = key.split(".")
    at: Any = raw
    for parent in parents:
        at = at[_index(at, parent, key)] if isinstance(at, list) else at.setdefault(parent, {})
        if not isinstance(at, (dict, list)):
            raise ConfigError(f"--{key}: {parent!r} is a value, not a section")
    if isinstance(at, list):
        at[_index(at, last, key)] = value
    else:
        at[last] = value


def _index(items: list[Any], text: str, key: str) -> int:
    if not text.isdigit() or int(text) >= len(items):
        raise ConfigError(f"--{key}: {text!r} is not an index below {len(items)}")
    return int(text)


def build(cls: type[T], raw: dict[str, Any], where: str = "") -> T:
    """A dataclass from plain values, recursively: unknown keys, missing keys and wrong types are errors that name
    the key. Integers pass for floats; nothing else is converted.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{where.rstrip('.')}: expected a section, got {raw!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1, 0.4)
            hint = f"did you mean {where}{near[0]}?" if near else f"expected one of {', '.join(fields)}"
            raise ConfigError(f"unknown key {where}{key}; {hint}")
    values = {}
    for name, f in fields.items():
        if name in raw:
            values[name] = _value(hints[name], raw[name], where + name)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"key {where}{name} is missing ({_describe(hints[name])})")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where.rstrip('.')}: {error}") from None


def _value(hint: Any, raw: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), raw, where + ".")
    if origin in (types.UnionType, typing.Union):
        if raw is None:
            return None
        kinds = [a for a in args if a is not type(None)]
        listed = [a for a in kinds if (typing.get_origin(a) is tuple) == isinstance(raw, list)]
        exact = [a for a in listed if a is type(raw)]
        if exact or len(listed) < 2:
            return _value((exact or listed or kinds)[0], raw, where)
    if origin is Literal and raw in args:
        return raw
    if origin is tuple and isinstance(raw, list):
        kinds = [args[0]] * len(raw) if args[-1] is Ellipsis else args
        if len(kinds) == len(raw):
            return tuple(
                _value(kind, item, f"{where}.{i}") for i, (kind, item) in enumerate(zip(kinds, raw, strict=True))
            )
    if hint is float and isinstance(raw, (int, float)) and not isinstance(raw, bool):
        return float(raw)
    if isinstance(hint, type) and type(raw) is hint:
        return raw
    raise ConfigError(f"{where}: expected {_describe(hint)}, got {raw!r}")


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(a) for a in args if a is not type(None))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        return f"a list of {' and '.join(_describe(a) for a in args if a is not Ellipsis)}"
    if dataclasses.is_dataclass(hint):
        return f"a section with {', '.join(f.name for f in dataclasses.fields(hint))}"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false", dict: "a section"}
    return names.get(hint, str(hint))
