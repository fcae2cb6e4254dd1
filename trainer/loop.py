"""The trainer: what happens in a step, top to bottom."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import deterministic

from tokenmill.data.batch import Batch
from tokenmill.data.files import replace_file
from tokenmill.data.loader import sequential_batches
from tokenmill.data.prefetch import Prefetch
from tokenmill.trainer.adapters import Base
from tokenmill.trainer.balance import updated_bias
from tokenmill.trainer.checkpoint import (
    fill_model,
    latest_checkpoint,
    load_adapters,
    load_moments,
    load_training,
    newer_checkpoints,
    read_config,
    resolve_model,
    save_step,
)
from tokenmill.trainer.config import Recipe
from tokenmill.trainer.distributed import World, alone, deal, join, shard
from tokenmill.trainer.evaluation import evaluate, make_evaluations
from tokenmill.trainer.lineage import lineage, now, parent, read_lineage
from tokenmill.trainer.metrics import MetricsLog, Preference, StepRecord, exact_flops, peak_flops, peak_memory
from tokenmill.trainer.model import ModelConfig, Transformer, lora
from tokenmill.trainer.model.peft import load_peft
from tokenmill.trainer.objectives import Dpo, Objective, Sft, pretrain
from tokenmill.trainer.objectives.pretrain import StepContext, StepLoss
from tokenmill.trainer.optim import build_optimizer
from tokenmill.trainer.preference import build_dpo, check_pairs, left_out, mean_preferences, reference_of, unfold_step
from tokenmill.trainer.schedule import learning_rate
from tokenmill.trainer.shards import MANIFEST
from tokenmill.trainer.state import TrainState
from tokenmill.trainer.streams import check_streams, go_on, make_loader, open_streams, planned_steps
from tokenmill.trainer.vocabulary import check_rows

STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # a scheduler's way to say: write a checkpoint and leave


def train(recipe: Recipe, console: Literal["lines", "bar"] = "lines", *, last: bool = True) -> Path:
    """Run a recipe on the processes that `torchrun` started, this one alone without it; from where an earlier run of
    it stopped, if its output folder holds a checkpoint. Returns the last checkpoint.

    Raises ValueError where recipe, model and streams do not fit each other, or another run is writing into the output
    folder; and SystemExit with status 75 (sysexits.h: try again) where SIGTERM or SIGUSR1 made it stop before the last
    step, so that no scheduler takes it for done; where it is not the `last` of a pipeline's runs, also in its last
    step.
    """
    sharded = recipe.train.precision == "bf16-mixed"
    with (
        _deterministic(recipe.train.deterministic),
        join(recipe.device, sharded=sharded) as world,
        alone(Path(recipe.output), world),
    ):
        trainer = Trainer(recipe, world, console)
        saved = trainer.train()
        unfinished = trainer.state.step < trainer.steps or (not last and world.any(trainer.requested))
    if unfinished:
        raise SystemExit(os.EX_TEMPFAIL)
    return saved


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Ask PyTorch and FlashAttention for operations that give the same bits every time, where they have a choice."""
    memory: Any = deterministic  # a module with a property, which a type checker does not see
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS then needs before its first product
        memory.fill_uninitialized_memory = False  # nothing here reads what it has not written
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


class Trainer:
    """One run of one recipe, on one rank."""

    def __init__(self, recipe: Recipe, world: World, console: Literal["lines", "bar"] = "lines") -> None:
        self.recipe = recipe
        self.world = world
        self.output = Path(recipe.output)
        self.sources, self.validation = open_streams(recipe)
        source = None if recipe.model.path is None else resolve_model(recipe.model.path, world)
        self.base = Base.of(source, world) if recipe.adapter and source else None
        self.model = build_model(recipe, world, source, self.base)
        streams, held_out = [s.stream for s in self.sources], [*self.validation.values()]
        self.tokenizer_from = check_streams(source, self.model.config, streams, self.validation)
        check_pairs(recipe, [*streams, *held_out])
        if recipe.adapter is not None:
            check_rows(self.model, streams, world)
        self.evaluations = make_evaluations(recipe, self.model, self.tokenizer_from, world)
        self.objective: Objective = Sft(recipe.seed) if recipe.objective == "sft" else pretrain
        self.checkpoint = latest_checkpoint(self.output, world)
        self.passed_over = newer_checkpoints(self.output, self.checkpoint)
        self.held_out: list[Dpo] = []  # of each validation stream
        reference = None
        if recipe.objective == "dpo":  # before a checkpoint's weights are read: it is what training began from
            reference = reference_of(recipe, self.model, world, self.checkpoint)
            self.objective, self.held_out = build_dpo(recipe, self.model, reference, world, streams, held_out)
        self.optimizer = build_optimizer(self.model, recipe.optimizer, recipe.train.precision, recipe.seed)

        self.state, moments = TrainState(), None
        if self.checkpoint is not None:
            self.state = load_training(self.checkpoint, self.model, self.optimizer, self.base)
        elif recipe.optimizer.moments is not None:
            same = source if recipe.optimizer.moments == recipe.model.path else None  # which was verified already
            moments = same or resolve_model(recipe.optimizer.moments, world)
            load_moments(moments, self.model, self.optimizer)
        self.state.reference = reference
        self.lineage = self._lineage(source, moments)
        if self.state.expert_fractions is not None:
            self.state.expert_fractions = self.state.expert_fractions.to(world.device)
        self.state.balance_bias = self.model.balance_bias  # that of the checkpoint, or of the run it begins from
        if self.state.balance_bias is None and recipe.loss.balance_bias and self.model.config.moe:
            shape = self.model.config.n_layers, self.model.config.moe.n_experts
            self.state.balance_bias = torch.zeros(shape, device=world.device)
        self.loader = make_loader(recipe, self.sources, world)
        if self.state.data is not None and self.checkpoint is not None:
            go_on(self.loader, self.state.data, self.checkpoint, recipe)
        steps = map(unfold_step, self.loader) if recipe.objective == "dpo" else self.loader
        self.prefetch = Prefetch(steps, world.device)
        self.steps = planned_steps(recipe, self.loader)
        self.peak = peak_flops(world.device)
        self.requested = False  # this rank was asked to stop: may differ between ranks, so nothing is decided by it
        self.stopping = False  # a rank was, as all of them found in the same step
        self.output.mkdir(parents=True, exist_ok=True)
        if world.rank == 0:
            replace_file(self.output / "recipe.json", json.dumps(dataclasses.asdict(recipe), indent=2) + "\n")
        self.log = MetricsLog(
            self.output, self.state.step, self.steps, console if world.rank == 0 else "none", recipe.log
        )
        self.log.say(self._banner())

    def train(self) -> Path:
        """Run to the last step, or to the end of the one in which, or before which, a scheduler asks to stop; returns
        the last checkpoint.
        """
        every = self.recipe.train
        handlers = {s: signal.signal(s, self._stop) for s in STOPPING}
        try:
            if self.state.step and not self.world.first(int(self.log.validated)):  # stopped between the two
                self.measure()
            while self.state.step < self.steps and not self.stopping:
                self.log.step(self.step())
                done = self.state.step == self.steps
                due = every.checkpoint_every and self.state.step % every.checkpoint_every == 0
                if done or self.stopping or due or self.state.step in every.checkpoint_at:
                    self.save()
                if not self.stopping:  # a scheduler waits no longer than it must
                    self.measure()
            if self.stopping:
                self.log.say(f"stopped at step {self.state.step} of {self.steps} on request, checkpoint written")
            assert self.checkpoint is not None
            self.log.say(f"trained: {self.checkpoint}")
        finally:
            self.prefetch.close()
            self.log.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.checkpoint

    def step(self) -> StepRecord:
        """One optimizer step: its micro-batches forward and backward, clipping, the update, and what to report."""
        begin = time.perf_counter()
        data, batches = next(self.prefetch)
        data_wait = time.perf_counter() - begin
        for notice in data.notices:
            self.log.say(f"step {self.state.step + 1}: {notice}")
        context = StepContext(
            self.state.step, data.total_weight, data.total_tokens, self.state.expert_fractions, self.recipe.loss
        )
        self.model.train()
        parts = []
        for batch in batches:
            part = self.objective(self.model, batch, context)
            part.total.backward()
            parts.append(part)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip_norm)
        grad_norm = getattr(norm, "full_tensor", lambda: norm)()  # a sharded model's norm is a sum over ranks
        lr = learning_rate(self.state.step, self.steps, self.recipe.optimizer.learning_rate, self.recipe.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        layers = self.model.config.n_layers
        flops = exact_flops(self.model.config, data.micro_batches, frozen=self.model.adapter is not None)
        sums = self._sum_over_ranks(parts, [flops, data_wait, float(self.requested)])
        totals = sums.tolist()  # waits for the step's kernels, this once: the next step is launched while this one ends
        loss, balance, *preference, flops, data_wait, stopping = totals[:8]
        grad_norm = float(grad_norm)
        self.stopping = stopping > 0
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            self.optimizer.step()
        else:
            ids = torch.cat([batch.layout.document_ids for batch in data.micro_batches]).tolist()
            self.log.warn(f"step {self.state.step + 1}: loss {loss}, gradient norm {grad_norm}: left out; {ids=}")
        self.optimizer.zero_grad(set_to_none=True)
        load, entropy = None, totals[8 : 8 + layers] if self.model.config.moe else None
        if self.model.config.moe and finite:
            counts = sums[8 + layers :].view(layers, -1)
            self.state.expert_fractions = (counts / counts.sum(1, keepdim=True)).float()
            choices = self.model.config.moe.top_k * data.total_tokens
            load = torch.tensor(totals[8 + layers :]).view(layers, -1).div(choices).tolist()
            if self.state.balance_bias is not None:
                self.state.balance_bias = updated_bias(self.state.balance_bias, counts, self.recipe.loss.balance_bias)
                self.model.set_balance_bias(self.state.balance_bias)
        self.state.step += 1
        self.state.tokens += data.total_tokens
        self.state.skipped += not finite
        self.state.data = data.state

        seconds = time.perf_counter() - begin
        rate = flops / seconds / self.world.size
        six_n = 6 * self.model.config.parameters(active=True) * data.total_tokens / seconds / self.world.size
        return StepRecord(
            step=self.state.step,
            tokens=self.state.tokens,
            loss=loss,
            balance=balance,
            grad_norm=grad_norm,
            lr=lr,
            tokens_per_second=data.total_tokens / seconds,
            tflops=rate / 1e12,
            mfu=self.peak and six_n / self.peak,
            mfu_exact=self.peak and rate / self.peak,
            data_wait=data_wait / self.world.size,
            memory=peak_memory(self.world.device),
            skipped=self.state.skipped,
            expert_load=load,
            fullest_expert=None if load is None else max(map(max, load)),
            router_entropy=entropy,
            preference=Preference(*preference) if self.recipe.objective == "dpo" else None,
        )

    def measure(self) -> None:
        """Validate and evaluate what is due at this step; at the last one, everything."""
        step, every = self.state.step, self.recipe.train.validate_every
        done = step == self.steps
        scores = evaluate(self.evaluations, step, done, self.log.say)
        if done or (every and step % every == 0):
            self.validate(scores)
        elif scores:
            self.log.validation(step, self.state.tokens, scores)

    def validate(self, scores: dict[str, float] | None = None) -> dict[str, float]:
        """Mean loss a target on each validation stream, by its name and, where it has several, its sources'; on one of
        preferences, mean loss a pair, and accuracy. `scores` are reported with them.
        """
        losses = {}
        for i, (name, stream) in enumerate(self.validation.items()):
            data = self.recipe.data
            batches = sequential_batches(
                stream,
                sequence_length=data.sequence_length,
                tokens_per_batch=data.sequence_length * data.packs_per_micro_batch,
                max_tokens=data.validation_tokens,
                overlong="reject" if self.held_out else "split",  # a pair is never cut
            )
            if self.held_out:
                means = mean_preferences(self.model, self.held_out[i], batches, self.world)
                losses |= dict(zip([name, f"{name}/accuracy"], means, strict=True))
                continue
            means = mean_losses(self.model, batches, self.world, len(stream.sources))
            names = [name] if len(means) == 1 else [f"{name}/{source}" for source in stream.sources]
            losses |= dict(zip(names, means, strict=True))
        losses |= scores or {}
        if losses:
            self.log.validation(self.state.step, self.state.tokens, losses)
        return losses

    def save(self) -> None:
        self.checkpoint = save_step(
            self.output,
            self.recipe.train.keep_checkpoints,
            self.model,
            self.world,
            always=self.recipe.train.checkpoint_at,
            passed_over=self.passed_over,
            optimizer=self.optimizer,
            state=self.state,
            recipe=self.recipe,
            tokenizer_from=self.tokenizer_from,
            base=self.base,
            lineage=self.lineage | {"date": now()},
        )
        self.passed_over = []  # they are gone; the next of their names is a good one

    def _sum_over_ranks(self, parts: list[StepLoss], scalars: list[float]) -> Tensor:
        """fp64, in one reduction: loss, balance, preferences (3), the scalars, and with experts entropies (layers) and
        counts (layers * E).
        """
        device = self.world.device
        losses = torch.stack([torch.stack([part.language, part.balance]).double() for part in parts]).sum(0)
        preferences = [part.preference for part in parts if part.preference is not None]
        flat = [losses, torch.stack(preferences).sum(0) if preferences else losses.new_zeros(3)]
        flat.append(torch.tensor(scalars, dtype=torch.float64, device=device))
        for routed in ([part.router_entropy for part in parts], [part.expert_counts for part in parts]):
            tensors = [tensor.double() for tensor in routed if tensor is not None]
            flat += [torch.stack(tensors).sum(0).flatten()] if tensors else []
        return self.world.sum(torch.cat(flat))

    def _stop(self, number: int, frame: Any) -> None:
        self.requested = True

    def _lineage(self, source: Path | None, moments: Path | None) -> dict[str, Any]:
        """That of the checkpoints to come. What a resumed run began from is as its checkpoint says: it may have been
        trained further since.
        """
        if self.checkpoint is not None:
            parents = read_lineage(self.checkpoint).get("parents", [])
        else:
            parents = [] if source is None else [parent(self.base or Base.of(source, self.world))]
            if self.recipe.adapter and self.recipe.adapter.path:
                parents.append(parent(Base.of(Path(self.recipe.adapter.path), self.world), "adapters"))
            if moments and (source is None or not moments.samefile(source)):
                parents.append(parent(Base.of(moments, self.world), "moments"))
        return lineage(parents, [s.stream for s in self.sources]) if self.world.rank == 0 else {}

    def _adapters(self) -> list[str]:
        """A line about them, if there are any."""
        if (adapter := self.recipe.adapter) is None:
            return []
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        frozen = "frozen" if adapter.quantise == "none" else f"frozen in {adapter.quantise.upper()}"
        return [
            f"  {adapter.kind} of rank {adapter.rank} on {', '.join(adapter.targets)}: {trained:,} parameters trained, "
            f"{self.recipe.model.path} {frozen}"
        ]

    def _banner(self) -> str:
        config = self.model.config
        active = f" ({config.parameters(active=True):,} active)" if config.moe else ""
        backends = ", ".join(f"{kind} {name}" for kind, name in self.model.backends.items())
        lines = [
            f"{self.recipe.objective} on {self.world}, {self.recipe.train.precision}, torch {torch.__version__}: "
            f"{config.parameters():,} parameters{active}, {backends}",
            *self._adapters(),
            *(f"  {line}" for line in self.loader.summary(self.steps)),
            *(f"  {line}" for line in left_out(self.recipe, self.validation.values())),
            f"  {self.steps:,} steps of {self.recipe.data.packs_per_step} packs of "
            f"{self.recipe.data.sequence_length:,} tokens; output {self.output}",
        ]
        if self.checkpoint is not None:
            lines.append(f"  resuming from {self.checkpoint}")
            if self.state.step >= self.steps:
                lines.append(f"  nothing to do: step {self.state.step} of {self.steps} is done")
        return "\n".join(lines)


@torch.no_grad()
def mean_losses(model: Transformer, batches: Iterable[Batch], world: World, sources: int) -> list[float]:
    """Mean negative log-likelihood of a target of each source over `batches`, nats; NaN of one that is not in them.

    Each rank takes every world-th batch.
    """
    model.eval()
    sums = torch.zeros(2, sources, dtype=torch.float64, device=world.device)  # of losses, of weights
    for batch in deal(batches, world):
        batch = batch.to(world.device)
        hidden = model(batch.tokens, batch.layout).hidden
        output = model.head.loss(hidden, batch.targets, token_weights=batch.weights, rows=batch.target_rows)
        source = batch.source_ids.long()[batch.layout.segment_ids]
        sums.index_add_(1, source, torch.stack([output.nll * batch.weights, batch.weights]).double())
    totals, weights = world.sum(sums).tolist()
    return [total / weight if weight else math.nan for total, weight in zip(totals, weights, strict=True)]


def build_model(recipe: Recipe, world: World, source: Path | None, base: Base | None = None) -> Transformer:
    """The recipe's model on this rank's device, sharded over the ranks, with the weights in `source`, a checkpoint or
    a Hugging Face folder; None: with weights made from the seed. `base`: what `source` is, where that is known.

    Under a mesh no rank ever holds the whole: shards are made first and filled from the files.
    """
    config = recipe.model.new if source is None else read_config(source)
    assert config is not None
    model = empty_model(recipe, config, world.device)
    model.set_recompute(recipe.train.recompute)
    shard(model, world, recipe.train.precision)
    model.to_empty(device=world.device)
    if source is None:
        model.initialise(recipe.seed)
    else:
        fill_model(model, source)
    if recipe.adapter is not None:
        lora.initialise(model, recipe.seed)
        path = recipe.adapter.path
        if path is not None and (Path(path) / MANIFEST).is_file():
            assert source is not None
            load_adapters(Path(path), model, base or Base.of(source, world), world)
        elif path is not None:
            load_peft(model, path)
    return model


def empty_model(recipe: Recipe, config: ModelConfig, device: torch.device) -> Transformer:
    """The recipe's model of the shape `config`, with its adapters, on the meta device: it is all there but its numbers.

    Raises ValueError where `device` lacks the kernels that the recipe asks for, or the adapters do not fit.
    """
    kernels = recipe.kernels
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    computed = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
    # What is frozen is kept as it is computed with: nothing is ever added to it.
    kept = dtype if recipe.adapter is None else computed
    with torch.device("meta"):
        model = Transformer(config, attention=kernels.attention, moe=kernels.moe, device=device, dtype=kept)
        if recipe.adapter is not None:
            lora.attach(model, recipe.adapter, dtype)
    return model
