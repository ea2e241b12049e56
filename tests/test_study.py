"""The study as a whole: its schedule, its files, and the identity of a CNN and its eLCN at the split."""

import json
import math

import pytest
import torch

from checkpoints import load, load_history
from data import load_data, synthetic
from measure import KEYS
from cli import Stop
from runs import Settings, log_spaced_epochs
from small_study import run, small_cnn
from train import epoch_order


def study(tmp_path, npz, *flags):
    """Run the small study; returns its directory."""
    flags = ("--dataset", npz, "--results_dir", tmp_path, "--batch_size", 25, "--device", "cpu", *flags)
    assert run("experiments.py", *flags) == 0
    return next(path.parent for path in tmp_path.glob("*/config.json"))


def test_the_published_split_epochs():
    assert log_spaced_epochs(150, 20) == [1, 2, 3, 4, 6, 8, 10, 13, 18, 23, 30, 40, 52, 67, 88, 115, 150]
    assert log_spaced_epochs(150, 10) == [1, 3, 5, 9, 16, 28, 49, 85, 150]


@pytest.mark.parametrize("n", [2, 3, 30, 40, 50, 80, 150, 1000])
def test_the_last_epoch_is_always_evaluated(n):
    assert log_spaced_epochs(n, 20)[-1] == n and log_spaced_epochs(n, 20)[0] == 1


def test_run_names_hold_what_differs_from_the_defaults():
    assert Settings().run_name == "epochs=150-n_splits=20-cnn_lr=0.05-lc_lr=0.01"
    settings = Settings(splits=(28, 9, 9), lc_epochs=3, dataset="mine", data_size=5, batch_size=7, seed=1, shuffle=True)
    assert settings.run_name == (
        "epochs=150-cnn_lr=0.05-lc_lr=0.01-splits=9+28-lc_epochs=3-dataset=mine-data_size=5-batch_size=7-seed=1-shuffle"
    )
    assert Settings(lc_epochs=150).run_name == Settings().run_name
    assert Settings(precision="tf32").run_name.endswith("-precision=tf32")


def test_a_run_leaves_the_documented_files(tmp_path, npz):
    path = study(tmp_path, npz, "--epochs", 3, "--n_splits", 2, "--lc_epochs", 2)
    names = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")}
    assert names == {
        "config.json", "status.json", "evaluation-history.hist", *(f"skinnyprime_{e}.pyT" for e in range(4)),
        *(f"skinnyprime_lc_version_{s}/skinnyprime_lc_version_{e}.pyT" for s in (1, 3) for e in range(3)),
        *(f"skinnyprime_lc_version_{s}/evaluation-history.hist" for s in (1, 3)),
    }  # fmt: skip
    config = json.loads((path / "config.json").read_text())
    assert config["settings"]["epochs"] == 3 and len(config["data_sha256"]) == 64
    assert {"device", "threads", "versions", "git_commit"} <= set(config)
    optimizer = torch.optim.SGD(small_cnn().parameters(), 1.0, momentum=0.9)
    optimizer.load_state_dict(load(path / "skinnyprime_3.pyT")["optimizer"])
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.05, 0)
    for history in path.rglob("*.hist"):
        values = load_history(history)
        assert set(KEYS) <= set(values) and {"untied_1", "untied_5"} <= set(values)
        assert all(type(v) in (int, float) for key in values for v in values[key])


def test_a_cnn_at_its_split_and_its_elcn_at_epoch_0_agree_in_every_key(tmp_path, npz):
    path = study(tmp_path, npz, "--epochs", 4, "--splits", 2, 4, "--cnn_lr", 0.3, "--lc_epochs", 1)
    cnn = load_history(path / "evaluation-history.hist")
    for split in (2, 4):
        elcn = load_history(path / f"skinnyprime_lc_version_{split}" / "evaluation-history.hist")
        for key in set(cnn) - {"checkpoints"}:
            assert elcn[key][0] == pytest.approx(cnn[key][split], rel=1e-4, abs=1e-5, nan_ok=True), key


def test_after_a_step_the_elcn_has_left_the_tied_subspace(tmp_path, npz):
    path = study(tmp_path, npz, "--epochs", 1, "--n_splits", 1, "--lc_lr", 0.1)
    untied = load_history(path / "skinnyprime_lc_version_1" / "evaluation-history.hist")["untied"]
    assert untied[0] < 1e-6 < 1e-4 < untied[1]


def test_keep_last_keeps_one_checkpoint_and_the_same_history(tmp_path, npz):
    everything = study(tmp_path / "all", npz, "--epochs", 3, "--n_splits", 1)
    last = study(tmp_path / "last", npz, "--epochs", 3, "--n_splits", 1, "--keep", "last")
    kept = [p.name for p in (last / "skinnyprime_lc_version_1").glob("*.pyT")]
    assert kept == ["skinnyprime_lc_version_3.pyT"]
    name = "skinnyprime_lc_version_1/evaluation-history.hist"
    assert repr(load_history(last / name)) == repr(load_history(everything / name))


def test_convert_trains_the_elcns_that_are_missing(tmp_path, npz):
    path = study(tmp_path, npz, "--epochs", 3, "--n_splits", 2, "--cnn_only")
    assert not list(path.glob("skinnyprime_lc*"))
    assert run("convert.py", path, "--split", 3, "--data_dir", npz.parent) == 0
    assert [p.name for p in path.glob("skinnyprime_lc*")] == ["skinnyprime_lc_version_3"]
    assert run("convert.py", path) == 0
    assert len(list(path.glob("skinnyprime_lc*"))) == 2
    with pytest.raises(Stop, match="the run's splits are 1 3"):
        run("convert.py", path, "--split", 2)


def test_the_plan_trains_nothing(tmp_path, npz, capsys):
    assert run("experiments.py", "--exec", 0, "--dataset", npz, "--results_dir", tmp_path / "results") == 0
    plan = capsys.readouterr().out
    assert "1 2 3 4 6 8 10 13 18 23 30 40 52 67 88 115 150" in plan and "GB needed" in plan and "GB free" in plan
    assert not (tmp_path / "results").exists()


def test_shuffling_depends_on_the_seed_and_the_epoch_alone():
    settings = Settings(shuffle=True, seed=3)
    assert epoch_order(10, Settings(), 0) is None
    assert torch.equal(epoch_order(10, settings, 4), epoch_order(10, settings, 4))
    assert not torch.equal(epoch_order(10, settings, 4), epoch_order(10, settings, 5))
    assert sorted(epoch_order(10, settings, 4).tolist()) == list(range(10))


def test_data_are_normalised_and_cut_to_size(npz):
    whole, part = (load_data(str(npz), npz.parent, size, torch.device("cpu")) for size in (0, 20))
    assert whole.x_train.shape == (60, 3, 32, 32) and part.x_train.shape == (20, 3, 32, 32)
    assert torch.equal(whole.x_train[:20], part.x_train) and len(part.x_test) == 30
    assert whole.num_classes == 3 and whole.sha256 == part.sha256
    black = torch.tensor([(0 - m) / s for m, s in ((0.491, 0.247), (0.482, 0.243), (0.447, 0.262))])
    assert (whole.x_train.amin((0, 2, 3)) - black).abs().max() < 0.1


def test_the_synthetic_data_are_the_same_everywhere_and_their_place_tells_nothing():
    a, b = synthetic(train=200, test=50), synthetic(train=200, test=50)
    assert all((a[name] == b[name]).all() for name in a)
    assert a["x_train"].shape == (200, 32, 32, 3) and a["x_train"].dtype == "uint8"
    assert sorted(set(a["y_train"])) == list(range(10))
    assert not math.isclose(a["x_train"].std(), 0)
