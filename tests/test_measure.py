"""Every recorded quantity against a small case worked by hand."""

import math

import pytest
import torch
from small_study import small_cnn
from torch import nn

from models import skinnyprime
from rnorm.conversions import untie
from rnorm.data import Data
from rnorm.measure import KEYS, evaluate, multiclass_margins, norms, published_margins, training_flop

LOGITS = torch.tensor([[3.0, 1.0, 0.0, -2.0], [3.0, 1.0, 0.0, -2.0], [3.0, 1.0, 0.0, -2.0]])
LABELS = torch.tensor([0, 1, 3])  # right, wrong, wrong


def test_the_published_margin_subtracts_the_second_smallest_logit_where_the_prediction_is_right():
    # Right: 3 - 0, the second smallest of (-2, 0, 1, 3). Wrong: 1 - 3 and -2 - 3, the largest.
    assert published_margins(LOGITS, LABELS).tolist() == [3.0, -2.0, -5.0]


def test_the_multiclass_margin_subtracts_the_largest_other_logit():
    assert multiclass_margins(LOGITS, LABELS).tolist() == [2.0, -2.0, -5.0]


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
    assert values["untied"] == values["untied_0"] == 0


def test_untying_changes_no_norm():
    for net in (one_convolution(), small_cnn().net):
        shape = (1, 2, 3) if len(net) == 3 else (3, 32, 32)
        tied, untied = norms(net, shape), norms(untie(net, shape), shape)
        assert untied == pytest.approx(tied, rel=1e-6, abs=1e-6)


def test_untied_is_the_distance_from_the_mean_filter_relative_to_the_weights():
    net = untie(one_convolution(), (1, 2, 3))
    net[0].weight.data[0, 0, 0, 0, 0] = 5.0  # weights 5, 2, 2, 2, 2, 2: mean 2.5, squared deviations 6.25 + 5 / 4
    expected = math.sqrt(7.5 / (25 + 5 * 4))
    assert norms(net, (1, 2, 3))["untied_0"] == pytest.approx(expected)
    assert norms(net, (1, 2, 3))["untied"] == pytest.approx(expected)


def test_a_training_step_costs_what_its_products_cost():
    assert training_flop(skinnyprime().net, (3, 32, 32)) * 250 == pytest.approx(11.2e9, rel=2e-3)
    assert training_flop(untie(skinnyprime().net, (3, 32, 32)), (3, 32, 32)) * 250 == pytest.approx(11.2e9, rel=2e-3)


class Scores(nn.Sequential):
    """A network whose logits are the first pixels of the image."""

    def forward(self, x):
        return x[:, 0, 0, :3] + 0 * self[1](x.flatten(1)).sum()


def scores_data(rows: list[list[float]], labels: list[int]) -> Data:
    x = torch.zeros(len(rows), 1, 1, 3)
    x[:, 0, 0] = torch.tensor(rows)
    y = torch.tensor(labels)
    return Data(x, y, x[:2], y[:2], 3, "")


def test_an_evaluation_by_hand():
    data = scores_data([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [5.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [0, 1, 1, 2])
    net = Scores(nn.Flatten(), nn.Linear(3, 1, bias=False))
    nn.init.constant_(net[1].weight, 1.0)
    values = evaluate(net, net, data)
    assert (values["train_acc"], values["test_acc"]) == (75.0, 100.0)
    assert values["margin"] == pytest.approx(((2 - 1) + (3 - 1)) / 2)  # the second smallest is the second largest here
    assert values["multiclass_margin"] == pytest.approx(((2 - 1) + (3 - 1)) / 2)
    assert values["multiclass_margin_train"] == pytest.approx((1 + 2 - 4 + 1) / 4)
    assert values["multiclass_margin_train_min"] == pytest.approx(-4)
    losses = [math.log(sum(math.exp(v - t) for v in r)) for r, t in (([2, 1, 0], 2), ([0, 3, 1], 3))]
    assert values["test_loss"] == pytest.approx(sum(losses) / 2)
    assert values["norm"] == pytest.approx(3) and values["norm_margin_normalized"] == pytest.approx(3 / 1.5)
    assert values["log_prod_norm_normalized"] == pytest.approx(math.log(math.sqrt(3)) - math.log(1.5))
    assert set(KEYS) - {"checkpoints"} <= set(values)
    assert all(type(value) is float for value in values.values())


def test_normalized_norms_are_nan_where_the_margin_is_not_positive():
    data = scores_data([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], [0, 0])
    net = Scores(nn.Flatten(), nn.Linear(3, 1, bias=False))
    values = evaluate(net, net, data)
    assert values["margin"] < 0
    assert math.isnan(values["norm_margin_normalized"]) and math.isnan(values["log_prod_norm_normalized"])
