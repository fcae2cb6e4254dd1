"""The trainer: what happens in a step, top to bottom."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tokenmill.data.loader import Loader, Source, sequential_batches
from tokenmill.data.stream import TokenStream
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.checkpoint import latest_checkpoint, load_model, load_training, resolve_model, save_step
from tokenmill.trainer.config import Recipe
from tokenmill.trainer.files import replace_file
from tokenmill.trainer.metrics import MetricsLog, StepRecord, exact_flops, peak_flops, peak_memory
from tokenmill.trainer.model import Transformer
from tokenmill.trainer.objectives import Objective, Sft, pretrain
from tokenmill.trainer.objectives.pretrain import StepContext
from tokenmill.trainer.optim import build_optimizer
from tokenmill.trainer.schedule import learning_rate
from tokenmill.trainer.state import TrainState


class Trainer:
    """One run of one recipe. Made where an earlier run of it stopped, if its output folder holds a checkpoint."""

    def __init__(self, recipe: Recipe, console: Literal["lines", "bar"] = "lines") -> None:
        self.recipe = recipe
        self.output = Path(recipe.output)
        self.device = pick_device(recipe.device)
        self.sources = [Source(TokenStream.open(s.stream), s.weight) for s in recipe.data.sources]
        self.validation = {Path(folder).name: TokenStream.open(folder) for folder in recipe.data.validation}
        self.model = build_model(recipe).to(self.device)
        self.tokenizer_from = check_streams(recipe, self.model, [s.stream for s in self.sources], self.validation)
        self.objective: Objective = Sft(recipe.seed) if recipe.objective == "sft" else pretrain
        self.optimizer = build_optimizer(self.model, recipe.optimizer)

        self.output.mkdir(parents=True, exist_ok=True)
        checkpoint = latest_checkpoint(self.output)
        self.state = TrainState() if checkpoint is None else load_training(checkpoint, self.model, self.optimizer)
        if self.state.expert_fractions is not None:
            self.state.expert_fractions = self.state.expert_fractions.to(self.device)
        self.loader = Loader(
            self.sources,
            sequence_length=recipe.data.sequence_length,
            packs_per_step=recipe.data.packs_per_step,
            packs_per_micro_batch=recipe.data.packs_per_micro_batch,
            seed=recipe.seed,
        )
        if self.state.data is not None:
            self.loader.load_state_dict(self.state.data)
        self.steps = planned_steps(recipe, self.loader)
        self.peak = peak_flops(self.device)
        replace_file(self.output / "recipe.json", json.dumps(dataclasses.asdict(recipe), indent=2) + "\n")
        self.log = MetricsLog(self.output, self.state.step, self.steps, console, self.output.name)
        self.log.say(self._banner(checkpoint))

    def train(self) -> Path:
        """Run to the last step and return its checkpoint."""
        train = self.recipe.train
        saved = None
        try:
            while self.state.step < self.steps:
                self.log.step(self.step())
                done = self.state.step == self.steps
                if done or (train.validate_every and self.state.step % train.validate_every == 0):
                    self.validate()
                if done or (train.checkpoint_every and self.state.step % train.checkpoint_every == 0):
                    saved = self.save()
        finally:
            self.log.close()
        return saved or resolve_model(self.output)

    def step(self) -> StepRecord:
        """One optimizer step: its micro-batches forward and backward, clipping, the update, and what to report."""
        begin = time.perf_counter()
        data = next(self.loader)
        data_wait = time.perf_counter() - begin
        if data.total_weight <= 0:
            raise ValueError(
                f"samples {data.samples.start} to {data.samples.stop - 1} hold no target with a loss weight; was the "
                "stream prepared with answers?"
            )
        context = StepContext(
            self.state.step, data.total_weight, data.total_tokens, self.state.expert_fractions, self.recipe.loss
        )
        self.model.train()
        parts = []
        for batch in data.micro_batches:
            part = self.objective(self.model, batch.to(self.device, non_blocking=True), context)
            part.total.backward()
            parts.append(part)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip_norm)
        lr = learning_rate(self.state.step, self.steps, self.recipe.optimizer.learning_rate, self.recipe.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = float(torch.stack([part.language for part in parts]).sum())  # waits for the step's kernels
        if finite := math.isfinite(loss) and math.isfinite(float(grad_norm)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if parts[0].expert_counts is not None:
            counts = (
                torch.stack([part.expert_counts for part in parts if part.expert_counts is not None]).sum(0).float()
            )
            self.state.expert_fractions = counts / counts.sum(1, keepdim=True)
        self.state.step += 1
        self.state.tokens += data.total_tokens
        self.state.skipped += not finite
        self.state.data = self.loader.state_dict()

        seconds = time.perf_counter() - begin
        flops = exact_flops(self.model.config, data.micro_batches) / seconds
        six_n = 6 * self.model.config.parameters(active=True) * data.total_tokens / seconds
        return StepRecord(
            step=self.state.step,
            tokens=self.state.tokens,
            loss=loss,
            balance=float(torch.stack([part.balance for part in parts]).sum()),
            grad_norm=float(grad_norm),
            lr=lr,
            tokens_per_second=data.total_tokens / seconds,
            tflops=flops / 1e12,
            mfu=self.peak and six_n / self.peak,
            mfu_exact=self.peak and flops / self.peak,
            data_wait=data_wait,
            memory=peak_memory(self.device),
            skipped=self.state.skipped,
            expert_load=None if self.state.expert_fractions is None else self.state.expert_fractions.tolist(),
        )

    def validate(self) -> dict[str, float]:
        """Mean loss a target on each validation stream, by name."""
        losses = {name: mean_loss(self.model, self._validation_batches(s)) for name, s in self.validation.items()}
        if losses:
            self.log.validation(self.state.step, self.state.tokens, losses)
        return losses

    def save(self) -> Path:
        return save_step(
            self.output,
            self.recipe.train.keep_checkpoints,
            self.model,
            optimizer=self.optimizer,
            state=self.state,
            recipe=self.recipe,
            tokenizer_from=self.tokenizer_from,
        )

    def _validation_batches(self, stream: TokenStream):
        data = self.recipe.data
        return sequential_batches(
            stream,
            sequence_length=data.sequence_length,
            tokens_per_batch=data.sequence_length * data.packs_per_micro_batch,
            max_tokens=data.validation_tokens,
        )

    def _banner(self, checkpoint: Path | None) -> str:
        config, backends = self.model.config, self.model.backends
        active = f" ({config.parameters(active=True):,} active)" if config.moe else ""
        lines = [
            f"{self.recipe.objective} on {self.device}, {self.recipe.train.precision}, torch {torch.__version__}: "
            f"{config.parameters():,} parameters{active}, attention {backends['attention']}, experts {backends['moe']}",
            *(
                f"  {s.stream.folder}: {len(s.stream):,} documents, {s.stream.tokens:,} tokens, weight {s.weight:g}"
                for s in self.sources
            ),
            f"  {self.steps:,} steps of {self.recipe.data.packs_per_step} packs of "
            f"{self.recipe.data.sequence_length:,} tokens; output {self.output}",
        ]
        if checkpoint is not None:
            lines.append(f"  resuming from {checkpoint}")
        return "\n".join(lines)


@torch.no_grad()
def mean_loss(model: Transformer, batches) -> float:
    """Mean negative log-likelihood of a target over `batches`, nats."""
    model.eval()
    device = model.embed.weight.device
    total: Tensor = torch.zeros((), dtype=torch.float64, device=device)
    weight = 0.0
    for batch in batches:
        weight += float(batch.weights.sum())
        batch = batch.to(device)
        hidden = model(batch.tokens, batch.layout).hidden
        output = model.head.loss(hidden, batch.targets, token_weights=batch.weights, rows=batch.target_rows)
        total += output.loss
    return float(total) / weight if weight else math.nan


def pick_device(name: str) -> torch.device:
    """`auto`: the GPU of this process where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}") from None


def build_model(recipe: Recipe) -> Transformer:
    """The recipe's model, on the CPU, with weights loaded or made from the seed."""
    kernels = recipe.kernels
    if recipe.model.path is not None:
        return load_model(recipe.model.path, attention=kernels.attention, moe=kernels.moe)
    assert recipe.model.new is not None
    model = Transformer(recipe.model.new, attention=kernels.attention, moe=kernels.moe)
    model.initialise(recipe.seed)
    return model


def check_streams(
    recipe: Recipe, model: Transformer, sources: list[TokenStream], validation: dict[str, TokenStream]
) -> Path:
    """That streams and model speak the same tokens; the folder that holds their tokenizer.

    Raises ValueError naming the stream, where its vocabulary does not fit the model's or its tokenizer is another.
    """
    for stream in [*sources, *validation.values()]:
        if stream.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"{stream.folder}: its tokenizer has {stream.vocab_size} pieces, the model's vocabulary only "
                f"{model.config.vocab_size}; prepare it with the model's tokenizer"
            )
    folder = sources[0].folder
    if recipe.model.path is not None:
        known = resolve_model(recipe.model.path)
        folder = known if (known / "tokenizer.model").is_file() else folder
    expected = Tokenizer.open(folder).sha256
    for stream in [*sources, *validation.values()]:
        if stream.tokenizer_sha256 != expected:
            raise ValueError(
                f"{stream.folder}: was prepared with another tokenizer (sha256 {stream.tokenizer_sha256[:12]}) than "
                f"{folder / 'tokenizer.model'} ({expected[:12]}); prepare it with that one"
            )
    return folder


def planned_steps(recipe: Recipe, loader: Loader) -> int:
    """Optimizer steps of a run, from whichever way the recipe gives its length."""
    train, data = recipe.train, recipe.data
    if train.steps is not None:
        return train.steps
    if train.tokens is not None:
        return math.ceil(train.tokens / (data.packs_per_step * data.sequence_length))
    assert train.epochs is not None
    return max(1, math.ceil(train.epochs * loader.packs_per_epoch / data.packs_per_step))
