"""The tables of README.md, from the histories of a run.

    python results/tables.py [RUN]                      by default the run in results/published
    python results/tables.py RUN --epochs               and every epoch that the published figure has, too

Prints markdown. `epoch` counts on the CNN's axis. The published norm of an eLCN at its epoch 0 is no measurement and is
left out.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from rnorm.cli import COMPLETE, Parser, finish
from rnorm.results import Network, Run, find_runs, read_reference, read_run, with_margin

HERE = Path(__file__).parent
NORM = "log_prod_norm_normalized"
OWN_EPOCHS = (0, 1, 10, 30)  # of the table of conversions, and the last


def print_table(*rows: list[str]) -> None:
    """Rows of cells, the first of them the titles."""
    titles, *rest = rows
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    print(*(f"| {' | '.join(row)} |" for row in rest), "", sep="\n")


def shared(run: Run, reference: dict) -> dict[str, tuple[np.ndarray, Network, Network]]:
    """For each network that the published figure has too: (epochs that both have, its values here, published)."""
    both = {}
    for published, points in reference.items():
        for member, network in run.networks.items():
            if dataclasses.replace(member, settings=published.settings) != published:
                continue
            own = network["checkpoints"] + member.split
            epochs, here, there = np.intersect1d(own, points["epoch"], return_indices=True)
            if len(epochs):
                ours = {key: network[key][here] for key in ("test_acc", NORM)}
                theirs = {key: points[key][there] for key in ("test_acc", NORM)}
                both[member.label] = epochs, ours, theirs
    return both


def paper_against_here(run: Run, reference: dict) -> None:
    rows = [["network", "epochs that both have", "last test accuracy, paper; here", "last norm, paper; here",
             "largest difference of test accuracy", "of the norm"]]  # fmt: skip
    for label, (epochs, here, paper) in shared(run, reference).items():
        row = [label, f"{epochs[0]:.0f} to {epochs[-1]:.0f}"]
        for key, digits in (("test_acc", 1), (NORM, 2)):
            row.append(f"{paper[key][-1]:.{digits}f}; {here[key][-1]:.{digits}f}")
        for key, digits in (("test_acc", 1), (NORM, 3)):
            apart = here[key] - paper[key]
            row.append(f"{apart[np.nanargmax(np.abs(apart))]:+.{digits}f}")
        rows.append(row)
    print_table(*rows)


def every_epoch(run: Run, reference: dict) -> None:
    rows = [["network", "epoch", "test accuracy, paper; here", "norm, paper; here"]]
    for label, (epochs, here, paper) in shared(run, reference).items():
        for i, epoch in enumerate(epochs):
            cells = (f"{paper[key][i]:.2f}; {here[key][i]:.2f}" for key in ("test_acc", NORM))
            rows.append([label, f"{epoch:.0f}", *cells])
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


def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, nargs="?", default=HERE / "published", metavar="RUN")
    parser.add_argument("--epochs", action="store_true", help="every epoch that the published figure has, too")
    args = parser.parse_args(argv)
    reference = read_reference(HERE / "published_figure.csv")
    for path in find_runs([args.run]):
        run = read_run(path)
        print(f"{path.name}\n")
        paper_against_here(run, reference)
        if args.epochs:
            every_epoch(run, reference)
        conversions(run)
    return COMPLETE


if __name__ == "__main__":
    finish(main, sys.argv, saves=False)
