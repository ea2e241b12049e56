"""Conversions: from a CNN to what is trained on in its place, by name.

    lc      the equivalent locally connected network (eLCN): every convolution untied
    fc      the equivalent fully connected network (eFCN): every convolution a matrix
    tied    control: the CNN, with the steps of an eLCN confined to the tied subspace
    cnn     control: the CNN, trained on at the eLCN's learning rate
    head    control: the CNN with its convolutions frozen, its last layer trained at the eLCN's learning rate

`lc` and `tied` take indices of layers: `lc5` unties the convolution with that index alone, `lc1+9` those two, and
`tied5`, `tied1+9` are their controls.
"""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from rnorm.layers import LocallyConnected2d, layer_shapes

ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid,
    nn.LogSigmoid, nn.Tanh, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Softshrink, nn.Hardshrink,
    nn.Tanhshrink, nn.Threshold, nn.Identity,
)  # fmt: skip
"""Functions of single numbers without parameters: untying does not touch them."""

LAYERS = (
    nn.Conv2d, LocallyConnected2d, nn.ZeroPad2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveAvgPool2d, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Unflatten, nn.Linear, *ACTIVATIONS,
)  # fmt: skip
"""The layers that a network may have.

A new one must treat each image by itself and must not rescale the weights of others, as BatchNorm does: their norms
would mean nothing. If it has weights or pools, `norms` and `path_norm` in rnorm/measure.py must count it.
"""


def check_layers(net: nn.Sequential, image_shape: tuple[int, ...]) -> None:
    """Raise ValueError, naming the layer, if `net` has any that is not in LAYERS, or one with hooks.

    Also if two of its layers share parameters, or if the windows of adaptive pooling differ in size.
    """
    for i, layer in enumerate(net):
        if type(layer) not in LAYERS:
            reason = "a network here is a sequence of the LAYERS in rnorm/conversions.py"
            if "Norm" in type(layer).__name__:
                reason = "norms of weights mean nothing where a layer rescales them; " + reason
            raise ValueError(f"layer {i} is {type(layer).__name__}; {reason}, where it says what a new one must fulfil")
        if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks:
            raise ValueError(f"layer {i}, {layer}, has hooks, such as weight_norm's; they would not be called")
    if sum(len([*layer.parameters()]) for layer in net) > len([*net.parameters()]):
        raise ValueError("two layers share parameters; each has to have its own")
    shapes = layer_shapes(net, image_shape)
    for i, layer in enumerate(net):
        adaptive = isinstance(layer, (nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d))
        if adaptive and any(n % m for n, m in zip(shapes[i][1:], shapes[i + 1][1:])):
            size = f"{shapes[i][1:]} to {shapes[i + 1][1:]}"
            raise ValueError(f"layer {i}, {layer}: from {size} windows overlap, which no GPU repeats bit for bit")


def convolutions_of(net: nn.Sequential, only: set[int] | None = None) -> set[int]:
    """The indices of the convolutions of `net`, or `only` if these are some; raises ValueError if one is not."""
    convolutions = {i for i, layer in enumerate(net) if isinstance(layer, nn.Conv2d)}
    if only is None:
        return convolutions
    if wrong := sorted(only - convolutions):
        raise ValueError(f"layer {wrong[0]} is no convolution; those are {' '.join(map(str, sorted(convolutions)))}")
    return only


def untie(net: nn.Sequential, image_shape: tuple[int, ...], only: set[int] | None = None) -> nn.Sequential:
    """The equivalent locally connected network (eLCN) of `net`, for images of shape (C, H, W); `net` stays as it is.

    Every Conv2d, or of those only the ones with an index in `only`, becomes a LocallyConnected2d with the same filter
    at each position; the other layers are copied. Raises ValueError, naming the layer, for a layer that is not in
    LAYERS or cannot be untied, and for an index in `only` that is no convolution. Source: arXiv:1906.06766, section 2.
    """
    check_layers(net, image_shape)
    shapes, untied = layer_shapes(net, image_shape), copy.deepcopy(net)
    for i in convolutions_of(net, only):
        try:
            untied[i] = LocallyConnected2d.from_conv2d(net[i], shapes[i][1:])
        except ValueError as error:
            raise ValueError(f"layer {i} cannot be untied: {error}") from None
    return untied


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
        matrix.weight.requires_grad_(layer.weight.requires_grad)
        if layer.bias is not None:
            matrix.bias.copy_(layer.state_dict()["bias"].flatten()).requires_grad_(layer.bias.requires_grad)
    return matrix


def same_rate(net: nn.Sequential, image_shape: tuple[int, ...], lr: float, only: set[int] | None = None) -> list[float]:
    """The learning rate `lr` for every parameter of `net`."""
    return [lr for _ in net.parameters()]


def tied_rate(net: nn.Sequential, image_shape: tuple[int, ...], lr: float, only: set[int] | None = None) -> list[float]:
    """Learning rates with which a CNN takes an eLCN's steps at `lr`, confined to the tied subspace.

    The gradient of an eLCN's filters, averaged over the positions of the layer, keeps them tied, and is the gradient
    of the CNN's filter divided by the number of positions. So the rate of each convolution, or of those with an index
    in `only`, is `lr` divided by that number.
    """
    slowed, shapes, rates = convolutions_of(net, only), layer_shapes(net, image_shape), []
    for i, layer in enumerate(net):
        positions = math.prod(shapes[i + 1][1:]) if i in slowed else 1
        rates += [lr / positions for _ in layer.parameters()]
    return rates


def keep_tied(cnn: nn.Sequential, image_shape: tuple[int, ...], only: set[int] | None = None) -> nn.Sequential:
    """A copy of the CNN; raises ValueError for an index in `only` that is no convolution."""
    convolutions_of(cnn, only)
    return copy.deepcopy(cnn)


def freeze_all_but_last(cnn: nn.Sequential, image_shape: tuple[int, ...]) -> nn.Sequential:
    """A copy of the CNN of which only the last layer with parameters is trained."""
    cnn = copy.deepcopy(cnn).requires_grad_(False)
    last = [layer for layer in cnn if len([*layer.parameters()])][-1]
    last.requires_grad_(True)
    return cnn


@dataclass(frozen=True)
class Conversion:
    """How a CNN is converted, and how the result is trained.

    `convert` takes a CNN and the images' shape (C, H, W); `rates` takes the new network, that shape and a learning
    rate, and returns a rate for each parameter. Where the name may be followed by indices of layers, both take these as
    `only`.
    """

    convert: Callable[..., nn.Sequential]
    rates: Callable[..., list[float]] = same_rate
    keep: str = "all"  # or "last": which checkpoints stay on disk, unless told otherwise
    by_layer: bool = False  # whether the name may be followed by indices of layers


CONVERSIONS = {
    "lc": Conversion(untie, by_layer=True),
    "fc": Conversion(fully_connect, keep="last"),
    "tied": Conversion(keep_tied, tied_rate, by_layer=True),
    "cnn": Conversion(keep_tied),
    "head": Conversion(freeze_all_but_last),
}


def find_conversion(name: str) -> Conversion:
    """The conversion called `name`; raises ValueError if there is none."""
    if "_" in name:
        raise ValueError(f"{name}: the name of a conversion has no _, as the names of files are parted by it")
    if name in CONVERSIONS:
        return CONVERSIONS[name]
    match = re.fullmatch(r"(.*?)(\d+(\+\d+)*)", name)
    if match and match[1] in CONVERSIONS and CONVERSIONS[match[1]].by_layer:
        only = {int(index) for index in match[2].split("+")}
        if name != (ordered := match[1] + "+".join(map(str, sorted(only)))):  # one network has one name
            raise ValueError(f"{name}: to be written {ordered}")
        whole = CONVERSIONS[match[1]]
        return replace(whole, convert=partial(whole.convert, only=only), rates=partial(whole.rates, only=only))
    names = ", ".join(CONVERSIONS)
    raise ValueError(f"{name}: no such conversion; there are {names}, and lc or tied with indices of layers: lc1+9")
