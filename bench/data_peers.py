"""Other projects' data tools, each in a virtual environment and a process of its own: what `bench data` stands beside.

The upper half runs in our environment: it makes theirs and speaks with their processes. The lower half runs in theirs,
where this file is started as a script, by the name of one of its last functions, and nothing of ours can be imported.
Each of those takes a folder with the inputs of a case (`facts.json` beside the files named below) and returns what is
timed, and the result by which it is checked to do the same work as ours.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

PATIENCE = 900  # seconds for one answer
# The packages of each environment. Where they want a torch, it is the one that tokenmill is tested with.
TORCH = "torch==2.13.0"
REQUIREMENTS = {
    "grain": ("grain==0.2.18",),
    "hf": ("transformers==5.23.0", "sentencepiece==0.2.3", "protobuf==7.36.2"),
    "litdata": ("litdata==0.2.76", TORCH),
    "megatron": (
        "megatron-core==0.16.1; python_version < '3.12'",
        "megatron-core==0.19.2; python_version >= '3.12'",
        TORCH,
    ),
    "olmo": ("ai2-olmo-core==3.0.0", TORCH),
    "streaming": ("mosaicml-streaming==0.13.0", TORCH),
    "trl": ("trl==1.16.0", TORCH),
}


class Peer(NamedTuple):
    name: str
    environment: str
    function: str  # of this file
    package: str  # whose version is said


ENCODERS = [Peer("HF tokenizers", "hf", "hf_tokenizers", "tokenizers")]
SHUFFLERS = [Peer("grain", "grain", "grain", "grain")]
PACKERS = [Peer("OLMo-core", "olmo", "olmo", "ai2-olmo-core"), Peer("TRL", "trl", "trl", "trl")]
RESTARTING = Peer("GPTDataset, positions restart", "megatron", "gpt_dataset", "megatron-core")
READERS = [
    RESTARTING,
    Peer("GPTDataset, nothing restarts", "megatron", "gpt_dataset_plain", "megatron-core"),
    Peer("GPTDataset, an attention mask", "megatron", "gpt_dataset_mask", "megatron-core"),
    Peer("mosaicml-streaming, tokens alone", "streaming", "mosaicml_streaming", "mosaicml-streaming"),
    Peer("litdata, tokens alone", "litdata", "litdata", "litdata"),
]


class NotMeasured(Exception):
    """Why a peer does not run here, in a line."""


def environment(folder: Path, name: str) -> Path:
    """The Python of an environment in `folder`, made by pip where it is not there yet. Raises NotMeasured."""
    home = folder / name
    python, made = home / "bin" / "python", home / "requirements.txt"
    wanted = "".join(f"{line}\n" for line in REQUIREMENTS[name])
    if made.is_file() and made.read_text() == wanted:
        return python
    print(f"{home}: installing {', '.join(REQUIREMENTS[name])}", file=sys.stderr)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS[name]]
    for command in ([sys.executable, "-m", "venv", "--clear", home], install):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NotMeasured(f"does not install: {_last_line(done.stderr or done.stdout)}")
    made.write_text(wanted)
    return python


class Process:
    """A peer at work: it has done a case's work once, and does it again each time it is called."""

    def __init__(self, peer: Peer, environments: Path, folder: Path) -> None:
        """Raises NotMeasured where it cannot be installed, imported or run. What it did is in `result`."""
        self._log = folder / f"{peer.function}.log"
        python = environment(environments, peer.environment)
        command = [python, "-P", __file__, peer.function, peer.package, folder]  # -P: our modules are not on its path
        alone = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TMPDIR": str(folder)}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env=os.environ | alone | quiet,
            )  # fmt: skip
        self.version = self._answer()
        self.result = folder / f"{peer.function}.npz"

    def __call__(self) -> float:
        """Seconds of the work, done once more."""
        with suppress(BrokenPipeError):  # what it died of is said below
            cast(IO[bytes], self._process.stdin).write(b"\n")
        return float(self._answer())

    def close(self) -> None:
        """End it, by itself where it can: it has its own temporary files to remove."""
        with self._process:
            cast(IO[bytes], self._process.stdin).close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def _answer(self) -> str:
        limit = threading.Timer(PATIENCE, self._process.kill)
        limit.start()
        line = cast(IO[bytes], self._process.stdout).readline()
        limit.cancel()
        if line:
            return line.decode().strip()
        with self._process:
            status = self._process.wait()
        said = _last_line(self._log.read_text(errors="replace"))
        raise NotMeasured(said if status == 1 else f"its process ended with status {status}: {said}")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:300]


# ------------------------------------------------------------------------------------------------- in its environment


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
    from torch import library

    try:
        import torchvision  # noqa: F401  (of which it imports its image readers, but needs nothing here)
    except RuntimeError:  # a torchvision for CUDA beside a torch for CPUs
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from streaming import MDSWriter, StreamingDataset

    rows = _rows(folder, facts)
    column = f"ndarray:{rows.dtype}:{rows.shape[1]}"
    with MDSWriter(out=str(folder / "mds"), columns={"tokens": column}) as writer:
        for row in rows:
            writer.write({"tokens": row})
    samples = StreamingDataset(local=str(folder / "mds"), batch_size=8)
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
