"""Copy the histories of runs into results/published, for readers who want to plot without training.

    python results/publish.py RUN ...

Takes every history and config.json without the path of the data. With a copy of the run anyone can go on: it has the
CNN's checkpoints at its splits and its last, and the last of networks that are not complete, 0.6 MB each. An unfinished
eLCN, of 31 MB, starts again at its split. A run that is published already is replaced, once all copies are made.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rnorm.cli import COMPLETE, Parser, Stop, finish
from rnorm.signals import check_signals, note_signals

if __name__ == "__main__":
    note_signals()  # torch takes seconds to import; a signal in that time must not be lost

from rnorm.history import has_ended
from rnorm.runs import Member, converted_members, read_config, write_config
from rnorm.store import good_history

PUBLISHED = Path(__file__).resolve().parent / "published"
LARGE = 10**6  # bytes


def copy_run(run: Path, copy: Path) -> None:
    """Copy what is published of a run into the new directory `copy`."""
    settings, config = read_config(run)
    copy.mkdir()
    write_config(copy, settings, {key: config[key] for key in config if key not in ("settings", "dataset_file")})
    cnn, converted = Member(run, settings), converted_members(run, settings)
    files = [cnn.checkpoint(split) for split in settings.split_epochs]
    for member in (cnn, *converted):
        files.append(member.history_file)
        history = good_history(member)
        if history and (member.is_cnn or not has_ended(history, member)):
            files.append(member.checkpoint(history["checkpoints"][-1]))
    for file in dict.fromkeys(files):
        if file.exists() and file.stat().st_size < LARGE:
            new = copy / file.relative_to(run)
            new.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, new)


def main(argv: list[str]) -> int:
    """Publish the runs that the command line `argv` names, all or none; returns the exit status."""
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a directory that experiments.py made")
    targets = {}
    for run in map(Path.resolve, parser.parse_args(argv).runs):
        target = PUBLISHED / run.name
        read_config(run)
        if target.resolve().is_relative_to(run) or run.is_relative_to(target.resolve()):
            raise Stop(f"{run} lies where its copy would; name a run elsewhere")
        if targets.setdefault(target, run) != run:
            raise Stop(f"{run} and {targets[target]} have one name; publish one of them")
    PUBLISHED.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PUBLISHED, prefix=".") as beside:
        for target, run in targets.items():
            copy_run(run, Path(beside) / target.name)
        check_signals()
        for target in targets:
            if os.path.lexists(target):
                target.rename(Path(beside) / f"{target.name}.before")
            (Path(beside) / target.name).rename(target)
            print(target)
    return COMPLETE


if __name__ == "__main__":
    finish(main, sys.argv, saves=False)
