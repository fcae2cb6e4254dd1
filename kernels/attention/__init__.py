"""Causal attention inside documents, with a sliding window and shared key heads: one contract, several backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tokenmill.kernels.attention import flash, reference, sdpa
from tokenmill.kernels.layout import Layout

_BACKENDS = {"flash": flash, "sdpa": sdpa, "reference": reference}  # "auto" takes the first that can run


class Backend(NamedTuple):
    """One way to compute `attention`: called as `backend.attend(q, k, v, layout, window)`."""

    name: str
    attend: Callable[[Tensor, Tensor, Tensor, Layout, int | None], Tensor]

    def __str__(self) -> str:
        return f"flash of {flash.source()}" if self.name == "flash" else self.name


def choose(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> Backend:
    """The backend called `name` ("flash", "sdpa" or "reference"), or the best for the device under "auto".

    Raises ValueError where the name is unknown, or the backend cannot run there: the message says why.
    """
    if name != "auto" and name not in _BACKENDS:
        raise ValueError(f'attention = "{name}" is unknown: expected one of auto, {", ".join(_BACKENDS)}')
    reason = None
    for candidate in _BACKENDS if name == "auto" else [name]:
        reason = _BACKENDS[candidate].supports(torch.device(device), dtype, head_dim)
        if reason is None:
            return Backend(candidate, _BACKENDS[candidate].attend)
    raise ValueError(f'attention = "{name}" cannot run here: {reason}; choose another or "auto"')


def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None = None, backend: str | Backend = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, causal within each document and never across.

    q is (T, Hq, d); k and v are (Tkv, Hkv, d), Hkv a divisor of Hq; the result is (T, Hq, d) in q's dtype. A query sees
    the last `window` keys up to its own (all of them if None). With `layout.keys`, k and v are gathered by it and
    segment n of the queries sees segment n of the gathered rows, its last query the last of them. A query that sees no
    key gets 0. `backend` is a name, or what `choose` returned.

    Raises ValueError where shapes do not agree with each other or the layout, or the window is not positive.
    """
    if q.shape[0] != layout.positions.numel():
        raise ValueError(f"attention: q has {q.shape[0]} rows, the layout {layout.positions.numel()}")
    if k.shape != v.shape or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: expected (T, Hq, d) "
            "and twice (Tkv, Hkv, d), Hkv a divisor of Hq"
        )
    if layout.keys is None and k.shape[0] != q.shape[0]:
        raise ValueError(f"attention: k has {k.shape[0]} rows, q {q.shape[0]}, and the layout has no keys of its own")
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}, expected None or at least 1 (a query sees its own key)")
    if isinstance(backend, str):
        backend = choose(backend, q.device, q.dtype, q.shape[2])
    return backend.attend(q, k, v, layout, window)
