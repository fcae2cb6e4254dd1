"""The same model, weights, documents and precision through our step and through transformers', in turn in one run.

Both do a forward and backward pass, clip, and update with torch's fused AdamW. transformers gets the documents in
both ways that its users know, padded to a rectangle and packed into one row with restarting positions, and the
faster counts. Tokens a second are those of real documents.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from tokenmill.data.batch import IGNORE, Batch
from tokenmill.data.loader import Loader
from tokenmill.trainer.config import LossSection, OptimizerSection
from tokenmill.trainer.model import Transformer
from tokenmill.trainer.model.weights import save_hf
from tokenmill.trainer.objectives.pretrain import StepContext, pretrain
from tokenmill.trainer.optim import build_optimizer


def compare(model: Transformer, loader: Loader, optimizer: OptimizerSection, steps: int = 12) -> dict[str, list[float]]:
    """Train `model` and its transformers twins on the same batches: seconds, tokens and losses, a list each.

    Keys: `tokens`, and for each of `tokenmill`, `transformers, padded` and `transformers, packed` the seconds of
    every step under its name and the losses under its name plus ` loss`.
    """
    from transformers import AutoModelForCausalLM

    quiet = LossSection(balance=0.0, router_z=0.0)  # transformers adds no routing loss unless asked
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder) / "hf")
        twins = {
            f"transformers, {name}": (AutoModelForCausalLM.from_pretrained(Path(folder) / "hf"), inputs)
            for name, inputs in (("padded", _padded), ("packed", _packed))
        }

    def ours(batch: Batch) -> Tensor:
        context = StepContext(0, float(batch.weights.sum()), batch.tokens.numel(), None, quiet)
        return pretrain(model, batch, context).total

    def theirs(twin: torch.nn.Module, inputs: Callable[[Batch], dict[str, Tensor]]) -> Callable[[Batch], Tensor]:
        return lambda batch: twin(**inputs(batch), use_cache=False).loss

    sides: dict[str, tuple[torch.nn.Module, Callable[[Batch], Tensor]]] = {"tokenmill": (model, ours)}
    sides |= {name: (twin, theirs(twin, inputs)) for name, (twin, inputs) in twins.items()}
    updates = {name: build_optimizer(module, optimizer) for name, (module, _) in sides.items()}
    result: dict[str, list[float]] = {"tokens": []}
    for _ in range(steps):
        (batch,) = next(loader).micro_batches
        result["tokens"].append(batch.tokens.numel())
        for name, (module, loss_of) in sides.items():
            module.train()
            begin = time.perf_counter()
            loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), optimizer.clip_norm)
            updates[name].step()
            updates[name].zero_grad(set_to_none=True)
            result.setdefault(name, []).append(time.perf_counter() - begin)
            result.setdefault(f"{name} loss", []).append(loss.item())
    return result


def summary(result: dict[str, list[float]], warmup: int = 2) -> str:
    """Median tokens a second of each side, the ratio to ours, and how far the losses lie apart."""
    rates = {
        name: median(n / s for n, s in zip(result["tokens"][warmup:], seconds[warmup:], strict=True))
        for name, seconds in result.items()
        if name != "tokens" and not name.endswith(" loss")
    }
    lines = []
    for name, rate in rates.items():
        apart = max(abs(a - b) for a, b in zip(result[f"{name} loss"], result["tokenmill loss"], strict=True))
        lines.append(f"{name:24} {rate:9,.0f} tokens/s  {rates['tokenmill'] / rate:5.2f} x  losses within {apart:.1e}")
    return "\n".join(lines)


def _documents(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Each document's tokens, and its tokens as labels: transformers shifts those itself."""
    sizes = batch.layout.cu_seqlens.diff().tolist()
    documents = []
    for tokens, targets in zip(batch.tokens.long().split(sizes), batch.targets.split(sizes), strict=True):
        documents.append((tokens, torch.cat([targets.new_tensor([IGNORE]), targets[:-1]])))
    return documents


def _padded(batch: Batch) -> dict[str, Tensor]:
    documents = _documents(batch)
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([tokens for tokens, _ in documents], batch_first=True),
        "labels": pad([labels for _, labels in documents], batch_first=True, padding_value=IGNORE),
        "attention_mask": pad([torch.ones_like(tokens) for tokens, _ in documents], batch_first=True),
    }


def _packed(batch: Batch) -> dict[str, Tensor]:
    documents = _documents(batch)
    return {
        "input_ids": batch.tokens.long()[None],
        "labels": torch.cat([labels for _, labels in documents])[None],
        "position_ids": batch.layout.positions.long()[None],
    }
