"""How every script starts and ends: command line, signals, exit statuses, and one line on stderr."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rnorm.cli import (
    SIGNALS, Interrupted, Parser, Stop, check_signals, finish, note_signals, stopping_at_once, writing,
)  # fmt: skip
from rnorm.files import Damaged, InUse, RnormError


@pytest.fixture(autouse=True)
def restore_signals():
    """`note_signals` is called within a test; put pytest's handlers back afterwards, and forget what was noted."""
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    note_signals()
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def ended(error: BaseException | int, capsys, **options) -> tuple[int, str]:
    """(exit status, stderr) of a script that raises `error`, or returns it."""

    def main(argv):
        if isinstance(error, int):
            return error
        raise error

    with pytest.raises(SystemExit) as exit:
        finish(main, ["dir/experiments.py", "--fresh", "--data_dir", "a b"], **options)
    return exit.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "error, status, line",
    [
        (0, 0, ""),
        (3, 3, ""),
        (Stop("a\nb"), 2, "a b"),
        (Stop("full", 1), 1, "full"),
        (RnormError("bad"), 2, "bad"),
        (Damaged("bad"), 2, "bad"),
        (InUse("dir is in use"), 1, "dir is in use"),
        (OSError(errno.EIO, "Input/output error", "x"), 1, "x: Input/output error; what was saved before is intact"),
        (OSError("odd"), 1, "odd; what was saved before is intact"),
    ],
)
def test_every_expected_end_is_an_exit_status_and_at_most_one_line(capsys, error, status, line):
    assert ended(error, capsys) == (status, f"experiments.py: {line}\n" if line else "")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_of_every_kind_is_one_line(capsys, error):
    assert ended(error, capsys) == (1, "experiments.py: out of memory; free some, or use a machine or GPU with more\n")


@pytest.mark.parametrize("error", [RuntimeError("a mistake"), ValueError("a mistake"), KeyError("a mistake")])
def test_a_mistake_in_the_code_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        finish(lambda argv: (_ for _ in ()).throw(error), ["experiments.py"])


@pytest.mark.parametrize("signum, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 75)])
def test_a_signal_is_noted_and_told_with_the_command_that_continues(capsys, signum, status):
    note_signals()
    check_signals()
    os.kill(os.getpid(), signal.Signals[signum])
    os.kill(os.getpid(), signal.SIGINT)  # the first one counts
    with pytest.raises(Interrupted) as interrupted:
        check_signals()
    line = f"experiments.py: {signum}: saved; continue with: python dir/experiments.py --data_dir 'a b'\n"
    assert ended(interrupted.value, capsys) == (status, line)  # without --fresh
    assert "nothing was written" in ended(interrupted.value, capsys, saves=False)[1]


def test_what_leaves_nothing_to_save_is_stopped_at_once():
    note_signals()
    with pytest.raises(Interrupted), stopping_at_once():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")
    with pytest.raises(Interrupted), stopping_at_once():  # noted before
        pytest.fail("went on")
    note_signals()
    with pytest.raises(Interrupted), stopping_at_once():
        with stopping_at_once():
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # still within the outer one
        pytest.fail("went on")
    note_signals()
    os.kill(os.getpid(), signal.SIGTERM)  # outside again: only noted


@pytest.mark.parametrize("argv", ["--fre", "--number=--", "--number=x", "word"])
def test_a_mistake_on_the_command_line_is_a_stop(argv):
    parser = Parser("What it does.")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--number", type=int)
    with pytest.raises(Stop, match="see --help") as stop:
        parser.parse_args([argv])
    assert stop.value.status == 2


@pytest.mark.parametrize("code, status", [(errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EACCES, 2), (errno.ENOTDIR, 2)])
def test_a_place_that_cannot_be_written_is_bad_input_unless_the_disk_is_full(tmp_path, code, status):
    with pytest.raises(Stop, match="cannot be written .*; name another") as stop, writing(tmp_path, "name another"):
        raise OSError(code, os.strerror(code))
    assert stop.value.status == status


def test_the_exit_status_arrives_when_nobody_reads_what_is_printed():
    code = "from rnorm.cli import finish; finish(lambda argv: print('x' * 99999) or 0, ['plot.py'])"
    with os.fdopen(os.open("/dev/full", os.O_WRONLY)) as full:
        process = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], stdout=full, stderr=full)
    assert process.returncode == 1
