"""Files that are written whole or not at all, and locks that no dead process holds."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rnorm import files
from rnorm.files import InUse, Lock, files_below, lock_directory, set_aside, write_file

HOLD = "import sys, time, pathlib; from rnorm.files import Lock; l = Lock(pathlib.Path(sys.argv[1]), wait=True); "


@pytest.fixture
def hold(tmp_path):
    """Start a process that locks `tmp_path`, says so, and does what it is told."""
    processes = []

    def hold(then: str = "time.sleep(999)") -> subprocess.Popen:
        command = [sys.executable, "-c", f"{HOLD}print('held', flush=True); {then}", tmp_path]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield hold
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, error):
    def fail(*_):
        raise error

    path = tmp_path / "file"
    write_file(path, b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)) as raised:
        write_file(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    assert getattr(raised.value, "filename", str(path)) == str(path)  # the file that was meant, not the temporary one


def test_a_write_is_flushed_before_it_is_renamed_and_the_directory_after(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    write_file(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"] and (tmp_path / "file").read_bytes() == b"new"


def test_a_damaged_file_is_renamed_to_the_first_free_name(tmp_path, capsys):
    path = tmp_path / "file"
    for content in (b"1", b"2", b"3"):
        path.write_bytes(content)
        set_aside(path, "wrong checksum")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        "file.damaged": b"1", "file.damaged-2": b"2", "file.damaged-3": b"3",
    }  # fmt: skip
    assert f"warning: {path} is damaged (wrong checksum); it is now file.damaged-2\n" in capsys.readouterr().err


def test_one_process_holds_a_lock_and_is_named_to_others(tmp_path, hold):
    holder = hold()
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InUse, match=f"is in use by process {holder.pid} on "):
        Lock(tmp_path)
    waiting = hold("")
    holder.kill()  # a dead process holds no lock
    assert waiting.stdout.readline() == "held\n"
    waiting.wait()
    with Lock(tmp_path), Lock(tmp_path, "another.lock"):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(OSError, match="cannot be locked .No locks available.; use a file system with locks"):
        Lock(tmp_path)


def test_who_locks_a_directory_makes_it_and_deletes_what_is_half_written(tmp_path):
    directory = tmp_path / "a" / "b"
    lock_directory(directory).__exit__()
    for name in (".x.pyT.tmp", ".status.json.tmp", "y.pyT"):
        (directory / name).touch()
    with lock_directory(directory):  # status.json has a lock of its own
        assert {p.name for p in directory.iterdir()} == {".lock", ".status.json.tmp", "y.pyT"}


def test_the_files_below_a_directory_are_all_but_locks_and_those_that_vanish(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    for name in ("a", ".lock", "below/b", "below/.status.lock"):
        (tmp_path / name).write_text("12")
    assert [(str(p.relative_to(tmp_path)), size) for p, _, size in sorted(files_below(tmp_path))] == [
        ("a", 2), ("below/b", 2),
    ]  # fmt: skip
    real = files.Path.is_file
    monkeypatch.setattr(files.Path, "is_file", lambda path: real(path) and not path.unlink())
    assert files_below(tmp_path) == []
