"""How every script starts and ends: its command line, what it prints, and its exit status.

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
from typing import TextIO

from rnorm.files import InUse, RnormError, is_out_of_memory
from rnorm.signals import SIGNALS, Signals, ignore_signals

# Exit statuses of every script; SIGNALS has those of one that a signal stopped.
COMPLETE = 0
ENVIRONMENT = 1  # the environment failed: disk, lock, memory, GPU
BAD_INPUT = 2
DIVERGED = 3  # the loss of a network is no longer finite; everything else is complete


class Stop(RnormError):
    """Ends a script with one line on stderr, in terms of its flags, and an exit status."""

    def __init__(self, message: str, status: int = BAD_INPUT):
        super().__init__(message)
        self.status = status


class Parser(argparse.ArgumentParser):
    """The command line. A mistake in it is a Stop. Flags cannot be abbreviated."""

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


class Printed:
    """stdout or stderr, with control characters in what is printed escaped: the name of a file may hold any.

    A terminal that is gone takes what is printed without an error, so that training goes on.
    """

    def __init__(self, stream: TextIO):
        stream.reconfigure(errors="backslashreplace")  # nor need a name be valid text
        self.stream, self.ignored = stream, (OSError,) if stream.isatty() else ()

    def write(self, text: str) -> int:
        with contextlib.suppress(*self.ignored):  # \r at the start is the progress bar's
            control = r"(?!\A\r)[\x00-\x08\x0b-\x1f\x7f-\x9f]"
            self.stream.write(re.sub(control, lambda found: found[0].encode("unicode_escape").decode(), text))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(*self.ignored):
            self.stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextlib.contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Around writing what the user named: if that fails it is bad input, unless the disk is full."""
    try:
        yield
    except OSError as error:
        status = ENVIRONMENT if error.errno in (errno.ENOSPC, errno.EDQUOT) else BAD_INPUT
        raise Stop(f"{path} cannot be written ({error.strerror or error}); {remedy}", status) from None


def finish(main: Callable[[list[str]], int], argv: list[str], saves: bool = True) -> None:
    """Run a script's `main` and exit with its status; every expected failure becomes one line on stderr.

    `saves` says whether an interrupted script can be continued with the same command.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-; whatever is opened next would take its place
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open to the end
    with contextlib.redirect_stdout(Printed(sys.stdout)), contextlib.redirect_stderr(Printed(sys.stderr)):
        try:
            message, status = "", main(argv[1:])
            sys.stdout.flush()
        except BaseException as error:
            message, status = ending(error, argv, saves)
        ignore_signals()
        if message:
            with contextlib.suppress(OSError):
                print(f"{Path(argv[0]).name}: {' '.join(message.splitlines())}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the disk of the log is full, or nobody reads it; the exit status has to arrive all the same
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def ending(error: BaseException, argv: list[str], saves: bool) -> tuple[str, int]:
    """The line on stderr and the exit status of a script that `error` ended; raises it if the code is mistaken."""
    if isinstance(error, KeyboardInterrupt) or Signals.raised:
        received = Signals.received or signal.SIGINT
        command = shlex.join(["python", *argv])
        if not saves:
            return f"{received.name}: stopped; nothing was written", SIGNALS[received]
        if Signals.progress:
            return f"{received.name}: saved; continue with: {command}", SIGNALS[received]
        if received == signal.SIGUSR1:
            return "SIGUSR1: nothing new was saved since the start; give the job more time", ENVIRONMENT
        return f"{received.name}: nothing new was saved since the start; continue with: {command}", SIGNALS[received]
    if isinstance(error, Stop):
        return str(error), error.status
    if isinstance(error, RnormError):
        return str(error), ENVIRONMENT if isinstance(error, InUse) else BAD_INPUT
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        status = BAD_INPUT if error.errno == errno.ENAMETOOLONG else ENVIRONMENT
        return f"{name}{error.strerror or error}; what was saved before is intact", status
    if is_out_of_memory(error):
        return "out of memory; free some, or use a machine or GPU with more", ENVIRONMENT
    raise error  # a mistake in the code, whose traceback is wanted, or the end of --help
