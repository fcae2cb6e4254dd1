"""Answering: options scored after a prompt, and prompts generated from, beside transformers where it is installed.

Results are compared first: the same log-probabilities, the same greedy tokens (in fp32; bf16 may decide a close call
otherwise, so the share that agrees is reported). Prompts are random tokens of MedQA's lengths. transformers gets what
its users know: a padded rectangle of every option with its prompt (as lm-eval does), and `generate` on left-padded
prompts. Run by `tokenmill.bench.gpu`: each public function takes a Place and returns rows.
"""

from __future__ import annotations

import importlib.util
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from tokenmill.bench.gpu import Place
from tokenmill.bench.step import quiet
from tokenmill.trainer.distributed import pick_device
from tokenmill.trainer.evaluate.likelihood import continuation_logprobs
from tokenmill.trainer.model import ModelConfig, Transformer
from tokenmill.trainer.model.generate import generate
from tokenmill.trainer.model.weights import save_hf

Row = dict[str, Any]
QUESTIONS = 1273  # of MedQA's test, whose prompts have 60 to 450 tokens in Mistral's vocabulary, mostly about 200
OPTIONS, OPTION = 4, (1, 12)  # and how many tokens one has
SHOTS = 1200  # tokens of worked examples, before five orders of a question


class Size(NamedTuple):
    config: ModelConfig
    questions: int
    generated: int  # prompts that are generated from
    new: int  # tokens after each
    shorter: int  # times, than MedQA's prompts
    rounds: int
    batch: int  # tokens of prompts at once


def _size(place: Place) -> Size:
    if place.small:
        return Size(ModelConfig(32, 1, 4, 2, 8, 48, 100, sliding_window=16, max_positions=4096), 2, 2, 2, 20, 1, 4096)
    if place.device.type == "cpu":
        return Size(ModelConfig(256, 4, 8, 4, 32, 512, 4096, max_positions=4096), 100, 32, 64, 1, 5, 8192)
    mistral = ModelConfig(4096, 32, 32, 8, 128, 14336, 32000, sliding_window=4096, max_positions=32768)
    return Size(mistral, QUESTIONS, 256, 128, 1, 3, 65536)


def scoring(place: Place) -> list[Row]:
    """As many questions as MedQA's test has, zero-shot: the log-probabilities of four options each."""
    size = _size(place)
    model, twin = _models(place, size.config)
    draw = random.Random(0)
    prompts = _prompts(draw, size, size.questions)
    options = [[_ids(draw, size, draw.randint(*OPTION)) for _ in range(OPTIONS)] for _ in prompts]

    def ours() -> list[list[float]]:
        return continuation_logprobs(model, prompts, options, tokens_per_batch=size.batch)

    sides: dict[str, Callable[[], Any]] = {"tokenmill": ours}
    if twin is not None:
        sides["transformers"] = lambda: _rectangles(place, twin, prompts, options, size.batch)
    found, seconds = _in_turn(place, sides, size.rounds)
    expected = found.get("transformers", found["tokenmill"])
    rows = []
    for side, took in seconds.items():
        best = [row.index(max(row)) for row in found[side]]
        same = sum(a == row.index(max(row)) for a, row in zip(best, expected, strict=True)) / len(best)
        row = {"what": f"score {len(prompts)} questions of {OPTIONS} options, {side}", "s": median(took)}
        row |= {"questions/s": len(prompts) / median(took), "spread": _spread(took), "same choice": same}
        rows.append(row | {"ratio": median(took) / median(seconds["tokenmill"])})
    return [*rows, *_missing("score", twin)]


def generating(place: Place) -> list[Row]:
    """Greedy tokens after prompts of unequal lengths, and after MedPrompt's: five that begin with the same shots."""
    size = _size(place)
    model, twin = _models(place, size.config)
    draw = random.Random(1)
    plain = _prompts(draw, size, size.generated)
    alike = []
    for _ in range(max(1, size.generated // 5)):
        shots = _ids(draw, size, SHOTS // size.shorter)
        alike += [shots + prompt for prompt in _prompts(draw, size, 5)]
    new = size.new
    rows = []
    for what, prompts in (("unequal prompts", plain), ("five orders after the same shots", alike)):
        sides: dict[str, Callable[[], Any]] = {
            "tokenmill": lambda p=prompts: [
                answer for (answer,) in generate(model, p, max_new_tokens=new, tokens_per_batch=size.batch)
            ]
        }
        if twin is not None:
            sides["transformers"] = lambda p=prompts: _padded(place, twin, p, new, size.batch)
        found, seconds = _in_turn(place, sides, size.rounds)
        expected = found.get("transformers", found["tokenmill"])
        for side, took in seconds.items():
            same = sum(a == b for a, b in zip(found[side], expected, strict=True)) / len(prompts)
            row = {"what": f"generate {new} tokens each, {len(prompts)} {what}, {side}", "s": median(took)}
            row |= {"tokens/s": len(prompts) * new / median(took), "spread": _spread(took), "same ids": same}
            rows.append(row | {"ratio": median(took) / median(seconds["tokenmill"])})
    return [*rows, *_missing("generate", twin)]


def main(device: str) -> None:
    """`tokenmill bench generation`: a small model on a CPU, Mistral-7B's shape on a GPU."""
    here = pick_device(device)
    where = torch.cuda.get_device_name() if here.type == "cuda" else f"a CPU, {torch.get_num_threads()} threads"
    with tempfile.TemporaryDirectory() as folder:
        place = Place(here, False, Path(folder))
        print(f"{_size(place).config.parameters():,} parameters on {where}; ratio: seconds over ours")
        for row in (*scoring(place), *generating(place)):
            values = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "what")
            print(f"  {row['what']}: {', '.join(values)}", flush=True)


def _models(place: Place, config: ModelConfig) -> tuple[Transformer, Any]:
    """Random weights on both sides; no twin where transformers is missing."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if place.device.type == "cuda" else torch.float32
    with place.device:
        model = Transformer(config, dtype=dtype, device=place.device)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02 if place.device.type == "cuda" else 0.1)
    model.eval()
    if importlib.util.find_spec("transformers") is None:
        return model, None
    import transformers

    with tempfile.TemporaryDirectory() as name, quiet():
        save_hf(model, Path(name) / "hf")
        twin: Any = transformers.AutoModelForCausalLM.from_pretrained(Path(name) / "hf", dtype=dtype)
    twin.generation_config.eos_token_id = None  # as ours, which is given no id to stop at
    return model, twin.to(place.device).eval()


def _ids(draw: random.Random, size: Size, count: int) -> list[int]:
    return [draw.randrange(3, size.config.vocab_size) for _ in range(count)]


def _prompts(draw: random.Random, size: Size, count: int) -> list[list[int]]:
    lengths = (min(450, max(60, int(draw.lognormvariate(5.25, 0.4)))) for _ in range(count))
    return [_ids(draw, size, length // size.shorter) for length in lengths]


def _groups(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Of similar length, longest first, in rectangles of at most so many tokens."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


@torch.no_grad()
def _rectangles(
    place: Place, twin: Any, prompts: Sequence[list[int]], options: Sequence[Sequence[list[int]]], tokens: int
) -> list[list[float]]:
    """Each option behind its prompt as a row of its own, padded on the right."""
    pairs = [(i, option) for i, row in enumerate(options) for option in row]
    texts = [prompts[i] + option for i, option in pairs]
    found = [0.0] * len(texts)
    for group in _groups(list(map(len, texts)), tokens):
        longest = len(texts[group[0]])
        ids = torch.tensor([texts[i] + [0] * (longest - len(texts[i])) for i in group], device=place.device)
        mask = torch.tensor([[1] * len(texts[i]) + [0] * (longest - len(texts[i])) for i in group], device=place.device)
        keep = max(longest - len(prompts[pairs[i][0]]) for i in group) + 1
        logits = twin(ids, attention_mask=mask, logits_to_keep=keep).logits
        for row, i in zip(logits, group, strict=True):
            begin, option = len(prompts[pairs[i][0]]) - 1 - (longest - keep), torch.tensor(pairs[i][1])
            of_option = row[begin : begin + len(option)].float().log_softmax(-1).cpu()
            found[i] = float(of_option.gather(1, option[:, None]).sum())
    scores = iter(found)
    return [[next(scores) for _ in row] for row in options]


@torch.no_grad()
def _padded(place: Place, twin: Any, prompts: Sequence[list[int]], new: int, tokens: int) -> list[list[int]]:
    """`generate` on rectangles padded on the left."""
    found: list[list[int]] = [[] for _ in prompts]
    for group in _groups([len(prompt) + new for prompt in prompts], tokens):
        longest = len(prompts[group[0]])
        ids = torch.tensor([[0] * (longest - len(prompts[i])) + prompts[i] for i in group], device=place.device)
        mask = torch.tensor(
            [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in group], device=place.device
        )
        out = twin.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        for i, answer in zip(group, out[:, longest:].tolist(), strict=True):
            found[i] = answer
    return found


def _in_turn(
    place: Place, sides: dict[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What each side found, once before, and the seconds of its rounds."""
    found = {side: run() for side, run in sides.items()}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            begin = time.perf_counter()
            run()  # its results are on the host, so the device is done
            seconds[side].append(time.perf_counter() - begin)
    return found, seconds


def _spread(seconds: Sequence[float]) -> float:
    return (max(seconds) - min(seconds)) / median(seconds)


def _missing(what: str, twin: Any) -> list[Row]:
    return [] if twin is not None else [{"what": f"{what}, transformers", "s": "not measured: it is not installed"}]
