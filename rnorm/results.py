"""What runs recorded: read back, grouped, as tables; and the points of the published figure.

Nothing here draws, trains or reads images.
"""

import contextlib
import csv
import dataclasses
import io
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rnorm.files import Damaged, RnormError
from rnorm.history import has_diverged
from rnorm.runs import Member, Settings, converted_members, read_config
from rnorm.store import load_history

MEASURE_AGAIN = "python convert.py RUN --evaluate"  # evaluates the checkpoints of a finished run again
MARGINS = {"published": "margin", "multiclass": "multiclass_margin"}  # names of recorded margins
TABULATED = {
    "test_acc": ("test accuracy", ".2f"), "train_acc": ("train accuracy", ".2f"),
    "log_prod_norm_normalized": ("log normalized R1-norm", ".3f"), "norm_margin_normalized": ("norm / margin", ".4g"),
    "untied": ("untied", ".3f"),
}  # fmt: skip
"""What a table shows: its title, and how its numbers are written."""
REFERENCE = {"log_normalized_r1_norm": "log_prod_norm_normalized", "train_acc": "train_acc", "test_acc": "test_acc"}
"""Columns of a file of published points, and the keys of histories that they correspond to."""
CIFAR10 = "6b3883dca6c867f1e58def548c063d1865569b8575fcbce06b3e468a89f9895a"  # the SHA-256 of its arrays
EXTENT = ("epochs", "n_splits", "splits", "lc_epochs", "lc_evaluations")  # which networks there are, and how far
ANYTHING = (*EXTENT, "seed", "precision", "dataset")  # what published settings need not be equal in

Values = dict[str, np.ndarray]  # a recorded quantity's key to its values, (evaluations,), float64


@dataclass(frozen=True)
class Curve:
    """A network's evaluations in one run, as far as it has come.

    If it diverged, all is NaN in the last. `grouped` leaves that one out and says in which epoch it was.
    """

    member: Member
    data_sha256: str
    values: Values
    diverged_in: int | None = None

    @property
    def own_epochs(self) -> np.ndarray:
        return self.values["checkpoints"]

    @property
    def epochs_done(self) -> int:
        return int(max(self.own_epochs, default=0))

    @property
    def is_published(self) -> bool:
        """Whether the run is one of the published figure: CIFAR-10, with its settings."""
        settings = self.member.settings
        free = {name: getattr(settings, name) for name in ANYTHING}
        return settings == Settings(**free) and (settings.dataset == "cifar10" or self.data_sha256 == CIFAR10)


def read_run(run: Path) -> list[Curve]:
    """All networks of a run that have a history, the CNN first; none if it has recorded nothing yet.

    Raises RnormError if it is no run or is damaged.
    """
    if not (run / "config.json").exists():
        importing = f"results of the code released with the paper: python results/import_released.py {run} OUT"
        raise RnormError(f"{run} is no run of experiments.py, as it has no config.json; {importing}")
    settings, config = read_config(run)
    curves = []
    for member in (Member(run, settings), *converted_members(run, settings)):
        try:
            if history := load_history(member):
                values = {key: np.array(numbers, np.float64) for key, numbers in history.items()}
                curves.append(Curve(member, str(config.get("data_sha256")), values))
        except (Damaged, OverflowError) as error:
            remedy = "repeat the run's experiments.py command"
            raise RnormError(f"{member.history_file} is damaged ({error}); {remedy}") from None
    return curves if curves and curves[0].member.is_cnn else []


def read_curves(paths: list[Path], splits: list[int] | None, conversions: list[str] | None) -> list[Curve]:
    """The networks of the runs that `paths` name: the CNNs, and those of `splits` and `conversions` (None: all).

    A path is a run's directory, or one that holds runs. A run that has recorded nothing is left out, with a line on
    stderr. Raises RnormError where the reading does, for a split or conversion that no run has, for a run that comes
    twice, and if nothing is recorded at all.
    """
    runs = []
    for path in paths:
        inside = sorted(config.parent for config in path.glob("*/config.json"))
        runs += inside if inside and not (path / "config.json").exists() else [path]
    curves, known = [], set()
    for run in dict.fromkeys(run.resolve() for run in runs):
        found = read_run(run)
        if not found:
            print(f"{run} is left out: it has recorded nothing yet", file=sys.stderr)
            continue
        identity = (found[0].member.settings, found[0].data_sha256)
        if identity in known:
            raise RnormError(f"{run} holds the same run as another one named, down to the seed; name one of them")
        known.add(identity)
        curves += found
    if not curves:
        raise RnormError("nothing is recorded yet; start experiments.py, or wait for its first evaluation")
    for name, asked in (("split", splits), ("conversion", conversions)):
        there = {getattr(curve.member, name) for curve in curves if not curve.member.is_cnn}
        if unknown := set(asked or ()) - there:
            raise RnormError(f"no network has the {name} {min(unknown)}; there are {' '.join(map(str, sorted(there)))}")
        curves = [curve for curve in curves if curve.member.is_cnn or getattr(curve.member, name) in (asked or there)]
    return curves


def with_margin(values: Values, margin: str) -> Values:
    """The values with all norms relative to a margin, one of MARGINS or a recorded key; NaN where it is not positive.

    `KEY_normalized` is KEY - ln(margin) for each KEY that begins with log_; `norm_margin_normalized` norm / margin.
    """
    values = {key: numbers for key, numbers in values.items() if not key.endswith("_normalized")}
    divisor = values.get(MARGINS.get(margin, margin), np.array(math.nan))
    divisor = np.where(divisor > 0, divisor, math.nan)
    logs = [key for key in values if key.startswith("log_")]
    with np.errstate(over="ignore"):
        values["norm_margin_normalized"] = values["norm"] / divisor
    return values | {f"{key}_normalized": values[key] - np.log(divisor) for key in logs}


def grouped(curves: list[Curve], margin: str) -> list[list[Curve]]:
    """Groups of curves that differ in nothing but network and seed; norms are relative to `margin`.

    In each the CNNs come first, then by split; eLCNs before other conversions; then by seed.
    """
    groups: dict[tuple, list[Curve]] = {}
    for curve in curves:
        values, diverged_in = with_margin(curve.values, margin), None
        if has_diverged(values):
            diverged_in = int(curve.own_epochs[-1])
            values = {key: numbers[:-1] for key, numbers in values.items()}
        settings = dataclasses.replace(curve.member.settings, seed=0)
        group = groups.setdefault((settings, curve.data_sha256), [])
        group.append(Curve(curve.member, curve.data_sha256, values, diverged_in))
    for group in groups.values():
        group.sort(key=lambda c: (c.member.split, c.member.title != "eLCN", c.member.title, c.member.settings.seed))
        group.sort(key=lambda c: not c.member.is_cnn)
    return list(groups.values())


def by_network(group: list[Curve]) -> list[list[Curve]]:
    """A group's curves as lists of one network in several seeds."""
    networks: dict[str, list[Curve]] = {}
    for curve in group:
        networks.setdefault(curve.member.label, []).append(curve)
    return list(networks.values())


def differences(groups: list[list[Curve]], without: Iterable[str] = ("seed",)) -> list[str]:
    """For each group the settings in which the groups differ, in words: `cnn_lr=0.1, momentum=0.9`."""
    identities = []
    for cnn, *_ in groups:
        identities.append(dataclasses.asdict(cnn.member.settings) | {"data_sha256": cnn.data_sha256[:8]})
    varied = [name for name in identities[0] if any(other[name] != identities[0][name] for other in identities)]
    named = [name for name in varied if name not in without]
    return [", ".join(f"{name}={identity[name]}" for name in named) for identity in identities]


def table(groups: list[list[Curve]], margin: str) -> str:
    """Every network at the last evaluation that all its seeds have, as markdown that is aligned as text, too."""
    rows = []
    for group, difference in zip(groups, differences(groups)):
        for curves in by_network(group):
            member, length = curves[0].member, min(len(curve.own_epochs) for curve in curves)
            epochs = [f"{min(curve.epochs_done for curve in curves)} of {member.epochs}"]
            for curve in curves:
                if curve.diverged_in is not None:
                    epochs.append(f"seed {curve.member.settings.seed} diverged in epoch {curve.diverged_in}")
            row = {"differs in": difference} if difference else {}
            row |= {"network": member.title, "from": "" if member.is_cnn else str(member.split)}
            row |= {"epochs": ", ".join(epochs), "seeds": str(len(curves))}
            for key, (title, form) in TABULATED.items():
                row[title] = spread([curve.values[key][length - 1] if length else math.nan for curve in curves], form)
            rows.append(row)
    text = f"{aligned(rows)}\nNorms are relative to the {margin} margin."
    return text + (" ± is the standard deviation over seeds.\n" if "±" in text else "\n")


def best(groups: list[list[Curve]]) -> str:
    """The highest test accuracy of the CNN and of each conversion over epochs and splits, chosen seed by seed."""
    rows = []
    for group, difference in zip(groups, differences(groups)):
        for title in dict.fromkeys(curve.member.title for curve in group):
            curves = [curve for curve in group if curve.member.title == title and len(curve.own_epochs)]
            curves.sort(key=lambda curve: max(curve.values["test_acc"]))
            chosen = {curve.member.settings.seed: curve for curve in curves}  # of each seed the last, and highest
            where = []
            for curve in chosen.values():
                epoch = f"{curve.own_epochs[np.argmax(curve.values['test_acc'])]:.0f}"
                where.append(epoch if curve.member.is_cnn else f"{epoch} from {curve.member.split}")
            highest = [max(curve.values["test_acc"]) for curve in chosen.values()]
            last = [curve.values["test_acc"][-1] for curve in chosen.values()]
            row = {"differs in": difference} if difference else {}
            row |= {"network": title, "seeds": str(len(chosen)), "highest test accuracy": spread(highest, ".2f")}
            rows.append(row | {"at own epoch": ", ".join(where), "its last": spread(last, ".2f")})
    return f"{aligned(rows)}\nThe highest is chosen by the test set itself, which makes it too high.\n"


def spread(numbers: list[float], form: str) -> str:
    """Mean and sample standard deviation; a single number has none, and a norm without a margin is undefined."""
    if len(numbers) < 2 or not np.isfinite(numbers).all():
        return number(np.mean(numbers or math.nan), form)
    return f"{np.mean(numbers):{form}} ± {np.std(numbers, ddof=1):{form}}"


def number(value: float, form: str) -> str:
    """As text; a norm is undefined where the margin is not positive."""
    return "undefined" if math.isnan(value) else f"{value:{form}}"


def aligned(rows: list[dict[str, str]]) -> str:
    """Rows of one form as a markdown table whose columns are aligned as text, too."""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in cells)


def tidy(curves: list[Curve]) -> str:
    """Runs as CSV: all settings and everything recorded, a row for each evaluation.

    `epoch` is on the CNN's axis. The CNN itself has the conversion "none" and the split epoch 0.
    """
    rows = []
    for curve in curves:
        member = curve.member
        row = {"run": member.run.name, **dataclasses.asdict(member.settings), "data_sha256": curve.data_sha256}
        row |= {"conversion": member.conversion or "none", "split_epoch": member.split}
        for i, own in enumerate(curve.own_epochs.astype(int).tolist()):
            recorded = {key: float(values[i]) for key, values in curve.values.items()}
            rows.append({**row, "epoch": own + member.split, **recorded, "checkpoints": own})
    return to_csv(rows)


def to_csv(rows: list[dict[str, object]]) -> str:
    """Rows as a CSV file with all their columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@contextlib.contextmanager
def csv_rows(path: Path) -> Iterator[Iterable[dict[str, str]]]:
    """The rows of a CSV file; whatever is wrong with them, here or where they are read, is an RnormError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel begins its files with a byte order mark
            yield csv.DictReader(file)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        raise RnormError(f"{path} cannot be read ({type(error).__name__}: {error})") from None


def read_reference(path: Path) -> list[Curve]:
    """The published points of the CNN and of the eLCNs, under the keys of histories.

    The published norm of an eLCN at its own epoch 0 repeats that of epoch 1: no measurement, so it is NaN here. Raises
    RnormError if the file is no table of points.
    """
    points: dict[Member, list] = {}
    with csv_rows(path) as rows:
        for row in rows:
            conversion = {"cnn": "", "elcn": "lc"}[row["network"].strip().lower()]
            member = Member(Path(), Settings(), conversion, int(row["split_epoch"]) if conversion else 0)
            epoch, *values = (float(row[name]) for name in ("epoch", *REFERENCE))
            if not 0 <= member.split <= epoch < math.inf:
                raise ValueError(f"epoch {epoch}, split_epoch {member.split}")
            if conversion and epoch == member.split:
                values[0] = math.nan
            points.setdefault(member, []).append([epoch - member.split, *values])
        if not points:
            raise ValueError("no published points in it")
    keys = ("checkpoints", *REFERENCE.values())
    return [Curve(member, "", dict(zip(keys, np.array(rows).T))) for member, rows in points.items()]
