"""Data sets by name or as an .npz file: what they become, and what is refused."""

import argparse
import contextlib
import errno
import hashlib
import os
import struct
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_arrays

from rnorm import data as data_module
from rnorm.data import ARRAYS, CIFAR10, DATASETS, Source, dataset_name, load_data, normalise, synthetic
from rnorm.files import RnormError
from rnorm.flags import add_data_flags, add_settings, data_of_run, normalisation_of_run
from rnorm.runs import Settings, write_config

CPU = torch.device("cpu")


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of the arrays in a file that `make_arrays` made."""
    with np.load(path) as arrays:
        return hashlib.sha256(b"".join(arrays[name].tobytes() for name in ARRAYS)).hexdigest()


def test_data_are_normalised_and_cut_to_size(npz):
    whole, part = (load_data(str(npz), npz.parent, size, CPU, normalisation=CIFAR10) for size in (0, 20))
    assert whole.x_train.shape == (60, 3, 32, 32) and part.x_train.shape == (20, 3, 32, 32)
    assert torch.equal(whole.x_train[:20], part.x_train) and len(part.x_test) == 30
    assert whole.num_classes == 3 and whole.image_shape == (3, 32, 32)
    red, green, blue = make_arrays()["x_train"][5, 7, 9] / 255
    expected = [(red - 0.491) / 0.247, (green - 0.482) / 0.243, (blue - 0.447) / 0.262]
    assert whole.x_train[5, :, 7, 9].tolist() == pytest.approx(expected, rel=1e-5)
    assert whole.sha256 == part.sha256 == sha256_of_file(npz)  # of the whole data set


def test_an_npz_is_normalised_with_the_mean_and_deviation_of_its_training_images_unless_others_are_given(npz):
    data = load_data(str(npz), npz.parent, 20, CPU)
    pixels = make_arrays()["x_train"].reshape(-1, 3) / 255  # all of them, whatever data_size is
    assert data.mean == pytest.approx(pixels.mean(0), abs=1e-6) and data.std == pytest.approx(pixels.std(0), abs=1e-6)
    others = load_data(str(npz), npz.parent, 20, CPU, normalisation=CIFAR10)
    assert (others.mean, others.std) == CIFAR10 and not torch.equal(others.x_train, data.x_train)
    for images in (data, others):  # a test image too
        expected = (make_arrays()["x_test"][4, 3, 2] / 255 - images.mean) / images.std
        assert images.x_test[4, :, 3, 2].tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(RnormError, match="tiny.npz has 3 channels"):
        load_data(str(npz), npz.parent, 0, CPU, normalisation=((0.1,), (0.3,)))


def test_a_colour_that_is_the_same_everywhere_is_divided_by_1(tmp_path):
    arrays = make_arrays()
    arrays["x_train"][..., 1] = 51
    np.savez(tmp_path / "green.npz", **arrays)
    data = load_data("green.npz", tmp_path, 0, CPU)
    assert (data.mean[1], data.std[1]) == (0.2, 1.0) and data.x_train[:, 1].abs().max() < 1e-7


def test_normalise_makes_what_a_network_takes_of_a_users_images(npz):
    data, images = load_data(str(npz), npz.parent, 0, CPU), make_arrays()["x_test"]
    for given in (images, torch.from_numpy(images)):
        assert torch.equal(normalise(given, data.mean, data.std), data.x_test)
    assert (images == make_arrays()["x_test"]).all()  # they stay as they were
    for wrong in (images / 255, images[0], images.transpose(0, 3, 1, 2)):
        with pytest.raises(ValueError, match="not uint8 .N, H, W, 3."):
            normalise(wrong, data.mean, data.std)


@pytest.mark.parametrize(
    ("shape", "expected"), [((28, 28), (1, 28, 28)), ((8, 40, 1), (1, 8, 40)), ((9, 8, 3), (3, 9, 8))]
)
def test_images_may_be_grey_of_any_size_from_8_on_and_of_two_classes(tmp_path, shape, expected):
    x, y = np.random.default_rng(0).integers(0, 256, (10, *shape), np.uint8), np.arange(10) % 2
    np.savez(tmp_path / "other.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    data = load_data("other.npz", tmp_path, 0, CPU)
    assert data.image_shape == expected and data.num_classes == 2
    assert data.x_train.mean().item() == pytest.approx(0, abs=1e-4)
    assert data.x_train.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert data.x_train.is_contiguous(memory_format=torch.channels_last)


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
        ({"x_train": np.zeros((60, 3, 32, 32), np.uint8)}, "has to be uint8 .N, H, W, C., .* C 1 or 3"),
        ({"x_train": np.zeros((60, 28, 28, 3), np.uint8)}, "x_train is .28, 28, 3., one of x_test .32, 32, 3."),
        ({"x_train": np.zeros((60, 32, 7, 3), np.uint8)}, "x_train is uint8 .60, 32, 7, 3.; .* H and W at least 8"),
        ({"x_train": np.zeros((60, 32, 32, 4), np.uint8)}, "x_train is uint8 .60, 32, 32, 4."),
        ({"x_test": np.zeros((0, 32, 32, 3), np.uint8)}, "N > 0"),
        ({"x_test": np.uint8(3)}, "x_test is uint8 "),
        ({"y_train": np.arange(59) % 3}, "y_train is int64 .59,."),
        ({"y_train": np.arange(60)[:, None] % 3}, "y_train is int64 .60, 1."),
        ({"y_train": np.arange(60) % 3 * 1.0}, "y_train is float64"),
        ({"y_train": (np.arange(60) % 3).astype("m8[s]")}, "y_train .* has to be integers"),
        ({"y_train": np.arange(60) % 3 + 1}, "y_train has to hold the labels 0, 1, ..., c-1"),
        ({"y_train": np.zeros(60, int)}, "y_train .* c at least 2"),
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


@pytest.mark.parametrize("dataset", ["svhn", "missing.npz", "", ".", "a\nb.npz", "\udcff.npz", f"{'x' * 300}.npz"])
def test_a_data_set_that_does_not_exist_is_refused(tmp_path, dataset):
    with pytest.raises(RnormError, match="is neither a data set .cifar10, .*synthetic. nor an .npz file that exists"):
        load_data(dataset, tmp_path, 0, CPU)


class Fake:
    """Stands in for CIFAR-10 or CIFAR-100 of torchvision."""

    filename, base_folder = "archive.tar.gz", "unpacked"

    def __init__(self, directory, train, download=False):
        self.data, self.targets = np.full((100, 32, 32, 3), 51, np.uint8), list(range(100))


@pytest.mark.parametrize("classes, mean, std", [
    (10, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
    (100, (0.49137, 0.48235, 0.44667), (0.24706, 0.24353, 0.26157)),
])  # fmt: skip
def test_cifar_is_normalised_with_its_published_constants(tmp_path, monkeypatch, classes, mean, std):
    monkeypatch.setattr(f"torchvision.datasets.CIFAR{classes}", Fake)
    data = load_data(f"cifar{classes}", tmp_path, 0, CPU)
    expected = [(0.2 - m) / s for m, s in zip(mean, std)]
    assert data.x_test[7, :, 3, 5].tolist() == pytest.approx(expected, rel=1e-5)
    assert (data.mean, data.std) == (mean, std) and data.image_shape == (3, 32, 32)


@pytest.mark.parametrize("name, mean, std", [("MNIST", 0.1307, 0.3081), ("FashionMNIST", 0.286, 0.353)])
def test_mnist_is_read_from_the_files_that_torchvision_downloads(tmp_path, name, mean, std):
    raw = tmp_path / name / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        labels = np.arange(20, dtype=np.uint8) % 10
        images = np.full((20, 28, 28), 10, np.uint8) * labels[:, None, None]
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())
    data = load_data(name.lower(), tmp_path, 0, CPU)
    assert data.image_shape == (1, 28, 28) and data.num_classes == 10 and data.y_test.tolist() == [*range(10)] * 2
    assert data.x_test[7, 0, 3, 5].item() == pytest.approx((70 / 255 - mean) / std, rel=1e-5)
    (raw / "t10k-images-idx3-ubyte").write_bytes(head)
    with pytest.raises(RnormError, match=f"^{name} in .* is damaged .*; delete {tmp_path / name} and try again$"):
        load_data(name.lower(), tmp_path, 0, CPU)


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """CIFAR-10 that is not unpacked in the data directory `tmp_path`, with an error when it is to be put there."""
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "unpacked"))

    class Broken(Fake):
        def __init__(self, directory, train, download=False):
            raise stage.download if download else RuntimeError("Dataset not found or corrupted")

    @contextlib.contextmanager
    def lock(directory, wait):
        if stage.lock:
            raise stage.lock
        yield

    stage = types.SimpleNamespace(lock=None, download=error, permission=error, directory=tmp_path)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Broken)
    monkeypatch.setattr(data_module, "Lock", lock)
    return stage


def refusal(broken) -> str:
    with pytest.raises(RnormError) as error:
        load_data("cifar10", broken.directory, 0, CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_directory_that_cannot_be_locked_is_no_failed_download(broken):
    broken.lock = OSError(errno.ENOLCK, "cannot be locked (No locks available)", str(broken.directory / ".lock"))
    assert f"{broken.directory / '.lock'}: cannot be locked (No locks available)" in refusal(broken)
    assert "download" not in refusal(broken)
    for number in (errno.EACCES, errno.EROFS):
        broken.lock = OSError(number, os.strerror(number), str(broken.directory / ".lock"))
        assert f"nor put there ({type(broken.lock).__name__}" in refusal(broken)
        assert "download" not in refusal(broken) and "delete" not in refusal(broken)


@pytest.mark.parametrize("stage", ["lock", "download"])
def test_an_archive_that_cannot_be_unpacked_where_it_lies_is_not_to_be_deleted(broken, stage):
    (broken.directory / "archive.tar.gz").write_bytes(b"as downloaded")
    setattr(broken, stage, broken.permission)
    assert f"{broken.directory / 'archive.tar.gz'} is not unpacked, and cannot be here" in refusal(broken)
    assert "delete" not in refusal(broken) and "damaged" not in refusal(broken)


def test_damaged_files_are_told_from_a_download_that_fails(broken):
    broken.download = OSError("no network")
    assert "it cannot be downloaded (OSError: no network)" in refusal(broken)
    (broken.directory / "unpacked").mkdir()
    assert "it cannot be downloaded (OSError: no network)" in refusal(broken)  # an empty directory is no data
    (broken.directory / "unpacked" / "data_batch_1").touch()
    assert refusal(broken).endswith(f"delete {broken.directory / 'unpacked'} and try again")


def make_run(directory: Path, sha256: str, **config: object) -> Path:
    """A run on a file that is not here, as it is before any training."""
    run = directory / "run"
    run.mkdir(parents=True)
    write_config(
        run, Settings(dataset="a"), {"data_sha256": sha256, "layers": [], "dataset_file": "/gone/a.npz", **config}
    )
    return run


def test_a_runs_data_are_known_by_their_sha256_wherever_they_lie(tmp_path, npz, monkeypatch):
    sha256 = sha256_of_file(npz)
    run, data_dir = make_run(tmp_path, sha256), tmp_path / "data"
    data_dir.mkdir()
    with pytest.raises(RnormError, match="^/gone/a.npz is neither"):
        data_of_run(run, data_dir, CPU)
    np.savez(data_dir / "a.npz", **make_arrays(seed=1))
    with pytest.raises(RnormError, match="^a here is not the data of the run; put the one with SHA-256"):
        data_of_run(run, data_dir, CPU)
    npz.rename(data_dir / "z.npz")  # other data of the run's name do not hide the right ones
    assert data_of_run(run, data_dir, CPU).sha256 == sha256

    monkeypatch.setitem(DATASETS, "cifar10", Source(lambda _: make_arrays(), sha256=sha256))
    monkeypatch.setattr(data_module, "npz", lambda data_dir, dataset: {})
    assert data_of_run(run, data_dir, CPU).num_classes == 3  # from torchvision, without any file


def test_the_published_runs_ask_for_cifar_10_by_its_sha256(tmp_path, monkeypatch):
    asked, run = [], next((Path(__file__).parents[1] / "results" / "published").iterdir())
    cifar10 = Source(lambda data_dir: asked.append(data_dir) or {}, sha256=DATASETS["cifar10"].sha256)
    monkeypatch.setitem(DATASETS, "cifar10", cifar10)
    with pytest.raises(RnormError, match="^cifar10.npz is neither .*; cifar10 lacks"):
        data_of_run(run, tmp_path, CPU)
    assert asked == [tmp_path]


def test_a_file_that_is_cifar_10_has_its_published_constants(tmp_path, npz, monkeypatch):
    monkeypatch.setitem(DATASETS, "cifar10", Source(lambda _: {}, CIFAR10, sha256=sha256_of_file(npz)))
    assert load_data(str(npz), tmp_path, 0, CPU).mean == CIFAR10[0]


def test_a_runs_images_are_normalised_as_its_config_says_and_as_before_where_it_does_not(tmp_path, npz):
    assert normalisation_of_run(tmp_path / "new") is None
    before = make_run(tmp_path / "before", sha256_of_file(npz))
    assert normalisation_of_run(before) == CIFAR10 and data_of_run(before, tmp_path, CPU).mean == CIFAR10[0]
    entry = {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}
    now = make_run(tmp_path / "now", sha256_of_file(npz), normalisation=entry)
    assert normalisation_of_run(now) == ((0.1, 0.2, 0.3), (1, 2, 3))
    assert data_of_run(now, tmp_path, CPU).std == (1, 2, 3)
    for i, wrong in enumerate((5, {"mean": [0.1, 0.2, 0.3]}, {"mean": 5, "std": 5}, {"mean": ["a"], "std": [1]})):
        run = make_run(tmp_path / str(i), sha256_of_file(npz), normalisation=wrong)
        with pytest.raises(RnormError, match="config.json is damaged: its normalisation has no mean and std"):
            data_of_run(run, tmp_path, CPU)


def test_environment_variables_name_the_default_directories_and_help_says_so(monkeypatch):
    def directories(*argv):
        parser = argparse.ArgumentParser()
        add_settings(parser)
        add_data_flags(parser)
        args = parser.parse_args(argv)
        return args.results_dir, args.data_dir, parser.format_help()

    for variable in ("RNORM_RESULTS", "RNORM_DATA"):
        monkeypatch.setenv(variable, "")
    assert directories()[:2] == (Path("results"), Path("data"))
    monkeypatch.setenv("RNORM_RESULTS", "/scratch/results")
    monkeypatch.setenv("RNORM_DATA", "/scratch/data")
    results, data, help = directories()
    assert (results, data) == (Path("/scratch/results"), Path("/scratch/data"))
    assert "RNORM_RESULTS" in help and "RNORM_DATA" in help
    assert directories("--data_dir", "here", "--results_dir", "there")[:2] == (Path("there"), Path("here"))
