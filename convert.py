"""Untie a run's CNN into locally connected networks (eLCNs) and train them.

    python convert.py RUN [--split 28 ...]

RUN is a directory that experiments.py made; its settings come from RUN/config.json. All of the run's splits are
converted unless some are named; each needs the CNN's checkpoint of that epoch. Several processes may train different
splits of one run at once.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

from cli import COMPLETE, DIVERGED, Interrupt, Parser, Stop, finish
from runs import Settings, checkpoint_path, label, lock_network, network_directory, read_status

if __name__ == "__main__":
    INTERRUPT = Interrupt()  # torch takes seconds to import; a signal in that time must not be lost

import torch
from torch import nn

from checkpoints import Damaged, Track, load, load_weights
from data import load_data
from measure import logits_of
from models import LocallyConnected2d, layer_shapes, skinnyprime
from train import Session, pick_device, set_precision, train

COPIED = (
    nn.ZeroPad2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.Dropout,
    nn.Dropout2d, nn.Flatten, nn.Linear,
)  # fmt: skip


def untie(net: nn.Sequential, image_shape: tuple[int, ...]) -> nn.Sequential:
    """The equivalent locally connected network (eLCN) of `net`, for images of shape (C, H, W); `net` stays as it is.

    Every Conv2d becomes a LocallyConnected2d with the same filter at each position; the layers in COPIED are copied.
    Raises Stop, naming the layer, for any other. Source: arXiv:1906.06766, section 2.
    """
    for i, layer in enumerate(net):
        if type(layer) is not nn.Conv2d and type(layer) not in COPIED:
            raise Stop(f"layer {i}, {type(layer).__name__}, cannot be untied; see COPIED in convert.py")
    shapes = layer_shapes(net, image_shape)
    layers = []
    for i, layer in enumerate(net):
        try:
            is_conv = type(layer) is nn.Conv2d
            layers.append(LocallyConnected2d.from_conv2d(layer, shapes[i][1:]) if is_conv else copy.deepcopy(layer))
        except ValueError as error:
            raise Stop(f"layer {i} cannot be untied: {error}") from None
    return nn.Sequential(*layers)


def largest_difference(net: nn.Module, untied: nn.Module, x: torch.Tensor) -> float:
    """The largest difference of two networks' logits on images `x`, relative to the largest logit."""
    logits = logits_of(net, x)
    return ((logits_of(untied, x) - logits).abs().max() / logits.abs().max()).item()


def load_cnn(session: Session, epoch: int) -> nn.Module:
    """The run's CNN after `epoch` epochs; raises Stop if its checkpoint is missing or damaged."""
    path = checkpoint_path(session.run, None, epoch)
    cnn = session.make_cnn(session.data.num_classes).to(session.device)
    try:
        load_weights(cnn, load(path))
    except FileNotFoundError:
        raise Stop(f"{path} does not exist; train the CNN that far first (experiments.py)") from None
    except Damaged as damage:
        raise Stop(f"{path} is damaged ({damage}); repeat the run's experiments.py command to make it anew") from None
    return cnn


def convert_and_train(session: Session, split: int) -> bool:
    """Untie the run's CNN after `split` epochs and train the eLCN to its end; returns whether its loss stays finite.

    Goes on from where an earlier call was stopped. Raises Stop if the CNN's checkpoint is missing or damaged, or if
    the untied network does not compute the CNN's function on a batch of the training data.
    """
    session.interrupt.check()
    run, settings = session.run, session.settings
    cnn = load_cnn(session, split)
    untied = untie(cnn.net, session.image_shape)
    with lock_network(network_directory(run, split)):
        track = Track(run, split, untied, settings.lc_lr, settings.elcn_epochs, settings.elcn_evaluations, session.keep)
        track.restore()
        if not track.history:
            set_precision("float32")
            difference = largest_difference(cnn, untied, session.data.x_train[: settings.batch_size])
            if not difference <= 1e-5:
                raise Stop(f"{label(split)}: its logits differ from the CNN's by {difference:.1e} of the largest")
        set_precision(settings.precision)
        return train(track, session)


def convert_run(session: Session, splits: list[int]) -> int:
    """`convert_and_train` for several splits, one after another; returns the exit status.

    Splits past an epoch in which the CNN diverged are skipped and listed.
    """
    diverged_at = read_status(session.run)["networks"].get(label(None), {}).get("diverged_at")
    lacking = [split for split in splits if not checkpoint_path(session.run, None, split).exists()]
    skipped = [] if diverged_at is None else lacking
    finite = [convert_and_train(session, split) for split in splits if split not in skipped]
    if skipped:
        print(f"skipped, as the CNN diverged in epoch {diverged_at}: splits {' '.join(map(str, skipped))}")
    return COMPLETE if all(finite) and not skipped else DIVERGED


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that experiments.py and convert.py share; none is part of a run's identity."""
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data"), metavar="DIR", help="where the images lie (default: data)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: auto, CUDA if there is one"
    )
    parser.add_argument(
        "--keep", choices=("all", "last"), default="all",
        help="which eLCN checkpoints stay on disk, of 31 MB each; all are needed only to study weights (default: all)",
    )  # fmt: skip


def main(argv: list[str], interrupt: Interrupt, make_cnn: Callable[[int], nn.Module] = skinnyprime) -> int:
    """Convert and train as the command line `argv` says; returns the exit status."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a directory that experiments.py made")
    parser.add_argument(
        "--split", type=int, nargs="+", metavar="EPOCH", help="split epochs (default: all of the run's)"
    )
    add_common_flags(parser)
    args = parser.parse_args(argv)
    settings, config = Settings.of_run(args.run)
    splits = args.split or settings.split_epochs
    if unknown := sorted(set(splits) - set(settings.split_epochs)):
        raise Stop(f"--split {unknown[0]}: the run's splits are {' '.join(map(str, settings.split_epochs))}")
    device = pick_device(args.device)
    dataset = config.get("dataset_file") or settings.dataset
    with interrupt.at_once():
        data = load_data(dataset, args.data_dir, settings.data_size, device)
    session = Session(args.run, settings, data, device, interrupt, args.keep, make_cnn)
    session.begin(config.get("dataset_file"))
    return convert_run(session, splits)


if __name__ == "__main__":
    finish(main, sys.argv, INTERRUPT)
