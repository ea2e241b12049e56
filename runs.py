"""What a run is on disk: its settings and name, its files and their locks. README.md describes every file.

Imports neither torch nor numpy at its top, so that scripts note signals before these have loaded.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cli import BAD_INPUT, ENVIRONMENT, Stop

CNN = "skinnyprime"  # names of the files of the tied network and
ELCN = "skinnyprime_lc_version"  # of the untied ones
HISTORY, LATEST = "evaluation-history.hist", "latest.pyT"
ELCN_EVALUATIONS = 20


def log_spaced_epochs(n: int, count: int) -> list[int]:
    """At most `count` log-spaced epochs from 1 to `n`, the last included unless count is 1."""
    import numpy as np

    # Without the tiny addition, rounding drops epoch n for n = 30, 40, 50, 80, ...
    return [int(e) for e in np.unique((np.logspace(0, np.log10(n), count) + 1e-9).astype(int))]


@dataclass(frozen=True)
class Settings:
    """What decides a run's results; with the data's SHA-256 its identity. Learning rates are those of plain SGD."""

    epochs: int = 150
    n_splits: int = 20
    cnn_lr: float = 0.05
    lc_lr: float = 0.01
    splits: tuple[int, ...] = ()  # explicit split epochs, in place of n_splits
    lc_epochs: int = 0  # 0: as many as epochs
    dataset: str = "cifar10"  # the name, or an .npz file's stem
    data_size: int = 0  # 0: all training images
    batch_size: int = 250
    seed: int = 0
    shuffle: bool = False
    precision: str = "float32"

    def __post_init__(self):
        """Raises Stop where a value makes no sense."""
        for name, low, high in (("epochs", 1, 10**5), ("n_splits", 1, 10**4), ("lc_epochs", 0, 10**5),
                                ("data_size", 0, 10**9), ("batch_size", 1, 10**6), ("seed", 0, 2**32 - 1)):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise Stop(f"--{name} {getattr(self, name)}: has to be between {low} and {high}")
        for name in ("cnn_lr", "lc_lr"):
            if not 0 < getattr(self, name) <= 1e38:
                raise Stop(f"--{name} {getattr(self, name)}: has to be positive and at most 1e38, as in float32")
        if self.splits and not 0 <= min(self.splits) <= max(self.splits) <= self.epochs:
            raise Stop(f"--splits {' '.join(map(str, self.splits))}: have to lie between 0 and --epochs {self.epochs}")
        set_ = object.__setattr__  # one spelling for settings that mean the same
        set_(self, "splits", tuple(sorted(set(self.splits))))
        set_(self, "lc_epochs", 0 if self.lc_epochs == self.epochs else self.lc_epochs)
        set_(self, "n_splits", Settings.n_splits if self.splits else self.n_splits)

    @property
    def split_epochs(self) -> list[int]:
        """The CNN's epochs at which it is untied."""
        return list(self.splits) or log_spaced_epochs(self.epochs, self.n_splits)

    @property
    def elcn_epochs(self) -> int:
        return self.lc_epochs or self.epochs

    @property
    def elcn_evaluations(self) -> list[int]:
        """An eLCN's own epochs at which it is evaluated and checkpointed."""
        return [0, *log_spaced_epochs(self.elcn_epochs, ELCN_EVALUATIONS)]

    @property
    def run_name(self) -> str:
        parts = {"epochs": self.epochs, "n_splits": self.n_splits, "cnn_lr": self.cnn_lr, "lc_lr": self.lc_lr}
        if self.splits:
            del parts["n_splits"]
            parts["splits"] = "+".join(map(str, self.splits))
        for name in ("lc_epochs", "dataset", "data_size", "batch_size", "seed", "shuffle", "precision"):
            if getattr(self, name) != getattr(Settings, name):
                parts[name] = getattr(self, name)
        return "-".join(name if value is True else f"{name}={value}" for name, value in parts.items())

    @classmethod
    def of_run(cls, run: Path) -> tuple["Settings", dict]:
        """The settings and the whole config of a run; raises Stop if `run` is not one."""
        try:
            return cls._read(run / "config.json")
        except (FileNotFoundError, NotADirectoryError):
            raise Stop(f"{run} is not a run of experiments.py: it has no config.json") from None
        except (OSError, ValueError) as error:
            raise Stop(f"{run / 'config.json'} is damaged ({error}); repeat the run's experiments.py command") from None

    @classmethod
    def _read(cls, path: Path) -> tuple["Settings", dict]:
        """Raises OSError or ValueError."""
        try:
            config = json.loads(path.read_text())
            if config.pop("crc32", _crc32(config)) != _crc32(config):
                raise ValueError("wrong checksum")
            settings = dict(config["settings"])
            settings["splits"] = tuple(settings["splits"])
            right = all(type(value) is type(getattr(cls, name)) for name, value in settings.items())
            if not right or not all(type(split) is int for split in settings["splits"]):
                raise ValueError("a setting has the wrong type")
            if not isinstance(config.get("dataset_file"), str | None):
                raise ValueError("dataset_file is no path")
            return cls(**settings), config
        except (KeyError, TypeError, AttributeError, RecursionError, Stop) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None


def _crc32(config: dict) -> int:
    """The checksum in config.json of the rest of it."""
    return zlib.crc32(json.dumps({k: v for k, v in config.items() if k != "crc32"}, sort_keys=True).encode())


def network_directory(run: Path, split: int | None) -> Path:
    """Where the files of the CNN (split None) or of the eLCN untied at epoch `split` lie."""
    return run if split is None else run / f"{ELCN}_{split}"


def checkpoint_path(run: Path, split: int | None, epoch: int) -> Path:
    return network_directory(run, split) / f"{CNN if split is None else ELCN}_{epoch}.pyT"


def label(split: int | None) -> str:
    """A network's name for people and in status.json."""
    return "CNN" if split is None else f"eLCN from {split}"


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that at every moment the old file or the new one is there, whole."""
    temporary = path.with_name(f".{path.name}.tmp")  # its directory's lock keeps others from the same name
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # for the line that `finish` prints
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """For what the user named: that it cannot be written is bad input, unless its disk is full."""
    try:
        yield
    except OSError as error:
        status = ENVIRONMENT if error.errno in (errno.ENOSPC, errno.EDQUOT) else BAD_INPUT
        raise Stop(f"{path} cannot be written ({error.strerror}); {remedy}", status) from None


def set_aside(path: Path, reason: str) -> None:
    """Rename a damaged file to the first free name FILE.damaged, FILE.damaged-2, ... and say so."""
    n, aside = 1, path.with_name(f"{path.name}.damaged")
    while aside.exists():
        n, aside = n + 1, path.with_name(f"{path.name}.damaged-{n + 1}")
    path.rename(aside)
    print(f"warning: {path} is damaged ({reason}); it is now {aside.name}", file=sys.stderr)


class Lock:
    """A directory's lock, held by the kernel (fcntl): it ends with its holder, and works between hosts over NFS.

    Raises Stop (ENVIRONMENT) if another process holds it, unless `wait`. The file names the holder for people.
    """

    def __init__(self, directory: Path, name: str = ".lock", wait: bool = False):
        self.path = directory / name
        self.file = open(self.path, "a+")  # noqa: SIM115 - open for as long as the lock is held
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            raise Stop(f"{directory} is in use by {holder}; wait for it, or stop it first", ENVIRONMENT) from None
        except OSError as error:
            self.file.close()
            raise Stop(f"{self.path} cannot be locked: {error}; use a file system with locks", ENVIRONMENT) from None
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


def lock_network(directory: Path) -> Lock:
    """Make a network's directory, lock it, and clear away what a killed process left half-written there."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = Lock(directory)
    for leftover in directory.glob(".*.tmp"):
        if leftover.name != ".status.json.tmp":  # status.json has a lock of its own
            leftover.unlink(missing_ok=True)
    return lock


def read_status(run: Path, damaged: Callable[[Path, str], None] = lambda path, reason: None) -> dict:
    """status.json: {"networks": {label: {...}}, "sessions": [...]}; empty if missing or bad, told to `damaged`."""
    path = run / "status.json"
    try:
        status = json.loads(path.read_text())
        if isinstance(status["sessions"], list) and all(isinstance(n, dict) for n in status["networks"].values()):
            return status
        damaged(path, "not the lists and dicts it should be")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        damaged(path, f"{type(error).__name__}: {error}")
    return {"networks": {}, "sessions": []}


def update_status(run: Path, change: Callable[[dict], object]) -> None:
    """Apply `change` to status.json; processes that train other networks of the run do the same meanwhile."""
    with Lock(run, ".status.lock", wait=True):
        status = read_status(run, set_aside)
        change(status)
        write_file(run / "status.json", (json.dumps(status, indent=1) + "\n").encode())


def network_status(run: Path, split: int | None, **values) -> None:
    """Note values of one network in status.json."""
    update_status(run, lambda status: status["networks"].setdefault(label(split), {}).update(values))


def begin_session(run: Path, device: str) -> None:
    """Note in status.json that this process starts to work on the run."""
    session = {
        "started": datetime.now().isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": device,
        "command": sys.argv,
    }
    update_status(run, lambda status: status["sessions"].append(session))


def environment(device: str, threads: int) -> dict:
    """What is recorded of the machine and the software; a change of it in a run is a warning."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"device": device, "threads": threads, "versions": versions, "git_commit": commit or "unknown"}


def write_config(run: Path, settings: Settings, sha256: str, dataset_file: str | None, environment: dict) -> None:
    """Write a new run's config.json, or compare with the one that is there.

    Raises Stop with the differences if the run's identity is another; other versions, device, threads or commit
    are a warning. Where an .npz file lies is neither.
    """
    new = {"settings": dataclasses.asdict(settings), "data_sha256": sha256, "dataset_file": dataset_file, **environment}
    path = run / "config.json"
    try:
        old_settings, old = Settings._read(path)
    except (OSError, ValueError) as error:
        if path.exists():
            set_aside(path, str(error))
        write_file(path, (json.dumps({**new, "crc32": _crc32(new)}, indent=1) + "\n").encode())
        return
    there = {**dataclasses.asdict(old_settings), "data_sha256": old.get("data_sha256")}
    here = {**new["settings"], "data_sha256": sha256}
    if differences := [f"{key} {there[key]} there, {here[key]} here" for key in here if there[key] != here[key]]:
        raise Stop(
            f"{run} is another run: {'; '.join(differences)}; give the same data and settings, or use another "
            "--results_dir, or --fresh to delete it"
        )
    for key in environment:
        if old.get(key) != new[key]:
            print(f"warning: {run.name} was begun with {key} {old.get(key)}, now {new[key]}", file=sys.stderr)
