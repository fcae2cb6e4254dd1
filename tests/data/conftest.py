"""What the tests of the data share: a small tokenizer and a small stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tokenmill.data.stream import TokenStream
from tokenmill.data.tokenizer import Tokenizer, train_tokenizer
from tokenmill.data.writer import StreamWriter


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of 300 pieces."""
    texts = [f"The patient number {i} has a fever of {36 + i % 5} degrees.\n" for i in range(200)]
    return train_tokenizer(texts, 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def make_stream(tmp_path: Path, small: Tokenizer):
    """A function that writes documents of random tokens, of given lengths, as a stream; `masks` is for random ones."""

    def make(lengths, name: str = "stream", *, masks: bool = False, seed: int = 0, **options) -> TokenStream:
        rng = np.random.default_rng(seed)
        with StreamWriter(tmp_path / name, small, **options) as writer:
            for i, length in enumerate(lengths):
                mask = rng.random(length) < 0.6 if masks else None
                writer.add(rng.integers(0, small.vocab_size, length), mask, source=f"source{i % 2}")
        return TokenStream.open(tmp_path / name)

    return make
