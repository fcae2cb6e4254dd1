"""A checkpoint as a model of EleutherAI's Language Model Evaluation Harness (`pip install 'tokenmill[eval]'`).

Its command line, which knows our models by this:

    python -m tokenmill.trainer.harness run --model tokenmill --model_args path=runs/clinical --tasks medmcqa

or in Python, `lm_eval.simple_evaluate(model=HarnessModel("runs/clinical"), tasks=["medmcqa"])`. Texts become the ids
that `tokenmill eval` makes of them, by the plain template or, with `--apply_chat_template`, by a chat template, so the
same prompts have the same accuracies. One difference is the harness's: in a chat, what ends an answer is not counted,
which matters where options are scored by their text.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)
from tqdm import tqdm

from tokenmill.data import chat
from tokenmill.trainer.evaluate.likelihood import Likelihood, likelihoods
from tokenmill.trainer.inference import open_model, tokens_at_once
from tokenmill.trainer.model.generate import Sampling, stream

CHAT = "\x02"  # in front of a chat, which goes through the harness as JSON: a template is applied to ids, not to text
LIMITS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # names that tasks have for one thing
MAX_NEW_TOKENS = 256  # the harness's own


class Generation(NamedTuple):
    """How a text is to be generated, but for the strings that end it."""

    max_new_tokens: int
    temperature: float
    top_p: float


@register_model("tokenmill")
class HarnessModel(LM):
    def __init__(
        self,
        path: str | Path,
        *,
        tokenizer: str | Path | None = None,
        template: str = "auto",
        dtype: str | None = None,
        device: str | None = None,
        tokens_per_batch: int | None = None,
        seed: int = 0,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        """As `open_model`, and of chats the template. The harness gives batch sizes in requests, which are not looked
        at: a batch is of `tokens_per_batch` tokens (65536 on a GPU, 8192 on a CPU). Raises as `open_model`."""
        super().__init__()
        if device is None or device.startswith("cuda"):  # which the harness says where nobody did
            device = "auto"
        self.model, self.tokenizer = open_model(path, tokenizer=tokenizer, dtype=dtype, device=device)
        self.template = template
        self.chat_template()  # raises where there is no such template
        self.seed = seed
        self.tokens_per_batch = tokens_per_batch or tokens_at_once(self.model)
        self.max_length = self.model.config.max_positions
        self._device = next(self.model.parameters()).device

    @property
    def tokenizer_name(self) -> str:
        """What the harness knows cached requests by."""
        return f"{self.tokenizer.sha256[:16]} {self.chat_template()}"

    def chat_template(self, chat_template: bool | str = True) -> str:
        """The name of ours. Raises ValueError where another is asked for by name."""
        if isinstance(chat_template, str):
            raise ValueError(
                f"apply_chat_template: name the template as template={chat_template} in the model's arguments"
            )
        return chat.resolve(self.tokenizer, self.template) if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Not the rendered text, but the chat itself: see `CHAT`. A last message of the assistant's is one begun."""
        if add_generation_prompt:
            return CHAT + json.dumps(chat_history)
        return CHAT + json.dumps(chat_history[:-1]) + chat_history[-1]["content"]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [self._pair(*request.args[:2]) for request in requests]
        return [(found.logprob, found.greedy) for found in self._score(pairs, progress=not disable_tqdm)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of a text longer than the model's positions, each token behind as many as there is room for."""
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.tokenizer.bos_id, self.max_length, 1)
            pairs += map(make_disjoint_window, windows)
            owners += [i] * (len(pairs) - len(owners))
        sums = [0.0] * len(requests)
        for i, found in zip(owners, self._score(pairs, progress=not disable_tqdm), strict=True):
            sums[i] += found.logprob
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        alike: defaultdict[Generation, list[int]] = defaultdict(list)
        ends = []
        for i, request in enumerate(requests):
            generation, until = _read(request.args[1])
            alike[generation].append(i)
            ends.append(until)
        with tqdm(total=len(requests), desc="generate", unit="answer", disable=disable_tqdm) as bar:
            for generation, group in alike.items():
                prompts = [self._prompt(requests[i].args[0], generation.max_new_tokens) for i in group]
                answers: list[list[int]] = [[] for _ in group]
                for step in stream(
                    self.model,
                    prompts,
                    max_new_tokens=generation.max_new_tokens,
                    stop={self.tokenizer.eos_id, chat.end_id(self.tokenizer, self.template)},
                    sampling=Sampling(generation.temperature, generation.top_p, self.seed),
                    tokens_per_batch=self.tokens_per_batch,
                ):
                    for row, (number, token) in enumerate(
                        zip(step.sequences.tolist(), step.tokens.tolist(), strict=True)
                    ):
                        if not step.stopped[row]:
                            answers[number].append(token)
                            step.ended[row] |= self._ends(answers[number], ends[group[number]])
                    bar.update(int(step.ended.sum()))
                for i, ids in zip(group, answers, strict=True):
                    texts[i] = self.tokenizer.decode(ids)
                    for end in ends[i]:
                        texts[i] = texts[i].partition(end)[0]
        return texts

    def _ends(self, ids: list[int], ends: list[str]) -> bool:
        """Whether the newest of the ids complete a string: each has a byte of it, but for the space that is lost in
        front of the first."""
        most = max((len(end.encode()) for end in ends), default=0)
        text = self.tokenizer.decode(ids[-most - 1 :]) if most else ""
        return any(end in text for end in ends)

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], progress: bool) -> list[Likelihood]:
        """How likely each continuation is after its prefix, whose end is kept where both are too long together. Those
        of one prefix are computed with it, as far as a batch reaches.
        """
        groups: list[tuple[list[int], list[int]]] = []  # a prefix, and the numbers of its continuations
        latest: dict[tuple[int, ...], tuple[int, int]] = {}  # where a prefix's last group is, and its size
        for i, (prefix, continuation) in enumerate(pairs):
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens exceeds the model's {self.max_length} positions"
                )
            if len(prefix) > room:
                warnings.warn(f"a context of {len(prefix)} tokens is cut to its last {room}", stacklevel=2)
            prefix = prefix[-room:]
            key = tuple(prefix)
            group, size = latest.get(key, (-1, 0))
            if group < 0 or size + len(continuation) > self.tokens_per_batch:
                group, size = len(groups), len(prefix)
                groups.append((prefix, []))
            groups[group][1].append(i)
            latest[key] = group, size + len(continuation)
        scores = likelihoods(
            self.model,
            [prefix for prefix, _ in groups],
            [[pairs[i][1] for i in numbers] for _, numbers in groups],
            tokens_per_batch=self.tokens_per_batch,
            progress=progress,
        )
        numbered = {
            i: score
            for (_, numbers), row in zip(groups, scores, strict=True)
            for i, score in zip(numbers, row, strict=True)
        }
        return [numbered[i] for i in range(len(pairs))]

    def _prompt(self, context: str, max_new_tokens: int) -> list[int]:
        """The ids that a text is to follow, their end where they are too many."""
        ids, begun = self._context(context)
        ids = ids + begun
        room = self.max_length - max_new_tokens
        if len(ids) > room > 0:
            warnings.warn(f"a context of {len(ids)} tokens is cut to its last {room}", stacklevel=2)
            ids = ids[-room:]
        return ids

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context and of what follows it. As everywhere in the harness, spaces at the end of the context
        belong to what follows, and both are encoded as one text."""
        kept = context if context.startswith(CHAT) else context.rstrip()
        continuation = context[len(kept) :] + continuation
        prefix, begun = self._context(kept)
        whole = self._context(kept + continuation)[1]
        return prefix + begun, whole[len(begun) :]

    def _context(self, text: str) -> tuple[list[int], list[int]]:
        """BOS and the ids of a text; or of a chat, and of the answer that is begun behind it."""
        if not text.startswith(CHAT):
            return [self.tokenizer.bos_id], self.tokenizer.encode(text)
        messages, end = json.JSONDecoder().raw_decode(text, len(CHAT))
        prompt = chat.prompt(messages, self.tokenizer, self.template)
        if not (begun := text[end:]):
            return prompt, []
        told = chat.render([*messages, {"role": "assistant", "content": begun}], self.tokenizer, self.template)[0]
        return prompt, told[len(prompt) : -1]


def _read(options: dict[str, Any]) -> tuple[Generation, list[str]]:
    """A task's generation options, and the strings that end a text. Raises ValueError naming one that is not known."""
    options = dict(options)
    until = options.pop("until", None) or []
    limits = [int(options.pop(name)) for name in LIMITS if name in options]
    temperature = float(options.pop("temperature", 0.0))
    sampled = options.pop("do_sample", temperature > 0)
    top_p = float(options.pop("top_p", 1.0))
    if options:
        raise ValueError(
            f"generation option {next(iter(options))!r} is not known: expected until, {', '.join(LIMITS)}, do_sample, "
            "temperature or top_p"
        )
    generation = Generation((limits or [MAX_NEW_TOKENS])[0], (temperature or 1.0) if sampled else 0.0, top_p)
    return generation, [end for end in ([until] if isinstance(until, str) else until) if end]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        if os.environ.get("TOKENMILL_DEBUG"):
            raise
        sys.exit(f"tokenmill: error: {error}")
