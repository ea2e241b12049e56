"""The networks: which there may be, and how one is loaded from any of its checkpoints."""

import hashlib

import pytest
import torch
from compare_runs import equal
from small_study import small_cnn
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from models import NETWORKS, ConvNet, alexnetprime, converted_network, load_network, make_network, skinnyprime
from rnorm.checkpoints import load, load_weights
from rnorm.conversions import layers_of, untie
from rnorm.data import Data
from rnorm.fast import Step
from rnorm.files import RnormError
from rnorm.layers import layer_shapes
from rnorm.measure import evaluate

IMAGE = (3, 32, 32)


def test_skinnyprime_has_the_published_shapes_and_state_dict():
    cnn = skinnyprime()
    shapes = layer_shapes(cnn.net, IMAGE)
    assert [shapes[i][1] for i in (2, 4, 6, 8, 10, 12)] == [17, 8, 8, 3, 3, 1] and shapes[-1] == (10,)
    assert {name: tuple(p.shape) for name, p in cnn.state_dict().items()} == {
        "net.1.weight": (64, 3, 4, 4), "net.1.bias": (64,), "net.5.weight": (64, 64, 5, 5), "net.5.bias": (64,),
        "net.9.weight": (64, 64, 3, 3), "net.9.bias": (64,), "net.13.weight": (10, 64), "net.13.bias": (10,),
    }  # fmt: skip


def test_alexnetprime_has_the_published_layers():
    cnn = alexnetprime(100)
    shapes = {name: tuple(p.shape) for name, p in cnn.state_dict().items() if name.endswith("weight")}
    assert shapes == {
        "net.1.weight": (64, 3, 4, 4), "net.5.weight": (192, 64, 5, 5), "net.9.weight": (384, 192, 3, 3),
        "net.12.weight": (256, 384, 3, 3), "net.15.weight": (256, 256, 3, 3), "net.20.weight": (512, 256),
        "net.23.weight": (512, 512), "net.25.weight": (100, 512),
    }  # fmt: skip
    assert [i for i, layer in enumerate(cnn.net) if isinstance(layer, nn.Dropout)] == [19, 22]


def test_seed_0_starts_at_the_published_weights():
    """torch promises one generator on all platforms; the last bits of what is made of it were the same in all versions
    tried. Should they ever change, this is where it shows."""
    torch.manual_seed(0)
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in skinnyprime(10).state_dict().values()))
    assert digest.hexdigest() == "1424ec033e828b4167ba693391d9ac7d80eb0da7948ddfdc75aaa97fbbad594b"


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, padding=1)


def of(*layers: nn.Module, base: type = ConvNet) -> ConvNet:
    """These layers, which keep an image's shape, and a Linear one."""
    return base(*layers, nn.Flatten(), nn.Linear(3 * 32 * 32, 10))


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class OwnForward(ConvNet):
    def forward(self, x):
        return self.net(x).relu()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_network_that_cannot_be_trained_and_measured_is_refused_by_name(monkeypatch):
    again, scaled, outside = conv(), of(conv()), of(conv())
    scaled.scale = nn.Parameter(torch.ones(10))
    outside.net = Residual(*outside.net)
    for model, cause in (
        (of(spectral_norm(conv())), r"layer 0, Conv2d\(3, 3, .*, has hooks, such as weight_norm's"),
        (of(nn.ReLU(), weight_norm(conv())), "layer 1, Conv2d.*, has hooks"),
        (of(prune.l1_unstructured(conv(), "weight", 0.5)), "layer 0, Conv2d.*, has hooks"),
        (of(parametrizations.spectral_norm(conv())), "layer 0 is ParametrizedConv2d; a network here is made of Conv2d"),
        (of(nn.Sequential(conv(), nn.ReLU())), "layer 0 is Sequential; .* made of Conv2d, .*, Linear$"),
        (of(Residual(conv(), nn.ReLU())), "layer 0 is Residual"),
        (of(conv(), nn.BatchNorm2d(3), nn.ReLU()), "layer 1 is BatchNorm2d"),
        (of(again, nn.ReLU(), again), "two layers share parameters"),
        (of(conv(), base=OwnForward), "all its layers in `net` and no forward of its own"),
        (of(conv(), base=nn.Sequential), "has to be a ConvNet"),
        (scaled, "all its layers in `net`"),
        (outside, "all its layers in `net`"),
    ):
        monkeypatch.setitem(NETWORKS, "mine", lambda num_classes, model=model: model)
        with pytest.raises(RnormError, match=f"^mine: .*{cause}"):
            make_network("mine", 10)


@pytest.mark.parametrize("conversion", ["", "lc"])
@pytest.mark.parametrize("first", [(nn.ReLU(True),), (nn.Dropout(inplace=True),), (nn.Dropout(), nn.ReLU(True))])
def test_no_first_layer_changes_the_images(monkeypatch, first, conversion):
    monkeypatch.setitem(NETWORKS, "mine", lambda num_classes: of(*first, conv(), nn.ReLU(True)))
    net = layers_of(converted_network("mine", conversion, 10))
    x, y = torch.randn(20, *IMAGE), torch.arange(20) % 10
    images, step = x.clone(), Step(net, IMAGE, 0.1, batch_size=20)
    step(x, y)
    evaluate(net, step.net, Data(x, y, x, y, 10, ""))
    assert torch.equal(x, images)


@pytest.mark.parametrize("at_step, count", [(4, 1 + 1), (18 + 9, 4 + 2 + 1), (10**6, 4 + 6 * 4)])
def test_every_checkpoint_of_a_run_finished_or_not_loads_as_the_network_it_holds(server, command, at_step, count):
    command[-2:-2] = ["--convert_to", "lc", "lc5", "tied1+5"]
    server.run(*command, fault={"action": "SIGTERM", "at": at_step, "call": "step"})
    checkpoints = list(command[-1].rglob("*.pyT"))
    assert len(checkpoints) == count
    for path in checkpoints:
        network = load_network(path)
        assert isinstance(network, ConvNet) == ("_lc" not in path.parent.name)
        assert not network.training and network(torch.zeros(2, *IMAGE)).shape == (2, 3)
        assert equal(dict(network.state_dict()), dict(load(path)["weights"]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conversion", ["", "lc", "lc2", "fc", "tied"])
def test_a_network_without_a_linear_layer_loads(monkeypatch, tmp_path, conversion, bias):
    def mine(num_classes: int) -> ConvNet:
        last = nn.Conv2d(4, num_classes, 3, bias=bias)
        return ConvNet(nn.Conv2d(3, 4, 4, stride=4), nn.ReLU(), last, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    monkeypatch.setitem(NETWORKS, "mine", mine)
    network = converted_network("mine", conversion, 7)
    path = tmp_path / (f"mine_{conversion}_version_3.pyT" if conversion else "mine_3.pyT")
    torch.save({"weights": network.state_dict()}, path)
    x = torch.randn(2, *IMAGE)
    assert torch.equal(load_network(path)(x), network(x)) and network(x).shape == (2, 7)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_the_released_code_load(undisturbed, tmp_path, zipped):
    """Weights and optimizer alone, contiguous, as a zip or in the format before torch 1.6."""
    for source, net in (
        (undisturbed / "small_3.pyT", small_cnn(3)),
        (undisturbed / "small_lc_version_1" / "small_lc_version_3.pyT", untie(small_cnn(3).net, IMAGE)),
    ):
        weights = {key: value.contiguous() for key, value in load(source)["weights"].items()}
        optimizer = torch.optim.SGD(net.parameters(), 0.05).state_dict()
        path = tmp_path / source.name
        torch.save({"weights": weights, "optimizer": optimizer}, path, _use_new_zipfile_serialization=zipped)
        load_weights(net, load(path))
        for network in (net, load_network(path)):
            assert equal({key: value.contiguous() for key, value in network.state_dict().items()}, weights)


def test_what_is_no_checkpoint_of_a_network_here_is_refused_in_one_line(undisturbed, tmp_path):
    weights = load(undisturbed / "small_3.pyT")["weights"]
    cut = {key: value[..., :1] for key, value in weights.items()}
    for name, content, cause in (
        ("latest.pyT", {"weights": weights}, "its name is not that of a checkpoint"),  # with none beside it
        ("other_3.pyT", {"weights": weights}, "other: no such network in models.py"),
        ("small_x.pyT", {"weights": weights}, "its name is not that of a checkpoint"),
        ("small_fcn_version_3.pyT", {"weights": weights}, "no such conversion"),
        ("small_lc_version_3.pyT", {"weights": weights}, "not those of the network's layers"),
        ("skinnyprime_3.pyT", {"weights": weights}, "is no checkpoint of skinnyprime"),
        ("small_3.pyT", {"weights": cut}, "do not fit"),
        ("small_4.pyT", {"optimizer": {}}, "small_4.pyT is no checkpoint of small"),
        ("small_4.pyT", {"weights": {}}, "small_4.pyT is no checkpoint of small"),
        ("small_4.pyT", {"weights": {"x": torch.zeros(())}}, "small_4.pyT is no checkpoint of small"),
        ("small_4.pyT", [], "small_4.pyT is damaged .it is not a dict."),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(RnormError, match=cause) as refused:
            load_network(tmp_path / name)
        assert "\n" not in str(refused.value)
    with pytest.raises(FileNotFoundError):
        load_network(tmp_path / "small_5.pyT")
