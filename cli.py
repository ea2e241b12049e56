"""How every script starts and ends: its command line, signals, and exit statuses.

Imports neither torch nor numpy, so that scripts note signals before these have loaded.
"""

import argparse
import contextlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Exit statuses of every script.
COMPLETE = 0
ENVIRONMENT = 1  # the environment failed: disk, lock, memory
BAD_INPUT = 2
DIVERGED = 3  # a network's loss is no longer finite; everything else is complete
SAVED = 75  # stopped by SIGUSR1, saved and to be continued; 130 after SIGINT and 143 after SIGTERM


class Stop(Exception):
    """Ends a script with one line on stderr and an exit status."""

    def __init__(self, message: str, status: int = BAD_INPUT):
        super().__init__(message)
        self.status = status


class Interrupted(BaseException):
    """A signal asked the script to save and stop."""


class Interrupt:
    """Notes SIGINT, SIGTERM and SIGUSR1 from its making on; `check` raises once one has come."""

    STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: SAVED}

    def __init__(self):
        self.signum: signal.Signals | None = None
        self._at_once = False
        for signum in self.STATUS:
            signal.signal(signum, self._note)

    def _note(self, signum: int, _) -> None:
        self.signum = self.signum or signal.Signals(signum)
        if self._at_once:
            raise Interrupted

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """For what takes long and leaves nothing to save, such as a download: a signal raises wherever it comes."""
        try:
            self._at_once = True
            self.check()
            yield
        finally:
            self._at_once = False

    @property
    def status(self) -> int:
        return self.STATUS[self.signum]

    def check(self) -> None:
        if self.signum is not None:
            raise Interrupted


class Parser(argparse.ArgumentParser):
    """The command line; a mistake in it is a Stop, and flags have to be written out, `--fresh` above all."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        if wrong := [word for word in argv if word.endswith("=--")]:  # of which argparse makes an empty list
            self.error(f"{wrong[0]}: -- is no value")
        return super().parse_args(argv)

    def error(self, message: str) -> None:
        raise Stop(f"{message}; see --help")


def finish(main: Callable[[list[str], Interrupt], int], argv: list[str], interrupt: Interrupt) -> None:
    """Run a script's `main` and exit with its status; every expected failure becomes one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a file's name need not be valid text
    message = ""
    try:
        status = main(argv[1:], interrupt)
        sys.stdout.flush()
    except Stop as stop:
        message, status = str(stop), stop.status
    except Interrupted:
        command = shlex.join(["python", *(word for word in argv if word != "--fresh")])
        message, status = f"{interrupt.signum.name}: saved; continue with: {command}", interrupt.status
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        message, status = f"{name}{error.strerror or error}; what was saved before is intact", ENVIRONMENT
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("DefaultCPUAllocator|out of memory", str(error)):
            raise  # a mistake in the code, whose traceback is wanted
        message, status = "out of memory; lower --batch_size or --data_size", ENVIRONMENT
    if message:
        with contextlib.suppress(OSError):
            print(f"{Path(argv[0]).name}: {' '.join(message.splitlines())}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the log's disk is full, or nobody reads it: the status has to come through all the same
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)
