"""The networks, and how one is loaded from any of their checkpoints."""

import hashlib
import shutil

import pytest
import torch
from compare_runs import equal
from small_study import small_cnn

from models import load_network, make_network, skinnyprime
from rnorm.checkpoints import load, load_weights
from rnorm.conversions import layers_of, untie
from rnorm.files import RnormError
from rnorm.layers import LocallyConnected2d, layer_shapes

IMAGE = (3, 32, 32)


def test_skinnyprime_has_the_published_shapes_and_state_dict():
    cnn = skinnyprime()
    shapes = layer_shapes(cnn.net, IMAGE)
    assert [shapes[i] for i in (2, 4, 6, 8, 10, 12)] == [
        (64, 17, 17), (64, 8, 8), (64, 8, 8), (64, 3, 3), (64, 3, 3), (64, 1, 1),
    ]  # fmt: skip
    assert shapes[-1] == (10,)
    assert {name: tuple(p.shape) for name, p in cnn.state_dict().items()} == {
        "net.1.weight": (64, 3, 4, 4), "net.1.bias": (64,), "net.5.weight": (64, 64, 5, 5), "net.5.bias": (64,),
        "net.9.weight": (64, 64, 3, 3), "net.9.bias": (64,), "net.13.weight": (10, 64), "net.13.bias": (10,),
    }  # fmt: skip


def test_seed_0_starts_at_the_published_weights():
    """torch promises one generator on all platforms; the last bits of what is made of it were the same in all versions
    tried. Should they ever change, this is where it shows."""
    torch.manual_seed(0)
    digest = hashlib.sha256()
    for tensor in skinnyprime(10).state_dict().values():
        digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == "1424ec033e828b4167ba693391d9ac7d80eb0da7948ddfdc75aaa97fbbad594b"


def test_a_network_that_is_not_listed_is_refused_by_name():
    assert isinstance(make_network("small", 7).net[-1], torch.nn.Linear)
    with pytest.raises(RnormError, match="^tiny: no such network .*; there are skinnyprime, alexnetprime, small$"):
        make_network("tiny", 10)


def test_every_checkpoint_of_a_run_loads_as_the_network_it_holds(server, command):
    conversions = ("--convert_to", "lc", "lc5", "tied")
    assert server.run(*command[:-2], *conversions, *command[-2:]).status == 0
    checkpoints = list(command[-1].rglob("*.pyT"))
    assert len(checkpoints) == 4 + 6 * 4
    for path in checkpoints:
        network = load_network(path)
        untied = [i for i, layer in enumerate(layers_of(network)) if isinstance(layer, LocallyConnected2d)]
        assert untied == ([1, 5] if "_lc_" in path.name else [5] if "_lc5_" in path.name else [])
        assert not network.training and network(torch.zeros(2, *IMAGE)).shape == (2, 3)
        assert equal(dict(network.state_dict()), dict(load(path)["weights"]))


@pytest.mark.parametrize("at_step, name", [(4, "small_0.pyT"), (18 + 9, "small_lc_version_1.pyT")])
def test_an_unfinished_network_is_what_the_checkpoints_beside_it_are(server, command, at_step, name):
    server.run(*command, fault={"action": "SIGTERM", "at": at_step, "call": "step"})
    latest = next(command[-1].rglob("latest.pyT"))
    assert type(load_network(latest)) is type(load_network(latest.with_name(name)))
    assert equal(dict(load_network(latest).state_dict()), dict(load(latest)["weights"]))
    alone = command[-1] / "latest.pyT"
    shutil.copy(latest, alone)
    with pytest.raises(RnormError, match="its name is not that of a checkpoint"):
        load_network(alone)


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
        ("other_3.pyT", {"weights": weights}, "other: no such network in models.py"),
        ("small_x.pyT", {"weights": weights}, "its name is not that of a checkpoint"),
        ("small_fcn_version_3.pyT", {"weights": weights}, "no such conversion"),
        ("small_lc_version_3.pyT", {"weights": weights}, "do not fit"),
        ("skinnyprime_3.pyT", {"weights": weights}, "is no checkpoint of skinnyprime"),
        ("small_3.pyT", {"weights": cut}, "do not fit"),
        ("small_4.pyT", {"optimizer": {}}, "is no checkpoint of small"),
        ("small_5.pyT", {"weights": {}}, "is no checkpoint of small"),
        ("small_6.pyT", {"weights": [1]}, "is no checkpoint of small"),
        ("small_7.pyT", {"weights": {"x": torch.zeros(())}}, "is no checkpoint of small"),
        ("small_8.pyT", [], "is damaged .it is not a dict."),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(RnormError, match=cause) as refused:
            load_network(tmp_path / name)
        assert "\n" not in str(refused.value) and (name in str(refused.value) or name == "other_3.pyT")
    (tmp_path / "small_9.pyT").write_bytes(b"")
    with pytest.raises(RnormError, match="small_9.pyT is damaged"):
        load_network(tmp_path / "small_9.pyT")
    with pytest.raises(FileNotFoundError):
        load_network(tmp_path / "small_10.pyT")
