"""Figures and tables of runs.

    python plot.py RUN                                        the published figure, as RUN/figure.png, and a summary
    python plot.py RUN RUN ... --out figure.pdf               seeds become mean and band, learning rates rows of panels
    python plot.py RUN --panels untied test_loss multiclass_margin        any recorded quantities
    python plot.py RUN --reference results/published_figure.csv           with the points of the paper's figure
    python plot.py RUN ... --table table.md --csv all.csv     the CNNs and the best eLCNs; everything recorded
    python plot.py --margins RUN/skinnyprime_150.pyT ...      histograms of the margins of checkpoints

RUN is a directory that experiments.py made. One in progress is plotted as far as it is, seeds as far as all have come.
"""

import argparse
import csv
import dataclasses
import functools
import io
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from cli import COMPLETE, Interrupt, Parser, Stop, finish
from runs import ELCN, HISTORY, Settings, label, network_directory, write_file, writing

if __name__ == "__main__":
    INTERRUPT = Interrupt()  # torch takes seconds to import; a signal in that time must not be lost

from torch import nn

from checkpoints import Damaged, load, load_history, load_weights
from convert import untie
from data import load_data
from fast import streamline
from measure import KEYS, logits_of, multiclass_margins, published_margins
from models import skinnyprime
from train import pick_device

LABELS = {
    "log_prod_norm_normalized": "log normalized $R_1$-norm", "train_acc": "train accuracy (%)",
    "test_acc": "test accuracy (%)", "norm_margin_normalized": "squared norm / margin", "margin": "published margin",
    "train_loss": "train loss", "test_loss": "test loss", "multiclass_margin": "multiclass margin",
    "multiclass_margin_train": "multiclass margin,\ntraining set", "norm": "squared norm",
    "multiclass_margin_train_min": "smallest multiclass\nmargin, training set", "log_prod_norm": "log product of norms",
    "untied": "distance from tied",
}  # fmt: skip
PANELS = ["log_prod_norm_normalized", "train_acc", "test_acc"]
REFERENCE = {"log_normalized_r1_norm": "log_prod_norm_normalized", "train_acc": "train_acc", "test_acc": "test_acc"}
NORMALIZED = ("log_prod_norm_normalized", "norm_margin_normalized")
MARGINS = {"published": ("margin", published_margins), "multiclass": ("multiclass_margin", multiclass_margins)}
STYLE = {
    "font.size": 10, "axes.titlesize": 10, "figure.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.5, "lines.linewidth": 1.2, "savefig.dpi": 300,
    "pdf.fonttype": 42, "legend.frameon": False, "legend.handlelength": 1.5, "legend.columnspacing": 1.2,
}  # fmt: skip
COLOURS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.15, 0.82, 256)))  # neither black nor yellow
RING = {"ls": "none", "marker": "o", "mfc": "white", "ms": 2.6, "mew": 0.5, "zorder": 1.5}

Network = dict[str, np.ndarray]  # a recorded quantity's key to its values, (evaluations,), float64


@dataclass(frozen=True)
class Run:
    """What one run recorded: its networks by split epoch, None for the CNN."""

    path: Path
    settings: Settings
    sha256: str
    networks: dict[int | None, Network]


@dataclass(frozen=True)
class Group:
    """Runs that are equal but for the seed: means and standard deviations (of a sample), and numbers of seeds.

    All by split epoch, None for the CNN. A network is averaged as far as it has come in all the runs that have it.
    """

    settings: Settings
    sha256: str
    mean: dict[int | None, Network]
    std: dict[int | None, Network]  # zeros for a single seed
    seeds: dict[int | None, int]

    @property
    def splits(self) -> list[int]:
        return [split for split in self.mean if split is not None]

    @property
    def best(self) -> int | None:
        """The eLCN with the highest mean test accuracy at its last evaluation; None if there is no eLCN."""
        return max(self.splits, key=lambda split: self.mean[split]["test_acc"][-1], default=None)


def read_run(path: Path, splits: list[int] | None = None) -> Run:
    """A run's histories, of the CNN and of the eLCNs in `splits` (None: all); raises Stop if it is not one."""
    settings, config = Settings.of_run(path)
    networks = {}
    for split in [None, *(s for s in settings.split_epochs if splits is None or s in splits)]:
        file = network_directory(path, split) / HISTORY
        expected = list(range(settings.epochs + 1)) if split is None else settings.elcn_evaluations
        try:
            history = load_history(file)
            evaluated = history["checkpoints"]
            if not set(KEYS) <= set(history) or evaluated != expected[: len(evaluated)]:
                raise Damaged("it is not this network's history")
            if evaluated:
                networks[split] = {key: np.array(values, np.float64) for key, values in history.items()}
        except FileNotFoundError:
            pass  # the network is still to be trained
        except (Damaged, OSError, OverflowError) as error:
            raise Stop(f"{file} is damaged ({error}); repeat the run's experiments.py command") from None
    if None not in networks:
        raise Stop(f"{path} has recorded nothing yet; start experiments.py, or wait for its first evaluation")
    return Run(path, settings, str(config.get("data_sha256")), networks)


def read_runs(paths: list[Path], splits: list[int] | None) -> list[list[Run]]:
    """Runs in groups that are equal but for the seed; raises Stop for a split or a seed that makes no sense."""
    groups: dict[tuple, list[Run]] = {}
    for path in dict.fromkeys(path.resolve() for path in paths):
        run = read_run(path, splits)
        group = groups.setdefault((dataclasses.replace(run.settings, seed=0), run.sha256), [])
        if twin := next((r for r in group if r.settings.seed == run.settings.seed), None):
            raise Stop(f"{path} and {twin.path} are the same run twice, down to the seed; name one of them")
        group.append(run)
    known = sorted({split for settings, _ in groups for split in settings.split_epochs})
    if unknown := sorted(set(splits or []) - set(known)):
        raise Stop(f"--splits {unknown[0]}: there are {' '.join(map(str, known))}")
    return list(groups.values())


def with_margin(network: Network, margin: str) -> Network:
    """The network with its normalized norms relative to that margin; NaN where the margin is not positive."""
    values = network[MARGINS[margin][0]]
    values = np.where(values > 0, values, np.nan)
    norms = network["log_prod_norm"] - np.log(values), network["norm"] / values
    return network | dict(zip(NORMALIZED, norms))


def combine(runs: list[Run], margin: str) -> Group:
    """Average runs that are equal but for the seed."""
    group = Group(dataclasses.replace(runs[0].settings, seed=0), runs[0].sha256, {}, {}, {})
    for split in [None, *runs[0].settings.split_epochs]:
        if networks := [with_margin(run.networks[split], margin) for run in runs if split in run.networks]:
            length = min(len(network["checkpoints"]) for network in networks)
            keys = [key for key in networks[0] if all(key in network for network in networks)]
            values = {key: np.array([network[key][:length] for network in networks]) for key in keys}  # (seeds, length)
            group.seeds[split] = len(networks)
            with np.errstate(invalid="ignore"):  # a norm can be infinite
                group.mean[split] = {key: v.mean(0) for key, v in values.items()}
                group.std[split] = {key: v.std(0, ddof=int(len(v) > 1)) for key, v in values.items()}
    return group


def read_reference(path: Path, splits: list[int] | None) -> dict[int | None, Network]:
    """Published points by split epoch (None: the CNN), under `epoch` on the CNN's axis and the keys of histories.

    The published norm of an eLCN at its own epoch 0 repeats that of epoch 1; it is no measurement and left out.
    """
    points: dict[int | None, list] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = ("network", "split_epoch", "epoch", *REFERENCE)
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise Stop(f"{path} lacks the columns {', '.join(missing)}")
            for row in reader:
                split = None if row["network"] == "cnn" else int(row["split_epoch"])
                values = [float(row[name]) for name in ("epoch", *REFERENCE)]
                if split is not None and values[0] == split:
                    values[1] = np.nan
                if split is None or splits is None or split in splits:
                    points.setdefault(split, []).append(values)
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise Stop(f"{path} cannot be read as a table of published points ({error})") from None
    return {split: dict(zip(("epoch", *REFERENCE.values()), np.array(p).T)) for split, p in points.items()}


def differences(groups: list[Group]) -> list[dict[str, object]]:
    """For each group the settings in which the groups differ."""
    identities = [{**dataclasses.asdict(group.settings), "data_sha256": group.sha256[:8]} for group in groups]
    names = [name for name in identities[0] if any(i[name] != identities[0][name] for i in identities)]
    return [{name: identity[name] for name in names} for identity in identities]


def draw(
    groups: list[Group], panels: list[str], margin: str = "published", title: str = "",
    reference: dict[int | None, Network] | None = None,
) -> Figure:  # fmt: skip
    """The figure: a row of panels for each group, a line for each network, over epochs on the CNN's axis."""
    reference = reference or {}
    splits = sorted({split for group in groups for split in group.splits} | set(reference) - {None})
    low, high = (max(splits[0], 0.5), max(splits[-1], 0.5)) if splits else (1, 1)  # split 0 has no logarithm
    scale = ScalarMappable(LogNorm(low, high) if low < high else LogNorm(low / 2, high * 2), COLOURS)
    colours = {None: "black"} | {split: scale.to_rgba(max(split, 0.5)) for split in splits}
    fig = Figure((1.8 * len(panels) + 0.8, 1.85 * len(groups) + 0.95), layout="constrained")
    axes = fig.subplots(len(groups), len(panels), sharex=True, sharey="col", squeeze=False)
    for row, group, settings in zip(axes, groups, differences(groups)):
        for ax, panel in zip(row, panels):
            draw_panel(ax, group, panel, colours)
            if panel in REFERENCE.values() and (panel not in NORMALIZED or margin == "published"):
                for split, points in reference.items():
                    name = f"published, {label(split)}"
                    ax.plot(points["epoch"], points[panel], color=colours[split], label=name, **RING)
        words = [f"{name} {value}" for name, value in settings.items()]
        words += [f"{group.seeds[None]} seeds"] * (group.seeds[None] > 1)
        row[0].set_title(", ".join(words), loc="left", parse_math=False)
    for ax in axes[-1]:
        ax.set(xlabel="epochs", xlim=(0, None))
    legend = [Line2D([], [], color="black", lw=1.6, label="CNN")]
    if splits:
        bar = fig.colorbar(scale, ax=axes, label="eLCN: split epoch", aspect=15 * len(groups), pad=0.04 / len(panels))
        bar.minorticks_off()
        bar.set_ticks(ticks := colour_ticks(splits, low, high), labels=[str(int(tick)) for tick in ticks])
        legend.append(Line2D([], [], color=COLOURS(0.5), label="eLCN"))
    if any(group.seeds[None] > 1 for group in groups):
        legend.append(Patch(color="grey", alpha=0.3, lw=0, label="± 1 std. dev."))
    if reference:
        legend.append(Line2D([], [], **RING, color="grey", label="published"))
    fig.legend(handles=legend, loc="outside lower center", ncols=2 if len(panels) == 1 else 4)
    add_title(fig, title or ", ".join(dict.fromkeys(group.settings.dataset for group in groups)), margin)
    return fig


def draw_panel(ax: Axes, group: Group, panel: str, colours: dict) -> None:
    """One quantity of a group's networks: a line each, and a band where there are several seeds."""
    for split, network in group.mean.items():
        epochs, mean, std = network["checkpoints"] + (split or 0), network[panel], group.std[split][panel]
        mean = np.where(np.isfinite(mean), mean, np.nan)
        style = {"lw": 1.6, "ms": 3, "zorder": 2.5} if split is None else {"ms": 5, "zorder": 2}
        ax.plot(epochs, mean, color=colours[split], label=label(split), marker=".", mew=0, **style)
        if group.seeds[split] > 1:
            ax.fill_between(epochs, mean - std, mean + std, color=colours[split], alpha=0.2, lw=0)
    if not any(np.isfinite(line.get_ydata()).any() for line in ax.lines):
        ax.text(0.5, 0.5, "undefined: no margin\nis positive", ha="center", va="center", transform=ax.transAxes)
        ax.tick_params(labelleft=False)
    ax.set_ylabel(LABELS.get(panel, panel.replace("untied_", "distance from tied,\nlayer ")))
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def colour_ticks(splits: list[int], low: float, high: float) -> list[float]:
    """The split epochs to label on a colour bar from `low` to `high`: all but those too close to the next one."""
    ticks: list[float] = []
    for split in reversed(splits):
        if not ticks or max(split, 0.5) * (high / low) ** 0.09 < ticks[-1]:
            ticks.append(max(split, 0.5))
    return ticks


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


def read_margins(
    paths: list[Path], margin: str, data_dir: Path, interrupt: Interrupt, make_cnn: Callable[[int], nn.Module]
) -> dict[str, dict[str, np.ndarray]]:
    """Checkpoints of runs as `draw_margins` takes them; raises Stop for one without run, data, or fitting weights."""
    device, cached_data, margins = pick_device("auto"), functools.lru_cache(1)(load_data), {}
    several = len({run_of(path)[0] for path in paths}) > 1
    for path in paths:
        run, split = run_of(path)
        settings, config = Settings.of_run(run)
        with interrupt.at_once():
            data = cached_data(config.get("dataset_file") or settings.dataset, data_dir, settings.data_size, device)
        if data.sha256 != config.get("data_sha256"):
            raise Stop(f"{path}: the data in {data_dir} are not those of its run; name their directory with --data_dir")
        shape, model = tuple(data.x_train.shape[1:]), make_cnn(data.num_classes)
        model = model if split is None else untie(model.net, shape)
        try:
            load_weights(model, load(path))
        except (OSError, Damaged) as error:
            raise Stop(f"{path} is no checkpoint of its run ({getattr(error, 'strerror', error)})") from None
        net = streamline(getattr(model, "net", model).to(device), shape)
        parts = {}
        for part, x, y in (("training", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
            parts[part] = MARGINS[margin][1](logits_of(net, x, interrupt.check), y).cpu().numpy()
        if not all(np.isfinite(values).all() for values in parts.values()):
            raise Stop(f"{path}: the network's logits are not finite")
        name = f"{label(split)}, epoch {path.stem.rpartition('_')[2]}"
        margins[textwrap.fill(f"{run.name}: {name}", 80) if several else name] = parts
    return margins


def run_of(checkpoint: Path) -> tuple[Path, int | None]:
    """The run that a checkpoint lies in, and its network's split epoch; raises Stop if it lies in none."""
    directory = checkpoint.absolute().parent
    if (directory / "config.json").exists():
        return directory, None
    split = directory.name.removeprefix(f"{ELCN}_")
    if not (split.isdecimal() and (directory.parent / "config.json").exists()):
        raise Stop(f"{checkpoint} lies in no run of experiments.py: there is no config.json with it")
    return directory.parent, int(split)


def table_rows(groups: list[Group], margin: str, text: bool) -> list[dict[str, object]]:
    """The CNN and the best eLCN of each group at their last evaluations.

    Results are texts "mean ± standard deviation over seeds", or numbers with the deviations in columns of their own.
    """
    rows = []
    for group, settings in zip(groups, differences(groups)):
        for split in dict.fromkeys((None, group.best)):
            row = {"cnn_lr": group.settings.cnn_lr, "lc_lr": group.settings.lc_lr} | settings
            row["network"] = "CNN" if split is None else "best eLCN (chosen on test data)"
            row["split_epoch"] = "" if split is None else split
            row |= {"epochs": int(group.mean[split]["checkpoints"][-1]), "seeds": group.seeds[split], "margin": margin}
            for key in ("test_acc", "train_acc", *NORMALIZED):
                mean, std = (float(values[split][key][-1]) for values in (group.mean, group.std))
                form = ".4g" if key == "norm_margin_normalized" else ".2f"
                row[key] = f"{mean:{form}}" + f" ± {std:{form}}" * (group.seeds[split] > 1) if text else mean
                if not text:
                    row[f"{key}_std"] = std if group.seeds[split] > 1 else ""
            rows.append(row)
    return rows


def table(groups: list[Group], margin: str, suffix: str) -> str:
    """`table_rows` as .md, .csv, or else as text."""
    rows = table_rows(groups, margin, suffix != ".csv")
    if suffix == ".csv":
        return to_csv(rows)
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    lines = [[text.ljust(width) for text, width in zip(row, widths)] for row in cells]
    lines = [f"| {' | '.join(line)} |" if suffix == ".md" else "  ".join(line).rstrip() for line in lines]
    note = "Best: highest test accuracy at the last evaluation, mean over seeds; so it was chosen on test data."
    return "\n".join([*lines, "", note, ""])


def tidy_rows(runs: list[Run]) -> list[dict[str, object]]:
    """Everything recorded, a row for each network and evaluation; `epoch` is on the CNN's axis."""
    rows = []
    for run in runs:
        settings = {name: getattr(run.settings, name) for name in ("cnn_lr", "lc_lr", "seed")}
        for split, network in run.networks.items():
            name = {"network": "cnn" if split is None else "elcn", "split_epoch": "" if split is None else split}
            for i, own in enumerate(network["checkpoints"].astype(int).tolist()):
                values = {key: float(values[i]) for key, values in network.items() if key != "checkpoints"}
                epochs = {"checkpoints": own, "epoch": own + (split or 0)}
                rows.append({"run": run.path.name} | settings | name | epochs | values)
    return rows


def to_csv(rows: list[dict[str, object]]) -> str:
    """Rows as a CSV file with all their columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def summary(group: Group, margin: str) -> str:
    """A group's result in four lines for people."""
    norm, best, cnn = NORMALIZED[0], group.best, group.mean[None]

    def final(network: Network, seeds: int, epochs: int) -> str:
        test, train, value, done = (network[key][-1] for key in ("test_acc", "train_acc", norm, "checkpoints"))
        after = f"after {done:.0f} of {epochs} epochs" + f", mean of {seeds} seeds" * (seeds > 1)
        return f"{test:.2f} % test and {train:.2f} % train accuracy, log normalized R1-norm {value:.2f}, {after}"

    first = f"CNN: {final(cnn, group.seeds[None], group.settings.epochs)} ({margin} margin)\n"
    if best is None:
        return first + "Best eLCN: none yet\nWhat untying changed: not known yet\nHow far it untied: not known yet"
    elcn = group.mean[best]
    since = [elcn[key][-1] - elcn[key][0] for key in ("test_acc", norm)]
    against = [elcn[key][-1] - cnn[key][-1] for key in ("test_acc", norm)]
    text = (
        f"{first}Best eLCN, chosen on test data: split {best}, "
        f"{final(elcn, group.seeds[best], group.settings.elcn_epochs)}\n"
        f"What untying changed: {since[0]:+.2f} points of test accuracy and {since[1]:+.2f} in the norm since the "
        f"split; {against[0]:+.2f} and {against[1]:+.2f} against the CNN's end\n"
        f"How far it untied: {100 * elcn['untied'][-1]:.3g} % of its filters' norm is not shared between positions"
    )
    return text.replace("+nan", "undefined").replace("nan", "undefined")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; raises Stop where it makes no sense."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, nargs="*", default=(), metavar="RUN", help="directories that experiments.py made")
    add("--out", type=Path, metavar="FILE", help="figure, .png, .pdf or .svg (default: figure.png in the first RUN)")
    add("--splits", type=int, nargs="+", metavar="EPOCH", help="only the eLCNs of these splits")
    add("--margin", choices=MARGINS, default="published", help="what norms are relative to (default: published)")
    add("--panels", nargs="+", default=PANELS, metavar="KEY", help=f"what to plot (default: {' '.join(PANELS)})")
    add("--title", default="", help="what the title says before the margin's name (default: the data set)")
    add("--reference", type=Path, metavar="CSV", help="published points, such as results/published_figure.csv")
    add("--table", type=Path, nargs="?", const=Path(), metavar="FILE", help=".md, .csv or .txt; no FILE: print it")
    add("--csv", type=Path, metavar="FILE", help="everything recorded, a row for each network and evaluation")
    add("--margins", type=Path, nargs="+", metavar="FILE.pyT", help="instead of RUN: histograms of margins")
    add("--data_dir", type=Path, default=Path("data"), metavar="DIR", help="where the images lie (default: data)")
    args = parser.parse_args(argv)
    if bool(args.run) == bool(args.margins) or args.margins and (args.table or args.csv):
        raise Stop("name runs to plot, or checkpoints with --margins alone")
    if not (args.out or args.table or args.csv):
        args.out = run_of(args.margins[0])[0] / "margins.png" if args.margins else args.run[0] / "figure.png"
    for name, endings in (("out", (".png", ".pdf", ".svg")), ("table", (".md", ".csv", ".txt"))):
        path = getattr(args, name)
        if path and path != Path() and path.suffix.lower() not in endings:
            raise Stop(f"--{name} {path}: its name has to end in {', '.join(endings)}")
    return args


def render(fig: Figure, suffix: str) -> bytes:
    """The figure as a file; `suffix` is .png, .pdf or .svg."""
    file = io.BytesIO()
    fig.savefig(file, format=suffix[1:].lower())
    return file.getvalue()


@matplotlib.rc_context(STYLE)
def main(argv: list[str], interrupt: Interrupt, make_cnn: Callable[[int], nn.Module] = skinnyprime) -> int:
    """Plot as the command line `argv` says; returns the exit status."""
    args, groups, contents = parse(argv), [], {}
    if args.margins:
        margins = read_margins(args.margins, args.margin, args.data_dir, interrupt, make_cnn)
        fig = draw_margins(margins, args.margin, args.title)
    else:
        recorded = read_runs(args.run, args.splits)
        groups = [combine(runs, args.margin) for runs in recorded]
        networks = [network for group in groups for network in group.mean.values()]
        keys = [key for key in networks[0] if key != "checkpoints" and all(key in network for network in networks)]
        if unknown := [panel for panel in args.panels if panel not in keys]:
            raise Stop(f"--panels {unknown[0]}: there are {' '.join(keys)}")
        if args.csv:
            contents["csv"] = args.csv, to_csv(tidy_rows([run for runs in recorded for run in runs]))
        if args.table:
            contents["table"] = args.table, table(groups, args.margin, args.table.suffix.lower())
        if args.out:
            reference = read_reference(args.reference, args.splits) if args.reference else None
            fig = draw(groups, args.panels, args.margin, args.title, reference)
    if args.out:
        contents["figure"] = args.out, render(fig, args.out.suffix)
    interrupt.check()
    for name, (path, content) in contents.items():
        if path == Path():
            print(content)
        else:
            with writing(path, "name another file"):
                write_file(path, content if name == "figure" else content.encode(errors="backslashreplace"))
            print(f"{name}: {path}")
    if args.out and len(groups) == 1:
        print(summary(groups[0], args.margin))
    return COMPLETE


if __name__ == "__main__":
    finish(main, sys.argv, INTERRUPT)
