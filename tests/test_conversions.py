"""Conversions, and the claim the study rests on: an untied network computes the same function as its CNN."""

import copy

import pytest
import torch
from small_study import small_cnn
from torch import nn

from convert import largest_difference
from models import make_network, skinnyprime
from rnorm.conversions import ACTIVATIONS, CONVERSIONS, find_conversion, fully_connect, untie
from rnorm.layers import LocallyConnected2d, layer_shapes
from rnorm.measure import norms

IMAGE = (3, 32, 32)


def test_elcn_and_efcn_have_the_published_state_dicts():
    with torch.device("meta"):
        elcn, efcn = (convert(skinnyprime(), IMAGE) for convert in (untie, fully_connect))
    assert {name: tuple(p.shape) for name, p in elcn.state_dict().items()} == {
        "1.weight": (1, 64, 3, 17, 17, 16), "1.bias": (1, 64, 17, 17),
        "5.weight": (1, 64, 64, 8, 8, 25), "5.bias": (1, 64, 8, 8),
        "9.weight": (1, 64, 64, 3, 3, 9), "9.bias": (1, 64, 3, 3), "13.weight": (10, 64), "13.bias": (10,),
    }  # fmt: skip
    assert {name: tuple(p.shape) for name, p in efcn.state_dict().items()} == {
        "2.weight": (18496, 3888), "2.bias": (18496,), "8.weight": (4096, 9216), "8.bias": (4096,),
        "14.weight": (576, 1600), "14.bias": (576,), "19.weight": (10, 64), "19.bias": (10,),
    }  # fmt: skip


@pytest.mark.parametrize("network, conversion, untied", [
    ("skinnyprime", "lc", [1, 5, 9]), ("skinnyprime", "lc5", [5]), ("skinnyprime", "lc1+9", [1, 9]),
    ("skinnyprime", "tied", []), ("skinnyprime", "tied1+9", []), ("skinnyprime", "cnn", []), ("skinnyprime", "fc", []),
    ("skinnyprime", "head", []),
    ("alexnetprime", "lc", [1, 5, 9, 12, 15]),
])  # fmt: skip
def test_a_converted_network_computes_the_same_function_and_the_named_convolutions_are_untied(
    network, conversion, untied
):
    torch.manual_seed(0)
    cnn = make_network(network, 10)
    converted = find_conversion(conversion).convert(cnn, IMAGE)
    assert [i for i, layer in enumerate(converted) if isinstance(layer, LocallyConnected2d)] == untied
    assert largest_difference(cnn, converted, torch.randn(5, *IMAGE)) < 1e-12
    assert not {id(p) for p in cnn.parameters()} & {id(p) for p in converted.parameters()}


@pytest.mark.parametrize(
    "name, cause",
    [
        ("fcn", "no such conversion; there are lc, "), ("", "no such conversion"), ("LC", "no such conversion"),
        ("lc2", "layer 2 is no convolution; those are 1 5"), ("lc1+99", "layer 99 is no convolution"),
        ("lc-1", "no such conversion"), ("lc1+", "no such conversion"), ("lc5+1", r"to be written lc1\+5$"),
        ("lc01", "to be written lc1"), ("lc1+1", "to be written lc1"), ("lc١", "to be written lc1"),
        ("tied2", "layer 2 is no convolution"), ("tied5+1", r"to be written tied1\+5$"), ("cnn5", "no such conversion"),
        ("fc5", "no such conversion"), ("my_lc", "^my_lc: the name of a conversion has no _"),
    ],
)  # fmt: skip
def test_other_conversions_are_refused_by_name(monkeypatch, name, cause):
    monkeypatch.setitem(CONVERSIONS, "my_lc", CONVERSIONS["lc"])
    with pytest.raises(ValueError, match=cause):
        find_conversion(name).convert(small_cnn(), IMAGE)


@pytest.mark.parametrize("convert", [untie, fully_connect])
@pytest.mark.parametrize("layers", [
    (nn.Conv2d(3, 5, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(1, 2), bias=False), nn.ReLU()),
    (LocallyConnected2d(3, 2, (17, 13), (2, 3), stride=(1, 2), padding=(0, 1)), nn.ReLU()),
    (nn.ZeroPad2d((1, 0, 2, 3)), nn.Conv2d(3, 5, 4), nn.AvgPool2d(2), nn.Dropout(0.5), nn.Conv2d(5, 4, 2)),
    (nn.Conv2d(3, 5, 1), nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), nn.Dropout2d(), nn.AdaptiveAvgPool2d((3, 7))),
])  # fmt: skip
def test_any_sequential_of_the_supported_layers_is_converted_and_stays_so(layers, convert):
    torch.manual_seed(0)
    shape, features = (3, 17, 13), nn.Sequential(*layers, nn.Flatten())
    net = nn.Sequential(*features, nn.Linear(layer_shapes(features, shape)[-1][0], 4))
    before = copy.deepcopy(net.state_dict())
    converted = convert(net, shape)
    assert largest_difference(net, converted, torch.randn(3, *shape)) < 1e-12
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    again = convert(converted, shape)
    assert again.state_dict().keys() == converted.state_dict().keys() and norms(again, shape) == norms(converted, shape)


def test_other_layers_are_refused_with_the_reason_and_the_place():
    with pytest.raises(ValueError, match="layer 1 is BatchNorm2d; norms of weights mean nothing .*conversions.py"):
        untie(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), IMAGE)
    with pytest.raises(ValueError, match="layer 0 is Upsample; a network here is a sequence of .*conversions.py"):
        untie(nn.Sequential(nn.Upsample(2), nn.Conv2d(3, 3, 1)), IMAGE)
    with pytest.raises(ValueError, match="layer 1, AdaptiveAvgPool2d.* windows overlap"):
        untie(nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(5)), IMAGE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_untied_and_changes_no_function(activation):
    torch.manual_seed(0)
    layer = activation(0.1, 20) if activation is nn.Threshold else activation()
    net = nn.Sequential(nn.Conv2d(3, 4, 5, 4), layer, nn.Flatten(), nn.Linear(4 * 49, 5))
    assert largest_difference(net, untie(net, IMAGE), torch.randn(3, *IMAGE)) < 1e-12


def test_of_head_only_the_last_layer_is_trained():
    head = find_conversion("head").convert(small_cnn(), IMAGE)
    assert [p.requires_grad for p in head.parameters()] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("conversion", ["lc", "lc1", "fc", "tied", "cnn"])
def test_what_is_frozen_stays_frozen(conversion):
    cnn = small_cnn()
    cnn[1].weight.requires_grad_(False)
    cnn[5].requires_grad_(False)
    learning = [p.requires_grad for p in find_conversion(conversion).convert(cnn, IMAGE).parameters()]
    assert learning == [False, True, False, False, True, True]


@pytest.mark.parametrize(
    "conversion, positions",
    [("tied", (289, 64, 9, 1)), ("tied1+5+9", (289, 64, 9, 1)), ("tied5", (1, 64, 1, 1)), ("tied1+9", (289, 1, 9, 1))]
    + [(name, (1, 1, 1, 1)) for name in ("lc", "lc5", "cnn")],
)
def test_the_rates_are_divided_by_the_positions_of_the_convolutions_that_are_tied(conversion, positions):
    found = find_conversion(conversion)
    net = found.convert(skinnyprime(), IMAGE)
    assert found.rates(net, IMAGE, 0.01) == [0.01 / count for count in positions for _ in ("weight", "bias")]


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
