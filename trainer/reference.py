"""What the model that preference tuning begins from says of each answer: computed once, and kept beside the stream."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tokenmill.data.files import sync
from tokenmill.data.loader import sequential_batches
from tokenmill.data.packing import count_overlong
from tokenmill.data.stream import TokenStream
from tokenmill.data.unfold import SEGMENTS, unfold
from tokenmill.kernels.layout import GHOST
from tokenmill.trainer.distributed import World, deal
from tokenmill.trainer.model import Transformer
from tokenmill.trainer.model.rows import local_part
from tokenmill.trainer.objectives.dpo import answer_logprobs

VERSION = 1  # of how log-probabilities are computed: another one computes them again
CHUNK = 1 << 22  # weights that are hashed at once


def reference_logprobs(
    model: Transformer, weights: str, stream: TokenStream, *, sequence_length: int, tokens_per_batch: int, world: World
) -> Tensor:
    """(documents, 2) fp64 on the CPU, the same on every rank: `answer_logprobs` of each pair of a stream that fits the
    sequence, in order.

    `weights` names the model as it is (`fingerprint`). With the fingerprint of the stream and the sequence length it
    names a file in the stream's folder, which is read where it is there, else written whole; where the folder cannot
    be written, all is computed again the next time.
    """
    key = f"{VERSION} {weights} {stream.fingerprint} {sequence_length}"
    path = stream.folder / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    table = torch.zeros(len(stream), 2, dtype=torch.float64)
    kept = _load(path, len(stream)) if world.rank == 0 else None
    if world.any(kept is not None):
        return world.sum((table if kept is None else kept).to(world.device)).cpu()
    batches = sequential_batches(
        stream, sequence_length=sequence_length, tokens_per_batch=tokens_per_batch, overlong="reject"
    )
    table = table.to(world.device)
    pairs = len(stream) - count_overlong(stream, sequence_length)
    seconds = 0.1 if sys.stderr.isatty() else 30.0  # between two states of the bar
    model.eval()
    with (
        torch.no_grad(),
        tqdm(
            total=pairs, unit="pair", desc=f"reference of {stream.name}", mininterval=seconds,
            disable=world.rank != 0,
        ) as bar,
    ):  # fmt: skip
        for batch in deal(batches, world):
            batch = unfold(batch)
            ids = batch.layout.document_ids[::SEGMENTS]
            real = bool((ids != GHOST).all())
            logps, _ = answer_logprobs(model, batch.to(world.device))
            if real:
                table[ids.to(world.device)] = logps
                bar.update(min(len(ids) * world.size, bar.total - bar.n))
    table = world.sum(table).cpu()
    if world.rank == 0:
        _save(path, table)
    return table


def fingerprint(model: Transformer, world: World, precision: str) -> str:
    """Names the function that a model is: its weights, bit by bit and however sharded, its shape, and the precision
    that it computes in."""
    tensors = [(name, parameter.data, True) for name, parameter in model.named_parameters()]
    tensors += [(name, buffer, False) for name, buffer in model.named_buffers()]
    sums = [_sum(t) if spread or world.rank == 0 else torch.zeros((), dtype=torch.int64) for _, t, spread in tensors]
    digests = world.sum(torch.stack([s.to(world.device) for s in sums])).tolist()  # sums modulo 2**64
    bias = model.balance_bias
    content = [
        [[name, str(t.dtype), [*t.shape], digest] for (name, t, _), digest in zip(tensors, digests, strict=True)],
        dataclasses.asdict(model.config),
        model.adapter and dataclasses.asdict(model.adapter),
        precision,
        None if bias is None else bias.tolist(),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _sum(tensor: Tensor) -> Tensor:
    """(), int64: of the bits of this rank's rows, each times a number made of its place in the whole."""
    local, first = local_part(tensor)
    flat = local.contiguous().view(-1)
    start = first * tensor.shape[1:].numel()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for begin in range(0, flat.numel(), CHUNK):
        bits = flat[begin : begin + CHUNK].view(whole).long()
        place = torch.arange(start + begin, start + begin + len(bits), device=flat.device)
        # An odd constant spreads neighbours over 64 bits, of which the high ones are mixed into the low.
        key = (2 * place + 1) * 0x1E3779B97F4A7C15
        total += (bits * (key ^ (key >> 31))).sum()
    return total


def _load(path: Path, documents: int) -> Tensor | None:
    """None where the file is missing or damaged, which its checksum shows."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            table = torch.from_numpy(arrays["logps"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return table if table.shape == (documents, 2) and table.dtype == torch.float64 else None


def _save(path: Path, table: Tensor) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, logps=table.numpy())
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError:
        pass  # it is in memory
    finally:
        temporary.unlink(missing_ok=True)
