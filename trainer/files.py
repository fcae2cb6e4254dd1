"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_folder(folder: Path, temporary: Path | None = None) -> Iterator[Path]:
    """A temporary folder beside `folder`, filled by the caller, synced, and renamed to it at the end. `temporary`
    names it where several processes fill it; what a killed one left there is removed.

    Raises FileExistsError, before any work, where `folder` is there already. On any error nothing is left.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):  # an empty folder is replaced
        raise FileExistsError(f"{folder} already exists; remove it or choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if temporary is None:
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    else:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_file(file: Path, text: str) -> None:
    """Write `text` to a temporary name beside `file`, synced, and rename it over `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(file)
        sync(file.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
