"""The networks of the study, by name. To add one of your own, write a function like `skinnyprime` and list it below.

A network is an `nn.Sequential` of the LAYERS of rnorm/conversions.py. `load_network` turns a checkpoint of any of them,
converted or not, into a module ready to use.
"""

import functools
import inspect
import re
from pathlib import Path

import torch
from torch import nn

from rnorm.conversions import check_layers, find_conversion
from rnorm.files import Damaged, RnormError
from rnorm.layers import layer_shapes
from rnorm.store import from_file, load, load_weights

Shape = tuple[int, ...]  # of an image: (C, H, W)
CIFAR = (3, 32, 32)


def skinnyprime(num_classes: int = 10, image_shape: Shape = CIFAR) -> nn.Sequential:
    """The CNN of the study: images (N, C, H, W) to logits (N, num_classes); 64 channels in every layer.

    Source: the released code of arXiv:2206.05317, after arXiv:1906.06766.
    """
    convolutions = [
        nn.ZeroPad2d(2), nn.Conv2d(image_shape[0], 64, 4, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.ZeroPad2d(2), nn.Conv2d(64, 64, 5), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.ZeroPad2d(1), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(3, 2),
    ]  # fmt: skip
    # Of CIFAR-10's images: 64 x 17 x 17, pooled 8 x 8; 64 x 8 x 8, pooled 3 x 3; 64 x 3 x 3, pooled 1 x 1.
    torch.randn(1, *image_shape)  # the released network measures itself with an image here: same seed, same weights
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, num_classes))


def alexnetprime(num_classes: int = 10, image_shape: Shape = CIFAR) -> nn.Sequential:
    """The larger CNN: images (N, C, H, W) to logits (N, num_classes). Source: arXiv:1906.06766, section 3."""
    return nn.Sequential(
        nn.ZeroPad2d(2), nn.Conv2d(image_shape[0], 64, 4, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.ZeroPad2d(2), nn.Conv2d(64, 192, 5), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.ZeroPad2d(1), nn.Conv2d(192, 384, 3), nn.ReLU(),
        nn.ZeroPad2d(1), nn.Conv2d(384, 256, 3), nn.ReLU(),
        nn.ZeroPad2d(1), nn.Conv2d(256, 256, 3), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Flatten(), nn.Dropout(), nn.Linear(256, 512), nn.ReLU(), nn.Dropout(), nn.Linear(512, 512), nn.ReLU(),
        nn.Linear(512, num_classes),
    )  # fmt: skip


NETWORKS = {"skinnyprime": skinnyprime, "alexnetprime": alexnetprime}


def make_network(name: str, num_classes: int, image_shape: Shape = CIFAR) -> nn.Sequential:
    """A network of NETWORKS with fresh weights, for images (C, H, W); its function may take `image_shape`, or not.

    Raises RnormError if there is none of that name, or if it cannot be trained and measured on such images.
    """
    if name not in NETWORKS:
        raise RnormError(f"{name}: no such network in models.py; there are {', '.join(NETWORKS)}")
    make, images = NETWORKS[name], " x ".join(map(str, image_shape))
    if "image_shape" in inspect.signature(make).parameters:
        make = functools.partial(make, image_shape=image_shape)
    net = make(num_classes)
    if type(net) is not nn.Sequential:
        raise RnormError(f"{name}: it has to be an nn.Sequential, not {type(net).__name__}")
    try:
        check_layers(net, image_shape)
        out = layer_shapes(net, image_shape)[-1]
    except ValueError as error:
        raise RnormError(f"{name}: {error}") from None
    except RuntimeError as error:  # torch's: a kernel larger than its input, a Linear layer of another size
        reason = str(error).partition("\n")[0]
        raise RnormError(f"{name} does not fit images of {images}: {reason}; use another --network") from None
    if out != (num_classes,):
        raise RnormError(f"{name}: of images of {images} it makes {out}, not {num_classes} logits")
    for layer in net:
        if getattr(layer, "inplace", False):
            layer.inplace = False  # what stands before the first layer with weights would change the images
    return net


def converted_network(name: str, conversion: str, num_classes: int, image_shape: Shape = CIFAR) -> nn.Sequential:
    """What a conversion makes of a network of NETWORKS; the network itself for "".

    Raises RnormError as `make_network` does, and ValueError for a conversion that cannot be.
    """
    net = make_network(name, num_classes, image_shape)
    return find_conversion(conversion).convert(net, image_shape) if conversion else net


def load_network(path: Path | str) -> nn.Sequential:
    """The network in a checkpoint of a run or of the released code, in eval mode, on the CPU.

    Its name says what it is: NETWORK_EPOCH.pyT, or NETWORK_CONVERSION_version_EPOCH.pyT; a `latest.pyT` is what the
    checkpoints beside it are. It takes images normalised as in training (`rnorm.data.normalise`). Raises
    FileNotFoundError, or RnormError if it is no checkpoint of a network here.
    """
    path = Path(path)
    try:
        state = load(path)
    except Damaged as damage:
        raise RnormError(f"{path} is damaged ({damage})") from None
    network, conversion = network_and_conversion(path)
    try:
        identity = state.get("identity", {})  # older files, and those of the released code, do not have it
        classes, image_shape = identity.get("num_classes", 10), tuple(identity.get("image_shape", CIFAR))
        if type(classes) is not int or not 0 < classes < 10**5:
            raise Damaged("its number of classes is no such number")
        net = converted_network(network, conversion, classes, image_shape)
        dtype = list(from_file(state).values())[-1].dtype
        if dtype not in (torch.float32, torch.float64):
            raise Damaged(f"its weights are {dtype}")
        load_weights(net.to(dtype), state)
    except (Damaged, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RnormError(f"{path} is no checkpoint of {network} ({error})") from None
    return net.eval()


def network_and_conversion(path: Path) -> tuple[str, str]:
    """What a checkpoint's name says it is of; the conversion is "" for a CNN. Raises RnormError for another name."""
    names = [path.stem]
    if path.stem == "latest":
        names = sorted(other.stem for other in path.parent.glob("[!.]*_*.pyT"))
    for name in names:
        if match := re.fullmatch(r"(.+?)(?:_([^_]+)_version)?_\d+", name):
            return match[1], match[2] or ""
    raise RnormError(f"{path}: its name is not that of a checkpoint, such as skinnyprime_150.pyT")
