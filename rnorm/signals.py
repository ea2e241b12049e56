"""Signals: noted when they come, obeyed where a script can stop. Standard library only."""

import contextlib
import logging
import signal
from collections.abc import Iterator

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 75}
"""Those that stop a script, and its exit status after each; 75, of a job ahead of its time limit: to be continued."""


class Signals:
    """The signals of this process: the first one received, and what is to happen when one comes."""

    received: signal.Signals | None = None
    at_once = False  # raise wherever it comes, rather than at the next check
    raised = False  # whether one was raised so, maybe within another library, which may turn it into its own error
    progress = False  # whether anything was done since the start that the next start need not do again


def note_signals() -> None:
    """What a script does first: from now on, note SIGNALS for `check_signals`; forget those of before, and progress.

    SIGHUP stays ignored where it is (nohup). Libraries that are imported now print no advice about their caches.
    """
    Signals.received, Signals.raised, Signals.progress = None, False, False
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    for signum in SIGNALS:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _note)


def _note(signum: int, _: object) -> None:
    Signals.received = Signals.received or signal.Signals(signum)
    if Signals.at_once and not Signals.raised:  # once: others may come while the first one ends the script
        Signals.raised = True
        raise KeyboardInterrupt


def ignore_signals() -> None:
    """From now on, ignore what was noted until now: the script is ending, and its exit status is settled."""
    for signum in SIGNALS:
        if signal.getsignal(signum) is _note:
            signal.signal(signum, signal.SIG_IGN)


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
