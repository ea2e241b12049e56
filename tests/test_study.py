"""The study as a whole: its files, and the identity of a CNN and what it was converted to at the split."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compare_runs import equal, states
from small_study import run, small_cnn
from torch import nn

import experiments
from convert import largest_difference
from models import NETWORKS, ConvNet, load_network, skinnyprime
from rnorm.checkpoints import Track, load, load_history, save
from rnorm.cli import Stop
from rnorm.conversions import untie
from rnorm.files import RnormError
from rnorm.measure import KEYS
from rnorm.runs import Member, Settings, converted_members, read_config


def study(tmp_path, npz, *flags):
    """Run the small study; returns its directory."""
    assert run("experiments.py", "--dataset", npz, "--results_dir", tmp_path, "--batch_size", 25, *flags) == 0
    return next(path.parent for path in tmp_path.glob("*/config.json"))


def history_of(run: Path, conversion: str = "", split: int = 0) -> dict[str, list]:
    return load_history(Member(run, read_config(run)[0], conversion, split))


def test_a_run_leaves_the_documented_files(tmp_path, npz):
    path = study(tmp_path, npz, "--epochs", 3, "--n_splits", 2, "--lc_epochs", 2, "--convert_to", "lc", "tied")
    assert path.name.endswith("-lc_lr=0.01-lc_epochs=2-network=small-dataset=tiny-batch_size=25")
    names = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")}
    converted = [(c, s) for c in ("lc", "tied") for s in (1, 3)]
    assert names == {
        "config.json", "evaluation-history.hist", *(f"small_{e}.pyT" for e in range(4)),
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


CONVERTED = ("lc", "lc5", "tied", "tied5", "tied1+5", "cnn")


@pytest.fixture(scope="module")
def path(data, tmp_path_factory):
    """A run with all kinds of conversions, which learn at the CNN's rate."""
    rates, results = ("--cnn_lr", 0.1, "--lc_lr", 0.1, "--weight_decay", 0.01), tmp_path_factory.mktemp("results")
    return study(results, data, "--epochs", 3, "--splits", 1, 3, *rates, "--convert_to", *CONVERTED)


@pytest.mark.parametrize("conversion", CONVERTED)
@pytest.mark.parametrize("split", [1, 3])
def test_a_cnn_at_its_split_and_what_it_is_converted_to_agree_in_every_key(path, conversion, split):
    cnn, converted = history_of(path), history_of(path, conversion, split)
    assert list(converted) == list(cnn) and converted["checkpoints"] == [0, 1, 2, 3]
    for key in set(cnn) - {"checkpoints"}:
        assert converted[key][0] == pytest.approx(cnn[key][split], rel=1e-4, abs=1e-5, nan_ok=True), key


def test_the_filters_leave_the_tied_subspace_where_they_were_untied_and_there_alone(path):
    left = {}
    for conversion in CONVERTED:
        history = history_of(path, conversion, 1)
        assert history["untied"][0] < 1e-6
        left[conversion] = [history[key][1] > 1e-5 for key in ("untied", "untied_1", "untied_5")]
    everywhere, nowhere = [True] * 3, [False] * 3
    assert left == dict.fromkeys(CONVERTED, nowhere) | {"lc": everywhere, "lc5": [True, False, True]}


def test_the_controls_are_the_cnn_itself_and_of_all_layers_by_name_that_of_all(path):
    cnn, on = history_of(path), history_of(path, "cnn", 1)
    assert on["train_loss"][:3] == cnn["train_loss"][1:] and on["norm"][:3] == cnn["norm"][1:]
    tied, tied5, all_by_name, on = (
        load(path / f"small_{name}_version_1" / f"small_{name}_version_3.pyT")
        for name in ("tied", "tied5", "tied1+5", "cnn")
    )
    assert equal(tied, all_by_name)
    weights = [state["weights"]["net.1.weight"] for state in (tied, tied5, on)]
    assert not any(torch.equal(*pair) for pair in itertools.combinations(weights, 2))


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


@pytest.mark.parametrize("width, pool", [(4, nn.AvgPool2d(3, 2)), (6, nn.MaxPool2d(3, 2))])
def test_a_network_that_was_edited_is_another_run(tmp_path, npz, monkeypatch, width, pool):
    """With the same shapes of weights, and with others."""
    flags = ("--epochs", 2, "--n_splits", 1)
    path = study(tmp_path, npz, *flags, "--cnn_only")
    before = {file: file.read_bytes() for file in path.rglob("*.*") if file.name != ".lock"}

    def edited(num_classes: int) -> ConvNet:
        layers = list(small_cnn(num_classes).net)
        return ConvNet(*layers[:5], nn.Conv2d(4, width, 3), nn.ReLU(), pool, *layers[8:-1], nn.Linear(width, 3))

    monkeypatch.setitem(NETWORKS, "small", edited)
    for call in (lambda: study(tmp_path, npz, *flags), lambda: run("convert.py", path)):
        with pytest.raises(RnormError, match=r"is another run: layer \d .* there, .* here.*; give the same") as error:
            call()
        assert "\n" not in str(error.value)
        assert {file: file.read_bytes() for file in path.rglob("*.*") if file.name != ".lock"} == before


def test_a_conversion_is_compared_with_its_cnn_in_double_precision():
    torch.manual_seed(0)
    cnn, x = small_cnn(), torch.randn(20, 3, 32, 32)
    elcn = untie(cnn.net, (3, 32, 32))
    assert largest_difference(cnn, elcn, x) < 1e-12
    assert {p.dtype for p in (*cnn.parameters(), *elcn.parameters())} == {torch.float32}
    elcn[9].weight.data[0, 0] *= 1 + 1e-6
    assert largest_difference(cnn, elcn, x) > 1e-9


def test_runs_differ_in_every_setting_that_changes_results(tmp_path, npz):
    """The flag arrives in the run: its name, and what is trained."""
    base = study(tmp_path / "base", npz, "--epochs", 1, "--cnn_only")
    for flags in (("--shuffle",), ("--seed", 1), ("--cnn_lr", 0.1), ("--data_size", 50), ("--batch_size", 7)):
        other = study(tmp_path / flags[0], npz, "--epochs", 1, "--cnn_only", *flags)
        assert other.name != base.name
        assert history_of(other)["test_loss"][1] != history_of(base)["test_loss"][1], flags


def test_the_plan_trains_nothing_and_does_not_load_torchs_compiler(tmp_path, npz):
    """To load it takes seconds."""
    code = "import sys, small_study; small_study.run(*sys.argv[1:]); sys.exit('sympy' in sys.modules)"
    flags = ("--exec", 0, "--dataset", npz, "--results_dir", tmp_path / "results", "--convert_to", "lc", "tied")
    argv = [sys.executable, "-c", code, "experiments.py", *map(str, flags)]
    plan = subprocess.run(argv, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
    assert plan.count("1 2 3 4 6 8 10 13 18 23 30 40 52 67 88 115 150") == 3  # the splits twice, and the evaluations
    assert "GB needed" in plan and "GB free" in plan and "tied        17, from these epochs" in plan
    assert "TFLOP" in plan and "0 of 35 networks complete" in plan
    assert not (tmp_path / "results").exists()


def test_the_plan_counts_the_histories_that_checkpoints_hold(tmp_path):
    """At 10,000 epochs they are most of what is written."""
    member = Member(tmp_path, Settings(epochs=10_000))
    planned, _ = experiments.disk_space(tmp_path / "run", [member], None)
    track, sizes = Track(member, skinnyprime(), [0.05] * 8), []
    keys = [*KEYS[1:], "untied_1", "untied_5", "untied_9"]
    for track.epoch in (0, 10_000):
        values = np.random.default_rng(0).random((len(keys), track.epoch + 1)).tolist()
        track.history = {"checkpoints": list(range(track.epoch + 1)), **dict(zip(keys, values))}
        save(track.state(), tmp_path / "file")
        sizes.append((tmp_path / "file").stat().st_size)
    assert planned == pytest.approx(10_001 * sum(sizes) / 2, rel=0.1)


def test_double_precision_is_double_throughout(tmp_path, npz):
    path = study(tmp_path, npz, "--epochs", 1, "--n_splits", 1, "--precision", "float64", "--convert_to", "lc", "fc")
    for checkpoint in path.rglob("*.pyT"):
        assert {p.dtype for p in load_network(checkpoint).parameters()} == {torch.float64}
        assert {p.dtype for p in load(checkpoint)["weights"].values()} == {torch.float64}


def test_fc_keeps_the_last_checkpoint_unless_told_otherwise(tmp_path, npz, capsys):
    path = study(tmp_path, npz, "--epochs", 2, "--n_splits", 1, "--convert_to", "fc", "lc")
    assert [p.name for p in (path / "small_fc_version_1").glob("*.pyT")] == ["small_fc_version_2.pyT"]
    assert len(list((path / "small_lc_version_1").glob("*.pyT"))) == 3
    assert experiments.main(["--exec", "0", "--device", "cpu", "--convert_to", "fc"]) == 0
    assert "1 checkpoint stays of each, 442 MB" in capsys.readouterr().out
