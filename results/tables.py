"""The tables of README.md and results/README.md, from the histories of runs.

    python results/tables.py [RUN ...]     by default the runs in results/published

Prints markdown. Every number with a ± is a mean over seeds and a sample standard deviation; differences and shares are
taken seed by seed before that.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from rnorm.cli import COMPLETE, Parser, finish
from rnorm.results import Values, grouped, number, read_curves, read_reference, with_margin

HERE = Path(__file__).parent
NORM = "log_prod_norm_normalized"
SHOWN = {"train_loss": 3, "train_acc": 2, "test_acc": 2, NORM: 3}  # quantities, and digits after the point
COMPARED = SHOWN | {"log_prod_norm": 2, "margin": 2, "multiclass_margin": 2}
TITLES = {"train_acc": "train accuracy", "test_acc": "test accuracy", NORM: "norm", "margin": "published margin"}
OWN_EPOCHS = (1, 10, 30, 67, 150)
CNN_EPOCHS = (1, 9, 28, 29, 67, 85, 150)

Networks = dict[tuple[str, int], dict[int, Values]]  # conversion and split to seed to evaluations


def networks_of(runs: list[Path]) -> dict[tuple, Networks]:
    """What runs recorded, by settings without the seed and data, and then by network and seed."""
    networks = {}
    for group in grouped(read_curves(runs, None, None), "published"):
        settings = replace(group[0].member.settings, seed=0)
        of_group = networks.setdefault((settings, group[0].data_sha256), {})
        for curve in group:
            if len(curve.own_epochs):
                seeds = of_group.setdefault((curve.member.conversion, curve.member.split), {})
                seeds[curve.member.settings.seed] = curve.values
    return networks


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    if rows:
        print(f"**{title}**\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
        print(*(f"| {' | '.join(row)} |" for row in rows), "", sep="\n")


def spread(values: Iterable[float], digits: int, sign: str = "") -> str:
    """Mean and sample standard deviation, of which a single value has none."""
    values = list(values)
    if len(values) < 2 or not np.isfinite(values).all():
        return number(np.mean(values), f"{sign}.{digits}f")
    return f"{np.mean(values):{sign}.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def name_of(conversion: str) -> str:
    return {"": "CNN", "lc": "eLCN"}.get(conversion, f"`{conversion}`")


def titles(keys: Iterable[str]) -> list[str]:
    return [TITLES.get(key, key.replace("_", " ")) for key in keys]


def at_epoch(values: Values, epoch: int) -> Values | None:
    """The evaluation after `epoch` own epochs, if there is one."""
    found = np.flatnonzero(values["checkpoints"] == epoch)
    return {key: of[found[0]] for key, of in values.items()} if len(found) else None


def at_loss(values: Values, level: float) -> Values | None:
    """Where train loss first falls to `level`: interpolated, in its logarithm, between two evaluations, of which
    `checkpoints` is the nearest. None if it does not.
    """
    loss = np.log(values["train_loss"])
    below = np.flatnonzero(loss <= np.log(level))
    if not len(below) or below[0] == 0:
        return None
    i = below[0]
    share = (loss[i - 1] - np.log(level)) / (loss[i - 1] - loss[i])
    between = {key: (1 - share) * of[i - 1] + share * of[i] for key, of in values.items()}
    return between | {"train_loss": level, "checkpoints": values["checkpoints"][i if share > 0.5 else i - 1]}


def paired(one: dict[int, Values], other: dict[int, Values], epoch: int, equal: str) -> list[tuple[Values, Values]]:
    """Of each seed `one` after `epoch` own epochs, and `other` at equal "epochs" or "train loss", if both have that."""
    pairs = []
    for seed in sorted(one.keys() & other.keys()):
        if a := at_epoch(one[seed], epoch):
            b = at_epoch(other[seed], epoch) if equal == "epochs" else at_loss(other[seed], a["train_loss"])
            pairs += [(a, b)] if b else []
    return pairs


def paper_against_here(networks: Networks) -> None:
    """Seed 0, as the paper's, over the epochs that both have."""
    columns, rows = ["network", "epochs that both have"], []
    for name, limit in (("test accuracy", "1 point"), ("norm", "0.05")):
        columns += [f"last {name}: paper, here", f"largest difference of {name}", f"more than {limit}"]
    for curve in read_reference(HERE / "published_figure.csv"):
        here = networks.get((curve.member.conversion, curve.member.split), {}).get(0, {"checkpoints": []})
        epochs, i, j = np.intersect1d(here["checkpoints"], curve.own_epochs, return_indices=True)
        if not len(epochs):
            continue
        epochs = epochs.astype(int) + curve.member.split
        row = [curve.member.label, f"{len(epochs)}, {epochs[0]} to {epochs[-1]}"]
        for key, limit in (("test_acc", 1), (NORM, 0.05)):
            digits, apart = SHOWN[key], here[key][i] - curve.values[key][j]
            worst, large = np.nanargmax(np.abs(apart)), epochs[np.abs(apart) > limit]
            row.append(f"{curve.values[key][j][-1]:.{digits}f}, {here[key][i][-1]:.{digits}f}")
            row.append(f"{apart[worst]:+.{digits}f} at {epochs[worst]}")
            row.append(f"at {len(large)}, {large[0]} to {large[-1]}" if len(large) else "never")
        rows.append(row)
    print_table("Paper against here, seed 0; epochs on the CNN's axis", columns, rows)


def at_equal_epochs(networks: Networks) -> None:
    """Every network after some epochs of its own, over the seeds that have come so far."""
    columns = ["from", "network", "own epochs", "seeds", *titles(SHOWN), "norm, multiclass margin", "untied"]
    rows = []
    for (conversion, split), seeds in sorted(networks.items(), key=lambda item: item[0][1]):
        last = max(int(values["checkpoints"][-1]) for values in seeds.values())
        for epoch in sorted({0, *OWN_EPOCHS, last}) if conversion else CNN_EPOCHS:
            found = [evaluation for values in seeds.values() if (evaluation := at_epoch(values, epoch))]
            if found:
                row = [str(split) if conversion else "", name_of(conversion), str(epoch), str(len(found))]
                row += [spread((of[key] for of in found), digits) for key, digits in SHOWN.items()]
                row.append(spread((with_margin(of, "multiclass")[NORM] for of in found), 3))
                rows.append([*row, f"{spread((100 * of['untied'] for of in found), 1)} %"])
    print_table("At equal epochs", columns, rows)


def against_controls(networks: Networks) -> None:
    """Untied networks and their controls: `lc` has the controls tied and cnn, `lc5` has tied5 and cnn."""
    rows = []
    for conversion, split in sorted(networks, key=lambda network: (network[1], network[0])):
        for control in (conversion.replace("lc", "tied"), "cnn") if conversion.startswith("lc") else ():
            controls, untied = networks.get((control, split), {}), networks[conversion, split]
            for epoch, how in ((epoch, how) for epoch in OWN_EPOCHS[1:] for how in ("epochs", "train loss")):
                if pairs := paired(controls, untied, epoch, how):
                    nearest = ", ".join(f"{b['checkpoints']:.0f}" for _, b in pairs)
                    row = [str(split), name_of(control), name_of(conversion), how, str(epoch), nearest]
                    rows.append([*row, str(len(pairs)), *compared(pairs)])
    columns = ["from", "control", "untied", "equal", "control's epochs", "untied's, or nearest", "seeds"]
    print_table("Control, untied, difference", [*columns, *titles(COMPARED)], rows)


def against_cnn(networks: Networks) -> None:
    """Each eLCN after some epochs of its own, and the CNN where its train loss first was the same."""
    rows, cnns = [], networks.get(("", 0), {})
    for conversion, split in sorted(networks, key=lambda network: network[1]):
        for epoch in OWN_EPOCHS[2:] if conversion == "lc" else ():
            if pairs := paired(networks[conversion, split], cnns, epoch, "train loss"):
                nearest = ", ".join(f"{cnn['checkpoints']:.0f}" for _, cnn in pairs)
                row = [str(split), nearest, str(epoch), str(len(pairs))]
                rows.append(row + compared([(cnn, elcn) for elcn, cnn in pairs]))
    columns = ["from", "CNN's epochs, or nearest", "eLCN's own epochs", "seeds", *titles(COMPARED)]
    print_table("CNN, eLCN, difference, at the eLCN's train loss", columns, rows)


def compared(pairs: list[tuple[Values, Values]]) -> list[str]:
    """For each of COMPARED the means of both sides over seeds, and their difference."""
    cells = []
    for key, digits in COMPARED.items():
        means = [number(np.mean([of[key] for of in side]), f".{digits}f") for side in zip(*pairs)]
        cells.append(", ".join([*means, spread((b[key] - a[key] for a, b in pairs), digits, "+")]))
    return cells


def first_epoch(networks: Networks) -> None:
    """The change in the eLCN's first epoch; what share of it its controls have; what the CNN does at its own rate."""
    rows = []
    for split in sorted({split for conversion, split in networks if conversion == "lc"}):
        changes = {}  # by network and seed
        for name, start in {"lc": 0, "tied": 0, "cnn": 0, "": split}.items():
            for seed, values in networks.get((name, split if name else 0), {}).items():
                before, after = at_epoch(values, start), at_epoch(values, start + 1)
                if before and after and (name == "lc" or seed in changes.get("lc", {})):
                    changes.setdefault(name, {})[seed] = {key: after[key] - before[key] for key in SHOWN}
        for name, seeds in changes.items():
            row = [str(split), name_of(name) if name else "CNN at its own rate", str(len(seeds))]
            for key, digits in SHOWN.items():
                row.append(spread((of[key] for of in seeds.values()), digits, "+"))
                if name in ("tied", "cnn"):
                    shares = (100 * of[key] / changes["lc"][seed][key] for seed, of in seeds.items())
                    row[-1] += f" ({spread(shares, 0)} %)"
            rows.append(row)
    columns = ["from", "network", "seeds", *titles(SHOWN)]
    print_table("The first epoch after the split: change, and share of the eLCN's", columns, rows)


def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="*", default=[HERE / "published"], metavar="RUN")
    for (settings, _), networks in networks_of(parser.parse_args(argv).runs).items():
        print(f"{settings.run_name}\n")
        for print_one in (paper_against_here, against_cnn, at_equal_epochs, against_controls, first_epoch):
            print_one(networks)
    return COMPLETE


if __name__ == "__main__":
    finish(main, sys.argv, saves=False)
