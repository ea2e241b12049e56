"""A run beside the published figure, at every epoch that both have.

    python benchmarks/compare_published.py RUN [results/published_figure.csv]

Prints markdown: the largest differences for each network, then every shared epoch. `epoch` counts on the CNN's axis.
The published norm of an eLCN at its epoch 0 is no measurement and is left out.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from rnorm.cli import COMPLETE, Stop, finish
from rnorm.results import read_reference, read_run

PUBLISHED = Path(__file__).parents[1] / "results" / "published_figure.csv"
KEYS = {"log normalized R1-norm": "log_prod_norm_normalized", "test accuracy (%)": "test_acc"}


def largest(values: np.ndarray) -> str:
    """The largest magnitude of those that are defined."""
    defined = np.abs(values[~np.isnan(values)])
    return f"{defined.max():.3f}" if len(defined) else "undefined"


def main(argv: list[str]) -> int:
    if len(argv) not in (1, 2):
        raise Stop("name a run, and a table of published points if it is not the paper's")
    run = read_run(Path(argv[0]))
    reference = read_reference(Path(argv[1]) if len(argv) == 2 else PUBLISHED)
    summary, rows = [], []
    for published, points in reference.items():
        for member, network in run.networks.items():
            if dataclasses.replace(member, settings=published.settings) != published:
                continue
            epochs, here, there = np.intersect1d(
                network["checkpoints"] + member.split, points["epoch"], return_indices=True
            )
            if not len(epochs):
                continue
            cells = [member.label, f"{len(epochs)} (epochs {epochs[0]:.0f} to {epochs[-1]:.0f})"]
            columns = [[member.label] * len(epochs), [f"{epoch:.0f}" for epoch in epochs]]
            for key in KEYS.values():
                ours, theirs = network[key][here], points[key][there]
                cells.append(largest(ours - theirs))
                for values in (ours, theirs, ours - theirs):
                    columns.append(["" if np.isnan(value) else f"{value:.3f}" for value in values])
            summary.append(cells)
            rows += zip(*columns)
    print(f"| network | shared epochs | {' | '.join(f'largest difference in {name}' for name in KEYS)} |")
    print("| --- | --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in summary), sep="\n")
    print("\n| network | epoch |", " | ".join(f"{name} | published | difference" for name in KEYS), "|")
    print("| " + "--- | " * 8, *(f"| {' | '.join(row)} |" for row in rows), sep="\n")
    return COMPLETE


if __name__ == "__main__":
    finish(main, sys.argv, saves=False)
