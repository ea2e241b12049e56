"""Bad input ends in one line on stderr that names cause and remedy, in exit status 2, and in nothing on disk.

The causes themselves are tested with the modules that find them: test_runs.py, test_data.py, test_conversions.py.
"""

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from small_study import SCRIPTS
from torch import nn

from models import NETWORKS, ConvNet
from rnorm.cli import finish
from rnorm.files import files_below
from rnorm.runs import Member, Settings


@pytest.fixture
def call(capsys, npz, monkeypatch):
    """Call a script as a process would be, where a data set lies: (exit status, its one line on stderr)."""

    def call(command: str) -> tuple[int, str]:
        capsys.readouterr()
        script, *arguments = filter(None, command.split(" "))
        if script == "experiments.py":
            arguments = ["--dataset", "tiny.npz", "--network", "small", *arguments]  # the last of a flag counts
        with pytest.raises(SystemExit) as exit:
            finish(SCRIPTS[script], [script, *arguments])
        err = capsys.readouterr().err
        assert err.count("\n") <= 1 and "Traceback" not in err, err
        return exit.value.code, err

    monkeypatch.chdir(npz.parent)
    return call


def no_run_made() -> bool:
    return not any(Path().rglob("config.json")) and not any(Path().rglob("epochs=*"))


@pytest.mark.parametrize(
    "flags, cause",
    [
        ("--epochs 0", "--epochs 0: has to be between 1 and"),
        ("--lcn_lr -0.1", "--lc_lr -0.1: has to be between"),
        ("--epochs 3 --splits 4", "--splits 4: have to lie between 0 and 3"),
        ("--splits", "--splits: expected at least one argument"),
        (f"--splits {' '.join(map(str, range(1, 151)))}", "File name too long"),
        ("--epochs 1.5", "invalid int value: '1.5'; see --help"),
        ("--precision float16", "invalid choice: 'float16'"),
        ("--data_size 61", "data_size 61: there are only 60 training images; use 0 for all"),
        ("--dataset cifar10 --data_size 60000 --exec 0", "there are only 50000 training images"),
        ("--dataset a\nb.npz", "a b.npz is neither a data set"),
        ("--dataset a\nb.npz --exec 0", "another --dataset"),
        ("--network tiny", "tiny: no such network in models.py; there are skinnyprime, "),
        ("--convert_to=", "no such conversion"),
        ("--convert_to lc tied lc2", "--convert_to layer 2 is no convolution; those are 1 5"),
        ("--results_dir tiny.npz --exec 0", "tiny.npz is not a directory); name another --results_dir"),
        ("--results_dir tiny.npz/below", "tiny.npz is not a directory); name another --results_dir"),
        (f"--results_dir {'x' * 300}", "cannot be written (File name too long); name another --results_dir"),
        ("--fres", "unrecognized arguments: --fres"),
        ("nonsense", "unrecognized arguments: nonsense"),
    ],
)
def test_flags_that_make_no_sense(call, flags, cause):
    status, line = call(f"experiments.py {flags}")
    assert status == 2 and line.startswith("experiments.py: ") and cause in line and no_run_made()


def test_a_network_that_cannot_be_measured(call, monkeypatch):
    layers = (nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 3))
    monkeypatch.setitem(NETWORKS, "mine", lambda num_classes: ConvNet(*layers))
    for flags in ("--cnn_only", "--convert_to cnn", "--convert_to tied", "--convert_to lc", "--cnn_only --exec 0"):
        status, line = call(f"experiments.py --network mine {flags}")
        assert status == 2 and "mine: layer 1 is BatchNorm2d; a network here is" in line and no_run_made()


def test_a_network_that_cannot_be_untied_is_refused_only_where_it_would_be(call, monkeypatch):
    layers = (nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten())
    monkeypatch.setitem(NETWORKS, "mine", lambda num_classes: ConvNet(*layers, nn.Linear(144, num_classes)))
    for conversion, layer in (("lc", 1), ("fc", 1), ("lc0+2", 2)):
        status, line = call(f"experiments.py --network mine --epochs 1 --convert_to {conversion}")
        assert status == 2 and f"--convert_to layer {layer} cannot be untied: Conv2d" in line and no_run_made()
    for flags in ("--cnn_only", "--convert_to lc0 tied cnn"):
        assert call(f"experiments.py --network mine --epochs 1 {flags}") == (0, "")


def test_no_network_and_no_cifar10(call, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    status, line = call("experiments.py --dataset cifar10 --data_dir nowhere")
    assert status == 2 and "--data_dir, or another --dataset, such as synthetic" in line and no_run_made()
    archive = Path("data/cifar-10-python.tar.gz")
    archive.parent.mkdir()
    archive.write_bytes(b"truncated")
    status, line = call("experiments.py --dataset cifar10")
    assert status == 2 and f"delete {archive}" in line and no_run_made()


def test_a_directory_in_place_of_the_run_that_is_none(call):
    run = Path("results") / Settings(epochs=1, network="small", dataset="tiny").run_name
    run.mkdir(parents=True)
    (run / "thesis.txt").write_text("not to be lost")
    for fresh in ("", "--fresh"):
        status, line = call(f"experiments.py --epochs 1 {fresh}")
        assert status == 2 and "move it away" in line
    assert [p.name for p in run.iterdir()] == ["thesis.txt"]


def test_convert_on_what_is_no_run(call):
    Path("run").mkdir()
    before = files_below(Path())
    for no_run in ("run", "missing", "tiny.npz", "x" * 300):
        status, line = call(f"convert.py {no_run}")
        assert status == 2 and no_run in line and files_below(Path()) == before


def test_convert_what_the_run_has_not_or_not_yet(call):
    assert call("experiments.py --epochs 2 --n_splits 2 --cnn_only")[0] == 0
    run = next(Path("results").iterdir())
    cnn = Member(run, Settings(network="small"))
    cnn.checkpoint(2).unlink()
    cnn.history_file.unlink()
    before = files_below(run)
    for flags, cause in (
        ("--split 7", "--split 7: the run's splits are 1 2"),
        ("--convert_to x", "--convert_to x: no such conversion"),
        ("--split 2", "train the CNN that far first"),
    ):
        status, line = call(f"convert.py {run} {flags}")
        assert status == 2 and cause in line and files_below(run) == before
    assert not list(run.glob("*_version_*"))


def test_a_machine_without_gpu_or_disk_space(call, monkeypatch):
    status, line = call("experiments.py --device cuda")
    assert status == 1 and "CUDA_VISIBLE_DEVICES=''" in line and no_run_made()
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    status, line = call("experiments.py")
    assert status == 1 and "use --keep last, or name another --results_dir" in line and no_run_made()
    assert call("experiments.py --exec 0 --results_dir \udcff") == (0, "")  # the plan tells, of any name


@pytest.mark.parametrize("script, argument", [("experiments.py", "--cnn_lr=nan"), ("convert.py", "missing")])
def test_a_process_ends_the_same_way(tmp_path, script, argument):
    """Once as a process, for the script's own last lines."""
    argv = [sys.executable, Path(__file__).parents[1] / script, argument]
    process = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == "" and not list(tmp_path.iterdir())
    assert process.stderr.startswith(f"{script}: ") and process.stderr.count("\n") == 1
