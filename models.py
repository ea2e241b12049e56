"""The networks of the study, by name. To add one of your own, write a function like `skinnyprime` and list it below.

A network takes images of shape (3, 32, 32) and is made of the LAYERS of rnorm/conversions.py. `load_network` turns a
checkpoint of any of them, converted or not, into a module ready to use.
"""

import functools
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from rnorm.checkpoints import load, load_weights
from rnorm.conversions import check_layers, find_conversion, layers_of
from rnorm.files import Damaged, RnormError
from rnorm.measure import training_flop

IMAGE_SHAPE = (3, 32, 32)


class ConvNet(nn.Module):
    """A tied network: all layers, in order, in the `nn.Sequential` named `net`.

    The name is part of the file format: checkpoints hold `net.1.weight`, `net.1.bias`, ...
    """

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def skinnyprime(num_classes: int = 10) -> ConvNet:
    """The CNN of the study: images (N, 3, 32, 32) to logits (N, num_classes); 64 channels in every layer.

    Source: the released code of arXiv:2206.05317, after arXiv:1906.06766.
    """
    convolutions = [
        nn.ZeroPad2d(2), nn.Conv2d(3, 64, 4, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2),  # 64 x 17 x 17, then 8 x 8
        nn.ZeroPad2d(2), nn.Conv2d(64, 64, 5), nn.ReLU(), nn.MaxPool2d(3, 2),           # 64 x 8 x 8, then 3 x 3
        nn.ZeroPad2d(1), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(3, 2),           # 64 x 3 x 3, then 1 x 1
    ]  # fmt: skip
    torch.randn(1, 3, 32, 32)  # the released network measures itself with an image here: same seed, same weights
    return ConvNet(*convolutions, nn.Flatten(), nn.Linear(64, num_classes))


def alexnetprime(num_classes: int = 10) -> ConvNet:
    """The larger CNN: images (N, 3, 32, 32) to logits (N, num_classes). Source: arXiv:1906.06766, section 3."""
    return ConvNet(
        nn.ZeroPad2d(2), nn.Conv2d(3, 64, 4, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2),  # 64 x 17 x 17, then 8 x 8
        nn.ZeroPad2d(2), nn.Conv2d(64, 192, 5), nn.ReLU(), nn.MaxPool2d(3, 2),          # 192 x 8 x 8, then 3 x 3
        nn.ZeroPad2d(1), nn.Conv2d(192, 384, 3), nn.ReLU(),
        nn.ZeroPad2d(1), nn.Conv2d(384, 256, 3), nn.ReLU(),
        nn.ZeroPad2d(1), nn.Conv2d(256, 256, 3), nn.ReLU(), nn.MaxPool2d(3, 2),         # 256 x 3 x 3, then 1 x 1
        nn.Flatten(), nn.Dropout(), nn.Linear(256, 512), nn.ReLU(), nn.Dropout(), nn.Linear(512, 512), nn.ReLU(),
        nn.Linear(512, num_classes),
    )  # fmt: skip


NETWORKS = {"skinnyprime": skinnyprime, "alexnetprime": alexnetprime}


def make_network(name: str, num_classes: int) -> ConvNet:
    """A network of NETWORKS with fresh weights.

    Raises RnormError if there is none of that name, or if it cannot be trained and measured here.
    """
    if name not in NETWORKS:
        raise RnormError(f"{name}: no such network in models.py; there are {', '.join(NETWORKS)}")
    model = NETWORKS[name](num_classes)
    layers = getattr(model, "net", None)
    outside = [key for key in model.state_dict() if not key.startswith("net.")]
    if type(model).forward is not ConvNet.forward or type(layers) is not nn.Sequential or outside:
        raise RnormError(f"{name}: it has to be a ConvNet, with all its layers in `net` and no forward of its own")
    try:
        check_layers(layers)
    except ValueError as error:
        raise RnormError(f"{name}: {error}") from None
    for layer in layers:
        if getattr(layer, "inplace", False):
            layer.inplace = False  # what stands before the first layer with weights would change the images
    return model


def converted_network(name: str, conversion: str, num_classes: int) -> nn.Module:
    """What a conversion makes of a network of NETWORKS; the network itself for "".

    Raises RnormError as `make_network` does, and ValueError for a conversion that cannot be.
    """
    model = make_network(name, num_classes)
    return find_conversion(conversion).convert(model, IMAGE_SHAPE) if conversion else model


@functools.lru_cache
def size_of(network: str, conversion: str) -> tuple[int, int]:
    """(number of parameters, FLOP of training on one image) of a network for ten classes.

    Raises what `converted_network` does.
    """
    # A network is made for it. (On torch's meta device shapes alone would do, but that imports torch's compiler,
    # seconds in every process.)
    model = converted_network(network, conversion, 10)
    return sum(p.numel() for p in model.parameters()), training_flop(layers_of(model), IMAGE_SHAPE)


def load_network(path: Path | str) -> nn.Module:
    """The network in a checkpoint of a run or of the released code, in eval mode, on the CPU.

    Its name says what it is: NETWORK_EPOCH.pyT, or NETWORK_CONVERSION_version_EPOCH.pyT; a `latest.pyT` is what the
    checkpoints beside it are. Raises FileNotFoundError, or RnormError if it is no checkpoint of a network here.
    """
    path = Path(path)
    try:
        state = load(path)
    except Damaged as damage:
        raise RnormError(f"{path} is damaged ({damage})") from None
    network, conversion = network_and_conversion(path)
    try:
        model = converted_network(network, conversion, 10)
        last, of_ten = (list(weights.values())[-1] for weights in (state["weights"], model.state_dict()))
        if last.shape != of_ten.shape:  # a last layer grows with the number of classes
            model = converted_network(network, conversion, 10 * last.numel() // of_ten.numel())
        load_weights(model.to(last.dtype), state)
    except (Damaged, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RnormError(f"{path} is no checkpoint of {network} ({error})") from None
    return model.eval()


def network_and_conversion(path: Path) -> tuple[str, str]:
    """What a checkpoint's name says it is of; the conversion is "" for a CNN. Raises RnormError for another name."""
    names = [path.stem]
    if path.stem == "latest":
        names = sorted(other.stem for other in path.parent.glob("*_*.pyT"))
    for name in names:
        if match := re.fullmatch(r"(.+?)(?:_([^_]+)_version)?_\d+", name):
            return match[1], match[2] or ""
    raise RnormError(f"{path}: its name is not that of a checkpoint, such as skinnyprime_150.pyT")
