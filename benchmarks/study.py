"""The whole study in small: how its cost grows, what training adds to its steps, and that speed changes no result.

    python benchmarks/study.py growth                           seconds by number of eLCNs, batch size and data size
    python benchmarks/study.py overhead                         training against its steps and its evaluations
    python benchmarks/study.py agreement --dataset FILE.npz     three epochs, ours against plain PyTorch

All take --data_size N (0: all images), --epochs N, --dataset (synthetic, cifar10 or FILE.npz) and --device; `cuda` has
not yet been run. Tables come out ready for README.md.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from models import skinnyprime
from rnorm.checkpoints import Track
from rnorm.conversions import layers_of, untie
from rnorm.data import Data, load_data
from rnorm.devices import pick_device, set_precision
from rnorm.layers import Geometry, LocallyConnected2d, unfolded
from rnorm.measure import evaluate
from rnorm.runs import Member, Settings
from step import machine, spread

SCRIPT = Path(__file__).parents[1] / "experiments.py"
LR = {"CNN": Settings.cnn_lr, "eLCN": Settings.lc_lr}


def whole_study(args: argparse.Namespace, splits: int, batch_size: int, data_size: int) -> dict[str, float]:
    """Seconds that a study of `splits` eLCNs takes, start and end of the process included, and of its networks."""
    with tempfile.TemporaryDirectory() as results:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, SCRIPT, "--dataset", args.dataset, "--data_dir", args.data_dir, "--device", args.device,
             "--results_dir", results, "--epochs", str(args.epochs),
             "--splits", *map(str, range(splits)), "--batch_size", str(batch_size),
             "--data_size", str(data_size)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        total = time.perf_counter() - start
        (status,) = Path(results).glob("*/status.json")
        networks = json.loads(status.read_text())["networks"]
    cnn = networks.pop("CNN")["seconds"]
    return {"whole": total, "CNN": cnn, "eLCN": statistics.mean(n["seconds"] for n in networks.values())}


def growth(args: argparse.Namespace) -> None:
    """Vary one of three sizes at a time, interleaved over the rounds."""
    size = args.data_size or 2000
    cases = [(n, 250, size) for n in (1, 2, 4)] + [(1, b, size) for b in (50, 125, 500)]
    cases += [(1, 250, size // 4), (1, 250, size // 2)]
    taken = {case: [] for case in cases}
    for i, case in itertools.product(range(args.rounds), cases):
        taken[case].append(whole_study(args, *case))
        print(f"round {i + 1}, (eLCNs, batch, images) = {case}: {taken[case][-1]}", file=sys.stderr)
    print("| eLCNs | batch | images | study, s | min .. max | CNN, s | min .. max | each eLCN, s | min .. max |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for case, results in taken.items():
        columns = [spread([r[key] for r in results]) for key in ("whole", "CNN", "eLCN")]
        print(f"| {' | '.join(map(str, case))} | {' | '.join(columns)} |")


@contextlib.contextmanager
def timed(owner: object, name: str, seconds: dict[str, float], device: torch.device) -> Iterator[None]:
    """Count the seconds spent in `owner.name` in `seconds[name]`."""
    original = getattr(owner, name)

    def measured(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        result = original(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return result

    setattr(owner, name, measured)
    yield
    setattr(owner, name, original)


def cnn_for(data: Data, device: torch.device) -> nn.Module:
    """The CNN at its initial weights, laid out in memory as experiments.py does."""
    torch.manual_seed(0)
    return skinnyprime(data.num_classes).to(device, memory_format=torch.channels_last)


def train_as_the_study_does(
    name: str, model: nn.Module, args: argparse.Namespace, data: Data, device: torch.device
) -> None:
    """train.train, with the evaluations and checkpoints that the study has, in a temporary run."""
    settings = Settings(epochs=args.epochs, data_size=args.data_size)
    member = Member(settings) if name == "CNN" else Member(settings, "lc", 0)
    with tempfile.TemporaryDirectory() as run, contextlib.redirect_stdout(io.StringIO()):
        session = train.Session(Path(run), settings, data, device)
        session.begin()
        track = Track(Path(run), member, model, [member.lr] * len(list(model.parameters())))
        member.directory(track.run).mkdir(exist_ok=True)
        train.train(track, session)


def overhead(args: argparse.Namespace) -> None:
    """The time of training by its parts, all measured in the same run."""
    device = pick_device(args.device)
    set_precision(Settings.precision)
    data = load_data(args.dataset, args.data_dir, args.data_size, device)
    print("| network | round | training, s | its steps | its evaluations | its checkpoints | "
          "training / (steps + evaluations) |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for i, name in itertools.product(range(args.rounds), ("CNN", "eLCN")):
        model = cnn_for(data, device)
        model = model if name == "CNN" else untie(model.net, (3, 32, 32))
        s: dict[str, float] = {}
        with (timed(train.Step, "__call__", s, device), timed(train, "evaluate", s, device),
              timed(Track, "record", s, device), timed(train, "train", s, device)):  # fmt: skip
            train_as_the_study_does(name, model, args, data, device)
        total, steps, evaluations = s["train"], s["__call__"], s["evaluate"]
        print(f"| {name} | {i + 1} | {total:.2f} | {steps:.2f} | {evaluations:.2f} | {s['record']:.2f} | "
              f"{total / (steps + evaluations):.3f} |", flush=True)  # fmt: skip


class Plain(LocallyConnected2d):
    """The layer as a matrix of patches and one product, nothing skipped."""

    def compute(self, x: torch.Tensor, padding: tuple[int, int], outputs: tuple[int, int]) -> torch.Tensor:
        geometry = Geometry(self.kernel_size, self.stride, padding, self.dilation, outputs)
        return unfolded(x, self.weight, self.bias, geometry)


def train_plainly(name: str, net: nn.Sequential, args: argparse.Namespace, data: Data) -> None:
    """The same training as a PyTorch user would write it: the network as it is, and torch.optim.SGD."""
    for layer in net:
        if isinstance(layer, LocallyConnected2d):
            layer.__class__ = Plain
    optimizer = torch.optim.SGD(net.parameters(), LR[name])
    for _ in range(args.epochs):
        for x, y in zip(data.x_train.split(Settings.batch_size), data.y_train.split(Settings.batch_size)):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()


def agreement(args: argparse.Namespace) -> None:
    """What differs after training in the two ways; the eLCN is untied from the CNN that was trained plainly."""
    device = pick_device(args.device)
    set_precision(Settings.precision)
    data = load_data(args.dataset, args.data_dir, args.data_size, device)
    keys = ("train_acc", "test_acc", "norm", "log_prod_norm", "margin")
    print(f"| network, {args.epochs} epochs | {' | '.join(keys)} |\n| --- {'| --- ' * len(keys)}|")
    model = cnn_for(data, device)
    for name in ("CNN", "eLCN"):
        model = model if name == "CNN" else untie(model.net, (3, 32, 32))
        ours, rows = copy.deepcopy(model), {}
        train_plainly(name, layers_of(model), args, data)
        train_as_the_study_does(name, ours, args, data, device)
        for way, net in (("plain PyTorch", layers_of(model)), ("ours", layers_of(ours))):
            values = evaluate(net, net, data)
            rows[way] = [values[key] for key in keys]
        plain, fast = rows.values()
        difference = [b - a for a, b in zip(plain, fast)]
        difference[keys.index("norm")] /= plain[keys.index("norm")]
        rows["difference; of norm, relative"] = difference
        for way, values in rows.items():
            print(f"| {name}, {way} | {' | '.join(f'{v:.6g}' for v in values)} |", flush=True)


COMMANDS: dict[str, Callable] = {"growth": growth, "overhead": overhead, "agreement": agreement}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--dataset", default="synthetic", help="(default: synthetic)")
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--data_size", type=int, default=0, help="training images; 0: all (default)")
    parser.add_argument("--epochs", type=int, default=3, help="of every network (default: 3)")
    parser.add_argument("--rounds", type=int, default=3, help="repeats of growth and overhead (default: 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    print(machine(pick_device(args.device)))
    COMMANDS[args.what](args)


if __name__ == "__main__":
    main()
