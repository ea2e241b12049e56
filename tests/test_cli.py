"""How every script starts and ends: command line, signals, exit statuses, and one line on stderr."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from rnorm.cli import SIGNALS, Stop, check_signals, finish, note_progress, note_signals, stopping_at_once, writing
from rnorm.files import Damaged, InUse, RnormError

CONTINUE = "saved; continue with: python dir/experiments.py --data_dir 'a b'"  # without --fresh
ACCELERATOR = getattr(torch, "AcceleratorError", RuntimeError)
MEMORY = "out of memory; free some, or use a machine or GPU with more"


@pytest.fixture(autouse=True)
def noted_signals():
    """Signals are noted in a test; afterwards pytest's handlers are put back, and what was noted is forgotten."""
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    note_signals()
    yield
    note_signals()
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def ended(error: BaseException | int, capsys, **options) -> tuple[int, str]:
    """(exit status, stderr) of a script that raises `error`, or returns it."""
    main = Mock(return_value=error) if isinstance(error, int) else Mock(side_effect=error)
    with pytest.raises(SystemExit) as exit:
        finish(main, ["dir/experiments.py", "--fresh", "--data_dir", "a b"], **options)
    return exit.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error, status, line", [
    (0, 0, ""), (3, 3, ""), (Stop("a\nb"), 2, "a b"), (Stop("full", 1), 1, "full"),
    (RnormError("bad"), 2, "bad"), (Damaged("bad"), 2, "bad"), (InUse("dir is in use"), 1, "dir is in use"),
    (KeyboardInterrupt(), 130, f"SIGINT: {CONTINUE}"),
    (OSError(errno.EIO, "Input/output error", "x"), 1, "x: Input/output error; what was saved before is intact"),
    (OSError("odd"), 1, "odd; what was saved before is intact"),
    (MemoryError(), 1, MEMORY),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 1, MEMORY),
    (ACCELERATOR("CUDA error: out of memory\nSearch for ..."), 1, MEMORY),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 1, MEMORY),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), 1, MEMORY),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), 1, MEMORY),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), 1, MEMORY),
])  # fmt: skip
def test_every_expected_end_is_an_exit_status_and_at_most_one_line(capsys, error, status, line):
    assert ended(error, capsys) == (status, f"experiments.py: {line}\n" if line else "")


@pytest.mark.parametrize("error", [
    ValueError("out of memory"), KeyError("a mistake"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    ACCELERATOR("CUDA error: an illegal memory access was encountered"),
])  # fmt: skip
def test_a_mistake_in_the_code_keeps_its_traceback(error, capsys):
    with pytest.raises(type(error)):
        ended(error, capsys)


@pytest.mark.parametrize("signum, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 75)])
def test_a_signal_is_noted_and_told_with_the_command_that_continues(capsys, signum, status):
    check_signals()
    note_progress()
    os.kill(os.getpid(), signal.Signals[signum])
    os.kill(os.getpid(), signal.SIGINT)  # the first one counts
    with pytest.raises(KeyboardInterrupt) as interrupt:
        check_signals()
    assert ended(interrupt.value, capsys) == (status, f"experiments.py: {signum}: {CONTINUE}\n")
    assert "nothing was written" in ended(interrupt.value, capsys, saves=False)[1]


def test_what_leaves_nothing_to_save_is_stopped_at_once():
    with pytest.raises(KeyboardInterrupt), stopping_at_once():
        with stopping_at_once():
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # still within the outer one
        pytest.fail("went on")
    with pytest.raises(KeyboardInterrupt), stopping_at_once():  # noted before
        pytest.fail("went on")
    os.kill(os.getpid(), signal.SIGTERM)  # outside again: only noted


@pytest.mark.parametrize("code, status", [(errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EACCES, 2), (errno.ENOTDIR, 2)])
def test_a_place_that_cannot_be_written_is_bad_input_unless_the_disk_is_full(tmp_path, code, status):
    with pytest.raises(Stop, match="cannot be written .*; name another") as stop, writing(tmp_path, "name another"):
        raise OSError(code, os.strerror(code))
    assert stop.value.status == status


def test_the_exit_status_arrives_when_nobody_reads_what_is_printed():
    code = "from rnorm.cli import finish; finish(lambda argv: print('x' * 99999) or 0, ['plot.py'])"
    with open("/dev/full", "w") as full:
        process = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], stdout=full, stderr=full)
    assert process.returncode == 1
