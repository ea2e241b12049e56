"""Copy the histories of runs into results/published, for readers who want to plot without training.

    python results/publish.py RUN ...

Takes every history, config.json without the path of the data, status.json without hosts and commands, and of the
checkpoints only the CNN's at its split epochs and its last, 0.6 MB each, from which a copy of the run can go on.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rnorm.files import write_file
from rnorm.runs import Member, converted_members, read_config, read_status, write_config

PUBLISHED = Path(__file__).parent / "published"


def publish(run: Path) -> None:
    settings, config = read_config(run)
    target = PUBLISHED / run.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    environment = {key: config[key] for key in config if key not in ("settings", "data_sha256", "dataset_file")}
    write_config(target, settings, config["data_sha256"], None, environment)
    cnn = Member(settings)
    for member in [cnn, *converted_members(run, settings)]:
        if member.history(run).exists():
            member.directory(target).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(member.history(run), member.history(target))
    there = [epoch for epoch in cnn.evaluations if cnn.checkpoint(run, epoch).exists()]
    for epoch in there:
        if epoch in settings.split_epochs or epoch == there[-1]:
            shutil.copyfile(cnn.checkpoint(run, epoch), cnn.checkpoint(target, epoch))
    status = {"networks": read_status(run)["networks"], "sessions": []}
    write_file(target / "status.json", (json.dumps(status, indent=1) + "\n").encode())
    print(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    for run in parser.parse_args().runs:
        publish(run)
