"""Attention: each backend against float64 over a list of visible keys; what is chosen; what flash is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmill.kernels import attention as package
from tokenmill.kernels.attention import attention, choose, flash, sdpa
from tokenmill.kernels.layout import KeyLayout, Layout, bucket

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
BACKENDS = ["reference", "sdpa"]


def visible_keys(layout: Layout, window: int | None) -> list[list[int]]:
    """For each query the rows of k that it sees, one by one, from the contract's own words."""
    bounds = layout.cu_seqlens.tolist()
    keys = layout.keys
    key_bounds = bounds if keys is None else keys.cu_seqlens.tolist()
    rows = list(range(bounds[-1])) if keys is None else keys.gather.tolist()
    seen = []
    for n in range(len(bounds) - 1):
        segment = rows[key_bounds[n] : key_bounds[n + 1]]
        queries = bounds[n + 1] - bounds[n]
        for i in range(queries):
            upto = segment[: max(0, len(segment) - (queries - 1 - i))]  # the last query sees the last key
            seen.append(upto if window is None else upto[-window:])
    return seen


def oracle(q: Tensor, k: Tensor, v: Tensor, seen: list[list[int]]) -> Tensor:
    group = q.shape[1] // k.shape[1]
    rows = []
    for query, keys in zip(q, seen, strict=True):
        for head in range(q.shape[1]):
            key, value = k[keys, head // group], v[keys, head // group]
            scores = (key * query[head]).sum(-1) / query.shape[-1] ** 0.5
            rows.append((scores.exp() / scores.exp().sum()) @ value)
    return torch.stack(rows).view_as(q)


def tensors(queries: int, keys: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = ((queries, HEADS), (keys, KV_HEADS), (keys, KV_HEADS), (queries, HEADS))
    return [torch.randn(*shape, HEAD_DIM).to(dtype) for shape in shapes]


def results(function, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> list[Tensor]:
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = function(q, k, v)
    return [out, *torch.autograd.grad(out, (q, k, v), d_out)]


def with_keys(lengths: list[int], segments: list[list[int]]) -> Layout:
    """Documents of these lengths whose queries see the given rows of k."""
    sizes = torch.tensor([0, *map(len, segments)], dtype=torch.int32)
    gather = torch.tensor([row for segment in segments for row in segment], dtype=torch.int64)
    plain = Layout.from_lengths(lengths)
    keys = KeyLayout(gather, sizes.cumsum(0, dtype=torch.int32), bucket(int(sizes.max())))
    return Layout(plain.positions, plain.cu_seqlens, plain.max_seqlen, plain.document_ids, plain.document_lengths, keys)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 2, 3, 7, 33, 39, 40, 41, 1000])
def test_equals_the_oracle(backend: str, window: int | None):
    layout = Layout.from_lengths([5, 1, 40, 2, 17, 33, 1])
    inputs = tensors(99, 99)
    seen = visible_keys(layout, window)
    expected = results(lambda q, k, v: oracle(q, k, v, seen), *inputs)
    ours = results(lambda q, k, v: attention(q, k, v, layout, window, backend), *inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[1], [16], [17], [300, 1, 129], [64] * 5], ids=str)
@pytest.mark.parametrize("window", [None, 1, 64, 100, 128])
@pytest.mark.parametrize("heads", [(1, 1), (6, 1), (3, 3)], ids=str)
def test_tiles_equal_the_reference(lengths: list[int], window: int | None, heads: tuple[int, int]):
    layout, tokens = Layout.from_lengths(lengths), sum(lengths)
    inputs = [torch.randn(tokens, heads[i in (1, 2)], 4, dtype=torch.float64) for i in range(4)]
    ours, theirs = (
        results(lambda q, k, v, b=backend: attention(q, k, v, layout, window, b), *inputs) for backend in BACKENDS
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 4, 12])
def test_keys_of_their_own(backend: str, window: int | None):
    prompt = list(range(11))
    layouts = [
        with_keys([11, 4, 1, 6], [prompt, [*prompt, 11, 12, 13, 14], [*prompt, 15], [*prompt, *range(16, 22)]]),
        with_keys([9, 2], [list(range(5, 17)), [17, 18, 19]]),  # a halo of three rows, and of one
        with_keys([1, 1, 1], [[3, 2, 1, 0], [5, 4], [6]]),  # a cache in generation, in any order
        with_keys([3, 5, 2], [[0], [], [1, 2]]),  # queries that see no key
        with_keys([40, 70], [list(range(90)), list(range(90, 170))]),  # several tiles
    ]
    for layout in layouts:
        assert layout.keys is not None
        inputs = tensors(layout.positions.numel(), 180)
        seen = visible_keys(layout, window)
        expected = results(lambda q, k, v, s=seen: oracle(q, k, v, s), *inputs)
        ours = results(lambda q, k, v, at=layout: attention(q, k, v, at, window, backend), *inputs)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 20])
def test_error_is_that_of_pytorch_at_most_twice(dtype: torch.dtype, window: int | None):
    layout = Layout.from_lengths([50, 3, 70])
    inputs = tensors(123, 123, dtype)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        document = layout.segment_ids
        apart = torch.arange(123)[:, None] - torch.arange(123)
        mask = (document[:, None] == document) & (apart >= 0) & (apart < (window or 123))
        heads = (q.transpose(0, 1), *(t.repeat_interleave(2, 1).transpose(0, 1) for t in (k, v)))
        scores = (heads[0] @ heads[1].mT / HEAD_DIM**0.5).masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1) @ heads[2]).transpose(0, 1)

    exact = results(dense, *(t.double() for t in inputs))
    ours, theirs = results(lambda q, k, v: attention(q, k, v, layout, window), *inputs), results(dense, *inputs)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == dtype
        assert (a - e).norm() <= 2 * (b - e).norm()


@pytest.mark.parametrize("window", [None, 8])
def test_a_document_knows_nothing_of_its_neighbours(window: int | None):
    """Exactly: its gradient in theirs is 0, and what is not a number there leaves it whole, forward and backward."""
    layout, middle = Layout.from_lengths([20, 13, 30]), slice(20, 33)
    q, k, v, d_out = tensors(63, 63, torch.float32)
    d_out[:20], d_out[33:] = 0.0, 0.0
    clean = results(lambda q, k, v: attention(q, k, v, layout, window, "sdpa"), q, k, v, d_out)
    for gradient in clean[1:]:
        assert gradient[middle].any()
        assert gradient[:20].abs().max() == 0 == gradient[33:].abs().max()
    for tensor in (q, k, v):
        tensor[:20], tensor[33:] = float("nan"), float("inf")
    poisoned = results(lambda q, k, v: attention(q, k, v, layout, window, "sdpa"), q, k, v, d_out)
    for a, b in zip(poisoned, clean, strict=True):
        assert torch.equal(a[middle], b[middle])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ghosts_empty_segments_and_no_tokens(backend: str):
    empty = torch.tensor([0, 0, 5, 5, 9, 9, 9], dtype=torch.int32)
    layout = Layout(torch.arange(9, dtype=torch.int32), empty, 16, torch.arange(6), empty.diff())
    inputs = tensors(9, 9)
    expected = results(lambda q, k, v: oracle(q, k, v, visible_keys(layout, 3)), *inputs)
    ours = results(lambda q, k, v: attention(q, k, v, layout, 3, backend), *inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    q, k, v, _ = tensors(0, 0)
    assert attention(q, k, v, Layout.from_lengths([]), 3, backend).shape == q.shape


def test_work_grows_with_documents_and_window():
    """Of 4096 tokens: never a mask or a product of 4096 x 4096, unless they are one document without a window."""

    def cells(lengths: list[int], window: int | None) -> tuple[int, int]:
        plan = sdpa._plan(Layout.from_lengths(lengths), window, torch.float32)
        masks = sum(group.mask.numel() for group in plan.groups if group.mask is not None)
        sizes = zip(plan.groups, plan.query_sizes, plan.key_sizes, strict=True)
        return masks, sum(q * k // group.tiles for group, q, k in sizes)

    assert cells([32] * 128, None) == (0, 4096 * 32)
    assert cells([4096], None)[0] == 0
    for lengths in ([4096], [2048, 2048]):
        masks, products = cells(lengths, 256)
        assert masks == products <= 4096 * 320


def test_the_plan_is_made_once(monkeypatch: pytest.MonkeyPatch):
    made = []
    original = sdpa._plan
    monkeypatch.setattr(sdpa, "_plan", lambda *a: made.append(a) or original(*a))
    layout = Layout.from_lengths([4, 3])
    q, k, v, _ = tensors(7, 7)
    for window in (2, 2, None, None):
        attention(q, k, v, layout, window, "sdpa")
    assert len(made) == 2


def test_choice():
    assert choose("auto", "cpu", torch.float32, 64).name == "sdpa"
    assert choose("reference", "cpu", torch.float32, 64).name == "reference"
    with pytest.raises(ValueError, match='attention = "flash" cannot run here: it needs a CUDA device, not cpu'):
        choose("flash", "cpu", torch.bfloat16, 64)
    with pytest.raises(ValueError, match='"flsh" is unknown: expected one of auto, flash, sdpa, reference'):
        choose("flsh", "cpu", torch.float32, 64)


def test_flash_states_what_it_supports(monkeypatch: pytest.MonkeyPatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(flash, "_package", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in (flash.supports(cuda, torch.float16, 128) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "not float32" in (flash.supports(cuda, torch.float32, 128) or "")
    assert "not 264" in (flash.supports(cuda, torch.bfloat16, 264) or "")
    assert flash.supports(cuda, torch.bfloat16, 256) is None
    assert choose("auto", cuda, torch.bfloat16, 128).name == "flash"
    assert str(choose("auto", cuda, torch.bfloat16, 128)) == f"flash of PyTorch {torch.__version__}"
    assert choose("auto", cuda, torch.float32, 128).name == "sdpa"


@pytest.mark.parametrize(("window", "left"), [(None, -1), (1, 0), (4096, 4095)])
@pytest.mark.parametrize("own_keys", [False, True])
def test_flash_package_is_asked_for_the_window_less_the_own_key(
    monkeypatch: pytest.MonkeyPatch, window: int | None, left: int, own_keys: bool
):
    calls: list[Any] = []
    monkeypatch.setattr(flash, "_package", lambda: lambda *args, **kwargs: calls.append((args, kwargs)))
    layout = with_keys([2, 3], [[4, 5, 0], [*range(17)]]) if own_keys else Layout.from_lengths([2, 3])
    q, k, v, _ = tensors(5, 17 if own_keys else 5)
    flash.attend(q, k, v, layout, window)
    (args, kwargs) = calls[0]
    gather = layout.keys.gather if layout.keys is not None else slice(None)
    assert all(torch.equal(a, b) for a, b in zip(args, (q, k[gather], v[gather]), strict=True))
    assert kwargs.pop("cu_seqlens_q").tolist() == [0, 2, 5]
    assert kwargs.pop("cu_seqlens_k").tolist() == ([0, 3, 20] if own_keys else [0, 2, 5])
    longest = 32 if own_keys else 16
    assert kwargs.pop("deterministic") is False
    assert kwargs == {"max_seqlen_q": 16, "max_seqlen_k": longest, "causal": True, "window_size": (left, 0)}
    assert type(kwargs["max_seqlen_k"]) is int


@pytest.mark.parametrize("own_keys", [False, True])
def test_flash_inside_pytorch_is_asked_in_its_own_words(monkeypatch: pytest.MonkeyPatch, own_keys: bool):
    """On tensors without data, this torch's operator takes the arguments by its own schema, and differentiates."""
    monkeypatch.setattr(flash, "_package", lambda: None)
    calls: list[dict[str, Any]] = []
    operator = torch.ops.aten._flash_attention_forward
    names = [argument.name for argument in operator.default._schema.arguments]

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append(dict(zip(names, args, strict=False)) | kwargs)
        return operator(*args, **kwargs)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", record)
    layout = (with_keys([2, 3], [[4, 5, 0], [*range(17)]]) if own_keys else Layout.from_lengths([2, 3])).to("meta")
    q, k, v, d_out = (t.to("meta", torch.bfloat16).requires_grad_() for t in tensors(5, 17 if own_keys else 5))
    out = flash.attend(q, k, v, layout, 3)
    gradients = torch.autograd.grad(out, (q, k, v), d_out)
    assert [t.shape for t in (out, *gradients)] == [t.shape for t in (q, q, k, v)]
    (call,) = calls
    assert call["cum_seq_q"] is layout.cu_seqlens
    assert call["cum_seq_k"] is (layout.keys or layout).cu_seqlens
    assert (call["max_q"], call["max_k"]) == (16, 32 if own_keys else 16)
    assert call["key"].shape[0] == (20 if own_keys else 5)
    assert (call["window_size_left"], call["window_size_right"]) == (2, 0)
    assert (call["dropout_p"], call["is_causal"], call["return_debug_mask"]) == (0.0, True, False)
    assert "scale" not in call  # the operator's own is 1 / sqrt(d)


def test_wrong_input_is_named():
    layout = Layout.from_lengths([4, 3])
    q, k, v, _ = tensors(7, 7)
    with pytest.raises(ValueError, match="q has 6 rows, the layout 7"):
        attention(q[:6], k, v, layout)
    with pytest.raises(ValueError, match="Hkv a divisor of Hq"):
        attention(q[:, :3], k, v, layout)
    with pytest.raises(ValueError, match="k has 6 rows, q 7"):
        attention(q, k[:6], v[:6], layout)
    with pytest.raises(ValueError, match="window is 0"):
        attention(q, k, v, layout, 0)
    chosen = package.choose("auto", "cpu", q.dtype, HEAD_DIM)
    assert torch.equal(attention(q, k, v, layout, 2, chosen), attention(q, k, v, layout, 2))
