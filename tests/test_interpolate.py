"""Paths between two solutions: their ends are the checkpoints, their middles are worked by hand."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import interpolate
import models
from conftest import make_arrays
from interpolate import Average, between, train_string
from rnorm import cli
from rnorm.conversions import fully_connect, lift, untie
from rnorm.data import Data
from rnorm.measure import evaluate
from rnorm.runs import Settings, has_files_of_a_run
from small_study import run as study
from small_study import small_cnn

IMAGE = (3, 32, 32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the CNN, an eLCN, a partly untied network and an eFCN, for one epoch each."""
    root = tmp_path_factory.mktemp("interpolate")
    np.savez(root / "tiny.npz", **make_arrays())
    flags = ["--dataset", root / "tiny.npz", "--epochs", 1, "--splits", 0, "--batch_size", 20, "--cnn_lr", 0.3]
    flags += ["--lc_lr", 0.2, "--convert_to", "lc", "lc1", "fc", "--results_dir", root / "runs"]
    assert study("experiments.py", *flags) == 0
    (run,) = (root / "runs").iterdir()
    return run


def file_of(run, conversion: str):
    return run / (f"small_{conversion}_version_0/small_{conversion}_version_1.pyT" if conversion else "small_1.pyT")


def interpolated(*arguments) -> int:
    return interpolate.main([str(argument) for argument in (*arguments, "--device", "cpu")])


@pytest.mark.parametrize("method", ["linear", "curvilinear", "average", "string"])
def test_the_ends_of_a_path_are_what_the_runs_recorded(method, run, tmp_path):
    out = tmp_path / "new" / "path"
    flags = ["--method", method, "--points", 3, "--epochs", 1, "--out", out]
    assert interpolated(file_of(run, ""), file_of(run, "lc"), *flags) == 0
    (file,) = out.glob("*.hist")
    assert file.name == f"{method}-small_1-to-small_lc_version_0_1.hist"
    path = torch.load(file, weights_only=True)
    ends = {"method": method, "a": str(file_of(run, "")), "b": str(file_of(run, "lc"))}
    assert {key: path.pop(key) for key in ends} == ends and path["alpha"] == [0, 0.5, 1]
    for i, history in ((0, run), (-1, run / "small_lc_version_0")):
        recorded = torch.load(history / "evaluation-history.hist", weights_only=True)
        assert set(path) == {"alpha"} | set(recorded) - {"checkpoints"}
        for key in set(path) - {"alpha"}:
            assert path[key][i] == pytest.approx(recorded[key][-1], rel=1e-5, abs=1e-6, nan_ok=True), key
    for key in ("norm", "log_prod_spectral", "log_path1", "untied"):
        assert math.isnan(path[key][1]) == (method == "average")
    rows = list(csv.DictReader(file.with_suffix(".csv").open()))
    assert all(row[key] == end for row in rows for key, end in ends.items())
    assert all([float(row[key]) for row in rows] == pytest.approx(path[key], nan_ok=True) for key in path)
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_a_path_leads_from_any_network_of_a_run_to_any_other_and_lies_beside_it(run):
    assert interpolated(file_of(run, "fc"), file_of(run, "lc1"), "--points", 2) == 0
    path = file_of(run, "lc1").parent / "linear-small_fc_version_0_1-to-small_lc1_version_0_1.hist"
    assert "nonlocal" in torch.load(path, weights_only=True)


def test_a_path_never_replaces_that_of_other_checkpoints_or_of_another_method(run, tmp_path, capsys):
    pair, out = [file_of(run, ""), file_of(run, "lc")], ["--points", 2, "--out", tmp_path / "out"]
    assert interpolated(*pair, *out) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    ends_with("name another --out", [copy_of(run, tmp_path / "copy"), pair[1], *out], capsys)
    assert interpolated(*pair, *out, "--method", "curvilinear") == 0 == interpolated(*pair[::-1], *out)
    assert {path: path.read_bytes() for path in before} == before and len([*(tmp_path / "out").iterdir()]) == 9
    assert not has_files_of_a_run(tmp_path / "out")  # a run may begin there


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(interpolate, "load_network", lambda file: pytest.fail("a network was loaded"))

    def refuse(dir):
        raise PermissionError(13, "Permission denied")  # root may write anywhere

    monkeypatch.setattr(interpolate.tempfile, "TemporaryFile", refuse)
    ends_with("cannot be written", [file_of(run, ""), file_of(run, "lc"), "--out", tmp_path], capsys)


def linear(*weights: float) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(len(weights), 1, bias=False))
    nn.init.zeros_(net[0].weight).data += torch.tensor(weights)
    return net


def test_the_middle_of_each_path_worked_by_hand():
    a, b = linear(2, 0), linear(0, 4)
    assert between(a, b, 0.5)[0].weight.tolist() == [[1, 2]] and between(a, b, 0.25)[0].weight.tolist() == [[1.5, 1]]
    expected = [[3 / math.sqrt(5), 6 / math.sqrt(5)]]  # along (1, 2), with norm (2 + 4) / 2
    torch.testing.assert_close(between(a, b, 0.5, curvilinear=True)[0].weight.detach(), torch.tensor(expected))
    for alpha, end in ((0, a), (1, b)):
        assert all(torch.equal(between(a, b, alpha, curved)[0].weight, end[0].weight) for curved in (False, True))
    assert between(a, linear(-2, 0), 0.5, curvilinear=True)[0].weight.tolist() == [[0, 0]]  # zero has no direction
    # Outputs: relu(x) and relu(-x) average to |x| / 2; the network between their weights is 0.
    a, b = nn.Sequential(*linear(1.0), nn.ReLU()), nn.Sequential(*linear(-1.0), nn.ReLU())
    average, x = Average([a, b]), torch.tensor([[-4.0], [6.0]])
    average.alpha = 0.5
    assert average(x).tolist() == [[2], [3]] and between(a, b, 0.5)(x).tolist() == [[0], [0]]


def some_data() -> Data:
    torch.manual_seed(0)
    x, y = torch.randn(4, *IMAGE), torch.arange(4) % 3
    return Data(x, y, x, y, 3, "")


class Images(torch.Tensor):
    """Images that note how they were indexed."""

    def __getitem__(self, batch):
        self.indices.append(batch)
        return torch.Tensor.__getitem__(self.as_subclass(torch.Tensor), batch)


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_points_of_a_string_move_to_their_neighbours_at_once_worked_by_hand(shuffle, monkeypatch):
    """Without an order that a GPU would wait for."""
    monkeypatch.setattr(interpolate, "streamline", lambda net, image_shape: net)
    monkeypatch.setattr(interpolate, "sgd_step", lambda net, sgd, x, y: None)
    data, nets = some_data(), [linear(weight) for weight in (0.0, 8.0, 0.0, 4.0)]
    data.x_train, data.x_train.indices = data.x_train.as_subclass(Images), []
    for expected in ([0, 4, 3, 4], [0, 2.75, 3.5, 4]):  # 8 + (0 + 0 - 16) / 4, and 0 + (8 + 4 - 0) / 4
        train_string(nets, data, Settings(batch_size=4, shuffle=shuffle), epochs=1, stiffness=0.25)
        assert [net[0].weight.item() for net in nets] == expected
    assert {type(batch) for batch in data.x_train.indices} == {torch.Tensor if shuffle else slice}


def test_a_string_takes_sgd_steps_between_fixed_ends():
    torch.manual_seed(0)
    data, nets = some_data(), [small_cnn(3) for _ in range(3)]
    before = [[p.clone() for p in net.parameters()] for net in nets]
    loss = nn.functional.cross_entropy(nets[1](data.x_train), data.y_train)
    gradients = torch.autograd.grad(loss, nets[1].parameters())
    train_string(nets, data, Settings(batch_size=4, lc_lr=0.1), epochs=1, stiffness=0.0)
    for end in (0, 2):
        assert all(torch.equal(p, old) for p, old in zip(nets[end].parameters(), before[end]))
    for p, old, gradient in zip(nets[1].parameters(), before[1], gradients):
        torch.testing.assert_close(p.detach(), (old - 0.1 * gradient).detach())


@pytest.mark.parametrize("pair", [("", ""), ("", "lc1"), ("lc1", "lc"), ("lc", "fc"), ("", "fc"), ("fc", "fc")])
def test_the_simpler_network_is_lifted_to_the_others_form(pair):
    torch.manual_seed(0)
    forms = {"": lambda net: net, "lc1": lambda net: untie(net, IMAGE, {1}), "lc": lambda net: untie(net, IMAGE),
             "fc": lambda net: fully_connect(net, IMAGE)}  # fmt: skip
    data, nets = some_data(), [forms[name](small_cnn(3)) for name in pair]
    for ends in (nets, nets[::-1]):
        lifted = lift(*ends, IMAGE)
        shapes = [[(name, p.shape) for name, p in net.state_dict().items()] for net in lifted]
        assert shapes[0] == shapes[1] == [(name, p.shape) for name, p in nets[1].state_dict().items()]
        for net, end in zip(lifted, ends):
            values, expected = evaluate(net, net, data), evaluate(end, end, data)
            for key in set(values) & set(expected):
                assert values[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5, nan_ok=True), key


def copy_of(run, to, **changes):
    """A run's CNN in a run whose config.json differs."""
    to.mkdir()
    (to / "small_1.pyT").write_bytes(file_of(run, "").read_bytes())
    config = json.loads((run / "config.json").read_text())
    del config["crc32"]
    for key, value in changes.items():
        (config["settings"] if key in config["settings"] else config)[key] = value
    (to / "config.json").write_text(json.dumps(config))
    return to / "small_1.pyT"


def ends_with(said: str, arguments, capsys, status: int = cli.BAD_INPUT):
    with pytest.raises(SystemExit) as ended:
        cli.finish(interpolate.main, ["interpolate.py", *map(str, arguments), "--device", "cpu"], saves=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == status and said in line


def test_ends_that_cannot_be_compared_are_refused_in_one_line(run, tmp_path, capsys):
    good, other = file_of(run, ""), tmp_path / "tiny.npz"
    ends_with("there.pyT is no file", [good, tmp_path / "there.pyT"], capsys)
    ends_with("config.json is damaged", [good, run / "config.json"], capsys)
    for key, value in (("data_sha256", "0"), ("network", "skinnyprime"), ("data_size", 30)):
        ends_with(f"differ in {key}", [good, copy_of(run, tmp_path / key, **{key: value})], capsys)
    np.savez(other, **make_arrays(seed=1))
    ends_with("is not the data", [good, copy_of(run, tmp_path / "changed", dataset_file=str(other))], capsys)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.LazyLinear(3)])
def test_a_network_that_cannot_be_measured_here_is_refused_in_one_line(run, layer, monkeypatch, capsys):
    net = small_cnn(3)
    monkeypatch.setitem(models.NETWORKS, "small", lambda classes: nn.Sequential(*net[:2], layer, *net[2:]))
    ends_with(type(layer).__name__, [file_of(run, ""), file_of(run, "")], capsys)


def test_the_figure_has_losses_on_panels_of_their_own_and_the_chord_of_each():
    path = {"alpha": [0, 0.5, 1], "train_loss": [1, 5, 2], "test_loss": [3, 9, 3], "train_acc": [90, 80, 70],
            "test_acc": [60, 50, 60]}  # fmt: skip
    panels = interpolate.figure_of(path, "A path").axes
    assert [ax.get_ylabel() for ax in panels] == ["train loss", "test loss", "train accuracy (%)", "test accuracy (%)"]
    drawn = [[list(line.get_ydata()) for line in ax.lines] for ax in panels[:2]]
    assert drawn == [[[1, 2], [1, 5, 2]], [[3, 3], [3, 9, 3]]]


def test_an_interrupted_string_ends_cleanly(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.Signals, "received", next(iter(cli.SIGNALS)))
    flags = ["--method", "string", "--points", 3, "--out", tmp_path]
    ends_with("nothing was written", [file_of(run, ""), file_of(run, "lc"), *flags], capsys, status=130)
    assert list(tmp_path.iterdir()) == []
