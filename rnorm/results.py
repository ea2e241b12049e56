"""What runs recorded: read back, averaged over seeds, as tables; and the points of the published figure.

Nothing here draws, trains or reads images.
"""

import csv
import dataclasses
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rnorm.checkpoints import load_history
from rnorm.files import Damaged, RnormError
from rnorm.runs import Member, Settings, converted_members, diverged_at, read_config

NORMALIZED = ("log_prod_norm_normalized", "norm_margin_normalized")  # what a table shows, with both accuracies
MARGINS = {"published": "margin", "multiclass": "multiclass_margin"}  # what the normalized norms can be relative to
REFERENCE = {"log_normalized_r1_norm": "log_prod_norm_normalized", "train_acc": "train_acc", "test_acc": "test_acc"}
"""Columns of a file of published points, and the keys of histories that they correspond to."""
PUBLISHED = Settings(n_splits=10)  # the run of the published figure
LARGEST = 1e6  # of a published point; nothing in the figure comes near it

Network = dict[str, np.ndarray]  # a recorded quantity's key to its values, (evaluations,), float64


@dataclass(frozen=True)
class Run:
    """What one run recorded. Members are those of seed 0, whatever the run's own: the same in all runs of a group."""

    path: Path
    settings: Settings
    sha256: str
    networks: dict[Member, Network]
    diverged: dict[Member, int]  # the epoch in which it diverged


@dataclass(frozen=True)
class Group:
    """Runs that are equal but for the seed: means and standard deviations (of a sample), and numbers of seeds.

    A network is averaged over the runs that have it, as far as it has come in all of these.
    """

    settings: Settings  # with seed 0
    sha256: str
    mean: dict[Member, Network]
    std: dict[Member, Network]  # zeros for a single seed
    seeds: dict[Member, int]
    diverged: dict[Member, dict[int, int]]  # seed to the epoch in which the network diverged

    @property
    def cnn(self) -> Member:
        return Member(self.settings)

    @property
    def elcns(self) -> list[Member]:
        return [member for member in self.mean if member.conversion == "lc"]

    @property
    def best(self) -> Member | None:
        """The eLCN with the highest mean test accuracy at its end, of those that are complete; None if none is."""
        complete = [member for member in self.elcns if self.is_complete(member)]
        return max(complete, key=lambda member: self.mean[member]["test_acc"][-1], default=None)

    @property
    def shown(self) -> Member | None:
        """The best eLCN; where none is complete, the one in progress that has come furthest; None without any."""
        in_progress = [member for member in self.elcns if member not in self.diverged]
        return self.best or max(in_progress, key=self.epochs_done, default=None)

    def epochs_done(self, member: Member) -> int:
        return int(self.mean[member]["checkpoints"][-1])

    def is_complete(self, member: Member) -> bool:
        """Whether all evaluations are there, of every seed that has the network."""
        return self.epochs_done(member) == member.epochs

    def state(self, member: Member) -> str:
        """`complete`, or how far the network has come: `52 of 150 epochs`, and where it diverged."""
        if self.is_complete(member):
            return "complete"
        state = f"{self.epochs_done(member)} of {member.epochs} epochs"
        for seed, epoch in self.diverged.get(member, {}).items():
            who = f"seed {seed} " if self.seeds[member] > 1 else ""
            state += f", {who}diverged in epoch {epoch}"
        return state


def find_runs(paths: list[Path]) -> list[Path]:
    """The runs that `paths` name: each a run's directory, or one that holds runs; none twice."""
    runs = []
    for path in paths:
        inside = sorted(config.parent for config in path.glob("*/config.json"))
        if (path / "config.json").exists() or not inside:
            runs.append(path)
        else:
            runs += inside
    return list(dict.fromkeys(run.resolve() for run in runs))


def read_run(path: Path, splits: list[int] | None = None, conversions: list[str] | None = None) -> Run:
    """A run's histories: the CNN's, and those of networks converted at `splits` by `conversions` (None: all).

    Raises RnormError if it is no run, if a history is damaged or if there is none yet.
    """
    settings, config = read_config(path)
    cnn = Member(dataclasses.replace(settings, seed=0))
    members = [cnn]
    for member in converted_members(path, cnn.settings):
        if (splits is None or member.split in splits) and (conversions is None or member.conversion in conversions):
            members.append(member)
    networks, diverged = {}, {}
    for member in members:
        network = read_history(path, member)
        if network is None:
            continue
        networks[member] = network
        epoch = diverged_at(path, member)
        if epoch is not None and network["checkpoints"][-1] < member.epochs:
            diverged[member] = epoch
    if cnn not in networks:
        raise RnormError(f"{path} has recorded nothing yet; start experiments.py, or wait for its first evaluation")
    return Run(path, settings, str(config.get("data_sha256")), networks, diverged)


def read_history(run: Path, member: Member) -> Network | None:
    """The recorded values of one network; None if there are none yet."""
    path = member.history(run)
    try:
        history = load_history(path, member)
        if not history["checkpoints"]:
            return None
        return {key: np.array(values, np.float64) for key, values in history.items()}
    except FileNotFoundError:
        return None
    except (Damaged, OverflowError) as error:
        raise RnormError(f"{path} is damaged ({error}); repeat the run's experiments.py command") from None


def read_runs(
    paths: list[Path], splits: list[int] | None = None, conversions: list[str] | None = None
) -> list[list[Run]]:
    """The runs that `paths` name, in groups that are equal but for the seed.

    Raises RnormError where `read_run` does, for a split or a conversion that no run has, and for two equal runs.
    """
    groups: dict[tuple, list[Run]] = {}
    known_splits, known_conversions = set(), {"lc"}
    for path in find_runs(paths):
        run = read_run(path, splits, conversions)
        known_splits.update(run.settings.split_epochs)
        known_conversions.update(member.conversion for member in converted_members(path, run.settings))
        group = groups.setdefault((dataclasses.replace(run.settings, seed=0), run.sha256), [])
        for other in group:
            if other.settings.seed == run.settings.seed:
                raise RnormError(f"{path} and {other.path} are the same run twice, down to the seed; name one of them")
        group.append(run)
    for name, asked, known in (("split", splits, known_splits), ("conversion", conversions, known_conversions)):
        if unknown := sorted(set(asked or []) - known):
            raise RnormError(f"there is no {name} {unknown[0]}, but {' '.join(map(str, sorted(known)))}")
    return list(groups.values())


def combine(runs: list[Run], margin: str) -> Group:
    """Average runs that are equal but for the seed, with norms relative to `margin`, one of MARGINS."""
    group = Group(dataclasses.replace(runs[0].settings, seed=0), runs[0].sha256, {}, {}, {}, {})
    members = {member for run in runs for member in run.networks}
    for member in sorted(members, key=lambda m: (not m.is_cnn, m.conversion != "lc", m.conversion, m.split)):
        networks = [with_margin(run.networks[member], margin) for run in runs if member in run.networks]
        length = min(len(network["checkpoints"]) for network in networks)
        keys = [key for key in networks[0] if all(key in network for network in networks)]
        group.seeds[member], group.mean[member], group.std[member] = len(networks), {}, {}
        for key in keys:
            values = np.array([network[key][:length] for network in networks])  # (seeds, evaluations)
            group.mean[member][key], group.std[member][key] = mean_and_deviation(values)
        if diverged := {run.settings.seed: run.diverged[member] for run in runs if member in run.diverged}:
            group.diverged[member] = diverged
    return group


def with_margin(network: Network, margin: str) -> Network:
    """The network with its normalized norms relative to that margin; NaN where the margin is not positive."""
    values = network[MARGINS[margin]]
    values = np.where(values > 0, values, np.nan)
    with np.errstate(over="ignore"):
        norms = network["log_prod_norm"] - np.log(values), network["norm"] / values
    return network | dict(zip(NORMALIZED, norms))


def mean_and_deviation(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation of (seeds, evaluations) over seeds; a deviation of 0 for a single seed."""
    if len(values) == 1:
        return values[0], np.zeros_like(values[0])
    with np.errstate(invalid="ignore", over="ignore"):  # a norm can be infinite
        return values.mean(0), values.std(0, ddof=1)


def read_reference(path: Path, splits: list[int] | None = None) -> dict[Member, Network]:
    """Published points by network, the CNN and the eLCNs of `splits` (None: all), under the keys of histories.

    They are at `epoch` on the CNN's axis. The published norm of an eLCN at its own epoch 0 repeats that of epoch 1; it
    is no measurement and left out. Raises RnormError if the file is no table of points.
    """
    points: dict[Member, list] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel begins its files with a byte order mark
            reader = csv.DictReader(file)
            missing = {"network", "split_epoch", "epoch", *REFERENCE} - set(reader.fieldnames or ())
            if missing:
                raise RnormError(f"{path} lacks the columns {', '.join(sorted(missing))}")
            for row in reader:
                member, values = read_point(row)
                if member.is_cnn or splits is None or member.split in splits:
                    points.setdefault(member, []).append(values)
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise RnormError(f"{path} cannot be read as a table of published points ({error})") from None
    if not points:
        raise RnormError(f"{path} holds no published points of these networks")
    return {member: dict(zip(("epoch", *REFERENCE.values()), np.array(p).T)) for member, p in points.items()}


def read_point(row: dict[str, str]) -> tuple[Member, list[float]]:
    """The network of one published point, and its epoch and values; raises ValueError for what cannot be one."""
    name = row["network"].strip().lower()
    if name == "cnn":
        member = Member(PUBLISHED)
    elif name == "elcn":
        member = Member(PUBLISHED, "lc", int(row["split_epoch"]))
    else:
        raise ValueError(f"network {row['network']!r} is neither cnn nor elcn")
    epoch, *values = (float(row[name]) for name in ("epoch", *REFERENCE))
    if not (0 <= member.split <= epoch <= LARGEST and all(abs(v) <= LARGEST or math.isnan(v) for v in values)):
        raise ValueError(f"no point of the figure: {', '.join(map(str, row.values()))}")
    if not member.is_cnn and epoch == member.split:
        values[0] = math.nan
    return member, [epoch, *values]


def differences(groups: list[Group]) -> list[dict[str, object]]:
    """For each group the settings in which the groups differ."""
    identities = [{**dataclasses.asdict(group.settings), "data_sha256": group.sha256[:8]} for group in groups]
    names = [name for name in identities[0] if any(i[name] != identities[0][name] for i in identities)]
    return [{name: identity[name] for name in names} for identity in identities]


def in_words(settings: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def not_complete(groups: list[Group]) -> list[str]:
    """Every network that is not complete, those that diverged first: `eLCN from 9 (52 of 150 epochs)`."""
    texts = []
    for group, difference in zip(groups, differences(groups)):
        for member in sorted(group.mean, key=lambda member: member not in group.diverged):
            if not group.is_complete(member):
                name = f"{member.label}, {in_words(difference)}" if difference else member.label
                texts.append(f"{name} ({group.state(member)})")
    return texts


def number(value: float, form: str) -> str:
    """A result as text; a norm is undefined where the margin is not positive."""
    return "undefined" if math.isnan(value) else f"{value:{form}}"


def tabulated(group: Group) -> list[Member]:
    """The CNN, the best eLCN with the other conversions of its split, and then all others with their split's eLCN."""
    splits = [group.shown.split] if group.shown else []
    splits += sorted(member.split for member in group.mean if not member.is_cnn and member.conversion != "lc")
    members = [group.cnn]
    for split in dict.fromkeys(splits):
        members += [member for member in group.mean if member.split == split and not member.is_cnn]
    return members


def table_rows(groups: list[Group], margin: str) -> list[dict[str, object]]:
    """The networks of `tabulated` at their last evaluations; deviations over seeds are in columns of their own."""
    rows = []
    for group, difference in zip(groups, differences(groups)):
        for member in tabulated(group):
            row = {"cnn_lr": group.settings.cnn_lr, "lc_lr": group.settings.lc_lr} | difference
            row |= {"network": table_name(group, member), "split_epoch": "" if member.is_cnn else member.split}
            row |= {"epochs": group.epochs_done(member), "state": group.state(member)}
            row |= {"seeds": group.seeds[member], "margin": margin}
            for key in ("test_acc", "train_acc", *NORMALIZED):
                row[key] = float(group.mean[member][key][-1])
                row[f"{key}_std"] = float(group.std[member][key][-1]) if group.seeds[member] > 1 else ""
            rows.append(row)
    return rows


def table_name(group: Group, member: Member) -> str:
    names = {"": "CNN", "lc": "eLCN"}
    if member == group.shown:
        names["lc"] = "best eLCN (chosen on test data)" if group.best else "furthest eLCN (none is complete)"
    return names.get(member.conversion, member.conversion)


def table(groups: list[Group], margin: str, suffix: str) -> str:
    """`table_rows` as .md, .csv, or else as text, in which a mean and its deviation share a column."""
    rows = table_rows(groups, margin)
    if suffix == ".csv":
        return to_csv(rows)
    for row in rows:
        for key in ("test_acc", "train_acc", *NORMALIZED):
            form = ".4g" if key == "norm_margin_normalized" else ".2f"
            std = row.pop(f"{key}_std")
            row[key] = number(row[key], form)
            if std != "":
                row[key] += f" ± {number(std, form)}"
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for row in cells:
        padded = [text.ljust(width) for text, width in zip(row, widths)]
        lines.append(f"| {' | '.join(padded)} |" if suffix == ".md" else "  ".join(padded).rstrip())
    lines += ["", "Best: highest test accuracy at the end, mean over seeds, of complete eLCNs; so chosen on test data."]
    if unfinished := not_complete(groups):
        lines += ["", f"Not complete: {'; '.join(unfinished)}."]
    return "\n".join([*lines, ""])


def tidy_rows(runs: list[Run]) -> list[dict[str, object]]:
    """Everything recorded, a row for each network and evaluation; `epoch` is on the CNN's axis.

    The CNN alone has no split_epoch; the network `cnn` with one is the control of that name.
    """
    rows = []
    for run in runs:
        settings = {name: getattr(run.settings, name) for name in ("cnn_lr", "lc_lr", "seed")}
        for member, network in run.networks.items():
            name = {"": "cnn", "lc": "elcn"}.get(member.conversion, member.conversion)
            names = {"network": name, "split_epoch": "" if member.is_cnn else member.split}
            for i, own in enumerate(network["checkpoints"].astype(int).tolist()):
                values = {key: float(values[i]) for key, values in network.items() if key != "checkpoints"}
                epochs = {"checkpoints": own, "epoch": own + member.split}
                rows.append({"run": run.path.name} | settings | names | epochs | values)
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
    """A group's result in a few lines for people."""
    norm, cnn, shown = NORMALIZED[0], group.mean[group.cnn], group.shown
    lines = [f"CNN: {end_of(group, group.cnn)} ({margin} margin)"]
    if not shown:
        lines.append("Best eLCN: none is complete")
    else:
        best = "Best eLCN, chosen on test data" if group.best else "No eLCN is complete; the furthest"
        lines.append(f"{best}: split {shown.split}, {end_of(group, shown)}")
        elcn = group.mean[shown]
        since, against = [], []
        for key in ("test_acc", norm):
            end = float(elcn[key][-1])
            since.append(number(end - float(elcn[key][0]), "+.2f"))
            against.append(number(end - float(cnn[key][-1]), "+.2f"))
        cnn_end = "the CNN's end" if group.is_complete(group.cnn) else "the CNN so far"
        lines.append(f"What untying changed: {since[0]} points of test accuracy and {since[1]} in the norm since the "
                     f"split; {against[0]} and {against[1]} against {cnn_end}")  # fmt: skip
        untied = 100 * elcn["untied"][-1]
        lines.append(f"How far it untied: {untied:.3g} % of its filters' norm is not shared between positions")
    for member in tabulated(group)[1:]:
        if member != shown:
            lines.append(f"{member.label}: {end_of(group, member)}")
    if unfinished := not_complete([group]):
        lines.append(f"Not complete: {'; '.join(unfinished)}")
    return "\n".join(lines)


def end_of(group: Group, member: Member) -> str:
    """The last evaluation of a network, in words."""
    test, train, norm = (group.mean[member][key][-1] for key in ("test_acc", "train_acc", NORMALIZED[0]))
    words = f"{test:.2f} % test and {train:.2f} % train accuracy, log normalized R1-norm {number(norm, '.2f')}, "
    words += f"after {group.epochs_done(member)} of {member.epochs} epochs"
    if group.seeds[member] > 1:
        words += f", mean of {group.seeds[member]} seeds"
    return words
