"""What a history is: for each recorded quantity its values, one for each evaluation of a network."""

import math

from rnorm.files import Damaged, RnormError
from rnorm.measure import KEYS
from rnorm.runs import Member

History = dict[str, list]  # a key of `measure.KEYS` or another to its values, Python numbers
MOST_KEYS = 1000  # a damaged or hostile file cannot make its reader allocate more


def append(history: History, epoch: int, values: dict[str, float]) -> History:
    """The history with one evaluation more. A quantity that is new, or that is not recorded any longer, is NaN there.

    Raises RnormError for a value that is no Python number.
    """
    for key, value in values.items():
        if type(value) not in (int, float):
            kind = type(value).__name__
            raise RnormError(f"{key} is recorded as a {kind}; it has to be a Python number, such as tensor.item()")
    past, values = [math.nan] * len(history.get("checkpoints", [])), {"checkpoints": epoch, **values}
    keys = dict.fromkeys([*history, *values])
    return {key: [*history.get(key, past), values.get(key, math.nan)] for key in keys}


def append_divergence(history: History, epoch: int) -> History:
    """The history ended at `epoch`, with NaN in every quantity."""
    return append(history, epoch, dict.fromkeys(KEYS[1:], math.nan))


def completed(history: History, measured: dict[int, dict[str, float]]) -> tuple[History, dict[str, tuple[int, float]]]:
    """(the history with what it lacks of `measured`, epochs to quantities; where the two differ beyond rounding).

    What the history has stays. The differences: of each such quantity, at how many epochs and by how much at most.
    """
    epochs, whole, differing = history["checkpoints"], dict(history), {}
    for key in dict.fromkeys(key for values in measured.values() for key in values):
        new = [measured.get(epoch, {}).get(key, math.nan) for epoch in epochs]
        old = history.get(key, [math.nan] * len(epochs))
        whole[key] = [b if math.isnan(a) else a for a, b in zip(old, new)]
        apart = [abs(a - b) for a, b in zip(old, new) if not math.isnan(a - b) and not is_close(a, b)]
        if apart:
            differing[key] = len(apart), max(apart)
    return whole, differing


def is_close(a: float, b: float) -> bool:
    """Whether two measurements of a quantity agree but for rounding, and for a few images on a boundary."""
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3)


def by_epoch(history: History) -> dict[int, dict[str, float]]:
    """A history as epochs to quantities, `checkpoints` left out."""
    keys = [key for key in history if key != "checkpoints"]
    return {epoch: {key: history[key][i] for key in keys} for i, epoch in enumerate(history["checkpoints"])}


def check_history(history: object, member: Member) -> History:
    """`history`, if it is one of `member`; raises Damaged otherwise.

    It has to be a dict of lists of numbers, all as long as `checkpoints`: epochs that increase and end at or before the
    network's last, whichever they are. What of KEYS it lacks, as it was written before they were recorded, is NaN.
    """
    epochs = history.get("checkpoints") if isinstance(history, dict) else None
    if not isinstance(epochs, list) or not epochs or "train_loss" not in history or len(history) > MOST_KEYS:
        raise Damaged("it is not a history")
    if not all(type(epoch) is int and 0 <= epoch <= member.epochs for epoch in epochs):
        raise Damaged("it is not this network's history")
    if not all(before < after for before, after in zip(epochs, epochs[1:])):
        raise Damaged("its epochs do not increase")
    history = dict.fromkeys(KEYS, [math.nan] * len(epochs)) | history
    for key, values in history.items():
        if not isinstance(key, str) or not isinstance(values, list) or len(values) != len(epochs):
            raise Damaged(f"its lists are not all of length {len(epochs)}")
        if not all(type(value) is float or type(value) is int and abs(value) < 2**63 for value in values):
            raise Damaged(f"{key} is not a list of numbers")
    return history


def has_diverged(history: History) -> bool:
    """Whether the network's loss ceased to be finite, in the last epoch of its history; all is NaN there."""
    return not math.isfinite(history["train_loss"][-1])


def has_ended(history: History | None, member: Member) -> bool:
    """Whether nothing is left to train, as the network is complete or diverged; None is a network not begun."""
    return bool(history) and (has_diverged(history) or history["checkpoints"][-1] == member.epochs)
