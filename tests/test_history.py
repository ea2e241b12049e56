"""Histories: what is one, how it grows, and how it is completed with what is recorded only now."""

import math

import pytest
import torch

from rnorm.files import Damaged, RnormError
from rnorm.history import append, append_divergence, check_history, completed, has_diverged, has_ended
from rnorm.measure import KEYS
from rnorm.runs import Member, Settings

VALUES = dict.fromkeys(KEYS[1:], 0.5)
NAN = math.nan


@pytest.fixture
def member(tmp_path):
    return Member(tmp_path, Settings(epochs=4, network="small", lc_evaluations=2), "lc", 1)


def history_at(*epochs: int) -> dict[str, list]:
    history = {}
    for epoch in epochs:
        history = append(history, epoch, VALUES)
    return history


@pytest.mark.parametrize("epochs", [(0,), (3,), (0, 1, 3), (2, 3, 4)])
def test_epochs_that_increase_and_end_at_or_before_the_last_are_good_whichever_they_are(member, epochs):
    assert check_history(history_at(*epochs), member) == history_at(*epochs)
    assert has_ended(history_at(*epochs), member) == (epochs[-1] == 4)


@pytest.mark.parametrize("change, cause", [
    ({"checkpoints": None}, "not a history"), ({"checkpoints": []}, "not a history"),
    ({str(i): [0, 0] for i in range(1000)}, "not a history"),
    ({"checkpoints": [0, 5]}, "not this network's"), ({"checkpoints": [-1, 0]}, "not this network's"),
    ({"checkpoints": [0, True]}, "not this network's"), ({"checkpoints": [0, 10**30]}, "not this network's"),
    ({"checkpoints": [1, 0]}, "do not increase"), ({"checkpoints": [1, 1]}, "do not increase"),
    ({"train_loss": None}, "not all of length 2"), ({"margin": [0.5]}, "not all of length 2"),
    ({3: [0, 1]}, "not all of length 2"), ({"margin": [0.5, "x"]}, "margin is not a list of numbers"),
    ({"margin": [0.5, True]}, "margin is not a list of numbers"), ({"margin": [1, 10**30]}, "margin is not a list"),
])  # fmt: skip
def test_a_history_is_lists_of_numbers_as_long_as_its_epochs(member, change, cause):
    with pytest.raises(Damaged, match=cause):
        check_history(history_at(0, 1) | change, member)


def test_a_quantity_is_nan_where_it_was_not_recorded(member):
    """One that is new, one that is no longer recorded, and one that was written before it was in KEYS."""
    history = append(append(history_at(0), 1, VALUES | {"sharpness": 0.7}), 2, {"train_loss": 0.1})
    assert repr(history["sharpness"]) == "[nan, 0.7, nan]" and history["train_loss"] == [0.5, 0.5, 0.1]
    assert repr(history["margin"]) == "[0.5, 0.5, nan]"
    del history["margin"]
    assert repr(check_history(history, member)["margin"]) == "[nan, nan, nan]"


@pytest.mark.parametrize("value", [torch.tensor(0.5), torch.tensor(0.5).numpy()[()], True, "0.5", None])
def test_a_quantity_that_is_no_python_number_is_refused_by_name(value):
    with pytest.raises(RnormError, match="^sharpness is recorded as a .*; it has to be a Python number"):
        append(history_at(0), 1, VALUES | {"sharpness": value})


def test_a_network_that_diverged_has_ended(member):
    history = append_divergence(history_at(0, 1), 2)
    assert has_diverged(history) and has_ended(history, member) and not has_diverged(history_at(0, 1))
    assert all(math.isnan(values[-1]) for key, values in history.items() if key != "checkpoints")
    assert not has_ended(None, member)


def test_what_a_history_lacks_is_added_and_what_it_has_stays():
    history = history_at(0, 1, 2) | {"late": [NAN, 3.0, NAN]}
    measured = {0: {"train_loss": 0.5001, "late": 1.0, "new": 7.0}, 2: {"train_loss": 0.9, "late": NAN, "new": 8.0}}
    whole, differing = completed(history, measured)
    assert whole["train_loss"] == [0.5] * 3 and repr(whole["late"]) == "[1.0, 3.0, nan]"
    assert repr(whole["new"]) == "[7.0, nan, 8.0]"
    assert differing == {"train_loss": (1, pytest.approx(0.4))}
