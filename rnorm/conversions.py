"""Conversions: from a CNN to what is trained on in its place, by name.

    lc      the equivalent locally connected network (eLCN): every convolution untied
    fc      the equivalent fully connected network (eFCN): every convolution a matrix
    lc5     only the convolution with that index in the network untied; lc1+9: those two
    tied    control: the CNN, with the steps of an eLCN confined to the tied subspace
    cnn     control: the CNN, trained on at the eLCN's learning rate
"""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from rnorm.layers import LocallyConnected2d, layer_shapes

COPIED = (
    nn.ZeroPad2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.Dropout,
    nn.Dropout2d, nn.Flatten, nn.Unflatten, nn.Linear, LocallyConnected2d,
)  # fmt: skip
"""The layers that an untied network takes over as they are."""


def layers_of(model: nn.Module) -> nn.Sequential:
    """The layers of a network; those of a CNN lie in its attribute `net`."""
    return getattr(model, "net", model)


def untie(net: nn.Sequential, image_shape: tuple[int, ...], only: set[int] | None = None) -> nn.Sequential:
    """The equivalent locally connected network (eLCN) of `net`, for images of shape (C, H, W); `net` stays as it is.

    Every Conv2d, or of those only the ones with an index in `only`, becomes a LocallyConnected2d with the same filter
    at each position. The layers in COPIED are copied. Raises ValueError, naming the layer, for any other layer, and
    for an index in `only` that is no convolution. Source: arXiv:1906.06766, section 2.
    """
    convolutions = {i for i, layer in enumerate(net) if type(layer) is nn.Conv2d}
    if only is None:
        only = convolutions
    if wrong := sorted(only - convolutions):
        raise ValueError(f"layer {wrong[0]} is no convolution; those are {' '.join(map(str, sorted(convolutions)))}")
    shapes = layer_shapes(net, image_shape)
    layers = []
    for i, layer in enumerate(net):
        if i in only:
            try:
                layers.append(LocallyConnected2d.from_conv2d(layer, shapes[i][1:]))
            except ValueError as error:
                raise ValueError(f"layer {i} cannot be untied: {error}") from None
        elif i in convolutions or type(layer) in COPIED:
            layers.append(copy.deepcopy(layer))
        else:
            raise ValueError(f"layer {i}, {type(layer).__name__}, cannot be untied; see COPIED in rnorm/conversions.py")
    return nn.Sequential(*layers)


def fully_connect(net: nn.Sequential, image_shape: tuple[int, ...]) -> nn.Sequential:
    """The equivalent fully connected network (eFCN) of `net`, untied or not, for images of shape (C, H, W).

    Every convolution becomes Flatten, Linear, Unflatten; one with padding of its own gets a ZeroPad2d before these, so
    that the matrices always read padded inputs. `net` stays as it is. Raises ValueError as `untie` does. Source:
    arXiv:1906.06766, section 2.
    """
    net = untie(net, image_shape)
    shapes, layers = layer_shapes(net, image_shape), []
    for i, layer in enumerate(net):
        if isinstance(layer, LocallyConnected2d):
            if any(layer.padding):
                layers.append(nn.ZeroPad2d((layer.padding[1],) * 2 + (layer.padding[0],) * 2))
            layers += [nn.Flatten(), matrix_of(layer), nn.Unflatten(1, shapes[i + 1])]
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


def lift(a: nn.Sequential, b: nn.Sequential, image_shape: tuple[int, ...]) -> list[nn.Sequential]:
    """Two networks in one form: fully connected if either is, else untied in every layer in which either is."""
    if any(hasattr(layer, "local") for layer in [*a, *b]):
        return [fully_connect(net, image_shape) for net in (a, b)]
    untied = {i for net in (a, b) for i, layer in enumerate(net) if isinstance(layer, LocallyConnected2d)}
    return [untie(net, image_shape, {i for i in untied if isinstance(net[i], nn.Conv2d)}) for net in (a, b)]


def matrix_of(layer: LocallyConnected2d) -> nn.Linear:
    """The Linear layer that computes `layer`, from flattened padded inputs (N, C_in * H * W) to (N, C_out * L).

    L is the number of positions. Zero outside the local fields; its buffer `local`, bool (L, C_in * H * W) and no part
    of the state dict, says which inputs each position reads.
    """
    weight = layer.filters.detach()[0]  # (C_out, C_in, H_out, W_out, k_h * k_w)
    channels, positions, device = weight.shape[0], weight[0, 0, ..., 0].numel(), weight.device
    height, width = (size + 2 * zeros for size, zeros in zip(layer.input_size, layer.padding))
    inputs = layer.in_channels * height * width
    numbered = torch.arange(inputs, dtype=torch.float64, device=device).view(1, -1, height, width)
    read = F.unfold(numbered, layer.kernel_size, layer.dilation, 0, layer.stride)[0].T.long()  # (L, C_in * k_h * k_w)
    local = torch.zeros(positions, inputs, dtype=torch.bool, device=device).scatter_(1, read, True)
    matrix = nn.utils.skip_init(
        nn.Linear, inputs, channels * positions, layer.bias is not None, device=device, dtype=weight.dtype
    )
    matrix.register_buffer("local", local, persistent=False)
    with torch.no_grad():
        filters = weight.flatten(2, 3).permute(0, 2, 1, 3).flatten(2)  # (C_out, L, C_in * k_h * k_w)
        matrix.weight.zero_().view(channels, positions, inputs).scatter_(2, read.expand(channels, -1, -1), filters)
        if layer.bias is not None:
            matrix.bias.copy_(layer.state_dict()["bias"].flatten())
    return matrix


def same_rate(net: nn.Sequential, image_shape: tuple[int, ...], lr: float) -> list[float]:
    """The learning rate `lr` for every parameter of `net`."""
    return [lr for _ in net.parameters()]


def tied_rate(net: nn.Sequential, image_shape: tuple[int, ...], lr: float) -> list[float]:
    """Learning rates with which a CNN takes an eLCN's steps at `lr`, confined to the tied subspace.

    The gradient of an eLCN's filters, averaged over the positions of the layer, keeps them tied, and is the gradient
    of the CNN's filter divided by the number of positions. So each convolution's rate is `lr` divided by that number.
    """
    shapes, rates = layer_shapes(net, image_shape), []
    for i, layer in enumerate(net):
        positions = math.prod(shapes[i + 1][1:]) if isinstance(layer, nn.Conv2d) else 1
        rates += [lr / positions for _ in layer.parameters()]
    return rates


@dataclass(frozen=True)
class Conversion:
    """How a CNN is converted, and how the result is trained."""

    convert: Callable[[nn.Module, tuple[int, ...]], nn.Module]  # (a CNN with its layers in `net`, (C, H, W)) -> network
    rates: Callable[[nn.Sequential, tuple[int, ...], float], list[float]] = same_rate  # one for each parameter
    keep: str = "all"  # or "last": which checkpoints stay on disk, unless told otherwise


CONVERSIONS = {
    "lc": Conversion(lambda cnn, image_shape: untie(cnn.net, image_shape)),
    "fc": Conversion(lambda cnn, image_shape: fully_connect(cnn.net, image_shape), keep="last"),
    "tied": Conversion(lambda cnn, image_shape: copy.deepcopy(cnn), tied_rate),
    "cnn": Conversion(lambda cnn, image_shape: copy.deepcopy(cnn)),
}


def find_conversion(name: str) -> Conversion:
    """The conversion called `name`; raises ValueError if there is none."""
    if name in CONVERSIONS:
        return CONVERSIONS[name]
    if re.fullmatch(r"lc\d+(\+\d+)*", name):
        only = {int(index) for index in name[2:].split("+")}
        if name != (ordered := "lc" + "+".join(map(str, sorted(only)))):  # one network has one name
            raise ValueError(f"{name}: to be written {ordered}")
        return Conversion(lambda cnn, image_shape: untie(cnn.net, image_shape, only))
    names = ", ".join(CONVERSIONS)
    raise ValueError(f"{name}: no such conversion; there are {names}, and lc with indices of layers, such as lc1+9")
