"""A checkpoint as a Generator (data/journal.py): where an endpoint answers requests, it can."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from tokenmill.data import chat
from tokenmill.data.journal import Answer, Request
from tokenmill.trainer.adapters import Base
from tokenmill.trainer.checkpoint import read_config, resolve_model
from tokenmill.trainer.inference import open_model
from tokenmill.trainer.model.generate import Sampling, generate


class CheckpointGenerator:
    """A model's answers by its chat template, computed `width` requests at a time."""

    def __init__(self, model: str | Path, *, template: str = "auto", width: int = 8, max_tokens: int = 1) -> None:
        """Load a checkpoint, a run's newest or a Hugging Face folder, with the tokenizer in it; on a GPU, in bf16.
        Raises ValueError where that cannot be, or it has no positions for a prompt and `max_tokens`, the most that will
        be asked for."""
        folder = resolve_model(model)
        if max_tokens >= (most := read_config(folder).max_positions):
            raise ValueError(
                f"{folder}: the model has {most} positions, which {max_tokens} tokens of an answer leave no prompt in; "
                "ask for fewer (--max-tokens, and of instruct --answer-tokens)"
            )
        self.width = width
        self._model, self._tokenizer = open_model(folder)
        self._template = chat.resolve(self._tokenizer, template)
        weights, dtype = Base.of(folder).fingerprint, self._model.embed.weight.dtype
        self.identity = f"{weights} {self._tokenizer.sha256} {self._template} {dtype}"
        self._stop = {self._tokenizer.eos_id, chat.end_id(self._tokenizer, self._template)}
        self._pending: list[Request] = []

    @property
    def free(self) -> bool:
        return len(self._pending) < self.width

    def submit(self, request: Request) -> None:
        self._pending.append(request)

    def collect(self) -> list[tuple[Request, Answer]]:
        """All of them. What is drawn for a request depends on its own seed alone, not on what it is computed with."""
        pending, self._pending = self._pending, []
        found: list[tuple[Request, Answer]] = []
        for (max_tokens, temperature), group in groupby(pending, lambda r: (r.max_tokens, r.temperature)):
            prompts: list[tuple[Request, list[int]]] = []
            for request in group:
                ids = chat.prompt(request.messages, self._tokenizer, self._template)
                if len(ids) + max_tokens > (most := self._model.config.max_positions):
                    reason = f"{len(ids)} tokens and {max_tokens} new ones exceed the model's {most} positions"
                    found.append((request, Answer("", refused=reason)))
                else:
                    prompts.append((request, ids))
            answers = generate(
                self._model,
                [ids for _, ids in prompts],
                max_new_tokens=max_tokens,
                stop=self._stop,
                sampling=Sampling(temperature),
                numbers=[request.seed for request, _ in prompts],
            )
            for (request, _), (ids,) in zip(prompts, answers, strict=True):
                found.append((request, Answer(self._tokenizer.decode(ids), whole=len(ids) < max_tokens)))
        return found
