"""The flags of experiments.py that are settings of a run, and where the run lies."""

import argparse
import dataclasses
from pathlib import Path

from rnorm.cli import Stop
from rnorm.data import DATASETS, dataset_name
from rnorm.runs import Settings

HELP = {
    "epochs": "epochs of the CNN",
    "n_splits": "convert the CNN at this many log-spaced epochs; epochs that coincide count once",
    "cnn_lr": "learning rate of the CNN",
    "lc_lr": "learning rate of the eLCNs and of other converted networks",
    "lc_epochs": "epochs of each converted network; 0: as many as the CNN's",
    "network": "a network of models.py, by name",
    "dataset": f"{', '.join(DATASETS)}, or FILE.npz with x_train, y_train, x_test, y_test",
    "data_size": "use the first N training images; 0: all",
    "batch_size": "images per step",
    "seed": "seed of the initial weights and of --shuffle",
    "precision": "float32, tf32 (on CUDA, of products and convolutions alone) or float64 (of everything)",
    "momentum": "momentum of SGD",
    "weight_decay": "weight decay of SGD",
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting, and --results_dir."""
    precisions = ("float32", "tf32", "float64")
    metavars = {int: "N", float: "NUMBER", str: "NAME"}
    for name, text in HELP.items():
        default = getattr(Settings, name)
        spellings = [f"--{name}", "--lcn_lr"] if name == "lc_lr" else [f"--{name}"]
        parser.add_argument(
            *spellings, dest=name, type=type(default), default=default, metavar=metavars[type(default)],
            help=f"{text} (default: {default})", choices=precisions if name == "precision" else None,
        )  # fmt: skip
    parser.add_argument(
        "--splits", type=int, nargs="+", default=[], metavar="EPOCH", help="convert at these epochs instead of n_splits"
    )
    parser.add_argument("--shuffle", action="store_true", help="shuffle in every epoch (default: the data set's order)")
    parser.add_argument(
        "--results_dir", type=Path, default=Path("results"), metavar="DIR", help="where runs lie (default: results)"
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that a command line asks for; raises Stop where they make no sense."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    values |= {"splits": tuple(args.splits), "dataset": dataset_name(args.dataset)}
    try:
        return Settings(**values)
    except ValueError as error:
        raise Stop(f"--{error}") from None
