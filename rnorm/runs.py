"""What a run is: its settings and name, its networks and where their files lie, and config.json."""

import dataclasses
import json
import platform
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from rnorm.files import RnormError, write_file

TITLES = {"": "CNN", "lc": "eLCN", "fc": "eFCN"}  # of conversions that people call otherwise than the files do
NAMED = ("epochs", "n_splits", "cnn_lr", "lc_lr")  # settings that every run's name begins with
IDENTITY = ("data_sha256", "layers")  # what makes a run what it is, beside its settings


def log_spaced_epochs(n: int, count: int) -> list[int]:
    """At most `count` log-spaced epochs from 1 to `n`, the last included unless count is 1."""
    # Without the tiny addition, rounding drops epoch n for n = 30, 40, 50, 80, ...
    return [int(e) for e in np.unique((np.logspace(0, np.log10(n), count) + 1e-9).astype(int))]


def setting(
    default: object, help: str, *limits: float, parse: Callable = None, show: Callable[..., str] = str, **flag: object
) -> Any:
    """A field of Settings: its default, what --help says, the smallest and largest value.

    `parse` makes a value of a word of the command line (default: the default's type), `show` the text in a run's name;
    `flag` are further arguments of its flag.
    """
    flag |= {"type": parse or type(default)}
    return field(default=default, metadata={"help": help, "limits": limits, "flag": flag, "show": show})


@dataclass(frozen=True)
class Settings:
    """What decides a run's results; with the data's SHA-256 and the network's layers its identity.

    Every setting is a flag of experiments.py. Raises ValueError for values that make no sense.
    """

    epochs: int = setting(150, "epochs of the CNN", 1, 10**5)
    n_splits: int = setting(20, "convert the CNN at this many log-spaced epochs; fewer where some coincide", 1, 10**4)
    cnn_lr: float = setting(0.05, "learning rate of the CNN", 1e-30, 1e38)
    lc_lr: float = setting(0.01, "learning rate of the converted networks, eLCNs and others", 1e-30, 1e38)
    splits: tuple[int, ...] = setting(
        (), "convert at these epochs instead of n_splits", parse=int, nargs="+", metavar="EPOCH",
        show=lambda epochs: "+".join(map(str, epochs)),
    )  # fmt: skip
    lc_epochs: int = setting(0, "epochs of each converted network; 0: as many as the CNN's", 0, 10**5)
    network: str = setting("skinnyprime", "a network of models.py, by name")
    dataset: str = setting("cifar10", "cifar10, cifar100, mnist, fashionmnist, synthetic, or FILE.npz, see README.md")
    data_size: int = setting(0, "use the first N training images; 0: all", 0, 10**9)
    batch_size: int = setting(250, "images per step", 1, 10**6)
    seed: int = setting(0, "seed of the initial weights and of --shuffle", 0, 2**32 - 1)
    shuffle: bool = setting(False, "a new order of the images in every epoch (default: the data set's own)")
    precision: str = setting(
        "float32", "float32; tf32 (CUDA matrix products and convolutions only); float64 everywhere",
        choices=("float32", "tf32", "float64"),
    )  # fmt: skip
    momentum: float = setting(0.0, "momentum of SGD", 0, 0.999999)
    weight_decay: float = setting(0.0, "weight decay of SGD", 0, 1e38)
    lc_evaluations: int = setting(20, "evaluate converted networks at this many log-spaced epochs of theirs", 2, 10**4)

    def __post_init__(self):
        for each in dataclasses.fields(self):
            value, limits = getattr(self, each.name), each.metadata["limits"]
            if limits and not limits[0] <= value <= limits[1]:
                raise ValueError(f"{each.name} {value}: has to be between {limits[0]} and {limits[1]}")
        if not re.fullmatch(r"\w[\w.+-]*", self.network):
            raise ValueError(f"network {self.network!r}: is no name")
        if self.splits and not 0 <= min(self.splits) <= max(self.splits) <= self.epochs:
            words = " ".join(map(str, self.splits))
            raise ValueError(f"splits {words}: have to lie between 0 and {self.epochs}, the epochs")
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
        always = ["epochs", "cnn_lr", "lc_lr"] if self.splits else ["epochs", "n_splits", "cnn_lr", "lc_lr"]
        fields = {each.name: each for each in dataclasses.fields(self)}
        others = [name for name in fields if name not in NAMED and getattr(self, name) != fields[name].default]
        parts = []
        for name in always + others:
            value = getattr(self, name)
            parts.append(name if value is True else f"{name}={fields[name].metadata['show'](value)}")
        return "-".join(parts)


@dataclass(frozen=True)
class Member:
    """One network of a run: the CNN, or what a conversion made of it after `split` epochs; and its files."""

    run: Path  # the run's directory
    settings: Settings
    conversion: str = ""  # a name of `rnorm.conversions`; "" for the CNN itself
    split: int = 0  # 0 for the CNN itself, too

    @property
    def is_cnn(self) -> bool:
        return not self.conversion

    @property
    def title(self) -> str:
        """What people call the conversion: CNN, eLCN, tied, lc5."""
        return TITLES.get(self.conversion, self.conversion)

    @property
    def label(self) -> str:
        """The network's name for people: CNN, eLCN from 9, tied from 9."""
        return self.title if self.is_cnn else f"{self.title} from {self.split}"

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
        return [0, *log_spaced_epochs(self.epochs, self.settings.lc_evaluations)]

    @property
    def stem(self) -> str:
        """What the names of the network's checkpoints begin with."""
        network = self.settings.network
        return network if self.is_cnn else f"{network}_{self.conversion}_version"

    @property
    def directory(self) -> Path:
        return self.run if self.is_cnn else self.run / f"{self.stem}_{self.split}"

    @property
    def history_file(self) -> Path:
        return self.directory / "evaluation-history.hist"

    @property
    def latest_file(self) -> Path:
        """The file of the unfinished network, between two evaluations."""
        return self.directory / "latest.pyT"

    def checkpoint(self, epoch: int) -> Path:
        return self.directory / f"{self.stem}_{epoch}.pyT"


def converted_members(run: Path, settings: Settings) -> list[Member]:
    """The converted networks that have a directory in `run`, of the run's own splits; eLCNs first, then by name."""
    members = []
    for directory in run.glob(f"{settings.network}_*_version_*"):
        match = re.fullmatch(r"_([^_]+)_version_(0|[1-9]\d*)", directory.name.removeprefix(settings.network))
        if match and int(match[2]) in settings.split_epochs:
            members.append(Member(run, settings, match[1], int(match[2])))
    return sorted(members, key=lambda member: (member.conversion != "lc", member.conversion, member.split))


def has_files_of_a_run(directory: Path) -> bool:
    """Whether a directory is a run's, with config.json or without."""
    names = ("config.json*", "evaluation-history.hist*", "*.pyT*")  # also with .damaged after them
    return any(next(directory.glob(name), None) for name in names)


def read_config(run: Path) -> tuple[Settings, dict]:
    """The settings and all of config.json of a run; raises RnormError if `run` is not one or config.json is damaged."""
    path, remedy = run / "config.json", f"put back a copy of it, or delete {run} to start over"
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
        if not isinstance(config.get("layers", []), list):
            raise ValueError("layers is no list")
        return Settings(**settings), config
    except (FileNotFoundError, NotADirectoryError):
        if has_files_of_a_run(run):
            raise RnormError(f"{path} is missing; {remedy}") from None
        raise RnormError(f"{run} is not a run of experiments.py: it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RnormError(f"{path} is damaged ({type(error).__name__}: {error}); {remedy}") from None


def _crc32(config: dict) -> int:
    """The checksum in config.json of all the rest of it."""
    return zlib.crc32(json.dumps(config, sort_keys=True).encode())


def write_config(run: Path, settings: Settings, config: dict) -> None:
    """Write a new run's config.json, or compare with the one that is there.

    `config` holds what else it records: IDENTITY, `dataset_file`, versions, device, ... Raises RnormError as
    `compare_config` does. A change of version, device, thread count or commit is a warning. A moved .npz file is not.
    """
    path, new = run / "config.json", {"settings": dataclasses.asdict(settings), **config}
    if not path.exists() and not has_files_of_a_run(run):
        write_file(path, (json.dumps({**new, "crc32": _crc32(new)}, indent=1) + "\n").encode())
        return
    old = compare_config(run, settings, config)
    for key in config:
        if key not in (*IDENTITY, "dataset_file", "normalisation") and old.get(key) != config[key]:
            print(f"warning: {run.name} was begun with {key} {old.get(key)}, now {config[key]}", file=sys.stderr)


def compare_config(run: Path, settings: Settings, config: dict) -> dict:
    """A run's config.json; {} where no run was begun. Raises RnormError with the differences if the run is another.

    Settings, data and layers make a run what it is. What an older config.json lacks is not compared, nor data whose
    SHA-256 is "", as they were not read.
    """
    if not (run / "config.json").exists() and not has_files_of_a_run(run):
        return {}
    old_settings, old = read_config(run)
    there, here = dataclasses.asdict(old_settings), dataclasses.asdict(settings)
    if "data_sha256" in old and config["data_sha256"]:
        there["data_sha256"], here["data_sha256"] = old["data_sha256"], config["data_sha256"]
    if "layers" in old:
        for i, layers in enumerate(zip_longest(old["layers"], config["layers"])):
            there[f"layer {i}"], here[f"layer {i}"] = layers
    if differences := [f"{key} {there[key]} there, {here[key]} here" for key in here if there[key] != here[key]]:
        remedy = f"give the same settings, data and network, use another --results_dir, or delete {run} to start over"
        raise RnormError(f"{run} is another run: {'; '.join(differences)}; {remedy}")
    return old


def environment(device: dict, threads: int) -> dict:
    """What config.json records of the machine and the software; `device` is `devices.describe`'s."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    commands = ["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty", "--abbrev=40"]
    try:
        tracked, commit = (subprocess.run([*git, *c], capture_output=True, text=True, timeout=10) for c in commands)
        commit = commit.stdout.strip() if tracked.returncode == 0 else ""  # else it is another repository's
    except (OSError, subprocess.SubprocessError):
        commit = ""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {**device, "threads": threads, "versions": versions, "git_commit": commit or "unknown"}
