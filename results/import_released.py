"""Make a run of what the code released with the paper recorded, so that plot.py draws it beside others.

    python results/import_released.py DIR OUT

DIR is a directory of that code's results, `epochs=150-n_splits=20-cnn_lr=0.05-lc_lr=0.01-exec=1`. OUT becomes a run,
with the histories alone: `load_network` reads the checkpoints where they are.

Released code: github.com/chsanford/cnn-weight-tying, of arXiv:2206.05317. Its histories differ from those here:

- `log_prod_norm` is of squared norms for the CNN, in an older version for the eLCNs as well. It is halved.
- Margin and norms were not recorded at a network's epoch 0. They are NaN.
- The normalized norms are -1 where the margin is not positive. They are computed anew from norms and margin.
- A network that diverged was trained on. Its history ends at the first loss that is not finite.
"""

import dataclasses
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rnorm.cli import COMPLETE, Parser, Stop, finish, writing
from rnorm.signals import note_signals, stopping_at_once

if __name__ == "__main__":
    note_signals()  # torch takes seconds to import; a signal in that time must not be lost

import numpy as np
import torch

from rnorm.store import load, save
from rnorm.files import Damaged
from rnorm.runs import Member, Settings, write_config

NETWORK, LAYERS = "skinnyprime", 4  # the only one that the released code trains; its layers with weights
EVERYWHERE = ("train_loss", "train_acc", "test_loss", "test_acc")
NOT_AT_0 = ("margin", "norm", "log_prod_norm")

_scalar, _array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
NUMBERS = [np.dtype, np.ndarray, *{type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64")}]
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # of numpy 1 and 2
    NUMBERS += [(_scalar, f"{_module}.scalar"), (_array, f"{_module}._reconstruct")]
"""What a history of the released code may hold besides Python's and torch's own."""


def read_settings(source: Path) -> tuple[Settings, dict[int, Path]]:
    """The settings in the name of a directory of the released code; and its eLCNs' directories, by split epoch."""
    match = re.fullmatch(r"epochs=(.+)-n_splits=(.+)-cnn_lr=(.+)-lc_lr=(.+?)(-exec=[01])?", source.name)
    if not match:
        raise Stop(f"{source} is not named after its settings, as epochs=150-n_splits=20-cnn_lr=0.05-lc_lr=0.01-exec=1")
    found = {re.sub(rf"{NETWORK}_lc_(version_)?", "", path.name): path for path in source.glob(f"{NETWORK}_lc_*/")}
    splits = {int(split): found[split] for split in sorted(found, key=len) if re.fullmatch("[1-9][0-9]*", split)}
    try:
        settings = Settings(int(match[1]), int(match[2]), float(match[3]), float(match[4]))
        if not set(splits) <= set(settings.split_epochs):  # rounding gave the released code others
            settings = dataclasses.replace(settings, splits=tuple(splits))
    except ValueError as error:
        raise Stop(f"{source}: {error}") from None
    return settings, splits


def read_history(directory: Path, epochs: int) -> dict[str, list]:
    """The history of a network of `epochs` epochs, as far as it has come, under the definitions of rnorm/measure.py."""
    file = next(directory.glob("evaluation[_-]history.hist"), directory / "evaluation_history.hist")
    try:
        with torch.serialization.safe_globals(NUMBERS):
            recorded = load(file)
        values = {key: np.array(recorded[key], np.float64) for key in ("checkpoints", *EVERYWHERE, *NOT_AT_0)}
        count = len(values["train_loss"])
        values["checkpoints"] = values["checkpoints"][:count]  # a network that was stopped has those to come, too
        values |= {key: np.concatenate([[np.nan], values[key]]) for key in NOT_AT_0}
        steps = np.diff([-1, *values["checkpoints"], epochs + 1])
        if any(array.shape != (count,) for array in values.values()) or steps[0] != 1 or not (steps >= 1).all():
            raise ValueError(f"its lists do not fit each other, or not {epochs} epochs")
    except FileNotFoundError:
        raise Stop(f"{file} is missing; name a directory of results of the released code") from None
    except (Damaged, LookupError, ValueError, TypeError, OverflowError) as error:
        raise Stop(f"{file} is no history of the released code ({type(error).__name__}: {error})") from None
    finite = np.isfinite(values["train_loss"])
    if not finite.all():
        values = {key: array[: finite.argmin() + 1] for key, array in values.items()}
        for key in (*EVERYWHERE, *NOT_AT_0):
            values[key][-1] = np.nan
    with np.errstate(all="ignore"):
        largest = LAYERS / 2 * np.log(values["norm"] / LAYERS)  # of a sum of ln(norm): the inequality of the means
        if (values["log_prod_norm"] > largest + 0.001).any():
            values["log_prod_norm"] /= 2
        margin = np.where(values["margin"] > 0, values["margin"], np.nan)
        values["norm_margin_normalized"] = values["norm"] / margin
        values["log_prod_norm_normalized"] = values["log_prod_norm"] - np.log(margin)
    history = {key: array.tolist() for key, array in values.items()}
    return history | {"checkpoints": [int(epoch) for epoch in history["checkpoints"]]}


def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("out", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    source, out = args.directory.resolve(), args.out.resolve()
    if out.exists() or args.out.is_symlink() or source in out.parents:
        raise Stop(f"{args.out} {'lies in DIR' if source in out.parents else 'is there'}; name another OUT")
    with stopping_at_once():
        settings, splits = read_settings(source)
        histories = {split: read_history(path, settings.epochs) for split, path in {0: source, **splits}.items()}
        with writing(args.out, "name another OUT"), tempfile.TemporaryDirectory(prefix=".new-", dir=out.parent) as new:
            run = Path(new) / "run"
            run.mkdir()
            write_config(run, settings, {"data_sha256": "released", "imported_from": source.name})
            for split, history in histories.items():
                member = Member(run, settings, "lc" if split else "", split)
                member.directory.mkdir(exist_ok=True)
                save(history, member.history_file)
            run.rename(out)
    print(f"{args.out}: the CNN and {len(splits)} eLCNs; to draw them: python plot.py {args.out}")
    return COMPLETE


if __name__ == "__main__":
    finish(main, sys.argv, saves=False)
