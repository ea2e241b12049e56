"""Files that are written whole or not at all, and locks that no dead process holds. Standard library only."""

import contextlib
import fcntl
import os
import socket
import sys
from pathlib import Path


class RnormError(Exception):
    """What is wrong with data, settings or the files of a run, in one line for people."""


class Damaged(RnormError):
    """A file that is not what it should be; the message says how."""


class InUse(RnormError):
    """Another process holds a lock."""


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write `content` to `path`, so that at every moment the old file or the new one is there, whole."""
    temporary = path.with_name(f".{path.name}.tmp")  # the lock of the directory keeps others from this name
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # the message names the file that was meant
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def set_aside(path: Path, reason: str) -> None:
    """Rename a damaged file to the first free name FILE.damaged, FILE.damaged-2, ... and say so."""
    n, aside = 1, path.with_name(f"{path.name}.damaged")
    while aside.exists():
        n += 1
        aside = path.with_name(f"{path.name}.damaged-{n}")
    path.rename(aside)
    print(f"warning: {path} is damaged ({reason}); it is now {aside.name}", file=sys.stderr)


def files_below(directory: Path) -> list[tuple[Path, int, int]]:
    """(path, time of change, bytes) of the files below `directory` except locks; other processes may be at work."""
    files = []
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.name.endswith(".lock"):
                files.append((path, path.stat().st_mtime_ns, path.stat().st_size))
    return files


class Lock:
    """The lock of a directory. The kernel holds it (flock), so it ends with its holder; NFS passes it between hosts.

    Raises InUse if another process holds it, unless `wait`; OSError where the file system has no locks. The lock file
    names its holder for people.
    """

    def __init__(self, directory: Path, name: str = ".lock", wait: bool = False):
        self.path = directory / name
        self.file = open(self.path, "a+")  # noqa: SIM115 - open for as long as the lock is held
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            raise InUse(f"{directory} is in use by {holder}; wait for it, or stop it first") from None
        except OSError as error:
            self.file.close()
            reason = f"cannot be locked ({error.strerror}); use a file system with locks"
            raise OSError(error.errno, reason, str(self.path)) from None
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def check(self) -> None:
        """Raise InUse if the lock file at the path is another by now."""

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


def lock_directory(directory: Path, wait: bool = False) -> Lock:
    """Make a network's directory, lock it, and delete what a killed process left half-written there."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = Lock(directory, wait=wait)
    for leftover in directory.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    return lock
