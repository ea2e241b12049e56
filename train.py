"""Training: one network, from wherever it stands to its last epoch, with plain SGD, recorded and saved on the way."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from checkpoints import Track
from data import Data
from fast import Step
from measure import evaluate
from models import skinnyprime
from cli import ENVIRONMENT, Interrupt, Interrupted, Stop
from runs import Settings, begin_session, environment, label, network_status, read_status, write_config

SAVE_EVERY = 30.0  # seconds of work that a killed process can lose


@dataclass(frozen=True)
class Session:
    """One process's work on one run."""

    run: Path
    settings: Settings
    data: Data
    device: torch.device
    interrupt: Interrupt
    keep: str = "all"  # or "last": which eLCN checkpoints stay on disk
    make_cnn: Callable[[int], nn.Module] = skinnyprime  # number of classes to a network with its layers in `net`

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.data.x_train.shape[1:])

    def begin(self, dataset_file: str | None = None) -> None:
        """Write or compare config.json, and note the session in status.json."""
        here = environment(str(self.device), torch.get_num_threads())
        write_config(self.run, self.settings, self.data.sha256, dataset_file, here)
        begin_session(self.run, str(self.device))


def pick_device(name: str) -> torch.device:
    """The device named auto, cuda or cpu; raises Stop if it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise Stop("--device cuda: torch finds no CUDA device here; use --device cpu, or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def set_precision(precision: str) -> None:
    """Matrix products and convolutions in float32 throughout, or on CUDA in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def epoch_order(n: int, settings: Settings, epoch: int) -> torch.Tensor | None:
    """The order of the training images in epoch `epoch` of any network; None: as they lie in the data set."""
    if not settings.shuffle:
        return None
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator)


def train(track: Track, session: Session) -> bool:
    """Train `track` to its last epoch; returns whether its loss stayed finite.

    Evaluates and checkpoints at `track.evaluations`, saves `latest.pyT` every SAVE_EVERY seconds and when
    interrupted. Once per epoch the loss is read from the device and checked: a network that diverged ends there,
    its history so far stays, and repeating the call finds that in status.json and trains nothing.
    """
    name = label(track.split)
    diverged = read_status(track.run)["networks"].get(name, {}).get("diverged_at")
    evaluated = track.history.get("checkpoints", [])
    if type(diverged) is int and evaluated == [e for e in track.evaluations if e < diverged]:
        print(f"{name}: diverged in epoch {diverged}")
        return False
    if track.complete:
        print(f"{name}: complete")
        return True
    if track.history:
        print(f"{name}: continues in epoch {min(track.epoch + 1, track.epochs)}")
    step = Step(track.net, session.image_shape, track.lr)
    progress = Progress(track, math.ceil(len(session.data.x_train) / session.settings.batch_size))
    try:
        while not track.complete:
            due = track.epoch in track.evaluations and track.epoch not in track.history.get("checkpoints", [])
            if not due:
                _train_epoch(track, step, session, progress)
                if not math.isfinite(step.take_loss()):
                    break
                due = track.epoch in track.evaluations
            if due and not _record(track, step, session, progress):
                break
    except Interrupted:
        track.save_latest()
        raise
    except torch.OutOfMemoryError:
        track.save_latest()
        raise Stop(f"{name}: out of GPU memory; lower --batch_size. All before is saved", ENVIRONMENT) from None
    finally:
        progress.close()
    if track.complete:
        network_status(track.run, track.split, state="complete", epoch=track.epoch, seconds=progress.total_seconds)
        return True
    track.discard_latest()
    network_status(track.run, track.split, state="diverged", diverged_at=track.epoch, seconds=progress.total_seconds)
    print(f"{name}: the loss is no longer finite in epoch {track.epoch}; lower its learning rate", file=sys.stderr)
    return False


def _train_epoch(track: Track, step: Step, session: Session, progress: "Progress") -> None:
    """Train to the end of the epoch that `track` stands in."""
    x, y, size = session.data.x_train, session.data.y_train, session.settings.batch_size
    order = epoch_order(len(x), session.settings, track.epoch)
    track.net.train()
    for start in range(track.step * size, len(x), size):
        session.interrupt.check()
        batch = slice(start, start + size)
        if order is not None:
            batch = order[batch].to(x.device)
        step(x[batch], y[batch])
        track.step += 1
        progress.bar.update()
        if time.monotonic() - progress.last_save > SAVE_EVERY:
            track.save_latest()
            progress.last_save = time.monotonic()
    track.epoch, track.step = track.epoch + 1, 0


def _record(track: Track, step: Step, session: Session, progress: "Progress") -> bool:
    """Evaluate and record, unless the loss is no longer finite; returns whether it is."""
    values = evaluate(track.net, step.net, session.data, session.interrupt.check)
    if not math.isfinite(values["train_loss"] + values["test_loss"]):
        return False
    track.record(values)
    progress.recorded(values)
    return True


class Progress:
    """What a person sees of one network's training: a bar on a terminal, timestamped lines in a file."""

    def __init__(self, track: Track, steps: int):
        self.track, self.started, self.last_save = track, time.monotonic(), time.monotonic()
        status = read_status(track.run)["networks"].get(label(track.split), {})
        seconds = status.get("seconds", 0.0)
        self.seconds_before = seconds if isinstance(seconds, float) else 0.0
        self.first = track.epoch + track.step / steps
        self.bar = tqdm(
            total=track.epochs * steps, initial=track.epoch * steps + track.step, desc=label(track.split), unit="step",
            disable=not sys.stdout.isatty(), file=sys.stdout, dynamic_ncols=True, mininterval=0.3,
        )  # fmt: skip

    @property
    def total_seconds(self) -> float:
        """Time spent on the network, in all sessions."""
        return round(self.seconds_before + time.monotonic() - self.started, 3)

    def recorded(self, values: dict[str, float]) -> None:
        track = self.track
        self.last_save = time.monotonic()
        network_status(track.run, track.split, state="training", epoch=track.epoch, seconds=self.total_seconds)
        text = f"epoch {track.epoch}/{track.epochs}, loss {values['train_loss']:.3f}, test {values['test_acc']:.2f} %"
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
            return
        done = track.epoch - self.first
        if done > 0:
            left = (time.monotonic() - self.started) / done * (track.epochs - track.epoch)
            text += f", {left:.0f} s left"
        print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {label(track.split)}: {text}", flush=True)

    def close(self) -> None:
        self.bar.close()
