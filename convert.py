"""Convert a run's CNN, by default into locally connected networks (eLCNs), and train on from there.

    python convert.py RUN [--split 28 ...] [--convert_to lc tied cnn ...]
    python convert.py RUN --evaluate        train nothing; add new quantities of `evaluate` to the histories of a run

RUN is a directory that experiments.py made; its settings come from RUN/config.json. All of the run's splits are
converted unless some are named. Several processes may train different networks of one run at once.
"""

import copy
import sys
from pathlib import Path

from rnorm.cli import COMPLETE, DIVERGED, Parser, Stop, finish
from rnorm.signals import check_signals, note_signals

if __name__ == "__main__":
    note_signals()  # torch takes seconds to import; a signal in that time must not be lost

import torch
from torch import nn
from tqdm import tqdm

from models import make_network
from rnorm.conversions import find_conversion
from rnorm.data import Data
from rnorm.devices import describe, set_precision, several_gpus_note
from rnorm.fast import streamline
from rnorm.files import Damaged, RnormError, lock_directory
from rnorm.flags import add_training_flags, data_of_run, open_device
from rnorm.history import completed
from rnorm.measure import evaluate, logits_of
from rnorm.progress import Progress
from rnorm.runs import Member, Settings, compare_config, converted_members, environment, read_config, write_config
from rnorm.store import Store, good_history, load, load_history, load_weights, past_divergence
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


def start(member: Member, data: Data) -> Training:
    """Any network of a run before its weights are read from its own files."""
    training = start_cnn(Member(member.run, member.settings), data)
    return training if member.is_cnn else start_converted(member, training.net, data)


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
            training = start(member, data)
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


def evaluate_again(member: Member, data: Data, bar: tqdm) -> None:
    """Evaluate every checkpoint of a network anew and complete its history with what `evaluate` records today.

    What was recorded stays, and is compared; where a checkpoint is gone, new quantities are NaN. Written whole, at the
    end. `bar` is told of every evaluation.
    """
    with lock_directory(member.directory) as lock:
        history, store = load_history(member), Store(member, data, lock)
        if history is None:
            return
        net = start(member, data).net
        fast = streamline(net, data.image_shape)
        measured = {}  # an epoch to what is recorded of it today
        for epoch in history["checkpoints"]:
            try:
                load_weights(net, load(member.checkpoint(epoch)))
                measured[epoch] = evaluate(net, fast, data)
            except (FileNotFoundError, Damaged):
                pass
            bar.update()
        history, differing = completed(history, measured)
        if measured:
            store.write_history(history)
    bar.clear()
    gone = len(history["checkpoints"]) - len(measured)
    print(f"{member.label}: {len(measured)} evaluations measured again" + (f"; {gone} have no checkpoint" * bool(gone)))
    for key, (count, largest) in differing.items():
        print(f"  {key} differs at {count}, by up to {largest:.3g}; the old values stay. Record it under another name")


def evaluate_run(run: Path, settings: Settings, data: Data) -> int:
    """`evaluate_again` for every network of a run; returns the exit status."""
    members = [Member(run, settings), *converted_members(run, settings)]
    count = sum(len((good_history(member) or {"checkpoints": []})["checkpoints"]) for member in members)
    with tqdm(total=count, unit="evaluations", disable=None, leave=False) as bar:
        for member in members:
            evaluate_again(member, data, bar)
    return COMPLETE


def main(argv: list[str]) -> int:
    """Convert and train as the command line `argv` says; returns the exit status. One call at a time in a process."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a directory that experiments.py made")
    parser.add_argument(
        "--split", type=int, nargs="+", metavar="EPOCH", help="split epochs (default: all of the run's)"
    )
    parser.add_argument(
        "--evaluate", action="store_true",
        help="train nothing; evaluate all checkpoints of RUN again, and add to its histories what they lack",
    )  # fmt: skip
    add_training_flags(parser)
    args = parser.parse_args(argv)
    settings, config = read_config(args.run)
    splits = args.split or settings.split_epochs
    if unknown := sorted(set(splits) - set(settings.split_epochs)):
        raise Stop(f"--split {unknown[0]}: the run's splits are {' '.join(map(str, settings.split_epochs))}")
    members = members_to_train(args.run, settings, args.convert_to, splits)
    data = data_of_run(args.run, args.data_dir, open_device(args.device))
    begin(args.run, settings, data, config.get("dataset_file"))
    if args.evaluate:
        return evaluate_run(args.run, settings, data)
    return convert_run(members, data, args.keep, Progress(members, len(data.x_train)))


if __name__ == "__main__":
    finish(main, sys.argv)
