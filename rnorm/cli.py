"""How every script starts and ends: its command line, signals and exit statuses.

Imports neither torch nor numpy: a script notes signals before these have loaded, which takes seconds.
"""

import argparse
import contextlib
import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rnorm.files import InUse, RnormError

# Exit statuses of every script.
COMPLETE = 0
ENVIRONMENT = 1  # the environment failed: disk, lock, memory, GPU
BAD_INPUT = 2
DIVERGED = 3  # the loss of a network is no longer finite; everything else is complete
SAVED = 75  # stopped by SIGUSR1 after some progress, to be continued; 130 after SIGINT and 143 after SIGTERM

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: SAVED}


class Stop(RnormError):
    """Ends a script with one line on stderr, in terms of its flags, and an exit status."""

    def __init__(self, message: str, status: int = BAD_INPUT):
        super().__init__(message)
        self.status = status


class Signals:
    """The signals of this process: the first one received, and what is to happen when one comes."""

    received: signal.Signals | None = None
    at_once = False  # raise wherever it comes, rather than at the next check
    progress = False  # whether anything was done since the start that the next start need not do again


def note_signals() -> None:
    """From now on, note SIGINT, SIGTERM and SIGUSR1 for `check_signals`; forget those of before, and progress."""
    Signals.received, Signals.progress = None, False
    for signum in SIGNALS:
        signal.signal(signum, _note)


def _note(signum: int, _: object) -> None:
    Signals.received = Signals.received or signal.Signals(signum)
    if Signals.at_once:
        raise KeyboardInterrupt


def check_signals() -> None:
    """Raise KeyboardInterrupt if a signal has been noted."""
    if Signals.received:
        raise KeyboardInterrupt


def note_progress() -> None:
    """Say that something was done; a job that is stopped before that is not to be continued over and over."""
    Signals.progress = True


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """For what takes long and leaves nothing to save, such as a download: a signal raises wherever it comes."""
    before = Signals.at_once
    try:
        Signals.at_once = True
        check_signals()
        yield
    finally:
        Signals.at_once = before


class Parser(argparse.ArgumentParser):
    """The command line. A mistake in it is a Stop. Flags cannot be abbreviated: `--fresh` deletes."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        if wrong := [word for word in argv if word.endswith("=--")]:  # argparse would read an empty list
            self.error(f"{wrong[0]}: -- is no value")
        return super().parse_args(argv)

    def error(self, message: str) -> None:
        raise Stop(f"{message}; see --help")


@contextlib.contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Around writing what the user named: if that fails it is bad input, unless the disk is full."""
    try:
        yield
    except OSError as error:
        status = ENVIRONMENT if error.errno in (errno.ENOSPC, errno.EDQUOT) else BAD_INPUT
        raise Stop(f"{path} cannot be written ({error.strerror or error}); {remedy}", status) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the GPU or of the machine; torch has several errors for it, all RuntimeErrors."""
    words = r"out of memory|(CUBLAS|CUDNN)_STATUS_\w*ALLOC(ATION)?_FAILED|DefaultCPUAllocator"
    if isinstance(error, RuntimeError):
        return re.search(words, str(error)) is not None
    return isinstance(error, MemoryError)


def finish(main: Callable[[list[str]], int], argv: list[str], saves: bool = True) -> None:
    """Run a script's `main` and exit with its status; every expected failure becomes one line on stderr.

    `saves` says whether an interrupted script can be continued with the same command.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # the name of a file need not be valid text
    message = ""
    try:
        status = main(argv[1:])
        sys.stdout.flush()
    except Stop as stop:
        message, status = str(stop), stop.status
    except InUse as error:
        message, status = str(error), ENVIRONMENT
    except RnormError as error:
        message, status = str(error), BAD_INPUT
    except KeyboardInterrupt:
        received = Signals.received or signal.SIGINT
        message, status = received.name, SIGNALS[received]
        if not saves:
            message += ": stopped; nothing was written"
        elif received == signal.SIGUSR1 and not Signals.progress:
            message, status = f"{message}: no step was taken since the start; give the job more time", ENVIRONMENT
        else:
            command = shlex.join(["python", *(word for word in argv if word != "--fresh")])
            message += f": saved; continue with: {command}"
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        message, status = f"{name}{error.strerror or error}; what was saved before is intact", ENVIRONMENT
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise  # a mistake in the code, whose traceback is wanted
        message, status = "out of memory; free some, or use a machine or GPU with more", ENVIRONMENT
    if message:
        with contextlib.suppress(OSError):
            print(f"{Path(argv[0]).name}: {' '.join(message.splitlines())}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the disk of the log is full, or nobody reads it; the exit status has to arrive all the same
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)
