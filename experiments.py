"""The study: train a CNN, untie it at log-spaced epochs, train on without the tie, record everything.

    python experiments.py                                            the published settings, on a GPU
    python experiments.py --exec 0                                   the plan alone: networks, files, time, disk space
    python experiments.py --dataset synthetic --epochs 12 --n_splits 4    a small study on a CPU, in minutes

The same command continues a run that was stopped. Results lie in results/<run>; plot them with plot.py.

The science is in four functions: `skinnyprime` (models.py) is the network, `untie` (rnorm/conversions.py) gives every
position its own filter, `sgd_step` (train.py) is the training, `evaluate` (rnorm/measure.py) what is recorded.
"""

import sys
import time
from pathlib import Path

from rnorm.cli import COMPLETE, DIVERGED, ENVIRONMENT, Parser, Stop, finish, writing
from rnorm.signals import note_signals

if __name__ == "__main__":
    note_signals()  # torch takes seconds to import; a signal in that time must not be lost

from convert import begin, convert_run, members_to_train, start
from rnorm.data import Data
from rnorm.fast import streamline
from rnorm.files import Lock, lock_directory
from rnorm.flags import add_settings, add_training_flags, data_of_settings, open_device, settings_of
from rnorm.measure import EVALUATION_BATCH, logits_of
from rnorm.plan import Item, disk_space, duration_line, is_done, print_plan
from rnorm.progress import Progress
from rnorm.runs import Member, has_files_of_a_run
from rnorm.store import Store
from train import make_step, start_cnn, train


def open_run(run: Path) -> Lock:
    """Make the run's directory, or find it, and lock the CNN; raises Stop if it is no run."""
    if run.is_dir() and not has_files_of_a_run(run) and any(not path.name.startswith(".") for path in run.iterdir()):
        raise Stop(f"{run} is there but is no run of experiments.py; move it away, or name another --results_dir")
    return lock_directory(run)


def train_cnn(cnn: Member, data: Data, lock: Lock, progress: Progress) -> bool:
    """Train the CNN from wherever it stands; returns whether its loss stays finite."""
    training = start_cnn(cnn, data)
    store = Store(cnn, data, lock)
    store.restore(training)
    return train(training, store, data, progress)


def plan_items(members: list[Member], data: Data) -> list[Item]:
    """The networks with their numbers of parameters, and the times of a step and an evaluation of each kind here.

    Raises Stop for a conversion that the network does not allow.
    """
    unfinished = {member.conversion for member in members if not is_done(member)}
    kinds = {member.conversion: member for member in members}  # one of each kind, the CNN first
    cost = {name: measure_cost(member, data, name in unfinished) for name, member in kinds.items()}
    return [Item(member, *cost[member.conversion]) for member in members]


def measure_cost(member: Member, data: Data, timed: bool) -> tuple[int, float, float]:
    """(parameters, seconds of a training step, seconds of an evaluation) of a network; 0 seconds if not `timed`."""
    try:
        training, size = start(member, data), member.settings.batch_size
    except ValueError as error:
        raise Stop(f"--convert_to {member.conversion}: {error}") from None
    parameters = sum(parameter.numel() for parameter in training.net.parameters())
    if not timed:
        return parameters, 0.0, 0.0
    fast = streamline(training.net, data.image_shape)
    take_step = make_step(fast, training.sgd, size)
    x, y = data.x_train[:size].contiguous(), data.y_train[:size].contiguous()
    times = [time.perf_counter()]
    while len(times) < 4 and times[-1] - times[0] < 2:  # the first step makes its graph, or finds its memory
        take_step(x, y).item()  # waits for the device
        times.append(time.perf_counter())
    logits_of(fast, x[:EVALUATION_BATCH])[0, 0].item()
    images = (len(data.x_train) + len(data.x_test)) / len(x[:EVALUATION_BATCH])
    return parameters, times[-1] - times[-2], (time.perf_counter() - times[-1]) * images


def main(argv: list[str]) -> int:
    """Run the study as the command line `argv` says; returns the exit status. One call at a time in a process."""
    parser = Parser(__doc__)
    add_settings(parser)
    parser.add_argument("--exec", type=int, choices=(0, 1), default=1, help="0: print the plan and stop (default: 1)")
    parser.add_argument("--cnn_only", action="store_true", help="train the CNN and convert nothing")
    add_training_flags(parser)
    args = parser.parse_args(argv)
    settings = settings_of(args)
    run, elsewhere = args.results_dir / settings.run_name, "name another --results_dir"
    if len(settings.run_name.encode(errors="replace")) > 255:
        raise Stop("the run's name is longer than a file's can be; give fewer --splits, or --n_splits in their place")
    members = [Member(run, settings)]
    if not args.cnn_only:
        members += members_to_train(run, settings, args.convert_to, settings.split_epochs)
    data = data_of_settings(args, settings, run, open_device(args.device))
    items = plan_items(members, data)
    with writing(run, elsewhere):
        disks = disk_space(items, args.keep)
    if args.exec == 0:
        begin(run, settings, data, None, plan_only=True)
        print_plan(items, len(data.x_train), args.keep, disks)
        return COMPLETE
    for directory, needed, free in disks:
        if needed > free:
            space = f"{needed / 1e9:.2f} GB needed and {free / 1e9:.2f} GB free for {run}, on the disk of {directory}"
            raise Stop(f"disk space: {space}; free some, use --keep last, or {elsewhere}", ENVIRONMENT)

    with writing(run, elsewhere):
        lock = open_run(run)
    with lock:
        begin(run, settings, data, str(Path(args.dataset).absolute()) if args.dataset.endswith(".npz") else None)
        print(f"run: {run}, {duration_line(items, len(data.x_train))}")
        progress = Progress(members, len(data.x_train))
        finite = train_cnn(members[0], data, lock, progress)
    status = convert_run(members[1:], data, args.keep, progress)
    if not finite:
        status = DIVERGED
    print(f"{'complete' if status == COMPLETE else 'ended, with divergence'}: {run}")
    return status


if __name__ == "__main__":
    finish(main, sys.argv)
