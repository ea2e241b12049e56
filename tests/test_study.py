"""The study as a whole: its files, and the identity of a CNN and what it was converted to at the split."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compare_runs import files
from small_study import run

from rnorm.checkpoints import load, load_history
from rnorm.cli import Stop
from rnorm.measure import KEYS
from rnorm.runs import Member, converted_members, read_config


def study(tmp_path, npz, *flags):
    """Run the small study; returns its directory."""
    assert run("experiments.py", "--dataset", npz, "--results_dir", tmp_path, "--batch_size", 25, *flags) == 0
    return next(path.parent for path in tmp_path.glob("*/config.json"))


def history_of(run: Path, conversion: str = "", split: int = 0) -> dict[str, list]:
    member = Member(read_config(run)[0], conversion, split)
    return load_history(member.history(run), member)


def states(run: Path) -> dict:
    """What tells whether a file of the run was written anew."""
    return {path: ((run / path).stat().st_mtime_ns, (run / path).stat().st_ino) for path in files(run)}


def test_a_run_leaves_the_documented_files(tmp_path, npz):
    path = study(tmp_path, npz, "--epochs", 3, "--n_splits", 2, "--lc_epochs", 2, "--convert_to", "lc", "tied")
    assert path.name.endswith("-lc_lr=0.01-lc_epochs=2-network=small-dataset=tiny-batch_size=25")
    names = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")}
    converted = [(c, s) for c in ("lc", "tied") for s in (1, 3)]
    assert names == {
        "config.json", "status.json", "evaluation-history.hist", *(f"small_{e}.pyT" for e in range(4)),
        *(f"small_{c}_version_{s}/small_{c}_version_{e}.pyT" for c, s in converted for e in range(3)),
        *(f"small_{c}_version_{s}/evaluation-history.hist" for c, s in converted),
    }  # fmt: skip
    config = json.loads((path / "config.json").read_text())
    assert config["settings"]["epochs"] == 3 and len(config["data_sha256"]) == 64
    assert config["settings"]["network"] == "small" and config["dataset_file"] == str(npz)
    assert load(path / "small_lc_version_3" / "small_lc_version_2.pyT")["optimizer"]["param_groups"][0]["lr"] == 0.01
    for history in path.rglob("*.hist"):
        values = load(history)
        assert set(values) == {*KEYS, "untied_1", "untied_5"}
        assert all(type(v) in (int, float) for key in values for v in values[key])


def test_a_cnn_at_its_split_and_what_it_is_converted_to_agree_in_every_key(tmp_path, npz):
    conversions = ("lc", "lc5", "tied", "cnn")
    path = study(
        tmp_path, npz, "--epochs", 4, "--splits", 2, 4, "--cnn_lr", 0.3, "--lc_epochs", 1, "--convert_to", *conversions
    )
    cnn = history_of(path)
    for conversion in conversions:
        for split in (2, 4):
            converted = history_of(path, conversion, split)
            assert list(converted) == list(cnn) and converted["checkpoints"] == [0, 1]
            for key in set(cnn) - {"checkpoints"}:
                at_split = pytest.approx(cnn[key][split], rel=1e-4, abs=1e-5, nan_ok=True)
                assert converted[key][0] == at_split, (conversion, key)


def test_after_a_step_the_filters_have_left_the_tied_subspace_where_they_were_untied(tmp_path, npz):
    conversions = ("lc", "lc5", "tied", "cnn")
    path = study(tmp_path, npz, "--epochs", 1, "--n_splits", 1, "--lc_lr", 0.1, "--convert_to", *conversions)
    left = {}
    for conversion in conversions:
        history = history_of(path, conversion, 1)
        assert history["untied"][0] < 1e-6
        left[conversion] = [history[key][1] > 1e-5 for key in ("untied", "untied_1", "untied_5")]
    assert left == {"lc": [True] * 3, "lc5": [True, False, True], "tied": [False] * 3, "cnn": [False] * 3}


def test_the_cnn_trained_on_at_its_own_rate_is_the_cnn(tmp_path, npz):
    path = study(tmp_path, npz, "--epochs", 3, "--splits", 1, "--lc_lr", 0.05, "--convert_to", "cnn", "tied")
    cnn, on, tied = history_of(path), history_of(path, "cnn", 1), history_of(path, "tied", 1)
    assert on["train_loss"][:3] == cnn["train_loss"][1:] and on["norm"][:3] == cnn["norm"][1:]
    assert tied["train_loss"][1] != on["train_loss"][1]


def test_keep_last_keeps_one_checkpoint_and_the_same_history(tmp_path, npz):
    everything = study(tmp_path / "all", npz, "--epochs", 3, "--n_splits", 1)
    last = study(tmp_path / "last", npz, "--epochs", 3, "--n_splits", 1, "--keep", "last")
    assert [p.name for p in (last / "small_lc_version_1").glob("*.pyT")] == ["small_lc_version_3.pyT"]
    assert repr(history_of(last, "lc", 1)) == repr(history_of(everything, "lc", 1))
    assert len(list(last.glob("*.pyT"))) == 4  # those of the CNN


def test_conversions_are_added_to_a_run_without_touching_what_is_there(tmp_path, npz):
    path = study(tmp_path, npz, "--epochs", 3, "--n_splits", 2, "--cnn_only")
    assert not list(path.glob("small_*_version_*"))
    steps = [  # what is called, and the networks that are there afterwards
        (("convert.py", path, "--split", 3, "--data_dir", npz.parent), {("lc", 3)}),
        (("convert.py", path), {("lc", 1), ("lc", 3)}),
        (("convert.py", path, "--split", 1, "--convert_to", "tied", "cnn"), {("tied", 1), ("cnn", 1)}),
    ]
    networks, before = set(), states(path)
    for call, added in steps:
        assert run(*call) == 0
        networks |= added
        assert {(m.conversion, m.split) for m in converted_members(path, read_config(path)[0])} == networks
        after = states(path)
        assert all(after[file] == before[file] for file in before)
        before = after
    assert study(tmp_path, npz, "--epochs", 3, "--n_splits", 2, "--convert_to", "lc5") == path  # the same run
    after = states(path)
    assert len(list(path.glob("small_lc5_*"))) == 2 and all(after[file] == before[file] for file in before)
    with pytest.raises(Stop, match="the run's splits are 1 3"):
        run("convert.py", path, "--split", 2)


def test_runs_differ_in_every_setting_that_changes_results(tmp_path, npz):
    """The flag arrives in the run: its name, and what is trained."""
    base = study(tmp_path / "base", npz, "--epochs", 1, "--cnn_only")
    for flags in (("--shuffle",), ("--seed", 1), ("--cnn_lr", 0.1), ("--data_size", 50), ("--batch_size", 7)):
        other = study(tmp_path / flags[0], npz, "--epochs", 1, "--cnn_only", *flags)
        assert other.name != base.name
        assert history_of(other)["test_loss"][1] != history_of(base)["test_loss"][1], flags


def test_the_plan_trains_nothing(tmp_path, npz, capsys):
    arguments = ("--exec", 0, "--dataset", npz, "--results_dir", tmp_path / "results", "--convert_to", "lc", "tied")
    assert run("experiments.py", *arguments) == 0
    plan = capsys.readouterr().out
    assert plan.count("1 2 3 4 6 8 10 13 18 23 30 40 52 67 88 115 150") == 3  # the splits twice, and the evaluations
    assert "GB needed" in plan and "GB free" in plan and "tied        17, from these epochs" in plan
    assert not (tmp_path / "results").exists()


def test_a_short_study_is_announced_in_seconds(tmp_path, npz, capsys):
    study(tmp_path, npz, "--epochs", 1, "--cnn_only")
    announced = capsys.readouterr().out.splitlines()[1]
    assert announced == "training on the CPU: 0 GFLOP, at 100 GFLOP/s 0 s, and the evaluations"


def test_a_file_called_like_cifar10_is_another_run(tmp_path, npz):
    path = npz.rename(npz.with_name("cifar10.npz"))
    run_name = study(tmp_path, path, "--epochs", 1, "--cnn_only").name
    assert run_name == "epochs=1-n_splits=20-cnn_lr=0.05-lc_lr=0.01-network=small-dataset=cifar10.npz-batch_size=25"


def test_a_run_does_not_load_torchs_compiler(tmp_path, npz):
    """It takes seconds, in every process."""
    code = "import sys, small_study; small_study.run(*sys.argv[1:]); sys.exit('sympy' in sys.modules)"
    flags = ("--epochs", 1, "--n_splits", 1, "--dataset", npz, "--results_dir", tmp_path, "--convert_to", "lc", "tied")
    argv = [sys.executable, "-c", code, "experiments.py", *map(str, flags)]
    assert subprocess.run(argv, cwd=Path(__file__).parent).returncode == 0


def test_the_same_command_makes_the_same_numbers(tmp_path, npz):
    a, b = (study(tmp_path / name, npz, "--epochs", 2, "--n_splits", 1) for name in "ab")
    assert repr(history_of(a, "lc", 1)) == repr(history_of(b, "lc", 1))
    assert np.isfinite(history_of(a)["train_loss"]).all()
