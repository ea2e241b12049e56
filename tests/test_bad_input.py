"""Bad input ends in one line on stderr that names cause and remedy, in exit status 2, and in nothing on disk.

The causes themselves are tested with the modules that find them: test_runs.py, test_data.py, test_conversions.py.
"""

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from conftest import make_arrays
from small_study import SCRIPTS

from rnorm.cli import finish
from rnorm.runs import Member, Settings


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Call a script as a process would be, in an empty directory: (exit status, its one line on stderr)."""

    def call(script: str, *arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        network = ["--network", "small"] if script == "experiments.py" and "--network" not in arguments else []
        with pytest.raises(SystemExit) as exit:
            finish(SCRIPTS[script], [script, *map(str, arguments), *network])
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
        ("--cnn_lr nan", "--cnn_lr nan: has to be positive"),
        ("--lcn_lr -0.1", "--lc_lr -0.1: has to be positive"),
        ("--epochs 3 --splits 4", "--splits 4: have to lie between 0 and 3"),
        ("--splits", "--splits: expected at least one argument"),
        ("--epochs 1.5", "invalid int value: '1.5'; see --help"),
        ("--data_size 61", "data_size 61: there are only 60 training images; use 0 for all"),
        ("--network tiny", "tiny: no such network in models.py; there are skinnyprime, alexnetprime, small"),
        ("--convert_to fcn", "--convert_to fcn: no such conversion; there are lc, tied, cnn"),
        ("--convert_to lc tied lc2", "--convert_to layer 2 is no convolution; those are 1 5"),
        ("--convert_to", "--convert_to: expected at least one argument"),
        ("--exec 2", "invalid choice: 2"),
        ("--keep none", "invalid choice: 'none'"),
        ("--device tpu", "invalid choice: 'tpu'"),
        ("--epoch 3", "unrecognized arguments"),
        ("--fres", "unrecognized arguments: --fres"),
        ("nonsense", "unrecognized arguments: nonsense"),
    ],
)
def test_flags_that_make_no_sense(call, npz, flags, cause):
    status, line = call("experiments.py", "--dataset", npz, *flags.split())
    assert status == 2 and line.startswith("experiments.py: ") and cause in line
    assert no_run_made()


def test_cuda_without_cuda(call, npz):
    status, line = call("experiments.py", "--dataset", npz, "--device", "cuda")
    assert status == 1 and line.startswith("experiments.py: ") and "hides every GPU" in line and no_run_made()


def test_no_network_and_no_cifar10(call, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    status, line = call("experiments.py", "--data_dir", "nowhere")
    assert status == 2 and no_run_made()
    assert all(remedy in line for remedy in ("--data_dir", "--dataset FILE.npz", "--dataset synthetic"))
    archive = Path("data/cifar-10-python.tar.gz")
    archive.parent.mkdir()
    archive.write_bytes(b"truncated")
    status, line = call("experiments.py")
    assert status == 2 and f"delete {archive}" in line and no_run_made()


@pytest.mark.parametrize("exec", [0, 1])
def test_data_that_are_not_there_or_not_what_they_should_be(call, exec):
    status, line = call("experiments.py", "--dataset", "a\nb.npz", "--exec", exec)
    assert status == 2 and "--dataset FILE.npz" in line and line.count("\n") == 1 and no_run_made()
    np.savez("bad.npz", **make_arrays(classes=2))
    status, line = call("experiments.py", "--dataset", "bad.npz", "--exec", exec)
    assert status == 2 and "bad.npz: y_train has to hold the labels" in line and no_run_made()


def test_more_images_than_cifar10_has(call):
    status, line = call("experiments.py", "--data_size", 60000, "--exec", 0)
    assert status == 2 and "there are only 50000 training images" in line


def test_a_directory_in_place_of_the_run_that_is_none(call, npz):
    run = Path("results") / Settings(epochs=1, network="small", dataset="tiny").run_name
    run.mkdir(parents=True)
    (run / "thesis.txt").write_text("not to be lost")
    for fresh in ((), ("--fresh",)):
        status, line = call("experiments.py", "--dataset", npz, "--epochs", 1, *fresh)
        assert status == 2 and "move it away" in line
    assert [p.name for p in run.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("config", [None, "", "{}", '{"settings": {"seed": ""}}'])
def test_convert_on_what_is_no_run(call, config):
    run = Path("run")
    run.mkdir()
    if config is not None:
        (run / "config.json").write_text(config)
    status, line = call("convert.py", run)
    assert status == 2 and "run" in line and sum(1 for _ in run.iterdir()) == (config is not None)
    for no_run in ("missing", "run/config.json", "x" * 300):
        assert call("convert.py", no_run)[0] == 2


def test_convert_what_the_run_has_not_or_not_yet(call, npz):
    assert call("experiments.py", "--dataset", npz, "--epochs", 2, "--n_splits", 2, "--cnn_only")[0] == 0
    run = next(Path("results").iterdir())
    for flags, cause in (
        (("--split", 7), "--split 7: the run's splits are 1 2"),
        (("--convert_to", "x"), "--convert_to x: no such conversion"),
    ):
        status, line = call("convert.py", run, *flags)
        assert status == 2 and cause in line
    Member(Settings(network="small")).checkpoint(run, 2).unlink()
    Member(Settings(network="small")).history(run).unlink()
    status, line = call("convert.py", run, "--split", 2)
    assert status == 2 and "train the CNN that far first" in line and not list(run.glob("*_version_*"))


@pytest.mark.parametrize("results", ["a_file", "a_file/below", "x" * 300])
def test_results_that_cannot_be_written(call, npz, results):
    Path("a_file").write_text("")
    for exec in (0, 1):
        status, line = call("experiments.py", "--dataset", npz, "--exec", exec, "--results_dir", results)
        assert status == 2 and "cannot be written" in line and "--results_dir" in line and no_run_made()


def test_so_many_splits_that_the_name_is_too_long(call, npz):
    status, line = call("experiments.py", "--dataset", npz, "--splits", *range(1, 151))
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


@pytest.mark.parametrize("script, argument", [("experiments.py", "--cnn_lr=nan"), ("convert.py", "missing")])
def test_a_process_ends_the_same_way(tmp_path, script, argument):
    """Once as a process, for the script's own last lines."""
    argv = [sys.executable, Path(__file__).parents[1] / script, argument]
    process = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == "" and not list(tmp_path.iterdir())
    assert process.stderr.startswith(f"{script}: ") and process.stderr.count("\n") == 1
