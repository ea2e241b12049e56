"""Figures and tables of runs.

    python plot.py RUN                                        the published figure, as RUN/figure.png, and the table
    python plot.py RUN RUN ... --out figure.pdf               a line for each seed, a row of panels for each rate
    python plot.py RUN RUN --overlay --splits 28 --x train_loss   two rates in one row, over the train loss
    python plot.py RUN --panels untied test_loss log_path1_normalized     any recorded quantities
    python plot.py RUN --splits 28 --no_cnn --own_epochs      what follows one split: a colour for each conversion
    python plot.py RUN --convert_to lc tied                   only the networks of these conversions, and the CNN
    python plot.py RUN --reference results/published_figure.csv           with the points of the paper's figure
    python plot.py RUN ... --table table.md --csv all.csv     also as files: the last evaluations; everything recorded
    python plot.py RUN ... --best                             also each network's highest test accuracy
    python plot.py --margins A.pyT B.pyT ...                  margins of checkpoints; are their accuracies different?

RUN is a directory that experiments.py made, or one that holds several of these. Runs in progress are drawn as far as
they are.
"""

import argparse
import functools
import math
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rnorm.cli import COMPLETE, Parser, Stop, finish, writing
from rnorm.signals import check_signals, note_signals

if __name__ == "__main__":
    note_signals()  # torch and matplotlib take seconds to import; a signal in that time must not be lost

from rnorm.figures import render, styled  # before matplotlib, as it decides how that is loaded

# isort: split
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Transform

from models import load_network
from rnorm.devices import set_precision
from rnorm.files import write_file
from rnorm.flags import add_data_flags, data_of_run, member_of, open_device
from rnorm.measure import logits_of, multiclass_margins, published_margins
from rnorm.results import (
    EXTENT, MARGINS, MEASURE_AGAIN, Curve, best, differences, grouped, read_curves, read_reference, table, tidy,
)  # fmt: skip

LABELS = {
    "log_prod_norm_normalized": "log normalized R₁-norm", "norm_margin_normalized": "squared norm / margin",
    "train_acc": "train accuracy (%)", "test_acc": "test accuracy (%)", "margin": "published margin",
    "norm": "squared norm", "log_prod_norm": "log product of norms", "untied": "distance from tied",
}  # fmt: skip
"""Of axes; other quantities have their key as a label."""
NAMES = {"tied": "tied (eLCN's steps)", "cnn": "cnn (CNN at lc_lr)"}  # in legends, unless they name settings
PANELS = ["log_prod_norm_normalized", "train_acc", "test_acc"]
BY_SPLIT = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.15, 0.82, 256)))  # neither black nor yellow
BY_NAME = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f"]  # Okabe and Ito's
COLOURED = ["eLCN", "tied", "cnn", "eFCN", "head"]  # have the first of these colours, in every figure
RING = {"ls": "none", "marker": "o", "mfc": "none", "ms": 3.6, "mew": 0.6, "zorder": 4}
CROSS = {"ls": "none", "marker": "X", "mec": "white", "ms": 7, "mew": 0.5, "zorder": 5, "clip_on": False}
HEIGHT, LINE, LETTERS = 2.0, 0.18, 12.5  # inches: of a panel, of a line of text; letters to an inch


@dataclass(frozen=True)
class Line:
    """A curve, and how it is drawn."""

    curve: Curve
    name: str  # in the legend
    label: str  # of the one network
    style: dict  # colour and dashes


class Margins(NamedTuple):
    """A checkpoint's margins of all images, and which test images it gets right, (N,) each."""

    name: str
    training: np.ndarray
    test: np.ndarray
    right: np.ndarray
    data_sha256: str


def styled_lines(groups: list[list[Curve]], overlay: bool) -> tuple[list[list[Line]], ScalarMappable | None]:
    """The lines of each row of panels, and the scale of the colours if they mean splits.

    The CNN is black. The others have the colour of their split, and dashes for their kind; if there is only one split,
    a colour for each kind. With `overlay` all groups share a row, names say in which settings they differ, and a CNN
    that two groups share is drawn once.
    """
    splits = sorted({curve.member.split for curve in sum(groups, []) if not curve.member.is_cnn})
    scale = None
    if len(splits) > 1:
        scale = ScalarMappable(LogNorm(max(splits[0], 0.5), splits[-1]), BY_SPLIT)  # split 0 has no logarithm
    words, cnn_words = [""] * len(groups), [""] * len(groups)
    if overlay:
        words = differences(groups, ("seed", *EXTENT))
        words = words if len({*words}) == len(groups) else differences(groups)
        cnn_words = differences(groups, ("seed", *EXTENT, "lc_lr"))
    kinds = {(i * overlay, curve.member.title) for i, group in enumerate(groups) for curve in group}
    looks = looks_of(sorted(kind for kind in kinds if kind[1] != "CNN"), by_split=scale is not None)
    rows, cnns = [], set()
    for i, group in enumerate(groups):
        rows.append([])
        for curve in group:
            title, label, settings = curve.member.title, curve.member.label, words[i]
            colour, dashes = looks.get((i * overlay, title), ("black", i * overlay))
            if curve.member.is_cnn:
                settings, cnn = cnn_words[i], (cnn_words[i], curve.member.settings.seed)
                if overlay and cnn in cnns:
                    continue
                cnns.add(cnn)
            elif scale:
                colour = scale.to_rgba(max(curve.member.split, 0.5))
            name = f"{title}, {settings}" if settings else NAMES.get(title, title)
            label = f"{label}, {settings}" if settings else label
            style = {"color": colour, "ls": (0, (5, 2, *(1, 2) * (dashes - 1))) if dashes else "-"}
            rows[-1].append(Line(curve, name, label, style))
    return [sum(rows, [])] if overlay else rows, scale


def looks_of(kinds: list[tuple[int, str]], by_split: bool) -> dict[tuple[int, str], tuple[str, int]]:
    """Colour and number of dashes of each kind of network, (group, title); of no two the same.

    Those of COLOURED look alike in all figures. tied5 has the colour of lc5, dashed.
    """
    named = {(0, title): (colour, 0) for title, colour in zip(COLOURED, BY_NAME) if (0, title) in kinds}
    if by_split:
        order = [*named, *(kind for kind in kinds if kind not in named)]
        return {kind: ("", i) for i, kind in enumerate(order)}
    free = [colour for colour in BY_NAME if (colour, 0) not in named.values()] or BY_NAME
    paired = {kind: (kind[0], re.sub(r"^tied(?=\d)", "lc", kind[1])) for kind in kinds if kind not in named}
    bases, looks = list(dict.fromkeys(paired.values())), dict(named)
    for kind, base in paired.items():
        again, i = divmod(bases.index(base), len(free))
        looks[kind] = free[i], 2 * again + (kind != base)
    return looks


def draw(groups: list[list[Curve]], args: argparse.Namespace, reference: list[Curve] = ()) -> Figure:
    """The figure that the command line asks for, with rings for the points of `reference`.

    The CNN is left out where epochs count from the split and there are several.
    """
    rows, scale = styled_lines(groups, args.overlay)
    splits = sorted({line.curve.member.split for line in sum(rows, []) if not line.curve.member.is_cnn})
    if args.no_cnn or (args.own_epochs and len(splits) != 1):
        rows = [[line for line in row if not line.curve.member.is_cnn] for row in rows]
        rows = [row for row in rows if row]
    title = args.title or ", ".join(dict.fromkeys(row[0].curve.member.settings.dataset for row in rows))
    if len(splits) == 1:
        title += f", split at epoch {splits[0]}"
    if any(key.endswith("_normalized") for key in (*args.panels, args.x or "")):
        title += f", {args.margin} margin"
    heads = [""] if args.overlay else differences([[line.curve for line in row] for row in rows])
    fig, axes = lay_out(heads, len(args.panels), title)
    missing = []
    for column, panel in zip(axes.T, args.panels):
        for ax, row in zip(column, rows):
            comparable = args.margin == "published" or not panel.endswith("_normalized")
            missing += draw_lines(ax, row, reference if comparable else [], panel, args, splits)
    set_x_axis(axes, args)
    for column, panel in zip(axes.T, args.panels):
        set_y_axes(column, panel)
    if scale:
        add_bar(axes[0, -1], splits, scale)
    add_legend(fig, axes, bool(scale), sum(rows, []), missing)
    return fig


def lay_out(heads: list[str], columns: int, title: str) -> tuple[Figure, np.ndarray]:
    """A figure that its panels fill, and its axes, (rows, columns); all texts lie outside, where saving finds them.

    Matplotlib's own layouts measure every text, which takes long, and let long ones squeeze the panels.
    """
    width = max(4.0, 2.7 * columns)
    title, *heads = (textwrap.fill(text, int(LETTERS * width)) for text in (title, *heads))
    above = 0.2 + LINE * max(len(text.splitlines()) for text in heads)
    height = len(heads) * (HEIGHT + above) - above
    fig = Figure((width, height))
    grid = {"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": 0.35, "hspace": above / HEIGHT}
    axes = fig.subplots(len(heads), columns, sharex=True, sharey="col", squeeze=False, gridspec_kw=grid)
    for ax, text in zip(axes[:, 0], heads):
        ax.set_title(text, loc="left")
    fig.suptitle(title, x=0, y=1 + above / height, ha="left", va="bottom")
    return fig, axes


def add_legend(fig: Figure, axes: np.ndarray, by_split: bool, lines: list[Line], missing: list[str]) -> None:
    """Below the panels: which networks are not complete or have no value, and what lines and marks are."""
    done, asked = {}, {line.label: line.curve.member.epochs for line in lines}
    for line in lines:
        done[line.label] = min(line.curve.epochs_done, done.get(line.label, math.inf))
    short = [f"{label} ({done[label]} of {asked[label]})" for label in done if done[label] < asked[label]]
    width, height = fig.get_size_inches()
    letters, notes = int(LETTERS * width), []
    for words, labels in (("Not complete", short), ("No value", missing)):
        if labels:
            text = f"{words}: {', '.join(dict.fromkeys(labels))}"
            notes.append(textwrap.fill(text, int(14 * width), max_lines=2, placeholder=" ... and more"))
    shown = {drawn.get_label(): drawn for ax in axes.flat for drawn in ax.lines}
    legend = fig.legend(
        shown.values(), shown.keys(), ncols=max(1, letters // (6 + max(map(len, shown)))), loc="upper left",
        alignment="left", bbox_to_anchor=(0, -0.45 / height), title="\n".join(notes), title_fontsize=8,
    )  # fmt: skip
    for label, handle in zip(shown, legend.legend_handles):
        if by_split and label != "CNN":
            handle.set_color("grey")


def add_bar(ax: Axes, splits: list[int], scale: ScalarMappable) -> None:
    """The colour bar of split epochs, beside a panel; of more than nine, some are labelled."""
    labelled = splits[:: -math.ceil(len(splits) / 9)]
    bar = ax.figure.colorbar(scale, cax=ax.inset_axes((1.06, 0, 0.05, 1)), label="split epoch")
    bar.minorticks_off()
    bar.set_ticks([max(split, 0.5) for split in labelled], labels=labelled)


def draw_lines(
    ax: Axes, row: list[Line], reference: list[Curve], panel: str, args: argparse.Namespace, splits: list[int]
) -> list[str]:
    """One quantity: a line for each network and seed, thin if there are several; a cross where one diverged; rings.

    Returns the networks of which nothing can be drawn, as no value is finite.
    """
    thin = len({line.curve.member.settings.seed for line in row}) > 1
    missing, published = [], {}
    for line in row:
        curve, member = line.curve, line.curve.member
        if curve.is_published:
            published[member.label] = line.style["color"]
        x, y = x_values(curve, args, splits), curve.values.get(panel, np.full(len(curve.own_epochs), np.nan))
        x, y = x[np.isfinite(x)], np.where(np.abs(y) < 1e100, y, np.nan)[np.isfinite(x)]  # no axis can hold more
        if not np.isfinite(y).any():
            missing.append(f"{line.label} ({panel})")
        look = {"gid": member.label, "zorder": 2.5 if member.is_cnn else 2, "lw": 0.7 if thin else 1.3, **line.style}
        ax.plot(x, y, label=line.name, marker="." if args.own_epochs and not member.is_cnn else "", ms=4, **look)
        if curve.diverged_in is not None:
            ax.plot(x[-1:], y[-1:], label="diverged", gid=member.label, color=line.style["color"], **CROSS)
    for curve in reference:
        if curve.member.label in published and panel in curve.values:
            x, colour = x_values(curve, args, splits), published[curve.member.label]
            ax.plot(x, curve.values[panel], label="published", gid=curve.member.label, color=colour, **RING)
    return missing


def x_values(curve: Curve, args: argparse.Namespace, splits: list[int]) -> np.ndarray:
    """Where a curve's evaluations lie on the x axis, (evaluations,); NaN if not on it.

    Of one split, the CNN begins there, unless epochs count from its start. On an axis of losses, a network is shown
    where its loss is the lowest so far.
    """
    first = splits[0] if curve.member.is_cnn and len(splits) == 1 else 0
    x = curve.values.get(args.x or "checkpoints", np.full(len(curve.own_epochs), np.nan))
    if falls(args.x):
        x = np.where(x > np.fmin.accumulate(x), np.nan, x)
    if args.own_epochs or args.x:
        return np.where(curve.own_epochs < first, np.nan, x - first if args.own_epochs else x)
    x = x + curve.member.split
    return np.where(x < args.log_epochs, np.nan, x)  # no logarithm of 0


def falls(key: str | None) -> bool:
    """Whether a quantity on the x axis is a loss: on a logarithmic axis, reversed, so that training runs right."""
    return bool(key) and key.endswith("loss")


def set_x_axis(axes: np.ndarray, args: argparse.Namespace) -> None:
    """The scale that all panels share, once lines are drawn, and its label below the last row."""
    ax, label = axes[0, 0], "epochs"
    if args.own_epochs:
        ax.set_xscale("symlog", linthresh=1, linscale=0.4)
        label = "epochs since the split"
    elif args.x:
        ax.xaxis.set_inverted(falls(args.x))
        label = label_of(args.x) + (", where lowest so far" if falls(args.x) else "")
    if args.log_epochs or falls(args.x):
        ax.set_xscale("log")
        low, high = sorted(ax.get_xlim())
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)))
        ax.xaxis.set_minor_formatter("")
    if ax.get_xscale() != "linear":
        ax.xaxis.set_major_formatter("{x:g}")
    for ax in axes[-1]:
        ax.set_xlabel(label)


def label_of(key: str) -> str:
    return LABELS.get(key, textwrap.fill(key.replace("_", " "), 22))


def set_y_axes(column: np.ndarray, panel: str) -> None:
    """The label and the common range of the panels of one quantity, once its lines are drawn."""
    lines = [line for ax in column for line in ax.lines]
    curves = [visible(line) for line in lines if line.get_label() != "published"]
    rings = [visible(line) for line in lines if line.get_label() == "published"]
    column[0].set_ylim(range_of(curves, rings, column[0].xaxis.get_transform()))
    for ax in column:
        ax.set_ylabel(label_of(panel))
        if not any(visible(line).size for line in ax.lines):
            reason = "undefined: no margin\nis positive" if panel.endswith("_normalized") else "no finite value"
            ax.text(0.5, 0.5, reason, ha="center", va="center", transform=ax.transAxes)


def visible(line: Line2D) -> np.ndarray:
    """The points (x, y) of a line that can be seen, (2, points)."""
    points = np.array(line.get_data(), float)
    return points[:, np.isfinite(points).all(0)]


def range_of(curves: list[np.ndarray], rings: list[np.ndarray], along: Transform) -> tuple[float, float]:
    """The range of all rings, of what most of each curve holds, and of its end; each is (2, points).

    A few first epochs, or a jump of the loss, count only where they widen the range by little. `along` is the scale of
    the x axis.
    """
    core = [value for _, y in rings for value in y]
    whole = [*core]
    for x, y in curves:
        if len(x):
            length = np.abs(np.diff(along.transform(x), prepend=along.transform(x[:1]))).cumsum()  # along the axis
            even = np.interp(np.linspace(0, length[-1], 300), length, y)
            core += [*np.quantile(even, (0.06, 0.94)), y[-1]]
            whole += [*y]
    low, high = min(core, default=0), max(core, default=1)
    lowest, highest = min(whole, default=low), max(whole, default=high)
    room = 0.4 * (high - low) or 0.01 * abs(high) or 1
    if lowest > low - room:
        low = lowest
    if highest < high + room:
        high = highest
    return low - 0.15 * room, high + 0.15 * room


def draw_margins(margins: list[Margins], margin: str, title: str) -> Figure:
    """Histograms of the margins of checkpoints."""
    fig = Figure((6, 2.7 + LINE * len(margins)), layout="constrained")
    bins = np.histogram_bin_edges(np.concatenate([part for one in margins for part in (one.training, one.test)]), 60)
    colours = BY_SPLIT(np.linspace(0, 1, len(margins)))
    for ax, part in zip(fig.subplots(1, 2, sharex=True), ("training", "test")):
        for colour, one in zip(colours, margins):
            ax.hist(getattr(one, part), bins, density=True, histtype="step", color=colour, lw=1.2, label=one.name)
        ax.axvline(0, color="black", lw=0.6, ls=":")
        ax.set(xlabel=f"{margin} margin", ylabel="density", title=f"{part} set")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center")
    fig.suptitle(f"{title or 'Margins of the examples'}, {margin} margin")
    return fig


def accuracies(margins: list[Margins]) -> str:
    """Each checkpoint's test accuracy, and the difference to the first with its paired standard error, in points."""
    lines, first = [], margins[0]
    for one in margins:
        lines.append(f"{' '.join(one.name.split())}: test accuracy {100 * one.right.mean():.2f}")
        if one is not first and one.data_sha256 == first.data_sha256:
            apart = 100 * (one.right.astype(float) - first.right)  # image by image
            error = apart.std(ddof=1) / math.sqrt(len(apart))
            lines[-1] += f", {apart.mean():+.2f} against the first (paired standard error {error:.2f})"
    return "\n".join([*lines, ""])


def read_margins(args: argparse.Namespace) -> list[Margins]:
    """The margins of the checkpoints named; raises Stop for one without run, data, or fitting weights."""
    margins_of = {"published": published_margins, "multiclass": multiclass_margins}[args.margin]
    device, found = open_device(args.device), []
    data_of = functools.cache(lambda run: data_of_run(run, args.data_dir, device))
    members = [member_of(path) for path in args.margins]
    for path, member in zip(args.margins, members):
        set_precision(member.settings.precision)
        net, data = load_network(path).to(device), data_of(member.run)
        name = f"{member.label}, epoch {path.stem.rpartition('_')[2]}"
        if len({other.run for other in members}) > 1:
            name = textwrap.fill(f"{member.run.name}: {name}", 80)
        logits = [logits_of(net, x) for x in (data.x_train, data.x_test)]
        if any(part.shape[1] != data.num_classes or not part.isfinite().all() for part in logits):
            raise Stop(f"{path}: the network's logits are not finite, or not of {data.num_classes} classes")
        parts = [margins_of(part, y).cpu().numpy() for part, y in zip(logits, (data.y_train, data.y_test))]
        right = (logits[1].argmax(1) == data.y_test).cpu().numpy()
        found.append(Margins(name, *parts, right, data.sha256))
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; raises Stop where it makes no sense."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, nargs="*", default=(), metavar="RUN", help="directories of runs")
    add("--out", type=Path, metavar="FILE", help="figure, .png, .pdf or .svg (default: figure.png in the first RUN)")
    add("--splits", type=int, nargs="+", metavar="EPOCH", help="only the networks converted at these epochs")
    add("--convert_to", nargs="+", metavar="NAME", help="only these conversions, such as lc (default: all there are)")
    add("--no_cnn", action="store_true", help="leave the CNN out of the figure")
    add("--overlay", action="store_true", help="runs of different settings in one row of panels")
    add("--panels", nargs="+", default=PANELS, metavar="KEY", help=f"what to plot (default: {' '.join(PANELS)})")
    add("--margin", default="published", metavar="KEY", help="what norms are relative to: published (default), "
        "multiclass, or a recorded margin, such as multiclass_margin_train_p10")  # fmt: skip
    add("--x", metavar="KEY", help="a recorded quantity in place of epochs; losses fall to the right")
    add("--own_epochs", action="store_true", help="count epochs from the split, on a logarithmic axis; of several "
        "splits, without the CNN")  # fmt: skip
    add("--log_epochs", action="store_true", help="a logarithmic axis of epochs, from 1; --reference has it anyway")
    add("--title", default="", help="what the title begins with (default: the data set)")
    add("--reference", type=Path, metavar="CSV", help="published points, such as results/published_figure.csv; for "
        "runs with the published settings")  # fmt: skip
    add("--table", type=Path, metavar="FILE", help="the table as a file, .md or .txt")
    add("--best", action="store_true", help="add each network's highest test accuracy to the table")
    add("--csv", type=Path, metavar="FILE", help="everything recorded, a row for each network and evaluation")
    add("--margins", type=Path, nargs="+", metavar="FILE.pyT", help="instead of RUN: histograms of margins")
    add_data_flags(parser)
    args = parser.parse_args(argv)
    if not args.run and not args.margins:
        raise Stop("name runs to plot, or checkpoints with --margins")
    if args.margins and (args.run or args.table or args.csv or args.reference):
        raise Stop("--margins stands alone: no runs, --table, --csv or --reference with it")
    if args.x and args.reference:
        raise Stop("--reference: the published points have epochs, so give no --x with it")
    if args.margins and args.margin not in MARGINS:
        raise Stop(f"--margin {args.margin}: with --margins, {' or '.join(MARGINS)}")
    if sum(map(bool, (args.x, args.own_epochs, args.log_epochs))) > 1:
        raise Stop("give one of --x, --own_epochs and --log_epochs: there is one x axis")
    args.log_epochs = args.log_epochs or bool(args.reference and not (args.x or args.own_epochs))
    if not args.out:
        args.out = member_of(args.margins[0]).run / "margins.png" if args.margins else args.run[0] / "figure.png"
    # Outputs have endings that no file of a run has.
    for name, endings in {"out": (".png", ".pdf", ".svg"), "table": (".md", ".txt"), "csv": (".csv",)}.items():
        if (path := getattr(args, name)) and path.suffix.lower() not in endings:
            raise Stop(f"--{name} {path}: its name has to end in {', '.join(endings)}")
    if args.csv and args.reference and args.csv.resolve() == args.reference.resolve():
        raise Stop(f"--csv {args.csv}: that file is an input; name another")
    return args


def check_keys(curves: list[Curve], args: argparse.Namespace) -> None:
    """Raise Stop if a quantity that the command line names was not recorded."""
    keys = dict.fromkeys(key for curve in curves for key, values in curve.values.items() if np.isfinite(values).any())
    keys = [key for key in keys if key != "checkpoints" and not key.endswith("_normalized")]
    known = [*keys, "norm_margin_normalized", *(f"{key}_normalized" for key in keys if key.startswith("log_"))]
    margins = [*MARGINS, *(key for key in keys if "margin" in key)]
    named = [("margin", args.margin, margins), *(("panels", key, known) for key in args.panels)]
    for flag, key, there in [*named, *([("x", args.x, known)] if args.x else [])]:
        if key not in there:
            remedy = f"to measure another quantity in finished runs: {MEASURE_AGAIN}"
            raise Stop(f"--{flag} {key} is not recorded; there are {' '.join(there)}; {remedy}")


def plot_runs(args: argparse.Namespace) -> dict[str, str | bytes]:
    """The contents of the files that the command line asks for, by flag; and of the table, which is printed."""
    curves = read_curves(args.run, args.splits, args.convert_to)
    check_keys(curves, args)
    if (args.no_cnn or args.own_epochs) and all(curve.member.is_cnn for curve in curves):
        raise Stop("--no_cnn and --own_epochs draw converted networks, and there are none")
    reference = read_reference(args.reference) if args.reference else []
    if reference and not any(curve.is_published for curve in curves):
        print("--reference: no run has the published settings, so no points are drawn", file=sys.stderr)
    groups = grouped(curves, args.margin)
    contents = {"out": render(draw(groups, args, reference), args.out.suffix)}
    if args.csv:
        contents["csv"] = tidy(curves)
    return contents | {"table": table(groups, args.margin) + ("\n" + best(groups) if args.best else "")}


@styled()
def main(argv: list[str]) -> int:
    """Plot as the command line `argv` says; returns the exit status."""
    args = parse(argv)
    if args.margins:
        margins = read_margins(args)
        contents = {"out": render(draw_margins(margins, args.margin, args.title), args.out.suffix)}
        text = accuracies(margins)
    else:
        contents = plot_runs(args)
        text = contents["table"]
    check_signals()  # an exception in matplotlib's own imports would come out as another
    for flag, content in contents.items():
        if path := getattr(args, flag):
            with writing(path, f"name another file with --{flag}"):
                write_file(path, content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
            print(f"{'figure' if flag == 'out' else flag}: {path}")
    print(text, end="")
    return COMPLETE


if __name__ == "__main__":
    finish(main, sys.argv, saves=False)
