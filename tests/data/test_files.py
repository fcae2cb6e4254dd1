"""Files that appear whole or not at all, and folders that one process at a time writes into."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tokenmill.data import files
from tokenmill.data.files import locked, replace_file, replace_folder


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    file = tmp_path / "new" / "file.json"
    replace_file(file, "für")
    assert file.read_bytes() == b"f\xc3\xbcr"
    replace_file(file, b"\xff")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match=r"no room: '.*/new/file\.json'"):
        replace_file(file, "other")
    assert file.read_bytes() == b"\xff"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "folder"

    def fail() -> None:
        with replace_folder(folder) as temporary:
            (temporary / "a").write_text("a")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any(tmp_path.iterdir())
    with replace_folder(folder) as temporary:
        (temporary / "a").write_text("a")
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["a"]
    with pytest.raises(FileExistsError, match="folder already exists"), replace_folder(folder):
        pass


def test_a_folder_is_locked_as_long_as_its_process_lives(tmp_path):
    """Killed without warning, it leaves the folder free."""
    folder = tmp_path / "run"
    code = f"""
import time
from pathlib import Path
from tokenmill.data.files import locked
with locked(Path({str(folder)!r})) as free:
    print(free, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "True\n"
            with locked(folder) as free:
                assert not free
        finally:
            process.send_signal(signal.SIGKILL)
    with locked(folder) as free:
        assert free
        (folder / "weights").touch()
    assert {path.name for path in folder.iterdir()} == {"weights", files.LOCK}


def test_a_locked_folder_into_which_nothing_came_goes(tmp_path):
    with locked(tmp_path / "run") as free, locked(tmp_path / "run") as other:
        assert (free, other) == (True, False)
    assert not (tmp_path / "run").exists()


def test_what_went_wrong_is_said_where_the_folder_cannot_go(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()

    def fail() -> None:
        with locked(tmp_path / "link"):
            raise KeyError("the recipe is wrong")

    with pytest.raises(KeyError, match="the recipe is wrong"):
        fail()


def test_without_locks_in_the_file_system_work_goes_on(tmp_path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with locked(tmp_path / "run") as free, locked(tmp_path / "run") as other:
        assert free
        assert other
        (tmp_path / "run" / "weights").touch()
