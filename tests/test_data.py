"""Data sets by name or as an .npz file: what they become, and what is refused."""

import hashlib

import numpy as np
import pytest
import torch
from conftest import make_arrays

from rnorm.data import ARRAYS, DATASETS, Source, dataset_name, load_data, synthetic
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
    digest = hashlib.sha256()
    for name in ARRAYS:
        digest.update(make_arrays()[name].tobytes())
    assert whole.sha256 == part.sha256 == digest.hexdigest()  # of the whole data set


def test_arrays_of_other_layouts_mean_the_same(npz, monkeypatch):
    """Big-endian, unsigned, Fortran-ordered or reversed arrays and lists of labels are good input."""
    arrays = make_arrays()
    files = {k: np.asfortranarray(v) if k[0] == "x" else v.astype(">u2") for k, v in arrays.items()}
    np.savez(npz.with_name("b.npz"), **files)
    views = {k: v[::-1].copy()[::-1] if k[0] == "x" else v.tolist() for k, v in arrays.items()}
    monkeypatch.setitem(DATASETS, "mine", Source(lambda data_dir: views))
    a, *others = (load_data(dataset, npz.parent, 0, CPU) for dataset in ("tiny.npz", "b.npz", "mine"))
    for b in others:
        assert a.sha256 == b.sha256 and torch.equal(a.x_train, b.x_train) and torch.equal(a.y_test, b.y_test)
        assert a.x_train.stride() == b.x_train.stride()


def test_a_file_is_found_in_the_data_directory_too_and_keeps_its_ending_if_called_like_a_data_set(npz):
    assert load_data("elsewhere/tiny.npz", npz.parent, 0, CPU).num_classes == 3
    assert dataset_name("cifar10") == "cifar10" and dataset_name("dir/mine.v2.npz") == "mine.v2"
    assert dataset_name("dir/cifar10.npz") == "cifar10.npz" and dataset_name("synthetic.npz") == "synthetic.npz"


def test_the_synthetic_data_are_the_same_everywhere():
    a, b = synthetic(train=200, test=50), synthetic(train=200, test=50)
    assert all((a[name] == b[name]).all() for name in a)
    assert a["x_train"].shape == (200, 32, 32, 3) and a["x_train"].dtype == "uint8" and a["x_train"].std() > 1
    assert sorted(set(a["y_train"])) == list(range(10))


@pytest.mark.parametrize("dataset", ["bad.npz", "mine"])
@pytest.mark.parametrize(
    "changes, cause",
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": np.zeros((60, 32, 32, 3), np.float32)}, "x_train is float32"),
        ({"x_train": np.zeros((60, 3, 32, 32), np.uint8)}, "has to be uint8 .N, 32, 32, 3."),
        ({"x_train": np.zeros((60, 28, 28, 3), np.uint8)}, "x_train is uint8 .60, 28, 28, 3.; it has to be"),
        ({"x_test": np.zeros((0, 32, 32, 3), np.uint8)}, "N > 0"),
        ({"x_test": np.uint8(3)}, "x_test is uint8 "),
        ({"y_train": np.arange(59) % 3}, "y_train is int64 .59,."),
        ({"y_train": np.arange(60)[:, None] % 3}, "y_train is int64 .60, 1."),
        ({"y_train": np.arange(60) % 3 * 1.0}, "y_train is float64"),
        ({"y_train": (np.arange(60) % 3).astype("m8[s]")}, "y_train .* has to be integers"),
        ({"y_train": np.arange(60) % 3 + 1}, "y_train has to hold the labels 0, 1, ..., c-1"),
        ({"y_train": np.arange(60) % 2}, "y_train .* c at least 3"),
        ({"y_train": np.arange(60) % 3 * 2}, "y_train .* each of them"),
        ({"y_train": np.full(60, 2**64 - 1, np.uint64)}, "y_train has to hold the labels"),
        ({"y_test": np.full(30, 3)}, "y_test has labels outside 0 to 2"),
        ({"y_test": np.full(30, -1)}, "y_test has labels outside"),
    ],
)
def test_wrong_arrays_of_any_data_set_are_refused_with_the_cause(tmp_path, monkeypatch, dataset, changes, cause):
    arrays = {k: v for k, v in (make_arrays() | changes).items() if v is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    monkeypatch.setitem(DATASETS, "mine", Source(lambda data_dir: arrays))
    with pytest.raises(RnormError, match=f"^{dataset}.* {cause}"):
        load_data(dataset, tmp_path, 0, CPU)


def test_an_npz_that_is_none_is_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", y_train=np.array([None] * 60))
    for content in (b"", b"no zip", b"PK\x05\x06" + bytes(18), (tmp_path / "objects.npz").read_bytes()):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(RnormError, match="bad.npz (cannot be read|lacks x_train)"):
            load_data("bad.npz", tmp_path, 0, CPU)


@pytest.mark.parametrize("dataset", ["mnist", "missing.npz", "", ".", "a\nb.npz", "\udcff.npz", f"{'x' * 300}.npz"])
def test_a_data_set_that_does_not_exist_is_refused(tmp_path, dataset):
    with pytest.raises(RnormError, match="is neither a data set .cifar10, .*synthetic. nor an .npz file that exists"):
        load_data(dataset, tmp_path, 0, CPU)


def test_cifar100_is_normalised_with_its_own_constants(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, directory, train):
            self.data = np.full((100, 32, 32, 3), 51, np.uint8)
            self.targets = list(range(100))

    monkeypatch.setattr("torchvision.datasets.CIFAR100", Fake)
    data = load_data("cifar100", tmp_path, 0, CPU)
    assert data.num_classes == 100
    expected = [(0.2 - 0.49137) / 0.24706, (0.2 - 0.48235) / 0.24353, (0.2 - 0.44667) / 0.26157]
    assert data.x_test[7, :, 3, 5].tolist() == pytest.approx(expected, rel=1e-5)
