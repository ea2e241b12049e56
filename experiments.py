"""The study: train a CNN, untie it at log-spaced epochs, train on without the tie, record everything.

    python experiments.py                                            the published settings, on a GPU
    python experiments.py --exec 0                                   the plan alone: networks, files, disk space
    python experiments.py --dataset synthetic --epochs 12 --n_splits 4    a small study on a CPU, in minutes

The same command continues a run that was stopped. Results lie in results/<run>; plot them with plot.py.

The science is in four functions: `skinnyprime` (models.py) is the network, `untie` (rnorm/conversions.py) gives every
position its own filter, `train_epoch` (train.py) is the training loop, `evaluate` (rnorm/measure.py) what is recorded.
"""

import contextlib
import shutil
import sys
from pathlib import Path

from rnorm.cli import COMPLETE, DIVERGED, ENVIRONMENT, Parser, Stop, finish, writing
from rnorm.signals import note_signals

if __name__ == "__main__":
    note_signals()  # torch takes seconds to import; a signal in that time must not be lost

import torch

from convert import convert_run, members_to_train
from models import size_of
from rnorm.checkpoints import has_ended, past_divergence, recorded
from rnorm.conversions import find_conversion
from rnorm.data import DATASETS, Data, check_data_size
from rnorm.files import Lock, files_below, lock_directory
from rnorm.flags import add_settings, add_training_flags, open_data, open_device, settings_of
from rnorm.runs import Member, has_files_of_a_run
from train import Progress, begin, cnn_track, train, work_of

EVALUATION_BYTES = 160  # of one evaluation in a history, which every checkpoint holds up to its own epoch


def checkpoints(member: Member, keep: str | None) -> tuple[int, int]:
    """(how many checkpoints of a network stay on disk, mean bytes of each); `keep` is that of the command line."""
    numbers, _ = size_of(member.settings.network, member.conversion)
    if member.settings.momentum:
        numbers *= 2
    weights = numbers * (8 if member.settings.precision == "float64" else 4) + 10_000
    count = len(member.evaluations)
    if not member.is_cnn and (keep or find_conversion(member.conversion).keep) == "last":
        return 1, weights + count * EVALUATION_BYTES
    return count, weights + count * EVALUATION_BYTES // 2


def disk_space(run: Path, members: list[Member], keep: str | None) -> tuple[int, int]:
    """(bytes that the run has still to write, bytes free where it writes them)."""
    kept = [checkpoints(member, keep) for member in members]
    total = sum(count * size for count, size in kept) + max(size for _, size in kept)  # and latest.pyT
    there = sum(size for _, _, size in files_below(run))
    nearest = next(p for p in (run.absolute(), *run.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is not a directory")
    return max(0, total - there), shutil.disk_usage(nearest).free


def print_plan(members: list[Member], images: int, keep: str | None, needed: int, free: int) -> None:
    """Print what a run will train and write, and how far it has come.

    `images` are those for training, `needed` and `free` as `disk_space` returns them.
    """
    (cnn, *converted), settings = members, members[0].settings
    ended = [member for member in members if has_ended(recorded(member), member) or past_divergence(member)]
    state = f"{len(ended)} of {len(members)} networks complete"
    if len(ended) == len(members):
        state = "complete"
    work = sum(work_of(member, images) for member in members)
    print(f"run         {cnn.run}")
    print(f"state       {state}")
    print(f"data        {settings.dataset}, {images} training images, batches of {settings.batch_size}")
    print(f"CNN         {cnn.epochs} epochs, learning rate {cnn.lr}; evaluated at 0 and every epoch")
    for conversion in dict.fromkeys(member.conversion for member in converted):
        of_it = [member for member in converted if member.conversion == conversion]
        name = "eLCNs" if conversion == "lc" else conversion
        print(f"{name:<11} {len(of_it)}, from these epochs of the CNN: {' '.join(str(m.split) for m in of_it)}")
        count, size = checkpoints(of_it[0], keep)
        print(f"            {count} {'checkpoint stays' if count == 1 else 'checkpoints'} of each, {size / 1e6:.0f} MB")
    if converted:
        print(f"            {converted[0].epochs} epochs each, learning rate {converted[0].lr}; evaluated at their own")
        print(f"            epochs {' '.join(map(str, converted[0].evaluations))}")
    print(f"training    {work / 1e12:,.3g} TFLOP")
    print(f"disk space  {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


def open_run(run: Path, fresh: bool) -> Lock:
    """Make the run's directory, or find it, and lock the CNN; raises Stop if it is no run."""
    there = any(not path.name.startswith(".") for path, _, _ in files_below(run))
    if there and not has_files_of_a_run(run):
        raise Stop(f"{run} is there but is no run of experiments.py; move it away, or name another --results_dir")
    lock = lock_directory(run)
    if fresh and there:
        delete(run)
    return lock


def delete(run: Path) -> None:
    """Delete a run's files, the newest first: if that is cut short, what remains is the run at an earlier time.

    A directory that is a link is unlinked, and what it leads to stays.
    """
    with contextlib.ExitStack() as locks:  # nobody may be at work there
        for directory in run.glob("*_version_*"):
            if directory.is_dir():  # a link may lead nowhere
                locks.enter_context(lock_directory(directory))
        for directory in run.iterdir():
            if directory.is_symlink():
                directory.unlink()
        files = sorted(files_below(run), key=lambda file: (file[0].name == "config.json", -file[1]))
        size = sum(size for _, _, size in files) / 1e9
        print(f"--fresh: deleting {len(files)} files, {size:.2f} GB, in {run}", flush=True)
        for path, _, _ in files:
            path.unlink()


def train_cnn(cnn: Member, data: Data, progress: Progress) -> bool:
    """Train the CNN from wherever it stands; returns whether its loss stays finite."""
    track = cnn_track(cnn, data)
    track.restore()
    return train(track, data, progress)


def main(argv: list[str]) -> int:
    """Run the study as the command line `argv` says; returns the exit status. One call at a time in a process."""
    parser = Parser(__doc__)
    add_settings(parser)
    parser.add_argument("--exec", type=int, choices=(0, 1), default=1, help="0: print the plan and stop (default: 1)")
    parser.add_argument("--cnn_only", action="store_true", help="train the CNN and convert nothing")
    parser.add_argument("--fresh", action="store_true", help="delete what there is of this run and start over")
    add_training_flags(parser)
    args = parser.parse_args(argv)
    settings = settings_of(args)
    run = args.results_dir / settings.run_name
    cnn, converted = Member(run, settings), []
    if not args.cnn_only:
        converted = members_to_train(run, settings, args.convert_to, settings.split_epochs)
    members = [cnn, *converted]
    with writing(run, "name another --results_dir"):
        needed, free = disk_space(run, members, args.keep)
    if args.exec == 0:
        images = DATASETS[args.dataset].images if args.dataset in DATASETS else 0
        if images:  # CIFAR-10 is not downloaded just to print a plan
            check_data_size(settings.data_size, images)
            images = settings.data_size or images
        else:
            images = len(open_data(args.dataset, args.data_dir, settings, torch.device("cpu")).x_train)
        print_plan(members, images, args.keep, needed, free)
        return COMPLETE
    if needed > free:
        there = f"disk space: {needed / 1e9:.2f} GB needed and {free / 1e9:.2f} GB free for {run}"
        raise Stop(f"{there}; free some, use --keep last, or name another --results_dir", ENVIRONMENT)

    data = open_data(args.dataset, args.data_dir, settings, open_device(args.device))
    with writing(run, "name another --results_dir"):
        lock = open_run(run, args.fresh)
    with lock:
        begin(run, settings, data, str(Path(args.dataset).absolute()) if args.dataset.endswith(".npz") else None)
        print(f"run: {run}")
        progress = Progress(members, len(data.x_train))
        finite = train_cnn(cnn, data, progress)
    status = convert_run(converted, data, args.keep, progress)
    if not finite:
        status = DIVERGED
    print(f"{'complete' if status == COMPLETE else 'ended, with divergence'}: {run}")
    return status


if __name__ == "__main__":
    finish(main, sys.argv)
