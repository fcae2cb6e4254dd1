"""Epochs that stop at one world size and go on at another, beside other projects' loaders: a case of `bench data`.

For every pair of world sizes, each side gives an epoch of the same number of samples: some steps at the first size, and
from what a checkpoint would keep the rest at the second. An epoch is whole where it has each sample once; its order is
right where it is that of an epoch on one rank that nothing stops. Every world size divides a step, as peers need it.
"""

from __future__ import annotations

import json
import random
from contextlib import closing
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np

from tokenmill.bench import data_peers
from tokenmill.bench.environments import RESUMERS, NotMeasured, write_facts
from tokenmill.bench.turns import OURS, Arrays, Bench, Row, start
from tokenmill.data.loader import Loader, Source
from tokenmill.data.stream import TokenStream
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.data.writer import StreamWriter
from tokenmill.kernels.layout import GHOST

WORLDS = (1, 2, 3, 4, 6, 7, 8)
LENGTH = 16  # tokens of a sample


def resume(bench: Bench, tokenizer: Tokenizer) -> list[Row]:
    """A row a side: how many epochs are whole, and what is wrong with the others."""
    worlds, samples, step = ((1, 2, 3), 50, 12) if bench.small else (WORLDS, 1000, 168)
    draw = random.Random(0)
    stopped = [[(one, draw.randrange(1, samples // step)), (other, None)] for one, other in product(worlds, worlds)]
    facts, folder = {"samples": samples, "step": step, "plans": [[(1, None)], *stopped]}, bench.work / "resume"
    write_facts(folder, facts)
    about = {"case": "resume", "data": f"{samples:,} samples", "unit": f"whole epochs of {len(stopped)}"}
    work = _ours(folder / "stream", tokenizer, facts)
    row: Row = {**about, "what": OURS, **judged(work.result(work.run()), samples)}
    row |= {"target": "all whole, in one order"} | ({} if bench.small else {"met": row["same"]})
    rows = [row]
    for peer in RESUMERS:
        row = {**about, "what": peer.name, "note": peer.gives}
        try:
            with closing(start(bench, peer, folder)) as process, np.load(process.result) as result:
                row |= {"version": process.version, **judged(result, samples)}
        except NotMeasured as error:
            row["note"] = f"not measured: {error}"
        rows.append(row)
    return rows


def judged(result: Arrays, samples: int) -> Row:
    """What a row says of epochs, laid out as in data_peers.py, the first of which nothing stopped."""
    given = iter(result["samples"].tolist())
    steps = iter([[*islice(given, int(size))] for size in result["steps"]])
    alone, *stopped = [[*islice(steps, int(size))] for size in result["epochs"]]
    times = np.stack([np.bincount([i for step in epoch for i in step], minlength=samples) for epoch in stopped])
    whole = int(np.all(times == 1, axis=1).sum())
    ordered = sum(epoch == alone for epoch in stopped)
    return {
        "rate": whole,
        "same": whole == ordered == len(stopped),
        "twice": int((times - 1).clip(0).sum()),
        "missed": int((times == 0).sum()),
        "same steps": sum([*map(sorted, epoch)] == [*map(sorted, alone)] for epoch in stopped),
        "same order": ordered,
    }


def _ours(folder: Path, tokenizer: Tokenizer, facts: dict[str, Any]) -> data_peers.Work:
    """A stream whose documents are samples: each fills a pack."""
    with StreamWriter(folder, tokenizer) as writer:
        for _ in range(facts["samples"]):
            writer.add(np.arange(LENGTH), source="made")
    source = Source(TokenStream.open(folder), epochs=1)

    def segment(world: int, count: int | None, state: Any) -> tuple[data_peers.Steps, Any]:
        ranks = [
            Loader(
                [source], sequence_length=LENGTH, packs_per_step=facts["step"], packs_per_micro_batch=32, seed=0,
                rank=rank, world=world,
            )
            for rank in range(world)
        ]  # fmt: skip
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        steps = []
        for parts in islice(zip(*ranks, strict=True), count):
            batches = [batch for part in parts for batch in part.micro_batches]
            steps.append([i for batch in batches for i in batch.layout.document_ids.tolist() if i != GHOST])
            state = json.loads(json.dumps(parts[0].state))
        return steps, state

    return data_peers.resumed(segment, facts)
