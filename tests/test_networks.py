"""The networks, and the claim the study rests on: an untied network computes the same function as its CNN."""

import copy

import pytest
import torch
from torch import nn

from checkpoints import load_weights
from convert import largest_difference, untie
from models import ConvNet, LocallyConnected2d, layer_shapes, skinnyprime
from cli import Stop
from small_study import small_cnn

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


def test_the_elcn_has_the_published_number_of_filters_and_state_dict():
    elcn = untie(skinnyprime().net, IMAGE)
    assert [elcn[i].weight.numel() for i in (1, 5, 9)] == [887_808, 6_553_600, 331_776]
    assert {name: tuple(p.shape) for name, p in elcn.state_dict().items()} == {
        "1.weight": (1, 64, 3, 17, 17, 16), "1.bias": (1, 64, 17, 17),
        "5.weight": (1, 64, 64, 8, 8, 25), "5.bias": (1, 64, 8, 8),
        "9.weight": (1, 64, 64, 3, 3, 9), "9.bias": (1, 64, 3, 3), "13.weight": (10, 64), "13.bias": (10,),
    }  # fmt: skip


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_an_untied_network_computes_the_same_function(dtype, tolerance):
    torch.manual_seed(0)
    cnn = skinnyprime().to(dtype)
    x = torch.randn(20, *IMAGE, dtype=dtype)
    assert largest_difference(cnn, untie(cnn.net, IMAGE), x) < tolerance


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
        (nn.BatchNorm2d(3), "BatchNorm2d"),
        (nn.Sigmoid(), "Sigmoid"),
        (nn.Conv2d(3, 3, 3, groups=3), "groups=3"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), "circular"),
    ],
)
def test_other_layers_are_refused_by_name(layer, name):
    with pytest.raises(Stop, match=name):
        untie(nn.Sequential(layer), IMAGE)


def test_weights_survive_the_way_through_a_state_dict_of_any_layout():
    """Files of the released code hold contiguous tensors; ours lie in the order of the matrix products."""
    torch.manual_seed(0)
    elcn, other = untie(small_cnn().net, IMAGE), untie(small_cnn().net, IMAGE)
    strides = other[1].weight.stride()
    load_weights(other, {"weights": {name: p.contiguous() for name, p in elcn.state_dict().items()}})
    assert other[1].weight.stride() == strides
    x = torch.randn(4, *IMAGE)
    assert torch.equal(elcn(x), other(x))


def test_the_layer_is_initialised_like_a_convolution():
    torch.manual_seed(0)
    layer, conv = LocallyConnected2d(8, 16, 12, 5), nn.Conv2d(8, 16, 5)
    assert layer.weight.abs().max() <= 1 / (8 * 25) ** 0.5
    assert layer.weight.std().item() == pytest.approx(conv.weight.std().item(), rel=0.05)


def test_the_layer_documents_what_it_does():
    layer = LocallyConnected2d(16, 33, (50, 100), kernel_size=(3, 5), stride=(2, 1), padding=(4, 2))
    assert layer(torch.randn(2, 16, 50, 100)).shape == (2, 33, 28, 100)
    assert "kernel_size=(3, 5)" in repr(layer)


@pytest.mark.parametrize("arguments", [(0, 1, 5, 3), (1, 1, 5, 6), (1, 1, 5, 3, 0), (1, 1, 5, 3, 1, -1)])
def test_impossible_sizes_are_refused(arguments):
    with pytest.raises(ValueError):
        LocallyConnected2d(*arguments)


def test_an_input_of_another_size_is_refused():
    with pytest.raises(ValueError, match="expected an input"):
        LocallyConnected2d(3, 4, 8, 3)(torch.zeros(1, 3, 9, 8))


def test_the_layer_trains_in_anyones_network_with_any_optimiser():
    torch.manual_seed(0)
    net = ConvNet(LocallyConnected2d(3, 4, 8, 3, bias=False), nn.Flatten(), nn.Linear(4 * 36, 2))
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    x, y = torch.randn(32, 3, 8, 8), torch.arange(32) % 2
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
