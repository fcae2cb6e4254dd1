"""Streams damaged and forged at random: all of it is found on opening or by `verify`, and the file is named, or it
changes nothing. Nothing crashes, hangs, takes memory or reads outside a file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import resource
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenmill.data import loader, shard
from tokenmill.data.errors import DataError
from tokenmill.data.loader import Loader, Source
from tokenmill.data.report import Report, inspect
from tokenmill.data.stream import TokenStream, fingerprint_of
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.data.writer import StreamWriter

Random = np.random.Generator
BLOCK = 64  # bytes: a file of some hundred bytes has several
MEMORY = 256 << 20  # bytes that opening, verifying and reading may take beyond what is there


def write_stream(folder: Path, tokenizer: Tokenizer, seed: int, pairs: bool) -> None:
    """Three shards whose files have the same sizes, so that only their content tells them apart."""
    rng = np.random.default_rng(seed)
    examples = [["notes.txt:1", "a note"]]
    with StreamWriter(folder, tokenizer, shard_tokens=180) as writer:
        writer.pairs = pairs
        writer.chat = {"template": "mistral-v1", "loss_on": "all"}
        writer.report = Report(Counter(source0=9, source1=9), Counter(source1=1), duplicate_examples=examples).asdict()
        for _ in range(3):
            for i, length in enumerate(rng.permutation([90, 50, 40])):
                mask = np.ones(length)
                first = rng.integers(1, length - 10)
                if pairs:
                    mask[:first] = mask[first + rng.integers(1, 9)] = 0
                else:
                    mask[first : first + rng.integers(1, 6)] = 0
                writer.add(
                    rng.integers(0, tokenizer.vocab_size, length), mask, source=f"source{rng.integers(2) if i else i}"
                )


def contents(stream: TokenStream) -> list[Any]:
    """All that can be read of a stream."""
    return [
        (stream.document(i).tolist(), stream.loss_mask(i).tolist(), stream.sources[stream.source_ids[i]])
        for i in range(len(stream))
    ]


class Damage:
    """A stream's folder, to be damaged again and again."""

    def __init__(self, folder: Path, other: Path, seed: int) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(seed)
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.others = {path.name: path.read_bytes() for path in sorted(other.iterdir())}
        self.contents = contents(TokenStream.open(folder))
        self.fingerprint = TokenStream.open(folder).fingerprint
        self.manifest = json.loads(self.files["manifest.json"])

    def pick(self, items: Any) -> Any:
        items = list(items)
        return items[self.rng.integers(len(items))]

    def restore(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in self.files or path.is_symlink() or not path.is_file():
                path.unlink()
        for name, content in self.files.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != len(content) or path.read_bytes() != content:
                path.write_bytes(content)

    # What can happen to files.

    def flip(self) -> None:
        name = self.pick(self.files)
        content = bytearray(self.files[name])
        for bit in self.rng.integers(0, 8 * len(content), self.pick([1, 1, 1, 2, 8])):
            content[bit // 8] ^= 1 << (bit % 8)
        (self.folder / name).write_bytes(content)

    def truncate(self) -> None:
        name = self.pick(self.files)
        size = len(self.files[name])
        os.truncate(self.folder / name, self.pick([0, size - 1, size // 2, self.rng.integers(size)]))

    def grow(self) -> None:
        name = self.pick([*self.files, "manifest.json", "tokenizer.model"])  # which are read at once
        if self.pick([True, False]):
            with (self.folder / name).open("ab") as file:
                file.write(self.pick([b"\0", b"\n", b" {}", self.rng.bytes(8), self.files[name]]))
        else:
            os.truncate(
                self.folder / name, self.pick([1 << 20, 1 << 31, 1 << 33, 1 << 40])
            )  # with a hole: no room is taken

    def overwrite(self) -> None:
        name = self.pick(self.files)
        content = bytearray(self.files[name])
        begin, end = sorted(self.rng.integers(0, len(content) + 1, 2))
        content[begin:end] = self.pick([bytes(end - begin), b"\xff" * (end - begin), self.rng.bytes(end - begin)])
        (self.folder / name).write_bytes(content)

    def swap(self) -> None:
        one, two = self.rng.choice(list(self.files), 2, replace=False)
        if self.pick([True, False]):  # within a kind of file, where sizes are the same
            one = self.pick(name for name in self.files if name[0] == "0")
            two = self.pick(name for name in self.files if name[5:] == one[5:] and name != one)
        (self.folder / one).write_bytes(self.files[two])
        (self.folder / two).write_bytes(self.files[one])

    def swap_shards(self) -> None:
        one, two = self.rng.choice(3, 2, replace=False)
        for kind in shard.KINDS:
            (self.folder / f"{one:05d}.{kind}").write_bytes(self.files[f"{two:05d}.{kind}"])
            (self.folder / f"{two:05d}.{kind}").write_bytes(self.files[f"{one:05d}.{kind}"])

    def mix(self) -> None:
        """Files of another stream."""
        for name in self.rng.choice(list(self.files), self.rng.integers(1, 5), replace=False):
            (self.folder / name).write_bytes(self.others[name])

    def remove(self) -> None:
        names = self.pick([[self.pick(self.files)], [f"{self.rng.integers(3):05d}.{kind}" for kind in shard.KINDS]])
        what = self.pick(["nothing", "nothing", "folder", "link", "pipe"])
        for name in names:
            path = self.folder / name
            path.unlink()
            if what == "folder":
                path.mkdir()
            elif what == "link":
                path.symlink_to(self.pick(["/dev/zero", name, "nowhere"]))
            elif what == "pipe":
                os.mkfifo(path)

    # What someone can do on purpose, with every checksum made to fit.

    def forge_manifest(self, fitting: bool = True) -> None:
        manifest = copy.deepcopy(self.manifest)
        for _ in range(self.pick([1, 1, 2])):
            holder, key = self.pick(places(manifest))
            value = holder[key]
            if self.rng.integers(6) == 0:
                del holder[key]
                continue
            hostile = [
                None,
                True,
                "",
                "x",
                [],
                {},
                0,
                -1,
                1,
                2**31,
                2**32,
                2**63 - 1,
                2**63,
                2**64,
                10**400,
                0.5,
                math.nan,
            ]
            if isinstance(value, int):
                hostile += [value + 1, value - 1, value * 2, float(value), str(value), -value, value << 40] * 3
            if isinstance(value, list):
                hostile += [
                    value[1:],
                    value[:-1],
                    value + value,
                    value[::-1],
                    [[value]],
                    dict(enumerate(map(str, value))),
                ] * 3
            if isinstance(value, dict):
                hostile += [[value], list(value), {k: v for k, v in value.items() if self.rng.integers(2)}] * 3
            if isinstance(value, str):
                hostile += [value[:-1], value + "\ud800", value.upper(), 5] * 3
            holder[key] = self.pick(hostile)
            if isinstance(holder, list) and self.rng.integers(8) == 0:
                holder[key] = self.pick(holder)
        if self.rng.integers(8) == 0:
            manifest["pairs"] = True
        if fitting:
            manifest["fingerprint"] = fingerprint_of(manifest)
        text = json.dumps(manifest)
        if self.rng.integers(40) == 0:
            text = self.pick(["[" * 100_000, '{"a":' * 100_000, "9" * 5000, f'{{"magic": {"[" * 900}{"]" * 900}}}'])
        (self.folder / "manifest.json").write_text(text)

    def edit_manifest(self) -> None:
        self.forge_manifest(fitting=False)

    def forge_files(self) -> None:
        """Numbers in a shard's files, and what the manifest says of these."""
        manifest = copy.deepcopy(self.manifest)
        for _ in range(self.pick([1, 1, 2])):
            number, kind = self.rng.integers(3), self.pick(shard.KINDS)
            path, entry = self.folder / f"{number:05d}.{kind}", manifest["shards"][number]
            width = {"tokens": 2, "offsets": 8, "silent": 8, "sources": 4}[kind]
            values = np.frombuffer(path.read_bytes(), f"<u{width}").astype(object)
            for _ in range(self.pick([1, 1, 3])):
                i = self.rng.integers(len(values))
                edges = [0, 1, 2, 299, 300, 180, 181, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
                edges += [values[i] + 1, values[i] - 1, self.pick(values)] * 3
                values[i] = self.pick(edges) % 2 ** (8 * width)
            how = self.rng.integers(6)
            if how == 0:
                values = values[self.rng.permutation(len(values))]
            elif how == 1:  # more or fewer of them, as the manifest says too
                values = np.concatenate([values, values[:2]]) if self.rng.integers(2) else values[:-2]
                change = 2 if len(values) > len(path.read_bytes()) // width else -2
                entry[{"offsets": "documents", "sources": "documents"}.get(kind, kind)] += change // (
                    1 + (kind == "silent")
                )
            content = np.array(values.tolist(), f"<u{width}").tobytes()
            path.write_bytes(content)
            entry["files"][kind] = facts(content)
        manifest["fingerprint"] = fingerprint_of(manifest)
        (self.folder / "manifest.json").write_text(json.dumps(manifest))

    def forge_shards(self) -> None:
        """Whole shards in another order, left out or there twice."""
        manifest = copy.deepcopy(self.manifest)
        order = self.rng.integers(0, 3, self.rng.integers(0, 6))
        manifest["shards"] = [self.manifest["shards"][i] for i in order]
        for new, old in enumerate(order):
            for kind in shard.KINDS:
                (self.folder / f"{new:05d}.{kind}").write_bytes(self.files[f"{old:05d}.{kind}"])
        manifest["fingerprint"] = fingerprint_of(manifest)
        (self.folder / "manifest.json").write_text(json.dumps(manifest))


ACCIDENTS = ["flip", "truncate", "grow", "overwrite", "swap", "swap_shards", "mix", "remove", "edit_manifest"]
FORGERIES = ["forge_manifest", "forge_files", "forge_shards"]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container in a JSON value with each of its keys."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from places(value[key])


def facts(content: bytes) -> dict[str, Any]:
    blocks = range(0, len(content), BLOCK)
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "crc32": [zlib.crc32(content[i : i + BLOCK]) for i in blocks],
    }


@contextmanager
def little_memory() -> Iterator[None]:
    """MemoryError where much more is taken than is now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(damage: Damage, kind: str) -> str:
    """Where the damage was found; else what reading everything gave: the same stream, or another one."""
    begin = time.monotonic()
    stream = problem = None
    read: list[Any] = []
    try:
        with little_memory():
            stream = TokenStream.open(damage.folder)
            with suppress(DataError):
                inspect(damage.folder)
            with suppress(DataError):  # nothing damaged is read, or trained on, even if nobody has called verify
                read = contents(stream)
                assert kind in FORGERIES or read == damage.contents
                next(Loader([Source(stream)], sequence_length=16, packs_per_step=9, packs_per_micro_batch=3, seed=0))
            stream.verify()
    except DataError as error:
        problem = str(error)
    assert time.monotonic() - begin < 10
    if problem is not None:
        assert str(damage.folder) in problem
        assert "\n" not in problem
        return "open" if stream is None else "verify"
    assert stream is not None
    assert sum(len(tokens) for tokens, _, _ in read) == stream.tokens
    assert all(len(tokens) == len(mask) >= 2 for tokens, mask, _ in read)
    assert max(max(tokens) for tokens, _, _ in read) < stream.vocab_size
    if read == damage.contents and stream.fingerprint == damage.fingerprint:
        changed = [name for name, content in damage.files.items() if (damage.folder / name).read_bytes() != content]
        assert changed in ([], ["manifest.json"])  # nothing was, or the space between what the manifest says
        return "the same"
    assert kind in FORGERIES, "damage that nobody sees"
    assert stream.fingerprint != damage.fingerprint, "another stream by the same name"
    return "another stream"


@pytest.fixture(params=[False, True], ids=["documents", "pairs"])
def damage(tmp_path: Path, small: Tokenizer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Damage:
    for module in (shard, loader):
        monkeypatch.setattr(module, "BLOCK", BLOCK)
    write_stream(tmp_path / "stream", small, seed=1, pairs=request.param)
    write_stream(tmp_path / "other", small, seed=2, pairs=request.param)
    return Damage(tmp_path / "stream", tmp_path / "other", seed=0)


def survey(damage: Damage, count: int) -> dict[str, Counter[str]]:
    """How often what became of each kind of damage."""
    found = {kind: Counter[str]() for kind in ACCIDENTS + FORGERIES}
    for i in range(count):
        kind = (ACCIDENTS + FORGERIES)[i % len(found)]
        getattr(damage, kind)()
        try:
            found[kind][outcome(damage, kind)] += 1
        except BaseException:
            print(f"{kind}, damage {i}")
            raise
        finally:
            damage.restore()
    assert contents(TokenStream.open(damage.folder)) == damage.contents
    return found


def test_some_hundred_damages(damage):
    found = survey(damage, 300)
    for kind in ACCIDENTS:
        assert found[kind]["open"] + found[kind]["verify"] > 0.7 * found[kind].total(), kind


@pytest.mark.slow
def test_ten_thousand_damages(damage, capsys):
    found = survey(damage, 5000)
    with capsys.disabled():
        for kind, counts in found.items():
            print(f"\n{kind:<15}", *(f"{what}: {counts[what]:,}" for what in sorted(counts)), sep="  ", end="")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 100_000, None])
def test_a_damaged_record_of_work_begun_is_not_gone_by(tmp_path, small, capsys, content):
    def write(stop: bool) -> Any:
        with StreamWriter(tmp_path / "out", small, shard_tokens=3, job="job") as writer:
            state = writer.state
            writer.add([1, 5, 2], source="a")
            if stop:
                raise KeyboardInterrupt
        return state

    with pytest.raises(KeyboardInterrupt):
        write(stop=True)
    progress = tmp_path / ".out.partial" / "progress.json"
    whole = progress.read_bytes()
    progress.write_bytes(whole.replace(b'"tokens": 3', b'"tokens": 4') if content is None else content)
    assert write(stop=False) is None
    assert "progress.json: is damaged" in capsys.readouterr().err
    stream = TokenStream.open(tmp_path / "out")
    stream.verify()
    assert len(stream) == 1
