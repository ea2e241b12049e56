"""A run beside the published figure, at every epoch that both have.

    python benchmarks/compare_published.py RUN [results/published_figure.csv]

Prints markdown: the largest differences for each network, then every shared epoch. `epoch` counts on the CNN's axis.
The published norm of an eLCN at its epoch 0 is no measurement and is left out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from plot import read_reference, read_run
from runs import label

KEYS = {"log normalized R1-norm": "log_prod_norm_normalized", "test accuracy (%)": "test_acc"}


def main(run_path: str, reference_path: str = str(Path(__file__).parents[1] / "results/published_figure.csv")) -> None:
    run, reference = read_run(Path(run_path)), read_reference(Path(reference_path), None)
    summary, rows = [], []
    for split, points in reference.items():
        if split not in run.networks:
            continue
        network = run.networks[split]
        axis = network["checkpoints"] + (split or 0)
        epochs, here, there = np.intersect1d(axis, points["epoch"], return_indices=True)
        cells = [f"{len(epochs)} (epochs {epochs[0]:.0f} to {epochs[-1]:.0f})"]
        columns = [[label(split)] * len(epochs), [f"{epoch:.0f}" for epoch in epochs]]
        for key in KEYS.values():
            mine, published = network[key][here], points[key][there]
            cells.append(f"{np.nanmax(np.abs(mine - published)):.3f}")
            for values in (mine, published, mine - published):
                columns.append(["" if np.isnan(value) else f"{value:.3f}" for value in values])
        summary.append(f"| {label(split)} | {' | '.join(cells)} |")
        rows += [f"| {' | '.join(row)} |" for row in zip(*columns)]
    print(f"| network | shared epochs | {' | '.join(f'largest difference in {name}' for name in KEYS)} |")
    print("| --- | --- | --- | --- |", *summary, sep="\n")
    print("\n| network | epoch |", " | ".join(f"{name} | published | difference" for name in KEYS), "|")
    print("| " + "--- | " * 8, *rows, sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
