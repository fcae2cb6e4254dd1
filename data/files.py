"""Files and folders that appear whole or not at all, and that one process at a time writes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"


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


def replace_file(file: Path, content: str | bytes) -> None:
    """Write `content`, text as UTF-8, to a temporary name beside `file`, synced, and rename it over `file`: for one
    process at a time. Folders that are not there are made. Raises OSError naming the file where there is no room."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")  # what a killed process left there, the next takes
    try:
        with naming(file):
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    sync(file.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the name of a file to what the system says went wrong with it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def lock(descriptor: int) -> bool:
    """Whether this process may write what is open as `descriptor`: not while another one may. The system lets the lock
    go when the descriptor is closed, however the process ends. Of a file system without locks, all processes may."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Whether this process may write into `folder`, which is made, by the lock of a file in it. Where nothing else came
    into it, it is gone at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("ab") as file:  # for writing, which network file systems ask of a lock
        free = lock(file.fileno())
        try:
            yield free
        finally:
            with suppress(OSError):  # of a link, a mount or a network's folder, which stays
                if free and [path.name for path in folder.iterdir()] == [LOCK]:
                    (folder / LOCK).unlink()
                    folder.rmdir()
