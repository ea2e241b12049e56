"""Training: one network, from wherever it stands to its last epoch, recorded and saved on the way."""

import math
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from rnorm.checkpoints import Track
from rnorm.cli import ENVIRONMENT, Interrupted, Stop, check_signals, is_out_of_memory
from rnorm.data import Data
from rnorm.devices import describe, several_gpus_note
from rnorm.fast import Step
from rnorm.measure import evaluate
from rnorm.runs import (
    AnotherRun, Member, Settings, begin_session, diverged_at, environment, network_status, note_network, write_config,
)  # fmt: skip

SAVE_EVERY = 30.0  # seconds of work that a killed process can lose


@dataclass(frozen=True)
class Session:
    """One process's work on one run."""

    run: Path
    settings: Settings
    data: Data
    device: torch.device
    keep: str | None = None  # which checkpoints of converted networks stay: all, last, or as the conversion has it
    work: dict[Member, float] = field(default_factory=dict)  # what this process trains, in order, and its FLOP

    def begin(self, dataset_file: str | None = None) -> None:
        """Write or compare config.json, and note the session in status.json."""
        here = environment(describe(self.device), torch.get_num_threads())
        try:
            write_config(self.run, self.settings, self.data.sha256, dataset_file, here)
        except AnotherRun as error:
            remedy = "give the same data and settings, or use another --results_dir, or --fresh to delete it"
            raise Stop(f"{error}; {remedy}") from None
        begin_session(self.run, str(self.device))
        if note := several_gpus_note(self.device):
            print(f"{note}; run_all.sh --split-jobs uses more")


def epoch_order(n: int, settings: Settings, epoch: int) -> torch.Tensor | None:
    """The order of the training images in epoch `epoch` of any network; None: as they lie in the data set."""
    if not settings.shuffle:
        return None
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator)


def train(track: Track, session: Session) -> bool:
    """Train `track` to its last epoch; returns whether its loss stayed finite.

    Evaluates and checkpoints at the network's evaluations, saves `latest.pyT` every SAVE_EVERY seconds and when
    interrupted. Once per epoch the loss is read from the device and checked: a network that diverged ends there and
    its history so far stays. Repeating the call finds that in status.json and trains nothing.
    """
    member = track.member
    if track.ended:
        if not track.complete:
            print(f"{member.label}: diverged in epoch {diverged_at(track.run, member)}")
            return False
        if network_status(track.run, member).get("state") != "complete":  # killed before it was noted
            note_network(track.run, member, state="complete", epoch=member.epochs)
        print(f"{member.label}: complete")
        return True
    if track.history:
        print(f"{member.label}: continues in epoch {min(track.epoch + 1, member.epochs)}")
    step = make_step(track, session)
    progress = Progress(track, session)
    try:
        finite = True
        while finite and not track.complete:
            if track.due:
                finite = evaluate_and_record(track, step, session, progress)
            else:
                finite = train_epoch(track, step, session, progress)
    except Interrupted:
        track.save_latest()
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # Nothing is saved now: memory may have ended in the midst of a step, when some weights had taken it.
        message = f"{member.label}: out of memory; lower --batch_size. What was saved before is intact"
        raise Stop(message, ENVIRONMENT) from None
    finally:
        progress.close()
        track.writer.wait()
    seconds = progress.total_seconds
    if finite:
        note_network(track.run, member, state="complete", epoch=track.epoch, seconds=seconds)
    else:
        track.discard_latest()
        note_network(track.run, member, state="diverged", diverged_at=track.epoch, seconds=seconds)
        lower = f"the loss is no longer finite in epoch {track.epoch}; lower its learning rate"
        print(f"{member.label}: {lower}", file=sys.stderr)
    return finite


def make_step(track: Track, session: Session) -> Step:
    size = session.settings.batch_size
    return Step(track.net, session.data.image_shape, track.rates, batch_size=size, optimizer=track.optimizer)


def train_epoch(track: Track, step: Step, session: Session, progress: "Progress | None" = None) -> bool:
    """Train to the end of the epoch that `track` stands in; returns whether the loss is finite.

    `progress`, if given, is told of every step, and `latest.pyT` is saved now and then.
    """
    x, y, size = session.data.x_train, session.data.y_train, session.settings.batch_size
    order = epoch_order(len(x), session.settings, track.epoch)
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
            progress.stepped()
    track.epoch, track.step = track.epoch + 1, 0
    return math.isfinite(step.take_loss())


def evaluate_and_record(track: Track, step: Step, session: Session, progress: "Progress") -> bool:
    """Evaluate and record, unless the loss is no longer finite; returns whether it is."""
    values = evaluate(track.net, step.net, session.data)
    if not math.isfinite(values["train_loss"] + values["test_loss"]):
        return False
    track.record(values, progress.total_seconds)
    progress.recorded(values)
    return True


class Progress:
    """What a person sees of one network's training: a bar on a terminal, lines with the time in a file."""

    def __init__(self, track: Track, session: Session):
        self.track, self.session, self.started, self.last_save = track, session, time.monotonic(), time.monotonic()
        member = track.member
        seconds = network_status(track.run, member).get("seconds")
        self.seconds_before = seconds if isinstance(seconds, float) else 0.0
        steps = math.ceil(len(session.data.x_train) / session.settings.batch_size)
        self.first = track.epoch + track.step / steps
        self.place, self.later = "", []
        if member in session.work:
            work = list(session.work)
            number = work.index(member) + 1
            self.place = f"network {number} of {len(work)}"
            self.later = [other for other in work[number:] if not self._ended(other)]
        self.bar = tqdm(
            total=member.epochs * steps, initial=track.epoch * steps + track.step, unit="step", file=sys.stdout,
            desc=f"{member.label}, {self.place}" if self.place else member.label,
            disable=not sys.stdout.isatty(), dynamic_ncols=True, mininterval=0.3,
        )  # fmt: skip

    def _ended(self, member: Member) -> bool:
        return network_status(self.track.run, member).get("state") in ("complete", "diverged")

    @property
    def total_seconds(self) -> float:
        """Time spent on the network, in all sessions."""
        return round(self.seconds_before + time.monotonic() - self.started, 3)

    def stepped(self) -> None:
        self.bar.update()
        if time.monotonic() - self.last_save > SAVE_EVERY:
            self.track.save_latest()
            self.last_save = time.monotonic()

    def recorded(self, values: dict[str, float]) -> None:
        track, member = self.track, self.track.member
        self.last_save = time.monotonic()
        text = f"epoch {track.epoch}/{member.epochs}, loss {values['train_loss']:.3f}, test {values['test_acc']:.2f} %"
        text += self._time_left()
        if self.bar.disable:
            place = f" ({self.place})" if self.place else ""
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {member.label}{place}: {text}", flush=True)
        else:
            self.bar.set_postfix_str(text)

    def _time_left(self) -> str:
        """Time left to this network, and when all is done, at the present rate; empty until an epoch is done."""
        track, work = self.track, self.session.work
        epochs_done = track.epoch - self.first
        if epochs_done <= 0:
            return ""
        seconds = time.monotonic() - self.started
        left = left_in_all = seconds / epochs_done * (track.member.epochs - track.epoch)
        text = f", {duration(left)} left"
        if self.later:
            flop_per_second = work[track.member] / track.member.epochs * epochs_done / seconds
            left_in_all += sum(work[member] for member in self.later) / flop_per_second
            text += f", {duration(left_in_all)} in all"
        return f"{text}, until {datetime.now() + timedelta(seconds=left_in_all):%a %H:%M}"

    def close(self) -> None:
        self.bar.close()


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
