"""The networks of the study, by name. To add one of your own, write a function like `skinnyprime` and list it below.

A network is made of Conv2d (groups=1), pooling, padding, ReLU, dropout, flatten and Linear layers for images of shape
(3, 32, 32). `load_network` turns a checkpoint of any of them, converted or not, into a module ready to use.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from rnorm.checkpoints import load, load_weights
from rnorm.conversions import find_conversion
from rnorm.files import Damaged, RnormError

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
    """A network of NETWORKS with fresh weights; raises RnormError if there is none of that name."""
    if name not in NETWORKS:
        raise RnormError(f"{name}: no such network in models.py; there are {', '.join(NETWORKS)}")
    return NETWORKS[name](num_classes)


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
        bias = list(state["weights"].values())[-1]  # that of the last Linear layer
        model = make_network(network, len(bias)).to(bias.dtype)
        if conversion:
            model = find_conversion(conversion).convert(model, IMAGE_SHAPE)
        load_weights(model, state)
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
