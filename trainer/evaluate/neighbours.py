"""The nearest questions to a question: embeddings by the model itself, and an exact search among them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tokenmill.data.batch import Batch
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.evaluate.likelihood import batches
from tokenmill.trainer.model import Transformer

AT_ONCE = 1 << 23  # similarities, 64 MiB of them


@torch.no_grad()
def embeddings(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], *, tokens_per_batch: int = 8192
) -> NDArray[np.float64]:
    """(N, D): of each text alone, after BOS and without a template, the mean of the final hidden states (behind the
    last norm) over its tokens. BOS is left out: it sees nothing of the text. Longest first, in batches of at most
    `tokens_per_batch` tokens."""
    device = next(model.parameters()).device
    documents = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    found = np.empty((len(texts), model.config.dim))
    for group in batches([len(document) for document in documents], tokens_per_batch):
        batch = Batch.from_documents([documents[i] for i in group]).to(device)
        hidden = model(batch.tokens, batch.layout).hidden.float()
        means = [part[1:].mean(0) for part in hidden.split([len(documents[i]) for i in group])]
        found[group] = torch.stack(means).cpu().numpy()
    return found


def nearest(queries: NDArray[np.float64], pool: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """(Q, k): for each of the queries (Q, D), the rows of `pool` (P, D) most similar by cosine, the most similar first,
    of identical rows the first in the pool; all of them where P < k. Exact: every pair is compared, in fp64."""
    unit = pool / np.maximum(np.linalg.norm(pool, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    # A matrix product rounds by a row's place. Identical rows take the similarity of the first, so that they are equal.
    firsts: dict[bytes, int] = {}
    same = [firsts.setdefault(row.tobytes(), i) for i, row in enumerate(unit)]
    step = max(1, AT_ONCE // max(1, len(pool)))
    found = [np.empty((0, min(k, len(pool))), np.int64)]
    for i in range(0, len(queries), step):
        similar = (queries[i : i + step] @ unit.T)[:, same]  # but for the query's own length, which changes no order
        found.append(np.argsort(-similar, axis=1, kind="stable")[:, :k])
    return np.concatenate(found)
