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
    add_common_flags, cnn_track, convert_run, members_to_train, open_data, open_device, size_of, work_of,
)  # fmt: skip
from rnorm.conversions import find_conversion
from rnorm.data import DATASETS, check_data_size
from rnorm.devices import set_precision
from rnorm.files import Lock, files_below, lock_directory
from rnorm.flags import add_settings, settings_of
from rnorm.runs import Member, Settings, has_files_of_a_run
from train import Session, duration, train


OTHER_DATA = ", or use --dataset FILE.npz or --dataset synthetic"


def checkpoints(members: list[Member], keep: str | None) -> dict[Member, tuple[int, int]]:
    """(how many checkpoints of each network stay on disk, bytes of each); `keep` is that of the command line."""
    kept = {}
    for member in members:
        numbers, _ = size_of(member.settings.network, member.conversion)
        if member.settings.momentum:
            numbers *= 2
        size = numbers * (8 if member.settings.precision == "float64" else 4) + 50_000
        if not member.is_cnn and (keep or find_conversion(member.conversion).keep) == "last":
            kept[member] = 1, size
        else:
            kept[member] = len(member.evaluations), size
    return kept


def disk_space(run: Path, kept: dict[Member, tuple[int, int]]) -> tuple[int, int]:
    """(bytes that the run has still to write, bytes free where it writes them); `kept` as `checkpoints` returns it."""
    total = sum(count * size for count, size in kept.values())
    total += max(size for _, size in kept.values())  # latest.pyT
    there = sum(size for _, _, size in files_below(run))
    nearest = next(p for p in (run.absolute(), *run.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is not a directory")
    return max(0, total - there), shutil.disk_usage(nearest).free


def print_plan(
    run: Path, settings: Settings, kept: dict[Member, tuple[int, int]], dataset: str, needed: int, free: int
) -> None:
    """Print what a run will train and write; `kept` as `checkpoints` returns it."""
    cnn, *converted = kept
    print(f"run         {run}")
    print(f"data        {dataset}, {settings.data_size or 'all'} training images, batches of {settings.batch_size}")
    print(f"CNN         {cnn.epochs} epochs, learning rate {cnn.lr}; evaluated at 0 and every epoch")
    for conversion in dict.fromkeys(member.conversion for member in converted):
        of_it = [member for member in converted if member.conversion == conversion]
        name = "eLCNs" if conversion == "lc" else conversion
        print(f"{name:<11} {len(of_it)}, from these epochs of the CNN: {' '.join(str(m.split) for m in of_it)}")
        count, size = kept[of_it[0]]
        print(f"            {count} {'checkpoint stays' if count == 1 else 'checkpoints'} of each, {size / 1e6:.0f} MB")
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
        kept = checkpoints([cnn, *converted], args.keep)
        needed, free = disk_space(run, kept)
    if args.exec == 0:
        if args.dataset in DATASETS and DATASETS[args.dataset].images:  # not downloaded just to print a plan
            check_data_size(settings.data_size, DATASETS[args.dataset].images)
        else:
            open_data(args.dataset, args.data_dir, settings, torch.device("cpu"), OTHER_DATA)
        print_plan(run, settings, kept, args.dataset, needed, free)
        return COMPLETE
    if needed > free:
        raise Stop(
            f"disk space: {needed / 1e9:.2f} GB needed and {free / 1e9:.2f} GB free for {run}; free some, "
            "use --keep last, or name another --results_dir", ENVIRONMENT,
        )  # fmt: skip
    device = open_device(args.device)
    data = open_data(args.dataset, args.data_dir, settings, device, OTHER_DATA)
    with writing(run, "name another --results_dir"):
        lock = open_run(run, args.fresh)
    with lock:
        work = work_of([cnn, *converted], len(data.x_train))
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
