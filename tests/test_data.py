"""Data sets by name or as an .npz file: what they become, and what is refused."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_arrays

from rnorm.data import ARRAYS, NoData, dataset_name, load_data, synthetic
from rnorm.files import RnormError

CPU = torch.device("cpu")


def test_data_are_normalised_and_cut_to_size(npz):
    whole, part = (load_data(str(npz), npz.parent, size, CPU) for size in (0, 20))
    assert whole.x_train.shape == (60, 3, 32, 32) and part.x_train.shape == (20, 3, 32, 32)
    assert torch.equal(whole.x_train[:20], part.x_train) and len(part.x_test) == 30
    assert whole.num_classes == 3 and whole.image_shape == (3, 32, 32)
    red, green, blue = make_arrays()["x_train"][5, 7, 9] / 255
    expected = [(red - 0.491) / 0.247, (green - 0.482) / 0.243, (blue - 0.447) / 0.262]
    assert whole.x_train[5, :, 7, 9].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_checksum_is_that_of_the_whole_data_set(npz):
    digest = hashlib.sha256()
    for name in ARRAYS:
        digest.update(make_arrays()[name].tobytes())
    assert all(load_data(str(npz), npz.parent, size, CPU).sha256 == digest.hexdigest() for size in (0, 20))


def test_arrays_of_other_layouts_mean_the_same(npz, tmp_path):
    """Big-endian, unsigned or Fortran-ordered arrays are good input."""
    other = {k: np.asfortranarray(v) if k[0] == "x" else v.astype(">u2") for k, v in make_arrays().items()}
    np.savez(tmp_path / "b.npz", **other)
    a, b = (load_data(str(path), tmp_path, 0, CPU) for path in (npz, tmp_path / "b.npz"))
    assert a.sha256 == b.sha256 and torch.equal(a.x_train, b.x_train) and torch.equal(a.y_test, b.y_test)


def test_a_file_is_looked_for_in_the_data_directory_too(npz):
    assert load_data("elsewhere/tiny.npz", npz.parent, 0, CPU).num_classes == 3


def test_a_file_called_like_a_data_set_keeps_its_ending():
    assert dataset_name("cifar10") == "cifar10" and dataset_name("dir/mine.v2.npz") == "mine.v2"
    assert dataset_name("dir/cifar10.npz") == "cifar10.npz" and dataset_name("synthetic.npz") == "synthetic.npz"


def test_the_synthetic_data_are_the_same_everywhere():
    a, b = synthetic(train=200, test=50), synthetic(train=200, test=50)
    assert all((a[name] == b[name]).all() for name in a)
    assert a["x_train"].shape == (200, 32, 32, 3) and a["x_train"].dtype == "uint8" and a["x_train"].std() > 1
    assert sorted(set(a["y_train"])) == list(range(10))


@pytest.mark.parametrize(
    "changes, cause",
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": np.zeros((60, 32, 32, 3), np.float32)}, "x_train is float32"),
        ({"x_train": np.zeros((60, 3, 32, 32), np.uint8)}, "has to be uint8 .N, 32, 32, 3."),
        ({"x_test": np.zeros((0, 32, 32, 3), np.uint8)}, "N > 0"),
        ({"x_test": np.uint8(3)}, "x_test is uint8 ()"),
        ({"y_train": np.arange(59) % 3}, "y_train is int64 .59,."),
        ({"y_train": np.arange(60)[:, None] % 3}, "y_train is int64 .60, 1."),
        ({"y_train": np.arange(60) % 3 * 1.0}, "y_train is float64"),
        ({"y_train": (np.arange(60) % 3).astype("m8[s]")}, "has to be integers"),
        ({"y_train": np.arange(60) % 3 + 1}, "the labels 0, 1, ..., c-1"),
        ({"y_train": np.arange(60) % 2}, "c at least 3"),
        ({"y_train": np.arange(60) % 3 * 2}, "each of them"),
        ({"y_train": np.full(60, 2**64 - 1, np.uint64)}, "the labels 0, 1"),
        ({"y_test": np.full(30, 3)}, "y_test has labels outside 0 to 2"),
        ({"y_test": np.full(30, -1)}, "y_test has labels outside"),
        ({"y_train": np.array([None] * 60)}, "cannot be read"),
    ],
)
def test_an_npz_with_wrong_arrays_is_refused_with_the_cause(tmp_path, changes, cause):
    path = tmp_path / "bad.npz"
    np.savez(path, **{k: v for k, v in (make_arrays() | changes).items() if v is not None})
    with pytest.raises(RnormError, match=f"bad.npz.* {cause}"):
        load_data(str(path), tmp_path, 0, CPU)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + bytes(18)])
def test_an_npz_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(RnormError, match="bad.npz"):
        load_data(str(path), tmp_path, 0, CPU)


@pytest.mark.parametrize("dataset", ["cifar1000", "missing.npz", "", ".", "a\nb.npz", "\udcff.npz", f"{'x' * 300}.npz"])
def test_a_data_set_that_does_not_exist_is_refused(tmp_path, dataset):
    with pytest.raises(NoData, match="is neither a data set .cifar10, cifar100, synthetic. nor an .npz file"):
        load_data(dataset, tmp_path, 0, CPU)


def test_more_images_than_there_are_cannot_be_asked_for(npz):
    with pytest.raises(RnormError, match="data_size 61: there are only 60 training images; use 0 for all"):
        load_data(str(npz), Path(), 61, CPU)
