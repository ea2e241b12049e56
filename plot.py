"""Figures and tables of runs.

    python plot.py RUN                                        the published figure, as RUN/figure.png, and a summary
    python plot.py RUN RUN ... --out figure.pdf               seeds become mean and band, learning rates rows of panels
    python plot.py RUN --panels untied test_loss multiclass_margin        any recorded quantities
    python plot.py RUN --convert_to lc tied                   only the networks of these conversions, and the CNN
    python plot.py RUN --reference results/published_figure.csv           with the points of the paper's figure
    python plot.py RUN ... --table table.md --csv all.csv     the CNNs and the best eLCNs; everything recorded
    python plot.py --margins RUN/skinnyprime_150.pyT ...      histograms of the margins of checkpoints

RUN is a directory that experiments.py made, or one that holds several of these. A run in progress is plotted as far as
it is, seeds as far as all have come. The best eLCN is chosen among those that are complete.
"""

import argparse
import dataclasses
import io
import math
import sys
import textwrap
from pathlib import Path

from rnorm.cli import COMPLETE, Parser, Stop, check_signals, finish, note_signals, stopping_at_once, writing

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
from matplotlib.ticker import MaxNLocator

from models import load_network
from rnorm.devices import set_precision
from rnorm.files import write_file
from rnorm.measure import logits_of, multiclass_margins, published_margins
from rnorm.results import (
    MARGINS, NORMALIZED, REFERENCE, Group, Network, combine, differences, in_words, not_complete, read_reference,
    read_runs, summary, table, tidy_rows, to_csv,
)  # fmt: skip
from rnorm.runs import Member, converted_members, read_config

LABELS = {
    "log_prod_norm_normalized": "log normalized $R_1$-norm", "train_acc": "train accuracy (%)",
    "test_acc": "test accuracy (%)", "norm_margin_normalized": "squared norm / margin", "margin": "published margin",
    "train_loss": "train loss", "test_loss": "test loss", "multiclass_margin": "multiclass margin",
    "multiclass_margin_train": "multiclass margin,\ntraining set", "norm": "squared norm",
    "multiclass_margin_train_min": "smallest multiclass\nmargin, training set", "log_prod_norm": "log product of norms",
    "untied": "distance from tied",
}  # fmt: skip
PANELS = ["log_prod_norm_normalized", "train_acc", "test_acc"]
STYLE = {
    "font.size": 10, "axes.titlesize": 10, "figure.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.5, "lines.linewidth": 1.2, "savefig.dpi": 300,
    "pdf.fonttype": 42, "legend.frameon": False, "legend.handlelength": 2.2, "legend.columnspacing": 1.2,
    "legend.title_fontsize": 8,
}  # fmt: skip
COLOURS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.15, 0.82, 256)))  # neither black nor yellow
DASHES = ["--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3))]  # of conversions other than lc, by order
RING = {"ls": "none", "marker": "o", "mfc": "white", "ms": 2.6, "mew": 0.5, "zorder": 1.5}
CROSS = {"ls": "none", "marker": "X", "mec": "white", "ms": 7, "mew": 0.5, "zorder": 3}
NAMED_IN_FIGURE = 4  # so many unfinished networks; the summary names all
ENDINGS = {"out": (".png", ".pdf", ".svg"), "table": (".md", ".csv", ".txt"), "csv": (".csv",)}
PRINT = Path("-")  # in place of a file: print the table


class Look:
    """How networks are drawn: the CNN in black, others in the colour of their split and the dashes of their conversion.

    `splits` and `conversions` are those that a legend has to explain.
    """

    def __init__(self, members: list[Member]):
        converted = [member for member in members if not member.is_cnn]
        self.splits = sorted({member.split for member in converted})
        self.conversions = list(dict.fromkeys(member.conversion for member in converted))
        low, high = 1, 1
        if self.splits:
            low, high = max(self.splits[0], 0.5), max(self.splits[-1], 0.5)  # split 0 has no logarithm
        if low == high:
            low, high = low / 2, high * 2
        self.scale = ScalarMappable(LogNorm(low, high), COLOURS)

    def colour(self, member: Member) -> str | tuple[float, ...]:
        return "black" if member.is_cnn else self.scale.to_rgba(max(member.split, 0.5))

    def dashes(self, conversion: str) -> str | tuple:
        others = [name for name in self.conversions if name != "lc"]
        return DASHES[others.index(conversion) % len(DASHES)] if conversion in others else "-"

    def line(self, member: Member) -> dict[str, object]:
        style = {"color": self.colour(member), "ls": self.dashes(member.conversion), "marker": ".", "mew": 0}
        if member.is_cnn:
            return style | {"lw": 1.6, "ms": 3, "zorder": 2.5}
        if member.conversion == "lc":
            return style | {"ms": 5, "zorder": 2}
        return style | {"ms": 5, "zorder": 2.2, "markevery": [-1]}  # more marks would hide the dashes


def draw(
    groups: list[Group], panels: list[str], margin: str = "published", title: str = "",
    reference: dict[Member, Network] | None = None, cnn: bool = True,
) -> Figure:  # fmt: skip
    """The figure: a row of panels for each group, a line for each network, over epochs on the CNN's axis.

    Without `cnn`, the CNN is left out.
    """
    reference = reference or {}
    if not cnn:
        groups = [dataclasses.replace(group, mean=without_cnn(group.mean)) for group in groups]
        reference = without_cnn(reference)
    look = Look([*(member for group in groups for member in group.mean), *reference])
    fig = Figure((1.8 * len(panels) + 0.8, 1.85 * len(groups) + 0.75), layout="constrained")
    axes = fig.subplots(len(groups), len(panels), sharex=True, sharey="col", squeeze=False)
    for row, group, difference in zip(axes, groups, differences(groups)):
        for ax, panel in zip(row, panels):
            draw_panel(ax, group, panel, look)
            if panel in REFERENCE.values() and (panel not in NORMALIZED or margin == "published"):
                draw_reference(ax, reference, panel, look)
        words = [in_words(difference)] if difference else []
        if group.seeds[group.cnn] > 1:
            words.append(f"{group.seeds[group.cnn]} seeds")
        row[0].set_title(", ".join(words), loc="left", parse_math=False)
    for ax in axes[-1]:
        ax.set(xlabel="epochs", xlim=(0 if cnn else None, None))
    if look.splits:
        bar = fig.colorbar(look.scale, ax=axes, label="split epoch", aspect=15 * len(groups), pad=0.04 / len(panels))
        bar.minorticks_off()
        ticks = colour_ticks(look)
        bar.set_ticks(ticks, labels=[str(int(tick)) for tick in ticks])
    add_legend(fig, groups, look, bool(reference))
    add_title(fig, title or ", ".join(dict.fromkeys(group.settings.dataset for group in groups)), margin)
    return fig


def without_cnn(networks: dict[Member, Network]) -> dict[Member, Network]:
    return {member: network for member, network in networks.items() if not member.is_cnn}


def draw_panel(ax: Axes, group: Group, panel: str, look: Look) -> None:
    """One quantity of a group's networks: a line each, a band where there are several seeds, a cross if it diverged."""
    for member, network in group.mean.items():
        epochs = network["checkpoints"] + member.split
        mean, std = drawable(network[panel]), drawable(group.std[member][panel])
        ax.plot(epochs, mean, label=member.label, **look.line(member))
        if group.seeds[member] > 1:
            ax.fill_between(epochs, mean - std, mean + std, color=look.colour(member), alpha=0.2, lw=0)
        if member in group.diverged:
            end = f"{member.label}, diverged"
            ax.plot(epochs[-1:], mean[-1:], label=end, color=look.colour(member), **CROSS)
    if not any(np.isfinite(line.get_ydata()).any() for line in ax.lines):
        reason = "undefined: no margin\nis positive" if panel in NORMALIZED else "no finite value"
        ax.text(0.5, 0.5, reason, ha="center", va="center", transform=ax.transAxes)
        ax.tick_params(labelleft=False)
    ax.set_ylabel(LABELS.get(panel, panel.replace("untied_", "distance from tied,\nlayer ")))
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def drawable(values: np.ndarray) -> np.ndarray:
    """NaN in place of what no axis can hold; a network about to diverge has such norms."""
    return np.where(np.abs(values) < 1e100, values, np.nan)


def draw_reference(ax: Axes, reference: dict[Member, Network], panel: str, look: Look) -> None:
    for member, points in reference.items():
        label = f"published, {member.label}"
        ax.plot(points["epoch"], points[panel], color=look.colour(member), label=label, **RING)


def colour_ticks(look: Look) -> list[float]:
    """The split epochs to label on the colour bar: all but those too close to the next one."""
    low, high = look.scale.get_clim()
    ticks: list[float] = []
    for split in reversed(look.splits):
        if not ticks or max(split, 0.5) * (high / low) ** 0.09 < ticks[-1]:
            ticks.append(max(split, 0.5))
    return ticks


def add_legend(fig: Figure, groups: list[Group], look: Look, reference: bool) -> None:
    """What lines and marks are, and above that which networks are not complete; the figure grows to hold it."""
    handles = []
    if any(group.cnn in group.mean for group in groups):
        handles.append(Line2D([], [], color="black", lw=1.6, label="CNN"))
    for conversion in look.conversions:
        label = "eLCN" if conversion == "lc" else f"converted to {conversion}"
        handles.append(Line2D([], [], color=COLOURS(0.5), ls=look.dashes(conversion), label=label))
    if any(group.seeds[group.cnn] > 1 for group in groups):
        handles.append(Patch(color="grey", alpha=0.3, lw=0, label="± 1 std. dev."))
    if reference:
        handles.append(Line2D([], [], **RING, color="grey", label="published"))
    if any(group.diverged for group in groups):
        handles.append(Line2D([], [], **CROSS, color="grey", label="diverged"))
    width, height = fig.get_size_inches()
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, int(width / (0.6 + 0.07 * longest)))  # inches
    unfinished, note = not_complete(groups), []
    if unfinished:
        more = len(unfinished) - NAMED_IN_FIGURE
        named = "; ".join(unfinished[:NAMED_IN_FIGURE])
        note = textwrap.wrap(f"Not complete: {named}{f'; {more} more' if more > 0 else ''}", int(13 * width))
    legend = fig.legend(handles=handles, loc="outside lower center", ncols=columns, title="\n".join(note))
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)
    fig.set_figheight(height + 0.22 * math.ceil(len(handles) / columns) + 0.14 * len(note))


def add_title(fig: Figure, title: str, margin: str) -> None:
    """`title`, which need not be valid mathtext, and the margin, in as many lines as the figure's width asks for."""
    text = textwrap.fill(f"{title}, {margin} margin", int(11 * fig.get_figwidth()))
    fig.suptitle(text, parse_math=False)


def draw_margins(margins: dict[str, dict[str, np.ndarray]], margin: str = "published", title: str = "") -> Figure:
    """Histograms of margins: `margins` by checkpoint's name and then by `training` and `test`, (N,) each."""
    fig = Figure((6, 2.7 + 0.2 * len(margins)), layout="constrained")
    values = np.concatenate([v for parts in margins.values() for v in parts.values()])
    bins = np.histogram_bin_edges(values, 60)
    for ax, part in zip(fig.subplots(1, 2, sharex=True), ("training", "test")):
        for i, (name, parts) in enumerate(margins.items()):
            colour = COLOURS(i / max(1, len(margins) - 1))
            ax.hist(parts[part], bins, density=True, histtype="step", color=colour, lw=1.2, label=name)
        ax.axvline(0, color="black", lw=0.6, ls=":")
        ax.set(xlabel=f"{margin} margin", ylabel="density", title=f"{part} set")
        ax.xaxis.set_major_locator(MaxNLocator(5))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center")
    add_title(fig, title or "Margins of the examples", margin)
    return fig


def read_margins(paths: list[Path], margin: str, data_dir: Path, device: str) -> dict[str, dict[str, np.ndarray]]:
    """Checkpoints of runs as `draw_margins` takes them; raises Stop for one without run, data, or fitting weights."""
    from convert import data_of_run, open_device  # only here: a figure of runs needs neither training nor images

    margins_of = {"published": published_margins, "multiclass": multiclass_margins}[margin]
    device, margins, loaded = open_device(device), {}, {}
    several = len({member_of(path)[0] for path in paths}) > 1
    for path in paths:
        run, member = member_of(path)
        set_precision(member.settings.precision)
        net = load_network(path).to(device)
        _, config = read_config(run)
        identity = config.get("data_sha256"), member.settings.data_size, member.settings.precision
        if identity not in loaded:  # only the last data are kept
            loaded = {identity: data_of_run(run, data_dir, device)}
        data, parts = loaded[identity], {}
        for part, x, y in (("training", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
            logits = logits_of(net, x)
            if not (logits.shape[1] == data.num_classes and logits.isfinite().all()):
                raise Stop(f"{path}: the network's logits are not finite, or not of {data.num_classes} classes")
            parts[part] = margins_of(logits, y).cpu().numpy()
        name = f"{member.label}, epoch {path.stem.rpartition('_')[2]}"
        margins[textwrap.fill(f"{run.name}: {name}", 80) if several else name] = parts
    return margins


def member_of(checkpoint: Path) -> tuple[Path, Member]:
    """The run that a checkpoint lies in, and the network it is of; raises Stop if it lies in none or is no file."""
    if not checkpoint.is_file():
        raise Stop(f"{checkpoint} is no file")
    directory = checkpoint.resolve().parent
    for run in (directory, directory.parent):
        if (run / "config.json").exists():
            settings, _ = read_config(run)
            for member in (Member(settings), *converted_members(run, settings)):
                if member.directory(run) == directory:
                    return run, member
    raise Stop(f"{checkpoint} lies in no network's directory of a run of experiments.py")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; raises Stop where it makes no sense."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, nargs="*", default=(), metavar="RUN", help="directories of runs, or of several runs each")
    add("--out", type=Path, metavar="FILE", help="figure, .png, .pdf or .svg (default: figure.png in the first RUN)")
    add("--splits", type=int, nargs="+", metavar="EPOCH", help="only the networks converted at these epochs")
    add("--convert_to", nargs="+", metavar="NAME", help="only these conversions, such as lc (default: all there are)")
    add("--no_cnn", action="store_true", help="leave the CNN out of the figure, whose range hides small differences")
    add("--margin", choices=MARGINS, default="published", help="what norms are relative to (default: published)")
    add("--panels", nargs="+", default=PANELS, metavar="KEY", help=f"what to plot (default: {' '.join(PANELS)})")
    add("--title", default="", help="what the title says before the margin's name (default: the data set)")
    add("--reference", type=Path, metavar="CSV", help="published points, such as results/published_figure.csv")
    add("--table", type=Path, nargs="?", const=PRINT, metavar="FILE", help=".md, .csv or .txt; no FILE: print it")
    add("--csv", type=Path, metavar="FILE", help="everything recorded, a row for each network and evaluation")
    add("--margins", type=Path, nargs="+", metavar="FILE.pyT", help="instead of RUN: histograms of margins")
    add("--data_dir", type=Path, default=Path("data"), metavar="DIR", help="where the images for --margins lie "
        "(default: data)")  # fmt: skip
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="of --margins (default: auto)")
    args = parser.parse_args(argv)
    if not args.run and not args.margins:
        raise Stop("name runs to plot, or checkpoints with --margins")
    if args.margins and (args.run or args.table or args.csv or args.reference):
        raise Stop("--margins stands alone: no runs, --table, --csv or --reference with it")
    if not (args.out or args.table or args.csv):
        args.out = member_of(args.margins[0])[0] / "margins.png" if args.margins else args.run[0] / "figure.png"
    check_outputs(args)
    return args


def check_outputs(args: argparse.Namespace) -> None:
    """Raise Stop unless outputs have endings of their own, which no file of a run has, and overwrite nothing else."""
    taken = {}
    if args.reference:
        taken[args.reference.resolve()] = "reference"
    for name, endings in ENDINGS.items():
        path = getattr(args, name)
        if path is None or path == PRINT:
            continue
        if path.suffix.lower() not in endings:
            raise Stop(f"--{name} {path}: its name has to end in {', '.join(endings)}")
        other = taken.setdefault(path.resolve(), name)
        if other != name:
            raise Stop(f"--{name} {path}: that file is --{other}; name another")


def render(fig: Figure, suffix: str) -> bytes:
    """The figure as a file; `suffix` is .png, .pdf or .svg."""
    file = io.BytesIO()
    fig.savefig(file, format=suffix[1:].lower())
    return file.getvalue()


def plot_runs(args: argparse.Namespace) -> tuple[dict[str, str | bytes], str]:
    """The contents of the files that the command line asks for, by flag, and the summary to print."""
    recorded = read_runs(args.run, args.splits, args.convert_to)
    groups = [combine(runs, args.margin) for runs in recorded]
    networks = [network for group in groups for network in group.mean.values()]
    keys = [key for key in networks[0] if key != "checkpoints" and all(key in network for network in networks)]
    if unknown := [panel for panel in args.panels if panel not in keys]:
        raise Stop(f"--panels {unknown[0]}: there are {' '.join(keys)}")
    if args.no_cnn and not any(without_cnn(group.mean) for group in groups):
        raise Stop("--no_cnn: no network but the CNN is left to draw")
    contents = {}
    if args.csv:
        contents["csv"] = to_csv(tidy_rows([run for runs in recorded for run in runs]))
    if args.table:
        contents["table"] = table(groups, args.margin, args.table.suffix.lower())
    if args.out:
        reference = read_reference(args.reference, args.splits) if args.reference else None
        fig = draw(groups, args.panels, args.margin, args.title, reference, not args.no_cnn)
        contents["out"] = render(fig, args.out.suffix)
        if len(groups) == 1:
            return contents, summary(groups[0], args.margin)
    return contents, ""


@matplotlib.rc_context(STYLE)
def main(argv: list[str]) -> int:
    """Plot as the command line `argv` says; returns the exit status."""
    args, text = parse(argv), ""
    with stopping_at_once():
        if args.margins:
            margins = read_margins(args.margins, args.margin, args.data_dir, args.device)
            contents = {"out": render(draw_margins(margins, args.margin, args.title), args.out.suffix)}
        else:
            contents, text = plot_runs(args)
    check_signals()
    for flag, content in contents.items():
        path = getattr(args, flag)
        if path == PRINT:
            print(content)
            continue
        if isinstance(content, str):
            content = content.encode(errors="backslashreplace")
        with writing(path, "name another file"):
            write_file(path, content)
        print(f"{'figure' if flag == 'out' else flag}: {path}")
    if text:
        print(text)
    return COMPLETE


if __name__ == "__main__":
    finish(main, sys.argv, saves=False)
