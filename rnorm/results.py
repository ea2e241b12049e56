"""What runs recorded: read back, averaged over seeds, as tables; and the points of the published figure.

Nothing here draws, trains or reads images; `STYLE` and `render` are what all figures have in common.
"""

import ast
import contextlib
import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from rnorm.history import check_history, has_diverged
from rnorm.store import load_history
from rnorm.files import Damaged, RnormError
from rnorm.runs import Member, Settings, converted_members, read_config

MARGINS = {"published": "margin", "multiclass": "multiclass_margin"}  # what the normalized norms can be relative to
NORMALIZED = ("log_prod_norm_normalized", "norm_margin_normalized")
TABULATED = {
    "test_acc": ("test accuracy", ".2f"), "train_acc": ("train accuracy", ".2f"),
    "log_prod_norm_normalized": ("log normalized R1-norm", ".3f"), "norm_margin_normalized": ("norm / margin", ".4g"),
    "untied": ("untied", ".3f"),
}  # fmt: skip
"""What a table shows: its title, and how its numbers are written."""
REFERENCE = {"log_normalized_r1_norm": "log_prod_norm_normalized", "train_acc": "train_acc", "test_acc": "test_acc"}
"""Columns of a file of published points, and the keys of histories that they correspond to."""
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "figure.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.5, "axes.xmargin": 0.02, "axes.formatter.limits": (-3, 4),
    "lines.linewidth": 1.3, "savefig.dpi": 300, "savefig.bbox": "tight", "pdf.fonttype": 42, "text.parse_math": False,
    "legend.frameon": False, "legend.handlelength": 2.6, "legend.columnspacing": 1.4, "legend.borderaxespad": 0,
}  # fmt: skip
"""Settings of matplotlib."""

Values = dict[str, np.ndarray]  # a recorded quantity's key to its values, (evaluations,), float64


@dataclass(frozen=True)
class Curve:
    """A network's evaluations in one run, or their means over seeds, as far as it has come in all runs that have it.

    Of a single run, a last entry that is NaN says that the network diverged. In means there is none.
    """

    member: Member  # of means: without a run, and of seed 0
    data_sha256: str
    mean: Values
    std: Values = dataclasses.field(default_factory=dict)  # of a sample; empty for a single seed
    seeds: int = 1
    diverged: tuple[str, ...] = ()  # `seed 0 diverged in epoch 52`

    @property
    def own_epochs(self) -> np.ndarray:
        return self.mean["checkpoints"]

    @property
    def epochs_done(self) -> int:
        return int(max(self.own_epochs, default=0))


def read_run(run: Path) -> list[Curve]:
    """All networks of a run that have a history; raises RnormError if it is no run, is damaged or has none yet."""
    settings, config = read_config(run)
    curves = []
    for member in (Member(run, settings), *converted_members(run, settings)):
        try:
            if history := load_history(member):
                curves.append(Curve(member, str(config.get("data_sha256")), as_arrays(history)))
        except (Damaged, OverflowError) as error:
            remedy = "repeat the run's experiments.py command"
            raise RnormError(f"{member.history_file} is damaged ({error}); {remedy}") from None
    if not curves or not curves[0].member.is_cnn:
        raise RnormError(f"{run} has recorded nothing yet; start experiments.py, or wait for its first evaluation")
    return curves


def as_arrays(history: dict[str, list]) -> Values:
    return {key: np.array(values, np.float64) for key, values in history.items()}


@contextlib.contextmanager
def csv_rows(path: Path) -> Iterator[Iterable[dict[str, str]]]:
    """The rows of a CSV file; whatever is wrong with them, here or where they are read, is an RnormError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel begins its files with a byte order mark
            yield csv.DictReader(file)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SyntaxError, csv.Error, Damaged) as error:
        raise RnormError(f"{path} cannot be read ({type(error).__name__}: {error})") from None


def tidy(curves: list[Curve]) -> str:
    """Single runs as CSV: all settings and everything recorded, a row for each evaluation.

    `epoch` is on the CNN's axis. The CNN itself has the conversion "none" and the split epoch 0.
    """
    rows = []
    for curve in curves:
        member = curve.member
        row = {"run": member.run.name, **dataclasses.asdict(member.settings), "data_sha256": curve.data_sha256}
        row |= {"conversion": member.conversion or "none", "split_epoch": member.split}
        for i, own in enumerate(curve.own_epochs.astype(int).tolist()):
            recorded = {key: float(values[i]) for key, values in curve.mean.items()}
            rows.append({**row, "epoch": own + member.split, **recorded, "checkpoints": own})
    return to_csv(rows)


def read_tidy(path: Path) -> list[Curve]:
    """The curves of a file of `tidy`'s; raises RnormError for any other file."""
    histories = {}
    with csv_rows(path) as rows:
        for row in rows:
            settings = {of.name: row.pop(of.name) for of in dataclasses.fields(Settings)}
            for name, text in settings.items():
                if not isinstance(getattr(Settings, name), str):
                    settings[name] = ast.literal_eval(text)
            names = ("run", "conversion", "split_epoch", "data_sha256", "epoch")
            run, conversion, split, sha256, _ = (row.pop(name) for name in names)
            conversion = "" if conversion == "none" else conversion
            member = Member(Path(run), Settings(**settings), conversion, int(split))
            history = histories.setdefault((member, sha256), {})
            for key, text in row.items():
                if text:  # else another network's quantity
                    history.setdefault(key, []).append(int(text) if key == "checkpoints" else float(text))
        if not histories:
            raise ValueError("no networks in it")
        return [Curve(*key, as_arrays(check_history(history, key[0]))) for key, history in histories.items()]


def read_curves(paths: list[Path], splits: list[int] | None, conversions: list[str] | None) -> list[Curve]:
    """The networks of the runs that `paths` name: the CNNs, and those of `splits` and `conversions` (None: all).

    A path is a run's directory, one that holds runs, or a file that `tidy` made. Raises RnormError where the reading
    does, for a split or conversion that no run has, and for a run that comes twice.
    """
    files = []
    for path in paths:
        inside = sorted(config.parent for config in path.glob("*/config.json"))
        files += inside if inside and not (path / "config.json").exists() else [path]
    curves, runs = [], set()
    for path in dict.fromkeys(file.resolve() for file in files):
        found = read_tidy(path) if path.is_file() else read_run(path)
        named = {(curve.member.settings, curve.data_sha256) for curve in found}
        if named & runs:
            raise RnormError(f"{path} holds the same run as another one named, down to the seed; name one of them")
        runs |= named
        curves += found
    for name, asked in (("split", splits), ("conversion", conversions)):
        known = {getattr(curve.member, name) for curve in curves if not curve.member.is_cnn}
        if unknown := set(asked or ()) - known:
            raise RnormError(f"no network has the {name} {min(unknown)}; there are {' '.join(map(str, sorted(known)))}")
        curves = [curve for curve in curves if curve.member.is_cnn or getattr(curve.member, name) in (asked or known)]
    return curves


def average(curves: list[Curve], margin: str) -> list[list[Curve]]:
    """Means over seeds, in groups that differ in settings or data: CNN first; norms relative to `margin` of MARGINS."""
    groups: dict[tuple, dict[Member, list[Curve]]] = {}
    for curve in curves:
        settings = dataclasses.replace(curve.member.settings, seed=0)
        member = dataclasses.replace(curve.member, run=Path(), settings=settings)
        groups.setdefault((settings, curve.data_sha256), {}).setdefault(member, []).append(curve)
    averaged = []
    for group in groups.values():
        members = sorted(group, key=lambda m: (not m.is_cnn, m.split, m.conversion != "lc", m.conversion))
        averaged.append([mean_curve(member, group[member], margin) for member in members])
    return averaged


def mean_curve(member: Member, curves: list[Curve], margin: str) -> Curve:
    """The mean over seeds of one network."""
    runs, diverged, mean, std = [], [], {}, {}
    for curve in curves:
        values = with_margin(curve.mean, margin)
        if has_diverged(values):
            diverged.append(f"seed {curve.member.settings.seed} diverged in epoch {values['checkpoints'][-1]:.0f}")
            values = {key: of[:-1] for key, of in values.items()}
        runs.append(values)
    length = min(len(values["checkpoints"]) for values in runs)
    for key in set.intersection(*map(set, runs)):
        stacked = np.array([values[key][:length] for values in runs])  # (seeds, evaluations)
        with np.errstate(invalid="ignore", over="ignore"):  # a norm can be infinite
            mean[key] = stacked.mean(0)
            if len(runs) > 1:
                std[key] = stacked.std(0, ddof=1)
    return Curve(member, curves[0].data_sha256, mean, std, len(runs), tuple(diverged))


def with_margin(values: Values, margin: str) -> Values:
    """The values with normalized norms relative to that margin; NaN where the margin is not positive."""
    divisor = np.where(values[MARGINS[margin]] > 0, values[MARGINS[margin]], np.nan)
    with np.errstate(over="ignore"):
        return values | dict(zip(NORMALIZED, (values["log_prod_norm"] - np.log(divisor), values["norm"] / divisor)))


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


def differences(groups: list[list[Curve]]) -> list[str]:
    """For each group the settings in which the groups differ, in words: `cnn_lr=0.1, momentum=0.9`."""
    identities = []
    for cnn, *_ in groups:
        identities.append(dataclasses.asdict(cnn.member.settings) | {"data_sha256": cnn.data_sha256[:8]})
    varied = [name for name in identities[0] if any(of[name] != identities[0][name] for of in identities)]
    return [", ".join(f"{name}={of[name]}" for name in varied) for of in identities]


def table(groups: list[list[Curve]], margin: str) -> str:
    """Every network at its last evaluation, with deviations over seeds, as markdown that is aligned as text, too."""
    rows, names = [], {"": "CNN", "lc": "eLCN"}
    for group, difference in zip(groups, differences(groups)):
        for curve in group:
            member = curve.member
            row = {"differs in": difference} if difference else {}
            row |= {"network": names.get(member.conversion, member.conversion)}
            row["from"] = "" if member.is_cnn else str(member.split)
            row["epochs"] = ", ".join([f"{curve.epochs_done} of {member.epochs}", *curve.diverged])
            row["seeds"] = str(curve.seeds)
            for key, (title, form) in TABULATED.items():
                ends = [number(of[key][-1], form) for of in (curve.mean, curve.std) if len(of.get(key, ()))]
                row[title] = " ± ".join(ends) or "undefined"
            rows.append(row)
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells]
    return "\n".join([*lines, "", f"Norms are relative to the {margin} margin.", ""])


def number(value: float, form: str) -> str:
    """As text; a norm is undefined where the margin is not positive."""
    return "undefined" if math.isnan(value) else f"{value:{form}}"


def to_csv(rows: list[dict[str, object]]) -> str:
    """Rows as a CSV file with all their columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def render(figure: Figure, suffix: str) -> bytes:
    """A figure as the content of a file; `suffix` is .png, .pdf or .svg. A very tall one has fewer dots per inch."""
    file = io.BytesIO()
    figure.savefig(file, format=suffix[1:].lower(), dpi=min(300, 20000 / figure.get_figheight()))
    return file.getvalue()
