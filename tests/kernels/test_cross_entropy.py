"""Linear cross-entropy and token log-probabilities against their definition in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func, nop
from torch import Tensor, library
from torch._dynamo.backends.common import aot_autograd

from tokenmill.kernels import cross_entropy, launch
from tokenmill.kernels.cross_entropy import IGNORE, LossOutput, linear_cross_entropy, reference, token_logprobs

DIM, VOCAB = 20, 301
BACKENDS = [
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    ("triton", torch.float32),
    ("triton", torch.float16),
]


def problem(rows: int, dtype: torch.dtype, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets of which some are left out, and token weights."""
    hidden = torch.randn(rows, DIM).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, DIM) / 2).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,))
    targets[::5] = IGNORE if rows > 1 else targets[::5]
    return hidden, weight, targets, torch.rand(rows)


def as_leaves(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in tensors]


def grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def assert_as_close(values: list[Tensor], same_precision: list[Tensor], exact: list[Tensor]) -> None:
    """At most twice the error of PyTorch in the same precision, or the design's bound for fp32."""
    for value, peer, truth in zip(values, same_precision, exact, strict=True):
        assert error(value, truth) <= max(2 * error(peer, truth), 1e-10 if value.dtype == torch.float64 else 2e-6)


@pytest.fixture(params=["once", "twice"])
def reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that holds a row, and the one that reads it twice, in blocks that the vocabulary does not fill."""
    if request.param == "twice":
        monkeypatch.setattr(launch, "SINGLE_READ_LIMIT", 300)
        monkeypatch.setattr(launch, "WIDE_ROW_BLOCK", 128)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cross_entropy_chunk", lambda *_: 7)


@pytest.mark.usefixtures("reads", "small_chunks")
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("rows", [1, 17, 129])
def test_loss_and_gradients(backend, dtype, rows):
    hidden, weight, targets, token_weights = problem(rows, dtype)
    z_loss = 0.01

    def run(dtype: torch.dtype) -> tuple[list[Tensor], LossOutput]:
        h, w = as_leaves(dtype, hidden, weight)
        out = reference(h, w, targets, token_weights.to(torch.promote_types(dtype, torch.float32)), z_loss)
        (out.loss * 0.3).backward()
        return [out.loss.detach(), out.nll, out.entropy, grad(h), grad(w)], out

    out = linear_cross_entropy(hidden, weight, targets, token_weights=token_weights, z_loss=z_loss, backend=backend)
    (out.loss * 0.3).backward()
    (same, peer), (exact, _) = run(dtype), run(torch.float64)
    assert_as_close([out.loss.detach(), out.nll, out.entropy, grad(hidden), grad(weight)], same, exact)
    assert torch.equal(out.correct, peer.correct)
    assert not out.nll.requires_grad
    assert not out.entropy.requires_grad
    assert out.loss.dtype == out.nll.dtype == out.entropy.dtype == torch.promote_types(dtype, torch.float32)

    evaluated = linear_cross_entropy(  # by another kernel
        hidden.detach(), weight.detach(), targets, token_weights=token_weights, z_loss=z_loss, backend=backend
    )
    assert_as_close([evaluated.loss, evaluated.nll, evaluated.entropy], same[:3], exact[:3])
    assert torch.equal(evaluated.correct, peer.correct)
    assert out.correct.dtype == torch.bool


@pytest.mark.usefixtures("reads", "small_chunks")
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("rows", [1, 129])
def test_logprobs_and_gradients(backend, dtype, rows):
    hidden, weight, targets, upstream = problem(rows, dtype)
    upstream = upstream - 0.5

    def run(dtype: torch.dtype) -> list[Tensor]:
        h, w = as_leaves(dtype, hidden, weight)
        every = (h @ w.T).to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)
        logprobs = every.gather(1, targets.clamp_min(0)[:, None])[:, 0] * (targets != IGNORE)
        logprobs.backward(upstream.to(logprobs.dtype))
        return [logprobs.detach(), grad(h), grad(w)]

    logprobs = token_logprobs(hidden, weight, targets, backend=backend)
    logprobs.backward(upstream.to(logprobs.dtype))
    assert_as_close([logprobs.detach(), grad(hidden), grad(weight)], run(dtype), run(torch.float64))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("left", [0, 1, 9])
def test_rows_left_out(backend, left):
    """As if the others' targets were IGNORE; and they get no gradient, not even a rounded one."""
    hidden, weight, targets, token_weights = problem(18, torch.float32)
    rows = torch.randperm(18)[:left].sort().values.int()
    masked = torch.full_like(targets, IGNORE)
    masked[rows] = targets[rows]
    others = torch.tensor([row for row in range(18) if row not in rows], dtype=torch.int64)
    h, w = as_leaves(torch.float32, hidden, weight)

    expected = linear_cross_entropy(h, w, masked, token_weights=token_weights, backend="torch")
    expected.loss.backward()
    out = linear_cross_entropy(hidden, weight, targets, token_weights=token_weights, rows=rows, backend=backend)
    out.loss.backward()
    for value, exact in (
        (out.loss, expected.loss),
        (out.nll, expected.nll),
        (out.entropy, expected.entropy),
        (grad(hidden), grad(h)),
        (grad(weight), grad(w)),
    ):
        torch.testing.assert_close(value, exact, rtol=2e-6, atol=2e-6)
    assert torch.equal(out.correct, expected.correct)
    assert not grad(hidden)[others].any()
    assert not out.nll[others].any()
    assert not out.entropy[others].any()

    h, w = as_leaves(torch.float32, hidden, weight)
    logprobs = token_logprobs(h, w, targets, rows=rows, backend=backend)
    logprobs.backward(torch.ones(18))
    torch.testing.assert_close(logprobs, -expected.nll, rtol=2e-6, atol=2e-6)
    assert not grad(h)[others].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_all_targets_left_out(backend):
    hidden, weight, targets, _ = problem(17, torch.float32)
    targets.fill_(IGNORE)
    out = linear_cross_entropy(hidden, weight, targets, z_loss=1.0, backend=backend)
    (out.loss + token_logprobs(hidden, weight, targets, backend=backend).sum()).backward()
    for tensor in (out.loss, out.nll, out.correct, out.entropy, grad(hidden), grad(weight)):
        assert not tensor.any()


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_first_of_equal_logits_is_the_prediction(backend):
    hidden, weight = torch.ones(4, DIM), torch.zeros(VOCAB, DIM)
    weight[[70, 198, 200]] = 1.0  # 198 is 70 of the next block
    out = linear_cross_entropy(hidden, weight, torch.tensor([0, 70, 200, IGNORE]), backend=backend)
    assert out.correct.tolist() == [False, True, False, False]
    out = linear_cross_entropy(hidden, weight * 0, torch.tensor([0, 1, 300, IGNORE]), backend=backend)
    assert out.correct.tolist() == [True, False, False, False]


@pytest.mark.usefixtures("reads")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_extreme_logits(backend):
    """A target whose probability underflows, and one that is certain."""
    hidden, weight = torch.tensor([[1000.0]]).repeat(2, 1).requires_grad_(), torch.zeros(VOCAB, 1, requires_grad=True)
    weight.data[100] = 1.0
    out = linear_cross_entropy(hidden, weight, torch.tensor([3, 100]), backend=backend)
    out.loss.backward()
    assert out.nll.tolist() == [1000.0, 0.0]
    assert out.entropy.tolist() == [0.0, 0.0]
    assert grad(weight)[3] == -1000.0
    assert grad(weight)[100] == 1000.0


def test_a_target_outside_the_vocabulary_shows_as_nan():
    """Where the host would have to wait for the device to see it."""
    hidden, weight, targets, _ = problem(3, torch.float32)
    out = linear_cross_entropy(hidden, weight, targets.fill_(VOCAB), backend="triton")
    assert out.loss.isnan()


@pytest.mark.usefixtures("small_chunks")
def test_products_and_memory():
    """Three products a chunk to train, two with a frozen weight, one to evaluate, four for log-probabilities; and no
    tensor of all logits.
    """
    hidden, weight, targets, _ = problem(14, torch.float32)

    def products(use: Callable[[], object]) -> float:
        with torch.profiler.profile(record_shapes=True, acc_events=True) as profile:
            use()
        events = profile.key_averages(group_by_input_shape=True)
        assert not any([14, VOCAB] in (event.input_shapes or []) for event in events)
        return sum(event.count for event in events if event.key in ("aten::mm", "aten::addmm_")) / 2  # two chunks

    assert products(lambda: linear_cross_entropy(hidden, weight, targets).loss.backward()) == 3
    assert products(lambda: linear_cross_entropy(hidden, weight.detach(), targets).loss.backward()) == 2
    assert products(lambda: linear_cross_entropy(hidden.detach(), weight.detach(), targets)) == 1
    assert products(torch.no_grad()(lambda: linear_cross_entropy(hidden, weight, targets))) == 1
    assert products(lambda: token_logprobs(hidden, weight, targets).sum().backward()) == 4


@pytest.mark.usefixtures("reads", "small_chunks")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_repeated_bit_by_bit(backend):
    hidden, weight, targets, token_weights = problem(17, torch.float32)

    def run() -> list[Tensor]:
        h, w = as_leaves(torch.float32, hidden, weight)
        out = linear_cross_entropy(h, w, targets, token_weights=token_weights, z_loss=0.01, backend=backend)
        (out.loss + token_logprobs(h, w, targets, backend=backend).square().sum()).backward()
        return [*out, grad(h), grad(w)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), ("torch", torch.bfloat16), ("triton", torch.float32)]
)
def test_a_gradient_added_where_it_belongs(backend, dtype):
    """In two micro-batches; nothing by autograd."""
    hidden, weight, targets, token_weights = problem(17, dtype)
    h, w = as_leaves(dtype, hidden, weight)
    w.grad_dtype = torch.promote_types(dtype, torch.float32)
    total = torch.zeros_like(w, dtype=w.grad_dtype)
    for part in (slice(0, 9), slice(9, 17)):
        rest, weights = targets[part], token_weights[part]
        linear_cross_entropy(h[part], w, rest, token_weights=weights, backend=backend).loss.backward()
        out = linear_cross_entropy(
            hidden[part], weight, rest, token_weights=weights, weight_grad=total, backend=backend
        )
        out.loss.backward()
    assert weight.grad is None
    torch.testing.assert_close(total, grad(w))
    assert torch.equal(grad(hidden), grad(h))


def test_a_gradient_scaled_in_place_is_given_only_once():
    hidden, weight, targets, _ = problem(5, torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets, backend="triton").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_on_a_cpu_gradients_stand_up_to_gradcheck_and_can_be_asked_for_twice():
    hidden, weight, targets, _ = problem(5, torch.float64, vocab=31)
    weights = torch.rand(targets.shape[0], dtype=torch.float64)
    function = lambda h, w: linear_cross_entropy(h, w, targets, token_weights=weights, z_loss=0.1).loss  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden, weight))
    out = function(hidden, weight)
    (first,) = torch.autograd.grad(out, hidden, retain_graph=True)
    (again,) = torch.autograd.grad(out, hidden)
    assert torch.equal(first, again)


@pytest.mark.parametrize("use_triton", [False, True])
def test_operators_are_well_formed(use_triton):
    hidden, weight, targets, token_weights = problem(5, torch.float32)
    rows = torch.tensor([0, 2, 3], dtype=torch.int32)
    h, w = hidden.detach(), weight.detach()
    for given in (None, torch.ones_like(w)):
        loss_args = (h, w, targets, token_weights, rows, 0.1, True, given is None, given, use_triton)
        library.opcheck(cross_entropy._linear_cross_entropy, loss_args)
    attached = (torch.tensor(2.0), hidden, weight, torch.ones_like(h), torch.ones_like(w), use_triton)
    # The remaining check would have backward scale gradients that the caller holds; the public function keeps them.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    library.opcheck(cross_entropy._with_gradients, attached, test_utils=checks)
    library.opcheck(cross_entropy._scale_, (torch.ones(5), torch.tensor(2.0)))
    library.opcheck(cross_entropy._token_logprobs, (hidden, weight, targets, rows, use_triton))
    frozen = (torch.ones(5), h, w, targets, rows, torch.ones(3), True, False, use_triton)
    library.opcheck(cross_entropy._token_logprobs_backward, frozen)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from within inductor
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(compiler):
    hidden, weight, targets, token_weights = problem(17, torch.float32)
    rows = torch.arange(0, 17, 2, dtype=torch.int32)

    def step(h: Tensor, w: Tensor) -> Tensor:
        out = linear_cross_entropy(h * 2, w, targets, token_weights=token_weights, rows=rows, z_loss=0.01)
        rest = out.nll.sum() + out.entropy.square().sum()
        return out.loss / 3 + token_logprobs(h, w, targets).square().sum() + rest

    h, w = as_leaves(torch.float32, hidden, weight)
    expected = step(h, w)
    expected.backward()
    out = torch.compile(step, fullgraph=True, backend=compiler)(hidden, weight)
    out.backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad(hidden), grad(h))
    torch.testing.assert_close(grad(weight), grad(w))


def test_a_compiled_backward_scales_out_of_place():
    """What is changed in place would be copied first: on a GPU the gradient of the weight, once more."""
    hidden, weight, targets, _ = problem(5, torch.float32)
    operations: list[str] = []

    def recorded(graph: torch.fx.GraphModule, inputs: object) -> object:
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def third(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, targets, backend="triton").loss / 3

    h, w = as_leaves(torch.float32, hidden, weight)
    third(h, w).backward()
    compiler = aot_autograd(fw_compiler=nop, bw_compiler=recorded)
    torch.compile(third, fullgraph=True, backend=compiler)(hidden, weight).backward()
    assert operations.count("aten.mul.Tensor") == 2
    assert not any("functionalized" in operation for operation in operations)
    torch.testing.assert_close(grad(hidden), grad(h))
    torch.testing.assert_close(grad(weight), grad(w))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(9, DIM + 1)}, "hidden .T, D. and weight .V, D."),
        ({"weight": torch.zeros(9, DIM, dtype=torch.float16)}, "cast one"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "targets: expected torch.int64"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets: expected torch.int64"),
        ({"targets": torch.tensor([0, 9, 1])}, "target 9 is outside the vocabulary of 9"),
        ({"targets": torch.tensor([0, -1, 1])}, "target -1"),
        ({"token_weights": torch.ones(3, dtype=torch.float64)}, "token_weights: expected torch.float32"),
        ({"rows": torch.ones(2)}, "rows: expected int32"),
        ({"weight_grad": torch.zeros(9, DIM, dtype=torch.float16)}, "weight_grad: expected torch.float32"),
        ({"backend": "cuda"}, "expected 'auto', 'triton' or 'torch'"),
    ],
)
def test_wrong_input(change, message):
    good = {"hidden": torch.zeros(3, DIM), "weight": torch.zeros(9, DIM), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(good | change))
