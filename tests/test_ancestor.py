"""What the study's ancestor did: further conversions, networks, data and optimisers, resumed bit-identically."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import convert
import experiments
import models
import train
from compare_runs import differences
from rnorm import cli
from rnorm.cli import Interrupted
from rnorm.conversions import find_conversion, fully_connect, layers_of, untie
from rnorm.data import Data, load_data
from rnorm.layers import LocallyConnected2d
from rnorm.measure import evaluate, norms
from rnorm.runs import Settings
from small_study import small_cnn

IMAGE = (3, 32, 32)


def dropping(num_classes: int = 10) -> models.ConvNet:
    """The small network with dropout."""
    layers = list(small_cnn(num_classes).net)
    return models.ConvNet(*layers[:-1], nn.Dropout(0.3), layers[-1])


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    monkeypatch.setitem(models.NETWORKS, "dropping", dropping)


def data_of(num_classes: int = 3, dtype: torch.dtype = torch.float64) -> Data:
    torch.manual_seed(1)
    x, y = torch.randn(40, *IMAGE, dtype=dtype), torch.arange(40) % num_classes
    return Data(x[:25], y[:25], x[25:], y[25:], num_classes, "")


def test_the_matrix_of_a_convolution_worked_by_hand():
    """An input of 2 x 3, a kernel of 1 x 2 and two channels: 4 positions each, of which every one reads two inputs."""
    conv = nn.Conv2d(1, 2, (1, 2))
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[[1.0, 2.0]]], [[[3.0, 4.0]]]]))
        conv.bias.copy_(torch.tensor([5.0, 6.0]))
    flatten, linear, unflatten = fully_connect(nn.Sequential(conv), (1, 2, 3))
    assert linear.weight.tolist() == [
        [1, 2, 0, 0, 0, 0], [0, 1, 2, 0, 0, 0], [0, 0, 0, 1, 2, 0], [0, 0, 0, 0, 1, 2],
        [3, 4, 0, 0, 0, 0], [0, 3, 4, 0, 0, 0], [0, 0, 0, 3, 4, 0], [0, 0, 0, 0, 3, 4],
    ]  # fmt: skip
    assert linear.bias.tolist() == [5, 5, 5, 5, 6, 6, 6, 6]
    assert unflatten(linear(flatten(torch.zeros(7, 1, 2, 3)))).shape == (7, 2, 2, 2)


def test_skinnyprimes_efcn_has_the_published_layers():
    with torch.device("meta"):
        efcn = fully_connect(models.skinnyprime().net, IMAGE)
    assert {name: tuple(p.shape) for name, p in efcn.state_dict().items()} == {
        "2.weight": (18496, 3888), "2.bias": (18496,), "8.weight": (4096, 9216), "8.bias": (4096,),
        "14.weight": (576, 1600), "14.bias": (576,), "19.weight": (10, 64), "19.bias": (10,),
    }  # fmt: skip


@pytest.mark.parametrize("conversion", ["lc", "lc1", "lc5", "lc1+5", "fc"])
def test_every_rung_of_the_ladder_computes_and_records_the_same(conversion):
    torch.manual_seed(0)
    cnn, data = small_cnn().double(), data_of()
    rung = layers_of(find_conversion(conversion).convert(cnn, IMAGE))
    assert convert.largest_difference(cnn, rung, data.x_train) < 1e-12
    of_the_cnn, of_the_rung = (evaluate(net, net, data) for net in (cnn.net, rung))
    for key in set(of_the_cnn) & set(of_the_rung):
        assert of_the_rung[key] == pytest.approx(of_the_cnn[key], rel=1e-9, abs=1e-9, nan_ok=True), key
    assert set(of_the_rung) - set(of_the_cnn) == ({"untied_2", "untied_8", "nonlocal"} if conversion == "fc" else set())
    assert of_the_rung.get("nonlocal", 0) == 0


@pytest.mark.parametrize("name", ["skinnyprime", "alexnetprime"])
def test_the_ladder_of_the_real_networks_in_single_precision(name):
    torch.manual_seed(0)
    cnn = models.make_network(name, 10).eval()
    x = torch.randn(3, *IMAGE)
    assert convert.largest_difference(cnn, untie(cnn.net, IMAGE), x) < 1e-5
    if name == "skinnyprime":
        assert convert.largest_difference(cnn, fully_connect(cnn.net, IMAGE), x) < 1e-5


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 2, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(1, 2), bias=False),
        LocallyConnected2d(3, 2, (6, 7), (2, 3), stride=(1, 2), padding=(0, 1)),
    ],
)
def test_any_layer_of_convolutions_becomes_a_matrix(layer):
    torch.manual_seed(0)
    net = nn.Sequential(layer, nn.ReLU()).double()
    efcn = fully_connect(net, (3, 6, 7))
    x = torch.randn(5, 3, 6, 7, dtype=torch.float64)
    assert convert.largest_difference(net, efcn, x) < 1e-12
    again = fully_connect(efcn, (3, 6, 7))
    assert again.state_dict().keys() == efcn.state_dict().keys()
    assert norms(again, (3, 6, 7)) == norms(efcn, (3, 6, 7))


def test_nonlocal_and_untied_of_an_efcn_worked_by_hand():
    """The matrix [[1, 1, 0], [0, 1, 1]] of a filter (1, 1), with 2 put outside the local fields, then a tap changed."""
    conv = nn.Conv2d(1, 1, (1, 2), bias=False)
    nn.init.ones_(conv.weight)
    efcn = fully_connect(nn.Sequential(conv), (1, 1, 3))
    with torch.no_grad():
        efcn[1].weight[0, 2] = 2
        recorded = norms(efcn, (1, 1, 3))
        assert recorded["nonlocal"] == pytest.approx(4 / 8)
        assert recorded["untied"] == recorded["untied_1"] == pytest.approx(math.sqrt(4 / 8))
        efcn[1].weight[0, 0] = 3
    recorded = norms(efcn, (1, 1, 3))
    assert recorded["nonlocal"] == pytest.approx(4 / 16)
    assert recorded["untied"] == pytest.approx(math.sqrt((4 + 1 + 1) / 16))


def test_a_partly_untied_network_unties_just_the_named_layers():
    net = layers_of(find_conversion("lc5").convert(small_cnn(), IMAGE))
    assert isinstance(net[1], nn.Conv2d) and isinstance(net[5], LocallyConnected2d)
    assert [n for n in norms(net, IMAGE) if n.startswith("untied_")] == ["untied_1", "untied_5"]


def test_alexnetprime_has_the_published_layers():
    cnn = models.alexnetprime(100)
    shapes = {name: tuple(p.shape) for name, p in cnn.state_dict().items() if name.endswith("weight")}
    assert shapes == {
        "net.1.weight": (64, 3, 4, 4), "net.5.weight": (192, 64, 5, 5), "net.9.weight": (384, 192, 3, 3),
        "net.12.weight": (256, 384, 3, 3), "net.15.weight": (256, 256, 3, 3), "net.20.weight": (512, 256),
        "net.23.weight": (512, 512), "net.25.weight": (100, 512),
    }  # fmt: skip
    assert [i for i, layer in enumerate(cnn.net) if isinstance(layer, nn.Dropout)] == [19, 22]


def test_top_five_accuracy_is_recorded_with_more_than_ten_classes():
    data = data_of(12)
    values = evaluate(small_cnn(12).double().net, Logits(data), data)
    assert values["train_acc"] == 0 and values["train_top5_acc"] == 100 and values["test_top5_acc"] == 100
    net = small_cnn(10).double().net
    assert not any("top5" in key for key in evaluate(net, net, data_of(10)))


class Logits(nn.Module):
    """Ranks the true class of `data_of` fifth, in whichever set."""

    def __init__(self, data: Data):
        super().__init__()
        self.sets = {len(data.x_train): data.y_train, len(data.x_test): data.y_test}

    def forward(self, x):
        y = self.sets[len(x)]
        others = torch.arange(12.0).expand(len(x), 12)
        return others.scatter(1, y[:, None], torch.where(y < 7, 7.5, 6.5)[:, None])


def arguments(npz, results, *more):
    return [
        "--dataset", str(npz), "--epochs", "2", "--splits", "1", "--batch_size", "10", "--results_dir", str(results),
        "--device", "cpu", *more,
    ]  # fmt: skip


RESUMED = {
    "momentum": ["--network", "small", "--momentum", "0.9", "--weight_decay", "0.01"],
    "decay": ["--network", "small", "--weight_decay", "0.01", "--precision", "float64"],
    "dropout": ["--network", "dropping", "--shuffle"],
    "fc": ["--network", "dropping", "--momentum", "0.5", "--convert_to", "fc", "lc1"],
}


@pytest.mark.parametrize("flags", RESUMED.values(), ids=RESUMED)
def test_a_run_stopped_in_the_middle_of_an_epoch_resumes_bit_identically(flags, npz, tmp_path, monkeypatch):
    assert experiments.main(arguments(npz, tmp_path / "undisturbed", *flags)) == 0
    stops, original = iter([3, 5, 4, 2, 4]), train.check_signals
    for left in stops:
        counter = iter(range(left))

        def stop(counter=counter):
            if next(counter, None) is None:
                raise Interrupted

        monkeypatch.setattr(train, "check_signals", stop)
        with pytest.raises(Interrupted):
            experiments.main(arguments(npz, tmp_path / "stopped", *flags))
        torch.manual_seed(left)  # another process would start elsewhere
    monkeypatch.setattr(train, "check_signals", original)
    assert experiments.main(arguments(npz, tmp_path / "stopped", *flags)) == 0
    (run,), (undisturbed,) = (tmp_path / "stopped").iterdir(), (tmp_path / "undisturbed").iterdir()
    assert differences(run, undisturbed) == []


def test_a_deleted_checkpoint_is_made_anew_with_momentum_and_dropout(npz, tmp_path):
    flags = ["--network", "dropping", "--momentum", "0.9", "--splits", "2"]
    assert experiments.main(arguments(npz, tmp_path / "runs", *flags, "--cnn_only")) == 0
    (run,) = (tmp_path / "runs").iterdir()
    path = run / "dropping_2.pyT"
    before = torch.load(path)
    path.unlink()
    torch.manual_seed(3)
    assert convert.main([str(run), "--device", "cpu"]) == 0
    after = torch.load(path)
    assert all(torch.equal(before["weights"][key], after["weights"][key]) for key in before["weights"])


def test_what_a_checkpoint_holds(npz, tmp_path):
    """Plain SGD without dropout has no state; momentum has a buffer for each parameter; dropout has a random state."""
    held = {}
    for name in ("small", "dropping"):
        flags = ["--network", name, "--cnn_only", *(["--momentum", "0.9"] if name == "dropping" else [])]
        assert experiments.main(arguments(npz, tmp_path / name, *flags)) == 0
        (run,) = (tmp_path / name).iterdir()
        held[name] = torch.load(run / f"{name}_2.pyT", weights_only=True)
    assert "random" not in held["small"] and held["small"]["optimizer"]["state"] == {}
    assert "random" in held["dropping"] and len(held["dropping"]["optimizer"]["state"]) == 6
    assert held["dropping"]["optimizer"]["param_groups"][0]["momentum"] == 0.9


@pytest.mark.parametrize(
    "part, value",
    [
        *[("optimizer", value) for value in (None, {}, {"state": {0: 1}}, {"state": {}}, {"state": [1, 2]})],
        *[("random", value) for value in (None, {}, torch.zeros(5056, dtype=torch.uint8))],
    ],
)
def test_a_checkpoint_without_its_optimizers_or_random_state_is_set_aside(part, value, npz, tmp_path, capsys):
    flags = ["--network", "dropping", "--momentum", "0.9", "--cnn_only"]
    assert experiments.main(arguments(npz, tmp_path / "runs", *flags)) == 0
    (run,) = (tmp_path / "runs").iterdir()
    undisturbed = torch.load(run / "dropping_2.pyT")
    torch.save({**undisturbed, part: value}, run / "dropping_2.pyT")
    (run / "evaluation-history.hist").unlink()
    assert experiments.main(arguments(npz, tmp_path / "runs", *flags)) == 0
    assert "damaged" in capsys.readouterr().err
    again = torch.load(run / "dropping_2.pyT")
    assert all(torch.equal(again["weights"][key], undisturbed["weights"][key]) for key in again["weights"])


def test_double_precision_is_double_throughout(npz, tmp_path):
    flags = ["--network", "small", "--precision", "float64", "--convert_to", "lc", "fc"]
    assert experiments.main(arguments(npz, tmp_path / "runs", *flags)) == 0
    (run,) = (tmp_path / "runs").iterdir()
    for path in run.rglob("*.pyT"):
        assert {p.dtype for p in models.load_network(path).parameters()} == {torch.float64}
        assert {p.dtype for p in torch.load(path)["weights"].values()} == {torch.float64}


def test_fc_keeps_the_last_checkpoint_unless_told_otherwise(npz, tmp_path, capsys):
    flags = ["--network", "small", "--convert_to", "fc", "lc"]
    assert experiments.main(arguments(npz, tmp_path / "runs", *flags)) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert [p.name for p in (run / "small_fc_version_1").glob("*.pyT")] == ["small_fc_version_2.pyT"]
    assert len(list((run / "small_lc_version_1").glob("*.pyT"))) == 3
    assert experiments.main(arguments(npz, tmp_path / "all", *flags, "--keep", "all")) == 0
    assert len(list((tmp_path / "all").glob("*/small_fc_version_1/*.pyT"))) == 3
    assert experiments.main([*arguments(npz, tmp_path, "--exec", "0", "--convert_to", "fc")]) == 0
    assert "1 checkpoint stays of each, 442 MB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--network", "alexnet"], "there are skinnyprime, alexnetprime"),
        (["--dataset", "cifar1000"], "cifar100"),
        (["--precision", "float16"], "float64"),
        (["--momentum", "1"], "--momentum 1.0: has to be at least 0 and less than 1"),
        (["--momentum", "nan"], "--momentum"),
        (["--momentum", "-0.1"], "--momentum"),
        (["--weight_decay", "-1"], "--weight_decay -1.0: has to be"),
        (["--weight_decay", "inf"], "--weight_decay"),
        (["--convert_to", "fcn"], "--convert_to fcn: no such conversion"),
        (["--convert_to", "lc2"], "layer 2 is no convolution"),
        (["--convert_to", "fc5"], "--convert_to fc5"),
        (["--keep", "first"], "--keep"),
    ],
)
def test_bad_values_are_refused_in_one_line(flags, said, npz, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.finish(experiments.main, ["experiments.py", *arguments(npz, tmp_path / "runs", *flags)])
    assert ended.value.code == cli.BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_names_of_runs_end_with_the_later_settings():
    name = Settings(network="alexnetprime", dataset="cifar100", precision="float64", momentum=0.9, weight_decay=5e-4)
    expected = "-network=alexnetprime-dataset=cifar100-precision=float64-momentum=0.9-weight_decay=0.0005"
    assert name.run_name == "epochs=150-n_splits=20-cnn_lr=0.05-lc_lr=0.01" + expected


def test_cifar100_is_normalised_with_its_own_constants(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, directory, train):
            self.data = np.full((100, 32, 32, 3), 51, np.uint8)
            self.targets = list(range(100))

    monkeypatch.setattr("torchvision.datasets.CIFAR100", Fake)
    data = load_data("cifar100", tmp_path, 0, torch.device("cpu"))
    assert data.num_classes == 100
    expected = [(0.2 - 0.49137) / 0.24706, (0.2 - 0.48235) / 0.24353, (0.2 - 0.44667) / 0.26157]
    assert data.x_test[7, :, 3, 5].tolist() == pytest.approx(expected, rel=1e-5)
