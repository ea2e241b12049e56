"""Bad input ends in one line on stderr that names cause and remedy, in exit status 2, and in nothing on disk."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_arrays
from small_study import SCRIPTS, small_cnn

from data import load_data
from cli import Interrupt, Stop, finish
from runs import Settings, checkpoint_path


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Call a script as a process would be, in an empty directory: (exit status, its one line on stderr)."""

    def call(script: str, *arguments: object) -> tuple[int, str]:
        main = SCRIPTS[script]
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            argv = [script, *map(str, arguments)]
            finish(lambda argv, interrupt: main(argv, interrupt, small_cnn), argv, Interrupt())
        err = capsys.readouterr().err
        assert err.count("\n") <= 1 and "Traceback" not in err, err
        return exit.value.code, err

    monkeypatch.chdir(tmp_path)
    return call


def no_run_made() -> bool:
    return not any(Path().rglob("config.json")) and not any(Path().rglob("epochs=*"))


@pytest.mark.parametrize(
    "flags, cause",
    [
        ("--epochs 0", "--epochs 0: has to be between 1 and"),
        ("--epochs -3", "--epochs -3"),
        ("--epochs 1.5", "invalid int value: '1.5'; see --help"),
        ("--epochs 10000000", "--epochs 10000000: has to be between"),
        ("--n_splits 0", "--n_splits 0"),
        ("--data_size -1", "--data_size -1"),
        ("--data_size 61", "--data_size 61: there are only 60 training images; use 0 for all"),
        ("--batch_size 0", "--batch_size 0"),
        ("--lc_epochs -1", "--lc_epochs -1"),
        ("--seed -1", "--seed -1"),
        ("--cnn_lr 0", "--cnn_lr 0.0: has to be positive"),
        ("--cnn_lr nan", "--cnn_lr nan"),
        ("--lc_lr inf", "--lc_lr inf"),
        ("--lcn_lr -0.1", "--lc_lr -0.1"),
        ("--lc_lr 1e39", "--lc_lr 1e+39"),
        ("--epochs 3 --splits 4", "--splits 4: have to lie between 0 and --epochs 3"),
        ("--splits -1", "--splits -1"),
        ("--splits", "--splits: expected at least one argument"),
        ("--exec 2", "invalid choice: 2"),
        ("--keep none", "invalid choice: 'none'"),
        ("--device tpu", "invalid choice: 'tpu'"),
        ("--epoch 3", "unrecognized arguments"),
        ("nonsense", "unrecognized arguments: nonsense"),
    ],
)
def test_flags_that_make_no_sense(call, npz, flags, cause):
    status, line = call("experiments.py", "--dataset", npz, *flags.split())
    assert status == 2 and line.startswith("experiments.py: ") and cause in line
    assert no_run_made()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_without_cuda(call, npz):
    status, line = call("experiments.py", "--dataset", npz, "--device", "cuda")
    assert status == 2 and "use --device cpu" in line and no_run_made()


def test_no_network_and_no_cifar10(call, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    status, line = call("experiments.py", "--data_dir", "nowhere")
    assert status == 2 and no_run_made()
    assert all(remedy in line for remedy in ("--data_dir", "--dataset FILE.npz", "--dataset synthetic"))


def test_a_corrupt_cifar10_archive(call, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    archive = Path("data/cifar-10-python.tar.gz")
    archive.parent.mkdir()
    archive.write_bytes(b"truncated")
    status, line = call("experiments.py")
    assert status == 2 and f"delete {archive}" in line and no_run_made()


BAD_ARRAYS = {
    "no_y_test": ({"y_test": None}, "lacks y_test"),
    "float_images": ({"x_train": np.zeros((60, 32, 32, 3), np.float32)}, "x_train is float32"),
    "channels_first": ({"x_train": np.zeros((60, 3, 32, 32), np.uint8)}, "has to be uint8 (N, 32, 32, 3)"),
    "no_images": ({"x_test": np.zeros((0, 32, 32, 3), np.uint8)}, "N > 0"),
    "scalar": ({"x_test": np.uint8(3)}, "x_test is uint8 ()"),
    "labels_too_few": ({"y_train": np.arange(59) % 3}, "y_train is int64 (59,)"),
    "labels_in_a_column": ({"y_train": np.arange(60)[:, None] % 3}, "(60, 1)"),
    "float_labels": ({"y_train": np.arange(60) % 3 * 1.0}, "y_train is float64"),
    "dates_for_labels": ({"y_train": (np.arange(60) % 3).astype("m8[s]")}, "has to be integers"),
    "labels_from_1": ({"y_train": np.arange(60) % 3 + 1}, "have to be 0, 1, ..., c-1"),
    "two_classes": ({"y_train": np.arange(60) % 2}, "c at least 3"),
    "a_class_without_images": ({"y_train": np.arange(60) % 3 * 2}, "each of them"),
    "huge_labels": ({"y_train": np.full(60, 2**64 - 1, np.uint64)}, "have to be 0, 1"),
    "unknown_test_label": ({"y_test": np.full(30, 3)}, "y_test has labels outside 0 to 2"),
    "negative_test_label": ({"y_test": np.full(30, -1)}, "y_test has labels outside"),
    "objects": ({"y_train": np.array([None] * 60)}, "cannot be read"),
}


@pytest.mark.parametrize("exec", [0, 1])
@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_an_npz_with_wrong_arrays(call, name, exec):
    changes, cause = BAD_ARRAYS[name]
    np.savez("bad.npz", **{k: v for k, v in (make_arrays() | changes).items() if v is not None})
    status, line = call("experiments.py", "--dataset", "bad.npz", "--exec", exec)
    assert status == 2 and "bad.npz" in line and cause in line and no_run_made()


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + bytes(18)])
def test_an_npz_that_is_none(call, content):
    Path("bad.npz").write_bytes(content)
    status, line = call("experiments.py", "--dataset", "bad.npz")
    assert status == 2 and "bad.npz" in line and no_run_made()


@pytest.mark.parametrize("dataset", ["cifar1000", "missing.npz", "", ".", "a\nb.npz", "\udcff.npz", f"{'x' * 300}.npz"])
@pytest.mark.parametrize("exec", [0, 1])
def test_a_dataset_that_does_not_exist(call, dataset, exec):
    status, line = call("experiments.py", "--dataset", dataset, "--exec", exec)
    assert status == 2 and line.count("\n") == 1 and no_run_made()


def test_more_images_than_cifar10_has(call):
    status, line = call("experiments.py", "--data_size", 60000, "--exec", 0)
    assert status == 2 and "there are only 50000 training images" in line


def test_a_directory_in_place_of_the_run_that_is_none(call, npz):
    run = Path("results") / Settings(epochs=1, dataset="tiny").run_name
    run.mkdir(parents=True)
    (run / "thesis.txt").write_text("not to be lost")
    for fresh in ((), ("--fresh",)):
        status, line = call("experiments.py", "--dataset", npz, "--epochs", 1, *fresh)
        assert status == 2 and "move it away" in line
    assert [p.name for p in run.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("config", [None, "", "{}", "[]", '{"settings": 3}', '{"settings": {"seed": ""}}', "[" * 9999])
def test_convert_on_what_is_no_run(call, config):
    run = Path("run")
    run.mkdir()
    if config is not None:
        (run / "config.json").write_text(config)
    status, line = call("convert.py", run)
    assert status == 2 and "run" in line and sum(1 for _ in run.iterdir()) == (config is not None)
    for no_run in ("missing", "run/config.json", "x" * 300):
        assert call("convert.py", no_run)[0] == 2


def test_convert_with_a_split_that_is_none_or_not_trained_yet(call, npz):
    assert call("experiments.py", "--dataset", npz, "--epochs", 2, "--n_splits", 2, "--cnn_only")[0] == 0
    run = next(Path("results").iterdir())
    status, line = call("convert.py", run, "--split", 7)
    assert status == 2 and "--split 7: the run's splits are 1 2" in line
    checkpoint_path(run, None, 2).unlink()
    status, line = call("convert.py", run, "--split", 2)
    assert status == 2 and "train the CNN that far first" in line


def test_convert_reads_no_setting_of_the_wrong_type(call, npz):
    assert call("experiments.py", "--dataset", npz, "--epochs", 1, "--cnn_only")[0] == 0
    path = next(Path("results").iterdir()) / "config.json"
    config = json.loads(path.read_text())
    del config["crc32"]
    for change in ({"settings": config["settings"] | {"splits": [0.5]}}, {"dataset_file": 5}, {"settings": {"x": 1}}):
        path.write_text(json.dumps(config | change))
        status, line = call("convert.py", path.parent)
        assert status == 2 and "config.json is damaged" in line


@pytest.mark.parametrize("results", ["a_file", "a_file/below", "x" * 300])
def test_results_that_cannot_be_written(call, npz, results):
    Path("a_file").write_text("")
    for exec in (0, 1):
        status, line = call("experiments.py", "--dataset", npz, "--exec", exec, "--results_dir", results)
        assert status == 2 and "cannot be written" in line and "--results_dir" in line and no_run_made()


def test_so_many_splits_that_the_name_is_too_long(call, npz):
    splits = range(1, 151)
    status, line = call("experiments.py", "--dataset", npz, "--splits", *splits)
    assert status == 2 and "File name too long" in line and no_run_made()


def test_too_little_disk_space(call, npz, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    status, line = call("experiments.py", "--dataset", npz)
    assert status == 1 and "use --keep last, or name another --results_dir" in line and no_run_made()
    assert call("experiments.py", "--dataset", npz, "--exec", 0)[0] == 0  # the plan tells


def test_names_that_are_no_valid_text_are_printed(call, npz):
    status, line = call("experiments.py", "--dataset", npz, "--results_dir", "\udcff", "--exec", 0)
    assert status == 0 and line == ""


def test_an_npz_of_other_layouts_means_the_same(tmp_path):
    """Big-endian, unsigned or Fortran-ordered arrays are good input."""
    arrays = make_arrays()
    np.savez(tmp_path / "a.npz", **arrays)
    other = {k: np.asfortranarray(v) if k[0] == "x" else v.astype(">u2") for k, v in arrays.items()}
    np.savez(tmp_path / "b.npz", **other)
    a, b = (load_data(str(tmp_path / name), tmp_path, 0, torch.device("cpu")) for name in ("a.npz", "b.npz"))
    assert a.sha256 == b.sha256 and torch.equal(a.x_train, b.x_train) and torch.equal(a.y_test, b.y_test)


def test_a_process_ends_the_same_way(npz, tmp_path):
    """Once as a process, for the script's own last lines."""
    script = Path(__file__).parents[1] / "experiments.py"
    argv = [sys.executable, script, "--dataset", npz, "--cnn_lr", "nan", "--results_dir", tmp_path / "results"]
    process = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert process.returncode == 2 and process.stdout == "" and not (tmp_path / "results").exists()
    assert process.stderr.startswith("experiments.py: --cnn_lr nan") and process.stderr.count("\n") == 1


def test_a_stop_of_several_lines_is_printed_as_one(capsys):
    def main(argv, interrupt):
        raise Stop("a\nb")

    with pytest.raises(SystemExit):
        finish(main, ["experiments.py"], Interrupt())
    assert capsys.readouterr().err == "experiments.py: a b\n"
