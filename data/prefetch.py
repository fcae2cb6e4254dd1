"""Steps made ahead: while one is trained on, a thread makes the next and, where there is a GPU, copies it there."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from tokenmill.data.batch import Batch
from tokenmill.data.loader import StepData

Ready = tuple[StepData, list[Batch]]  # a step, and its micro-batches on the device


class Prefetch:
    """`next(prefetch)` is the next of `steps`, usually a `Loader`'s, one step early: the same steps in the same order,
    and an error is raised where its step would have come. They belong to the thread from then on: the state of the data
    is that of the last step taken, `StepData.state`."""

    def __init__(self, steps: Iterator[StepData], device: torch.device) -> None:
        self._steps = steps
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # beside the training's own
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._coming: Future[tuple[Ready, Any]] | None = None

    def __iter__(self) -> Iterator[Ready]:
        return self

    def __next__(self) -> Ready:
        coming = self._coming or self._thread.submit(self._make)
        self._coming = None
        ready, copied = coming.result()
        self._coming = self._thread.submit(self._make)
        if copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            for batch in ready[1]:
                for tensor in batch.tensors():
                    tensor.record_stream(current)  # made on another stream: not to be given away while in use here
        return ready

    def close(self) -> None:
        """Drop what was made ahead and end the thread, after the step that it is at."""
        self._thread.shutdown(cancel_futures=True)

    def _make(self) -> tuple[Ready, Any]:
        with torch.cuda.stream(self._stream):  # which also makes its device this thread's: pinned memory belongs to one
            step = next(self._steps)
            batches = [batch.to(self._device, non_blocking=True) for batch in step.micro_batches]
            return (step, batches), None if self._stream is None else self._stream.record_event()
