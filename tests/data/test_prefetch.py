"""Steps made ahead: the same as without, errors where they belong, and nothing that hangs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from tokenmill.data.batch import Batch
from tokenmill.data.errors import DataError
from tokenmill.data.loader import Loader, Source
from tokenmill.data.prefetch import Prefetch

CPU = torch.device("cpu")


@pytest.fixture
def make_loader(make_stream):
    stream = make_stream([5, 9, 3, 40, 12, 7, 8, 2, 31, 16, 16, 16, 10, 70], masks=True)

    def make(**changes) -> Loader:
        options = {"sequence_length": 16, "packs_per_step": 4, "packs_per_micro_batch": 2, "seed": 3}
        return Loader([Source(stream, epochs=changes.pop("epochs", None))], **{**options, **changes})

    return make


def test_the_same_steps_and_the_state_of_the_step_that_was_taken(make_loader):
    alone, prefetch = make_loader(), Prefetch(make_loader(), CPU)
    step = None
    for _ in range(12):
        want = next(alone)
        step, batches = next(prefetch)
        assert step.samples == want.samples
        assert step.state == want.state == alone.state_dict()
        for got, batch in zip(batches, want.micro_batches, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got.tensors(), batch.tensors(), strict=True))
    prefetch.close()
    resumed = make_loader()
    assert step is not None
    resumed.load_state_dict(step.state)
    assert next(resumed).samples == next(alone).samples


def test_a_batch_names_all_its_tensors():
    batch = Batch.from_documents([[1, 2, 3], [4, 5]])
    assert len(batch.tensors()) == 9
    assert {t.data_ptr() for t in batch.tensors()} >= {batch.tokens.data_ptr(), batch.layout.positions.data_ptr()}


def test_an_error_comes_at_its_step_and_again(make_loader, monkeypatch):
    loader = make_loader()
    whole = Loader._batch

    def damaged(self, sources, packs):
        if self.samples >= 8:
            raise DataError("block 7 is damaged")
        return whole(self, sources, packs)

    monkeypatch.setattr(Loader, "_batch", damaged)
    prefetch = Prefetch(loader, CPU)
    assert [next(prefetch)[0].samples.start for _ in range(2)] == [0, 4]
    for _ in range(2):
        with pytest.raises(DataError, match="block 7 is damaged"):
            next(prefetch)
    prefetch.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_it_ends_where_the_sources_do(make_loader):
    loader = make_loader(epochs=2)
    samples = [step.samples for step, _ in Prefetch(loader, CPU)]
    assert len(samples) == loader.steps
    assert samples[-1].stop == 2 * loader.packs_per_epoch


@pytest.mark.parametrize(
    "end", ["pass", "raise ValueError('in training')", "prefetch.close()", "raise KeyboardInterrupt"]
)
def test_nothing_hangs_at_exit(make_loader, end, tmp_path):
    folder = make_loader().sources[0].stream.folder
    script = f"""
        import torch
        from tokenmill.data.loader import Loader, Source
        from tokenmill.data.prefetch import Prefetch
        from tokenmill.data.stream import TokenStream
        sources = [Source(TokenStream.open({str(folder)!r}))]
        loader = Loader(sources, sequence_length=16, packs_per_step=4, packs_per_micro_batch=2, seed=0)
        prefetch = Prefetch(loader, torch.device("cpu"))
        next(prefetch)
        print("trained", flush=True)
        {end}
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "trained\n"
    assert (done.returncode == 0) == (not end.startswith("raise"))
