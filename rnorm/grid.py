"""What run_all.sh asks about the runs of a grid.

    python -m rnorm.grid [--cnn_lr LR ...] [--lc_lr LR ...] [--epochs N ...] [--n_splits N ...] [--seed N ...]
                         [-- EXPERIMENTS.PY FLAGS]

Prints a line for each run, of fields separated by tabs: `complete` or `new`; the run's directory; the same as an
absolute path; the split epochs, with commas between them, or `-` for --cnn_only; cnn_lr, lc_lr, epochs, n_splits and
seed as they were given; and the flags that convert.py takes, a field for each word. Bad input ends it with one line.
"""

import itertools
import sys
from pathlib import Path

from rnorm.cli import COMPLETE, Parser, Stop, finish
from rnorm.flags import add_settings, settings_of
from rnorm.runs import Member, Settings, diverged_at, network_status

DEFAULTS = {"cnn_lr": [0.1, 0.05], "lc_lr": [0.01, 0.005]}  # of the grid; the others' are those of Settings
NAMES = ("cnn_lr", "lc_lr", "epochs", "n_splits", "seed")


def is_complete(run: Path, cnn: Member, converted: list[Member]) -> bool:
    """Whether status.json says of every network that it is done; those past the CNN's divergence cannot be made."""
    diverged = diverged_at(run, cnn)
    due = [cnn]
    for member in converted:
        if diverged is None or member.split < diverged:
            due.append(member)
    return all(network_status(run, member).get("state") in ("complete", "diverged") for member in due)


def describe(values: tuple[str, ...], flags: list[str]) -> tuple[Path, list[object]]:
    """The run of one point of the grid, `values` of NAMES, and its fields; raises Stop if a setting is wrong.

    Flags that are neither a setting nor experiments.py's alone are convert.py's, too; experiments.py checks them.
    """
    parser = Parser(__doc__)
    add_settings(parser)
    parser.add_argument("--convert_to", nargs="+", default=["lc"])
    parser.add_argument("--cnn_only", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    point = [f"--{name}={value}" for name, value in zip(NAMES, values)]
    args, shared = parser.parse_known_args(point + flags)
    settings = settings_of(args)
    run = args.results_dir / settings.run_name
    splits = [] if args.cnn_only else settings.split_epochs
    converted = [Member(settings, name, split) for name in args.convert_to for split in splits]
    done = not args.fresh and is_complete(run, Member(settings), converted)
    fields = ["complete" if done else "new", run, run.absolute(), ",".join(map(str, splits)) or "-", *values]
    return run, [*fields, *shared, "--convert_to", *args.convert_to]


def main(argv: list[str]) -> int:
    """Print the grid that the command line `argv` asks for; returns the exit status."""
    end = argv.index("--") if "--" in argv else len(argv)
    own, flags = argv[:end], argv[end + 1 :]
    parser = Parser(__doc__)
    for name in NAMES:
        parser.add_argument(f"--{name}", nargs="+", default=DEFAULTS.get(name, [getattr(Settings, name)]))
    grid = vars(parser.parse_args(own))
    for word in flags:
        if word.split("=")[0] in ("-h", "--help", "--exec"):
            raise Stop(f"{word}: a job cannot do that; try --dry-run, or python experiments.py {word}")
        if not word or "\t" in word or "\n" in word:
            raise Stop(f"{word!r}: a flag may not be empty or hold tabs and newlines")
    runs = {}  # points that differ in no setting of the run are one
    for values in itertools.product(*(map(str, grid[name]) for name in NAMES)):
        run, fields = describe(values, flags)
        runs[run] = fields
    for fields in runs.values():
        print(*fields, sep="\t")
    return COMPLETE


if __name__ == "__main__":
    finish(main, ["run_all.sh", *sys.argv[1:]])
