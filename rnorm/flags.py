"""What the scripts' command lines share: flags, and what these flags open."""

import argparse
import dataclasses
import os
from pathlib import Path

import torch

from rnorm.cli import ENVIRONMENT, Stop
from rnorm.conversions import CONVERSIONS
from rnorm.data import CIFAR10, DATASETS, Data, Normalisation, dataset_name, load_data, stand_in
from rnorm.devices import describe, pick_device, why_no_cuda
from rnorm.files import RnormError
from rnorm.runs import Member, Settings, converted_members, read_config


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting, and --results_dir."""
    for setting in dataclasses.fields(Settings):
        spellings = [f"--{setting.name}", "--lcn_lr"] if setting.name == "lc_lr" else [f"--{setting.name}"]
        flag = {"default": setting.default, "help": setting.metadata["help"], **setting.metadata["flag"]}
        if isinstance(setting.default, bool):
            flag["action"] = "store_true"
            del flag["type"]
        elif setting.default != ():
            flag["help"] += f" (default: {setting.default})"
            if "choices" not in flag:
                flag["metavar"] = {int: "N", float: "NUMBER", str: "NAME"}[flag["type"]]
        parser.add_argument(*spellings, dest=setting.name, **flag)
    add_directory(parser, "--results_dir", "where runs lie", "RNORM_RESULTS", "results")


def add_directory(parser: argparse.ArgumentParser, flag: str, text: str, variable: str, default: str) -> None:
    """Add the flag of a directory whose default an environment variable can name."""
    help = f"{text} (default: the environment variable {variable}, or {default})"
    parser.add_argument(flag, type=Path, default=os.environ.get(variable) or default, metavar="DIR", help=help)


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that a command line asks for; raises Stop where they make no sense."""
    values = {setting.name: getattr(args, setting.name) for setting in dataclasses.fields(Settings)}
    values |= {"splits": tuple(args.splits), "dataset": dataset_name(args.dataset)}
    try:
        return Settings(**values)
    except ValueError as error:
        raise Stop(f"--{error}") from None


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """What the CNN is converted to, which checkpoints stay, and `add_data_flags`; none is part of a run's identity."""
    parser.add_argument(
        "--convert_to", nargs="+", default=["lc"], metavar="NAME",
        help=f"what the CNN becomes: {', '.join(CONVERSIONS)}; of some layers only: lc5, tied1+9 (default: lc)",
    )  # fmt: skip
    parser.add_argument(
        "--keep", choices=("all", "last"),
        help="keep all checkpoints of each converted network, or only the last (31 MB each for skinnyprime's eLCN; "
        "default: all, for fc last)",
    )  # fmt: skip
    add_data_flags(parser)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Where the images lie, and what computes."""
    add_directory(parser, "--data_dir", "where the images lie", "RNORM_DATA", "data")
    help = "auto takes a GPU if it computes, else the CPU (default: auto)"
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help=help)


def open_device(name: str) -> torch.device:
    """`devices.pick_device` for a script; prints which it is."""
    try:
        device = pick_device(name)
    except RnormError as error:
        raise Stop(f"--device {name}: {error}; or use --device cpu", ENVIRONMENT) from None
    line = f"device: {describe(device).get('gpu', 'cpu')}"
    if name == "auto" and device.type == "cpu":
        line += f"; no GPU can be used: {why_no_cuda()}"
    print(line, flush=True)
    return device


def open_data(
    dataset: str, data_dir: Path, settings: Settings, device: torch.device,
    normalisation: Normalisation | None = None, sha256: str | None = None,
) -> Data:  # fmt: skip
    """`data.load_data` for a script, of a run's size and precision."""
    dtype = torch.float64 if settings.precision == "float64" else torch.float32
    return load_data(dataset, data_dir, settings.data_size, device, dtype, normalisation, sha256)


def normalisation_of_run(run: Path) -> Normalisation | None:
    """Mean and standard deviation with which a run's images are normalised; None if there is no such run yet."""
    if not (run / "config.json").exists():
        return None
    settings, config = read_config(run)
    if "normalisation" not in config:  # begun when whatever had no constants of its own got those of CIFAR-10
        source = DATASETS.get(settings.dataset)
        return source.normalisation if source and source.normalisation else CIFAR10
    try:
        mean, std = (tuple(map(float, config["normalisation"][key])) for key in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        raise RnormError(f"{run / 'config.json'} is damaged: its normalisation has no mean and std") from None
    return mean, std


def data_of_run(run: Path, data_dir: Path, device: torch.device) -> Data:
    """The images that a run was made with, known by their SHA-256; raises RnormError if they are not here.

    They may lie in the run's own file, in a data set of torchvision, or in any .npz file of the data directory.
    """
    settings, config = read_config(run)
    sha256, problems = str(config.get("data_sha256")), []
    built_in = [name for name, source in DATASETS.items() if source.sha256 == sha256]
    names = list(dict.fromkeys([config.get("dataset_file") or settings.dataset, *built_in]))
    files = [str(path) for path in sorted(data_dir.glob("*.npz"))]
    for name in names + files:
        try:
            return open_data(name, data_dir, settings, device, normalisation_of_run(run), sha256)
        except RnormError as error:
            problems.append(str(error))
    raise RnormError("; ".join(problems[: len(names)]))  # that other files are other data helps nobody


def member_of(checkpoint: Path) -> Member:
    """The network of a run that a checkpoint is of; raises Stop if it lies in no run or is no file."""
    if not checkpoint.is_file():
        raise Stop(f"{checkpoint} is no file")
    directory = checkpoint.absolute().parent
    for run in (directory, directory.parent):
        if (run / "config.json").exists():
            settings, _ = read_config(run)
            for member in (Member(run, settings), *converted_members(run, settings)):
                if member.directory == directory:
                    return member
    raise Stop(f"{checkpoint} lies in no network's directory of a run of experiments.py")


def data_of_settings(args: argparse.Namespace, settings: Settings, run: Path, device: torch.device) -> Data:
    """The images that experiments.py's command line asks for; for a plan only their size, where that is known."""
    dtype = torch.float64 if settings.precision == "float64" else torch.float32
    if args.exec == 0 and (data := stand_in(args.dataset, settings.data_size, device, dtype)):
        return data
    return open_data(args.dataset, args.data_dir, settings, device, normalisation_of_run(run))
