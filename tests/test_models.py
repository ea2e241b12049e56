"""The networks: which there may be, and how one is loaded from any of its checkpoints."""

import hashlib

import pytest
import torch
from compare_runs import equal
from small_study import small_cnn
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from models import NETWORKS, alexnetprime, converted_network, load_network, make_network, skinnyprime
from rnorm.conversions import untie
from rnorm.data import Data
from rnorm.fast import streamline
from rnorm.files import RnormError
from rnorm.layers import LocallyConnected2d, layer_shapes
from rnorm.measure import evaluate
from rnorm.store import PREFIX, load, load_weights, to_file
from train import SGD, sgd_step

IMAGE = (3, 32, 32)


def test_skinnyprime_has_the_published_shapes_and_state_dict():
    cnn = skinnyprime()
    shapes = layer_shapes(cnn, IMAGE)
    assert [shapes[i][1] for i in (2, 4, 6, 8, 10, 12)] == [17, 8, 8, 3, 3, 1] and shapes[-1] == (10,)
    assert {name: tuple(p.shape) for name, p in to_file(cnn).items()} == {
        "net.1.weight": (64, 3, 4, 4), "net.1.bias": (64,), "net.5.weight": (64, 64, 5, 5), "net.5.bias": (64,),
        "net.9.weight": (64, 64, 3, 3), "net.9.bias": (64,), "net.13.weight": (10, 64), "net.13.bias": (10,),
    }  # fmt: skip


def test_alexnetprime_has_the_published_layers():
    cnn = alexnetprime(100)
    shapes = {name: tuple(p.shape) for name, p in to_file(cnn).items() if name.endswith("weight")}
    assert shapes == {
        "net.1.weight": (64, 3, 4, 4), "net.5.weight": (192, 64, 5, 5), "net.9.weight": (384, 192, 3, 3),
        "net.12.weight": (256, 384, 3, 3), "net.15.weight": (256, 256, 3, 3), "net.20.weight": (512, 256),
        "net.23.weight": (512, 512), "net.25.weight": (100, 512),
    }  # fmt: skip
    assert [i for i, layer in enumerate(cnn) if isinstance(layer, nn.Dropout)] == [19, 22]


def test_seed_0_starts_at_the_published_weights():
    """torch promises one generator on all platforms; the last bits of what is made of it were the same in all versions
    tried. Should they ever change, this is where it shows."""
    torch.manual_seed(0)
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in skinnyprime(10).state_dict().values()))
    assert digest.hexdigest() == "1424ec033e828b4167ba693391d9ac7d80eb0da7948ddfdc75aaa97fbbad594b"


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, padding=1)


def net_of(*layers: nn.Module) -> nn.Sequential:
    """These layers, which keep an image's shape, and a Linear one."""
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 32 * 32, 10))


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_network_that_cannot_be_trained_and_measured_is_refused_by_name(monkeypatch):
    again = conv()
    for model, cause in (
        (net_of(spectral_norm(conv())), r"layer 0, Conv2d\(3, 3, .*, has hooks, such as weight_norm's"),
        (net_of(nn.ReLU(), weight_norm(conv())), "layer 1, Conv2d.*, has hooks"),
        (net_of(prune.l1_unstructured(conv(), "weight", 0.5)), "layer 0, Conv2d.*, has hooks"),
        (net_of(parametrizations.spectral_norm(conv())), "layer 0 is ParametrizedConv2d; a network here is a sequence"),
        (net_of(nn.Sequential(conv(), nn.ReLU())), "layer 0 is Sequential; "),
        (net_of(Residual(conv(), nn.ReLU())), "layer 0 is Residual"),
        (net_of(conv(), nn.BatchNorm2d(3), nn.ReLU()), "layer 1 is BatchNorm2d"),
        (net_of(again, nn.ReLU(), again), "two layers share parameters"),
        (Residual(conv()), "it has to be an nn.Sequential, not Residual"),
        (nn.Sequential(conv(), nn.Flatten()), r"of images of 3 x 32 x 32 it makes \(3072,\), not 10 logits"),
    ):
        monkeypatch.setitem(NETWORKS, "mine", lambda num_classes, model=model: model)
        with pytest.raises(RnormError, match=f"^mine: .*{cause}"):
            make_network("mine", 10)


@pytest.mark.parametrize("shape, right", [((1, 28, 28), True), ((3, 64, 64), False), ((3, 8, 8), False)])
def test_skinnyprime_takes_images_that_end_at_one_pixel(shape, right):
    if right:
        assert make_network("skinnyprime", 2, shape)(torch.zeros(3, *shape)).shape == (3, 2)
    else:
        with pytest.raises(RnormError, match="skinnyprime does not fit images of .*; use another --network") as refused:
            make_network("skinnyprime", 2, shape)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("conversion", ["", "lc"])
@pytest.mark.parametrize("first", [(nn.ReLU(True),), (nn.Dropout(inplace=True),), (nn.Dropout(), nn.ReLU(True))])
def test_no_first_layer_changes_the_images(monkeypatch, first, conversion):
    monkeypatch.setitem(NETWORKS, "mine", lambda num_classes: net_of(*first, conv(), nn.ReLU(True)))
    net = converted_network("mine", conversion, 10)
    x, y = torch.randn(20, *IMAGE), torch.arange(20) % 10
    images, fast = x.clone(), streamline(net, IMAGE)
    sgd_step(fast, SGD(net, [0.1] * 4, 0.1), x, y)
    evaluate(net, fast, Data(x, y, x, y, 10, ""))
    assert torch.equal(x, images)


@pytest.mark.parametrize("at_step, count", [(4, 1 + 1), (18 + 9, 4 + 2 + 1), (10**6, 4 + 6 * 4)])
def test_every_checkpoint_of_a_run_finished_or_not_loads_as_the_network_it_holds(server, command, at_step, count):
    command[-2:-2] = ["--convert_to", "lc", "lc5", "tied1+5"]
    server.run(*command, fault={"action": "SIGTERM", "at": at_step, "call": "step"})
    checkpoints = list(command[-1].rglob("*.pyT"))
    assert len(checkpoints) == count
    for path in checkpoints:
        network = load_network(path)
        untied = any(isinstance(layer, LocallyConnected2d) for layer in network)
        assert untied == ("_lc" in path.parent.name)
        assert not network.training and network(torch.zeros(2, *IMAGE)).shape == (2, 3)
        assert equal(to_file(network), load(path)["weights"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conversion", ["", "lc", "lc2", "fc", "tied"])
def test_a_network_without_a_linear_layer_loads(monkeypatch, tmp_path, conversion, bias):
    def mine(num_classes: int) -> nn.Sequential:
        last = nn.Conv2d(4, num_classes, 3, bias=bias)
        return nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.ReLU(), last, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    monkeypatch.setitem(NETWORKS, "mine", mine)
    network = converted_network("mine", conversion, 7)
    path = tmp_path / (f"mine_{conversion}_version_3.pyT" if conversion else "mine_3.pyT")
    torch.save({"weights": to_file(network), "identity": {"num_classes": 7, "image_shape": [3, 32, 32]}}, path)
    x = torch.randn(2, *IMAGE)
    assert torch.equal(load_network(path)(x), network(x)) and network(x).shape == (2, 7)


def test_files_that_begin_with_a_dot_are_nobodys(tmp_path):
    """macOS puts a `._` file beside each file on a foreign disk."""
    for name in ("small_3.pyT", "latest.pyT"):
        torch.save({"weights": to_file(small_cnn(10))}, tmp_path / name)
        (tmp_path / f"._{name}").write_bytes(b"x")
    assert load_network(tmp_path / "latest.pyT")(torch.zeros(2, *IMAGE)).shape == (2, 10)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_the_released_code_load(undisturbed, tmp_path, zipped):
    """Weights and optimizer alone, of ten classes, contiguous, as a zip or in the format before torch 1.6."""
    cnn = small_cnn(10)
    for name, net in (("small_3.pyT", cnn), ("small_lc_version_3.pyT", untie(cnn, IMAGE))):
        weights = {key: value.contiguous() for key, value in to_file(net).items()}
        assert all(key.startswith(PREFIX) == (net is cnn) for key in weights)
        optimizer, path = torch.optim.SGD(net.parameters(), 0.05).state_dict(), tmp_path / name
        torch.save({"weights": weights, "optimizer": optimizer}, path, _use_new_zipfile_serialization=zipped)
        load_weights(net, load(path))
        for network in (net, load_network(path)):
            assert equal({key: value.contiguous() for key, value in to_file(network).items()}, weights)


def test_what_is_no_checkpoint_of_a_network_here_is_refused_in_one_line(undisturbed, tmp_path):
    weights = load(undisturbed / "small_3.pyT")["weights"]
    cut = {key: value[..., :1] for key, value in weights.items()}
    for name, content, cause in (
        ("latest.pyT", {"weights": weights}, "its name is not that of a checkpoint"),  # with none beside it
        ("other_3.pyT", {"weights": weights}, "other: no such network in models.py"),
        ("small_x.pyT", {"weights": weights}, "its name is not that of a checkpoint"),
        ("small_fcn_version_3.pyT", {"weights": weights}, "no such conversion"),
        ("small_lc_version_3.pyT", {"weights": weights}, "do not fit the network: 1.weight"),
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
