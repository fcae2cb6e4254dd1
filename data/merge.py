"""Token streams joined: the shards of one after those of another, under one manifest.

Shards never change once they are written, so a merged stream shares their files by hard links, and takes no room on the
disk; it has copies where links are not possible.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from tokenmill.data.errors import DataError
from tokenmill.data.files import sync
from tokenmill.data.report import joined, rendering
from tokenmill.data.shard import KINDS, BlockFile, shard_file
from tokenmill.data.stream import TokenStream, read_manifest, write_manifest
from tokenmill.data.tokenizer import MODEL_FILE


def merge(streams: Sequence[str | Path], output: str | Path) -> TokenStream:
    """Join streams into a new one, `output`, in the order given. Sources of the same name become one.

    Raises DataError where one is not a stream, two were made by different tokenizers, or `output` exists.
    """
    folders = [Path(folder) for folder in streams]
    output = Path(output)
    if not folders:
        raise DataError("no streams to merge: pass at least one")
    if output.exists():
        raise DataError(f"{output}: already exists: choose another folder")
    first = TokenStream.open(folders[0])
    for folder in folders:
        check_tokenizer(folder, TokenStream.open(folder).manifest, first.tokenizer_name, first.tokenizer_sha256)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        _link(first.folder / MODEL_FILE, temporary / MODEL_FILE)
        nothing = {**first.manifest, "sources": [], "shards": [], "report": joined([])}
        write_manifest(temporary, add_shards(temporary, nothing, folders))
        temporary.rename(output)
        sync(output.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return TokenStream.open(output)


def add_shards(folder: Path, manifest: dict[str, Any], others: Sequence[Path]) -> dict[str, Any]:
    """Put the shards of other streams into a folder, after those that its manifest names, and return the manifest of
    all. The one in the folder stays, and with it what its readers see."""
    names = {name: i for i, name in enumerate(manifest["sources"])}
    shards = list(manifest["shards"])
    reports = [manifest.get("report")]
    for other in others:
        theirs = read_manifest(other)
        if theirs.get("pairs") != manifest.get("pairs"):
            raise DataError(f"{other}: preference pairs and other documents do not go into one stream: keep both")
        if chat := manifest.get("chat") or theirs.get("chat"):
            if theirs.get("chat", chat) != chat:
                raise DataError(f"{other}: {differ(theirs['chat'], chat)}")
            manifest = {**manifest, "chat": chat}
        number = np.array([names.setdefault(name, len(names)) for name in theirs["sources"]], "<u4")
        for i, entry in enumerate(theirs["shards"]):
            paths = {kind: shard_file(folder, len(shards), kind) for kind in KINDS}
            for kind, path in paths.items():
                path.unlink(missing_ok=True)  # of an attempt that was killed
                if kind != "sources" or np.array_equal(number, np.arange(len(number))):
                    _link(shard_file(other, i, kind), path)
                else:
                    with closing(BlockFile(path)) as renumbered:
                        renumbered.write(number[np.fromfile(shard_file(other, i, kind), "<u4")])
                        entry = {**entry, "files": {**entry["files"], kind: renumbered.finish()}}
            shards.append(entry)
        reports.append(theirs.get("report"))
    sync(folder)
    result = {**manifest, "sources": list(names), "shards": shards}
    result.pop("report", None)
    if (report := joined(reports)) is not None:
        result["report"] = report
    return result


def check_tokenizer(folder: Path, manifest: dict[str, Any], name: str, sha256: str) -> None:
    """Raises DataError where a stream was not made by the tokenizer of this name and sha256."""
    theirs = manifest["tokenizer"]
    if theirs["sha256"] != sha256:
        raise DataError(
            f"{folder}: was made by tokenizer {theirs['name']!r} ({theirs['sha256'][:16]}), not by {name!r} "
            f"({sha256[:16]}): all of a stream is made by one"
        )


def differ(theirs: Mapping[str, str], chat: Mapping[str, str]) -> str:
    """What is wrong where conversations of two renderings meet."""
    return (
        f"conversations of {rendering(theirs)} do not go into one stream with those of {rendering(chat)}: keep both, "
        "or prepare them with the same --template and --loss-on"
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one that has no links
        shutil.copyfile(source, target)
        sync(target)
