"""The tables of results/tables.md, from the histories of runs.

    python results/tables.py [RUN ...] [--out results/tables.md]        by default of the runs in results/published

Prints markdown. Networks are compared where their train loss first falls to a given level, interpolated in its
logarithm between two evaluations; differences are taken seed by seed. A ± is half of a 95 % interval: over seeds by
Student's t, and of a test accuracy also for the 10,000 test images. One seed alone has the second part only.
"""

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from rnorm.cli import COMPLETE, Parser, finish, writing
from rnorm.files import write_file
from rnorm.results import Curve, Values, grouped, number, read_curves, read_reference, with_margin

HERE = Path(__file__).parent
NORM = "log_prod_norm_normalized"
NORMS = {NORM: "Frobenius", "log_prod_spectral_normalized": "spectral", "log_path1_normalized": "L1 path",
         "log_path2_normalized": "L2 path"}  # fmt: skip
MARGINS = {"published": "published margin", "multiclass": "multiclass margin, test images",
           "multiclass_margin_train_p10": "10th percentile of the multiclass margins, training images"}  # fmt: skip
CHECKPOINTS = (49, 85, 95)  # epochs of the CNN, with which other norms are compared; of seed 0, 95 has none
LEVELS = (0.35, 0.15, 0.04, 0.01)  # of the train loss
OWN_EPOCHS, CNN_EPOCHS = (1, 10, 30, 67, 150), (1, 9, 28, 29, 67, 85, 150)
AROUND = 4  # epochs of the CNN before and after a split, whose mean a network's first epoch is compared with
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # number of seeds to the 97.5th percentile of t
ONE, PAIRED = 0.44, 0.40  # standard errors in points: of a test accuracy; of a difference (0.34 was measured)

Networks = dict[str, dict[int, Values]]  # a network's name, such as "eLCN from 28", to its seeds' evaluations


def networks_of(curves: list[Curve]) -> dict[tuple, Networks]:
    """What runs recorded, by the settings and data of the CNN; in each the networks by name and seed, CNN first.

    A name has the learning rate where it is not 0.01: "eLCN at 0.05 from 28".
    """
    groups: dict[tuple, Networks] = {}
    for curve in sorted(curves, key=place):
        settings = dataclasses.replace(curve.member.settings, seed=0, lc_lr=0.01)
        seeds = groups.setdefault((settings, curve.data_sha256), {}).setdefault(name_of(curve), {})
        seeds.setdefault(curve.member.settings.seed, curve.values)
    return groups


def place(curve: Curve) -> tuple:
    member = curve.member
    return not member.is_cnn, member.split, member.conversion != "lc", member.conversion, member.settings.lc_lr


def name_of(curve: Curve) -> str:
    member, rate = curve.member, curve.member.settings.lc_lr
    return member.label if member.is_cnn or rate == 0.01 else f"{member.title} at {rate} from {member.split}"


def split_of(name: str) -> str:
    return name.rpartition(" from ")[2] if " from " in name else ""


def at_epoch(values: Values, epoch: int) -> Values | None:
    """The evaluation after `epoch` own epochs, if there is one."""
    found = np.flatnonzero(values["checkpoints"] == epoch)
    return {key: numbers[found[0]] for key, numbers in values.items()} if len(found) else None


def at_loss(values: Values, level: float) -> Values | None:
    """Where train loss first falls to `level`, interpolated in its logarithm; None if it begins or stays elsewhere."""
    loss = np.log(values["train_loss"])
    below = np.flatnonzero(loss <= np.log(level))
    if not len(below) or below[0] == 0:
        return None
    i = below[0]
    share = (loss[i - 1] - np.log(level)) / (loss[i - 1] - loss[i])
    return {key: (1 - share) * numbers[i - 1] + share * numbers[i] for key, numbers in values.items()}


def is_single_layer(name: str) -> bool:
    """Whether only some convolutions are untied in a network, or it is the control of such a one."""
    return name.removeprefix("lc").removeprefix("tied")[0].isdigit()


def apart(networks: Networks, one: str, other: str, level: float, key: str, margin: str = "published") -> list[float]:
    """By how much `one` is above `other` in a quantity at a train loss, for each seed where both are known."""
    found = []
    if one == other:
        return found
    for seed in sorted(networks.get(one, {}).keys() & networks.get(other, {}).keys()):
        pair = [at_loss(with_margin(networks[name][seed], margin), level) for name in (one, other)]
        if all(values and key in values for values in pair) and np.isfinite(pair[0][key] - pair[1][key]):
            found.append(pair[0][key] - pair[1][key])
    return found


def interval(values: Iterable[float], digits: int, error: float = 0, sign: str = "") -> str:
    """Mean ± half of the 95 % interval; `error` is the standard error that all seeds share. "" without values."""
    values = list(values)
    if not values or not np.isfinite(values).all():
        return "undefined" if values else ""
    half = 1.96 * error
    if len(values) in STUDENT:
        half = np.hypot(half, STUDENT[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5)
    text = number(np.mean(values), f"{sign}.{digits}f")
    return f"{text} ± {half:.{digits}f}" if half else text


def with_seeds(differences: list[float], digits: int) -> str:
    """Their mean and interval, and in brackets the number of seeds."""
    return f"{interval(differences, digits, 0, '+')} ({len(differences)})" if differences else "not recorded"


def as_table(title: str, note: str, rows: list[dict[str, str]]) -> str:
    """A heading, a sentence and a markdown table; "" without rows."""
    if not rows:
        return ""
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([f"## {title}", note, "", *lines, ""])


def paper_against_here(curves: list[Curve]) -> str:
    """Of the runs with the paper's settings and data, seed 0."""
    found = [curve for curve in curves if curve.is_published and curve.member.settings.seed == 0]
    seed_0, rows = {curve.member.label: curve.values for curve in found}, []
    for curve in read_reference(HERE / "published_figure.csv"):
        here = seed_0.get(curve.member.label, {"checkpoints": []})
        epochs, i, j = np.intersect1d(here["checkpoints"], curve.own_epochs, return_indices=True)
        if not len(epochs):
            continue
        epochs = epochs.astype(int) + curve.member.split
        row = {"network": curve.member.label, "epochs that both have": f"{len(epochs)}, {epochs[0]} to {epochs[-1]}"}
        for key, title, digits, limit in (("test_acc", "test accuracy", 2, 1), (NORM, "norm", 3, 0.05)):
            difference = here[key][i] - curve.values[key][j]
            worst, large = np.nanargmax(np.abs(difference)), epochs[np.abs(difference) > limit]
            row[f"last {title}: paper, here"] = f"{curve.values[key][j][-1]:.{digits}f}, {here[key][i][-1]:.{digits}f}"
            row[f"largest difference of {title}"] = f"{difference[worst]:+.{digits}f} at {epochs[worst]}"
            row[f"more than {limit}"] = f"at {len(large)}, {large[0]} to {large[-1]}" if len(large) else "never"
        rows.append(row)
    note = (
        "Seed 0; epochs on the CNN's axis. The paper's norm at an eLCN's own epoch 0 repeats that of its epoch 1, so "
        "it is no measurement and is left out."
    )
    return as_table("Paper against here", note, rows)


def at_equal_loss(networks: Networks) -> str:
    rows = []
    for name in networks:
        for level in LEVELS if split_of(name) else ():
            norms = apart(networks, name, "CNN", level, NORM)
            slowed = f"cnn from {split_of(name)}"
            if norms and not is_single_layer(name):
                rows.append({
                    "network": name, "train loss": str(level), "seeds": str(len(norms)),
                    "norm minus the CNN's": interval(norms, 3, 0, "+"),
                    "test accuracy minus the CNN's":
                        interval(apart(networks, name, "CNN", level, "test_acc"), 2, PAIRED, "+"),
                    "norm minus the slowed CNN's": interval(apart(networks, name, slowed, level, NORM), 3, 0, "+"),
                    "seeds of these": str(len(apart(networks, name, slowed, level, NORM)) or ""),
                    "test accuracy minus the slowed CNN's":
                        interval(apart(networks, name, slowed, level, "test_acc"), 2, PAIRED, "+"),
                    "log product of norms minus the CNN's":
                        interval(apart(networks, name, "CNN", level, "log_prod_norm"), 2, 0, "+"),
                })  # fmt: skip
    note = "The slowed CNN is `cnn`, trained on at 0.01 from the same split. Norms: log normalized R1-norm."
    return as_table("At equal train loss", note, rows)


def other_norms(networks: Networks) -> str:
    """At the CNN's checkpoints, where all norms were measured again; the others' are interpolated to that loss."""
    rows = []
    for name in networks:
        if not split_of(name) or is_single_layer(name):
            continue
        for epoch in (epoch for epoch in CHECKPOINTS if epoch > int(split_of(name))):
            for margin, title in MARGINS.items():
                differences: dict[str, list[float]] = {key: [] for key in NORMS}
                for seed in sorted(networks[name].keys() & networks["CNN"].keys()):
                    cnn = at_epoch(with_margin(networks["CNN"][seed], margin), epoch)
                    other = at_loss(with_margin(networks[name][seed], margin), cnn["train_loss"]) if cnn else None
                    for key in NORMS:
                        if other and np.isfinite(other.get(key, np.nan) - cnn.get(key, np.nan)):
                            differences[key].append(other[key] - cnn[key])
                if any(differences.values()):
                    row = {"network": name, "CNN's epoch": str(epoch), "relative to": title}
                    for key, short in NORMS.items():
                        row[short] = with_seeds(differences[key], 2)
                    rows.append(row)
    note = (
        "ln(norm / margin) of the network minus that of the CNN after these epochs, at the CNN's train loss then; in "
        "brackets the number of seeds."
    )
    return as_table("Other norms and other margins", note, rows)


def growth(networks: Networks) -> str:
    """By which layers a network's norm has grown since the split; the CNN's since epoch 28."""
    rows, level, layer = [], 0.15, "log_frobenius_"
    for name, seeds in networks.items():
        found = []
        for values in seeds.values():
            start, end = at_epoch(values, 0 if split_of(name) else 28), at_loss(values, level)
            layers = [key for key in values if key.startswith(layer) and not key.endswith("_normalized")]
            if start and end and layers and np.isfinite([end[key] - start[key] for key in layers]).all():
                changes = {f"layer {key.removeprefix(layer)}": end[key] - start[key] for key in layers}
                changes["all layers: ln of the product"] = end["log_prod_norm"] - start["log_prod_norm"]
                changes["the same of operator norms"] = end["log_prod_spectral"] - start["log_prod_spectral"]
                changes["ln of the published margin"] = np.log(end["margin"] / start["margin"])
                found.append(changes)
        if found:
            row = {"network": name if split_of(name) else "CNN since 28", "seeds": str(len(found))}
            rows.append(row | {key: interval((changes[key] for changes in found), 3, 0, "+") for key in found[0]})
    note = (
        f"ln of the layers' Frobenius norms at train loss {level}, minus that of the CNN at the split. Layer 13 is the "
        "last one, which is never untied. The norm is the product's logarithm minus the margin's."
    )
    return as_table("Which layers grow", note, rows)


def first_epoch(networks: Networks) -> str:
    rows = []
    for name in networks:
        if not split_of(name) or is_single_layer(name):
            continue
        split, found = int(split_of(name)), []
        for seed, values in networks[name].items():
            cnn, after = networks["CNN"].get(seed), at_epoch(values, 1)
            near = cnn and [at_epoch(cnn, epoch) for epoch in range(split - AROUND, split + AROUND + 1)]
            if after and near and all(near):
                keys = ("test_acc", NORM, "train_loss")
                mean = {key: np.mean([evaluation[key] for evaluation in near]) for key in keys}
                band = {key: np.ptp([evaluation[key] for evaluation in near]) for key in keys}
                elcn = at_epoch(networks.get(f"eLCN from {split}", {}).get(seed, {"checkpoints": np.array([])}), 1)
                found.append((after, near[AROUND], mean, band, elcn))
        if found:
            row = {"network": name, "seeds": str(len(found))}
            beside = [after["test_acc"] - elcn["test_acc"] for after, *_, elcn in found if elcn]
            own = name == f"eLCN from {split}"
            row["test accuracy minus the eLCN's"] = "" if own else interval(beside, 2, PAIRED, "+")
            for key, title, digits, error in (
                ("test_acc", "test accuracy", 2, PAIRED), (NORM, "norm", 3, 0), ("train_loss", "train loss", 3, 0)
            ):  # fmt: skip
                row[title] = interval((after[key] - mean[key] for after, _, mean, *_ in found), digits, error, "+")
                at_split = interval((at[key] - mean[key] for _, at, mean, *_ in found), digits, 0, "+")
                band = np.mean([band[key] for *_, band, _ in found])
                row[f"{title}: CNN at the split; its range"] = f"{at_split}; {band:.{digits}f}"
            rows.append(row)
    note = (
        f"After a network's first own epoch, minus the mean of the CNN's {2 * AROUND + 1} epochs around the split. "
        "Beside it: how far the CNN at the split itself is from that mean, and the range of those epochs."
    )
    return as_table("The first epoch after the split", note, rows)


def single_layers(networks: Networks) -> str:
    rows = []
    for name in networks:
        control, level = f"tied{name[2:]}", 0.32
        if name.startswith("lc") and control in networks:
            accuracies = interval(apart(networks, name, control, level, "test_acc"), 2, PAIRED, "+")
            norms = {short: with_seeds(apart(networks, name, control, level, key), 3) for key, short in NORMS.items()}
            row = {"network": name, "control": control, "train loss": str(level)}
            rows.append(row | norms | {"test accuracy": accuracies})
    note = (
        "One convolution untied, by its index, minus its control, at one train loss. Norms: ln(norm / published "
        "margin); in brackets the number of seeds."
    )
    return as_table("Single layers", note, rows)


def at_equal_epochs(networks: Networks) -> str:
    rows, shown = [], {"train_loss": 3, "train_acc": 2, "test_acc": 2, NORM: 3}
    for name, seeds in networks.items():
        last = max(int(values["checkpoints"][-1]) for values in seeds.values())
        for epoch in sorted({0, *OWN_EPOCHS, last}) if split_of(name) else CNN_EPOCHS:
            found = [evaluation for values in seeds.values() if (evaluation := at_epoch(values, epoch))]
            if found:
                row = {"network": name, "own epochs": str(epoch), "seeds": str(len(found))}
                for key, digits in shown.items():
                    error = ONE if key == "test_acc" else 0
                    title = "norm" if key == NORM else key.replace("_", " ")
                    row[title] = interval((values[key] for values in found), digits, error)
                row["untied"] = interval((100 * values["untied"] for values in found), 1) + " %"
                rows.append(row)
    return as_table("At equal epochs", "`untied`: how far the filters have left the tied subspace.", rows)


def how_far(networks: Networks) -> str:
    seeds = sorted({seed for found in networks.values() for seed in found})
    rows = []
    for name, found in networks.items():
        row = {"network": name}
        for seed in seeds:
            new = seed in found and np.isfinite(found[seed].get("log_prod_spectral", np.array([np.nan]))).any()
            epochs = f"{found[seed]['checkpoints'][-1]:.0f}" if seed in found else ""
            row[f"seed {seed}"] = epochs + (" *" if new else "")
        rows.append(row)
    note = "Own epochs of each network, of 150. *: at least some evaluations have the spectral and the path norms."
    return as_table("What was run", note, rows)


TABLES = (at_equal_loss, other_norms, growth, first_epoch, single_layers, at_equal_epochs, how_far)


def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="*", default=[HERE / "published"], metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables there as well")
    args = parser.parse_args(argv)
    curves = sum(grouped(read_curves(args.runs, None, None), "published"), [])
    parts = [f"# Tables\nPrinted by `python results/tables.py`.\n\n{__doc__.partition('Prints markdown. ')[2]}"]
    parts += [table] if (table := paper_against_here(curves)) else []
    groups = networks_of(curves)
    for (settings, _), networks in groups.items():
        parts += [f"# {settings.run_name}\n"] if len(groups) > 1 else []
        parts += [table for make in TABLES if (table := make(networks))]
    text = "\n".join(parts)
    print(text, end="")
    if args.out:
        with writing(args.out, "name another --out"):
            write_file(args.out, text.encode())
    return COMPLETE


if __name__ == "__main__":
    finish(main, sys.argv, saves=False)
