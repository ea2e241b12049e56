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
from conftest import run_of

from rnorm.cli import Stop, finish, writing
from rnorm.files import Damaged, InUse, RnormError
from rnorm.signals import SIGNALS, Signals, check_signals, note_progress, note_signals, stopping_at_once

ROOT = Path(__file__).parents[1]
CONTINUE = "continue with: python dir/experiments.py --data_dir 'a b'"
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
        finish(main, ["dir/experiments.py", "--data_dir", "a b"], **options)
    return exit.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error, status, line", [
    (0, 0, ""), (3, 3, ""), (Stop("a\nb"), 2, "a b"), (Stop("full", 1), 1, "full"),
    (RnormError("bad"), 2, "bad"), (Damaged("bad"), 2, "bad"), (InUse("dir is in use"), 1, "dir is in use"),
    (KeyboardInterrupt(), 130, f"SIGINT: nothing new was saved since the start; {CONTINUE}"),
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
    ValueError("out of memory"), KeyError("a mistake"), ImportError("no module"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    ACCELERATOR("CUDA error: an illegal memory access was encountered"),
])  # fmt: skip
def test_a_mistake_in_the_code_keeps_its_traceback(error, capsys):
    with pytest.raises(type(error)):
        ended(error, capsys)


@pytest.mark.parametrize("signum, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 75)])
def test_a_signal_is_noted_and_told_with_the_command_that_continues(capsys, signum, status):
    check_signals()
    note_progress()
    os.kill(os.getpid(), signal.Signals[signum])
    os.kill(os.getpid(), signal.SIGINT)  # the first one counts
    with pytest.raises(KeyboardInterrupt) as interrupt:
        check_signals()
    assert ended(interrupt.value, capsys) == (status, f"experiments.py: {signum}: saved; {CONTINUE}\n")
    assert "nothing was written" in ended(interrupt.value, capsys, saves=False)[1]


@pytest.mark.parametrize("signum, status, advice", [
    ("SIGTERM", 143, CONTINUE), ("SIGUSR1", 1, "give the job more time"),  # else it is continued for ever
])  # fmt: skip
def test_what_saved_nothing_new_does_not_say_that_it_saved(capsys, signum, status, advice):
    os.kill(os.getpid(), signal.Signals[signum])
    line = f"experiments.py: {signum}: nothing new was saved since the start; {advice}\n"
    assert ended(KeyboardInterrupt(), capsys) == (status, line)


def test_repeating_epochs_of_the_cnn_for_a_split_is_no_progress(server, command):
    """It is not saved, so a job that gets no further would be continued for ever."""
    assert server.run(*command, "--cnn_only").status == 0
    (run_of(command) / "small_1.pyT").unlink()
    study = server.run(*command, fault={"action": "SIGUSR1", "call": "step", "at": 3})
    assert study.status == 1 and "SIGUSR1: nothing new was saved since the start" in study.err


def test_what_leaves_nothing_to_save_is_stopped_at_once():
    with pytest.raises(KeyboardInterrupt), stopping_at_once():
        with stopping_at_once():
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # still within the outer one
        pytest.fail("went on")
    with pytest.raises(KeyboardInterrupt), stopping_at_once():  # noted before
        pytest.fail("went on")
    os.kill(os.getpid(), signal.SIGTERM)  # outside again: only noted


def test_a_burst_of_signals_stops_once():
    cleaned = False
    with pytest.raises(KeyboardInterrupt), stopping_at_once():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned = True
    assert cleaned and not Signals.at_once


def test_a_signal_that_a_library_turns_into_its_own_error_is_a_signal(capsys):
    """As modules written in C do, whose import it stops."""

    def main(argv: list[str]) -> int:
        with stopping_at_once():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt as interrupt:
                raise ImportError("initialization failed") from interrupt

    with pytest.raises(SystemExit) as exit:
        finish(main, ["plot.py"], saves=False)
    assert exit.value.code == 130 and capsys.readouterr().err == "plot.py: SIGINT: stopped; nothing was written\n"


def test_control_characters_in_what_is_printed_are_escaped(capsys):
    def main(argv: list[str]) -> int:
        print("complete: \x1b[2Jrun\r\x9b\udcff")
        print("\rthe bar", end="")
        raise Stop("\x1b[2Jrun\x07 is no run")

    with pytest.raises(SystemExit):
        finish(main, ["plot.py"])
    out, err = capsys.readouterr()
    assert out == "complete: \\x1b[2Jrun\\r\\x9b\\udcff\n\rthe bar" and err == "plot.py: \\x1b[2Jrun\\x07 is no run\n"


@pytest.mark.parametrize("code, status", [(errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EACCES, 2), (errno.ENOTDIR, 2)])
def test_a_place_that_cannot_be_written_is_bad_input_unless_the_disk_is_full(tmp_path, code, status):
    with pytest.raises(Stop, match="cannot be written .*; name another") as stop, writing(tmp_path, "name another"):
        raise OSError(code, os.strerror(code))
    assert stop.value.status == status


# As processes


def start(main: str, **options) -> subprocess.Popen:
    """A script whose function `main` has these lines."""
    code = "import os, signal, sys, time\nfrom rnorm.cli import finish, Stop\nfrom rnorm.signals import *\n"
    code += f"def main(argv):\n  {main}\nnote_signals()\nfinish(main, ['plot.py'])"
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, **{"stdout": pipe, "stderr": pipe, "text": True} | options
    )


def test_the_exit_status_arrives_when_nobody_reads_what_is_printed():
    with open("/dev/full", "w") as full:
        assert start("print('x' * 99999); return 0", stdout=full, stderr=full).wait() == 1


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2), (0, 1, 2)])
def test_closed_streams_are_run_without_and_no_file_takes_their_place(tmp_path, closed):
    main = f"file = open({str(tmp_path / 'file')!r}, 'w'); print('out'); os.write(2, b'x'); raise Stop('err', 3)"
    process = start(main, preexec_fn=lambda: [os.close(number) for number in closed])
    assert process.wait() == 3 and (tmp_path / "file").read_text() == ""


def test_signals_after_the_last_line_change_nothing():
    """Python gives them their default action while it shuts down, after it has handled ours."""
    main = "note_progress(); os.kill(os.getpid(), signal.SIGUSR1); check_signals()\nclass Late:\n"
    main += "  def __del__(self, kill=os.kill, pid=os.getpid(), signals=(*SIGNALS,)):\n"
    main += "    for signum in signals: kill(pid, signum)\nlate = Late()"
    process = start(main)
    _, err = process.communicate()
    assert process.returncode == 75 and err == "plot.py: SIGUSR1: saved; continue with: python plot.py\n"


def test_where_sighup_is_ignored_from_the_start_it_stays_ignored():
    """As with nohup."""
    main = "os.kill(os.getpid(), signal.SIGHUP); check_signals(); return 3"
    assert start(main, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)).wait() == 3
    assert start(main).wait() == 129


def test_a_terminal_that_is_gone_is_no_error():
    ours, terminal = os.openpty()
    main = "print('at work', flush=True); sys.stdin.read(); print('on', flush=True); print('complete'); return 0"
    process = start(main, stdin=subprocess.PIPE, stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert b"at work" in os.read(ours, 100)
    os.close(ours)
    process.stdin.close()
    assert process.wait() == 0


SCRIPTS = sorted(path for path in [*ROOT.glob("*.py"), *ROOT.glob("results/*.py")] if "finish(" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_on_windows_a_script_ends_with_one_line(script):
    code = "import runpy, sys; sys.modules['fcntl'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    process = subprocess.run([sys.executable, "-c", code, script], capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr.count("\n") == 1 and "on Windows use WSL" in process.stderr


def test_without_a_home_directory_no_library_prints_advice():
    env = {name: value for name, value in os.environ.items() if name not in ("MPLCONFIGDIR", "XDG_CONFIG_HOME")}
    command = [sys.executable, ROOT / "plot.py", "--help"]
    process = subprocess.run(command, env=env | {"HOME": "/proc/none"}, capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == ""
