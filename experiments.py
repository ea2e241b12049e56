"""The study: train a CNN, untie it at log-spaced epochs, train on without the tie, record everything.

    python experiments.py                                            the published settings, on a GPU
    python experiments.py --exec 0                                   the plan alone: networks, files, disk space
    python experiments.py --dataset synthetic --epochs 12 --n_splits 4    a small study on a CPU, in minutes

The same command continues a run that was stopped. Results lie in results/<run>; plot them with plot.py.
"""

import contextlib
import errno
import shutil
import sys
from pathlib import Path

from rnorm.cli import COMPLETE, DIVERGED, ENVIRONMENT, Parser, Stop, finish, note_signals, writing

if __name__ == "__main__":
    note_signals()  # torch takes seconds to import; a signal in that time must not be lost

import torch

from convert import (
    add_common_flags, cnn_track, convert_run, example_of, members_to_train, open_data, open_device, work_of,
)  # fmt: skip
from rnorm.data import check_data_size
from rnorm.devices import set_precision
from rnorm.files import Lock, files_below, lock_directory
from rnorm.flags import add_settings, settings_of
from rnorm.runs import Member, Settings, has_files_of_a_run
from train import Session, duration, train


def disk_space(run: Path, members: list[Member], keep: str) -> tuple[int, int]:
    """(bytes that the run has still to write, bytes free where it writes them)."""
    total, sizes = 0, {}
    for member in members:
        if member.conversion not in sizes:
            parameters = example_of(member, 10).parameters()
            sizes[member.conversion] = sum(p.numel() * p.element_size() for p in parameters) + 50_000
        size = sizes[member.conversion]
        keeps_all = member.is_cnn or keep == "all"
        total += size * len(member.evaluations) if keeps_all else size
    total += max(sizes.values())  # latest.pyT
    there = sum(size for _, _, size in files_below(run))
    nearest = next(p for p in (run.absolute(), *run.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is not a directory")
    return max(0, total - there), shutil.disk_usage(nearest).free


def print_plan(run: Path, settings: Settings, members: list[Member], dataset: str, needed: int, free: int) -> None:
    cnn, converted = members[0], members[1:]
    print(f"run         {run}")
    print(f"data        {dataset}, {settings.data_size or 'all'} training images, batches of {settings.batch_size}")
    print(f"CNN         {cnn.epochs} epochs, learning rate {cnn.lr}; evaluated at 0 and every epoch")
    for conversion in dict.fromkeys(member.conversion for member in converted):
        of_it = [member for member in converted if member.conversion == conversion]
        name = "eLCNs" if conversion == "lc" else conversion
        print(f"{name:<11} {len(of_it)}, from these epochs of the CNN: {' '.join(str(m.split) for m in of_it)}")
    if converted:
        print(f"            {converted[0].epochs} epochs each, learning rate {converted[0].lr}; evaluated at their own")
        print(f"            epochs {' '.join(map(str, converted[0].evaluations))}")
    print(f"disk space  {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


def print_cost(flop: float) -> None:
    """Say what training on the CPU costs."""
    time = duration(flop / 100e9)
    print(f"training on the CPU: {flop / 1e9:,.0f} GFLOP, at 100 GFLOP/s {time}, and the evaluations")


def open_run(run: Path, fresh: bool) -> Lock:
    """Make the run's directory, or find it, and lock the CNN; raises Stop if it is no run or cannot be written."""
    there = any(not path.name.startswith(".") for path, _, _ in files_below(run))
    if there and not has_files_of_a_run(run):
        raise Stop(f"{run} is there but is no run of experiments.py; move it away, or name another --results_dir")
    lock = lock_directory(run)
    if fresh and there:
        delete(run)
    return lock


def delete(run: Path) -> None:
    """Delete a run's files, the newest first: if that is cut short, what remains is the run at an earlier time."""
    with contextlib.ExitStack() as locks:  # nobody may be at work there
        for directory in run.glob("*_version_*"):
            locks.enter_context(lock_directory(directory))
        files = sorted(files_below(run), key=lambda file: (file[0].name == "config.json", -file[1]))
        size = sum(size for _, _, size in files) / 1e9
        print(f"--fresh: deleting {len(files)} files, {size:.2f} GB, in {run}", flush=True)
        for path, _, _ in files:
            path.unlink()


def main(argv: list[str]) -> int:
    """Run the study as the command line `argv` says; returns the exit status."""
    parser = Parser(__doc__)
    add_settings(parser)
    parser.add_argument("--exec", type=int, choices=(0, 1), default=1, help="0: print the plan and stop (default: 1)")
    parser.add_argument("--cnn_only", action="store_true", help="train the CNN and convert nothing")
    parser.add_argument("--fresh", action="store_true", help="delete what there is of this run and start over")
    add_common_flags(parser)
    args = parser.parse_args(argv)
    settings = settings_of(args)

    run = args.results_dir / settings.run_name
    cnn, converted = Member(settings), members_to_train(settings, args.convert_to, settings.split_epochs)
    if args.cnn_only:
        converted = []
    with writing(run, "name another --results_dir"):
        needed, free = disk_space(run, [cnn, *converted], args.keep)
    if args.exec == 0:
        if args.dataset == "cifar10":
            check_data_size(settings.data_size, 50_000)  # CIFAR-10 is not downloaded just to print a plan
        else:
            open_data(args.dataset, args.data_dir, settings.data_size, torch.device("cpu"))
        print_plan(run, settings, [cnn, *converted], args.dataset, needed, free)
        return COMPLETE
    if needed > free:
        raise Stop(
            f"disk space: {needed / 1e9:.2f} GB needed and {free / 1e9:.2f} GB free for {run}; free some, "
            "use --keep last, or name another --results_dir", ENVIRONMENT,
        )  # fmt: skip
    device = open_device(args.device)
    data = open_data(args.dataset, args.data_dir, settings.data_size, device)
    with writing(run, "name another --results_dir"):
        lock = open_run(run, args.fresh)
    with lock:
        work = work_of([cnn, *converted], len(data.x_train), data.num_classes)
        session = Session(run, settings, data, device, args.keep, work)
        session.begin(str(Path(args.dataset).absolute()) if args.dataset.endswith(".npz") else None)
        print(f"run: {run}")
        if device.type == "cpu":
            print_cost(sum(work.values()))
        set_precision(settings.precision)
        track = cnn_track(session)
        track.restore()
        finite = train(track, session)
    status = convert_run(session, converted)
    if not finite:
        status = DIVERGED
    print(f"{'complete' if status == COMPLETE else 'ended, with divergence'}: {run}")
    return status


if __name__ == "__main__":
    finish(main, sys.argv)
