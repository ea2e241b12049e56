"""The study: train a CNN, untie it at log-spaced epochs, train on without the tie, record everything.

    python experiments.py                                            the published settings, on a GPU
    python experiments.py --exec 0                                   the plan alone: networks, files, disk space
    python experiments.py --dataset synthetic --epochs 12 --n_splits 4    a small study on a CPU, in minutes

The same command continues a run that was stopped. Results lie in results/<run>; plot them with plot.py.
"""

import argparse
import contextlib
import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from cli import COMPLETE, DIVERGED, ENVIRONMENT, Interrupt, Parser, Stop, finish
from runs import ELCN, Lock, Settings, lock_network, writing

if __name__ == "__main__":
    INTERRUPT = Interrupt()  # torch takes seconds to import; a signal in that time must not be lost

import torch
from torch import nn

from checkpoints import Track
from convert import add_common_flags, convert_run, untie
from data import load_data
from measure import training_flop
from models import skinnyprime
from train import Session, pick_device, set_precision, train


def parse(argv: list[str]) -> tuple[argparse.Namespace, Settings]:
    """The command line; raises Stop, or exits with status 2, where it makes no sense."""
    parser = Parser(__doc__)

    def flag(name: str, help: str, *spellings: str, **kwargs) -> None:
        default = getattr(Settings, name) or None if name == "splits" else getattr(Settings, name)
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", *spellings, default=default, help=help + shown, **kwargs)

    flag("epochs", "epochs of the CNN", type=int, metavar="N")
    flag("n_splits", "untie the CNN at so many log-spaced epochs, fewer where they coincide", type=int, metavar="N")
    flag("cnn_lr", "learning rate of the CNN", type=float, metavar="LR")
    flag("lc_lr", "learning rate of the eLCNs", "--lcn_lr", type=float, metavar="LR")
    flag("splits", "untie at these epochs instead of n_splits", type=int, nargs="+", metavar="EPOCH")
    flag("lc_epochs", "epochs of each eLCN; 0: as many as the CNN's", type=int, metavar="N")
    flag("dataset", "cifar10, synthetic, or FILE.npz with x_train, y_train, x_test, y_test")
    flag("data_size", "use the first N training images; 0: all", type=int, metavar="N")
    flag("batch_size", "images per step", type=int, metavar="N")
    flag("seed", "seed of the initial weights and of --shuffle", type=int, metavar="N")
    parser.add_argument("--shuffle", action="store_true", help="shuffle in every epoch (default: the data set's order)")
    flag("precision", "arithmetic of products on CUDA", choices=("float32", "tf32"))
    parser.add_argument("--exec", type=int, choices=(0, 1), default=1, help="0: print the plan and stop (default: 1)")
    parser.add_argument("--cnn_only", action="store_true", help="train the CNN and no eLCN")
    parser.add_argument("--fresh", action="store_true", help="delete what there is of this run and start over")
    parser.add_argument(
        "--results_dir", type=Path, default=Path("results"), metavar="DIR", help="where runs lie (default: results)"
    )
    add_common_flags(parser)
    args = parser.parse_args(argv)
    values = {name: getattr(args, name) for name in Settings.__dataclass_fields__}
    values |= {"splits": tuple(args.splits or ()), "dataset": Path(args.dataset).stem}
    return args, Settings(**values)


def disk_space(run: Path, settings: Settings, splits: list[int], keep: str, make_cnn: Callable) -> tuple[int, int]:
    """(bytes that the run has still to write, bytes free where it writes them)."""
    cnn = make_cnn(10)
    sizes = [4 * sum(p.numel() for p in net.parameters()) + 50_000 for net in (cnn, untie(cnn.net, (3, 32, 32)))]
    checkpoints = len(settings.elcn_evaluations) if keep == "all" else 1
    total = (settings.epochs + 2) * sizes[0] + (len(splits) * checkpoints + bool(splits)) * sizes[1]  # and latest
    there = sum(size for _, _, size in files_of(run))
    nearest = next(p for p in (run.absolute(), *run.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is not a directory")
    return max(0, total - there), shutil.disk_usage(nearest).free


def print_plan(run: Path, settings: Settings, splits: list[int], dataset: str, needed: int, free: int) -> None:
    size = settings.data_size or "all"
    print(f"run         {run}")
    print(f"data        {dataset}, {size} training images, batches of {settings.batch_size}")
    print(f"CNN         {settings.epochs} epochs, learning rate {settings.cnn_lr}; evaluated at 0 and every epoch")
    print(f"eLCNs       {len(splits)}, untied after these epochs of the CNN: {' '.join(map(str, splits)) or 'none'}")
    if splits:
        print(f"            {settings.elcn_epochs} epochs each, learning rate {settings.lc_lr}; evaluated at their own")
        print(f"            epochs {' '.join(map(str, settings.elcn_evaluations))}")
    print(f"disk space  {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


def print_cost(net: nn.Sequential, images: int) -> None:
    """Say what training on the CPU costs."""
    flop = images * training_flop(net, (3, 32, 32))
    hours = flop / 100e9 / 3600
    print(f"training on the CPU: {flop / 1e15:.2g} PFLOP, at 100 GFLOP/s {hours:.1f} hours, and the evaluations")


def files_of(run: Path) -> list[tuple[Path, int, int]]:
    """(path, time of change, bytes) of a run's files but for the locks; others may be at work in the run meanwhile."""
    files = []
    for path in run.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.name.endswith(".lock"):
                files.append((path, path.stat().st_mtime_ns, path.stat().st_size))
    return files


def open_run(run: Path, fresh: bool) -> Lock:
    """Make the run's directory, or find it, and lock the CNN; raises Stop if it is no run or cannot be written."""
    there = [path.name for path, _, _ in files_of(run) if not path.name.startswith(".")]
    if there and not any(name.startswith("config.json") for name in there):
        raise Stop(f"{run} is there but is no run of experiments.py; move it away, or name another --results_dir")
    lock = lock_network(run)
    if fresh and there:
        delete(run)
    return lock


def delete(run: Path) -> None:
    """Delete a run's files, the newest first: if that is cut short, what remains is the run at an earlier time."""
    with contextlib.ExitStack() as locks:  # nobody may be at work there
        for directory in run.glob(f"{ELCN}_*"):
            locks.enter_context(lock_network(directory))
        files = sorted(files_of(run), key=lambda file: (file[0].name == "config.json", -file[1]))
        size = sum(size for _, _, size in files) / 1e9
        print(f"--fresh: deleting {len(files)} files, {size:.2f} GB, in {run}", flush=True)
        for path, _, _ in files:
            path.unlink()


def main(argv: list[str], interrupt: Interrupt, make_cnn: Callable[[int], nn.Module] = skinnyprime) -> int:
    """Run the study as the command line `argv` says; returns the exit status.

    `make_cnn(num_classes)` makes the tied network: a `models.ConvNet`, or any module with its layers in `net`.
    """
    args, settings = parse(argv)
    run = args.results_dir / settings.run_name
    splits = [] if args.cnn_only else settings.split_epochs
    with writing(run, "name another --results_dir"):
        needed, free = disk_space(run, settings, splits, args.keep, make_cnn)
    if args.exec == 0:
        if args.dataset != "cifar10":  # whose download a plan is not worth
            load_data(args.dataset, args.data_dir, settings.data_size, torch.device("cpu"))
        elif settings.data_size > 50_000:
            raise Stop(f"--data_size {settings.data_size}: there are only 50000 training images; use 0 for all")
        print_plan(run, settings, splits, args.dataset, needed, free)
        return COMPLETE
    if needed > free:
        raise Stop(
            f"disk space: {needed / 1e9:.2f} GB needed and {free / 1e9:.2f} GB free for {run}; free some, "
            "use --keep last, or name another --results_dir", ENVIRONMENT,
        )  # fmt: skip
    device = pick_device(args.device)
    with interrupt.at_once():
        data = load_data(args.dataset, args.data_dir, settings.data_size, device)
    with writing(run, "name another --results_dir"):
        lock = open_run(run, args.fresh)
    with lock:
        session = Session(run, settings, data, device, interrupt, args.keep, make_cnn)
        session.begin(str(Path(args.dataset).absolute()) if args.dataset.endswith(".npz") else None)
        print(f"run: {run}")
        set_precision(settings.precision)
        torch.manual_seed(settings.seed)
        cnn = make_cnn(data.num_classes).to(device, memory_format=torch.channels_last)
        if device.type == "cpu":
            print_cost(cnn.net, len(data.x_train) * (settings.epochs + len(splits) * settings.elcn_epochs))
        track = Track(run, None, cnn, settings.cnn_lr, settings.epochs, list(range(settings.epochs + 1)))
        track.restore()
        finite = train(track, session)
    status = COMPLETE if finite else DIVERGED
    if splits:
        status = max(status, convert_run(session, splits))
    print(f"{'complete' if status == COMPLETE else 'ended, with divergence'}: {run}")
    return status


if __name__ == "__main__":
    finish(main, sys.argv, INTERRUPT)
