"""Generation from cached keys against the full forward pass and transformers', and what is random about it."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from tokenmill import _C
from tokenmill.kernels.layout import Layout
from tokenmill.trainer.model import ModelConfig, MoEConfig, Transformer, generate, lora
from tokenmill.trainer.model.cache import Cache, Group
from tokenmill.trainer.model.config import AdapterConfig
from tokenmill.trainer.model.generate import Sampling, choose, stream, uniform
from tokenmill.trainer.model.weights import load_hf, load_weights, save_hf

BASE: dict[str, Any] = dict(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=89)
CONFIGS = {
    "dense": ModelConfig(**BASE, sliding_window=7),
    "experts": ModelConfig(**BASE, sliding_window=5, moe=MoEConfig(4, 2)),
    "no window": ModelConfig(**dict(BASE, n_kv_heads=4), moe=MoEConfig(3, 1)),
    "own key alone": ModelConfig(**dict(BASE, n_kv_heads=1), sliding_window=1),
}
LENGTHS = [1, 2, 23, 5, 40, 1, 17, 8]


def build(config, seed=3, **names):
    model = Transformer(config, **names)
    model.initialise(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # away from the small weights at which everything is nearly linear
    return model


def texts(lengths=LENGTHS, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 89, n).tolist() for n in lengths]


def alike(seed=0):
    """Prompts of which neighbours begin alike: with what is longer than a window, or shorter, and ends at once."""
    head, other = texts([30, 4], seed + 1)
    tails = texts([1, 12, 2, 25, 1, 3, 3, 9], seed + 2)
    return [[*head, *tail] for tail in tails[:4]] + [[*other, *tail] for tail in tails[4:7]] + [head[:20], tails[7]]


@torch.no_grad()
def logits_of(model, document):
    """(T, V) of the full forward pass."""
    layout = Layout.from_lengths([len(document)])
    return model.head.logits(model(torch.tensor(document), layout).hidden)


def naive(model, prompt, number, sample, new, stop, sampling):
    """The definition: a full forward pass a token."""
    ids = list(prompt)
    for position in range(len(prompt), len(prompt) + new):
        where = (np.array([i]) for i in (number, sample, position))
        token = int(choose(logits_of(model, ids)[-1:], sampling, *where))
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


BACKENDS = [("sdpa", "reference"), ("reference", "grouped_mm")]


@pytest.mark.parametrize(("prompts", "budget"), [(texts(), 90), (alike(), 999)], ids=["unlike", "alike"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(("attention", "moe"), BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_token_as_in_the_full_forward_pass(name, attention, moe, samples, prompts, budget, monkeypatch):
    """Some wait for others; of some, what they begin with is computed once."""
    model = build(CONFIGS[name], attention=attention, moe=moe)
    seen = []

    def spy(logits, *rest):
        seen.append((logits, *rest[1:]))
        return choose(logits, *rest)

    monkeypatch.setattr(generate, "choose", spy)
    monkeypatch.setattr(generate, "ROWS", 5)
    options: dict[str, Any] = dict(max_new_tokens=19, samples=samples, sampling=Sampling(1.0, 0.9, seed=5))
    answers = generate.generate(model, prompts, **options, tokens_per_batch=budget)
    full = [[logits_of(model, p + answer) for answer in of] for p, of in zip(prompts, answers, strict=True)]
    rows = 0
    for logits, *where in seen:
        for row, prompt, sample, position in zip(logits, *where, strict=True):
            expected = full[prompt][sample][position - 1]
            assert (row - expected).norm() <= 2e-6 * expected.norm()
            rows += 1
    assert rows == len(prompts) * samples * 19


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_random_batches_are_as_a_loop_over_full_passes(name):
    model = build(CONFIGS[name])
    draw = np.random.default_rng(0)
    for round in range(6):
        prompts = texts(draw.integers(1, 30, draw.integers(1, 8)), round)
        if round % 2:
            prompts = [prompts[0][: draw.integers(0, 30)] + prompt for prompt in prompts]
        samples, new, stop = int(draw.integers(1, 4)), int(draw.integers(1, 14)), set(draw.integers(0, 89, 9).tolist())
        sampling = Sampling([0.0, 0.7, 2.0][round % 3], [1.0, 0.6][round % 2], seed=round)
        options: dict[str, Any] = dict(max_new_tokens=new, stop=stop, sampling=sampling)
        budget = int(draw.integers(1, 150 + 1000 * (round % 2)))
        answers = generate.generate(model, prompts, **options, samples=samples, tokens_per_batch=budget)
        for i, prompt in enumerate(prompts):
            assert answers[i] == [naive(model, prompt, i, s, new, stop, sampling) for s in range(samples)]


SIZES: dict[str, Any] = dict(vocab_size=97, num_hidden_layers=2, hidden_size=48, intermediate_size=80)
SIZES |= dict(num_attention_heads=6, num_key_value_heads=2, initializer_range=0.2, eos_token_id=None)


@pytest.mark.parametrize("window", [7, None])
@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_greedy_ids_are_those_of_transformers(kind, window, tmp_path):
    torch.manual_seed(0)
    theirs: Any
    if kind == "mistral":
        theirs = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window))
    else:
        theirs = MixtralForCausalLM(MixtralConfig(**SIZES, sliding_window=window, num_local_experts=4))
    theirs.eval().save_pretrained(tmp_path)
    ours, _ = load_hf(tmp_path, torch.float32)
    prompts = texts([1, 3, 7, 20, 41])
    answers = generate.generate(ours, prompts, max_new_tokens=24)
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        assert answer == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("quantise", ["none", "nf4"])
def test_adapters_and_balance_bias_take_part(quantise, tmp_path):
    model, prompts = build(CONFIGS["experts"]), texts([9, 30])
    answers = [generate.generate(model, prompts, max_new_tokens=12)]
    save_hf(model, tmp_path)
    model.set_balance_bias(torch.tensor([[0.5, 0, 0, -0.5]]).repeat(3, 1))
    answers.append(generate.generate(model, prompts, max_new_tokens=12))
    lora.attach(model, AdapterConfig(rank=4, quantise=quantise))
    load_weights(model, tmp_path)
    lora.initialise(model, 0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                parameter.normal_(std=0.1, generator=draw)
    answers.append(generate.generate(model, prompts, max_new_tokens=12))
    assert answers[2] == [[naive(model, p, i, 0, 12, (), Sampling())] for i, p in enumerate(prompts)]
    assert answers[0] != answers[1] != answers[2]


def passes(model):
    """A list that grows by the number of tokens of each forward pass."""
    found = []
    model.embed.register_forward_hook(lambda module, inputs, output: found.append(len(output)))
    return found


def cut(answers, stop):
    """Each up to its first stop id."""
    ends = [[next((i for i, t in enumerate(answer) if t in stop), None) for answer in of] for of in answers]
    return [[answer[:end] for answer, end in zip(*pair, strict=True)] for pair in zip(answers, ends, strict=True)]


def test_prompts_are_computed_once_and_the_ended_leave():
    model = build(CONFIGS["dense"])
    counts = passes(model)
    prompts = texts([30, 12, 1])
    free = generate.generate(model, prompts, max_new_tokens=6, samples=4, sampling=Sampling(1.5, seed=1))
    assert counts == [43, 12, 12, 12, 12, 12]
    counts.clear()
    stop = {of[s][2] for of in free[:2] for s in (0, 1)}
    found = generate.generate(model, prompts, max_new_tokens=6, samples=4, stop=stop, sampling=Sampling(1.5, seed=1))
    assert found == cut(free, stop)
    lengths = [len(answer) for of in found for answer in of]
    assert min(lengths) <= 2
    assert counts == [43, *(sum(n > i for n in lengths) for i in range(5))]
    assert counts[-1] < 12


def test_what_prompts_begin_with_is_computed_once():
    model = build(CONFIGS["dense"])
    counts = passes(model)
    prompts = alike()
    answers = generate.generate(model, prompts, max_new_tokens=3)
    # 30 once and the tails; 4 once, of which 3 are enough for the first, and the tails; two that are like no other.
    assert counts == [(30 + 1 + 12 + 2 + 25) + (4 + 1 + 3 + 3) + 20 + 9, 9, 9]
    assert answers == [generate.generate(model, [prompt], max_new_tokens=3)[0] for prompt in prompts]
    counts.clear()
    assert generate.generate(model, prompts, max_new_tokens=3, tokens_per_batch=100) == answers
    # No group takes more than half of 100 rows, with the 2 that are added to each: the first two, and the third alone.
    assert counts[0] == (30 + 1 + 12) + 32


def test_prompts_are_grouped_where_that_saves_half_of_one(monkeypatch):
    def groups(prompts, samples=1, growth=0, tokens=999):
        arrays = [np.array(prompt) for prompt in prompts]
        return [tuple(group) for group in generate._groups(arrays, samples, growth, tokens)]

    a, b, c = [1] * 10, [1] * 5 + [2] * 5, [1] * 4 + [3] * 6
    assert groups([a]) == [(0, 1, 0)]
    assert groups([a, b]) == [(0, 2, 5)]
    assert groups([a, c]) == [(0, 1, 0), (1, 2, 0)]  # 4 of 10 saved
    assert groups([a, a, a]) == [(0, 3, 9)]  # each has a token of its own
    assert groups([a, a, a, b]) == [(0, 3, 9), (3, 4, 0)]  # 9 * 2 saved, and 5 * 3 would be
    assert groups([a, [1] * 30]) == [(0, 1, 0), (1, 2, 0)]
    assert groups([a, a, c, c], tokens=22) == [(0, 2, 9), (2, 4, 9)]
    assert groups([a, a], tokens=21) == groups([a, a], growth=1, tokens=25) == [(0, 1, 0), (1, 2, 0)]
    assert groups([a, a], samples=2, growth=1, tokens=30) == [(0, 2, 9)]
    assert groups([a, a], samples=2, growth=1, tokens=29) == [(0, 1, 0), (1, 2, 0)]
    # Of 160 keys that are seen, each may be in one of 16 prompts of 10.
    assert groups([a] * 20, tokens=40) == [(0, 11, 9), (11, 20, 9)]
    monkeypatch.setattr(generate, "SEEN", 4)
    assert groups([a] * 20, tokens=40) == [(0, 8, 9), (8, 16, 9), (16, 20, 9)]


def test_what_fits_is_computed_together_and_the_rest_waits():
    model = build(CONFIGS["no window"])
    counts = passes(model)
    prompts = texts([10, 10, 10, 25, 3, 3])
    answers = generate.generate(model, prompts, max_new_tokens=3, tokens_per_batch=30)
    # Rows that each takes: 12, 12, 12, 27, 5, 5, of 30.
    assert counts == [20, 2, 2, 10, 1, 1, 25, 1, 1, 6, 2, 2]
    assert answers == generate.generate(model, prompts, max_new_tokens=3)
    counts.clear()
    generate.generate(model, texts([10, 50, 3]), max_new_tokens=3, tokens_per_batch=30)
    assert counts == [10, 1, 1, 50, 1, 1, 3, 1, 1]  # one prompt needs more, alone


def test_rows_that_another_sample_sees_are_not_taken():
    model, prompts = build(CONFIGS["no window"]), texts([24, 3, 3])
    options: dict[str, Any] = dict(max_new_tokens=8, samples=3, sampling=Sampling(1.5, seed=1))
    free = generate.generate(model, prompts, **options)
    stop = {free[0][0][1]}  # the first sample, which has the prompt's rows, ends at once, and others wait for rows
    assert not stop & {*free[0][1], *free[0][2]}
    rows = 24 + 7 + 2 * 7  # of the first prompt
    assert generate.generate(model, prompts, **options, stop=stop, tokens_per_batch=rows) == cut(free, stop)


def test_memory_is_bounded_by_the_window():
    config = CONFIGS["dense"]
    caches = []
    model = build(config)
    model.register_forward_pre_hook(lambda module, args, options: caches.append(options["cache"]), with_kwargs=True)
    generate.generate(model, texts([60]), max_new_tokens=200)
    cache = caches[0]
    assert all(other is cache for other in caches)
    assert len(cache.pools) == config.n_layers
    assert all(rows.shape == (7, 2, 8) for pool in cache.pools.values() for rows in pool)
    caches.clear()
    generate.generate(model, texts([60, 3]), max_new_tokens=5, samples=3)
    # The prompt's 7, in which the first sample goes on, and 4 for each other; 3 + 4, and 4 for each other.
    assert caches[0].pools[0][0].shape[0] == (7 + 2 * 4) + (7 + 2 * 4)
    assert caches[0].free == 30
    caches.clear()
    generate.generate(model, alike()[:2], max_new_tokens=4)
    # Of the 30 that both begin with, the 5 of the first's window; and rings of 1 + 3, and of 7.
    assert caches[0].pools[0][0].shape[0] == 5 + (1 + 3) + 7
    assert caches[0].free == 16


def test_the_cache_never_waits_for_its_device():
    groups = [Group(0, 1, 0), Group(1, 3, 2)]
    cache = Cache(np.array([9, 3, 5]), groups, 4, samples=2, growth=5, rows=99, device="meta")  # without values
    for step in range(3):
        layout = cache.advance() if step else cache.begin(0, 2)
        k = torch.empty(len(layout.positions), 2, 8, device="meta")
        cache.layer(0).update(k, k)


def test_random_numbers_are_philoxs():
    where = np.array([0, 7, 2**33 + 1]), np.array([0, 3, 1]), np.array([5, 0, 40_000])
    for seed in (0, 2**62 + 12345):
        key = _C.philox([0x53414D50, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])[:2]
        for u, prompt, sample, position in zip(uniform(seed, *where), *where, strict=True):
            word = _C.philox([int(prompt) & 0xFFFFFFFF, int(prompt) >> 32, int(sample), int(position)], key)[0]
            assert u == (word + 0.5) / 2**32


@pytest.mark.parametrize("top_p", [1.0, 0.7, 1e-9])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 1e-300])
def test_tokens_are_drawn_by_their_probabilities(temperature, top_p):
    logits = torch.tensor([1.0, -2.0, 1.5, float("-inf"), 0.3, 0.0, 1.5])
    probabilities = ((logits - 1.5).double() / temperature).softmax(-1)
    nucleus: list[int] = []
    for token in probabilities.sort(descending=True, stable=True).indices.tolist():
        if probabilities[nucleus].sum() < top_p:
            nucleus.append(token)
    expected = torch.zeros(7, dtype=torch.float64)
    expected[nucleus] = probabilities[nucleus] / probabilities[nucleus].sum()
    n = 40_000
    where = np.zeros(n, np.int64), np.arange(n) % 5, np.arange(n) // 5
    drawn = choose(logits.expand(n, -1), Sampling(temperature, top_p, seed=1), *where)
    shares = drawn.bincount(minlength=7) / n
    assert not shares[expected == 0].any()
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt()).all()


def test_seeds_samples_and_prompts_draw_apart():
    model, prompts = build(CONFIGS["dense"]), [[5, 6, 7]] * 2
    a, b = (
        generate.generate(model, prompts, max_new_tokens=9, samples=2, sampling=Sampling(3.0, seed=s)) for s in (1, 2)
    )
    assert len({tuple(answer) for of in a + b for answer in of}) == 8


def test_steps_come_one_by_one():
    model, prompts = build(CONFIGS["dense"]), texts([4, 2])
    ids: list[list[int]] = [[], []]
    for step in stream(model, prompts, max_new_tokens=5):
        for sequence, token in zip(step.sequences, step.tokens, strict=True):
            ids[sequence].append(int(token))
        assert step.ended.all() == (len(ids[0]) == 5)
        assert not step.stopped.any()
    assert [[answer] for answer in ids] == generate.generate(model, prompts, max_new_tokens=5)


def test_prompts_are_drawn_for_by_their_numbers():
    model, prompts = build(CONFIGS["dense"]), texts([4, 2, 7])
    drawn = partial(generate.generate, model, max_new_tokens=6, sampling=Sampling(temperature=2.0), samples=2)
    whole = drawn(prompts)
    assert [drawn([prompt], numbers=[i])[0] for i, prompt in enumerate(prompts)] == whole
    assert drawn([prompts[0]], numbers=[1])[0] != whole[0]


def test_nothing_to_do():
    assert generate.generate(build(CONFIGS["dense"]), [], max_new_tokens=5) == []


WRONG = {
    "prompt 1 is empty": dict(prompts=[[1], []]),
    "prompt 0 holds the id 89, the model's vocabulary ends at 88": dict(prompts=[[3, 89]]),
    "prompt 0 holds the id -1": dict(prompts=[[-1]]),
    "prompt 0 has 32700 tokens, which with 69 new ones exceeds the model's 32768": dict(
        prompts=[[1] * 32700], max_new_tokens=69
    ),
    "max_new_tokens is 0": dict(max_new_tokens=0),
    "samples is 0": dict(samples=0),
    "tokens_per_batch is 0": dict(tokens_per_batch=0),
    "numbers has 2 entries, expected one for each of the 1 prompts": dict(numbers=[4, 5]),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_named(message):
    options: dict[str, Any] = dict(prompts=[[1]], max_new_tokens=3) | WRONG[message]
    with pytest.raises(ValueError, match=message):
        generate.generate(build(CONFIGS["dense"]), **options)


@pytest.mark.parametrize("values", [dict(temperature=-1.0), dict(top_p=0.0), dict(top_p=1.1), dict(seed=-1)])
def test_wrong_sampling_is_named(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} is"):
        Sampling(**values)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_diverged_model_is_named(temperature, top_p):
    model = build(CONFIGS["dense"])
    with torch.no_grad():
        model.head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="prompt 0: the model's logits are not finite"):
        generate.generate(model, [[1]], max_new_tokens=3, sampling=Sampling(temperature, top_p))
