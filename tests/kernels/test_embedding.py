"""Embedding lookup and its noise: the same bits in torch, Triton and C++, and in every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from tokenmill import _C
from tokenmill.kernels import embedding, launch
from tokenmill.kernels.embedding import Noise, embed, neftune_uniform, philox
from tokenmill.kernels.layout import GHOST, Layout

VOCAB = 50
SEED, STEP = 2**40 + 12345, 2**33 + 7  # both halves of both matter
LENGTHS, IDS = [5, 1, 11], [7, 2**40 + 3, 0]


def lookup(dim: int, dtype: torch.dtype = torch.float32, rows: int = 17) -> tuple[Tensor, Tensor]:
    return torch.randint(VOCAB, (rows,), dtype=torch.int32), torch.randn(VOCAB, dim).to(dtype).requires_grad_()


def grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers of Random123, the authors' library
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    k0, k1 = (torch.tensor(word) for word in key)
    assert [int(word) for word in philox([torch.tensor(word) for word in counter], (k0, k1))] == words


@pytest.mark.parametrize("dim", [1, 3, 4, 20, 130])
def test_uniform_is_that_of_cpp(dim):
    for document in (0, 7, 2**40 + 3):
        expected = torch.from_numpy(np.asarray(_C.neftune_uniform(SEED, STEP, document, 2, 9, dim)))
        ids, positions = torch.full((9,), document), torch.arange(2, 11, dtype=torch.int32)
        uniform = neftune_uniform(torch.tensor(SEED), torch.tensor(STEP), ids, positions, dim)
        assert torch.equal(bits(uniform), bits(expected))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b in ("torch", "triton") for d in (torch.float32, torch.bfloat16, torch.float16)],
)
@pytest.mark.parametrize("dim", [1, 20, 130])
def test_noisy_rows_bit_by_bit(backend, dtype, dim, monkeypatch):
    monkeypatch.setattr(launch, "channels", lambda *_: {"BLOCK": 64, "num_warps": 1})
    tokens, weight = lookup(dim, dtype)
    alpha = 5.1  # no fp32 number
    layout = Layout.from_lengths(LENGTHS, IDS)
    out = embed(tokens, weight, noise=Noise(alpha, SEED, STEP), layout=layout, backend=backend)
    start = 0
    for length, document in zip(LENGTHS, IDS, strict=True):
        uniform = np.asarray(_C.neftune_uniform(SEED, STEP, document, 0, length, dim))
        noise = torch.from_numpy(uniform * np.float32(alpha / np.sqrt(np.float64(length) * dim)))
        rows = weight.detach()[tokens[start : start + length].long()]
        assert torch.equal(bits(out[start : start + length]), bits((rows.float() + noise).to(dtype)))
        start += length


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_document_has_the_same_noise_in_every_layout(backend):
    tokens, weight = lookup(20)
    documents = dict(zip(IDS, tokens.split(LENGTHS), strict=True))

    def rows(ids: list[int]) -> dict[int, Tensor]:
        layout = Layout.from_lengths([len(documents[i]) for i in ids], ids)
        packed = torch.cat([documents[i] for i in ids])
        out = embed(packed, weight, noise=Noise(5.0, SEED, STEP), layout=layout, backend=backend)
        return dict(zip(ids, out.split([len(documents[i]) for i in ids]), strict=True))

    packed, reordered = rows(IDS), rows(IDS[::-1])
    for document in IDS:
        assert torch.equal(packed[document], reordered[document])
        assert torch.equal(packed[document], rows([document])[document])
    later = embed(tokens, weight, noise=Noise(5.0, SEED, STEP + 1), layout=Layout.from_lengths(LENGTHS, IDS))
    assert not torch.isclose(later, torch.cat(list(packed.values()))).any()


def test_noise_has_the_size_of_the_paper():
    length, dim, alpha = 500, 64, 5.0
    tokens, weight = torch.zeros(length, dtype=torch.int32), torch.zeros(1, dim)
    noise = embed(tokens, weight, noise=Noise(alpha, 1, 2), layout=Layout.from_lengths([length]))
    assert noise.abs().max() < alpha / (length * dim) ** 0.5
    assert noise.square().mean().sqrt() == pytest.approx(alpha / (3 * length * dim) ** 0.5, rel=0.01)
    assert abs(noise.mean()) < 0.01 * alpha / (length * dim) ** 0.5


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("alpha", [None, 0.0, torch.tensor(0.0)])
def test_no_noise_leaves_no_trace(backend, alpha):
    tokens, weight = lookup(20)
    weight.data[:, ::2] = -0.0  # which a sum with 0.0 would change
    noise = None if alpha is None else Noise(alpha, SEED, STEP)
    out = embed(tokens, weight, noise=noise, layout=Layout.from_lengths(LENGTHS, IDS), backend=backend)
    assert torch.equal(bits(out), bits(F.embedding(tokens, weight)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_ghost_has_no_noise(backend):
    tokens, weight = lookup(20)
    layout = Layout.from_lengths(LENGTHS, [7, GHOST, 0])
    out = embed(tokens, weight, noise=Noise(5.0, SEED, STEP), layout=layout, backend=backend)
    plain = weight[tokens.long()]
    assert torch.equal(out[5], plain[5])
    assert (out[:5] != plain[:5]).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_numbers_and_device_tensors_are_the_same_noise(backend):
    tokens, weight = lookup(20)
    layout = Layout.from_lengths(LENGTHS, IDS)
    numbers = embed(tokens, weight, noise=Noise(5.0, SEED, STEP), layout=layout, backend=backend)
    for tensors in (
        Noise(torch.tensor(5.0), torch.tensor(SEED), torch.tensor(STEP)),
        Noise(5.0, SEED, torch.tensor(STEP)),
    ):
        assert torch.equal(numbers, embed(tokens, weight, noise=tensors, layout=layout, backend=backend))


def test_noise_of_numbers_starts_nothing_but_the_lookup(monkeypatch):
    """Beside which, on a GPU, each of a dozen small kernels would show. The segments are made once a layout."""
    (tokens, weight), layout = lookup(20), Layout.from_lengths(LENGTHS, IDS)
    weight = weight.detach()
    assert layout.segment_ids.numel() == 17
    computed: list[str] = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            computed.append(func.name())
            if func.namespace != "tokenmill":
                return func(*args, **kwargs or {})
            with self:  # its body, too
                return OPDEFS[func.name()]._init_fn(*args)

    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: computed.append("a kernel"))
    with Recorded():
        embed(tokens, weight, noise=Noise(5.0, SEED, STEP), layout=layout, backend="triton")
    assert computed == ["tokenmill::embed", "aten::new_empty", "a kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 17, 40])
@pytest.mark.parametrize("frequent", [0.0, 0.5, 1.0], ids=["few", "half", "all"])
def test_backward_sums_by_token(dtype, rows, frequent, monkeypatch):
    """Against a sum in fp64, with runs of one id over several pieces."""
    monkeypatch.setattr(launch, "RUN_PIECE", 4)
    tokens, weight = lookup(20, dtype, rows)
    tokens[: int(frequent * rows)] = 7
    tokens = tokens[torch.randperm(rows)]
    upstream = torch.randn(rows, 20).to(dtype)
    embed(tokens, weight, backend="triton").backward(upstream)
    exact = torch.zeros(VOCAB, 20, dtype=torch.float64).index_add_(0, tokens.long(), upstream.double())
    torch.testing.assert_close(grad(weight).double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-6)
    unused = [token for token in range(VOCAB) if token not in tokens]
    assert not grad(weight)[unused].any()


def test_backward_is_repeatable_and_does_not_see_the_noise():
    tokens, weight = lookup(20, rows=70)
    tokens[10:60] = 7
    gradients = []
    for noise in (None, Noise(5.0, SEED, STEP), None):
        weight.grad = None
        out = embed(tokens, weight, noise=noise, layout=Layout.from_lengths([70]), backend="triton")
        out.backward(torch.arange(1400.0).view(70, 20).sin())
        gradients.append(grad(weight))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_backward_of_the_torch_path_is_pytorchs():
    tokens, weight = lookup(20)
    embed(tokens, weight, noise=Noise(5.0, SEED, STEP), layout=Layout.from_lengths(LENGTHS, IDS)).sum().backward()
    assert torch.equal(grad(weight), torch.bincount(tokens, minlength=VOCAB)[:, None].expand(-1, 20).float())


def test_a_token_outside_the_vocabulary_shows_as_nan():
    """And writes nothing, where the host would have to wait for the device to see it."""
    weight = torch.ones(3, 20, requires_grad=True)
    out = embed(torch.tensor([1, 3, -1, 2], dtype=torch.int32), weight, backend="triton")
    out.sum().backward()
    assert out[:, 0].isnan().tolist() == [False, True, True, False]
    assert grad(weight)[:, 0].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("use_triton", [False, True])
def test_operators_are_well_formed(use_triton):
    tokens, weight = lookup(20)
    layout = Layout.from_lengths(LENGTHS, IDS)
    for noise in (Noise(5.0, SEED, STEP), Noise(torch.tensor(5.0), SEED, STEP), Noise(0.0, SEED, STEP)):
        arguments = embedding._noise_arguments(noise, layout, tokens)
        library.opcheck(embedding._embed, (tokens, weight, *arguments, use_triton))
    library.opcheck(embedding._embed_backward, (torch.randn(17, 20), tokens, VOCAB, use_triton))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from within inductor
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(compiler):
    tokens, weight = lookup(20)
    layout = Layout.from_lengths(LENGTHS, IDS)

    def noisy(weight: Tensor, step: Tensor) -> Tensor:
        return embed(tokens, weight, noise=Noise(5.0, SEED, step), layout=layout)

    compiled = torch.compile(noisy, fullgraph=True, backend=compiler)
    out = compiled(weight, torch.tensor(STEP))
    assert torch.equal(out, noisy(weight, torch.tensor(STEP)))
    out.sum().backward()
    assert torch.equal(grad(weight)[:, 0], torch.bincount(tokens, minlength=VOCAB).float())


def test_wrong_input():
    tokens, weight = lookup(20)
    with pytest.raises(ValueError, match="needs a layout"):
        embed(tokens, weight, noise=Noise(5.0, 0, 0))
    with pytest.raises(ValueError, match="the layout has 3 rows, tokens 17"):
        embed(tokens, weight, noise=Noise(5.0, 0, 0), layout=Layout.from_lengths([3]))
    with pytest.raises(ValueError, match="expected tokens"):
        embed(tokens[None], weight)
    with pytest.raises(ValueError, match="alpha is -1"):
        Noise(-1.0, 0, 0)
    with pytest.raises(ValueError, match="seed is -1"):
        Noise(1.0, -1, 0)
