"""Convert a run's CNN, by default into locally connected networks (eLCNs), and train on from there.

    python convert.py RUN [--split 28 ...] [--convert_to lc tied cnn ...]

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

from models import size_of
from rnorm.checkpoints import Track, past_divergence, recorded
from rnorm.conversions import find_conversion, layers_of
from rnorm.data import Data
from rnorm.files import RnormError, lock_directory
from rnorm.flags import add_training_flags, data_of_run, open_device
from rnorm.measure import logits_of
from rnorm.runs import Member, Settings, read_config
from train import Progress, begin, cnn_track, make_step, start_cnn, train, train_epoch


def largest_difference(a: nn.Module, b: nn.Module, x: torch.Tensor) -> float:
    """The largest difference of two networks' logits on images `x`, relative to the largest logit, in float64."""
    logits, others = (logits_of(copy.deepcopy(net).double(), x.double()) for net in (a, b))
    return ((others - logits).abs().max() / logits.abs().max()).item()


def trained_cnn(cnn: Member, epoch: int, data: Data) -> nn.Module:
    """The run's CNN after `epoch` epochs.

    Where its checkpoint is gone or damaged, the epochs from the one before are repeated, and nothing is written.
    """
    track = cnn_track(cnn, data)
    track.restore_before(epoch)
    if track.epoch < epoch:
        print(f"CNN: {cnn.checkpoint(epoch).name} is not on disk; its epochs from {track.epoch} on are repeated")
        step = make_step(track, data)
        while track.epoch < epoch:
            train_epoch(track, step, data)
    return track.model


def convert_and_train(member: Member, data: Data, keep: str | None, progress: Progress) -> bool:
    """Convert the run's CNN after `member.split` epochs and train the result; returns whether its loss stays finite.

    Goes on from where an earlier call was stopped. Raises RnormError if the CNN has not come that far, and Stop if the
    converted network does not compute the CNN's function on a batch of the training data.
    """
    check_signals()
    cnn, conversion = Member(member.run, member.settings), find_conversion(member.conversion)
    path, history = cnn.checkpoint(member.split), recorded(cnn)
    if not path.exists() and (history is None or member.split not in history["checkpoints"]):
        raise RnormError(f"{path} does not exist; train the CNN that far first (experiments.py)")
    model = conversion.convert(start_cnn(member.settings, data), data.image_shape)
    rates = conversion.rates(layers_of(model), data.image_shape, member.lr)
    track = Track(member, model, rates, keep or conversion.keep)
    with lock_directory(member.directory):
        track.restore()
        if not track.history:  # only now is the CNN's checkpoint needed
            tied = trained_cnn(cnn, member.split, data)
            model.load_state_dict(conversion.convert(tied, data.image_shape).state_dict())
            difference = largest_difference(tied, model, data.x_train[: member.settings.batch_size])
            if not difference <= 1e-9:
                raise Stop(f"{member.label}: its logits differ from the CNN's by {difference:.1e} of the largest")
        return train(track, data, progress)


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
    """The converted networks that a command line asks for; raises Stop for a conversion that cannot be."""
    for name in conversions:
        try:
            find_conversion(name)
            size_of(settings.network, name)
        except ValueError as error:
            raise Stop(f"--convert_to {error}") from None
    return [Member(run, settings, name, split) for name in dict.fromkeys(conversions) for split in sorted(set(splits))]


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
