"""Training on the device at hand: losses beside the CPU's, where the time goes, and a step at the real models' width.

The small models learn English that comes with Python, so that nothing has to be fetched. Run by `tokenmill.bench.gpu`:
each public function takes a Place and returns rows.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pydoc_data.topics
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tokenmill.bench import step as step_beside
from tokenmill.bench.gpu import Place
from tokenmill.bench.ops import NOT_HERE
from tokenmill.data.batch import Batch
from tokenmill.data.prepare import prepare
from tokenmill.data.tokenizer import train_tokenizer
from tokenmill.trainer.config import LossSection, OptimizerSection, Recipe, build
from tokenmill.trainer.loop import train
from tokenmill.trainer.metrics import exact_flops, peak_flops
from tokenmill.trainer.model import ModelConfig, MoEConfig, Transformer
from tokenmill.trainer.objectives.pretrain import StepContext, pretrain
from tokenmill.trainer.optim import build_optimizer
from tokenmill.trainer.profile import profile

Row = dict[str, Any]

# How far a loss may lie from the CPU's in fp32, in nats: before the first update, and at any of the steps.
APART = {"fp32": (1e-4, 5e-3), "bf16-mixed": (1e-2, 5e-2)}


# ------------------------------------------------------------------------------------------------------------- losses


def mistral(place: Place) -> list[Row]:
    """20 steps of a small Mistral here and on the CPU."""
    return _losses(place, "mistral", {"sliding_window": 16 if place.small else 256})


def mixtral(place: Place) -> list[Row]:
    """20 steps of a small Mixtral here and on the CPU."""
    return _losses(place, "mixtral", {"moe": {"n_experts": 4 if place.small else 8}, "rope_theta": 1e6})


def _losses(place: Place, name: str, shape: dict[str, Any]) -> list[Row]:
    folder = place.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    stream = _stream(folder, 400 if place.small else 2000, 8 if place.small else None)
    recipe = _recipe(place, folder, stream, shape)
    exact = _train(recipe, folder / "cpu", "cpu", "fp32")
    rows = []
    for precision, (first, anywhere) in APART.items():
        lines = _train(recipe, folder / precision, place.device.type, precision)
        apart = [abs(a["loss"] - b["loss"]) for a, b in zip(lines, exact, strict=True)]
        row: Row = {"what": f"small {name}, {precision}", "held": apart[0] <= first and max(apart) <= anywhere}
        row |= {"loss from": lines[0]["loss"], "to": lines[-1]["loss"], "apart at first": apart[0]}
        row |= {"at most": max(apart), "allowed": f"{first:g}, {anywhere:g}"}
        rows.append(row | {"tokens/s": median(line["tokens_per_second"] for line in lines)})
    steps = recipe.train.steps or 0
    length = dataclasses.replace(recipe.train, deterministic=True, checkpoint_every=steps // 2)
    strict = dataclasses.replace(recipe, train=length)
    runs = []
    for output in (folder / "deterministic", folder / "again", folder / "again"):
        shutil.rmtree(output / "checkpoints" / f"step-{steps:08d}", ignore_errors=True)  # the third resumes from half
        runs.append(_train(strict, output, place.device.type, "bf16-mixed"))
    for run, what in zip(runs[1:], ("twice", "stopped and resumed"), strict=True):
        same = all(a[key] == b[key] for a, b in zip(run, runs[0], strict=True) for key in ("loss", "grad_norm"))
        rows.append({"what": f"small {name}, deterministic, {what}", "held": same})
    learned = rows[0]["to"] < rows[0]["loss from"]
    rows.append({"what": f"small {name} learns", "held": learned})
    here = dataclasses.replace(recipe, device=place.device.type, train=_precision(recipe, "bf16-mixed"))
    text = profile(here, folder / "profile", *((1, 1) if place.small else (5, 3)))
    (folder / "profile.txt").write_text(text + "\n")
    return [*rows, {"what": f"profile of {name}", "table": text.splitlines()}]


def _stream(folder: Path, vocab: int, documents: int | None) -> Path:
    texts = list(pydoc_data.topics.topics.values())[:documents]
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(texts, vocab, folder / "tokenizer.model")
    (folder / "topics.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([folder / "topics.jsonl"], tokenizer, folder / "topics", progress=False)
    return folder / "topics"


def _recipe(place: Place, folder: Path, stream: Path, shape: dict[str, Any]) -> Recipe:
    wide = dict(dim=256, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=704, vocab_size=2000)
    tiny = dict(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=400)
    raw: dict[str, Any] = {
        "objective": "pretrain",
        "output": str(folder / "run"),
        "model": {"new": (tiny if place.small else wide) | shape},
        "data": {
            "sources": [{"stream": str(stream)}],
            "sequence_length": 32 if place.small else 1024,
            "packs_per_step": 1 if place.small else 4,
            "packs_per_micro_batch": 1 if place.small else 2,
        },
        "train": {"steps": 4 if place.small else 20},
        "optimizer": {"learning_rate": 5e-3 if place.small else 1e-3},
    }
    return build(Recipe, raw)


def _precision(recipe: Recipe, precision: Any) -> Any:
    return dataclasses.replace(recipe.train, precision=precision)


def _train(recipe: Recipe, output: Path, device: str, precision: str) -> list[dict[str, Any]]:
    """The lines of its metrics."""
    train(dataclasses.replace(recipe, output=str(output), device=device, train=_precision(recipe, precision)))
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------------- step


def step(place: Place) -> list[Row]:
    """A step of as many layers of Mistral-7B as fit beside their optimizer, and of one layer of Mixtral-8x7B: forward,
    backward, clipping and update, without checkpointing activations.
    """
    shape: dict[str, Any] = dict(dim=4096, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=32000)
    if place.small:
        shape = dict(dim=32, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=100)
    length, layers = (16, 1) if place.small else (8192, 4)
    window = length // 2
    return [
        _step(place, "Mistral-7B", ModelConfig(**shape, n_layers=layers, sliding_window=window), length),
        _step(place, "Mixtral-8x7B", ModelConfig(**shape, n_layers=1, rope_theta=1e6, moe=MoEConfig(8)), length),
    ]


def _step(place: Place, name: str, config: ModelConfig, length: int) -> Row:
    with place.device:
        model = Transformer(config, dtype=torch.float32 if place.small else torch.bfloat16, device=place.device)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    optimizer = build_optimizer(model, OptimizerSection(learning_rate=1e-4), precision="bf16")
    cpu_batch = Batch.from_documents([torch.randint(config.vocab_size, (length,)).numpy()])
    batch = cpu_batch.to(place.device)
    context = StepContext(0, float(length - 1), length, None, LossSection())

    losses: list[Tensor] = []

    def forward() -> None:
        losses.append(pretrain(model, batch, context).total)

    def backward() -> None:
        losses[-1].backward()
        losses[-1] = losses[-1].detach()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    phases = (forward, backward, update)
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _seconds(place, phases, 3)  # compiles
    each = [_seconds(place, phases, 1 if place.small else 2) for _ in range(5)]
    seconds, rate = median(each), exact_flops(config, [cpu_batch]) / median(each)
    peak = peak_flops(place.device)
    row: Row = {"what": f"step of {config.n_layers} layers of {name}, {length} tokens", "ms": seconds * 1e3}
    row |= {"spread": (max(each) - min(each)) / seconds, "tokens/s": length / seconds, "TFLOP/s": rate / 1e12}
    row |= {"mfu_exact": rate / peak if peak else "not measured: this device's peak is not known"}
    row |= {f"{p.__name__} ms": _seconds(place, [p], 1) * 1e3 for p in phases}
    row |= {"backends": ", ".join(model.backends.values()), "losses": [float(losses[0]), float(losses[-1])]}
    memory = torch.cuda.max_memory_allocated() / 2**30 if place.device.type == "cuda" else NOT_HERE
    return row | {"peak GiB": memory, "target": ">= 0.45, 0.50 (all 32 layers)"}


def _seconds(place: Place, phases: Sequence[Callable[[], None]], times: int) -> float:
    """Of one turn, the device's work included."""
    begin = time.perf_counter()
    for _ in range(times):
        for phase in phases:
            phase()
    if place.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / times


def beside_transformers(place: Place) -> list[Row]:
    """`tokenmill bench step`, where transformers and accelerate are there: half a minute or more a model on a GPU."""
    missing = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        return [{"what": "beside HF Trainer", "ms": f"not measured: {' and '.join(missing)} is not installed"}]
    rows = []
    for name, experts in (("Mistral", None), ("Mixtral", 8)):
        model = step_beside.tiny(experts) if place.small else step_beside.large(experts)
        tokens, lengths = (128, (20, 50)) if place.small else (8192, (200, 2500))
        batches = step_beside.documents(tokens, 3 if place.small else 8, model.config.vocab_size, lengths=lengths)
        device, precision = ("cpu", "fp32") if place.small else ("cuda", "bf16-mixed")
        result = step_beside.compare(model, batches, OptimizerSection(1e-4), 1, device=device, precision=precision)
        table = step_beside.summary(batches, result).splitlines()
        parameters = model.config.parameters()
        rows.append({"what": f"beside HF Trainer, {name}, {parameters:,} parameters, {precision}", "table": table})
    return rows
