"""Convert a run's CNN, by default into locally connected networks (eLCNs), and train on from there.

    python convert.py RUN [--split 28 ...] [--convert_to lc tied cnn ...]

RUN is a directory that experiments.py made; its settings come from RUN/config.json. All of the run's splits are
converted unless some are named; each needs the CNN's checkpoint of that epoch. Several processes may train different
networks of one run at once.
"""

import argparse
import functools
import sys
from pathlib import Path

from rnorm.cli import (
    COMPLETE, DIVERGED, ENVIRONMENT, Parser, Stop, check_signals, finish, note_signals, stopping_at_once,
)  # fmt: skip

if __name__ == "__main__":
    note_signals()  # torch takes seconds to import; a signal in that time must not be lost

import torch
from torch import nn

from models import IMAGE_SHAPE, make_network
from rnorm.checkpoints import Track, load_weights, save
from rnorm.conversions import CONVERSIONS, find_conversion, layers_of
from rnorm.data import Data, NoData, load_data
from rnorm.devices import DeviceError, pick_device, set_precision
from rnorm.files import RnormError, lock_directory
from rnorm.measure import evaluate, logits_of, training_flop
from rnorm.runs import Member, Settings, diverged_at, read_config
from train import Session, make_step, train, train_epoch


def largest_difference(a: nn.Module, b: nn.Module, x: torch.Tensor) -> float:
    """The largest difference of two networks' logits on images `x`, relative to the largest logit."""
    logits = logits_of(a, x)
    return ((logits_of(b, x) - logits).abs().max() / logits.abs().max()).item()


def cnn_track(session: Session) -> Track:
    """The run's CNN at its start, before any training."""
    settings = session.settings
    torch.manual_seed(settings.seed)
    cnn = make_network(settings.network, session.data.num_classes)
    cnn.to(session.device, session.data.x_train.dtype, memory_format=torch.channels_last)
    return Track(session.run, Member(settings), cnn, [settings.cnn_lr] * len(list(cnn.parameters())))


def load_cnn(session: Session, epoch: int) -> nn.Module:
    """The run's CNN after `epoch` epochs; a checkpoint that was deleted or is damaged is made anew."""
    track = cnn_track(session)
    track.restore_before(epoch)
    if track.evaluated[-1:] != [epoch]:
        with lock_directory(session.run):
            remake(track, epoch, session)
    return track.model


def remake(track: Track, epoch: int, session: Session) -> None:
    """Train the CNN on from an earlier checkpoint, and write that of `epoch` alone."""
    print(f"CNN: {track.path(epoch).name} is not on disk; it is made anew from epoch {track.epoch}")
    step = make_step(track, session)
    if not track.history:
        track.append(evaluate(track.net, step.net, session.data))
    while track.epoch < epoch:
        train_epoch(track, step, session)
        track.append(evaluate(track.net, step.net, session.data))
    save(track.state(), track.path(epoch))


def convert_and_train(session: Session, member: Member) -> bool:
    """Convert the run's CNN after `member.split` epochs and train the result; returns whether its loss stays finite.

    Goes on from where an earlier call was stopped. Raises RnormError if the CNN has not come that far, and Stop if the
    converted network does not compute the CNN's function on a batch of the training data.
    """
    check_signals()
    run, settings, image_shape = session.run, session.settings, session.data.image_shape
    conversion = find_conversion(member.conversion)
    cnn_at_start = cnn_track(session)
    path = cnn_at_start.path(member.split)
    if not path.exists() and member.split not in cnn_at_start.recorded_epochs():
        raise RnormError(f"{path} does not exist; train the CNN that far first (experiments.py)")
    model = conversion.convert(cnn_at_start.model, image_shape)
    rates = conversion.rates(layers_of(model), image_shape, member.lr)
    with lock_directory(member.directory(run)):
        track = Track(run, member, model, rates, session.keep or conversion.keep)
        track.restore()
        if not track.history:  # only now is the CNN's checkpoint needed
            set_precision(settings.precision)
            cnn = load_cnn(session, member.split)
            load_weights(model, {"weights": conversion.convert(cnn, image_shape).state_dict()})
            set_precision("float32")
            difference = largest_difference(cnn, model, session.data.x_train[: settings.batch_size])
            if not difference <= 1e-5:
                raise Stop(f"{member.label}: its logits differ from the CNN's by {difference:.1e} of the largest")
        set_precision(settings.precision)
        return train(track, session)


def convert_run(session: Session, members: list[Member]) -> int:
    """`convert_and_train` for several networks, one after another; returns the exit status.

    Splits past an epoch in which the CNN diverged are skipped and listed.
    """
    diverged = diverged_at(session.run, Member(session.settings))
    status, skipped = COMPLETE, []
    for member in members:
        if diverged is not None and member.split >= diverged:
            skipped.append(member.label)
        elif not convert_and_train(session, member):
            status = DIVERGED
    if skipped:
        print(f"skipped, as the CNN diverged in epoch {diverged}: {', '.join(skipped)}")
        status = DIVERGED
    return status


def work_of(members: list[Member], images: int) -> dict[Member, float]:
    """The FLOP that training each network to its end takes."""
    work = {}
    for member in members:
        _, flop = size_of(member.settings.network, member.conversion)
        work[member] = member.epochs * images * flop
    return work


@functools.lru_cache
def size_of(network: str, conversion: str) -> tuple[int, int]:
    """(number of parameters, FLOP of training on one image) of a network for ten classes; raises ValueError for a
    conversion that cannot be."""
    # A network is made for it. (On torch's meta device shapes alone would do, but that imports torch's compiler,
    # seconds in every process.)
    net = make_network(network, 10)
    if conversion:
        net = find_conversion(conversion).convert(net, IMAGE_SHAPE)
    return sum(p.numel() for p in net.parameters()), training_flop(layers_of(net), IMAGE_SHAPE)


def open_data(dataset: str, data_dir: Path, settings: Settings, device: torch.device, otherwise: str = "") -> Data:
    """`data.load_data` for a script, of a run's size and precision; a signal stops it at once.

    `otherwise` is what to do where the data are not to be had.
    """
    dtype = torch.float64 if settings.precision == "float64" else torch.float32
    try:
        with stopping_at_once():
            return load_data(dataset, data_dir, settings.data_size, device, dtype)
    except NoData as error:
        raise Stop(f"{error}; name its directory with --data_dir{otherwise}") from None


def data_of_run(run: Path, data_dir: Path, device: torch.device) -> Data:
    """The images that a run was made with; raises Stop if those to be found are others."""
    settings, config = read_config(run)
    data = open_data(config.get("dataset_file") or settings.dataset, data_dir, settings, device)
    if data.sha256 != config.get("data_sha256"):
        remedy = "put that in its place, or name its directory with --data_dir"
        raise Stop(f"{settings.dataset} here is not the data of {run}; {remedy}")
    return data


def open_device(name: str) -> torch.device:
    """`devices.pick_device` for a script."""
    try:
        return pick_device(name)
    except DeviceError as error:
        raise Stop(f"--device {name}: {error}; or use --device cpu", ENVIRONMENT) from None


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that experiments.py and convert.py share; none is part of a run's identity."""
    parser.add_argument(
        "--convert_to", nargs="+", default=["lc"], metavar="NAME",
        help=f"conversions: {', '.join(CONVERSIONS)}, or lc with indices of layers, such as lc1+9 (default: lc)",
    )  # fmt: skip
    parser.add_argument(
        "--keep", choices=("all", "last"),
        help="which checkpoints of converted networks stay on disk, of skinnyprime's eLCN 31 MB each; all are needed "
        "only to study weights (default: all, of fc the last)",
    )  # fmt: skip
    add_data_flags(parser)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Where the images lie, and what computes."""
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data"), metavar="DIR", help="where the images lie (default: data)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: auto, CUDA if there is one"
    )


def members_to_train(settings: Settings, conversions: list[str], splits: list[int]) -> list[Member]:
    """The converted networks that a command line asks for; raises Stop for a conversion that cannot be."""
    for name in conversions:
        try:
            size_of(settings.network, name)
        except ValueError as error:
            raise Stop(f"--convert_to {error}") from None
    return [Member(settings, name, split) for name in dict.fromkeys(conversions) for split in sorted(set(splits))]


def main(argv: list[str]) -> int:
    """Convert and train as the command line `argv` says; returns the exit status."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a directory that experiments.py made")
    parser.add_argument(
        "--split", type=int, nargs="+", metavar="EPOCH", help="split epochs (default: all of the run's)"
    )
    add_common_flags(parser)
    args = parser.parse_args(argv)
    settings, config = read_config(args.run)
    splits = args.split or settings.split_epochs
    if unknown := sorted(set(splits) - set(settings.split_epochs)):
        raise Stop(f"--split {unknown[0]}: the run's splits are {' '.join(map(str, settings.split_epochs))}")
    members = members_to_train(settings, args.convert_to, splits)
    device = open_device(args.device)
    data = data_of_run(args.run, args.data_dir, device)
    work = work_of(members, len(data.x_train))
    session = Session(args.run, settings, data, device, args.keep, work)
    session.begin(config.get("dataset_file"))
    return convert_run(session, members)


if __name__ == "__main__":
    finish(main, sys.argv)
