"""What a command will train and write: the networks, the time and the disk space that are still to come."""

import functools
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from rnorm.conversions import find_conversion
from rnorm.history import has_ended
from rnorm.runs import Member
from rnorm.store import good_history, past_divergence

EVALUATION_BYTES = 200  # of one evaluation in a history, which every checkpoint holds up to its own epoch


def is_done(member: Member) -> bool:
    """Whether nothing is left to do for a network, as it is complete, diverged, or cannot be made."""
    return has_ended(good_history(member), member) or past_divergence(member)


@dataclass(frozen=True)
class Item:
    """One network of the plan."""

    member: Member
    parameters: int  # how many numbers
    step: float  # seconds of a training step, a batch
    evaluation: float  # seconds of an evaluation

    @functools.cached_property
    def evaluated(self) -> list[int]:
        return (good_history(self.member) or {"checkpoints": []})["checkpoints"]

    @functools.cached_property
    def ended(self) -> bool:
        return is_done(self.member)

    def seconds(self, images: int) -> float:
        """What its training still takes, with `images` in an epoch."""
        if self.ended:
            return 0.0
        done = max(self.evaluated, default=0)
        steps = math.ceil(images / self.member.settings.batch_size) * (self.member.epochs - done)
        return steps * self.step + self.evaluation * (len(self.member.evaluations) - len(self.evaluated))

    @property
    def checkpoint_bytes(self) -> int:
        settings, evaluations = self.member.settings, len(self.member.evaluations)
        numbers = self.parameters * (2 if settings.momentum else 1)
        weights = numbers * (8 if settings.precision == "float64" else 4)
        return weights + 10_000 + evaluations * EVALUATION_BYTES // 2

    def checkpoints(self, keep: str | None) -> int:
        """How many of its checkpoints stay on disk; `keep` is that of the command line."""
        last = not self.member.is_cnn and (keep or find_conversion(self.member.conversion).keep) == "last"
        return 1 if last else len(self.member.evaluations)

    def bytes_to_write(self, keep: str | None) -> int:
        """What it still adds to the disk."""
        if self.ended:
            return 0
        return max(1, self.checkpoints(keep) - len(self.evaluated)) * self.checkpoint_bytes


def disk_space(items: list[Item], keep: str | None) -> list[tuple[Path, int, int]]:
    """For each disk that the networks are written to: (a directory on it, bytes still to write, bytes free).

    Raises NotADirectoryError, or what the operating system says, where a directory cannot be made.
    """
    disks: dict[int, tuple[Path, list[Item]]] = {}
    for item in items:
        directory = item.member.directory.absolute()
        nearest = next(path for path in (directory, *directory.parents) if path.exists())
        if not nearest.is_dir():
            raise NotADirectoryError(f"{nearest} is not a directory")
        disks.setdefault(os.stat(nearest).st_dev, (nearest, []))[1].append(item)
    needs = []
    for nearest, there in disks.values():
        needed = sum(item.bytes_to_write(keep) for item in there)
        if needed:  # and once latest.pyT, or the next checkpoint before it takes the place of the last
            needed += max(item.checkpoint_bytes for item in there if not item.ended)
        needs.append((nearest, needed, shutil.disk_usage(nearest).free))
    return needs


def time_of(seconds: float) -> str:
    """For people: 40 s, 12 min, 2 h 40 min."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def duration_line(items: list[Item], images: int) -> str:
    """How long the command takes on this machine, as far as a few timed steps tell."""
    seconds = sum(item.seconds(images) for item in items)
    return f"about {time_of(seconds)} on this machine; Ctrl-C and the same command continue"


def print_plan(items: list[Item], images: int, keep: str | None, disks: list[tuple[Path, int, int]]) -> None:
    """Print what a run will train and write, and how far it has come; `images` are those for training.

    The last line is for programs: JSON after "plan: ".
    """
    cnn, converted = items[0].member, items[1:]
    ended = [item for item in items if item.ended]
    state = "complete" if len(ended) == len(items) else f"{len(ended)} of {len(items)} networks complete"
    print(f"run         {cnn.run}")
    print(f"state       {state}")
    print(f"data        {cnn.settings.dataset}, {images} training images, batches of {cnn.settings.batch_size}")
    print(f"CNN         {cnn.epochs} epochs, learning rate {cnn.lr}; evaluated at 0 and every epoch")
    for conversion in dict.fromkeys(item.member.conversion for item in converted):
        alike = [item for item in converted if item.member.conversion == conversion]
        splits = " ".join(str(item.member.split) for item in alike)
        print(f"{alike[0].member.title:<11} {len(alike)}, from these epochs of the CNN: {splits}")
        count = alike[0].checkpoints(keep)
        stay = "checkpoint stays" if count == 1 else "checkpoints"
        print(f"            {count} {stay} of each, {alike[0].checkpoint_bytes / 1e6:.0f} MB")
    if converted:
        first = converted[0].member
        print(f"            {first.epochs} epochs each, learning rate {first.lr}; evaluated at their own")
        print(f"            epochs {' '.join(map(str, first.evaluations))}")
    if state != "complete":
        print(f"time        {duration_line(items, images)}")
    for directory, needed, free in disks:
        place = "" if len(disks) == 1 else f" at {directory}"
        print(f"disk space  {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free{place}")
    seconds, size = (sum(item.seconds(images) for item in items), sum(needed for _, needed, _ in disks))
    plan = {"run": str(cnn.run), "state": "complete" if state == "complete" else "incomplete"}
    print("plan: " + json.dumps(plan | {"bytes": size, "seconds": round(seconds)}))
