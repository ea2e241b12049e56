"""Files that are written whole or not at all, and locks that no dead process holds."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from rnorm import files
from rnorm.files import InUse, Lock, files_below, lock_directory, set_aside, write_file

HOLD = """import sys, pathlib; from rnorm.files import Lock
lock = Lock(pathlib.Path(sys.argv[1]), wait=True)
print("held", flush=True); sys.stdin.read()"""


def hold(directory: Path) -> subprocess.Popen:
    """A process that locks a directory, says so, and holds the lock as long as its stdin is open."""
    command, pipe = [sys.executable, "-c", HOLD, directory], subprocess.PIPE
    return subprocess.Popen(command, cwd=Path(__file__).parents[1], stdin=pipe, stdout=pipe, text=True)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, error):
    path = tmp_path / "file"
    write_file(path, b"old")
    monkeypatch.setattr(os, call, Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        write_file(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    assert getattr(raised.value, "filename", str(path)) == str(path)  # the file that was meant, not the temporary one


def test_a_write_is_flushed_before_it_is_renamed_and_the_directory_after(tmp_path, monkeypatch):
    calls = Mock()
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, getattr(calls, name))
    write_file(tmp_path / "file", b"new")
    assert [call[0] for call in calls.method_calls] == ["fsync", "replace", "fsync"]


def test_a_damaged_file_is_renamed_to_the_first_free_name(tmp_path, capsys):
    path = tmp_path / "file"
    for content in ("1", "2", "3"):
        path.write_text(content)
        set_aside(path, "wrong checksum")
    names = {"file.damaged": "1", "file.damaged-2": "2", "file.damaged-3": "3"}
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == names
    assert f"warning: {path} is damaged (wrong checksum); it is now file.damaged-2\n" in capsys.readouterr().err


def test_one_process_holds_a_lock_and_is_named_to_others(tmp_path):
    with hold(tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InUse, match=f"is in use by process {holder.pid} on "):
            Lock(tmp_path)
        with hold(tmp_path) as waiting:
            holder.kill()  # a dead process holds no lock
            assert waiting.stdout.readline() == "held\n"


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with pytest.raises(OSError, match="cannot be locked .No locks available.; use a file system with locks"):
        Lock(tmp_path)


def test_who_locks_a_directory_makes_it_and_deletes_what_is_half_written(tmp_path):
    directory = tmp_path / "a" / "b"
    lock_directory(directory).__exit__()
    for name in (".x.pyT.tmp", ".config.json.tmp", "y.pyT"):
        (directory / name).touch()
    with lock_directory(directory):
        assert {path.name for path in directory.iterdir()} == {".lock", "y.pyT"}


def test_the_files_below_a_directory_are_all_but_locks_and_those_that_vanish(tmp_path, monkeypatch):
    for name in ("a", ".lock", "below/b", "below/.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("12")
    found = [(path, size) for path, _, size in sorted(files_below(tmp_path))]
    assert found == [(tmp_path / "a", 2), (tmp_path / "below/b", 2)]
    real = files.Path.is_file
    monkeypatch.setattr(files.Path, "is_file", lambda path: real(path) and not path.unlink())
    assert files_below(tmp_path) == []
