"""What a run is: its settings and name, its networks and where their files lie, config.json and status.json.

Imports neither torch nor numpy at its top, so that scripts note signals before these have loaded.
"""

import dataclasses
import json
import os
import platform
import re
import socket
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rnorm.files import Lock, RnormError, set_aside, write_file

ELCN_EVALUATIONS = 20  # at most so many log-spaced epochs at which an eLCN is evaluated
LIMITS = {
    "epochs": (1, 10**5), "n_splits": (1, 10**4), "lc_epochs": (0, 10**5), "data_size": (0, 10**9),
    "batch_size": (1, 10**6), "seed": (0, 2**32 - 1),
}  # fmt: skip


class AnotherRun(RnormError):
    """A run's directory holds a run of other settings or other data."""


def log_spaced_epochs(n: int, count: int) -> list[int]:
    """At most `count` log-spaced epochs from 1 to `n`, the last included unless count is 1."""
    import numpy as np

    # Without the tiny addition, rounding drops epoch n for n = 30, 40, 50, 80, ...
    return [int(e) for e in np.unique((np.logspace(0, np.log10(n), count) + 1e-9).astype(int))]


@dataclass(frozen=True)
class Settings:
    """What decides a run's results; with the data's SHA-256 its identity. Raises ValueError for senseless values."""

    epochs: int = 150
    n_splits: int = 20
    cnn_lr: float = 0.05
    lc_lr: float = 0.01
    splits: tuple[int, ...] = ()  # explicit split epochs, in place of n_splits
    lc_epochs: int = 0  # 0: as many as epochs
    network: str = "skinnyprime"
    dataset: str = "cifar10"  # the name, or an .npz file's stem
    data_size: int = 0  # 0: all training images
    batch_size: int = 250
    seed: int = 0
    shuffle: bool = False
    precision: str = "float32"
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} {getattr(self, name)}: has to be between {low} and {high}")
        for name in ("cnn_lr", "lc_lr"):
            if not 0 < getattr(self, name) <= 1e38:
                raise ValueError(f"{name} {getattr(self, name)}: has to be positive and at most 1e38, as in float32")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum {self.momentum}: has to be at least 0 and less than 1")
        if not 0 <= self.weight_decay <= 1e38:
            raise ValueError(f"weight_decay {self.weight_decay}: has to be between 0 and 1e38")
        if self.splits and not 0 <= min(self.splits) <= max(self.splits) <= self.epochs:
            raise ValueError(f"splits {' '.join(map(str, self.splits))}: have to lie between 0 and {self.epochs}, the "
                             "epochs")  # fmt: skip
        # Settings that mean the same are spelled the same.
        object.__setattr__(self, "splits", tuple(sorted(set(self.splits))))
        if self.splits:
            object.__setattr__(self, "n_splits", Settings.n_splits)
        if self.lc_epochs == self.epochs:
            object.__setattr__(self, "lc_epochs", 0)

    @property
    def split_epochs(self) -> list[int]:
        """The epochs of the CNN at which it is converted."""
        return list(self.splits) or log_spaced_epochs(self.epochs, self.n_splits)

    @property
    def run_name(self) -> str:
        """The name of the run's directory: four settings always, the others where they are not at their default."""
        named = ["epochs", "n_splits", "cnn_lr", "lc_lr"]
        if self.splits:
            named.remove("n_splits")
        for field in dataclasses.fields(self)[4:]:
            if getattr(self, field.name) != field.default:
                named.append(field.name)
        parts = []
        for name in named:
            value = getattr(self, name)
            if name == "splits":
                value = "+".join(map(str, value))
            parts.append(name if value is True else f"{name}={value}")
        return "-".join(parts)


@dataclass(frozen=True)
class Member:
    """One network of a run: the CNN, or what a conversion made of it after `split` epochs.

    `run`, in the methods below, is the run's directory.
    """

    settings: Settings
    conversion: str = ""  # a name of `rnorm.conversions`; "" for the CNN itself
    split: int = 0  # 0 for the CNN itself, too

    @property
    def is_cnn(self) -> bool:
        return not self.conversion

    @property
    def label(self) -> str:
        """The network's name for people and in status.json: CNN, eLCN from 9, tied from 9."""
        if self.is_cnn:
            return "CNN"
        return f"{'eLCN' if self.conversion == 'lc' else self.conversion} from {self.split}"

    @property
    def lr(self) -> float:
        return self.settings.cnn_lr if self.is_cnn else self.settings.lc_lr

    @property
    def epochs(self) -> int:
        """How many epochs of its own the network is trained."""
        if self.is_cnn:
            return self.settings.epochs
        return self.settings.lc_epochs or self.settings.epochs

    @property
    def evaluations(self) -> list[int]:
        """The network's own epochs at which it is evaluated and checkpointed: 0 and every one, or log-spaced ones."""
        if self.is_cnn:
            return list(range(self.epochs + 1))
        return [0, *log_spaced_epochs(self.epochs, ELCN_EVALUATIONS)]

    @property
    def stem(self) -> str:
        """What the names of the network's files begin with."""
        network = self.settings.network
        return network if self.is_cnn else f"{network}_{self.conversion}_version"

    def directory(self, run: Path) -> Path:
        return run if self.is_cnn else run / f"{self.stem}_{self.split}"

    def checkpoint(self, run: Path, epoch: int) -> Path:
        return self.directory(run) / f"{self.stem}_{epoch}.pyT"

    def history(self, run: Path) -> Path:
        return self.directory(run) / "evaluation-history.hist"

    def latest(self, run: Path) -> Path:
        """The file of the unfinished network, between two evaluations."""
        return self.directory(run) / "latest.pyT"


def converted_members(run: Path, settings: Settings) -> list[Member]:
    """The converted networks that have a directory in `run`, of the run's own splits; eLCNs first, then by name."""
    members = []
    for directory in run.glob(f"{settings.network}_*_version_*"):
        match = re.fullmatch(r"_([^_]+)_version_(0|[1-9]\d*)", directory.name.removeprefix(settings.network))
        if match and int(match[2]) in settings.split_epochs:
            members.append(Member(settings, match[1], int(match[2])))
    return sorted(members, key=lambda member: (member.conversion != "lc", member.conversion, member.split))


def read_config(run: Path) -> tuple[Settings, dict]:
    """The settings and all of config.json of a run; raises RnormError if `run` is not one or config.json is damaged."""
    again = "repeat the run's experiments.py command to make it anew"
    try:
        return _read_config(run / "config.json")
    except (FileNotFoundError, NotADirectoryError):
        if has_files_of_a_run(run):
            raise RnormError(f"{run / 'config.json'} is missing; {again}") from None
        raise RnormError(f"{run} is not a run of experiments.py: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise RnormError(f"{run / 'config.json'} is damaged ({error}); {again}") from None


def has_files_of_a_run(directory: Path) -> bool:
    """Whether a directory without config.json was a run's all the same."""
    return any(next(directory.glob(name), None) for name in ("config.json*", "status.json", "*.hist", "*.pyT"))


def _read_config(path: Path) -> tuple[Settings, dict]:
    """Raises OSError, or ValueError if the file is not what `write_config` writes."""
    try:
        config = json.loads(path.read_text())
        if config.pop("crc32", _crc32(config)) != _crc32(config):
            raise ValueError("wrong checksum")
        settings = dict(config["settings"])
        settings["splits"] = tuple(settings["splits"])
        right = all(type(value) is type(getattr(Settings, name)) for name, value in settings.items())
        if not right or not all(type(split) is int for split in settings["splits"]):
            raise ValueError("a setting has the wrong type")
        if not isinstance(config.get("dataset_file"), str | None):
            raise ValueError("dataset_file is no path")
        return Settings(**settings), config
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _crc32(config: dict) -> int:
    """The checksum in config.json of the rest of it."""
    rest = {key: value for key, value in config.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def write_config(run: Path, settings: Settings, sha256: str, dataset_file: str | None, environment: dict) -> None:
    """Write a new run's config.json, or compare with the one that is there.

    Raises AnotherRun with the differences if the run's identity is another. Other versions, device, threads or commit
    are a warning. Where an .npz file lies is neither.
    """
    new = {"settings": dataclasses.asdict(settings), "data_sha256": sha256, "dataset_file": dataset_file, **environment}
    path = run / "config.json"
    try:
        old_settings, old = _read_config(path)
    except (OSError, ValueError) as error:
        if path.exists():
            set_aside(path, str(error))
        elif has_files_of_a_run(run):
            print(f"warning: {path} was missing and is made anew", file=sys.stderr)
        write_file(path, (json.dumps({**new, "crc32": _crc32(new)}, indent=1) + "\n").encode())
        return
    there = {**dataclasses.asdict(old_settings), "data_sha256": old.get("data_sha256")}
    here = {**new["settings"], "data_sha256": sha256}
    if differences := [f"{key} {there[key]} there, {here[key]} here" for key in here if there[key] != here[key]]:
        raise AnotherRun(f"{run} is another run: {'; '.join(differences)}")
    for key in environment:
        if old.get(key) != new[key]:
            print(f"warning: {run.name} was begun with {key} {old.get(key)}, now {new[key]}", file=sys.stderr)


def environment(device: dict, threads: int) -> dict:
    """What config.json records of the machine and the software; `device` is `devices.describe`'s."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {**device, "threads": threads, "versions": versions, "git_commit": commit or "unknown"}


def read_status(run: Path, damaged: Callable[[Path, str], None] = lambda path, reason: None) -> dict:
    """status.json: {"networks": {label: {...}}, "sessions": [...]}.

    Empty if the file is missing or bad; `damaged` is told of a bad one.
    """
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


def network_status(run: Path, member: Member) -> dict:
    """What status.json says of one network: `state`, `epoch`, `seconds`, `diverged_at`; empty before its training."""
    return read_status(run)["networks"].get(member.label, {})


def note_network(run: Path, member: Member, **values: object) -> None:
    """Note values of one network in status.json."""
    update_status(run, lambda status: status["networks"].setdefault(member.label, {}).update(values))


def diverged_at(run: Path, member: Member) -> int | None:
    """The epoch in which the network's loss ceased to be finite, as noted in status.json."""
    epoch = network_status(run, member).get("diverged_at")
    return epoch if type(epoch) is int else None


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
