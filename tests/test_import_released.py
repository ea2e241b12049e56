"""What the code released with the paper left behind becomes a run: results/import_released.py."""

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "results"))

import import_released
import plot
from fake_runs import make_run, put

from rnorm import cli
from rnorm.cli import Stop
from rnorm.results import read_run
from rnorm.runs import Member, Settings

EPOCHS = 150
NAME = f"epochs={EPOCHS}-n_splits=4-cnn_lr=0.05-lc_lr=0.01"
AT_0 = ["train_loss", "train_acc", "test_loss", "test_acc"]
NORMS = ["margin", "norm", "log_prod_norm", "norm_margin_normalized", "log_prod_norm_normalized"]


@pytest.fixture
def ours(tmp_path):
    """A run whose norms could be skinnyprime's: those of its layers are 160, 50, 20 and 2 in the beginning."""
    settings = Settings(epochs=EPOCHS, n_splits=4)
    run = make_run(tmp_path / "ours", epochs=EPOCHS, n_splits=4, conversions=())
    for conversion, split in (("", 0), *(("lc", split) for split in settings.split_epochs)):
        own = np.array(Member(run, settings, conversion, split).evaluations, float)
        layers = np.outer(1 + own / EPOCHS, [160, 50, 20, 2])
        margin = own + split - 0.5
        values = {"norm": (layers**2).sum(1), "log_prod_norm": np.log(layers).sum(1), "margin": margin}
        margin = np.where(margin > 0, margin, np.nan)
        values["norm_margin_normalized"] = values["norm"] / margin
        values["log_prod_norm_normalized"] = values["log_prod_norm"] - np.log(margin)
        put(run, settings, conversion, split, len(own), **values)
    return run


def release(ours: Path, directory: Path, older: bool = False, done: int | None = None) -> Path:
    """The directory in which the released code would have recorded the same, as far as the CNN has `done` evaluations.

    `older`: its older version, with squared norms for the eLCNs, too.
    """
    for curve in read_run(ours):
        member, values = curve.member, {key: curve.values[key].copy() for key in (*AT_0, *NORMS)}
        epochs = np.unique(np.logspace(0, np.log10(EPOCHS), 100 if member.is_cnn else 20).astype(int))
        epochs = np.insert(epochs, 0, 0)
        if member.is_cnn or older:
            values["log_prod_norm"] *= 2
        for key in NORMS[3:]:
            values[key] = np.full(len(values[key]), -1)  # not read
        evaluated = list(curve.own_epochs).index
        rows = [evaluated(epoch) for epoch in epochs[: done if member.is_cnn else None]]
        recorded = {key: [float(values[key][row]) for row in rows] for key in AT_0}
        recorded |= {key: [np.float32(values[key][row]) for row in rows[1:]] for key in NORMS[:1]}
        recorded |= {key: [np.float64(values[key][row]) for row in rows[1:]] for key in NORMS[1:]}
        folder = directory if member.is_cnn else directory / f"skinnyprime_lc_{member.split}"
        folder.mkdir(parents=True)
        write(recorded | {"checkpoints": epochs}, folder / "evaluation_history.hist")
        torch.save({"weights": {}, "optimizer": {}}, folder / "skinnyprime_0.pyT")
    return directory


def write(content: object, path: Path) -> None:
    """`torch.save` with numpy 1, whose modules have other names."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name).replace(b"numpy._core.", b"numpy.core.") for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, part in parts.items():
            file.writestr(name, part)


def contents(directory: Path) -> dict:
    return {path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.rglob("*")}


@pytest.mark.parametrize("older", [False, True])
def test_a_released_run_has_the_values_that_ours_has_where_it_recorded_them(ours, tmp_path, older):
    source, out = release(ours, tmp_path / f"{NAME}-exec=1", older), tmp_path / "paper"
    before = contents(source)
    assert import_released.main([str(source), str(out)]) == cli.COMPLETE
    assert contents(source) == before
    imported, curves = read_run(out), read_run(ours)
    assert [curve.member.label for curve in imported] == [curve.member.label for curve in curves]
    for theirs, own in zip(imported, curves):
        assert theirs.member.settings == own.member.settings
        rows = np.isin(own.own_epochs, theirs.own_epochs)
        for key in AT_0:
            np.testing.assert_allclose(theirs.values[key], own.values[key][rows], rtol=1e-6)
        for key in NORMS:
            assert np.isnan(theirs.values[key][0])
            np.testing.assert_allclose(theirs.values[key][1:], own.values[key][rows][1:], rtol=1e-6, err_msg=key)


def test_plot_draws_a_released_run_beside_ours(ours, tmp_path):
    out, table = tmp_path / "paper", tmp_path / "table.csv"
    import_released.main([str(release(ours, tmp_path / NAME)), str(out)])
    assert plot.main([str(ours), str(out), "--csv", str(table)]) == cli.COMPLETE
    assert plot.main([str(ours), str(out), "--out", str(tmp_path / "figure.png")]) == cli.COMPLETE
    assert {row.split(",")[0] for row in table.read_text().splitlines()[1:]} == {ours.name, "paper"}


def test_what_was_stopped_or_diverged_ends_where_it_ended(ours, tmp_path):
    source = release(ours, tmp_path / NAME, done=6)
    file = source / "skinnyprime_lc_5" / "evaluation_history.hist"
    with torch.serialization.safe_globals(import_released.NUMBERS):
        recorded = torch.load(file, weights_only=True)
    write(recorded | {"train_loss": [*recorded["train_loss"][:5], *[np.nan] * 13]}, file)
    (source / "skinnyprime_lc_150").rename(source / "skinnyprime_lc_149")  # as rounding has it for 30 or 40 epochs
    import_released.main([str(source), str(tmp_path / "paper")])
    assert [curve.member.split for curve in read_run(tmp_path / "paper")] == [0, 1, 5, 28, 149]
    cnn, _, diverged, *_ = (curve.values for curve in read_run(tmp_path / "paper"))
    assert list(cnn["checkpoints"]) == [0, 1, 2, 3, 4, 5] and np.isfinite(cnn["train_loss"]).all()
    assert list(diverged["checkpoints"]) == [0, 1, 2, 3, 4, 6] and np.isfinite(diverged["norm"][-2])
    assert np.isnan([diverged[key][-1] for key in (*AT_0, *NORMS)]).all()


class Touch:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bad_input_is_refused_in_one_line_and_nothing_is_left(ours, tmp_path):
    source, out, touched = release(ours, tmp_path / NAME), tmp_path / "out" / "paper", tmp_path / "touched"
    out.parent.mkdir()
    file = source / "skinnyprime_lc_1" / "evaluation_history.hist"
    good = file.read_bytes()

    def refused(words: str, source: Path = source, out: Path = out) -> None:
        with pytest.raises(Stop, match=words) as stop:
            import_released.main([str(source), str(out)])
        assert "\n" not in str(stop.value) and stop.value.status == cli.BAD_INPUT
        assert not list((tmp_path / "out").iterdir()) and not touched.exists()

    for content, words in (
        (Touch(touched), "more than tensors and numbers"), ([1], "not a dict"), ({"norm": []}, "KeyError"),
        (dict.fromkeys(("checkpoints", *AT_0, *NORMS), 1), "no history"),
        (dict.fromkeys(("checkpoints", *AT_0, *NORMS), [[1, 2]]), "no history"),
        (dict.fromkeys(("checkpoints", *AT_0, *NORMS), ["x"]), "no history"),
        ({"checkpoints": [0, 999], **dict.fromkeys(AT_0, [1, 1]), **dict.fromkeys(NORMS, [1])}, "not 150 epochs"),
        ({"checkpoints": [0, 1], **dict.fromkeys((*AT_0, *NORMS), [1, 1])}, "do not fit each other"),
    ):  # fmt: skip
        torch.save(content, file)
        refused(words)
    file.write_bytes(good[:-100])
    refused("evaluation_history.hist is no history of the released code")
    file.unlink()
    refused("evaluation_history.hist is missing")
    file.write_bytes(good)
    refused("is missing; name a directory of results", tmp_path / NAME.replace("n_splits=4", "n_splits=5"))
    refused("is not named after its settings", tmp_path / "other")
    refused("has to be between", tmp_path / NAME.replace("cnn_lr=0.05", "cnn_lr=-1"))
    refused("is there; name another OUT", out=ours)
    refused("lies in DIR; name another OUT", out=source / "paper")
    refused("cannot be written", out=tmp_path / "none" / "paper")
    assert import_released.main([str(source), str(out)]) == cli.COMPLETE
