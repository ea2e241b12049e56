"""Every recorded quantity against a small case worked by hand."""

import math

import pytest
import torch
from small_study import small_cnn
from torch import nn

from rnorm.conversions import find_conversion, fully_connect, matrix_of, untie
from rnorm.data import Data
from rnorm.layers import LocallyConnected2d
from rnorm.measure import KEYS, evaluate, multiclass_margins, norms, operator_norm, path_norm, published_margins

IMAGE = (3, 32, 32)


def test_both_margins():
    logits, labels = torch.tensor([[3.0, 1.0, 0.0, -2.0]] * 3), torch.tensor([0, 1, 3])  # right, wrong, wrong
    # Published. Right: 3 - 0, the second smallest of (-2, 0, 1, 3). Wrong: 1 - 3 and -2 - 3, the largest.
    assert published_margins(logits, labels).tolist() == [3.0, -2.0, -5.0]
    # Multiclass: the largest other logit is subtracted.
    assert multiclass_margins(logits, labels).tolist() == [2.0, -2.0, -5.0]
    # Of two classes there is no second smallest logit that is not the largest.
    assert published_margins(logits[:2, :2], labels[:2]).isnan().all()
    assert multiclass_margins(logits[:2, :2], labels[:2]).tolist() == [2.0, -2.0]


def one_convolution() -> nn.Sequential:
    """A 1 x 1 convolution with weight 2 on 2 x 3 pixels, then a Linear layer with six weights 1 and six -1."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(6, 2))
    nn.init.constant_(net[0].weight, 2.0)
    nn.init.constant_(net[0].bias, 100.0)
    net[2].weight.data = torch.stack([torch.ones(6), -torch.ones(6)])
    return net


def test_norms_count_a_convolution_once_per_position_and_no_bias():
    values = norms(one_convolution(), (1, 2, 3))
    assert values["norm"] == pytest.approx(6 * 4 + 12)  # six positions with weight 2, twelve weights of size 1
    assert values["log_prod_norm"] == pytest.approx(math.log(math.sqrt(24)) + math.log(math.sqrt(12)))
    assert values["log_frobenius_0"] == pytest.approx(math.log(math.sqrt(24)))
    assert values["log_frobenius_2"] == pytest.approx(math.log(math.sqrt(12)))
    assert values["untied"] == values["untied_0"] == 0


def test_untied_is_the_distance_from_the_mean_filter_relative_to_the_weights():
    net = untie(one_convolution(), (1, 2, 3))
    net[0].weight.data[0, 0, 0, 0, 0] = 5.0  # weights 5, 2, 2, 2, 2, 2: mean 2.5, squared deviations 6.25 + 5 / 4
    values, expected = norms(net, (1, 2, 3)), math.sqrt(7.5 / (25 + 5 * 4))
    assert values["untied_0"] == pytest.approx(expected) and values["untied"] == pytest.approx(expected)


def test_the_operator_norm_is_the_largest_singular_value_of_the_matrix():
    torch.manual_seed(0)
    linear, layer = nn.Linear(30, 20), LocallyConnected2d(2, 3, (6, 5), (3, 2), stride=(1, 2), padding=1)
    assert operator_norm(linear, (30,)) == pytest.approx(torch.linalg.matrix_norm(linear.weight, 2).item(), rel=1e-4)
    conv, columns = nn.Conv2d(2, 3, 3, padding=1, bias=False), torch.eye(2 * 5 * 4).view(-1, 2, 5, 4)
    for untied, shape in ((conv, (2, 5, 4)), (LocallyConnected2d.from_conv2d(conv, (5, 4)), (2, 5, 4))):
        matrix = untied(columns).flatten(1)
        expected = torch.linalg.matrix_norm(matrix, 2).item()
        assert operator_norm(untied, shape) == pytest.approx(expected, rel=1e-4)
    assert 0 < operator_norm(layer, (2, 6, 5)) <= torch.linalg.matrix_norm(matrix_of(layer).weight, 2).item() * 1.0001
    linear.weight.data[0, 0] = math.nan
    assert math.isnan(operator_norm(linear, (30,)))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("pool", [
    nn.MaxPool2d(2, 1), nn.MaxPool2d(2, 2, padding=1), nn.MaxPool2d(2, 1, dilation=2), nn.AvgPool2d(2),
    nn.AdaptiveMaxPool2d(2), nn.AdaptiveAvgPool2d((2, 1)), nn.MaxPool2d(3, 2, ceil_mode=True),
])  # fmt: skip
def test_path_norms_are_sums_over_paths(pool, power):
    """A path: a pixel, an output of the convolution, an input of the last layer, a logit. All are multiplied out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, (2, 1)), nn.ReLU(), pool, nn.Flatten(), nn.LazyLinear(3)).double()
    net(torch.zeros(1, 1, 5, 4).double())
    conv, last = net[0], net[4]
    first = torch.stack([conv(image) - conv.bias[:, None, None] for image in torch.eye(20).double().view(-1, 1, 5, 4)])
    first = first.abs().pow(power)  # (pixels, 2, 4, 4): paths from each pixel to the convolution's outputs
    units = torch.eye(32).double().view(-1, 2, 4, 4)
    read = pool(units)  # (32, 2, h, w): which outputs a window reads, and by averaging with which weight
    if isinstance(pool, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
        read = read.pow(power)
    paths = first.flatten(1) @ read.flatten(1) @ last.weight.abs().pow(power).T
    assert path_norm(net, (1, 5, 4), power) == pytest.approx(math.log(paths.sum().item()) / power)


def evaluation(rows: list[list[float]], labels: list[int]) -> dict[str, float]:
    """What is recorded of a network whose logits are `rows`; the first two images are for testing."""
    classes = len(rows[0])
    net = nn.Sequential(nn.Flatten(), nn.Linear(classes, classes, bias=False))
    nn.init.eye_(net[1].weight)
    x, y = torch.tensor(rows)[:, None, None], torch.tensor(labels)
    return evaluate(net, net, Data(x, y, x[:2], y[:2], classes, ""))


def test_an_evaluation_by_hand():
    values = evaluation([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [5.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [0, 1, 1, 2])
    assert (values["train_acc"], values["test_acc"]) == (75.0, 100.0)
    assert values["margin"] == pytest.approx(((2 - 1) + (3 - 1)) / 2)  # the second smallest is the second largest here
    assert values["multiclass_margin"] == pytest.approx(((2 - 1) + (3 - 1)) / 2)
    assert values["multiclass_margin_train"] == pytest.approx((1 + 2 - 4 + 1) / 4)
    assert values["multiclass_margin_train_min"] == pytest.approx(-4)
    assert values["multiclass_margin_train_p10"] == pytest.approx(-4 + 0.3 * 5)  # of -4, 1, 1, 2
    losses = [math.log(sum(math.exp(v - t) for v in r)) for r, t in (([2, 1, 0], 2), ([0, 3, 1], 3))]
    assert values["test_loss"] == pytest.approx(sum(losses) / 2)
    assert values["norm"] == pytest.approx(3) and values["norm_margin_normalized"] == pytest.approx(3 / 1.5)
    assert values["log_prod_norm_normalized"] == pytest.approx(math.log(math.sqrt(3)) - math.log(1.5))
    assert set(KEYS) - {"checkpoints"} <= set(values) and all(type(value) is float for value in values.values())


def test_normalized_norms_are_nan_where_the_margin_is_not_positive():
    values = evaluation([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], [0, 0])
    assert values["margin"] < 0
    assert math.isnan(values["norm_margin_normalized"]) and math.isnan(values["log_prod_norm_normalized"])


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


def test_top_five_accuracy_is_recorded_with_more_than_ten_classes():
    values = evaluation([[*map(float, range(12))]] * 4, [7, 7, 6, 6])  # fifth, fifth, sixth, sixth
    assert (values["train_acc"], values["train_top5_acc"], values["test_top5_acc"]) == (0, 50, 100)
    assert not any("top5" in key for key in evaluation([[*map(float, range(10))]] * 2, [1, 2]))


@pytest.mark.parametrize("conversion", ["lc", "lc5", "fc"])
def test_of_a_converted_network_the_same_is_recorded(conversion):
    torch.manual_seed(0)
    cnn, x, y = small_cnn().double(), torch.randn(40, *IMAGE, dtype=torch.float64), torch.arange(40) % 10
    converted = find_conversion(conversion).convert(cnn, IMAGE)
    data = Data(x[:25], y[:25], x[25:], y[25:], 10, "")
    values, expected = (evaluate(net, net, data) for net in (converted, cnn))
    layers, cnn_layers = ([one.pop(key) for key in [*one] if "frobenius" in key] for one in (values, expected))
    assert layers == pytest.approx(cnn_layers, rel=1e-9)  # an eFCN numbers its layers anew
    more = {"untied_2": 0, "untied_8": 0, "nonlocal": 0} if conversion == "fc" else {}
    expected = {key: value for key, value in expected.items() if key in values} | more
    spectral = values.pop("log_prod_spectral")  # by power iteration
    assert spectral == pytest.approx(expected.pop("log_prod_spectral"), rel=1e-4)
    assert values == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True) and values.get("nonlocal", 0) == 0
