"""Copy the histories of runs into results/published, for readers who want to plot without training.

    python results/publish.py RUN ...

Takes every history and config.json without the path of the data. With a copy of the run anyone can go on: it has the
CNN's checkpoints at the splits that networks were converted at, of seed 0 at all, and of networks that are not complete
the last one, 0.6 MB each. An unfinished eLCN, of 31 MB, starts again at its split.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rnorm.history import has_ended
from rnorm.runs import Member, converted_members, read_config, write_config
from rnorm.store import good_history

PUBLISHED = Path(__file__).parent / "published"
LARGE = 10**6  # bytes


def publish(run: Path) -> None:
    settings, config = read_config(run)
    target = PUBLISHED / run.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    write_config(target, settings, {key: config[key] for key in config if key not in ("settings", "dataset_file")})
    cnn, converted = Member(run, settings), converted_members(run, settings)
    splits = settings.split_epochs if settings.seed == 0 else [member.split for member in converted]
    files = [cnn.checkpoint(split) for split in splits]
    for member in (cnn, *converted):
        files.append(member.history_file)
        history = good_history(member)
        if history and not has_ended(history, member):
            files.append(member.checkpoint(history["checkpoints"][-1]))
    for file in dict.fromkeys(files):
        if file.exists() and file.stat().st_size < LARGE:
            copy = target / file.relative_to(run)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    print(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    for run in parser.parse_args().runs:
        publish(run)
