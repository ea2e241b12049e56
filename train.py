"""Training: one network, from wherever it stands to its last epoch, recorded and saved on the way."""

import io
import math
import sys
from datetime import datetime
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from models import make_network, size_of
from rnorm.checkpoints import Track
from rnorm.cli import ENVIRONMENT, Stop, is_out_of_memory
from rnorm.data import Data
from rnorm.devices import describe, set_precision, several_gpus_note
from rnorm.fast import Step
from rnorm.measure import evaluate
from rnorm.runs import Member, Settings, environment, write_config
from rnorm.signals import check_signals, note_progress


def work_of(member: Member, images: int) -> int:
    """The FLOP that all of a network's training takes, with `images` in an epoch."""
    _, flop = size_of(member.settings.network, member.conversion)
    return member.epochs * images * flop


class Progress:
    """What a person sees: one bar for all that a command trains, in FLOP; in a file, a line for each evaluation.

    `members` are trained in their order, with `images` in an epoch. What was done before counts as done, but not at
    this speed, so tqdm's estimate is the time to the end of everything.
    """

    def __init__(self, members: list[Member], images: int):
        self.images, self.terminal = images, sys.stdout.isatty()
        self.flop = {member: size_of(member.settings.network, member.conversion)[1] for member in members}  # an image's
        self.bar = tqdm(
            total=sum(work_of(member, images) for member in members),
            unit="FLOP", unit_scale=True, smoothing=0, dynamic_ncols=True,
            file=sys.stdout if self.terminal else io.StringIO(), bar_format=None if self.terminal else "{remaining}",
            leave=False, delay=0.01,  # until there is something to show, messages have the line
        )  # fmt: skip

    def begin(self, track: Track) -> None:
        """Show the network of `track`, and count as done what it has done."""
        self.member = track.member
        done = work_of(self.member, self.images)
        if not track.ended:
            images = track.epoch * self.images + track.step * self.member.settings.batch_size
            done = images * self.flop[self.member]
        self.bar.n += done
        self.bar.initial += done
        place = list(self.flop).index(self.member) + 1
        self.name = f"{self.member.label} ({place} of {len(self.flop)})"
        self.bar.set_description(self.name, refresh=False)

    def stepped(self, images: int) -> None:
        note_progress()
        self.bar.update(images * self.flop[self.member])

    def recorded(self, track: Track, values: dict[str, float]) -> None:
        note_progress()
        text = f"epoch {track.epoch}/{self.member.epochs}"
        text += f", loss {values['train_loss']:.3f}, test {values['test_acc']:.2f} %"
        if self.terminal:
            self.bar.set_postfix_str(text)
        else:
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {self.name}: {text}, {self.bar} left in all", flush=True)

    def skip(self, member: Member) -> None:
        """Leave out a network that will not be trained."""
        self.bar.total -= work_of(member, self.images)


def begin(run: Path, settings: Settings, data: Data, dataset_file: str | None) -> None:
    """Write or compare the run's config.json, and set the precision of products."""
    device = data.x_train.device
    layers = [repr(layer) for layer in start_cnn(settings, data).net]
    config = {"data_sha256": data.sha256, "layers": layers, "dataset_file": dataset_file}
    write_config(run, settings, config | environment(describe(device), torch.get_num_threads()))
    set_precision(settings.precision)
    if note := several_gpus_note(device):
        print(f"{note}; docs/cluster.md tells how to use more")


def start_cnn(settings: Settings, data: Data) -> nn.Module:
    """The CNN of these settings before any training, on the device of `data`."""
    torch.manual_seed(settings.seed)
    cnn = make_network(settings.network, data.num_classes)
    return cnn.to(data.x_train.device, data.x_train.dtype, memory_format=torch.channels_last)


def cnn_track(cnn: Member, data: Data) -> Track:
    """The run's CNN before any training, and its files."""
    model = start_cnn(cnn.settings, data)
    return Track(cnn, model, [cnn.lr for _ in model.parameters()])


def epoch_order(n: int, settings: Settings, epoch: int) -> torch.Tensor | None:
    """The order of the training images in epoch `epoch` of any network; None: as they lie in the data set."""
    if not settings.shuffle:
        return None
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator)


def make_step(track: Track, data: Data) -> Step:
    size = track.member.settings.batch_size
    return Step(track.net, data.image_shape, track.rates, batch_size=size, optimizer=track.optimizer)


def train(track: Track, data: Data, progress: Progress) -> bool:
    """Train `track` to its last epoch; returns whether its loss stayed finite.

    Evaluates and checkpoints at the network's evaluations, saves `latest.pyT` now and then and when interrupted. Once
    per epoch the loss is read from the device and checked: a network that diverged ends there, and its history says so.
    A network that has ended is not trained.
    """
    member = track.member
    progress.begin(track)
    if track.ended:
        print(f"{member.label}: {f'diverged in epoch {track.evaluated[-1]}' if track.diverged else 'complete'}")
        return not track.diverged
    if track.history:
        print(f"{member.label}: continues in epoch {min(track.epoch + 1, member.epochs)}")
    step = make_step(track, data)
    try:
        while not track.ended:
            if track.due:
                values = evaluate(track.net, step.net, data)
                finite = math.isfinite(values["train_loss"] + values["test_loss"])
                if finite:
                    track.record(values)
                    progress.recorded(track, values)
            else:
                finite = train_epoch(track, step, data, progress)
            if not finite:
                track.record_divergence()
    except KeyboardInterrupt:
        track.save_latest()
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # Nothing is saved now: memory may have ended in the midst of a step, when some weights had taken it.
        message = f"{member.label}: out of memory; lower --batch_size. What was saved before is intact"
        raise Stop(message, ENVIRONMENT) from None
    finally:
        track.wait()
        progress.bar.clear()
    if track.diverged:
        remedy = "lower its learning rate"
        print(f"{member.label}: the loss is no longer finite in epoch {track.epoch}; {remedy}", file=sys.stderr)
    return not track.diverged


def train_epoch(track: Track, step: Step, data: Data, progress: Progress | None = None) -> bool:
    """Train to the end of the epoch that `track` stands in; returns whether the loss is finite.

    `progress`, if given, is told of every step, and `latest.pyT` is saved now and then.
    """
    x, y, size = data.x_train, data.y_train, track.member.settings.batch_size
    order = epoch_order(len(x), track.member.settings, track.epoch)
    if order is not None:
        order = order.to(x.device)
    track.net.train()
    for start in range(track.step * size, len(x), size):
        check_signals()
        batch = slice(start, start + size)
        if order is not None:
            batch = order[batch]
        step(x[batch], y[batch])
        track.step += 1
        if progress:
            progress.stepped(len(y[batch]))
            track.save_now_and_then()
    track.epoch, track.step = track.epoch + 1, 0
    return math.isfinite(step.take_loss())
