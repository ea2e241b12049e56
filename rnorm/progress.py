"""What a person sees of a command that trains: one bar for all of it, or lines in a log."""

import io
import sys
from datetime import datetime

from tqdm import tqdm

from rnorm.runs import Member
from rnorm.signals import note_progress


class Progress:
    """One bar for all that a command trains, in images; in a file, a line for each evaluation.

    `members` are trained in their order, with `images` in an epoch. What was done before counts as done, but not at
    this speed, so the bar's estimate is the time to the end of everything.
    """

    def __init__(self, members: list[Member], images: int):
        self.members, self.images, self.terminal = members, images, sys.stdout.isatty()
        self.bar = tqdm(
            total=sum(member.epochs for member in members) * images,
            unit="images", unit_scale=True, smoothing=0, dynamic_ncols=True,
            file=sys.stdout if self.terminal else io.StringIO(), bar_format=None if self.terminal else "{remaining}",
            leave=False, delay=0.01,  # until there is something to show, messages have the line
        )  # fmt: skip

    def begin(self, member: Member, epoch: int, step: int, ended: bool) -> None:
        """Show a network, and count as done what it has done."""
        self.member = member
        done = epoch * self.images + step * member.settings.batch_size
        if ended:
            done = member.epochs * self.images
        self.bar.n += done
        self.bar.initial += done
        self.name = f"{member.label} ({self.members.index(member) + 1} of {len(self.members)})"
        self.bar.set_description(self.name, refresh=False)

    def stepped(self, images: int) -> None:
        note_progress()
        self.bar.update(images)

    def recorded(self, epoch: int, values: dict[str, float]) -> None:
        note_progress()
        text = f"epoch {epoch}/{self.member.epochs}"
        text += f", loss {values['train_loss']:.3f}, test {values['test_acc']:.2f} %"
        if self.terminal:
            self.bar.set_postfix_str(text)
        else:
            left = str(self.bar)
            if left.startswith("-"):  # the clock was set back
                left = "?"
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {self.name}: {text}, {left} left in all", flush=True)

    def skip(self, member: Member) -> None:
        """Leave out a network that will not be trained."""
        self.bar.total -= member.epochs * self.images
