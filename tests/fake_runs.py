"""Runs as training leaves them, but with made-up histories and no checkpoints."""

import math

import numpy as np

from rnorm.store import save
from rnorm.measure import KEYS
from rnorm.runs import Member, Settings, write_config


def history(own_epochs, split=0, seed=0, **changes):
    """A history with made-up but regular values; the margins are negative at epoch 0 of the CNN."""
    own = np.array(own_epochs, float)
    values = {key: 1 + split + own / 10 + seed for key in KEYS}
    values |= {"test_acc": 50 + own - abs(split - 2) + 2 * seed, "train_acc": 60 + own}
    values |= {"untied": own * bool(split) / 100}
    values |= {"margin": own + split - 0.5, "multiclass_margin": (own + split - 0.5) / 2, "log_prod_norm": 10 + own}
    values |= {"untied_1": values["untied"], "norm": 100 + own}
    with np.errstate(invalid="ignore"):
        values["log_prod_norm_normalized"] = values["log_prod_norm"] - np.log(values["margin"])
    values |= changes | {"checkpoints": own}
    lists = {key: [float(v) for v in np.broadcast_to(value, len(own))] for key, value in values.items()}
    return lists | {"checkpoints": [int(e) for e in own_epochs]}


def make_run(directory, cnn_epochs=4, evaluations=9, conversions=("lc",), **settings):
    """A run of 4 epochs with splits 1, 2 and 4, in progress if fewer epochs or evaluations are asked for."""
    settings = Settings(**({"epochs": 4, "n_splits": 3} | settings))
    run = directory / settings.run_name
    run.mkdir(parents=True)
    write_config(run, settings, {"data_sha256": "0" * 64, "layers": []})
    put(run, settings, "", 0, cnn_epochs + 1)
    for conversion in conversions:
        for split in settings.split_epochs:
            if split <= cnn_epochs:
                put(run, settings, conversion, split, evaluations)
    return run


def put(run, settings, conversion, split, evaluations, diverged_at=None, **changes):
    """Give a run the history of a network as far as its first `evaluations`; it may have diverged after these."""
    member = Member(run, settings, conversion, split)
    member.directory.mkdir(exist_ok=True)
    values = history(member.evaluations[:evaluations], split, settings.seed, **changes)
    if diverged_at is not None:
        values = {key: [*numbers, diverged_at if key == "checkpoints" else math.nan] for key, numbers in values.items()}
    save(values, member.history_file)
