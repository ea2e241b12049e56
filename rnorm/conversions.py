"""Conversions: from a CNN to what is trained on in its place, by name.

    lc      the equivalent locally connected network (eLCN): every convolution untied
    lc5     only the convolution with that index in the network untied; lc1+9: those two
    tied    control: the CNN, with the steps of an eLCN confined to the tied subspace
    cnn     control: the CNN, trained on at the eLCN's learning rate
"""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from rnorm.layers import LocallyConnected2d, layer_shapes

COPIED = (
    nn.ZeroPad2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.Dropout,
    nn.Dropout2d, nn.Flatten, nn.Linear,
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


CONVERSIONS = {
    "lc": Conversion(lambda cnn, image_shape: untie(cnn.net, image_shape)),
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
