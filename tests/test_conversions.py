"""Conversions, and the claim the study rests on: an untied network computes the same function as its CNN."""

import copy

import pytest
import torch
from small_study import small_cnn
from torch import nn

from convert import largest_difference
from models import skinnyprime
from rnorm.conversions import CONVERSIONS, find_conversion, layers_of, same_rate, tied_rate, untie
from rnorm.fast import Step
from rnorm.layers import LocallyConnected2d, layer_shapes

IMAGE = (3, 32, 32)


def test_the_elcn_has_the_published_number_of_filters_and_state_dict():
    elcn = untie(skinnyprime().net, IMAGE)
    assert [elcn[i].weight.numel() for i in (1, 5, 9)] == [887_808, 6_553_600, 331_776]
    assert {name: tuple(p.shape) for name, p in elcn.state_dict().items()} == {
        "1.weight": (1, 64, 3, 17, 17, 16), "1.bias": (1, 64, 17, 17),
        "5.weight": (1, 64, 64, 8, 8, 25), "5.bias": (1, 64, 8, 8),
        "9.weight": (1, 64, 64, 3, 3, 9), "9.bias": (1, 64, 3, 3), "13.weight": (10, 64), "13.bias": (10,),
    }  # fmt: skip


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("conversion", ["lc", "lc5", "lc1+9", "tied", "cnn"])
def test_a_converted_network_computes_the_same_function(conversion, dtype, tolerance):
    torch.manual_seed(0)
    cnn = skinnyprime().to(dtype)
    converted = find_conversion(conversion).convert(cnn, IMAGE)
    assert largest_difference(cnn, converted, torch.randn(20, *IMAGE, dtype=dtype)) < tolerance
    assert not {id(p) for p in cnn.parameters()} & {id(p) for p in converted.parameters()}


def test_only_the_named_convolutions_are_untied():
    for name, untied in (("lc", [1, 5]), ("lc5", [5]), ("lc1+5", [1, 5]), ("tied", []), ("cnn", [])):
        net = layers_of(find_conversion(name).convert(small_cnn(), IMAGE))
        assert [i for i, layer in enumerate(net) if isinstance(layer, LocallyConnected2d)] == untied


@pytest.mark.parametrize(
    "name, cause",
    [
        ("fcn", "no such conversion; there are lc, "), ("", "no such conversion"), ("LC", "no such conversion"),
        ("lc2", "layer 2 is no convolution; those are 1 5"), ("lc1+99", "layer 99 is no convolution"),
        ("lc-1", "no such conversion"), ("lc1+", "no such conversion"), ("lc5+1", r"to be written lc1\+5$"),
        ("lc01", "to be written lc1"), ("lc1+1", "to be written lc1"), ("lc١", "to be written lc1"),
    ],
)  # fmt: skip
def test_other_conversions_are_refused_by_name(name, cause):
    with pytest.raises(ValueError, match=cause):
        find_conversion(name).convert(small_cnn(), IMAGE)


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(3, 5, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(1, 2), bias=False), nn.ReLU()),
        (nn.ZeroPad2d((1, 0, 2, 3)), nn.Conv2d(3, 5, 4), nn.AvgPool2d(2), nn.Dropout(0.5), nn.Conv2d(5, 4, 2)),
        (nn.Conv2d(3, 5, 1), nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), nn.Dropout2d(), nn.AdaptiveAvgPool2d(3)),
    ],
)
def test_any_sequential_of_the_supported_layers_is_untied(layers):
    torch.manual_seed(0)
    features = nn.Sequential(*layers, nn.Flatten())
    size = layer_shapes(features, (3, 17, 13))[-1][0]
    net = nn.Sequential(*features, nn.Linear(size, 4)).double()
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(3, 3, 17, 13, dtype=torch.float64)
    assert largest_difference(net, untie(net, (3, 17, 13)), x) < 1e-12
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    "layer, name",
    [
        (nn.BatchNorm2d(3), "layer 1, BatchNorm2d"),
        (nn.Sigmoid(), "layer 1, Sigmoid"),
        (nn.Conv2d(3, 3, 3, groups=3), "layer 1 cannot be untied: .*groups=3"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), "layer 1 cannot be untied: .*circular"),
    ],
)
def test_other_layers_are_refused_by_name(layer, name):
    with pytest.raises(ValueError, match=name):
        untie(nn.Sequential(nn.Conv2d(3, 3, 1), layer), IMAGE)


def test_a_tied_network_takes_the_elcns_steps_with_its_gradient_averaged_over_the_positions():
    torch.manual_seed(0)
    lr = 0.3
    cnn = small_cnn().double()
    elcn, tied = untie(cnn.net, IMAGE), CONVERSIONS["tied"].convert(cnn, IMAGE).net
    step = Step(tied, IMAGE, tied_rate(tied, IMAGE, lr), batch_size=20)
    for _ in range(5):
        x, y = torch.randn(20, *IMAGE, dtype=torch.float64), torch.randint(10, (20,))
        step(x, y)
        elcn.zero_grad()
        nn.functional.cross_entropy(elcn(x), y).backward()
        with torch.no_grad():
            for layer in elcn:
                for parameter in layer.parameters():
                    gradient = parameter.grad
                    if isinstance(layer, LocallyConnected2d):
                        gradient = gradient.mean((0, 1), keepdim=True)  # (H_out, W_out, ...)
                    parameter -= lr * gradient
    for i in (1, 5, 9):
        assert not torch.allclose(tied[i].weight, cnn.net[i].weight, rtol=1e-3)  # it did learn
    for i in (1, 5):  # every position's filter and bias is the tied network's
        filters = tied[i].weight.flatten(2)[None, :, :, None, None]
        assert torch.allclose(elcn[i].filters, filters.expand_as(elcn[i].filters), rtol=0, atol=1e-12)
        assert torch.allclose(elcn[i].bias, tied[i].bias.expand_as(elcn[i].bias), rtol=0, atol=1e-12)
    assert torch.allclose(elcn[9].weight, tied[9].weight, rtol=0, atol=1e-12)


def test_the_tied_rates_are_those_of_the_positions_and_all_others_are_the_same():
    net = skinnyprime().net
    expected = [0.01 / positions for positions in (289, 289, 64, 64, 9, 9, 1, 1)]
    assert tied_rate(net, IMAGE, 0.01) == pytest.approx(expected)
    for name in ("lc", "lc5", "cnn"):
        assert find_conversion(name).rates is same_rate and same_rate(net, IMAGE, 0.01) == [0.01] * 8
