"""Every operation against its definition on the device at hand: values, gradients, bits, waiting, compiling, training.

A value is compared with the definition in fp64; it may be off by at most twice what plain PyTorch is in the same
precision, or by the rounding of one product (FLOOR). Memory that an operation allocates and does not write shows as
NaN. Run by `tokenmill.bench.gpu`: each public function takes a Place and returns rows.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill import _C
from tokenmill.bench.gpu import Place
from tokenmill.kernels import cross_entropy as ce
from tokenmill.kernels.embedding import Noise, embed, neftune_uniform
from tokenmill.kernels.layout import IGNORE, KeyLayout, Layout

Rows = list[dict[str, Any]]
Function = Callable[..., Any]

FLOOR = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # relative, by norm
SEED, STEP = 2**40 + 12345, 2**33 + 7  # both halves of both matter
IDS = (7, 2**40 + 3, 0, 12)


# ---------------------------------------------------------------------------------------------------------- comparing


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory is allocated full of NaN (integers: of their largest)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that have no deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def gradients(function: Function, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The outputs of function(*inputs in dtype), and the gradients of its inputs for a fixed upstream gradient."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator(leaves[0].device).manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, upstream)
    return [*(y.detach() for y in outputs), *(x.new_zeros(()) if x.grad is None else x.grad for x in leaves)]


def compared(what: str, dtype: torch.dtype, ours: Function, definition: Function, inputs: Sequence[Tensor]) -> dict:
    """The row of one check. `inputs` are rounded to `dtype` first, so that all three sides see the same numbers."""
    inputs = [x.to(dtype) for x in inputs]
    with poisoned():
        values = gradients(ours, inputs, dtype)
    again = gradients(ours, inputs, dtype)
    plain, exact = gradients(definition, inputs, dtype), gradients(definition, inputs, torch.float64)
    worst = {"error": 0.0, "allowed": FLOOR[dtype], "tensor": 0}
    held = True
    for i, (value, same, truth) in enumerate(zip(values, plain, exact, strict=True)):
        error, allowed = _error(value, truth), max(FLOOR[dtype], 2 * _error(same, truth))
        held &= error <= allowed  # False for NaN
        if not error / allowed <= worst["error"] / worst["allowed"]:
            worst = {"error": error, "allowed": allowed, "tensor": i}
    repeatable = all(torch.equal(a, b) for a, b in zip(values, again, strict=True))
    return {"what": f"{what}, {_name(dtype)}", "held": held, **worst, "repeatable": repeatable}


def _error(value: Tensor, exact: Tensor) -> float:
    if value.shape != exact.shape:
        return float("nan")
    return float((value.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(place: Place) -> list[torch.dtype]:
    return [torch.float32] if place.small else [torch.bfloat16, torch.float32]  # interpreted bf16 is not to be trusted


def _randn(place: Place, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=place.device) * scale


def _layout(place: Place, keys: bool = False) -> Layout:
    """Four documents; with `keys`, each sees 3 rows more than its own, of which the queries' are the last."""
    lengths = [5, 1, 11, 7] if place.small else [300, 1, 513, 210]
    layout = Layout.from_lengths(lengths, IDS)
    if keys:
        spans = [torch.arange(max(0, s - 3), e) for s, e in layout.cu_seqlens.unfold(0, 2, 1).tolist()]
        bounds = torch.tensor([0, *(len(span) for span in spans)]).cumsum(0).int()
        halo = KeyLayout(torch.cat(spans), bounds, layout.max_seqlen + 16)
        layout = Layout(*[getattr(layout, name) for name in _LAYOUT_FIELDS], keys=halo)
    return layout.to(place.device)


_LAYOUT_FIELDS = ("positions", "cu_seqlens", "max_seqlen", "document_ids", "document_lengths")


# ----------------------------------------------------------------------------------------------------- one operation


def noise(place: Place) -> Rows:
    """NEFTune's bits against C++: the uniform numbers, and the sum with the weight in each precision."""
    rows, layout = [], _layout(place)
    lengths = layout.document_lengths.tolist()
    for dim in [20] if place.small else [20, 130, 4096]:
        parts = [_C.neftune_uniform(SEED, STEP, i, 0, n, dim) for i, n in zip(IDS, lengths, strict=True)]
        uniform = torch.from_numpy(np.concatenate(parts))
        seed, step = (torch.tensor(value, device=place.device) for value in (SEED, STEP))
        ids = layout.document_ids[layout.segment_ids]
        made = neftune_uniform(seed, step, ids, layout.positions, dim).cpu()
        rows.append({"what": f"uniform in torch, D {dim}", "held": torch.equal(made, uniform)})
        scales = [np.float32(5.0 / np.sqrt(np.float64(n) * dim)) for n in lengths]
        added = uniform * torch.tensor(np.array(scales)).repeat_interleave(torch.tensor(lengths))[:, None]
        for dtype in _dtypes(place):
            weight = _randn(place, 50, dim).to(dtype)
            tokens = torch.randint(50, (sum(lengths),), dtype=torch.int32, device=place.device)
            with poisoned():
                out = embed(tokens, weight, noise=Noise(5.0, SEED, STEP), layout=layout, backend="triton")
            expected = (weight.cpu()[tokens.cpu().long()].float() + added).to(dtype)
            rows.append({"what": f"noisy rows in Triton, D {dim}, {_name(dtype)}", "held": _same(out, expected)})
    return rows


def _same(a: Tensor, b: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.cpu().view(kind), b.cpu().view(kind))


def cross_entropy(place: Place) -> Rows:
    """The loss and the log-probabilities: rows held whole, rows read twice, several chunks, rows left out."""
    rows = []
    for tokens, dim, vocab in [(17, 20, 301)] if place.small else [(5001, 256, 1003), (515, 512, 32000), (129, 64, 40001)]:
        targets = torch.randint(vocab, (tokens,), device=place.device)
        targets[::5] = IGNORE
        weights = torch.rand(tokens, device=place.device)
        kept = torch.randperm(tokens, device=place.device)[: tokens // 2].sort().values.int()
        masked = torch.full_like(targets, IGNORE)
        masked[kept.long()] = targets[kept.long()]
        inputs = [_randn(place, tokens, dim), _randn(place, vocab, dim, scale=0.5)]
        shape = f"T {tokens} D {dim} V {vocab}"
        for dtype in _dtypes(place):

            def definition(h: Tensor, w: Tensor, targets: Tensor = targets) -> list[Tensor]:
                out = ce.reference(h, w, targets, weights.to(torch.promote_types(h.dtype, torch.float32)), 0.01)
                return [out.loss]

            def ours(h: Tensor, w: Tensor, only: Tensor | None = None) -> list[Tensor]:
                return [ce.linear_cross_entropy(h, w, targets, token_weights=weights, rows=only, z_loss=0.01).loss]

            def definition_logprobs(h: Tensor, w: Tensor) -> Tensor:
                return -F.cross_entropy(ce._wide_logits(h, w), targets, ignore_index=IGNORE, reduction="none")

            rows += [
                compared(f"linear_cross_entropy {shape}", dtype, ours, definition, inputs),
                compared(
                    f"half the rows, {shape}", dtype,
                    lambda h, w: ours(h, w, kept), lambda h, w: definition(h, w, masked), inputs,
                ),
                compared(
                    f"token_logprobs {shape}", dtype,
                    lambda h, w: ce.token_logprobs(h, w, targets), definition_logprobs, inputs,
                ),
            ]  # fmt: skip
    return rows
