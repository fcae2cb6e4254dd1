"""The experts, and the whole layer, by the MegaBlocks package: its dropless layer of GLU experts, on our weights.

What runs is the package's own code: ParallelDroplessMLP with GroupedGLU, and its Triton kernels that gather and scatter
rows. It wants two modules compiled for CUDA, megablocks_ops and grouped_gemm. Where one of them is not installed, it is
given plain PyTorch in its place: a sort, a histogram, a cumulative sum, and a matrix product an expert by torch.mm,
which on a GPU is cuBLAS, as grouped_gemm's own default is. None of tokenmill's kernels has a part in it.

As the package is written, each call waits once for the device, to have the rows of each expert on the host.
Source: Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts" (2022).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from triton import knobs
from triton.runtime import Autotuner

from tokenmill.kernels.backends import INTERPRETED
from tokenmill.kernels.moe.router import Routing

# Its own requirements name an old torch, for its build as well; and where nvcc is found, that compiles for CUDA, unless
# it is told to take the Python files and skip the rest.
INSTALL = (
    'pip install packaging "setuptools>=77,<82" && TORCH_CUDA_ARCH_LIST=9.0 pip install --no-deps --no-build-isolation '
    "-C--global-option=build_py -C--build-option=--skip-build megablocks==0.10.0 stanford-stk==0.7.1"
)

# ---------------------------------------------------------------------------------- in place of the compiled modules


def _sort(x: Tensor, end_bit: int, values: Tensor, order: Tensor) -> None:
    """Only the lowest `end_bit` bits of x are in use, which here does not matter."""
    ordered = x.sort(stable=True)
    values.copy_(ordered.values)
    order.copy_(ordered.indices)


def _histogram(x: Tensor, bins: int) -> Tensor:
    """Not bincount, which waits for the device."""
    return x.new_zeros(bins, dtype=torch.int32).index_add_(0, x, torch.ones_like(x, dtype=torch.int32))


def _inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    torch.cumsum(x, dim, dtype=out.dtype, out=out)


def _product(a: Tensor, b: Tensor, rows: list[int]) -> Tensor:
    """(M, N): a b[e] on the rows of each expert e. a is (M, K), b (E, K, N)."""
    out = a.new_empty(a.shape[0], b.shape[2])
    for left, right, result in zip(a.split(rows), b, out.split(rows), strict=True):
        torch.mm(left, right, out=result)
    return out


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, rows: list[int]) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.rows = rows
        return _product(a, b, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (a, b), (dy,) = ctx.saved_tensors, gradients
        d_a = _product(dy, b.mT, ctx.rows) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return d_a, None, None
        d_b = torch.empty_like(b)  # with b's strides, so that a transposed weight's gradient need not be turned around
        for left, right, result in zip(a.split(ctx.rows), dy.split(ctx.rows), d_b, strict=True):
            torch.mm(left.T, right, out=result)
        return d_a, d_b, None


def _grouped_product(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """a b[e], or a b[e]^T, on the rows of each expert e. `batch_sizes` (E,) are on the host, as cuBLAS wants them."""
    return _GroupedProduct.apply(a, b.mT if trans_b else b, batch_sizes.tolist())  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------- the package


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


@contextlib.contextmanager
def _compiled_modules() -> Iterator[None]:
    """While it is imported, the package finds both modules, and keeps what it found. What stands in for one that is not
    installed is gone afterwards: nobody else takes it for the real one.
    """
    products = _module("grouped_gemm.ops", gmm=_grouped_product)
    stand_ins = {
        "megablocks_ops": _module(
            "megablocks_ops", sort=_sort, histogram=_histogram, inclusive_cumsum=_inclusive_cumsum
        ),
        "grouped_gemm": _module("grouped_gemm", ops=products, backend=None),
    }
    placed = []
    for name, stand_in in stand_ins.items():
        try:
            importlib.import_module(name)
        except ImportError:  # also where it was compiled for another torch
            sys.modules[name] = stand_in
            placed.append(name)
    try:
        yield
    finally:
        for name in placed:
            del sys.modules[name]


@functools.cache
def _package() -> ModuleType | str:
    """The package, or why it cannot be imported."""
    try:
        with _compiled_modules(), knobs.runtime.scope(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.script, which newer versions of torch avoid
            knobs.runtime.interpret = INTERPRETED  # as tokenmill's own kernels
            package = importlib.import_module("megablocks")
    except ImportError as error:
        return str(error)
    if INTERPRETED:  # nothing can be timed there, so each kernel keeps its first configuration
        for kernel in vars(package.backend.kernels).values():
            if isinstance(kernel, Autotuner):
                del kernel.configs[1:]
    return package


def _loaded() -> Any:
    package = _package()
    if isinstance(package, str):
        raise ImportError(f"megablocks cannot be imported ({package}); install it by: {INSTALL}")
    return package


def source() -> str:
    """Which package runs, and by whose matrix products."""
    real = _real_products()
    products = f"grouped_gemm {metadata.version('grouped_gemm')}" if real else f"torch.mm {torch.__version__}"
    return f"megablocks {metadata.version('megablocks')} with {products}"


def _real_products() -> bool:
    """Whether its matrix products are the package grouped_gemm's."""
    return _loaded().grouped_gemm_util.ops.gmm is not _grouped_product


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why MegaBlocks cannot run, or None where it can."""
    if device.type != "cuda" and not INTERPRETED:
        return f"its Triton kernels need a CUDA device, not {device.type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    package = _package()
    if isinstance(package, str):
        return f"{package}; install it by: {INSTALL}"
    if _real_products() and dtype != torch.bfloat16:
        return f"with the package grouped_gemm it computes bfloat16 alone, not {str(dtype).removeprefix('torch.')}"
    return None


@functools.cache
def _layer(dim: int, num_experts: int, top_k: int) -> nn.Module:
    """The package's layer without weights: each call brings them. So its ffn_hidden_size does not matter."""
    package = _loaded()
    arguments = package.Arguments(
        hidden_size=dim,
        moe_num_experts=num_experts,
        moe_top_k=top_k,
        moe_loss_weight=0,  # else it keeps every forward pass's scores in a global list
        activation_fn=F.silu,
        mlp_type="glu",
        mlp_impl="grouped",
        bias=False,
        return_bias=False,
        fp16=False,
        device="meta",
    )
    return package.ParallelDroplessMLP(arguments)


def _weights(w_gate_up: Tensor, w_down: Tensor) -> dict[str, Tensor]:
    """Its names for ours, each (E, F, D): views, or copies for the package grouped_gemm, which takes no others. In
    backward, one copy joins w_gate_up's gradient.
    """
    gate, up = w_gate_up.chunk(2, dim=1)
    weights = {"w1": gate, "v1": up, "w2": w_down.mT}
    return {name: w.contiguous() for name, w in weights.items()} if _real_products() else weights


# ------------------------------------------------------------------------------------------------- what runs of it

# Its code is not made to be traced by torch.compile.
_as_it_is: Any = torch.compiler.disable


@_as_it_is
def experts(xs: Tensor, offsets: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """See `experts` in this package: GroupedGLU alone. Waits for the device, for the number of rows of each expert."""
    glu: Any = _layer(xs.shape[1], len(offsets), 1).mlp
    counts = offsets.diff(prepend=offsets.new_zeros(1))
    return functional_call(glu, _weights(w_gate_up, w_down), (xs, counts))


@_as_it_is
def layer(x: Tensor, routing: Routing, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """`permute`, `experts` and `combine` in one, x (T, D) to (T, D): all of ParallelDroplessMLP, after our router.

    A token's weighted rows are rounded to x's dtype before they are summed, and so is the gradient of routing.weights;
    `combine` keeps both in float32. Waits for the device as `experts`.
    """
    dropless = _layer(x.shape[1], len(w_down), routing.experts.shape[1])
    parameters = {f"mlp.{name}": weight for name, weight in _weights(w_gate_up, w_down).items()}
    # Its kernels take rows to lie one behind the other. None: the scores for its balancing loss.
    return functional_call(dropless, parameters, (x.contiguous(), None, routing.weights, routing.experts))
