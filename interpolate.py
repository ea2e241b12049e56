"""What lies between two solutions: losses, accuracies and norms along a path from one checkpoint to another.

    python interpolate.py RUN/skinnyprime_9.pyT RUN/skinnyprime_lc_version_9/skinnyprime_lc_version_150.pyT

Both are of the same network and data; the simpler is lifted to the other's form (CNN, eLCN, eFCN). Paths: linear, in
the weights; curvilinear, with each tensor rescaled to a norm between its ends'; average, of the outputs; string, of
points that are trained at lc_lr and drawn to their neighbours. Source: arXiv:1906.06766.
"""

import copy
import math
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from rnorm.cli import COMPLETE, Parser, Stop, finish, writing
from rnorm.signals import check_signals, note_signals

if __name__ == "__main__":
    note_signals()  # torch takes seconds to import; a signal in that time must not be lost

from rnorm.figures import render, styled  # before matplotlib, as it decides how that is loaded

# isort: split
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from models import load_network
from rnorm.conversions import lift
from rnorm.data import Data
from rnorm.devices import set_precision
from rnorm.fast import streamline
from rnorm.files import write_file
from rnorm.flags import add_data_flags, data_of_run, member_of, open_device
from rnorm.measure import evaluate
from rnorm.results import csv_rows, to_csv
from rnorm.runs import Member, Settings, read_config
from rnorm.store import save
from train import SGD, epoch_order, sgd_step


@torch.no_grad()
def between(a: nn.Sequential, b: nn.Sequential, alpha: float, curvilinear: bool = False) -> nn.Sequential:
    """The network with weights (1 - alpha) a + alpha b; `curvilinear`: each rescaled to (1 - alpha)|a| + alpha |b|."""
    net = copy.deepcopy(a)
    for weight, x, y in zip(net.parameters(), a.parameters(), b.parameters()):
        weight.copy_((1 - alpha) * x + alpha * y)
        if curvilinear and 0 < alpha < 1 and weight.norm() > 0:
            weight.mul_(((1 - alpha) * x.norm() + alpha * y.norm()) / weight.norm())
    return net


class Average(nn.ModuleList):
    """The outputs (1 - alpha) a(x) + alpha b(x) of two networks; `alpha` is set before use."""

    def forward(self, x: Tensor) -> Tensor:
        return (1 - self.alpha) * self[0](x) + self.alpha * self[1](x)


def train_string(nets: list[nn.Sequential], data: Data, settings: Settings, epochs: int, stiffness: float) -> None:
    """Each batch is a step of all but the ends; then their weights w move by stiffness (previous + next - 2 w)."""
    x, y, size = data.x_train, data.y_train, settings.batch_size
    inner = [(streamline(net.train(), data.image_shape), net) for net in nets[1:-1]]
    # No CUDA graphs: each point would keep one of its own, and its memory.
    optimizers = [(fast, SGD(net, [settings.lc_lr for _ in net.parameters()], settings.lc_lr)) for fast, net in inner]
    for epoch in range(epochs):
        if (order := epoch_order(len(x), settings, epoch)) is not None:
            order = order.to(x.device)
        for start in tqdm(range(0, len(x), size), f"epoch {epoch + 1} of {epochs}", disable=None):
            check_signals()
            batch = slice(start, start + size) if order is None else order[start : start + size]
            for net, sgd in optimizers:
                sgd_step(net, sgd, x[batch], y[batch])
            with torch.no_grad():
                for weights in zip(*(net.parameters() for net in nets)):
                    moves = [a + c - 2 * b for a, b, c in zip(weights, weights[1:], weights[2:])]
                    torch._foreach_add_(weights[1:-1], moves, alpha=stiffness)


def evaluate_path(nets: Iterable[nn.Module], alphas: list[float], data: Data, average: Average | None) -> dict:
    """A history with `alpha` in place of `checkpoints`; where outputs are averaged, norms are NaN between the ends."""
    path = {"alpha": alphas}
    for alpha, net in zip(tqdm(alphas, "evaluation", disable=None), nets):
        if average:
            average.alpha = alpha
        for key, value in evaluate(net, average or streamline(net, data.image_shape), data).items():
            if average and 0 < alpha < 1 and re.search("norm|log_|untied|nonlocal", key):
                value = math.nan
            path.setdefault(key, []).append(value)
    return path


def figure_of(path: dict[str, list], title: str) -> Figure:
    """Losses and accuracies over alpha; what lies above the chord between the ends of a loss is a barrier."""
    figure = Figure((9, 2.4), layout="constrained")
    figure.suptitle(f"{title}; dashed: the chord")
    for axes, key in zip(figure.subplots(1, 4), ("train_loss", "test_loss", "train_acc", "test_acc")):
        axes.plot([0, 1], [path[key][0], path[key][-1]], "--", color="grey", lw=0.9)
        axes.plot(path["alpha"], path[key], ".-")
        axes.set(xlabel="alpha", ylabel=key.replace("_", " ").replace("acc", "accuracy (%)"))
    return figure


def networks_of(files: list[Path]) -> list[Member]:
    """The networks that two checkpoints are of; raises Stop if their runs differ in network or data."""
    members = [member_of(file) for file in files]
    a, b = (vars(member.settings) | read_config(member.run)[1] for member in members)
    if other := [key for key in ("network", "data_size", "precision", "data_sha256") if a[key] != b[key]]:
        raise Stop(f"{files[0]} and {files[1]} cannot be compared, as their runs differ in {', '.join(other)}")
    return members


def open_output(out: Path, identity: dict[str, str]) -> Path:
    """Where a path's files go, without their endings; raises Stop if nothing can be written, or another path is there.

    `identity` says method and ends; a .csv of before holds them in every row.
    """
    ends = (Path(end) for end in (identity["a"], identity["b"]))
    names = (f"{file.parent.name}_{epoch_of(file)}" if "_version_" in file.stem else file.stem for file in ends)
    file = out / f"{identity['method']}-{'-to-'.join(names)}"
    with writing(out, "name another --out"):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    if (csv := with_ending(file, ".csv")).exists():
        with csv_rows(csv) as rows:
            if any(row.get(key) != value for row in rows for key, value in identity.items()):
                raise Stop(f"{csv} is a path between other checkpoints of these names; name another --out")
    return file


def with_ending(file: Path, ending: str) -> Path:
    return file.with_name(file.name + ending)  # its name may hold dots


def epoch_of(checkpoint: Path) -> str:
    return checkpoint.stem.rpartition("_")[2]


@styled()
def main(argv: list[str]) -> int:
    """Interpolate as the command line `argv` says; returns the exit status."""
    parser = Parser(__doc__)
    parser.add_argument("files", type=Path, nargs=2, metavar="FILE.pyT", help="the ends, A and B")
    parser.add_argument("--points", type=int, default=21, metavar="N", help="with the ends (default: 21)")
    parser.add_argument("--method", choices=("linear", "curvilinear", "average", "string"), default="linear")
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="of a string's training (default: 10)")
    parser.add_argument("--stiffness", type=float, default=0.1, metavar="K", help="of a string (default: 0.1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the path's .hist, .csv and .png go; beside B")
    add_data_flags(parser)
    args = parser.parse_args(argv)
    for name, low, high in (("points", 2, 10**4), ("epochs", 0, 10**5), ("stiffness", 0, 0.5)):
        if not low <= getattr(args, name) <= high:
            raise Stop(f"--{name} {getattr(args, name)}: has to be between {low} and {high}")
    first, last = networks_of(args.files)
    device = open_device(args.device)
    identity = {"method": args.method} | dict(zip("ab", (str(file.resolve()) for file in args.files)))
    file = open_output(args.out or args.files[1].parent, identity)
    ends = [load_network(file).to(device, memory_format=torch.channels_last) for file in args.files]
    data = data_of_run(last.run, args.data_dir, device)
    set_precision(last.settings.precision)
    a, b = lift(*ends, data.image_shape)
    alphas, average = [i / (args.points - 1) for i in range(args.points)], None
    nets = (between(a, b, alpha, args.method == "curvilinear") for alpha in alphas)
    if args.method == "average":
        nets, average = [*[a] * (args.points - 1), b], Average(streamline(net, data.image_shape) for net in (a, b))
    elif args.method == "string":
        train_string(nets := list(nets), data, last.settings, args.epochs, args.stiffness)
    path = evaluate_path(nets, alphas, data, average)
    names = (f"{member.label}, epoch {epoch_of(end)}" for member, end in zip((first, last), args.files))
    figure = render(figure_of(path, f"{args.method} path: {'; '.join(names)}"), ".png")
    rows = [identity | dict(zip(path, values)) for values in zip(*path.values())]
    with writing(file, "name another --out"):
        save(identity | path, with_ending(file, ".hist"))
        write_file(with_ending(file, ".csv"), to_csv(rows).encode())
        write_file(with_ending(file, ".png"), figure)
    print(f"highest train loss {max(path['train_loss']):.3f}; {file}.hist, .csv and .png")
    return COMPLETE


if __name__ == "__main__":
    finish(main, sys.argv, saves=False)
