"""Files that are written whole or not at all, and locks that no dead process holds."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from rnorm.files import InUse, Lock, RnormError, lock_directory, set_aside, write_file

HOLD = """import os, sys, pathlib; from rnorm.files import Lock
os.chdir(sys.argv[1]); os.geteuid() or os.setuid(int(sys.argv[2]))
lock = Lock(pathlib.Path(), wait=True)
print("held", flush=True); sys.stdin.read()"""

WRITE = """import os, sys, pathlib; from rnorm.files import write_file
os.fsync = lambda file: os.path.isdir(file) or (print("half", flush=True), sys.stdin.read())
write_file(pathlib.Path(sys.argv[1]), b"theirs")"""


def started(code: str, path: Path, *words: str) -> subprocess.Popen:
    """A process that runs HOLD or WRITE, and goes on from where it says so when its stdin is closed."""
    command, pipe = [sys.executable, "-c", code, path, *words], subprocess.PIPE
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout.readline() in ("held\n", "half\n")
    return process


@pytest.fixture
def other_user(monkeypatch) -> int:
    """Another user's number: of files as far as we may give them away, else the number that we pretend to have."""
    if os.geteuid() != 0:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    return 65534 if os.geteuid() == 0 else -1


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


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
@pytest.mark.parametrize("kind", [stat.S_ISREG, stat.S_ISDIR])
def test_a_directory_that_the_file_system_cannot_flush_is_no_error(tmp_path, monkeypatch, code, kind):
    def fsync(file: int) -> None:
        if kind(os.fstat(file).st_mode):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    expected = contextlib.nullcontext()
    if kind is stat.S_ISREG or code == errno.EIO:
        expected = pytest.raises(OSError, match=os.strerror(code))
    with expected:
        write_file(tmp_path / "file", b"new")


def test_a_damaged_file_is_renamed_to_the_first_free_name(tmp_path, capsys):
    path = tmp_path / "file"
    for content in ("1", "2", "3"):
        path.write_text(content)
        set_aside(path, "wrong checksum")
    names = {"file.damaged": "1", "file.damaged-2": "2", "file.damaged-3": "3"}
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == names
    assert f"warning: {path} is damaged (wrong checksum); it is now file.damaged-2\n" in capsys.readouterr().err


def test_one_process_holds_a_lock_and_is_named_to_others(tmp_path):
    with started(HOLD, tmp_path, "0") as holder:
        with pytest.raises(InUse, match=f"is in use by process {holder.pid} on .*, as .lock says; wait for it"):
            Lock(tmp_path)
        holder.kill()  # a dead process holds no lock
        with started(HOLD, tmp_path, "0"):
            pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EBADF])
def test_a_lock_that_cannot_be_had_says_why_and_names_its_file(tmp_path, monkeypatch, code):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(code, "reason")))
    cause = {errno.ENOLCK: "use a file system with locks", errno.EBADF: "NFS asks for the right to write it"}[code]
    with pytest.raises(OSError, match=cause) as raised:
        Lock(tmp_path)
    assert raised.value.filename == str(tmp_path / ".lock")


def test_a_lock_file_that_may_only_be_read_can_be_locked(tmp_path):
    directory = tmp_path / "shared"
    directory.mkdir(mode=0o755)
    (directory / ".lock").touch(mode=0o444)
    with started(HOLD, directory, "65534"), pytest.raises(InUse, match="shared is in use by another process; wait"):
        Lock(directory)


@pytest.mark.parametrize("fate", ["moved", "deleted", "replaced", "unlocked", "a file"])
def test_a_lock_tells_when_its_directory_is_another(tmp_path, fate):
    directory = tmp_path / "run"
    with lock_directory(directory) as lock:
        lock.check()
        if fate in ("moved", "replaced"):
            directory.rename(tmp_path / "elsewhere")
        elif fate in ("deleted", "a file"):
            shutil.rmtree(directory)
        else:
            (directory / ".lock").unlink()
        if fate == "replaced":
            lock_directory(directory).__exit__()
        if fate == "a file":
            directory.touch()
        with pytest.raises(InUse, match="run was moved or deleted, .* nothing more is written there"):
            lock.check()


def test_who_locks_a_directory_makes_it_and_deletes_what_is_half_written(tmp_path):
    directory = tmp_path / "a" / "b"
    lock_directory(directory).__exit__()
    with started(WRITE, directory / "x.pyT") as killed:
        killed.kill()
    for name in (".x.pyT.tmp", "y.pyT"):  # the first of an earlier version
        (directory / name).write_text("half")
    assert len(list(directory.glob(".x.pyT.*"))) == 2
    with lock_directory(directory):
        assert {path.name for path in directory.iterdir()} == {".lock", "y.pyT"}


def test_processes_may_write_one_file_at_once_and_while_its_directory_is_locked(tmp_path):
    with started(WRITE, tmp_path / "figure.png") as other:
        with lock_directory(tmp_path):
            write_file(tmp_path / "figure.png", b"ours")
        assert (tmp_path / "figure.png").read_bytes() == b"ours"
        other.stdin.close()
    assert other.returncode == 0 and (tmp_path / "figure.png").read_bytes() == b"theirs"


def test_nothing_is_written_or_deleted_through_what_others_planted(tmp_path, other_user):
    victim, directory = tmp_path / "victim", tmp_path / "run"
    victim.write_text("not ours")
    directory.mkdir()
    (directory / ".file.tmp").symlink_to(victim)
    os.mkfifo(directory / ".fifo.tmp")
    (directory / ".directory.tmp").mkdir()
    (directory / ".theirs.tmp").write_text("being written")
    os.chown(directory / ".theirs.tmp", other_user, -1)
    os.link(victim, directory / ".lock")
    planted = set(directory.iterdir())
    with lock_directory(directory):
        write_file(directory / "file", b"new")
    assert set(directory.iterdir()) == planted | {directory / "file"} and victim.read_text() == "not ours"
    (directory / ".lock").unlink()
    (directory / ".lock").symlink_to(victim)
    with pytest.raises(RnormError, match="run/.lock is a link, and a lock has to be a file; delete the link"):
        lock_directory(directory)
    assert victim.read_text() == "not ours"


def test_a_directory_may_be_the_users_own_link_but_not_anothers(tmp_path, other_user):
    link, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    link.symlink_to(elsewhere)
    if other_user > 0:
        lock_directory(link).__exit__()
        assert (elsewhere / ".lock").exists()
        os.lchown(link, other_user, -1)
    with pytest.raises(RnormError, match="run is a link that another user made; delete it"):
        lock_directory(link)
