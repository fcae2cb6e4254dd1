"""What a model writes, kept in a file as it comes, so that an evaluation which was killed goes on from there.

A line holds all samples of a prompt, known by the hash of whatever decides them. What is computed together changes a
reply by rounding at most (model/generate.py), so what is put together of several runs is what an unbroken one gives.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tokenmill.data.errors import DataError
from tokenmill.data.files import lock, naming
from tokenmill.trainer.model import Transformer
from tokenmill.trainer.model.generate import Sampling, stream

Samples = list[list[int]]  # of one prompt


class Replies:
    """For one process at a time, in a `with`: the file is removed where that ends well, or nothing was written."""

    def __init__(self, path: Path, weights: str) -> None:
        """`weights` is the fingerprint of those that write. Raises DataError where another process has the file, or it
        is damaged."""
        self.path, self._weights = path, weights
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        try:
            if not lock(self._file.fileno()):
                raise DataError(f"{path}: is in use by another process, which writes the same output")
            self._known = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Replies:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None or not self._known:
            self.path.unlink()
        self._file.close()

    def generate(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Collection[int],
        sampling: Sampling,
        samples: int,
        tokens_per_batch: int,
        progress: bool,
    ) -> list[Samples]:
        """As model/generate.py's, but the model is asked only for what is not known; for greedy replies to prompts that
        are the same, once."""
        decide = [self._weights, str(model.embed.weight.dtype), repr(model.config), max_new_tokens, sorted(stop)]
        random = astuple(sampling) if sampling.temperature else None  # else neither the seed nor the place counts
        keys = [_key(*decide, samples, random and (*random, i), list(prompt)) for i, prompt in enumerate(prompts)]
        missing = {key: i for i, key in enumerate(keys) if key not in self._known}
        total, known = samples * len(keys), samples * sum(key not in missing for key in keys)
        if known:
            print(f"going on: {known} of {total} replies known", file=sys.stderr)
        asked, numbers = list(missing), list(missing.values())
        options: dict[str, Any] = dict(max_new_tokens=max_new_tokens, stop=stop, sampling=sampling, samples=samples)
        options |= dict(tokens_per_batch=tokens_per_batch, numbers=numbers)
        replies: list[Samples] = [[[] for _ in range(samples)] for _ in asked]
        going = [samples] * len(asked)
        with tqdm(total=total, initial=known, desc="generate", unit="answer", disable=not progress) as bar:
            for step in stream(model, [prompts[i] for i in numbers], **options):
                for sequence, token, stopped, ended in zip(*(column.tolist() for column in step), strict=True):
                    prompt, sample = divmod(sequence, samples)
                    if not stopped:
                        replies[prompt][sample].append(token)
                    going[prompt] -= ended
                    if not going[prompt]:
                        self._record(asked[prompt], replies[prompt])
                bar.update(int(step.ended.sum()))
        return [self._known[key] for key in keys]

    def _record(self, key: str, replies: Samples) -> None:
        self._known[key] = replies
        line = json.dumps({"key": key, "ids": replies}).encode() + b"\n"
        with naming(self.path):  # where the disk is full, say: what is cut short the next run leaves out
            while line:
                line = line[os.write(self._file.fileno(), line) :]

    def _read(self) -> dict[str, Samples]:
        *lines, torn = self.path.read_bytes().split(b"\n")
        if torn:  # the process was killed as it wrote
            self._file.truncate(sum(len(line) + 1 for line in lines))
        known: dict[str, Samples] = {}
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                known[entry["key"]] = entry["ids"]
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{self.path}:{number}: holds no replies: remove the line, and they are asked for again"
                ) from None
        return known


def _key(*decides: object) -> str:
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]
