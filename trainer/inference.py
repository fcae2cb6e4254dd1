"""A model that is asked and not trained: loaded with its tokenizer, onto the device there is."""

from __future__ import annotations

from pathlib import Path

import torch

from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.checkpoint import fill_model, read_config, resolve_model
from tokenmill.trainer.distributed import pick_device
from tokenmill.trainer.model import ModelConfig, Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_model(
    path: str | Path, *, tokenizer: str | Path | None = None, dtype: str | None = None, device: str = "auto"
) -> tuple[Transformer, Tokenizer]:
    """The model in a checkpoint, a run's output (its newest) or a Hugging Face folder, and its tokenizer; None: the
    one in the same folder. `dtype` is fp32, bf16 or fp16; None: bf16 on a GPU, fp32 on a CPU.

    Raises ValueError where that cannot be, or the tokenizer does not fit the model.
    """
    where = pick_device(device)
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    folder = resolve_model(path)
    config, opened = read_config(folder), Tokenizer.open(tokenizer or folder)
    check_tokenizer(opened, config)
    model = Transformer(config, dtype=DTYPES[dtype or ("bf16" if where.type == "cuda" else "fp32")])
    fill_model(model, folder)
    return model.to(where).eval(), opened


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raises ValueError where it has more pieces than the model has rows for them."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{tokenizer.path}: {tokenizer.vocab_size} pieces do not fit the model's vocabulary of "
            f"{config.vocab_size}; give the model's own with --tokenizer, or put it into the model's folder"
        )


def tokens_at_once(model: Transformer) -> int:
    """How many tokens are computed at once unless said otherwise, and cached in generation."""
    return 65536 if next(model.parameters()).is_cuda else 8192
