"""What is recorded of a network: losses, accuracies, margins and weight norms. README.md defines every key.

Source of the definitions: arXiv:2206.05317, section 5 (the R-norm experiment), and its released code.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnorm.cli import check_signals
from rnorm.layers import LocallyConnected2d, layer_shapes

if TYPE_CHECKING:  # what reads histories needs KEYS, but no images
    from rnorm.data import Data

EVALUATION_BATCH = 500  # images per forward pass; no result depends on it beyond rounding

KEYS = (
    "checkpoints", "train_loss", "train_acc", "test_loss", "test_acc", "margin", "multiclass_margin",
    "multiclass_margin_train", "multiclass_margin_train_min", "norm", "log_prod_norm", "norm_margin_normalized",
    "log_prod_norm_normalized", "untied",
)  # fmt: skip
"""The keys of every history. `untied_<layer>` follow, one for each convolution, by its index in the network.

Besides: `train_top5_acc` and `test_top5_acc`, with more than 10 classes; `nonlocal`, of an eFCN.
"""


def published_margins(logits: Tensor, y: Tensor) -> Tensor:
    """The margin that the published figure was made with, per example; logits (N, c), y (N,), result (N,).

    The true class's logit minus the second *smallest* logit where the prediction is right, minus the largest
    logit where it is wrong. The released code's `kthvalue(out, 2)` counts from below; see README.md.
    """
    true = logits.gather(1, y[:, None])[:, 0]
    right = logits.argmax(1) == y
    return true - torch.where(right, logits.kthvalue(2, 1).values, logits.max(1).values)


def multiclass_margins(logits: Tensor, y: Tensor) -> Tensor:
    """The true class's logit minus the largest other logit, per example; logits (N, c), y (N,), result (N,)."""
    others = logits.scatter(1, y[:, None], -math.inf)
    return logits.gather(1, y[:, None])[:, 0] - others.max(1).values


def weighted_layers(net: nn.Sequential, image_shape: tuple[int, ...]) -> list[tuple[int, nn.Module, int]]:
    """(index, layer, how often the norms count its weights) for every layer with weights.

    A convolution's filters count once per output position, as in the untied network of the same function.
    """
    shapes = layer_shapes(net, image_shape)
    return [
        (i, layer, math.prod(shapes[i + 1][1:]) if isinstance(layer, nn.Conv2d) else 1)
        for i, layer in enumerate(net)
        if isinstance(getattr(layer, "weight", None), Tensor)
    ]


def training_flop(net: nn.Sequential, image_shape: tuple[int, ...]) -> int:
    """Floating-point operations to train on one image once: three products per layer, and two in the first."""
    layers = enumerate(weighted_layers(net, image_shape))
    return sum(2 * count * layer.weight.numel() * (3 if n else 2) for n, (_, layer, count) in layers)


def norms(net: nn.Sequential, image_shape: tuple[int, ...]) -> dict[str, float]:
    """`norm`, `log_prod_norm` and the `untied` keys of a network, and `nonlocal` of an eFCN; biases do not count."""
    norm = log_prod_norm = 0.0
    deviation, total, outside, untied = 0.0, 0.0, 0.0, {}
    fully_connected = False
    for i, layer, count in weighted_layers(net, image_shape):
        squared = count * _squared(layer.weight)
        norm += squared
        log_prod_norm += 0.5 * math.log(squared) if squared > 0 else -math.inf
        if isinstance(layer, nn.Conv2d):
            untied[f"untied_{i}"] = 0.0
            continue
        if isinstance(layer, LocallyConnected2d):
            filters = layer.filters.detach()  # (1, C_out, C_in, H_out, W_out, k_h * k_w)
            away = _squared(filters - filters.mean((3, 4), keepdim=True))
        elif hasattr(layer, "local"):  # what an eFCN made of a convolution; `conversions.matrix_of`
            matrices = layer.weight.detach().view(-1, *layer.local.shape)  # (C_out, positions, inputs)
            filters = matrices[:, layer.local].view(*matrices.shape[:2], -1)  # (C_out, positions, C_in * k_h * k_w)
            nonlocal_part = sum(_squared(matrix.masked_fill(layer.local, 0)) for matrix in matrices)
            away = _squared(filters - filters.mean(1, keepdim=True)) + nonlocal_part
            outside += nonlocal_part
            fully_connected = True
        else:
            continue
        deviation, total = deviation + away, total + squared
        untied[f"untied_{i}"] = _root_ratio(away, squared)
    if fully_connected:
        untied["nonlocal"] = outside / total if total > 0 else 0.0
    return {"norm": norm, "log_prod_norm": log_prod_norm, "untied": _root_ratio(deviation, total), **untied}


def _squared(weight: Tensor) -> float:
    return torch.linalg.vector_norm(weight.detach(), dtype=torch.float64).item() ** 2


def _root_ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole > 0 else 0.0


def logits_of(net: nn.Module, x: Tensor) -> Tensor:
    """Logits (N, c) in eval mode. Raises KeyboardInterrupt between batches once a signal has come."""
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            batches = []
            for batch in x.split(EVALUATION_BATCH):
                check_signals()
                batches.append(net(batch))
            return torch.cat(batches)
    finally:
        net.train(training)


def evaluate(net: nn.Sequential, fast: nn.Module, data: "Data") -> dict[str, float]:
    """All recorded quantities but `checkpoints`, as Python numbers; the order of `KEYS`.

    `net` holds the weights, `fast` computes the same function (`fast.streamline`, or `net` itself).
    """
    values = {}
    logits = {"train": logits_of(fast, data.x_train), "test": logits_of(fast, data.x_test)}
    for name, y in (("train", data.y_train), ("test", data.y_test)):
        losses = F.cross_entropy(logits[name].double(), y)
        values[f"{name}_loss"] = losses.item()
        values[f"{name}_acc"] = 100 * (logits[name].argmax(1) == y).double().mean().item()
        if data.num_classes > 10:
            among = (logits[name].topk(5).indices == y[:, None]).any(1)
            values[f"{name}_top5_acc"] = 100 * among.double().mean().item()
    values["margin"] = published_margins(logits["test"], data.y_test).double().mean().item()
    values["multiclass_margin"] = multiclass_margins(logits["test"], data.y_test).double().mean().item()
    train_margins = multiclass_margins(logits["train"], data.y_train).double()
    values["multiclass_margin_train"] = train_margins.mean().item()
    values["multiclass_margin_train_min"] = train_margins.min().item()
    weight_norms = norms(net, data.image_shape)
    margin = values["margin"] if values["margin"] > 0 else math.nan
    values["norm"], values["log_prod_norm"] = weight_norms.pop("norm"), weight_norms.pop("log_prod_norm")
    values["norm_margin_normalized"] = values["norm"] / margin
    values["log_prod_norm_normalized"] = values["log_prod_norm"] - math.log(margin)
    return values | weight_norms
