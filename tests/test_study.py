"""The study as a whole: its files, and the identity of a CNN and what it was converted to at the split."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from compare_runs import equal, states
from conftest import run_of
from small_study import run, small_cnn
from torch import nn

from convert import largest_difference
from models import NETWORKS, load_network
from rnorm.cli import Stop
from rnorm.conversions import untie
from rnorm.files import RnormError
from rnorm.measure import KEYS
from rnorm.runs import Member, converted_members, read_config
from rnorm.store import load, load_history, save


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
        layers = {"log_frobenius_1", "log_frobenius_5", "log_frobenius_9"}
        assert set(values) == {*KEYS, "untied_1", "untied_5", *layers}
        assert torch.allclose(sum(torch.tensor(values[key]) for key in layers), torch.tensor(values["log_prod_norm"]))
        assert all(type(v) in (int, float) for key in values for v in values[key])


CONVERTED = ("lc", "lc5", "tied", "tied5", "tied1+5", "cnn", "head")


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
    assert all_by_name["identity"].pop("conversion") != tied["identity"].pop("conversion")
    assert equal(tied, all_by_name)
    weights = [state["weights"]["net.1.weight"] for state in (tied, tied5, on)]
    assert not any(torch.equal(*pair) for pair in itertools.combinations(weights, 2))


def test_of_head_the_last_layer_alone_moves(path):
    before, after = (load(path / "small_head_version_1" / f"small_head_version_{e}.pyT")["weights"] for e in (0, 3))
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["net.9.weight", "net.9.bias"]


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

    def edited(num_classes: int) -> nn.Sequential:
        layers = list(small_cnn(num_classes))
        return nn.Sequential(*layers[:5], nn.Conv2d(4, width, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(width, 3))

    monkeypatch.setitem(NETWORKS, "small", edited)
    for call in (study, lambda *given: study(*given, "--exec", 0), lambda *given: run("convert.py", path)):
        with pytest.raises(RnormError, match=r"is another run: layer \d .* there, .* here.*; give the same") as error:
            call(tmp_path, npz, *flags)
        assert "\n" not in str(error.value)
        assert {file: file.read_bytes() for file in path.rglob("*.*") if file.name != ".lock"} == before


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


def test_converted_networks_are_evaluated_as_their_setting_says(tmp_path, npz):
    flags = ("--epochs", 5, "--n_splits", 1)
    path = study(tmp_path, npz, *flags, "--lc_evaluations", 2)
    assert path.name.endswith("-lc_evaluations=2") and history_of(path, "lc", 1)["checkpoints"] == [0, 1, 5]
    elsewhere = study(tmp_path / "elsewhere", npz, *flags)
    assert elsewhere.name == path.name.removesuffix("-lc_evaluations=2")
    assert history_of(elsewhere, "lc", 1)["checkpoints"] == [*range(6)]
    assert run("convert.py", path, "--convert_to", "tied") == 0
    assert history_of(path, "tied", 1)["checkpoints"] == [0, 1, 5]


@pytest.mark.parametrize("evaluated", [[0, 5], [1]])
def test_a_network_evaluated_at_other_epochs_is_complete_or_continued(tmp_path, npz, capsys, evaluated):
    flags = ("--epochs", 5, "--n_splits", 1)
    path = study(tmp_path, npz, *flags)
    elcn, whole = Member(path, read_config(path)[0], "lc", 1), history_of(path, "lc", 1)
    history = {key: [values[whole["checkpoints"].index(e)] for e in evaluated] for key, values in whole.items()}
    save(history, elcn.history_file)
    if evaluated == [1]:  # unfinished
        save(load(elcn.checkpoint(1)) | {"history": history}, elcn.checkpoint(1))
        for epoch in (0, 2, 3, 4, 5):
            elcn.checkpoint(epoch).unlink()
        history = {key: values[1:] for key, values in whole.items()}
    before = states(path)
    assert study(tmp_path, npz, *flags) == path
    assert repr(history_of(path, "lc", 1)) == repr(history) and (states(path) == before) == (evaluated == [0, 5])
    assert not list(path.rglob("*.damaged")) and "damaged" not in capsys.readouterr().err


def test_finished_runs_are_evaluated_again_for_what_they_lack_and_keep_what_they_have(tmp_path, npz, capsys):
    path = study(tmp_path, npz, "--epochs", 2, "--n_splits", 1)
    elcn, whole = Member(path, read_config(path)[0], "lc", 1), history_of(path, "lc", 1)
    old = {key: values for key, values in whole.items() if key != "log_path1"}
    save(old | {"norm": [7.0, *whole["norm"][1:]]}, elcn.history_file)
    elcn.checkpoint(1).unlink()
    before = states(path)
    assert run("convert.py", path, "--evaluate", "--data_dir", npz.parent) == 0
    history = history_of(path, "lc", 1)
    assert [history["log_path1"][i] for i in (0, 2)] == pytest.approx([whole["log_path1"][i] for i in (0, 2)])
    assert history["log_path1"][1] != history["log_path1"][1] and history["norm"] == [7.0, *whole["norm"][1:]]
    assert repr({**history, "log_path1": 0, "norm": 0}) == repr({**whole, "log_path1": 0, "norm": 0})
    out = capsys.readouterr().out
    assert (
        "eLCN from 1: 2 evaluations measured again; 1 have no checkpoint" in out and "norm differs at 1, by up" in out
    )
    assert {file for file, state in states(path).items() if state != before[file]} == {
        Path(member.history_file.relative_to(path)) for member in (elcn, Member(path, elcn.settings))
    }


def test_what_was_added_to_the_history_of_an_unfinished_network_stays_when_it_goes_on(server, command, undisturbed):
    server.run(*command, fault={"action": "SIGTERM", "at": 27, "call": "step"})  # in epoch 2 of the eLCN from 1
    elcn = Member(run_of(command), read_config(undisturbed)[0], "lc", 1)
    save(load_history(elcn) | {"sharpness": [1.0, 2.0]}, elcn.history_file)
    assert server.run(*command).status == 0
    history = load_history(elcn)
    assert repr(history.pop("sharpness")) == "[1.0, 2.0, nan, nan]"
    assert equal(history, history_of(undisturbed, "lc", 1))


def test_double_precision_is_double_throughout(tmp_path, npz):
    path = study(tmp_path, npz, "--epochs", 1, "--n_splits", 1, "--precision", "float64", "--convert_to", "lc", "fc")
    for checkpoint in path.rglob("*.pyT"):
        assert {p.dtype for p in load_network(checkpoint).parameters()} == {torch.float64}
        assert {p.dtype for p in load(checkpoint)["weights"].values()} == {torch.float64}


def test_fc_keeps_the_last_checkpoint_unless_told_otherwise(tmp_path, npz):
    path = study(tmp_path, npz, "--epochs", 2, "--n_splits", 1, "--convert_to", "fc", "lc")
    assert [p.name for p in (path / "small_fc_version_1").glob("*.pyT")] == ["small_fc_version_2.pyT"]
    assert len(list((path / "small_lc_version_1").glob("*.pyT"))) == 3
