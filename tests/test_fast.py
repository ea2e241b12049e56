"""Speed changes no result beyond rounding: streamlined networks and quick steps against plain PyTorch."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models import skinnyprime
from rnorm.fast import Captured, Stage, streamline
from rnorm.layers import LocallyConnected2d, layer_shapes
from test_layers import WAYS, by, close, of_the_definition, pairs
from train import SGD, make_step

IMAGE = (3, 32, 32)


def head(*layers):
    """`layers` with ReLU and max pooling after them, as in skinnyprime."""
    return (*layers, nn.ReLU(), nn.MaxPool2d(3, 2))


NETWORKS = {
    "padding in both, uneven": head(nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(3, 4, 3, padding=1)),
    "two padding layers": head(nn.ZeroPad2d(1), nn.ZeroPad2d(2), nn.Conv2d(3, 4, 3)),
    "negative padding": head(nn.ZeroPad2d((-1, 1, 2, -2)), nn.Conv2d(3, 4, 3)),
    "padding with nothing to pad for": (nn.Conv2d(3, 4, 3), nn.ZeroPad2d(1), nn.ReLU(), nn.ZeroPad2d(1)),
    "ReLU in place": (nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    "pooling before ReLU": (nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2), nn.ReLU()),
    "no pooling": (nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)),
    "average pooling": (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(3, 2)),
    "pooling with padding": (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)),
    "pooling with ceil_mode": (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
    "pooling with dilation": (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2, dilation=2)),
    "dropout between": (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.MaxPool2d(2), nn.Dropout2d(0.5)),
    "batch normalisation between": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2)),
    "groups": head(nn.ZeroPad2d(1), nn.Conv2d(3, 6, 3, groups=3)),
    "padding as a word": head(nn.Conv2d(3, 4, 3, padding="same")),
    "reflected padding": head(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
    "layers within a layer": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.MaxPool2d(3, 2)),
}  # fmt: skip


def untied(net, image_shape, noise=0.1):
    """`net` with every convolution that can be untied untied, and different filters at every position."""
    layers, shapes = copy.deepcopy(list(net)), layer_shapes(net, image_shape)
    for i, layer in enumerate(layers):
        if type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros":
            layers[i] = LocallyConnected2d.from_conv2d(layer, shapes[i][1:])
            layers[i].weight.data += noise * torch.randn_like(layers[i].weight)
    return nn.Sequential(*layers).train(net.training)


def assert_streamlined_is_the_same(net, image_shape, n=3):
    fast = streamline(net, image_shape)
    assert set(fast.parameters()) == set(net.parameters())
    x = torch.randn(n, *image_shape, dtype=torch.float64, requires_grad=True)
    inputs = (x, *net.parameters())
    out = net(x)
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, grad)
    for way in WAYS:
        fast_out = by(way, fast)(x)
        assert fast_out.shape == out.shape and close(fast_out, out, 1e-12)
        got = torch.autograd.grad(fast_out, inputs, grad)
        assert all(close(*both, 1e-12) for both in zip(got, gradients))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_streamlined_network_computes_the_same_function_and_gradients(name):
    torch.manual_seed(0)
    net = nn.Sequential(*NETWORKS[name]).double()
    if "dropout" in name:
        net.eval()
    for image_shape in ((3, 11, 14), (3, 12, 9)):
        assert_streamlined_is_the_same(net, image_shape)
        assert_streamlined_is_the_same(untied(net, image_shape), image_shape)


@settings(max_examples=25)
@given(st.data())
def test_so_does_a_streamlined_network_of_any_geometry(data):
    def draw(low, high):
        return data.draw(pairs(low, high))

    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, draw(1, 4), draw(1, 3), draw(0, 2), draw(1, 2), bias=data.draw(st.booleans()))
    net = nn.Sequential(
        nn.ZeroPad2d(draw(0, 3) + draw(0, 3)), conv, *[nn.ReLU()] * data.draw(st.integers(0, 2)),
        nn.MaxPool2d(draw(1, 3), draw(1, 4)), nn.Flatten(),
    ).double()  # fmt: skip
    # The largest kernel reaches over 7 rows, at stride 3 three outputs over 13: enough for any pooling.
    image_shape = (3, *(data.draw(st.integers(13, 20)) for _ in "HW"))
    assert_streamlined_is_the_same(net, image_shape)
    assert_streamlined_is_the_same(untied(net, image_shape), image_shape)


def test_streamlining_leaves_out_of_skinnyprime_what_its_pooling_never_reads():
    torch.manual_seed(0)
    cnn = skinnyprime().double()
    for net in (cnn, untied(cnn, (3, 32, 32))):
        stages = [layer for layer in streamline(net, (3, 32, 32)) if isinstance(layer, Stage)]
        assert [stage.outputs for stage in stages] == [(17, 17), (7, 7), (3, 3)]
        assert_streamlined_is_the_same(net, (3, 32, 32), n=2)


def batches(device="cpu", count=6):
    """Batches of 8 of skinnyprime's images, in float64, the last one smaller."""
    generator = torch.Generator().manual_seed(0)
    for n in [8] * (count - 1) + [5]:
        x = torch.randn(n, *IMAGE, generator=generator, dtype=torch.float64)
        yield x.to(device), torch.randint(10, (n,), generator=generator).to(device)


def network(name):
    """The study's CNN or eLCN, always with the same weights, in float64."""
    torch.manual_seed(0)
    cnn = skinnyprime().double()
    return cnn if name == "CNN" else untied(cnn, IMAGE, noise=0.01)


def train_quickly(net, device="cpu", count=6):
    """A copy of `net` after some batches, as training takes them, and the sum of their losses."""
    net = copy.deepcopy(net).to(device)
    step = make_step(streamline(net, IMAGE), SGD(net, [0.05] * 8, 0.05), batch_size=8)
    total = sum(step(x, y).item() for x, y in batches(device, count))
    return net.cpu(), total


@pytest.fixture(scope="module", params=["CNN", "eLCN"])
def trained(request):
    """(a network before training, after 6 steps in plain PyTorch, the sum of its losses)."""
    start, total = network(request.param), 0.0
    net = of_the_definition(start)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for x, y in batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        total += loss.item()
    assert not any(close(*both, 1e-3) for both in zip(net.parameters(), start.parameters()))
    return start, net, total


@pytest.mark.parametrize("device, way", [
    ("cpu", "rows"), ("cpu", "patches"), pytest.param("cuda", "patches", marks=pytest.mark.cuda)
])  # fmt: skip
def test_six_steps_end_at_the_weights_of_plain_torch(trained, device, way):
    start, expected, loss = trained
    net, total = train_quickly(by(way, start), device)
    assert total == pytest.approx(loss, rel=1e-6)
    assert all(close(*both, 1e-10) for both in zip(net.parameters(), expected.parameters()))


def test_what_is_frozen_stays_as_it_is(trained):
    start = copy.deepcopy(trained[0])
    frozen = {"5.weight", "9.bias", "13.weight"}
    for name, parameter in start.named_parameters():
        parameter.requires_grad = name not in frozen
    net, _ = train_quickly(start, count=2)
    for (name, parameter), old in zip(net.named_parameters(), start.parameters()):
        assert torch.equal(parameter, old) == (name in frozen)


def test_on_the_cpu_the_step_itself_is_called_whatever_it_is():
    calls = []
    step = Captured(lambda x, y: calls.append(len(x)) or torch.tensor(len(x)), 8, [])
    assert [step(torch.zeros(n, 1), torch.zeros(n)).item() for n in (8, 5, 8)] == calls == [8, 5, 8]


IMPORTS = """
import sys, torch
from rnorm import layers
from train import SGD, sgd_step
net = torch.nn.Sequential(layers.LocallyConnected2d(3, 2, 8, 8), torch.nn.Flatten())
net[0].way = layers.Patches
before = len(sys.modules)
sgd_step(net, SGD(net, [0.1, 0.1], 0.1, 0.9), torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
sys.exit(len(sys.modules) - before > 50)
"""


def test_a_step_does_not_import_torchs_compiler():
    """That takes seconds in every process."""
    assert subprocess.run([sys.executable, "-c", IMPORTS], cwd=Path(__file__).parents[1]).returncode == 0
