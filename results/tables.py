"""The tables of README.md, from the histories of a run, and from reencoding.csv what JPEG costs.

    python results/tables.py [RUN]     by default the run in results/published

Prints markdown. `epoch` counts on the CNN's axis. The published norm of an eLCN at its epoch 0 is no measurement and is
left out.
"""

import csv
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from rnorm.cli import COMPLETE, Parser, finish
from rnorm.results import PUBLISHED, Member, Network, Run, find_runs, read_reference, read_run, with_margin

HERE = Path(__file__).parent
NORM = "log_prod_norm_normalized"
OWN_EPOCHS = (0, 1, 10, 30, 67)  # of the table of conversions, and the last
WINDOWS = ((2, 5), (6, 10), (11, 15), (16, 20), (2, 20))  # first and last epoch, of the table of the re-encoding


def print_table(*rows: list[str]) -> None:
    """Rows of cells, the first of them the titles."""
    titles, *rest = rows
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    print(*(f"| {' | '.join(row)} |" for row in rest), "", sep="\n")


def paper_against_here(run: Run, reference: dict[Member, Network]) -> None:
    """Each network that the published figure has too, over the epochs that both have."""
    rows = [["network", "epochs that both have", "last test accuracy, paper; here", "last norm, paper; here",
             "largest difference of test accuracy", "of the norm"]]  # fmt: skip
    for member, here in run.networks.items():
        paper = reference.get(dataclasses.replace(member, settings=PUBLISHED))
        if paper is None:
            continue
        epochs, i, j = np.intersect1d(here["checkpoints"] + member.split, paper["epoch"], return_indices=True)
        if not len(epochs):
            continue
        row = [member.label, f"{epochs[0]:.0f} to {epochs[-1]:.0f}"]
        for key, digits in (("test_acc", 1), (NORM, 2)):
            row.append(f"{paper[key][j][-1]:.{digits}f}; {here[key][i][-1]:.{digits}f}")
        for key, digits in (("test_acc", 1), (NORM, 3)):
            apart = here[key][i] - paper[key][j]
            row.append(f"{apart[np.nanargmax(np.abs(apart))]:+.{digits}f}")
        rows.append(row)
    print_table(*rows)


def conversions(run: Run) -> None:
    """Every converted network after some epochs of its own."""
    rows = [["from", "network", "own epochs", "train accuracy", "test accuracy", "log normalized R1-norm",
             "the same, multiclass margin", "untied", "layer by layer"]]  # fmt: skip
    for member, network in sorted(run.networks.items(), key=lambda item: item[0].split):
        epochs = network["checkpoints"].astype(int).tolist()
        multiclass = with_margin(network, "multiclass")[NORM]
        layers = [key for key in network if key.startswith("untied_")]
        for i, epoch in enumerate(epochs):
            if member.is_cnn or not (epoch in OWN_EPOCHS or epoch == epochs[-1]):
                continue
            name = "eLCN" if member.conversion == "lc" else f"`{member.conversion}`"
            row = [str(member.split), name, str(epoch)]
            row += [f"{network['train_acc'][i]:.2f}", f"{network['test_acc'][i]:.2f}"]
            row += [f"{network[NORM][i]:.3f}", f"{multiclass[i]:.3f}", f"{100 * network['untied'][i]:.1f} %"]
            row.append(", ".join(f"{100 * network[key][i]:.1f}" for key in layers))
            rows.append(row)
    print_table(*rows)


def reencoding(path: Path) -> None:
    """What the re-encoding costs: means over seeds, and the standard error of the difference, paired by seed."""
    digits = {"train_acc": 2, "test_acc": 2, NORM: 3}
    curves = {"exact": {}, "jpeg": {}}  # by seed, a row for each epoch from 0 on
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            copy = "exact" if "cifar10_head_exact" in row["run"] else "jpeg"
            curves[copy].setdefault(row["seed"], []).append([float(row[key]) for key in digits])
    exact, jpeg = (np.array([curves[copy][seed] for seed in curves["exact"]]) for copy in curves)
    titles = (f"{name}: exact, JPEG, difference" for name in ("train accuracy", "test accuracy", "norm"))
    rows = [["epochs", "seeds", *titles]]
    for first, last in WINDOWS:
        a, b = (curve[:, first : last + 1].mean(axis=1) for curve in (exact, jpeg))  # (seeds, quantities)
        errors = (a - b).std(axis=0, ddof=1) / np.sqrt(len(a))
        row = [f"{first} to {last}", str(len(a))]
        for x, y, error, n in zip(a.mean(axis=0), b.mean(axis=0), errors, digits.values(), strict=True):
            row.append(f"{x:.{n}f}, {y:.{n}f}, {x - y:+.{n}f} ± {error:.{n}f}")
        rows.append(row)
    print_table(*rows)


def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, nargs="?", default=HERE / "published", metavar="RUN")
    args = parser.parse_args(argv)
    reference = read_reference(HERE / "published_figure.csv")
    for path in find_runs([args.run]):
        run = read_run(path)
        print(f"{path.name}\n")
        paper_against_here(run, reference)
        conversions(run)
    reencoding(HERE / "reencoding.csv")
    return COMPLETE


if __name__ == "__main__":
    finish(main, sys.argv, saves=False)
