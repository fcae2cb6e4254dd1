"""How fast text becomes batches: each part of the way beside other projects' tools, in turn in one run, on one core.

`tokenmill bench data FILES` takes plain documents (a text is made from a seed where no file is given), each argument a
corpus of its own. A case is one piece of work: what ours makes of it and what a peer makes are compared first, then all
sides do it again and again in turn, and rates are of median times. Peers but sentencepiece run in environments of their
own, which `--peers FOLDER` makes there (bench/environments.py); one that does not run is said to be not measured, and
why. Targets are of what ours does for the first time: no word cached yet, no block of a stream checked yet. A load
above 0 at the start says that other processes were at work, which hurts every side. The last case is not of speed: it
counts what runs that were stopped and resumed gave (bench/elastic.py).
"""

from __future__ import annotations

import datetime
import io
import json
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import metadata
from importlib.resources import files
from itertools import accumulate, takewhile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor

from tokenmill import _C
from tokenmill.bench.elastic import resume
from tokenmill.bench.environments import ENCODERS, PACKERS, READERS, RESTARTING, SHUFFLERS, write_facts
from tokenmill.bench.turns import (
    OURS,
    Arrays,
    Bench,
    Case,
    Row,
    Side,
    Target,
    at_least,
    clock,
    measured,
    plot,
    table,
    write_csv,
)
from tokenmill.data.convert import export_megatron
from tokenmill.data.documents import find_inputs, read_texts
from tokenmill.data.errors import DataError
from tokenmill.data.loader import Loader, Source
from tokenmill.data.packing import cut
from tokenmill.data.prepare import prepare as prepare_stream
from tokenmill.data.stream import TokenStream
from tokenmill.data.tokenizer import Tokenizer, train_tokenizer

SEQUENCE = 2048
STEP = 8  # packs
CASES = ("encoder", "prepare", "permutation", "packing", "assembly", "waiting", "resume")
SLOW = 0.01  # a step that waits more of its time than this is said to wait


@dataclass
class Corpus:
    """Plain documents."""

    given: str  # as an argument of `prepare`
    name: str
    texts: list[str]
    tokenizer: Tokenizer
    folder: Path

    @cached_property
    def megabytes(self) -> float:
        return sum(len(text.encode()) for text in self.texts) / 1e6

    @cached_property
    def ids(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(T,) of all texts, and (N,) how many of each."""
        ids, offsets = self.tokenizer.encode_batch(self.texts)
        return ids, np.diff(offsets)

    @cached_property
    def stream(self) -> TokenStream:
        folder = self.folder / "stream"
        return prepare_stream([self.given], self.tokenizer, folder, overwrite=True, progress=False)


def encoder(bench: Bench, corpus: Corpus) -> list[Row]:
    """Texts to ids."""
    texts, folder, model = corpus.texts, corpus.folder, corpus.tokenizer.path
    warm = Tokenizer.open(model)
    warm.encode_batch(texts)

    def cold() -> float:
        tokenizer = Tokenizer.open(model)
        return clock(lambda: tokenizer.encode_batch(texts))

    def check(result: Arrays) -> tuple[float, Row]:
        return corpus.megabytes, _same_ids(corpus, result["ids"], result["lengths"])

    write_facts(folder, {})
    (folder / "texts.json").write_text(json.dumps(texts))
    shutil.copy(model, folder / "tokenizer.model")
    ours = [
        Side(OURS, cold, corpus.megabytes),
        Side(f"{OURS}, words cached", lambda: clock(lambda: warm.encode_batch(texts)), corpus.megabytes),
    ]
    case = Case(
        "encoder", corpus.name, "MB/s", ours, [_sentencepiece(corpus)], ENCODERS, folder, check,
        {"sentencepiece": at_least(7)},
    )  # fmt: skip
    return measured(bench, case)


def prepare(bench: Bench, corpus: Corpus) -> list[Row]:
    """The whole command with one worker, from its start to the stream on the disk, beside sentencepiece's encoding
    alone, of texts in memory.
    """
    output = corpus.folder / "prepared"
    command = [Path(sysconfig.get_path("scripts")) / "tokenmill", "prepare", corpus.given]
    command += ["--tokenizer", corpus.tokenizer.path, "--output", output, "--overwrite", "--workers", "1"]

    def whole() -> float:
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"`tokenmill prepare {corpus.given}` failed: {done.stderr.strip()}")
        return time.perf_counter() - begin

    whole()
    stream = TokenStream.open(output)
    found = np.concatenate([stream.document(i)[1:-1] for i in range(len(stream))])
    ours = [Side(f"{OURS} prepare", whole, corpus.megabytes, _same_ids(corpus, found, stream.lengths - 2))]
    targets = {"sentencepiece": at_least(4)}
    return measured(bench, Case("prepare", corpus.name, "MB/s", ours, [_sentencepiece(corpus)], targets=targets))


def permutation(bench: Bench) -> list[Row]:
    """The order of samples."""
    folder = bench.work / "permutation"
    count, theirs = (10_000, 1_000) if bench.small else (4_000_000, 200_000)
    whole = 10_007  # of so many, every index is asked for

    def run(n: int) -> float:
        return clock(lambda: _C.permutation(n, 1, 0, count))

    def check(result: Arrays) -> tuple[float, Row]:
        return theirs / 1e6, _order(result["order"], whole)

    write_facts(folder, {"indices": 10**9, "count": theirs, "whole": whole})
    ours = [
        Side(OURS, lambda: run(10**9), count / 1e6, _order(_C.permutation(whole, 1, 0, whole), whole)),
        Side(f"{OURS}, of 10^12", lambda: run(10**12), count / 1e6),  # grain's are of 32 bits
    ]
    targets = {OURS: Target(">= 40 M/s", lambda row: row["rate"] >= 40)}
    return measured(bench, Case("permutation", "10^9", "M/s", ours, (), SHUFFLERS, folder, check, targets))


def packing(bench: Bench, name: str, folder: Path, lengths: NDArray[np.int64]) -> list[Row]:
    """Lengths to packs of a sequence each."""
    offsets, items = _C.pack(lengths, SEQUENCE)
    said = _packs(lengths, lengths[items], np.diff(offsets))
    work = len(lengths) / 1e6

    def check(result: Arrays) -> tuple[float, Row]:
        return work, _packs(lengths, result["lengths"], result["counts"])

    def met(row: Row) -> bool:
        return row["times"] >= 50 and said["bins"] <= row["bins"]

    write_facts(folder, {"sequence_length": SEQUENCE})
    np.save(folder / "lengths.npy", lengths)
    ours = [Side(OURS, lambda: clock(lambda: _C.pack(lengths, SEQUENCE)), work, said)]
    targets = {"OLMo-core": Target(">= 50 times, no more bins", met)}
    return measured(bench, Case("packing", name, "M documents/s", ours, (), PACKERS, folder, check, targets))


def assembly(bench: Bench, corpus: Corpus) -> list[Row]:
    """An epoch of batches, in packs of a sequence."""
    stream, folder = corpus.stream, corpus.folder
    given = "tokens, targets, weights, positions that restart, boundaries"
    rows = _predicted_once(stream)
    expected = np.bincount(np.concatenate([shard.tokens for shard in stream.shards]), minlength=stream.vocab_size)

    def epoch(stream: TokenStream) -> float:
        loader = _loader(stream)
        return clock(lambda: [None for _ in loader])

    def check(result: Arrays) -> tuple[float, Row]:
        found, rows = result["found"], int(result["rows"])
        same = bool(found.sum() == rows and np.all(found <= expected))
        part = f", {rows // SEQUENCE} samples" if expected.sum() - rows > SEQUENCE else ""
        return rows / 1e6, {"same": same, "note": ("the same tokens" if same else "other tokens than ours") + part}

    facts = {"sequence_length": SEQUENCE, "vocab_size": stream.vocab_size, "eos_id": stream.eos_id, "masks": 16}
    write_facts(folder, facts | {"dtype": stream.shards[0].tokens.dtype.name})
    export_megatron(stream.folder, folder / "stream")
    ours = [
        Side(OURS, lambda: epoch(TokenStream.open(stream.folder)), rows / 1e6, {"note": given}),
        Side(f"{OURS}, blocks checked before", lambda: epoch(stream), rows / 1e6, {"note": given}),
    ]
    targets = {RESTARTING.name: at_least(5)}
    case = Case("assembly", corpus.name, "M tokens/s", ours, (), READERS, folder, check, targets)
    return measured(bench, case)


def waiting(bench: Bench, corpus: Corpus) -> list[Row]:
    """What the demo's training step waits for its data, on all cores: with `Prefetch`, as it does, and without."""
    folder = bench.work / "waiting"
    tokenizer = corpus.tokenizer
    if not bench.small:  # the demo's vocabulary, from the first megabytes
        some = [text for text, end in zip(corpus.texts, accumulate(map(len, corpus.texts)), strict=True) if end < 2e6]
        tokenizer = train_tokenizer(some, 4096, folder / "tokenizer.model")
    prepare_stream([corpus.given], tokenizer, folder / "stream", progress=False)
    steps, warmup = (4, 1) if bench.small else (80, 5)
    rows = []
    for what, ahead in (("Prefetch", True), ("a plain loop over Loader", False)):
        waits, seconds = _waits(folder, tokenizer.vocab_size, 32 if bench.small else None, steps, ahead)
        waits, seconds = waits[warmup:], seconds[warmup:]
        late = sum(wait > SLOW * step for wait, step in zip(waits, seconds, strict=True))
        note = (
            f"{late} of {len(waits)} steps of {median(seconds) * 1e3:.0f} ms waited, at most {max(waits) * 1e3:.2f} ms"
        )
        row = {
            "case": "waiting",
            "data": corpus.name,
            "unit": "ms waited a step",
            "what": what,
            "rate": median(waits) * 1e3,
        }
        row |= {"runs": len(waits), "note": note}
        if ahead:
            row |= {"target": f"no step waits {SLOW:.0%} of its time"} | ({} if bench.small else {"met": late == 0})
        rows.append(row)
    return rows


def cases(bench: Bench, corpora: Sequence[Corpus]) -> dict[str, list[Callable[[], list[Row]]]]:
    """Each part of the way, and what is measured of it."""
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 2_000 if bench.small else 1_000_000)
    drawn = np.clip(lengths, 2, SEQUENCE).astype(np.int64)
    packs = [(corpus.name, corpus.folder, cut(corpus.stream, SEQUENCE)[2]) for corpus in corpora]
    packs.append((f"{len(drawn):,} log-normal lengths", bench.work / "lengths", drawn))
    return {
        "encoder": [partial(encoder, bench, corpus) for corpus in corpora],
        "prepare": [partial(prepare, bench, corpus) for corpus in corpora],
        "permutation": [partial(permutation, bench)],
        "packing": [partial(packing, bench, *inputs) for inputs in packs],
        "assembly": [partial(assembly, bench, corpus) for corpus in corpora],
        "waiting": [partial(waiting, bench, corpora[0])],
        "resume": [partial(resume, bench, corpora[0].tokenizer)],
    }


def _sentencepiece(corpus: Corpus) -> Side:
    processor = SentencePieceProcessor(model_file=str(corpus.tokenizer.path))
    run = partial(processor.encode, corpus.texts, num_threads=1)
    rows = run()
    ids = np.fromiter((token for row in rows for token in row), np.int32)
    said = {"version": metadata.version("sentencepiece"), **_same_ids(corpus, ids, np.array([*map(len, rows)]))}
    return Side("sentencepiece", partial(clock, run), corpus.megabytes, said)


def _same_ids(corpus: Corpus, ids: NDArray[Any], lengths: NDArray[Any]) -> Row:
    """Compared with ours, document by document."""
    expected, sizes = corpus.ids
    if np.array_equal(sizes, lengths) and np.array_equal(expected, ids):
        return {"same": True, "note": "equal ids"}
    if len(sizes) != len(lengths):
        return {"same": False, "note": f"{len(lengths)} documents of {len(sizes)}"}
    a, b = np.split(expected, np.cumsum(sizes)[:-1]), np.split(ids, np.cumsum(lengths)[:-1])
    other = sum(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    return {"same": False, "note": f"other ids in {other} of {len(sizes)} documents"}


def _order(found: NDArray[Any], n: int) -> Row:
    same = np.array_equal(np.sort(found), np.arange(n))
    return {"same": same, "note": "each index once" if same else "not an order: an index is missing"}


def _packs(lengths: NDArray[np.int64], packed: NDArray[np.int64], counts: NDArray[np.int64]) -> Row:
    """Of packs that hold so many documents each, of these lengths, one pack after the other."""
    valid = np.array_equal(np.sort(packed), np.sort(lengths)) and counts.sum() == len(packed) and counts.min() > 0
    valid = valid and np.add.reduceat(packed, np.cumsum(counts) - counts).max() <= SEQUENCE
    note = "each document once" if valid else "not a packing: a document is missing, or a pack too full"
    padding = 1 - float(lengths.sum()) / (len(counts) * SEQUENCE)
    return {"bins": len(counts), "padding": padding, "same": bool(valid), "note": note}


def _loader(stream: TokenStream) -> Loader:
    return Loader(
        [Source(stream, epochs=1)], sequence_length=SEQUENCE, packs_per_step=STEP, packs_per_micro_batch=STEP, seed=0
    )


def _predicted_once(stream: TokenStream) -> int:
    """The rows of an epoch. Raises ValueError where a token that has one before it is not a target just once."""
    left = sum(np.bincount(stream.document(i)[1:], minlength=stream.vocab_size) for i in range(len(stream)))
    rows = 0
    for step in _loader(stream):
        for batch in step.micro_batches:
            targets = batch.targets.numpy()[batch.weights.numpy() > 0]
            left -= np.bincount(targets, minlength=stream.vocab_size)
            rows += batch.tokens.numel()
    if np.any(left):
        raise ValueError(f"{stream.folder}: an epoch's targets are not the stream's tokens")
    return rows


class _Plain:
    """In the place of `Prefetch`: each step is made when it is asked for."""

    def __init__(self, loader: Loader, device: Any) -> None:
        self._loader, self._device = loader, device

    def __next__(self) -> Any:
        step = next(self._loader)
        return step, [batch.to(self._device) for batch in step.micro_batches]


def _waits(
    folder: Path, vocab_size: int, length: int | None, steps: int, ahead: bool
) -> tuple[list[float], list[float]]:
    """Seconds that each step waited, and seconds that it took."""
    from tokenmill.trainer.config import StreamSection, load_recipe
    from tokenmill.trainer.distributed import join
    from tokenmill.trainer.loop import Trainer

    recipe = load_recipe(str(files("tokenmill.trainer") / "recipes" / "demo_base.toml"))
    assert recipe.model.new is not None
    data = replace(recipe.data, sources=(StreamSection(str(folder / "stream")),), validation=())
    recipe = replace(
        recipe,
        output=str(folder / ("ahead" if ahead else "plain")),
        model=replace(recipe.model, new=replace(recipe.model.new, vocab_size=vocab_size)),
        data=replace(data, sequence_length=length or data.sequence_length),
        train=replace(recipe.train, tokens=None, steps=steps),
    )
    waits, seconds = [], []
    with join(recipe.device, sharded=False) as world, redirect_stdout(io.StringIO()):
        trainer: Any = Trainer(recipe, world)
        prefetch = trainer.prefetch
        if not ahead:
            trainer.prefetch = _Plain(trainer.loader, world.device)
        for _ in range(steps):
            begin = time.perf_counter()
            waits.append(trainer.step().data_wait)
            seconds.append(time.perf_counter() - begin)
        prefetch.close()
        trainer.log.close()
    return waits, seconds


# ------------------------------------------------------------------------------------------------------- the command


def main(
    inputs: Sequence[str],
    output: Path,
    *,
    tokenizer: str = "mistral-v1",
    environments: Path | None = None,
    only: Sequence[str] | None = None,
    seconds: float = 20,
    small: bool = False,
) -> list[Row]:
    """`tokenmill bench data`: every case, as a table, `data.csv` (written again after each) and `data.png` in `output`.

    Raises ValueError where a case is not known, and DataError where an input does not hold plain documents.
    """
    if unknown := sorted({*only} - {*CASES}) if only else []:
        raise ValueError(f"--only {unknown[0]}: expected some of {', '.join(CASES)}")
    if not seconds > 0:
        raise ValueError(f"--seconds {seconds:g}: expected a positive number")
    model = Tokenizer.open(tokenizer)
    with tempfile.TemporaryDirectory(prefix="tokenmill-bench-") as name:
        work = Path(name)
        given = list(inputs) or [str(_synthetic(work / "synthetic.jsonl", 40 if small else 6000))]
        corpora = [_corpus(argument, model, work) for argument in given]
        bench = Bench(work, environments and environments.absolute(), seconds, small)
        output.mkdir(parents=True, exist_ok=True)
        about = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "cpu": _cpu()}
        about |= {"python": platform.python_version(), "load": os.getloadavg()[0]}
        rows: list[Row] = []
        print(f"{about['cpu']}, one core; load {about['load']:.1f}; Python {about['python']}; {about['date']}")
        chosen = [case for name, some in cases(bench, corpora).items() if not only or name in only for case in some]
        for case in chosen:
            found = case()
            print(table(found), flush=True)
            own = {"version": metadata.version("tokenmill")}
            rows += [about | (own if row["what"].startswith(OURS) else {}) | row for row in found]
            write_csv(rows, output / "data.csv")
    try:
        plot(rows, output / "data.png")
    except ImportError as error:
        print(f"{output / 'data.csv'}; no data.png: {error} (pip install matplotlib)")
    else:
        print(f"{output / 'data.csv'}, {output / 'data.png'}")
    return rows


def _corpus(given: str, tokenizer: Tokenizer, work: Path) -> Corpus:
    name = find_inputs([given])[0].source
    folder = work / f"corpus-{name}"
    if folder.exists():
        raise DataError(f"{given}: another input is named {name!r} too: name it, as in other={given}")
    folder.mkdir()
    corpus = Corpus(given, name, list(read_texts([given])), tokenizer, folder)
    if len(corpus.stream) != len(corpus.texts):
        raise DataError(f"{given}: holds conversations: expected plain documents, rows with a 'text'")
    return corpus


def _synthetic(path: Path, documents: int) -> Path:
    """JSON lines of words that are as frequent as in a text, in sentences, from a seed."""
    draw = np.random.default_rng(0)
    syllables = np.array([a + b for a in "bcdfghlmnprstv" for b in ("a", "e", "i", "o", "u", "en", "is", "or")])
    vocabulary = np.array(["".join(draw.choice(syllables, n)) for n in 1 + draw.poisson(1.5, 30_000)])
    frequency = 1 / np.arange(1, len(vocabulary) + 1)
    with path.open("w") as file:
        for size in np.clip(draw.lognormal(6, 1.0, documents), 10, 5000).astype(int):
            words = vocabulary[draw.choice(len(vocabulary), size, p=frequency / frequency.sum())]
            sentences = [" ".join(part).capitalize() for part in np.array_split(words, 1 + size // 15)]
            file.write(json.dumps({"text": ". ".join(sentences) + "."}) + "\n")
    return path


def _cpu() -> str:
    lines = takewhile(str.strip, Path("/proc/cpuinfo").read_text().splitlines(keepends=True))
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
