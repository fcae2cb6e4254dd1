"""Every way of training on the same tokens and from the same weights, in turn: ours, and TRL's where it is installed.

    cpt      all tokens of a document are learned
    sft      its answers alone; and again with NEFTune's noise
    dpo      the same rows as preference pairs, both answers behind one copy of their prompt
    lora     sft of adapters on every projection
    qlora    the same over weights frozen in 4 bits

A document is prompt[:-1], chosen and rejected of a pair: as many rows as our dpo computes. Tokens a second are of these
rows on every side, whatever it makes of them: TRL reads a prompt once for each answer. What the reference says of the
answers is computed beforehand on both sides. In a first round losses are compared at every step, and memory is watched:
on a GPU its allocator's peak, on a CPU that of PyTorch's record of tensors as they come and go, over the weights. Then
come the rounds that are timed, every other one in reverse.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any, Literal

import torch
from torch import nn

from tokenmill.bench import step
from tokenmill.bench.step import NO_ROUTING, OURS, Precision, Steps
from tokenmill.data.batch import IGNORE, Batch
from tokenmill.data.unfold import unfold
from tokenmill.trainer.config import (
    DataSection,
    DpoSection,
    LossSection,
    ModelSection,
    OptimizerSection,
    Recipe,
    StreamSection,
    TrainSection,
)
from tokenmill.trainer.distributed import join, pick_device
from tokenmill.trainer.loop import build_model
from tokenmill.trainer.model import Transformer, lora
from tokenmill.trainer.model.config import AdapterConfig
from tokenmill.trainer.model.peft import save_peft
from tokenmill.trainer.model.recompute import Recompute
from tokenmill.trainer.model.weights import load_hf, save_hf
from tokenmill.trainer.objectives import Dpo, Objective, Sft, pretrain
from tokenmill.trainer.objectives.dpo import answer_logprobs

Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected
Row = dict[str, Any]
Watch = Callable[[Callable[[], Steps], nn.Module], tuple[Steps, int]]  # runs something, and says its memory

ADAPTER = AdapterConfig()


@dataclass(frozen=True)
class Way:
    """A way of training."""

    name: str
    objective: Literal["pretrain", "sft", "dpo"]
    loss: LossSection = NO_ROUTING
    adapter: AdapterConfig | None = None


WAYS = {
    "cpt": [Way("cpt", "pretrain")],
    "sft": [Way("sft", "sft"), Way("sft, NEFTune", "sft", replace(NO_ROUTING, neftune_alpha=5.0))],
    "dpo": [Way("dpo", "dpo")],
    "lora": [Way("lora", "sft", adapter=ADAPTER)],
    "qlora": [Way("qlora", "sft", adapter=replace(ADAPTER, quantise="nf4"))],
}
TARGETS = {"sft, NEFTune": ("cpt", 0.95), "dpo": ("sft", 0.85)}  # at least so many of the other's tokens a second
STRETCH = {"dpo": (0.90, 1.1)}  # likewise, at no more than so many times the other's memory


@dataclass(frozen=True)
class Plan:
    """What is the same on all sides."""

    folder: Path  # with the weights as Hugging Face has them, and adapters as PEFT has them
    pairs: Sequence[Sequence[Pair]]  # of each step, as many in one as in another
    optimizer: OptimizerSection
    recompute: Recompute
    device: str
    precision: Precision


def compare(
    model: Transformer,
    pairs: Sequence[Sequence[Pair]],
    ways: Sequence[Way],
    optimizer: OptimizerSection,
    rounds: int = 3,
    recompute: Recompute = "none",
    device: str = "cpu",
    precision: Precision = "fp32",
    warmup: int = 2,
) -> list[Row]:
    """Train the model every way, a step on each step's pairs, and `rounds` times more in turn; the first `warmup` steps
    of each round do not count. With `recompute` full TRL checkpoints its activations too; selective is ours alone.

    A row for each way and side: `what`, `side`, `tokens/s`, `spread` (between the quartiles, over the median), `MiB`;
    of ours, how `x cpt`, `x sft` and `MiB x sft` it compares; of the others `times`, how many times as fast ours is,
    and how far losses lie `apart`, None where they are not the same numbers; or a `note` on why it was not measured.
    (Of lora on experts only the first is the same: PEFT has one pair of factors for their gate and up, ours two.)
    """
    sides: dict[tuple[str, str], Callable[[Watch], tuple[Steps, int]]] = {}
    notes: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        plan = Plan(Path(name), pairs, optimizer, recompute, device, precision)
        save_hf(model, plan.folder / "hf")
        _save_adapters(plan.folder)
        for way in ways:
            sides[way.name, OURS] = partial(_ours, plan, way)
            if reason := _missing(way):
                notes.append({"what": way.name, "side": "TRL", "note": f"not measured: {reason}"})
                continue
            sides[way.name, "TRL, padded"] = partial(_theirs, plan, way, False)
            if way.objective != "dpo":  # for which it has no other way
                sides[way.name, "TRL, packed"] = partial(_theirs, plan, way, True)
        first = {side: run(_peak_on_cpu if device == "cpu" else _peak_on_gpu) for side, run in sides.items()}
        seconds: dict[tuple[str, str], list[list[float]]] = {side: [] for side in sides}
        for turn in range(rounds):
            for side, run in [*sides.items()][:: -1 if turn % 2 else 1]:
                steps, _ = run(_unwatched)
                seconds[side].append([time for time, _ in steps])
    tokens = [sum(len(p) - 1 + len(c) + len(r) for p, c, r in of_step) for of_step in pairs]
    rows: list[Row] = []
    for (what, side), (steps, peak) in first.items():
        times = [times[i] / tokens[i] for times in seconds[what, side] for i in range(warmup, len(tokens))]
        low, middle, high = quantiles(times, n=4)
        row: Row = {"what": what, "side": side, "tokens/s": 1 / middle, "spread": (high - low) / middle}
        rows.append(row | {"MiB": peak / 2**20, "losses": [loss for _, loss in steps]})
    return [*_related(rows), *notes]


def _related(rows: list[Row]) -> list[Row]:
    """With how each compares with ours."""
    ours = {row["what"]: row for row in rows if row["side"] == OURS}
    for row in rows:
        mine = ours[row["what"]]
        if row is mine:
            for other in [name for name in ("cpt", "sft") if name in ours]:
                row[f"x {other}"] = row["tokens/s"] / ours[other]["tokens/s"]
                row[f"MiB x {other}"] = row["MiB"] / ours[other]["MiB"]
        else:
            row["times"] = mine["tokens/s"] / row["tokens/s"]
            apart = max(abs(a - b) for a, b in zip(row["losses"], mine["losses"], strict=True))
            row["apart"] = None if "NEFTune" in row["what"] else apart  # the noise of each is its own
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows, aligned, and whether ours reach the targets."""
    lines = [f"  {'':28}{'tokens/s':>10}{'spread':>8}{'MiB':>9}  {'x cpt':>7}{'x sft':>7}{'MiB x sft':>11}"]
    for row in sorted(rows, key=lambda row: [r["what"] for r in rows].index(row["what"])):
        name = f"  {row['what']:14}{row['side']:14}"
        if "note" in row:
            lines.append(f"{name}  {row['note']}")
            continue
        cells = f"{name}{row['tokens/s']:10,.0f}{row['spread']:8.0%}{row['MiB']:9,.1f}"
        if row["side"] == OURS:
            ratios = ((row.get(key), width) for key, width in (("x cpt", 9), ("x sft", 7), ("MiB x sft", 11)))
            cells += "".join(f"{ratio:{width}.2f}" if ratio else " " * width for ratio, width in ratios)
        else:
            same = "losses not comparable" if row["apart"] is None else f"losses within {row['apart']:.1e}"
            cells += f"  ours {row['times']:.2f} times as fast, {same}"
        lines.append(cells.rstrip())
    return "\n".join([*lines, *_judged(rows)])


def _judged(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        other, least = TARGETS.get(row["what"], ("", 0.0))
        rate = row.get(f"x {other}")
        if row["side"] != OURS or rate is None:
            continue
        line = f"  {row['what']} {rate:.2f} of {other}, target {least:.2f}: {'met' if rate >= least else 'MISSED'}"
        if row["what"] in STRETCH:
            (more, memory), used = STRETCH[row["what"]], row[f"MiB x {other}"]
            reached = "met" if rate >= more and used <= memory else "not reached"
            line += f"; stretch {more:.2f} at {memory:.1f} of its memory, here {used:.2f}: {reached}"
        lines.append(line)
    return lines


def draw_pairs(
    steps: int, pairs: int, vocabulary: int, prompt: tuple[int, int], answer: tuple[int, int], seed: int = 0
) -> list[list[Pair]]:
    """`pairs` a step of random tokens, prompts and answers as long as their ranges allow."""
    draw = random.Random(seed)

    def tokens(lengths: tuple[int, int]) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(draw.randint(*lengths))]

    return [[(tokens(prompt), tokens(answer), tokens(answer)) for _ in range(pairs)] for _ in range(steps)]


def main(names: Sequence[str], recompute: Recompute = "none", device: str = "auto") -> None:
    """`tokenmill bench step --objective`: on a tiny Mistral and Mixtral on a CPU, larger ones on a GPU. Raises
    ValueError where an objective is unknown."""
    for name in names:
        if name not in WAYS:
            raise ValueError(f"--objective: {name!r} is unknown; expected some of {','.join(WAYS)}")
    gpu = pick_device(device).type == "cuda"
    kind, precision = ("cuda", "bf16-mixed") if gpu else ("cpu", "fp32")
    optimizer, rounds = (OptimizerSection(1e-5), 2) if gpu else (OptimizerSection(1e-4), 3)
    ways = [way for name in dict.fromkeys(names) for way in WAYS[name]]
    for name, experts in (("Mistral", None), ("Mixtral", 8 if gpu else 4)):
        model = step.large(experts) if gpu else step.tiny(experts)
        vocabulary = model.config.vocab_size
        if gpu:
            pairs = draw_pairs(8, 8, vocabulary, prompt=(300, 700), answer=(150, 350))
        else:
            pairs = draw_pairs(8, 6, vocabulary, prompt=(40, 120), answer=(20, 80))
        where = torch.cuda.get_device_name() if gpu else "a CPU"
        size = f"{model.config.parameters():,} parameters, {len(pairs[0])} pairs a step"
        print(f"{'large' if gpu else 'tiny'} {name}, {size}, {precision} on {where}, recomputation {recompute}")
        print(table(compare(model, pairs, ways, optimizer, rounds, recompute, kind, precision)), flush=True)


# --------------------------------------------------------------------------------------------------------------- ours


def _ours(plan: Plan, way: Way, watch: Watch) -> tuple[Steps, int]:
    recipe = Recipe(
        way.objective,
        output="",
        model=ModelSection(path="hf"),
        data=DataSection((StreamSection("none"),), sequence_length=2, packs_per_step=1),  # it gets batches instead
        train=TrainSection(steps=1, precision=plan.precision, recompute=plan.recompute),
        optimizer=plan.optimizer,
        loss=way.loss,
        adapter=way.adapter,
    )
    with join(plan.device, sharded=plan.precision == "bf16-mixed") as world:
        model = build_model(recipe, world, plan.folder / "hf")
        batches = _preferences(plan) if way.objective == "dpo" else _documents(plan, masked=way.objective == "sft")
        objective: Objective = Sft(seed=0) if way.objective == "sft" else pretrain
        if way.objective == "dpo":
            model.eval()
            with torch.no_grad():
                tables = [answer_logprobs(model, batch.to(world.device))[0] for batch, _ in batches]
            objective = Dpo(DpoSection(), [torch.cat(tables)], world.device)
        return watch(lambda: step.take_steps(model, objective, batches, plan.optimizer, plan.device, way.loss), model)


def _documents(plan: Plan, masked: bool) -> list[tuple[Batch, float]]:
    """The batch of each step, and its weight."""
    batches = []
    for pairs in plan.pairs:
        documents = [[*p[:-1], *c, *r] for p, c, r in pairs]
        masks = [[0] * (len(p) - 1) + [1] * (len(c) + len(r)) for p, c, r in pairs]
        batch = Batch.from_documents(documents, masks if masked else None)
        batches.append((batch, float(batch.weights.sum())))
    return batches


def _preferences(plan: Plan) -> list[tuple[Batch, float]]:
    batches, first = [], 0
    for pairs in plan.pairs:
        documents = [[*p, *c, p[-1], *r] for p, c, r in pairs]
        masks = [[0] * len(p) + [1] * len(c) + [0] + [1] * len(r) for p, c, r in pairs]
        ids = range(first, first + len(pairs))
        batches.append((unfold(Batch.from_documents(documents, masks, ids)), float(len(pairs))))
        first += len(pairs)
    return batches


# -------------------------------------------------------------------------------------------------------------- TRL's


def _missing(way: Way) -> str | None:
    """Why TRL cannot do it here, or None."""
    if way.adapter and way.adapter.quantise != "none":
        return "its 4 bits are bitsandbytes' own, with other losses"
    packages = ["trl", "peft"] if way.adapter else ["trl"]
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} is not installed (pip install 'tokenmill[bench]')" if absent else None


def _save_adapters(folder: Path) -> None:
    """Those that ours makes of seed 0, for PEFT."""
    model, config = load_hf(folder / "hf", torch.float32)
    lora.attach(model, ADAPTER)
    lora.initialise(model, 0)
    factors = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    save_peft(factors, config, ADAPTER, folder / "peft", "hf")


def _theirs(plan: Plan, way: Way, packed: bool, watch: Watch) -> tuple[Steps, int]:
    import datasets  # pyright: ignore[reportMissingImports]
    import trl  # pyright: ignore[reportMissingImports]

    given = step.arguments(
        plan.folder, len(plan.pairs), plan.optimizer, plan.recompute == "full", plan.device, plan.precision
    )
    given |= dict(per_device_train_batch_size=len(plan.pairs[0]), max_length=None)
    given |= dict(router_aux_loss_coef=0.0)  # it adds that loss unless told otherwise
    every = [pair for pairs in plan.pairs for pair in pairs]
    if way.objective == "dpo":
        kind, config = trl.DPOTrainer, trl.DPOConfig
        given |= dict(beta=DpoSection().beta, precompute_ref_log_probs=True)
        rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in every]
    else:
        kind, config = trl.SFTTrainer, trl.SFTConfig
        given |= dict(padding_free=packed, neftune_noise_alpha=way.loss.neftune_alpha or None)
        rows = []
        for p, c, r in every:
            ids = [*p[:-1], *c, *r]
            silent = 1 if way.objective == "pretrain" else max(1, len(p) - 1)
            rows.append({"input_ids": ids, "labels": [IGNORE] * silent + ids[silent:]})

    base: Any = kind

    class InOrder(base):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # it holds ids already

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with step.quiet():
        datasets.disable_progress_bars()
        os.environ.setdefault("TQDM_DISABLE", "1")  # TRL's own
        halved = way.adapter is not None and plan.precision == "bf16-mixed"  # what is frozen, as ours
        model = step.twin(plan.folder, plan.device, torch.bfloat16 if halved else torch.float32)
        if way.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, plan.folder / "peft", is_trainable=True)
        trainer, train = step.recording(
            InOrder,
            plan.device,
            model=model,
            args=config(**given),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=_tokenizer(),
        )
        return watch(train, trainer.model)


def _tokenizer() -> Any:
    """All that TRL asks of one: a token to pad with."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


# ------------------------------------------------------------------------------------------------------------- memory


def _unwatched(run: Callable[[], Steps], model: nn.Module) -> tuple[Steps, int]:
    return run(), 0


def _peak_on_gpu(run: Callable[[], Steps], model: nn.Module) -> tuple[Steps, int]:
    """With the most bytes that tensors took there."""
    gc.collect()  # a trainer of transformers' keeps itself, and its model, in a circle
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return run(), torch.cuda.max_memory_allocated()


def _peak_on_cpu(run: Callable[[], Steps], model: nn.Module) -> tuple[Steps, int]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells of each beginning and end
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        steps = run()
    at = peak = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    recorded: Any = profiler.profiler
    for event in recorded.kineto_results.events():
        if event.name() == "[memory]":
            at += event.nbytes()
            peak = max(peak, at)
    return steps, peak
