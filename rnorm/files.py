"""Files that are written whole or not at all, and locks that no dead process holds. Standard library only."""

import contextlib
import errno
import os
import re
import socket
import stat
import sys
from pathlib import Path
from typing import IO

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    sys.exit("Rnorm runs on Linux and macOS; on Windows use WSL. rnorm/layers.py, the layer, works everywhere")


class RnormError(Exception):
    """What is wrong with data, settings or the files of a run, in one line for people."""


class Damaged(RnormError):
    """A file that is not what it should be; the message says how."""


class InUse(RnormError):
    """Another process holds a lock, or the directory that this process locked is gone."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the GPU or of the machine; torch has several errors for it, all RuntimeErrors."""
    words = r"out of memory|(CUBLAS|CUDNN)_STATUS_\w*ALLOC(ATION)?_FAILED|DefaultCPUAllocator"
    if isinstance(error, RuntimeError):
        return re.search(words, str(error)) is not None
    return isinstance(error, MemoryError)


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write `content` to `path`, so that at every moment the old file or the new one is there, whole."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")  # a name that nobody else uses
    try:
        with open(temporary, "xb") as file:  # x: a new file, never one that is there or that a link leads to
            with contextlib.suppress(OSError):  # a file system may have no locks
                fcntl.flock(file, fcntl.LOCK_EX)  # so that `delete_leftovers` leaves it alone
            if not temporary.exists():  # it was not locked yet when another process looked for leftovers
                return write_file(path, content)
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
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot: VirtualBox, some of FUSE
            raise
    finally:
        os.close(directory)


def delete_leftovers(directory: Path) -> None:
    """Delete what killed processes left half-written: this user's plain files that no process is writing."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    for path in directory.glob(".*.tmp"):
        with contextlib.suppress(OSError), open(os.open(path, flags), "rb+") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def set_aside(path: Path, reason: str) -> None:
    """Rename a damaged file to the first free name FILE.damaged, FILE.damaged-2, ... and say so."""
    n, aside = 1, path.with_name(f"{path.name}.damaged")
    while os.path.lexists(aside):
        n += 1
        aside = path.with_name(f"{path.name}.damaged-{n}")
    path.rename(aside)
    print(f"warning: {path} is damaged ({reason}); it is now {aside.name}", file=sys.stderr)


class Lock:
    """The lock of a directory. The kernel holds it (flock), so it ends with its holder; NFS passes it between hosts.

    Raises InUse if another process holds it, unless `wait`; OSError where the file system has no locks. The lock file
    names its holder for people. A user who may only read it can lock it, except on NFS, and leaves the name as it is.
    """

    def __init__(self, directory: Path, name: str = ".lock", wait: bool = False):
        self.path = directory / name
        self.file = _open_lock(self.path)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            with self.file:
                holder = " ".join(self.file.read(200).split())
            if isinstance(error, (BlockingIOError, PermissionError)):
                holder = f"{holder}, as {name} says" if holder else "another process"
                raise InUse(f"{directory} is in use by {holder}; wait for it, or stop it first") from None
            reason = f"cannot be locked ({error.strerror}); use a file system with locks"
            if error.errno == errno.EBADF:
                reason = "cannot be locked: NFS asks for the right to write it, which its owner gives with chmod g+w"
            raise OSError(error.errno, reason, str(self.path)) from None
        if self.file.writable() and os.fstat(self.file.fileno()).st_nlink == 1:  # not a name of another file
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self.file.flush()

    def check(self) -> None:
        """Raise InUse if the directory at this path is no longer the one that was locked. To be called before writing.

        Whoever moves or deletes a directory takes the lock with it, and another process may have made a new one here.
        """
        try:
            same = os.path.samestat(os.fstat(self.file.fileno()), os.lstat(self.path))
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same:
            what = f"{self.path.parent} was moved or deleted, or its {self.path.name} was"
            raise InUse(f"{what}, while this process worked on it; nothing more is written there")

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


def _open_lock(path: Path) -> IO[str]:
    """Open a lock file, new if there is none: for reading alone where it may not be written, and never by a link."""
    flags, mode = os.O_NOFOLLOW | os.O_NONBLOCK, "r+"
    if path.is_symlink():
        raise RnormError(f"{path} is a link, and a lock has to be a file; delete the link")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        descriptor, mode = os.open(path, os.O_RDONLY | flags), "r"
    return open(descriptor, mode, errors="replace")


def lock_directory(directory: Path, wait: bool = False) -> Lock:
    """Make a network's directory, lock it, and delete what a killed process left half-written there.

    A directory that is a link, to another disk for instance, has to be the user's own link, or root's.
    """
    if directory.is_symlink() and directory.lstat().st_uid not in (os.geteuid(), 0):
        raise RnormError(f"{directory} is a link that another user made; delete it, or use another directory")
    directory.mkdir(parents=True, exist_ok=True)
    lock = Lock(directory, wait=wait)
    delete_leftovers(directory)
    return lock
