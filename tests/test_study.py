"""The study as a whole: its files, and the identity of a CNN and what it was converted to at the split."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compare_runs import differences, equal, states
from conftest import run_of
from small_study import run, small_cnn
from torch import nn

import convert
from convert import largest_difference
from models import NETWORKS, load_network
from rnorm import measure
from rnorm.cli import Stop
from rnorm.conversions import untie
from rnorm.data import load_data
from rnorm.files import RnormError
from rnorm.measure import KEYS
from rnorm.plan import Item, disk_space
from rnorm.runs import Member, Settings, converted_members, read_config
from rnorm.store import Store, load, load_history, save
from train import start_cnn


def study(tmp_path, npz, *flags):
    """Run the small study; returns its directory."""
    assert run("experiments.py", "--dataset", npz, "--results_dir", tmp_path, "--batch_size", 25, *flags) == 0
    return next(path.parent for path in tmp_path.glob("*/config.json"))


def plan_of(capsys, *arguments: object) -> tuple[str, dict]:
    """What --exec 0 prints, and its last line for programs."""
    capsys.readouterr()
    assert run("experiments.py", *arguments, "--exec", 0) == 0
    text = capsys.readouterr().out
    return text, json.loads(text.splitlines()[-1].removeprefix("plan: "))


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
    assert tied.pop("identity")["conversion"] == "tied" and all_by_name.pop("identity")["conversion"] == "tied1+5"
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
def test_a_network_that_was_edited_is_another_run_also_to_the_plan(tmp_path, npz, monkeypatch, width, pool):
    """With the same shapes of weights, and with others."""
    flags = ("--epochs", 2, "--n_splits", 1)
    path = study(tmp_path, npz, *flags, "--cnn_only")
    before = states(path)

    def edited(num_classes: int) -> nn.Sequential:
        layers = list(small_cnn(num_classes))
        return nn.Sequential(*layers[:5], nn.Conv2d(4, width, 3), nn.ReLU(), pool, *layers[8:-1], nn.Linear(width, 3))

    monkeypatch.setitem(NETWORKS, "small", edited)
    calls = [lambda: study(tmp_path, npz, *flags), lambda: study(tmp_path, npz, *flags, "--exec", 0)]
    for call in (*calls, lambda: run("convert.py", path)):
        with pytest.raises(RnormError, match=r"is another run: layer \d .* there, .* here.*; give the same") as error:
            call()
        assert "\n" not in str(error.value) and states(path) == before


def test_a_conversion_is_compared_with_its_cnn_in_double_precision():
    torch.manual_seed(0)
    cnn, x = small_cnn(), torch.randn(20, 3, 32, 32)
    elcn = untie(cnn, (3, 32, 32))
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
    assert "0 of 35 networks complete" in plan and plan.splitlines()[-1].startswith("plan: {")
    assert not (tmp_path / "results").exists()


def test_the_plan_of_a_run_counts_what_is_left_and_its_last_line_is_json(tmp_path, npz, capsys):
    """Also once old checkpoints were deleted, and with files of other networks in the run's directory."""
    flags = ("--dataset", npz, "--results_dir", tmp_path, "--batch_size", 25, "--epochs", 3, "--splits", 1, 3)
    whole = plan_of(capsys, *flags)[1]
    path = study(tmp_path, npz, *flags[6:], "--cnn_only")
    assert whole["run"] == str(path) and whole["state"] == "incomplete" and whole["seconds"] >= 0
    left = plan_of(capsys, *flags)[1]["bytes"]
    assert 0 < left < whole["bytes"]
    for name in ("other_1.pyT", "small_lc5_version_1/small_lc5_version_1.pyT", "small_lc_version_2/small_2.pyT"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(bytes(10**6))
    assert plan_of(capsys, *flags)[1]["bytes"] == left
    study(tmp_path, npz, *flags[6:])
    for checkpoint in path.glob("**/small*_[01].pyT"):
        checkpoint.unlink()
    text, plan = plan_of(capsys, *flags)
    assert plan == {"run": str(path), "state": "complete", "bytes": 0, "seconds": 0} and "0.00 GB needed" in text


def test_a_name_longer_than_a_files_can_be_is_refused(tmp_path, npz):
    long = npz.with_name("é" * 120 + ".npz")
    npz.rename(long)
    for flags in (("--dataset", npz, "--epochs", 999, "--splits", *range(100)), ("--dataset", long)):
        for more in ((), ("--exec", 0)):
            with pytest.raises(Stop, match="the run's name is longer than a file's can be") as stop:
                run("experiments.py", *flags, *more, "--results_dir", tmp_path / "results")
            assert stop.value.status == 2
    assert not (tmp_path / "results").exists()


def test_the_plan_counts_the_histories_that_checkpoints_hold(tmp_path, npz):
    """At 10,000 epochs they are most of what is written."""
    member, sizes = Member(tmp_path / "run", Settings(epochs=10_000)), []
    images = load_data(str(npz), npz.parent, 0, torch.device("cpu"))
    training = start_cnn(member, images)
    parameters = sum(parameter.numel() for parameter in training.net.parameters())
    ((_, planned, _),) = disk_space([Item(member, parameters, 0, 0)], None)
    keys = [*KEYS[1:], "untied_1", "untied_5", "untied_9"]
    for training.epoch in (0, 10_000):
        values = np.random.default_rng(0).random((len(keys), training.epoch + 1)).tolist()
        training.history = {"checkpoints": list(range(training.epoch + 1)), **dict(zip(keys, values))}
        save(Store(member, images)._state(training), tmp_path / "file")
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
    text, _ = plan_of(capsys, "--dataset", npz, "--results_dir", tmp_path, "--epochs", 2, "--convert_to", "fc")
    assert "1 checkpoint stays of each" in text


def test_converted_networks_are_evaluated_as_often_as_asked_for_and_the_runs_name_says_so(tmp_path, npz):
    path = study(tmp_path, npz, "--epochs", 8, "--splits", 8, "--lc_evaluations", 2)
    assert "-lc_evaluations=2" in path.name
    assert history_of(path, "lc", 8)["checkpoints"] == [0, 1, 8] and len(history_of(path)["checkpoints"]) == 9


# New quantities


def evaluating(monkeypatch, **quantities) -> None:
    """From now on `evaluate` records other quantities too, functions of the network."""

    def evaluate(net, fast, data):
        return measure.evaluate(net, fast, data) | {key: of(net) for key, of in quantities.items()}

    monkeypatch.setattr(convert, "evaluate", evaluate)


def bias(net: nn.Sequential) -> float:
    return net[-1].bias.sum().item()


def test_a_new_quantity_is_added_to_the_histories_of_all_networks_and_nothing_else_changes(
    command, copy, undisturbed, monkeypatch, capsys
):
    (copy / "small_2.pyT").unlink()
    evaluating(monkeypatch, bias=bias, train_acc=lambda net: -7.0)
    assert run("convert.py", copy, "--evaluate") == 0
    out = capsys.readouterr().out
    assert "CNN: 3 evaluations measured again; 1 have no checkpoint\n" in out
    assert "eLCN from 3: 4 evaluations measured again\n" in out
    assert "train_acc differs at 3, by up to" in out and "the old values stay. Record it under another name" in out
    assert "train_loss differs" not in out and "untied" not in out
    settings, _ = read_config(copy)
    for member in (Member(copy, settings), *converted_members(copy, settings)):
        history, before = load_history(member), load_history(Member(undisturbed, *list(vars(member).values())[1:]))
        added = history.pop("bias")
        assert equal(history, before)
        for epoch, value in zip(history["checkpoints"], added):
            checkpoint = member.checkpoint(epoch)
            assert value == bias(load_network(checkpoint)) if checkpoint.exists() else math.isnan(value)
    changed = {"small_2.pyT", *(str(path.relative_to(copy)) for path in copy.rglob("*.hist"))}
    assert set(differences(copy, undisturbed)) == changed
    before = states(copy)
    assert run("experiments.py", *command[1:]) == 0 and states(copy) == before  # the run is complete, as it was


def test_what_was_added_to_an_unfinished_run_stays_when_it_goes_on(server, command, undisturbed, monkeypatch):
    server.run(*command, fault={"action": "SIGTERM", "at": 27, "call": "step"})  # in epoch 2 of the eLCN from 1
    path = run_of(command)
    evaluating(monkeypatch, bias=bias)
    assert run("convert.py", path, "--evaluate") == 0
    assert server.run(*command).status == 0
    cnn, elcn = history_of(path), history_of(path, "lc", 1)
    assert not any(map(math.isnan, cnn.pop("bias"))) and equal(cnn, history_of(undisturbed))
    assert [math.isnan(value) for value in elcn.pop("bias")] == [False, False, True, True]
    assert equal(elcn, history_of(undisturbed, "lc", 1))
