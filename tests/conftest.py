"""Settings of every test: kernels under Triton's interpreter, a fixed seed, one thread."""

from __future__ import annotations

import os

# Triton decides where a kernel is decorated, so this stands before the first import of a kernel.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton.experimental.gluon  # noqa: F401  the first launch would import it, after the variable is gone


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers in each test, whichever ran before; and "auto" means torch: a test that wants an
    interpreted kernel names `backend="triton"`.
    """
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.manual_seed(0)
    torch.set_num_threads(1)
