"""Convert a run's CNN, by default into locally connected networks (eLCNs), and train on from there.

    python convert.py RUN [--split 28 ...] [--convert_to lc tied cnn ...]

RUN is a directory that experiments.py made; its settings come from RUN/config.json. All of the run's splits are
converted unless some are named. Several processes may train different networks of one run at once.
"""

import copy
import functools
import sys
import time
from pathlib import Path

from rnorm.cli import COMPLETE, DIVERGED, Parser, Stop, check_signals, finish, note_signals

if __name__ == "__main__":
    note_signals()  # torch takes seconds to import; a signal in that time must not be lost

import torch
from torch import nn

from models import make_network
from rnorm.conversions import find_conversion
from rnorm.data import Data
from rnorm.devices import describe, set_precision, several_gpus_note
from rnorm.fast import streamline
from rnorm.files import RnormError, lock_directory
from rnorm.flags import add_training_flags, data_of_run, open_device
from rnorm.measure import EVALUATION_BATCH, logits_of
from rnorm.plan import Item
from rnorm.progress import Progress
from rnorm.runs import Member, Settings, compare_config, environment, read_config, write_config
from rnorm.store import Store, good_history, past_divergence
from train import SGD, Training, make_step, start_cnn, train, train_epoch


def begin(run: Path, settings: Settings, data: Data, dataset_file: str | None, plan_only: bool = False) -> None:
    """Write the run's config.json, or compare with it, and set the precision of products; for a plan only compare.

    Raises RnormError if the run there is another.
    """
    device = data.x_train.device
    layers = [repr(layer) for layer in make_network(settings.network, data.num_classes, data.image_shape)]
    identity = {"data_sha256": data.sha256, "layers": layers}
    set_precision(settings.precision)
    if plan_only:
        compare_config(run, settings, identity)
        return
    made = {"dataset_file": dataset_file, "normalisation": {"mean": list(data.mean), "std": list(data.std)}}
    write_config(run, settings, identity | made | environment(describe(device), torch.get_num_threads()))
    if note := several_gpus_note(device):
        print(f"{note}; docs/cluster.md tells how to use more")


def largest_difference(a: nn.Module, b: nn.Module, x: torch.Tensor) -> float:
    """The largest difference of two networks' logits on images `x`, relative to the largest logit, in float64."""
    logits, others = (logits_of(copy.deepcopy(net).double(), x.double()) for net in (a, b))
    return ((others - logits).abs().max() / logits.abs().max()).item()


def trained_cnn(cnn: Member, epoch: int, data: Data) -> nn.Sequential:
    """The run's CNN after `epoch` epochs.

    Where its checkpoint is gone or damaged, the epochs from the one before are repeated, and nothing is written.
    """
    training = start_cnn(cnn, data)
    Store(cnn, data).restore_before(training, epoch)
    if training.epoch < epoch:
        print(f"CNN: {cnn.checkpoint(epoch).name} is not on disk; its epochs from {training.epoch} on are repeated")
        take_step = make_step(streamline(training.net, data.image_shape), training.sgd, cnn.settings.batch_size)
        while training.epoch < epoch:
            train_epoch(training, take_step, data)
    return training.net


def start_converted(member: Member, cnn: nn.Sequential, data: Data) -> Training:
    """The training of what a conversion makes of `cnn`, at its start."""
    conversion, shape = find_conversion(member.conversion), data.image_shape
    net, settings = conversion.convert(cnn, shape), member.settings
    rates = conversion.rates(net, shape, member.lr)
    return Training(member, net, SGD(net, rates, member.lr, settings.momentum, settings.weight_decay))


def convert_and_train(member: Member, data: Data, keep: str | None, progress: Progress) -> bool:
    """Convert the run's CNN after `member.split` epochs and train the result; returns whether its loss stays finite.

    Goes on from where an earlier call was stopped. Raises RnormError if the CNN has not come that far, and Stop if the
    converted network does not compute the CNN's function on a batch of the training data.
    """
    check_signals()
    cnn = Member(member.run, member.settings)
    path, history = cnn.checkpoint(member.split), good_history(cnn)
    if not path.exists() and (history is None or member.split not in history["checkpoints"]):
        raise RnormError(f"{path} does not exist; train the CNN that far first (experiments.py)")
    with lock_directory(member.directory) as lock:
        store = Store(member, data, lock, keep or find_conversion(member.conversion).keep)
        training = None
        if member.history_file.exists() or store.checkpoints():  # its weights come from its own files
            training = start_converted(member, start_cnn(cnn, data).net, data)
            store.restore(training)
        if training is None or not training.history:
            tied = trained_cnn(cnn, member.split, data)
            training = start_converted(member, tied, data)
            difference = largest_difference(tied, training.net, data.x_train[: member.settings.batch_size])
            if not difference <= 1e-9:
                raise Stop(f"{member.label}: its logits differ from the CNN's by {difference:.1e} of the largest")
        return train(training, store, data, progress)


def convert_run(members: list[Member], data: Data, keep: str | None, progress: Progress) -> int:
    """`convert_and_train` for several networks of a run, one after another; returns the exit status.

    Splits past an epoch in which the CNN diverged are skipped and listed.
    """
    status, skipped = COMPLETE, []
    for member in members:
        if past_divergence(member):
            skipped.append(member.label)
            progress.skip(member)
        elif not convert_and_train(member, data, keep, progress):
            status = DIVERGED
    if skipped:
        print(f"skipped, as the CNN diverged before: {', '.join(skipped)}")
        status = DIVERGED
    return status


def members_to_train(run: Path, settings: Settings, conversions: list[str], splits: list[int]) -> list[Member]:
    """The converted networks that a command line asks for; raises Stop for a conversion that there is not."""
    for name in conversions:
        try:
            find_conversion(name)
        except ValueError as error:
            raise Stop(f"--convert_to {error}") from None
    return [Member(run, settings, name, split) for name in dict.fromkeys(conversions) for split in sorted(set(splits))]


def plan_items(members: list[Member], data: Data) -> list[Item]:
    """The networks with their numbers of parameters, and the times of a step and an evaluation of each kind here.

    Raises Stop for a conversion that the network does not allow.
    """
    cost = functools.cache(lambda conversion: measure_cost(Member(Path(), members[0].settings, conversion), data))
    return [Item(member, *cost(member.conversion)) for member in members]


def measure_cost(member: Member, data: Data) -> tuple[int, float, float]:
    """(parameters, seconds of a training step, seconds of an evaluation) of a network, from three steps taken here."""
    training, size = start_cnn(Member(member.run, member.settings), data), member.settings.batch_size
    if not member.is_cnn:
        try:
            training = start_converted(member, training.net, data)
        except ValueError as error:
            raise Stop(f"--convert_to {member.conversion}: {error}") from None
    fast = streamline(training.net, data.image_shape)
    take_step = make_step(fast, training.sgd, size)
    x, y = data.x_train[:size].contiguous(), data.y_train[:size].contiguous()
    start, times = time.perf_counter(), []
    for _ in range(3):  # the first makes its graph, or finds its memory
        take_step(x, y).item()  # waits for the device
        times.append(time.perf_counter())
    images = len(data.x_train) + len(data.x_test)
    logits_of(fast, x[:EVALUATION_BATCH])[0, 0].item()
    evaluation = (time.perf_counter() - times[-1]) * images / len(x[:EVALUATION_BATCH])
    return sum(p.numel() for p in training.net.parameters()), min(times[2] - times[1], times[2] - start), evaluation


def main(argv: list[str]) -> int:
    """Convert and train as the command line `argv` says; returns the exit status. One call at a time in a process."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a directory that experiments.py made")
    parser.add_argument(
        "--split", type=int, nargs="+", metavar="EPOCH", help="split epochs (default: all of the run's)"
    )
    add_training_flags(parser)
    args = parser.parse_args(argv)
    settings, config = read_config(args.run)
    splits = args.split or settings.split_epochs
    if unknown := sorted(set(splits) - set(settings.split_epochs)):
        raise Stop(f"--split {unknown[0]}: the run's splits are {' '.join(map(str, settings.split_epochs))}")
    members = members_to_train(args.run, settings, args.convert_to, splits)
    data = data_of_run(args.run, args.data_dir, open_device(args.device))
    begin(args.run, settings, data, config.get("dataset_file"))
    return convert_run(members, data, args.keep, Progress(members, len(data.x_train)))


if __name__ == "__main__":
    finish(main, sys.argv)
