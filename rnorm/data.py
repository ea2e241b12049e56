"""The images: data sets by name, or an .npz file; normalised and on the device once, as tensors."""

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rnorm.files import Lock, RnormError
from rnorm.signals import stopping_at_once

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
ELSEWHERE = "name its directory with --data_dir, or another --dataset, such as synthetic"
CIFAR10 = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
"""The published mean and standard deviation per channel, of pixels from 0 to 1."""

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass
class Data:
    """Normalised images (N, C, H, W), channels-last in memory, and labels (N,), int64."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    sha256: str  # of the whole data set's arrays, before data_size is applied
    mean: tuple[float, ...] = ()  # per channel, with which the images are normalised; see `normalise`
    std: tuple[float, ...] = ()

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.x_train.shape[1:])


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and what is known of it."""

    arrays: Callable[[Path], dict[str, np.ndarray]]  # its ARRAYS; the argument is the data directory
    normalisation: Normalisation | None = None  # mean and standard deviation; None: those of its training images
    shapes: tuple[tuple[int, ...], ...] = ()  # (N, C, H, W) of its training and test images, if known in advance
    classes: int = 10
    sha256: str = ""  # as in `Data`; "" if not known


def load_data(
    dataset: str, data_dir: Path, data_size: int, device: torch.device, dtype: torch.dtype = torch.float32,
    normalisation: Normalisation | None = None, sha256: str | None = None,
) -> Data:  # fmt: skip
    """Load a data set, one of DATASETS or the path of an .npz file, and put it on `device`, its images as `dtype`.

    `data_size` is how many training images to use, from the first on; 0 for all. `normalisation` is the mean and the
    standard deviation to use in place of the data set's own, `sha256` what the data have to be. A signal stops it at
    once. Raises RnormError if the data are not there or not what they should be.
    """
    source = DATASETS.get(dataset) or Source(lambda data_dir: npz(data_dir, dataset))
    with stopping_at_once():
        arrays = check_arrays(source.arrays(Path(data_dir)), dataset)
        check_data_size(data_size, len(arrays["x_train"]))
        num_classes = int(arrays["y_train"].max()) + 1
        found = sha256_of(arrays)
        if sha256 is not None and sha256 != found:
            remedy = f"put the one with SHA-256 {sha256[:8]}... in its place, or name its directory with --data_dir"
            raise RnormError(f"{dataset_name(dataset)} here is not the data of the run; {remedy}")
        known = [other.normalisation for other in DATASETS.values() if other.sha256 == found]
        own = source.normalisation or (known[0] if known else None)
        mean, std = normalisation or own or mean_and_std(arrays["x_train"])
        channels = arrays["x_train"].shape[3]
        if not len(mean) == len(std) == channels:
            raise RnormError(f"{dataset} has {channels} channels, but is to be normalised with {mean} and {std}")
        if data_size:
            arrays |= {name: arrays[name][:data_size] for name in ("x_train", "y_train")}
        tensors = {}
        for part in ("train", "test"):
            tensors[f"x_{part}"] = normalise(arrays[f"x_{part}"], mean, std, device, dtype)
            tensors[f"y_{part}"] = torch.from_numpy(arrays[f"y_{part}"]).to(device)
    return Data(**tensors, num_classes=num_classes, sha256=found, mean=mean, std=std)


def stand_in(dataset: str, data_size: int, device: torch.device, dtype: torch.dtype) -> Data | None:
    """Data of the size of a data set that need not be read, such as for a plan; None if its size is not known.

    The images are one zero that takes no memory, and the SHA-256 is "".
    """
    source = DATASETS.get(dataset)
    if source is None or not source.shapes:
        return None
    train, test = source.shapes
    check_data_size(data_size, train[0])
    pixel, label = torch.zeros(1, 1, 1, 1, device=device, dtype=dtype), torch.zeros(1, dtype=torch.int64, device=device)
    count = data_size or train[0]
    images = pixel.expand(count, *train[1:]), label.expand(count), pixel.expand(test), label.expand(test[0])
    return Data(*images, num_classes=source.classes, sha256="")


def sha256_of(arrays: dict[str, np.ndarray]) -> str:
    """What a data set is known by: the SHA-256 of its checked arrays, one after the other."""
    digest = hashlib.sha256()
    for name in ARRAYS:
        digest.update(arrays[name].data)
    return digest.hexdigest()


def normalise(
    images: np.ndarray | Tensor, mean: tuple[float, ...], std: tuple[float, ...],
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """What a network takes, (N, C, H, W), of images (N, H, W, C), uint8: (pixel / 255 - mean) / std in each channel."""
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != len(mean):
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, not uint8 (N, H, W, {len(mean)})")
    x = images.to(device, dtype).div_(255)
    x.sub_(torch.tensor(mean, device=device, dtype=dtype)).div_(torch.tensor(std, device=device, dtype=dtype))
    return x.permute(0, 3, 1, 2)


def mean_and_std(images: np.ndarray) -> Normalisation:
    """Mean and standard deviation per channel of images (N, H, W, C), uint8, of pixels from 0 to 1; to six digits.

    They are computed from whole numbers, so that they are the same on every machine. A deviation of 0 becomes 1.
    """
    pixels = images.size // images.shape[-1]
    total, squares = np.zeros((2, images.shape[-1]), np.int64)
    for start in range(0, len(images), 100):
        part = images[start : start + 100].astype(np.int64)
        total += part.sum((0, 1, 2))
        squares += (part**2).sum((0, 1, 2))
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
    return tuple((mean / 255).round(6).tolist()), tuple(value or 1.0 for value in (std / 255).round(6).tolist())


def check_arrays(arrays: dict[str, np.ndarray], dataset: str) -> dict[str, np.ndarray]:
    """`arrays` in C order, labels as int64; raises RnormError unless they are ARRAYS of a data set for classification.

    x_* has to be uint8 (N, H, W, C), C 1 or 3, H and W at least 8, or (N, H, W), which becomes (N, H, W, 1); y_*
    integers (N,), the labels 0 to c-1 with c at least 2.
    """
    if missing := [name for name in ARRAYS if name not in arrays]:
        raise RnormError(f"{dataset} lacks {', '.join(missing)}; it has to hold {', '.join(ARRAYS)}")
    arrays = {name: np.ascontiguousarray(arrays[name]) for name in ARRAYS}
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim == 3:
            x = arrays[f"x_{part}"] = x[..., None]
        if x.dtype != np.uint8 or x.ndim != 4 or not len(x) or x.shape[3] not in (1, 3) or min(x.shape[1:3]) < 8:
            rule = "it has to be uint8 (N, H, W, C), N > 0, H and W at least 8, C 1 or 3"
            raise RnormError(f"{dataset}: x_{part} is {x.dtype} {x.shape}; {rule}")
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            raise RnormError(f"{dataset}: y_{part} is {y.dtype} {y.shape}; it has to be integers ({len(x)},)")
    train, test = (arrays[name].shape[1:] for name in ("x_train", "x_test"))
    if train != test:
        raise RnormError(f"{dataset}: an image of x_train is {train}, one of x_test {test}; they have to be alike")
    classes = np.unique(arrays["y_train"])
    if len(classes) < 2 or classes[0] != 0 or classes[-1] != len(classes) - 1:
        raise RnormError(f"{dataset}: y_train has to hold the labels 0, 1, ..., c-1, each of them, and c at least 2")
    if arrays["y_test"].min() < 0 or arrays["y_test"].max() >= len(classes):
        raise RnormError(f"{dataset}: y_test has labels outside 0 to {len(classes) - 1}, the classes of y_train")
    return arrays | {name: arrays[name].astype(np.int64) for name in ("y_train", "y_test")}


def check_data_size(data_size: int, images: int) -> None:
    """Raise RnormError if there are fewer training images than asked for."""
    if data_size > images:
        raise RnormError(f"data_size {data_size}: there are only {images} training images; use 0 for all")


def dataset_name(dataset: str) -> str:
    """A data set's name in settings: of a file the stem, unless a built-in data set is called like that."""
    stem = Path(dataset).stem
    return Path(dataset).name if stem in DATASETS and dataset != stem else stem


def from_torchvision(data_dir: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of a data set of torchvision, by its name there; downloaded into `data_dir` if it is not there."""
    from torchvision import datasets  # only here: it is slow to import

    kind = getattr(datasets, name)
    try:
        try:
            parts = [kind(data_dir, train=train) for train in (True, False)]
        except RuntimeError:  # not there, or not intact
            data_dir.mkdir(parents=True, exist_ok=True)
            with Lock(data_dir, wait=True):  # many jobs may start at once
                parts = [kind(data_dir, train=train, download=True) for train in (True, False)]
    except Exception as error:  # no network, no space, no right to write, a truncated or foreign archive, ...
        archive, folder = (data_dir / getattr(kind, place, name) for place in ("filename", "base_folder"))
        raise RnormError(_why_not_there(name, archive, folder, error)) from None
    arrays = {}
    for part, source in zip(("train", "test"), parts):
        arrays |= {f"x_{part}": np.asarray(source.data), f"y_{part}": np.asarray(source.targets, np.int64)}
    return arrays


def _why_not_there(name: str, archive: Path, folder: Path, error: Exception) -> str:
    """One line on a data set that torchvision did not load: what is wrong, and what to do."""
    reason, data_dir = _line(error), folder.parent
    here = [path for path in (archive, folder) if path.is_file() or any(p.is_file() for p in path.rglob("*"))]
    number = getattr(error, "errno", None)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        if here == [archive]:
            return f"{archive} is not unpacked, and cannot be here ({reason}); have it unpacked, or {ELSEWHERE}"
        return f"{name} cannot be read in {data_dir}, nor put there ({reason}); {ELSEWHERE}"
    if Path(getattr(error, "filename", None) or "").name == ".lock":
        return f"{name} is not in {data_dir}, and cannot be put there: {error.filename}: {error.strerror}"
    if here:
        return f"{name} in {data_dir} is damaged ({reason}); delete {here[0]} and try again"
    return f"no {name} in {data_dir}, and it cannot be downloaded ({reason}); {ELSEWHERE}"


def npz(data_dir: Path, dataset: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; looked for in `data_dir` too."""
    path = next((p for p in (Path(dataset), data_dir / Path(dataset).name) if os.path.isfile(p)), None)
    if path is None or not dataset.endswith(".npz"):
        known = ", ".join(DATASETS)
        raise RnormError(f"{dataset} is neither a data set ({known}) nor an .npz file that exists; {ELSEWHERE}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in ARRAYS if name in file}
    except Exception as error:  # truncated, no zip, objects, impossible sizes: numpy raises many kinds
        raise RnormError(f"{path} cannot be read ({_line(error)}); it has to be a plain numpy.savez file") from None


def _line(error: Exception) -> str:
    """An error as one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def synthetic(train: int = 2000, test: int = 1000) -> dict[str, np.ndarray]:
    """Ten classes of images in which the evidence is local and lies anywhere: made by code, from a fixed seed.

    A class is a 7 x 7 coloured pattern. An image holds its class's pattern four times and another's once, at random
    places, among clutter: shuffled patterns, a random background and noise. Where a pattern lies says nothing, so a
    filter learned at one position is worth having at all of them.
    """
    rng = np.random.default_rng(0)
    size, classes = 7, 10
    patterns = rng.standard_normal((classes, size, size, 3))
    arrays = {}
    for part, count in (("train", train), ("test", test)):
        y = rng.permutation(np.arange(count) % classes)
        background = rng.standard_normal((count, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
        x = 0.4 * background + 0.4 * rng.standard_normal((count, 32, 32, 3))
        for i in range(count):
            clutter = patterns[rng.integers(0, classes, 3)].reshape(3, -1, 3)
            clutter = rng.permuted(clutter, axis=1).reshape(3, size, size, 3)
            other = patterns[(y[i] + rng.integers(1, classes)) % classes]
            for pattern in (*clutter, other, *[patterns[y[i]]] * 4):  # the class's own patterns last, on top
                top, left = rng.integers(0, 32 - size + 1, 2)
                x[i, top : top + size, left : left + size] = pattern
        arrays[f"x_{part}"] = np.clip(128 + 50 * x, 0, 255).astype(np.uint8)
        arrays[f"y_{part}"] = y.astype(np.int64)
    return arrays


CIFAR_SHAPES = (50_000, 3, 32, 32), (10_000, 3, 32, 32)
MNIST_SHAPES = (60_000, 1, 28, 28), (10_000, 1, 28, 28)
DATASETS = {
    "cifar10": Source(
        partial(from_torchvision, name="CIFAR10"), CIFAR10, CIFAR_SHAPES,
        sha256="6b3883dca6c867f1e58def548c063d1865569b8575fcbce06b3e468a89f9895a",
    ),
    "cifar100": Source(
        partial(from_torchvision, name="CIFAR100"),
        ((0.49137, 0.48235, 0.44667), (0.24706, 0.24353, 0.26157)), CIFAR_SHAPES, 100,
    ),
    "mnist": Source(partial(from_torchvision, name="MNIST"), ((0.1307,), (0.3081,)), MNIST_SHAPES),
    "fashionmnist": Source(partial(from_torchvision, name="FashionMNIST"), ((0.286,), (0.353,)), MNIST_SHAPES),
    "synthetic": Source(lambda data_dir: synthetic(), CIFAR10),
}  # fmt: skip
