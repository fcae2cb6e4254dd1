"""The same model, weights, documents and precision through our step and through Hugging Face's Trainer, in turn.

Both do a forward and backward pass, clip, and update with torch's fused AdamW, and their losses are compared at every
step. The Trainer gets the documents in both ways that its users know, padded to a rectangle and packed into one row
with restarting positions. A step's time is what lies between its begin and end, the device's work included and loading
not counted on either side; tokens a second are those of real documents. In fp32 on a CPU; on a GPU in bf16-mixed, which
the Trainer calls bf16: fp32 weights and moments, bf16 products.
"""

from __future__ import annotations

import copy
import importlib.util
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from tokenmill.data.batch import IGNORE, Batch
from tokenmill.trainer.config import LossSection, OptimizerSection
from tokenmill.trainer.distributed import join, pick_device, shard
from tokenmill.trainer.model import ModelConfig, MoEConfig, Transformer
from tokenmill.trainer.model.recompute import Recompute
from tokenmill.trainer.model.weights import save_hf
from tokenmill.trainer.objectives.pretrain import Objective, StepContext, pretrain
from tokenmill.trainer.optim import build_optimizer

OURS = "tokenmill"
NO_ROUTING = LossSection(balance=0.0, router_z=0.0)  # transformers adds no routing loss unless asked
Precision = Literal["fp32", "bf16-mixed"]
Steps = list[tuple[float, float]]  # seconds and loss of each step


def compare(
    model: Transformer,
    batches: Sequence[Batch],
    optimizer: OptimizerSection,
    rounds: int = 3,
    recompute: Recompute = "none",
    device: str = "cpu",
    precision: Precision = "fp32",
) -> dict[str, Steps]:
    """Train fresh copies of `model` on `batches`, a step each, on every side, `rounds` times in turn. With `recompute`
    full the Trainer checkpoints its activations too; selective is ours alone.

    Returns each side's steps, round after round. Raises ImportError where transformers or accelerate is missing.
    """
    model.set_recompute(recompute)
    sides: dict[str, Callable[[], Steps]] = {OURS: lambda: _ours(model, batches, optimizer, device, precision)}
    result: dict[str, Steps] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_hf(model, folder / "hf")
        for way, inputs in (("padded", _padded), ("packed", _packed)):
            rows = [inputs(batch) for batch in batches]
            sides[f"HF Trainer, {way}"] = lambda rows=rows: _theirs(
                folder, rows, optimizer, recompute == "full", device, precision
            )
        for _ in range(rounds):
            for side, run in sides.items():
                result.setdefault(side, []).extend(run())
    return result


def summary(batches: Sequence[Batch], result: dict[str, Steps], warmup: int = 2) -> str:
    """Median tokens a second of each side after `warmup` steps a round, ours over it, and how far losses lie apart."""
    tokens = [batch.tokens.numel() for batch in batches]
    rates = {
        side: median(tokens[i % len(tokens)] / s for i, (s, _) in enumerate(steps) if i % len(tokens) >= warmup)
        for side, steps in result.items()
    }
    lines = []
    for side, rate in rates.items():
        apart = max(abs(a - b) for (_, a), (_, b) in zip(result[side], result[OURS], strict=True))
        times = f"ours {rates[OURS] / rate:.2f} times as fast, losses within {apart:.1e}" if side != OURS else ""
        lines.append(f"  {side:20} {rate:9,.0f} tokens/s  {times}".rstrip())
    return "\n".join(lines)


def tiny(experts: int | None, window: int = 64) -> Transformer:
    """The demo's model, dense or with experts."""
    moe = MoEConfig(experts) if experts else None
    model = Transformer(ModelConfig(128, 4, 4, 2, 32, 256, 4096, sliding_window=window, moe=moe))
    model.initialise(0)
    return model


def large(experts: int | None) -> Transformer:
    """Half as wide as Mistral-7B, with 8 of its layers, or 2 of Mixtral-8x7B's: what fits on a GPU beside fp32 moments
    on either side.
    """
    moe = MoEConfig(experts) if experts else None
    layers, window = (2, None) if experts else (8, 4096)
    model = Transformer(ModelConfig(2048, layers, 16, 4, 128, 7168, 32000, sliding_window=window, moe=moe))
    model.initialise(0)
    return model


def documents(
    tokens: int, steps: int, vocabulary: int, seed: int = 0, lengths: tuple[int, int] = (20, 250)
) -> list[Batch]:
    """A batch a step, of documents of random tokens, as long as `lengths` allow, `tokens` in all."""
    draw = random.Random(seed)
    batches = []
    for _ in range(steps):
        sizes: list[int] = []
        while (left := tokens - sum(sizes)) > 0:
            sizes.append(min(left, draw.randint(*lengths)) if left > 2 * lengths[0] else left)
        batches.append(Batch.from_documents([[draw.randrange(vocabulary) for _ in range(n)] for n in sizes]))
    return batches


def main(recompute: Recompute = "none", device: str = "auto") -> None:
    """`tokenmill bench step`: a tiny Mistral and a tiny Mixtral on a CPU, larger ones on a GPU."""
    gpu = pick_device(device).type == "cuda"
    kind, precision = ("cuda", "bf16-mixed") if gpu else ("cpu", "fp32")
    for name, experts in (("Mistral", None), ("Mixtral", 8 if gpu else 4)):
        model = large(experts) if gpu else tiny(experts)
        tokens, lengths = (8192, (200, 2500)) if gpu else (1024, (20, 250))
        batches = documents(tokens, 8, model.config.vocab_size, lengths=lengths)
        optimizer, rounds = (OptimizerSection(1e-4), 2) if gpu else (OptimizerSection(1e-3), 3)
        result = compare(model, batches, optimizer, rounds, recompute, kind, precision)
        size = f"{model.config.parameters():,} parameters, {tokens:,} tokens a step"
        where = torch.cuda.get_device_name() if gpu else "a CPU"
        print(f"{'large' if gpu else 'tiny'} {name}, {size}, {precision} on {where}, recomputation {recompute}")
        print(summary(batches, result), flush=True)


def _ours(
    model: Transformer, batches: Sequence[Batch], section: OptimizerSection, device: str, precision: Precision
) -> Steps:
    with join(device, sharded=precision == "bf16-mixed") as world:
        model = copy.deepcopy(model).to(world.device)
        shard(model, world, precision)
        return take_steps(model, pretrain, [(batch, float(batch.weights.sum())) for batch in batches], section, device)


def take_steps(
    model: Transformer,
    objective: Objective,
    batches: Sequence[tuple[Batch, float]],
    section: OptimizerSection,
    device: str,
    loss: LossSection = NO_ROUTING,
) -> Steps:
    """Train `model`, which is on `device` and sharded where it has to be, a step on each batch and its total weight."""
    optimizer = build_optimizer(model, section)
    model.train()
    steps = []
    for number, (batch, weight) in enumerate(batches):
        begin = time.perf_counter()
        context = StepContext(number, weight, batch.tokens.numel(), None, loss)
        total = objective(model, batch.to(device, non_blocking=True), context).total
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait_for(device)
        steps.append((time.perf_counter() - begin, total.item()))
    return steps


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _theirs(
    folder: Path,
    rows: list[dict[str, Tensor]],
    section: OptimizerSection,
    gradient_checkpointing: bool,
    device: str,
    precision: Precision,
) -> Steps:
    import transformers

    class Rows(torch.utils.data.IterableDataset):  # in this order
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return iter(rows)

    given = arguments(folder, len(rows), section, gradient_checkpointing, device, precision)
    with quiet():
        _, train = recording(
            transformers.Trainer,
            device,
            model=twin(folder, device),
            args=transformers.TrainingArguments(per_device_train_batch_size=1, **given),
            train_dataset=Rows(),
            data_collator=lambda rows: rows[0],
        )
        return train()


def arguments(
    folder: Path,
    steps: int,
    section: OptimizerSection,
    gradient_checkpointing: bool,
    device: str,
    precision: Precision,
) -> dict[str, Any]:
    """Of transformers' TrainingArguments, those that make its steps ours."""
    return dict(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        learning_rate=section.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=section.betas[0],
        adam_beta2=section.betas[1],
        adam_epsilon=section.eps,
        weight_decay=section.weight_decay,
        max_grad_norm=section.clip_norm,
        optim="adamw_torch_fused",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=gradient_checkpointing,
        use_cpu=device == "cpu",
        bf16=precision == "bf16-mixed",
    )


def twin(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of transformers' in `folder`/hf."""
    import transformers

    flash = device == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "hf",
        use_cache=False,
        dtype=dtype,
        attn_implementation="flash_attention_2" if flash else "sdpa",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Within: transformers says nothing but errors."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def recording(kind: Any, device: str, **given: Any) -> tuple[Any, Callable[[], Steps]]:
    """A trainer of `kind`, transformers' Trainer or one made of it, and what trains it and says how its steps went."""
    import transformers

    seconds: list[float] = []
    losses: list[Any] = []  # read at the end: the step does not wait for them

    class Clock(transformers.TrainerCallback):
        begin = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _wait_for(device)
            seconds.append(time.perf_counter() - self.begin)

    class Recording(kind):
        def compute_loss(self, *args: Any, **keywords: Any) -> Any:
            loss = super().compute_loss(*args, **keywords)
            losses.append(loss.detach())
            return loss

    def train() -> Steps:
        trainer.train()
        return [(time, float(loss)) for time, loss in zip(seconds, losses, strict=True)]

    trainer = Recording(callbacks=[Clock()], **given)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, train


def _documents(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Each document's tokens, and its tokens as labels: transformers shifts those itself."""
    sizes = batch.layout.cu_seqlens.diff().tolist()
    pairs = zip(batch.tokens.long().split(sizes), batch.targets.split(sizes), strict=True)
    return [(tokens, torch.cat([targets.new_tensor([IGNORE]), targets[:-1]])) for tokens, targets in pairs]


def _padded(batch: Batch) -> dict[str, Tensor]:
    pairs = _documents(batch)
    tokens, labels = [t for t, _ in pairs], [l for _, l in pairs]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(tokens, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORE),
        "attention_mask": pad([torch.ones_like(t) for t in tokens], batch_first=True),
    }


def _packed(batch: Batch) -> dict[str, Tensor]:
    return {
        "input_ids": batch.tokens.long()[None],
        "labels": torch.cat([labels for _, labels in _documents(batch)])[None],
        "position_ids": batch.layout.positions.long()[None],
    }
