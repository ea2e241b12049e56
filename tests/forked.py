"""Runs of the small study in processes of their own, which start in milliseconds and meet a fault at a set place.

Importing torch takes seconds, so one process imports it and forks: every study is a real process with its own signals,
locks and exit status. `python forked.py` is that process; it obeys lines of JSON on stdin.
"""

import builtins
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

LIMIT = 120  # seconds after which a study that hangs is killed


class Study:
    """A running study: experiments.py or convert.py with the small CNN."""

    def __init__(self, server: "Server", pid: int, log: Path):
        self.server, self.pid, self.log = server, pid, log

    def wait(self) -> "Study":
        """Wait for its end: exit status (or minus a signal's number) in `status`, its lines in `out` and `err`."""
        timer = threading.Timer(LIMIT, os.kill, (self.pid, signal.SIGKILL))
        timer.start()
        self.status = self.server.ask({"wait": self.pid})
        timer.cancel()
        self.out, self.err = (self.log.with_suffix(end).read_text() for end in (".out", ".err"))
        assert "Traceback" not in self.err, self.err
        return self

    def kill(self, signum: signal.Signals = signal.SIGKILL) -> "Study":
        """Send it a signal and wait for its end."""
        os.kill(self.pid, signum)
        return self.wait()


class Server:
    """The process that forks the studies."""

    def __init__(self, directory: Path):
        self.directory, self.count = directory, 0
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request: dict) -> int:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, script: str, *arguments: object, **options: object) -> Study:
        """Start a study; one that a `stop` fault is to stop has been stopped when this returns.

        Options: `fault`, arguments of `Fault`; `save_every` seconds that latest.pyT is written; `stdout`, a file for
        its output, in place of one that `wait` reads; `env`, environment variables to set; `threads` of torch.
        """
        self.count += 1
        log = self.directory / f"study{self.count}"
        for end in (".out", ".err"):
            log.with_suffix(end).touch()
        study = Study(self, self.ask({"argv": [script, *map(str, arguments)], "log": str(log), **options}), log)
        if options.get("fault", {}).get("action") == "stop":
            self.ask({"wait_stopped": study.pid})
        return study

    def run(self, script: str, *arguments: object, **options: object) -> Study:
        """Start a study and wait for its end."""
        return self.start(script, *arguments, **options).wait()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Fault:
    """Does `action` at the `at`-th of the calls open, write (half of it is done), fsync, replace, rename, unlink, step,
    stepped (as step, but after it), evaluate.

    action: "kill" (with -9), "stop" (until SIGCONT), "fill" (the disk that `filler` lies on), "oom" (memory is
    exhausted), or a signal's name. file: only calls on files with this in their path count; call: only this call
    counts. `step`, `stepped` and `evaluate`, of training, count only if they are named.
    """

    def __init__(self, action: str, at: int, file: str = "", call: str = "", filler: str = ""):
        self.action, self.left, self.file, self.call, self.filler = action, at, file, call, filler
        import train
        from rnorm import files

        files.open = self.open
        for where, name in ((os, "fsync"), (os, "replace"), (Path, "rename"), (Path, "unlink")):
            setattr(where, name, self.wrap(name, getattr(where, name)))
        if call in ("step", "stepped"):
            train.sgd_step = self.wrap(call, train.sgd_step)
        if call == "evaluate":
            train.evaluate = self.wrap(call, train.evaluate)

    def reached(self, call: str, file: object) -> None:
        if isinstance(file, int):
            file = os.readlink(f"/proc/self/fd/{file}")
        if self.file not in str(file) or (self.call and self.call != call):
            return
        self.left -= 1
        if self.left != 0:
            return
        if self.action == "fill":
            fill(self.filler)
        elif self.action == "oom":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")  # as torch.OutOfMemoryError
        elif self.action == "stop":  # until SIGCONT, here: a signal to the process may reach another thread, later
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        else:
            os.kill(os.getpid(), signal.SIGKILL if self.action == "kill" else signal.Signals[self.action])

    def wrap(self, name: str, function):
        def faulty(path, *args, **kwargs):
            if name != "stepped":
                self.reached(name, path)
            result = function(path, *args, **kwargs)
            if name == "stepped":
                self.reached(name, path)
            return result

        return faulty

    def open(self, path, mode="r", **kwargs):
        """`open`; what is opened for writing reaches the fault when half of the content is written."""
        if mode != "xb":
            return builtins.open(path, mode, **kwargs)
        self.reached("open", path)

        class Half(io.BufferedWriter):
            def write(half, content: bytes) -> None:
                super().write(content[: len(content) // 2])
                half.flush()
                self.reached("write", path)
                super().write(content[len(content) // 2 :])

        return Half(io.FileIO(path, "xb"))


def fill(filler: str) -> None:
    """Fill the disk that the file `filler` lies on to the last byte."""
    with builtins.open(filler, "wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def child(request: dict) -> None:
    """Be a study."""
    import small_study
    import torch
    from rnorm import cli, signals, store
    from rnorm.plan import Item

    os.setsid()
    os.environ.update(request.get("env", {}))
    torch.set_num_threads(request.get("threads", 1))
    store.SAVE_EVERY = request.get("save_every", store.SAVE_EVERY)
    streams = (request.get("stdout", request["log"] + ".out"), request["log"] + ".err")
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    small_study.experiments.plan_items = lambda members, data: [Item(member, 100, 0.0, 0.0) for member in members]
    signals.note_signals()
    if "fault" in request:
        Fault(**request["fault"])
    try:
        cli.finish(small_study.SCRIPTS[request["argv"][0]], request["argv"])
    except SystemExit as exit:
        os._exit(exit.code)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)


def serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    import small_study  # the seconds that every study is spared
    import torch
    from train import SGD, sgd_step

    torch.set_num_threads(1)  # a process that had several could not be forked
    net = small_study.small_cnn()
    sgd_step(net, SGD(net, [0.1] * 6, 0.1), torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))
    studies = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            reply = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            studies.remove(request["wait"])
        elif "wait_stopped" in request:
            reply = os.waitpid(request["wait_stopped"], os.WUNTRACED)[1]
        else:
            assert not torch.cuda.is_initialized()  # CUDA does not survive a fork
            reply = os.fork()
            if reply == 0:
                child(request)
            studies.add(reply)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    for pid in studies:  # of tests that failed
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
