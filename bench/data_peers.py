"""What other projects' data tools do in `bench data`, each in an environment and a process of its own.

This file is started there as a script (bench/environments.py), by the name of one of its functions, and nothing of ours
can be imported. A function takes a folder with the inputs of a case (`facts.json` beside the files named below) and
returns what is timed, and the result by which it is checked to do the same work as ours.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple


class Work(NamedTuple):
    run: Callable[[], Any]  # what is timed
    result: Callable[[Any], dict[str, Any]]  # arrays, of what the first run returned


def hf_tokenizers(folder: Path, facts: dict[str, Any]) -> Work:
    """`texts.json` to ids, by the fast tokenizer that transformers makes of `tokenizer.model`."""
    import numpy as np
    import transformers

    tokenizer = transformers.LlamaTokenizer.from_pretrained(folder).backend_tokenizer
    texts = json.loads((folder / "texts.json").read_text())

    def result(encodings: list[Any]) -> dict[str, Any]:
        ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
        return {"ids": np.concatenate(ids), "lengths": np.array([len(row) for row in ids])}

    return Work(lambda: tokenizer.encode_batch_fast(texts, add_special_tokens=False), result)


def grain(folder: Path, facts: dict[str, Any]) -> Work:
    """`facts["count"]` indices of an order of `facts["indices"]`."""
    import numpy as np
    from grain.experimental import index_shuffle

    def order(n: int, count: int) -> list[int]:
        return [index_shuffle(i, max_index=n - 1, seed=1, rounds=4) for i in range(count)]

    whole = facts["whole"]
    return Work(
        lambda: order(facts["indices"], facts["count"]), lambda _: {"order": np.array(order(whole, whole), np.int64)}
    )


def olmo(folder: Path, facts: dict[str, Any]) -> Work:
    """`lengths.npy` to packs, as beginnings and ends of documents."""
    import numpy as np
    from olmo_core.data.utils import InstancePacker

    ends = np.cumsum(np.load(folder / "lengths.npy"))
    documents = np.stack([np.concatenate([[0], ends[:-1]]), ends], 1).astype(np.uint64)

    def result(packed: Any) -> dict[str, Any]:
        instances, ordered, _ = packed
        lengths = (ordered[:, 1] - ordered[:, 0]).astype(np.int64)
        items = np.concatenate([np.array(instance, np.int64) for instance in instances])
        return {"lengths": lengths[items], "counts": np.array([len(instance) for instance in instances])}

    return Work(lambda: InstancePacker(facts["sequence_length"]).pack_documents(documents), result)


def trl(folder: Path, facts: dict[str, Any]) -> Work:
    """`lengths.npy` to packs. Its packer moves tokens along, here of a byte each; all documents are one batch of it."""
    import datasets
    import numpy as np
    import pyarrow
    from trl import pack_dataset

    datasets.disable_progress_bars()
    lengths = np.load(folder / "lengths.npy")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(np.zeros(offsets[-1], np.uint8)))
    dataset = datasets.Dataset(pyarrow.table({"input_ids": tokens}))
    options = {"batch_size": len(lengths), "load_from_cache_file": False, "keep_in_memory": True}

    def result(packed: Any) -> dict[str, Any]:
        rows = packed.data.column("seq_lengths").combine_chunks()
        counts = np.diff(rows.offsets.to_numpy())
        return {"lengths": rows.flatten().to_numpy().astype(np.int64), "counts": counts.astype(np.int64)}

    return Work(lambda: pack_dataset(dataset, facts["sequence_length"], "bfd", options), result)


def gpt_dataset(folder: Path, facts: dict[str, Any], restart: bool = True, mask: bool = False) -> Work:
    """An epoch of the samples of `stream.bin` and `stream.idx`: tokens, labels, loss mask and positions of each."""
    from types import SimpleNamespace

    import numpy as np
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    prefix = str(folder / "stream")
    tokenizer: Any = SimpleNamespace(eod=facts["eos_id"], pad=-1, vocab_size=facts["vocab_size"], unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=facts["sequence_length"],
        blend=([prefix], None),
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=restart,
        reset_attention_mask=mask,
        eod_mask_loss=False,
        create_attention_mask=mask,
        path_to_cache=str(folder / "megatron"),
    )
    documents = IndexedDataset(prefix)
    everything = np.arange(len(documents.document_indices) - 1, dtype=np.int32)
    samples = GPTDataset(documents, prefix, everything, None, Split.train, config)
    count = min(len(samples), facts["masks"]) if mask else len(samples)
    return _reading(lambda i: samples[i]["labels"], count, facts)


def gpt_dataset_plain(folder: Path, facts: dict[str, Any]) -> Work:
    """The same where positions count through all documents, so that they and the mask are made once."""
    return gpt_dataset(folder, facts, restart=False)


def gpt_dataset_mask(folder: Path, facts: dict[str, Any]) -> Work:
    """The same with boundaries, which it knows only as an attention mask of S x S: a few samples."""
    return gpt_dataset(folder, facts, mask=True)


def mosaicml_streaming(folder: Path, facts: dict[str, Any]) -> Work:
    """An epoch of rows of tokens from an MDS shard, by index: its iterator, with threads, is slower."""
    streaming = _streaming()
    rows = _rows(folder, facts)
    column = f"ndarray:{rows.dtype}:{rows.shape[1]}"
    with streaming.MDSWriter(out=str(folder / "mds"), columns={"tokens": column}) as writer:
        for row in rows:
            writer.write({"tokens": row})
    samples = streaming.StreamingDataset(local=str(folder / "mds"), batch_size=8)
    return _reading(lambda i: samples[i]["tokens"], len(rows), facts)


def litdata(folder: Path, facts: dict[str, Any]) -> Work:
    """An epoch of blocks of tokens from a chunk, by its iterator: views of the mapped file."""
    import numpy as np
    import torch
    from litdata import StreamingDataset, TokensLoader
    from litdata.streaming.cache import Cache

    rows = _rows(folder, facts)
    cache = Cache(str(folder / "litdata"), chunk_bytes="64MB", item_loader=TokensLoader(rows.shape[1]))
    for i, row in enumerate(rows):
        cache[i] = torch.from_numpy(row.astype(np.int32))
    cache.done()
    cache.merge()
    loader = TokensLoader(rows.shape[1])
    samples = iter(())

    def read(i: int) -> Any:
        nonlocal samples
        if i == 0:
            samples = iter(StreamingDataset(str(folder / "litdata"), item_loader=loader, shuffle=True, seed=1))
        return next(samples)

    return _reading(read, len(rows), facts)


Steps = list[list[int]]  # the samples of each step, rank after rank
# Takes a world size, how many steps (None: to the end of the epoch) and the state to go on from (None: the beginning);
# gives the steps and the state after them. Ranks are made one after the other, each as in a process of its own.
Segment = Callable[[int, int | None, Any], tuple[Steps, Any]]


def resumed(segment: Segment, facts: dict[str, Any]) -> Work:
    """An epoch for each of `facts["plans"]`, a list of world sizes and steps: each goes on where the one before ended.

    The result is flat: all samples, how many of them each step has, and how many steps each epoch.
    """
    import numpy as np

    def epoch(plan: Sequence[tuple[int, int | None]]) -> Steps:
        steps, state = [], None
        for world, count in plan:
            some, state = segment(world, count, state)
            steps += some
        return steps

    def result(epochs: list[Steps]) -> dict[str, Any]:
        steps = [step for epoch in epochs for step in epoch]
        samples = np.array([i for step in steps for i in step], np.int64)
        return {"samples": samples, "steps": np.array([*map(len, steps)]), "epochs": np.array([*map(len, epochs)])}

    return Work(lambda: [epoch(plan) for plan in facts["plans"]], result)


def torchdata(folder: Path, facts: dict[str, Any]) -> Work:
    """StatefulDataLoader, with a sampler and a state for each rank."""
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    samples: Any = range(facts["samples"])

    def segment(world: int, count: int | None, states: Any) -> tuple[Steps, Any]:
        samplers = [StatefulDistributedSampler(samples, world, rank, shuffle=True) for rank in range(world)]
        loaders = [StatefulDataLoader(samples, facts["step"] // world, sampler=sampler) for sampler in samplers]
        for rank, loader in enumerate(loaders if states else ()):
            loader.load_state_dict(states[rank % len(states)])
        steps = _of_all_ranks([[batch.tolist() for batch in islice(loader, count)] for loader in loaders])
        return steps, [loader.state_dict() for loader in loaders]

    return resumed(segment, facts)


def accelerate(folder: Path, facts: dict[str, Any], even: bool = True) -> Work:
    """Batches of a DataLoader that its ranks share (`split_batches`), of which `skip_first_batches` skips some."""
    import torch
    from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
    from torch.utils.data import BatchSampler, RandomSampler

    def segment(world: int, count: int | None, done: int | None) -> tuple[Steps, int]:
        ranks = []
        for rank in range(world):
            sampler = RandomSampler(range(facts["samples"]), generator=torch.Generator().manual_seed(0))
            batches = BatchSampler(sampler, facts["step"], drop_last=False)
            shard = BatchSamplerShard(batches, world, rank, split_batches=True, even_batches=even)
            ranks.append([*islice(SkipBatchSampler(shard, done or 0), count)])
        steps = _of_all_ranks(ranks)
        return steps, (done or 0) + len(steps)

    return resumed(segment, facts)


def accelerate_uneven(folder: Path, facts: dict[str, Any]) -> Work:
    """The same where the last batch may be smaller."""
    return accelerate(folder, facts, even=False)


def mosaicml_resumed(folder: Path, facts: dict[str, Any]) -> Work:
    """StreamingDataset's sharing out of an epoch, from the count of samples that its state keeps."""
    streaming = _streaming()
    from streaming.base.batching import generate_work
    from streaming.base.world import World

    with streaming.MDSWriter(out=str(folder / "mds"), columns={"number": "int"}) as writer:
        for i in range(facts["samples"]):
            writer.write({"number": i})
    dataset = streaming.StreamingDataset(
        local=str(folder / "mds"), batch_size=1, shuffle=True, shuffle_seed=0, num_canonical_nodes=1
    )
    dataset._set_shuffle_block_size(World(1, 1, 1, 0))  # as its iterator does first

    def segment(world: int, count: int | None, done: int | None) -> tuple[Steps, int]:
        dataset.batch_size = facts["step"] // world
        work = generate_work(dataset.batching_method, dataset, World(1, world, 1, 0), 0, done or 0)
        batches = work[0, :, 0].swapaxes(0, 1)[:count]  # (steps, ranks, samples), -1 where there is none
        steps = [[i for i in step.ravel().tolist() if i >= 0] for step in batches]
        return steps, (done or 0) + sum(map(len, steps))

    return resumed(segment, facts)


def _of_all_ranks(ranks: list[list[list[int]]]) -> Steps:
    """Of the batches of each rank, each step's."""
    return [[i for batch in step for i in batch] for step in zip_longest(*ranks, fillvalue=())]


def _streaming() -> Any:
    """mosaicml-streaming's module. It imports torchvision for its image readers, but needs nothing of it here."""
    from torch import library

    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # a torchvision for CUDA beside a torch for CPUs
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import streaming

    return streaming


def _rows(folder: Path, facts: dict[str, Any]) -> Any:
    """(K, S) the ids of the stream end to end, without a rest that fills no row."""
    import numpy as np

    ids = np.fromfile(folder / "stream.bin", facts["dtype"])
    size = facts["sequence_length"]
    return ids[: len(ids) // size * size].reshape(-1, size)


def _reading(sample: Callable[[int], Any], count: int, facts: dict[str, Any]) -> Work:
    """Samples 0 to `count`, and how often they hold each id."""
    import numpy as np

    def read() -> None:
        for i in range(count):
            sample(i)

    def result(_: Any) -> dict[str, Any]:
        found = np.zeros(facts["vocab_size"], np.int64)
        rows = 0
        for i in range(count):
            ids = np.asarray(sample(i)).ravel()
            found += np.bincount(ids, minlength=len(found))
            rows += len(ids)
        return {"found": found, "rows": np.int64(rows)}

    return Work(read, result)


def main() -> None:
    """Do the work once and keep its result; then again for each line that comes, and answer with its seconds."""
    import numpy as np

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a package prints is no answer
    function, package, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    work: Work = globals()[function](folder, json.loads((folder / "facts.json").read_text()))
    np.savez(folder / f"{function}.npz", **work.result(work.run()))
    print(metadata.version(package), file=answers, flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        done = work.run()
        seconds = time.perf_counter() - begin
        del done
        print(seconds, file=answers, flush=True)


if __name__ == "__main__":
    main()
