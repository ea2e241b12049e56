"""The images: data sets by name, or an .npz file; normalised and on the device once, as tensors."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rnorm.files import Lock, RnormError
from rnorm.signals import stopping_at_once

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
ELSEWHERE = "name its directory with --data_dir, or another --dataset, such as synthetic"


@dataclass
class Data:
    """Normalised images (N, 3, 32, 32), channels-last in memory, and labels (N,), int64."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    sha256: str  # of the whole data set's arrays, before data_size is applied

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.x_train.shape[1:])


@dataclass(frozen=True)
class Source:
    """Where a data set comes from: a function of the data directory that returns its ARRAYS, and its normalisation."""

    arrays: Callable[[Path], dict[str, np.ndarray]]
    mean: tuple[float, float, float] = (0.491, 0.482, 0.447)  # of CIFAR-10
    std: tuple[float, float, float] = (0.247, 0.243, 0.262)
    images: int = 0  # for training, of a data set that is downloaded; 0: not known in advance


def load_data(
    dataset: str, data_dir: Path, data_size: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Data:
    """Load a data set, one of DATASETS or the path of an .npz file, and put it on `device`, its images as `dtype`.

    `data_size` is how many training images to use, from the first on; 0 for all. A signal stops it at once. Raises
    RnormError if the data are not there or not what they should be.
    """
    source = DATASETS.get(dataset) or Source(lambda data_dir: npz(data_dir, dataset))
    with stopping_at_once():
        arrays = check_arrays(source.arrays(Path(data_dir)), dataset)
        check_data_size(data_size, len(arrays["x_train"]))
        num_classes = int(arrays["y_train"].max()) + 1
        digest = hashlib.sha256()
        for name in ARRAYS:
            digest.update(arrays[name].data)
        if data_size:
            arrays |= {name: arrays[name][:data_size] for name in ("x_train", "y_train")}
        tensors = {}
        for part in ("train", "test"):
            x = torch.from_numpy(arrays[f"x_{part}"]).to(device, dtype).div_(255)  # (N, 32, 32, 3)
            mean, std = (torch.tensor(values, device=device, dtype=dtype) for values in (source.mean, source.std))
            x.sub_(mean).div_(std)
            tensors[f"x_{part}"] = x.permute(0, 3, 1, 2)
            tensors[f"y_{part}"] = torch.from_numpy(arrays[f"y_{part}"]).to(device)
    return Data(**tensors, num_classes=num_classes, sha256=digest.hexdigest())


def check_arrays(arrays: dict[str, np.ndarray], dataset: str) -> dict[str, np.ndarray]:
    """`arrays` in C order, labels as int64; raises RnormError unless they are ARRAYS of a data set for classification.

    x_* has to be uint8 (N, 32, 32, 3), y_* integers (N,), the labels 0 to c-1 with c at least 3.
    """
    if missing := [name for name in ARRAYS if name not in arrays]:
        raise RnormError(f"{dataset} lacks {', '.join(missing)}; it has to hold {', '.join(ARRAYS)}")
    arrays = {name: np.ascontiguousarray(arrays[name]) for name in ARRAYS}
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1:] != (32, 32, 3) or not len(x):
            raise RnormError(f"{dataset}: x_{part} is {x.dtype} {x.shape}; it has to be uint8 (N, 32, 32, 3), N > 0")
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            raise RnormError(f"{dataset}: y_{part} is {y.dtype} {y.shape}; it has to be integers ({len(x)},)")
    classes = np.unique(arrays["y_train"])
    if len(classes) < 3 or classes[0] != 0 or classes[-1] != len(classes) - 1:
        raise RnormError(f"{dataset}: y_train has to hold the labels 0, 1, ..., c-1, each of them, and c at least 3")
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


def cifar(data_dir: Path, classes: int) -> dict[str, np.ndarray]:
    """CIFAR-10 or CIFAR-100 as arrays, through torchvision, downloaded into `data_dir` if it is not there."""
    from torchvision import datasets  # only here: it is slow to import

    kind, name = getattr(datasets, f"CIFAR{classes}"), f"CIFAR-{classes}"
    try:
        try:
            parts = [kind(data_dir, train=train) for train in (True, False)]
        except RuntimeError:  # not there, or not intact
            data_dir.mkdir(parents=True, exist_ok=True)
            with Lock(data_dir, wait=True):  # many jobs may start at once
                parts = [kind(data_dir, train=train, download=True) for train in (True, False)]
    except Exception as error:  # no network, no space, a truncated or foreign archive, ...
        reason = _line(error)
        here = [p for p in (data_dir / kind.filename, data_dir / kind.base_folder) if p.exists()]
        if here:
            raise RnormError(f"{name} in {data_dir} is damaged ({reason}); delete {here[0]} and try again") from None
        raise RnormError(f"no {name} in {data_dir}, and it cannot be downloaded ({reason}); {ELSEWHERE}") from None
    arrays = {}
    for part, source in zip(("train", "test"), parts):
        arrays |= {f"x_{part}": source.data, f"y_{part}": np.array(source.targets, np.int64)}
    return arrays


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


DATASETS = {
    "cifar10": Source(lambda data_dir: cifar(data_dir, 10), images=50_000),
    "cifar100": Source(
        lambda data_dir: cifar(data_dir, 100), (0.49137, 0.48235, 0.44667), (0.24706, 0.24353, 0.26157), images=50_000
    ),
    "synthetic": Source(lambda data_dir: synthetic()),
}
