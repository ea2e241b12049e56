"""Figures and tables of runs.

    python plot.py RUN                                        the published figure, as RUN/figure.png, and the table
    python plot.py RUN RUN ... --out figure.pdf               seeds become mean and band, learning rates rows of panels
    python plot.py RUN --panels untied test_loss multiclass_margin        any recorded quantities
    python plot.py RUN --splits 28 --no_cnn --own_epochs      what follows one split: a colour for each conversion
    python plot.py RUN --convert_to lc tied                   only the networks of these conversions, and the CNN
    python plot.py RUN --reference results/published_figure.csv           with the points of the paper's figure
    python plot.py RUN ... --table table.md --csv all.csv     the last evaluations; everything recorded
    python plot.py all.csv                                    the same figure, without the runs
    python plot.py --margins RUN/skinnyprime_150.pyT ...      histograms of the margins of checkpoints

RUN is a directory that experiments.py made, or one that holds several of these, or a file that --csv wrote. A run in
progress is plotted as far as it is, seeds as far as all have come.
"""

import argparse
import functools
import math
import re
import sys
import textwrap
from pathlib import Path

from rnorm.cli import COMPLETE, Parser, Stop, finish, writing
from rnorm.signals import check_signals, note_signals, stopping_at_once

if __name__ == "__main__":
    note_signals()  # torch and matplotlib take seconds to import; a signal in that time must not be lost

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Transform

from models import load_network
from rnorm.devices import set_precision
from rnorm.files import write_file
from rnorm.flags import add_data_flags, data_of_run, member_of, open_device
from rnorm.measure import logits_of, multiclass_margins, published_margins
from rnorm.results import (
    MARGINS, NORMALIZED, STYLE, Curve, average, differences, read_curves, read_reference, render, table, tidy,
)  # fmt: skip

LABELS = {
    "log_prod_norm_normalized": "log normalized R₁-norm", "norm_margin_normalized": "squared norm / margin",
    "train_acc": "train accuracy (%)", "test_acc": "test accuracy (%)", "margin": "published margin",
    "norm": "squared norm", "log_prod_norm": "log product of norms", "untied": "distance from tied",
}  # fmt: skip
"""Of panels; others have their key as a label."""
NAMES = {"lc": "eLCN", "tied": "tied, eLCN's steps", "cnn": "CNN at lc_lr", "fc": "eFCN"}
PANELS = ["log_prod_norm_normalized", "train_acc", "test_acc"]
BY_SPLIT = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.15, 0.82, 256)))  # neither black nor yellow
BY_CONVERSION = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f"]  # Okabe and Ito's
HALO = withStroke(linewidth=1.8, foreground="white")
RING = {"ls": "none", "marker": "o", "mfc": "white", "ms": 3.4, "mew": 0.8, "markevery": 0.07, "zorder": 4,
        "path_effects": [HALO]}  # fmt: skip
CROSS = {"ls": "none", "marker": "X", "mec": "white", "ms": 7, "mew": 0.5, "zorder": 5, "clip_on": False}
BAND = "± 1 std. dev. over seeds"
HEIGHT, LINE, LETTERS = 1.8, 0.18, 12.5  # inches: of a panel, of a line of text; letters to an inch


def styles_of(curves: list[Curve]) -> tuple[dict[tuple[str, int], dict], ScalarMappable | None]:
    """Colour and dashes of each conversion and split, and the scale of the colours if they mean splits.

    The CNN is black. The others have the colour of their split, and dashes for their conversion; if there is only one
    split, a colour for each conversion, the same in every figure for those of NAMES, and tied5 that of lc5, dashed.
    """
    found = {(curve.member.conversion, curve.member.split) for curve in curves if not curve.member.is_cnn}
    names, splits = {name for name, _ in found}, sorted({split for _, split in found})
    scale, order = None, sorted(names, key=lambda name: ([*NAMES, name].index(name), name))
    controlled = {name: re.sub(r"^tied(?=\d)", "lc", name) for name in names}
    colours = [*NAMES, *sorted({*controlled.values()} - {*NAMES})]
    if len(splits) > 1:
        scale = ScalarMappable(LogNorm(max(splits[0], 0.5), splits[-1]), BY_SPLIT)  # split 0 has no logarithm
    styles = {("", 0): {"color": "black", "ls": "-"}}
    for name, split in found:
        if scale:
            colour, dashes = scale.to_rgba(max(split, 0.5)), order.index(name)
        else:
            again, i = divmod(colours.index(controlled[name]), len(BY_CONVERSION))
            colour, dashes = BY_CONVERSION[i], 2 * again + (controlled[name] != name)
        styles[name, split] = {"color": colour, "ls": (0, (5, 2, *(1, 2) * (dashes - 1))) if dashes else "-"}
    return styles, scale


def draw(
    groups: list[list[Curve]], panels: list[str], margin: str = "published", title: str = "",
    reference: list[Curve] = (), cnn: bool = True, own_epochs: bool = False,
) -> Figure:  # fmt: skip
    """The figure: a row of panels for each group, a line for each network, rings for its points in `reference`.

    Epochs count on the CNN's axis or, with `own_epochs`, from the split, on a logarithmic axis. Without `cnn` the CNN
    is left out, as it is where `own_epochs` has no one split to count from.
    """
    styles, scale = styles_of(sum(groups, []))
    splits = sorted({split for name, split in styles if name})
    if not cnn or (own_epochs and len(splits) != 1):
        groups = [[curve for curve in group if not curve.member.is_cnn] for group in groups]
        groups = [group for group in groups if group]
    drawn = sum(groups, [])
    labels = {curve.member.label for curve in drawn}
    title = title or ", ".join(dict.fromkeys(group[0].member.settings.dataset for group in groups))
    if len(splits) == 1:
        title += f", split at epoch {splits[0]}"
    fig, axes = lay_out(groups, len(panels), f"{title}, {margin} margin")
    if own_epochs:  # of all panels, as they share their axis
        axes[0, 0].set_xscale("symlog", linthresh=1, linscale=0.4)
        axes[0, 0].xaxis.set_major_formatter("{x:g}")
    for column, panel in zip(axes.T, panels):
        comparable = margin == "published" or panel not in NORMALIZED
        points = [of for of in reference if comparable and of.member.label in labels and panel in of.mean]
        edges = []
        for ax, group in zip(column, groups):
            curves = [curve for curve in group if panel in curve.mean]
            edges += draw_lines(ax, curves, points, panel, styles, splits[0] if own_epochs else None)
        set_axes(column, panel, edges)
        column[-1].set_xlabel("epochs since the split" if own_epochs else "epochs")
    if scale:
        add_bar(axes[0, -1], splits, scale)
    add_legend(fig, axes, bool(scale), drawn)
    return fig


def lay_out(groups: list[list[Curve]], columns: int, title: str) -> tuple[Figure, np.ndarray]:
    """A figure that its panels fill, and its axes, (groups, columns); all texts lie outside, where saving finds them.

    Matplotlib's own layouts measure every text, which takes long, and let long ones squeeze the panels.
    """
    width = max(4.0, 2.7 * columns)
    title, *rows = (textwrap.fill(text, int(LETTERS * width)) for text in (title, *differences(groups)))
    above = 0.2 + LINE * max(len(text.splitlines()) for text in rows)
    height = len(rows) * (HEIGHT + above) - above
    fig = Figure((width, height))
    grid = {"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": 0.35, "hspace": above / HEIGHT}
    axes = fig.subplots(len(rows), columns, sharex=True, sharey="col", squeeze=False, gridspec_kw=grid)
    for ax, text in zip(axes[:, 0], rows):
        ax.set_title(text, loc="left")
    fig.suptitle(title, x=0, y=1 + above / height, ha="left", va="bottom")
    return fig, axes


def add_legend(fig: Figure, axes: np.ndarray, by_split: bool, curves: list[Curve]) -> None:
    """Below the panels, in at most four lines: which networks are not complete, and what lines and marks are."""
    unfinished = dict.fromkeys(curve.member.label for curve in curves if curve.epochs_done < curve.member.epochs)
    marks = {
        BAND: Patch(color="grey", alpha=0.3, lw=0), "published": Line2D([], [], color="grey", **RING),
        "diverged": Line2D([], [], color="grey", **CROSS),
    }  # fmt: skip
    shown = {of.get_label(): of for ax in axes.flat for of in [*ax.lines, *ax.collections]}
    shown |= {label: mark for label, mark in marks.items() if label in shown}
    lines = min(3, math.ceil(len(shown) / (axes.shape[1] + 2)))
    width, height = fig.get_size_inches()
    note = f"Not complete: {', '.join(unfinished)}" if unfinished else ""
    legend = fig.legend(
        shown.values(), shown.keys(), ncols=math.ceil(len(shown) / lines), loc="upper left", alignment="left",
        bbox_to_anchor=(0, -0.45 / height), title_fontsize=8,
        title=textwrap.shorten(note, int(LETTERS * width), placeholder=" ... and more"),
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
    ax: Axes, curves: list[Curve], points: list[Curve], panel: str, styles: dict, since: int | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """One quantity: a line for each network, a band for its seeds, a cross if it diverged; rings, if published.

    `since` is the split at which the CNN's epochs begin to count, if all count from it. Returns the edges of bands.
    """
    edges = []
    for curve in curves:
        member, style = curve.member, styles[curve.member.conversion, curve.member.split]
        x, values = x_of(curve, since), curve.mean[panel]
        y = np.where(np.abs(values) < 1e100, values, np.nan)  # no axis can hold more
        name = NAMES.get(member.conversion, member.conversion) or "CNN"
        marker = "" if since is None or member.is_cnn else "."
        ax.plot(x, y, label=name, gid=member.label, marker=marker, ms=4, zorder=2.5 if member.is_cnn else 2, **style)
        if curve.std:
            low, high = y - curve.std[panel], y + curve.std[panel]
            ax.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0, label=BAND)
            edges += [(x, low), (x, high)]
        if curve.diverged:
            ax.plot(x[-1:], y[-1:], label="diverged", gid=member.label, color=style["color"], **CROSS)
    for curve in points:
        colour = styles[curve.member.conversion, curve.member.split]["color"]
        x, y = x_of(curve, since), curve.mean[panel]
        ax.plot(x, y, label="published", gid=curve.member.label, color=colour, **RING)
    return edges


def x_of(curve: Curve, since: int | None) -> np.ndarray:
    """Where a curve's evaluations lie on the axis of epochs, (evaluations,)."""
    if since is None:
        return curve.own_epochs + curve.member.split
    epochs = curve.own_epochs - (since if curve.member.is_cnn else 0)
    return np.where(epochs < 0, np.nan, epochs)


def set_axes(column: np.ndarray, panel: str, edges: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """The label and the common range of the panels of one quantity, once its lines are drawn; notes within."""
    drawn = [*(line.get_data() for ax in column for line in ax.lines), *edges]
    column[0].set_ylim(range_of(list(map(finite_of, drawn)), column[0].xaxis.get_transform()))
    for ax in column:
        ax.set_ylabel(LABELS.get(panel, textwrap.fill(panel.replace("_", " "), 22)))
        if any(finite_of(line.get_data()).size for line in ax.lines):
            mark_outside(ax)
        else:
            reason = "undefined: no margin\nis positive" if panel in NORMALIZED else "no finite value"
            ax.text(0.5, 0.5, reason, ha="center", va="center", transform=ax.transAxes)


def finite_of(line: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The points (x, y) of a line that can be seen, (2, points)."""
    points = np.array(line)
    return points[:, np.isfinite(points).all(0)]


def range_of(lines: list[np.ndarray], along: Transform) -> tuple[float, float]:
    """The range of what most of each line holds, and its end; lines are (2, points), `along` the scale of their axis.

    A few first epochs, or a jump of the loss, count only where they widen the range by little.
    """
    core, whole = [], []
    for x, y in lines:
        if len(x):
            x = along.transform(x)
            even = np.interp(np.linspace(x[0], x[-1], 300), x, y)  # by length along the axis
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


def mark_outside(ax: Axes) -> None:
    """An arrow with the value where a curve is furthest above the panel, and below."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    points = [(y, x, line.get_color()) for line in ax.lines for x, y in finite_of(line.get_data()).T]
    for y, x, colour in (max(points, key=lambda point: point[0]), min(points, key=lambda point: point[0])):
        if low <= y <= high:
            continue
        arrow, edge, va = ("↑", 1, "top") if y > high else ("↓", 0, "bottom")
        text, ha = (f"{arrow}{y:.3g}", "left") if x < (left + right) / 2 else (f"{y:.3g}{arrow}", "right")
        style = {"size": 7, "color": colour, "zorder": 6, "path_effects": [HALO]}
        ax.text(x, edge, text, ha=ha, va=va, transform=ax.get_xaxis_transform(), **style)


def draw_margins(margins: dict[str, dict[str, np.ndarray]], margin: str = "published", title: str = "") -> Figure:
    """Histograms of margins: `margins` by checkpoint's name and then by `training` and `test`, (N,) each."""
    fig = Figure((6, 2.7 + LINE * len(margins)), layout="constrained")
    bins = np.histogram_bin_edges(np.concatenate([v for parts in margins.values() for v in parts.values()]), 60)
    colours = BY_SPLIT(np.linspace(0, 1, len(margins)))
    for ax, part in zip(fig.subplots(1, 2, sharex=True), ("training", "test")):
        for colour, (name, parts) in zip(colours, margins.items()):
            ax.hist(parts[part], bins, density=True, histtype="step", color=colour, lw=1.2, label=name)
        ax.axvline(0, color="black", lw=0.6, ls=":")
        ax.set(xlabel=f"{margin} margin", ylabel="density", title=f"{part} set")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center")
    fig.suptitle(f"{title or 'Margins of the examples'}, {margin} margin")
    return fig


def read_margins(paths: list[Path], margin: str, data_dir: Path, device: str) -> dict[str, dict[str, np.ndarray]]:
    """Checkpoints of runs as `draw_margins` takes them; raises Stop for one without run, data, or fitting weights."""
    margins_of = {"published": published_margins, "multiclass": multiclass_margins}[margin]
    device, margins = open_device(device), {}
    data_of = functools.cache(lambda run: data_of_run(run, data_dir, device))
    members = [member_of(path) for path in paths]
    for path, member in zip(paths, members):
        set_precision(member.settings.precision)
        net, data = load_network(path).to(device), data_of(member.run)
        name = f"{member.label}, epoch {path.stem.rpartition('_')[2]}"
        if len({member.run for member in members}) > 1:
            name = textwrap.fill(f"{member.run.name}: {name}", 80)
        margins[name] = {}
        for part, x, y in (("training", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
            logits = logits_of(net, x)
            if logits.shape[1] != data.num_classes or not logits.isfinite().all():
                raise Stop(f"{path}: the network's logits are not finite, or not of {data.num_classes} classes")
            margins[name][part] = margins_of(logits, y).cpu().numpy()
    return margins


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; raises Stop where it makes no sense."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, nargs="*", default=(), metavar="RUN", help="directories of runs, or files of --csv")
    add("--out", type=Path, metavar="FILE", help="figure, .png, .pdf or .svg (default: figure.png in the first RUN)")
    add("--splits", type=int, nargs="+", metavar="EPOCH", help="only the networks converted at these epochs")
    add("--convert_to", nargs="+", metavar="NAME", help="only these conversions, such as lc (default: all there are)")
    add("--no_cnn", action="store_true", help="leave the CNN out of the figure")
    add("--own_epochs", action="store_true", help="count epochs from the split, on a logarithmic axis; of several "
        "splits, without the CNN")  # fmt: skip
    add("--margin", choices=MARGINS, default="published", help="what norms are relative to (default: published)")
    add("--panels", nargs="+", default=PANELS, metavar="KEY", help=f"what to plot (default: {' '.join(PANELS)})")
    add("--title", default="", help="what the title says before the margin's name (default: the data set)")
    add("--reference", type=Path, metavar="CSV", help="published points, such as results/published_figure.csv")
    add("--table", type=Path, metavar="FILE", help="the table as a file, .md or .txt")
    add("--csv", type=Path, metavar="FILE", help="everything recorded, a row for each network and evaluation")
    add("--margins", type=Path, nargs="+", metavar="FILE.pyT", help="instead of RUN: histograms of margins")
    add_data_flags(parser)
    args = parser.parse_args(argv)
    if not args.run and not args.margins:
        raise Stop("name runs to plot, or checkpoints with --margins")
    if args.margins and (args.run or args.table or args.csv or args.reference):
        raise Stop("--margins stands alone: no runs, --table, --csv or --reference with it")
    if args.margins and not args.out:
        args.out = member_of(args.margins[0]).run / "margins.png"
    elif not (args.out or args.table or args.csv):
        args.out = (args.run[0].parent if args.run[0].is_file() else args.run[0]) / "figure.png"
    # Outputs have endings that no file of a run has, each its own, so that only a .csv can be an input as well.
    for name, endings in {"out": (".png", ".pdf", ".svg"), "table": (".md", ".txt"), "csv": (".csv",)}.items():
        if (path := getattr(args, name)) and path.suffix.lower() not in endings:
            raise Stop(f"--{name} {path}: its name has to end in {', '.join(endings)}")
    if args.csv and args.csv.resolve() in [path.resolve() for path in (*args.run, args.reference) if path]:
        raise Stop(f"--csv {args.csv}: that file is an input; name another")
    return args


def plot_runs(args: argparse.Namespace) -> dict[str, str | bytes]:
    """The contents of the files that the command line asks for, by flag; and of the table, if for no file."""
    curves = read_curves(args.run, args.splits, args.convert_to)
    groups = average(curves, args.margin)
    keys = list(dict.fromkeys(key for curve in curves for key in curve.mean))
    if unknown := [panel for panel in args.panels if panel not in keys[1:]]:
        raise Stop(f"--panels {unknown[0]}: there are {' '.join(keys[1:])}")
    if (args.no_cnn or args.own_epochs) and all(curve.member.is_cnn for curve in curves):
        raise Stop("--no_cnn and --own_epochs draw converted networks, and there are none")
    contents = {}
    if args.out:
        points = read_reference(args.reference) if args.reference else []
        figure = draw(groups, args.panels, args.margin, args.title, points, not args.no_cnn, args.own_epochs)
        contents["out"] = render(figure, args.out.suffix)
    if args.csv:
        contents["csv"] = tidy(curves)
    return contents | {"table": table(groups, args.margin)}


@matplotlib.rc_context(STYLE)
def main(argv: list[str]) -> int:
    """Plot as the command line `argv` says; returns the exit status."""
    args = parse(argv)
    with stopping_at_once():
        if args.margins:
            margins = read_margins(args.margins, args.margin, args.data_dir, args.device)
            contents = {"out": render(draw_margins(margins, args.margin, args.title), args.out.suffix)}
        else:
            contents = plot_runs(args)
    check_signals()
    for flag, content in contents.items():
        if path := getattr(args, flag):
            with writing(path, "name another file"):
                write_file(path, content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
            print(f"{'figure' if flag == 'out' else flag}: {path}")
    print(contents.get("table", ""), end="")
    return COMPLETE


if __name__ == "__main__":
    finish(main, sys.argv, saves=False)
