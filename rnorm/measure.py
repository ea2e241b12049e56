"""What is recorded of a network: losses, accuracies, margins and weight norms. docs/files.md defines every key.

Source of the definitions: arXiv:2206.05317, section 5 (the R-norm experiment), and its released code.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnorm.layers import Geometry, LocallyConnected2d, layer_shapes, pair, unfolded
from rnorm.signals import check_signals

if TYPE_CHECKING:  # what reads histories needs KEYS, but no images
    from rnorm.data import Data

EVALUATION_BATCH = 500  # images per forward pass; no result depends on it beyond rounding

KEYS = (
    "checkpoints", "train_loss", "train_acc", "test_loss", "test_acc", "margin", "multiclass_margin",
    "multiclass_margin_train", "multiclass_margin_train_min", "multiclass_margin_train_p10", "norm", "log_prod_norm",
    "norm_margin_normalized", "log_prod_norm_normalized", "log_prod_spectral", "log_path1", "log_path2", "untied",
)  # fmt: skip
"""The keys of every history. `log_frobenius_<layer>` follow, by the layer's index in the network, and of convolutions
`untied_<layer>`.

Besides: `train_top5_acc` and `test_top5_acc`, with more than 10 classes; `nonlocal`, of an eFCN.
"""


def published_margins(logits: Tensor, y: Tensor) -> Tensor:
    """The margin that the published figure was made with, per example; logits (N, c), y (N,), result (N,).

    The true class's logit minus the second *smallest* logit where the prediction is right, minus the largest
    logit where it is wrong. The released code's `kthvalue(out, 2)` counts from below; see docs/files.md. With two
    classes the second smallest logit is the largest, so the margin is NaN.
    """
    true = logits.gather(1, y[:, None])[:, 0]
    if logits.shape[1] < 3:
        return torch.full_like(true, math.nan)
    right = logits.argmax(1) == y
    return true - torch.where(right, logits.kthvalue(2, 1).values, logits.max(1).values)


def multiclass_margins(logits: Tensor, y: Tensor) -> Tensor:
    """The true class's logit minus the largest other logit, per example; logits (N, c), y (N,), result (N,)."""
    others = logits.scatter(1, y[:, None], -math.inf)
    return logits.gather(1, y[:, None])[:, 0] - others.max(1).values


def weighted_layers(net: nn.Sequential, image_shape: tuple[int, ...]) -> list[tuple[int, nn.Module, int, tuple]]:
    """(index, layer, how often the norms count its weights, its input's shape) for every layer with weights.

    A convolution's filters count once per output position, as in the untied network of the same function.
    """
    shapes = layer_shapes(net, image_shape)
    return [
        (i, layer, math.prod(shapes[i + 1][1:]) if isinstance(layer, nn.Conv2d) else 1, shapes[i])
        for i, layer in enumerate(net)
        if isinstance(getattr(layer, "weight", None), Tensor)
    ]


def norms(net: nn.Sequential, image_shape: tuple[int, ...]) -> dict[str, float]:
    """All norms of a network's weights, the `untied` keys, and `nonlocal` of an eFCN; biases do not count."""
    norm = log_prod_spectral = 0.0
    deviation, total, outside, untied, frobenius = 0.0, 0.0, 0.0, {}, {}
    fully_connected = False
    for i, layer, count, input_shape in weighted_layers(net, image_shape):
        squared = count * _squared(layer.weight)
        norm += squared
        frobenius[f"log_frobenius_{i}"] = 0.5 * math.log(squared) if squared > 0 else -math.inf
        log_prod_spectral += math.log(operator_norm(layer, input_shape)) if squared > 0 else -math.inf
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
    return {
        "norm": norm, "log_prod_norm": sum(frobenius.values(), 0.0), "log_prod_spectral": log_prod_spectral,
        "log_path1": path_norm(net, image_shape, 1), "log_path2": path_norm(net, image_shape, 2),
        "untied": _root_ratio(deviation, total), **untied, **frobenius,
    }  # fmt: skip


def apply_weight(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What `layer` computes of x (N, ...) with `weight` in the place of its own and without its bias."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    if isinstance(layer, LocallyConnected2d):
        geometry = Geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.output_size)
        return unfolded(x, weight, None, geometry)
    return F.linear(x, weight)


def operator_norm(layer: nn.Module, input_shape: tuple[int, ...]) -> float:
    """The largest singular value of a layer without its bias, as a linear map on inputs (*input_shape).

    By power iteration, of eight vectors at once, until it changes by less than a part in 10^6. NaN for a weight that is
    not finite. Used as in Bartlett, Foster, Telgarsky (2017), arXiv:1706.08498.
    """
    weight = layer.weight.detach()
    if not weight.isfinite().all():
        return math.nan
    generator, size = torch.Generator().manual_seed(0), math.prod(input_shape)
    vectors = torch.randn(size, min(8, size), generator=generator, dtype=torch.float64).to(weight)
    norm, before = 0.0, math.inf
    while abs(norm - before) > 1e-6 * norm:
        x = torch.linalg.qr(vectors).Q.T.reshape(-1, *input_shape).requires_grad_()
        with torch.enable_grad():
            y = apply_weight(layer, x, weight)
        vectors = torch.autograd.grad(y, x, y.detach())[0].flatten(1).T  # of the layer's transpose
        norm, before = torch.linalg.matrix_norm(y.detach().flatten(1), 2).item(), norm
    return norm


def path_norm(net: nn.Sequential, image_shape: tuple[int, ...], power: int) -> float:
    """ln of the sum over all paths from a pixel to a logit of |product of the weights|^power, divided by `power`.

    One forward pass in float64, of the weights' absolute values to that power on an image of ones. Biases are left out;
    max pooling counts as the sum over its window. Source: arXiv:2310.01225, after Neyshabur et al. (2015),
    arXiv:1503.00036.
    """
    x = torch.ones(1, *image_shape, dtype=torch.float64, device=next(net.parameters()).device)
    with torch.no_grad():
        for layer, shape in zip(net, layer_shapes(net, image_shape)[1:]):
            if isinstance(getattr(layer, "weight", None), Tensor):
                x = apply_weight(layer, x, layer.weight.double().abs().pow(power))
            elif isinstance(layer, nn.MaxPool2d):
                settings = map(pair, (layer.kernel_size, layer.stride, layer.padding, layer.dilation))
                geometry = Geometry(*settings, shape[1:])
                ones = x.new_ones(len(x[0]), 1, *geometry.kernel)
                x = F.conv2d(geometry.pad(x), ones, None, geometry.stride, 0, geometry.dilation, len(ones))
            elif isinstance(layer, nn.AvgPool2d):
                x = layer(x) / (layer.divisor_override or math.prod(pair(layer.kernel_size))) ** (power - 1)
            elif isinstance(layer, (nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)):
                window = math.prod(x.shape[2:]) // math.prod(shape[1:])
                x = F.adaptive_avg_pool2d(x, shape[1:])
                x = x * window if isinstance(layer, nn.AdaptiveMaxPool2d) else x / window ** (power - 1)
            elif isinstance(layer, (nn.ZeroPad2d, nn.Flatten, nn.Unflatten)):
                x = layer(x)
        total = x.sum().item()
    return math.log(total) / power if total > 0 else -math.inf


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
    values["multiclass_margin_train_p10"] = train_margins.quantile(0.1).item()  # as in arXiv:1912.02178
    weight_norms = norms(net, data.image_shape)
    margin = values["margin"] if values["margin"] > 0 else math.nan
    values["norm"], values["log_prod_norm"] = weight_norms.pop("norm"), weight_norms.pop("log_prod_norm")
    values["norm_margin_normalized"] = values["norm"] / margin
    values["log_prod_norm_normalized"] = values["log_prod_norm"] - math.log(margin)
    return values | weight_norms
