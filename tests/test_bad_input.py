"""Bad input ends in one line on stderr that names cause and remedy, in its exit status, and in nothing on disk.

What is wrong inside files is tested with the modules that read them: test_data.py, test_runs.py, test_fuzz.py.
"""

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from compare_runs import states
from small_study import SCRIPTS
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "results"))

import interpolate
import plot
import publish
import tables
from models import NETWORKS
from rnorm.cli import finish
from rnorm.runs import Settings

MAINS = SCRIPTS | {"plot.py": plot.main, "interpolate.py": interpolate.main}
MAINS |= {"tables.py": tables.main, "publish.py": publish.main}
TAKE_RUNS = ("convert.py", "plot.py", "tables.py", "publish.py")
NO_RUNS = ("empty", "missing", "tiny.npz", "x" * 300)
ENDS = "run/small_3.pyT run/small_lc_version_3/small_lc_version_3.pyT"
OTHER_DIR = "name another --results_dir"

REFUSALS = [  # command, exit status, words in the line
    ("experiments.py nonsense", 2, "unrecognized arguments: nonsense; see --help"),
    ("experiments.py --epoch 3", 2, "unrecognized arguments: --epoch 3"),  # no abbreviations
    ("experiments.py --epochs 0", 2, "--epochs 0: has to be between 1 and"),
    ("experiments.py --epochs 1.5", 2, "invalid int value: '1.5'; see --help"),
    ("experiments.py --lcn_lr -0.1", 2, "--lc_lr -0.1: has to be between"),
    ("experiments.py --cnn_lr=nan", 2, "--cnn_lr nan: has to be between"),
    ("experiments.py --precision float16", 2, "invalid choice: 'float16'"),
    ("experiments.py --epochs 3 --splits 4", 2, "--splits 4: have to lie between 0 and 3"),
    ("experiments.py --splits", 2, "--splits: expected at least one argument"),
    (f"experiments.py --splits {' '.join(map(str, range(1, 151)))}", 2, "give fewer --splits"),
    ("experiments.py --data_size 61", 2, "data_size 61: there are only 60 training images; use 0 for all"),
    ("experiments.py --dataset cifar10 --data_size 60000 --exec 0", 2, "there are only 50000 training images"),
    ("experiments.py --dataset a\nb.npz", 2, "a b.npz is neither a data set"),
    ("experiments.py --dataset \x1b[2J.npz --exec 0", 2, "\\x1b[2J.npz is neither a data set"),
    ("experiments.py --dataset cifar10 --data_dir nowhere", 2, "--data_dir, or another --dataset, such as synthetic"),
    ("experiments.py --dataset cifar10 --data_dir damaged", 2, "delete damaged/cifar-10-python.tar.gz"),
    ("experiments.py --network tiny", 2, "tiny: no such network in models.py; there are skinnyprime, "),
    ("experiments.py --convert_to=", 2, "no such conversion"),
    ("experiments.py --convert_to lc tied lc2", 2, "--convert_to lc2: layer 2 is no convolution; those are 1 5"),
    ("experiments.py --results_dir tiny.npz --exec 0", 2, f"tiny.npz is not a directory); {OTHER_DIR}"),
    ("experiments.py --results_dir tiny.npz/below", 2, f"tiny.npz is not a directory); {OTHER_DIR}"),
    (f"experiments.py --results_dir {'x' * 300}", 2, "File name too long"),
    ("experiments.py --epochs 2 --results_dir thesis", 2, f"move it away, or {OTHER_DIR}"),
    ("experiments.py --device cuda", 1, "CUDA_VISIBLE_DEVICES=''"),
    *[(f"{script} {path}", 2, path) for script in TAKE_RUNS for path in NO_RUNS],
    ("convert.py run --split 7", 2, "--split 7: the run's splits are 1 3"),
    ("convert.py run --convert_to x", 2, "--convert_to x: no such conversion"),
    ("convert.py unfinished --split 3", 2, "train the CNN that far first"),
    ("plot.py", 2, "name runs to plot"),
    ("plot.py run --panels accuracy", 2, "--panels accuracy is not recorded; there are train_loss"),
    ("plot.py run --margin other", 2, "--margin"),
    ("plot.py run --out figure.txt", 2, "its name has to end in"),
    ("plot.py run --out missing/figure.png", 2, "cannot be written"),
    ("plot.py --margins run/small_77.pyT", 2, "small_77.pyT is no file"),
    ("interpolate.py run/small_3.pyT run/small_77.pyT", 2, "small_77.pyT is no file"),
    (f"interpolate.py {ENDS} --points 1", 2, "--points 1: has to be between 2"),
    (f"interpolate.py {ENDS} --method bezier", 2, "invalid choice: 'bezier'"),
    (f"interpolate.py {ENDS} --stiffness nan", 2, "--stiffness nan: has to be between 0 and 0.5"),
    (f"interpolate.py {ENDS} --out /dev/null/there", 2, "name another --out"),
    ("publish.py run empty", 2, "empty is not a run"),
]


@pytest.fixture
def call(capsys, npz, undisturbed, monkeypatch):
    """Call a script where a data set and runs lie: (exit status, its one line on stderr); it must write nothing."""

    def call(command: str) -> tuple[int, str]:
        capsys.readouterr()
        script, *arguments = filter(None, command.split(" "))
        if script == "experiments.py":  # of a flag the last counts
            arguments = ["--dataset", "tiny.npz", "--network", "small", *arguments]
        before = {*Path().rglob("*")}, states(Path())
        with pytest.raises(SystemExit) as exit:
            finish(MAINS[script], [script, *arguments])
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith(f"{script}: ") and "Traceback" not in err, err
        assert ({*Path().rglob("*")}, states(Path())) == before
        return exit.value.code, err

    monkeypatch.chdir(npz.parent)
    monkeypatch.setattr(publish, "PUBLISHED", Path("published"))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody answers
    for name in ("results", "empty", "nowhere", "damaged"):
        Path(name).mkdir()
    Path("damaged/cifar-10-python.tar.gz").write_bytes(b"truncated")
    for directory in ("nowhere", "damaged"):
        Path(directory, ".lock").touch()
    thesis = Path("thesis", Settings(epochs=2, network="small", dataset="tiny").run_name)
    thesis.mkdir(parents=True)
    (thesis / "thesis.txt").write_text("not to be lost")
    for name in ("run", "unfinished"):
        shutil.copytree(undisturbed, name)
    for name in ("small_3.pyT", "evaluation-history.hist"):
        Path("unfinished", name).unlink()
    return call


@pytest.mark.parametrize("command, status, words", REFUSALS)
def test_bad_input_is_one_line_and_changes_nothing(call, command, status, words):
    code, line = call(command)
    assert code == status and words in line


def test_a_network_that_cannot_be_measured(call, monkeypatch):
    layers = (nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 3))
    monkeypatch.setitem(NETWORKS, "mine", lambda num_classes: nn.Sequential(*layers))
    for flags in ("--cnn_only", "--convert_to cnn", "--convert_to tied", "--convert_to lc", "--cnn_only --exec 0"):
        status, line = call(f"experiments.py --network mine {flags}")
        assert status == 2 and "mine: layer 1 is BatchNorm2d; norms of weights mean nothing where" in line


def test_a_network_that_cannot_be_untied_is_refused_only_where_it_would_be(call, monkeypatch):
    circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    layers = (nn.Conv2d(3, 4, 4, 4), circular, nn.Conv2d(4, 4, 3, groups=2), nn.Flatten())
    monkeypatch.setitem(NETWORKS, "mine", lambda num_classes: nn.Sequential(*layers, nn.Linear(144, num_classes)))
    for conversion, layer in (("lc", 1), ("fc", 1), ("lc0+2", 2)):
        status, line = call(f"experiments.py --network mine --epochs 1 --convert_to {conversion}")
        assert status == 2 and f"--convert_to {conversion}: layer {layer} cannot be untied: Conv2d" in line
    for flags in ("--cnn_only", "--convert_to lc0 tied cnn"):
        words = ["--dataset", "tiny.npz", "--network", "mine", "--epochs", "1", *flags.split()]
        assert SCRIPTS["experiments.py"](words) == 0


def test_a_full_disk_is_refused_before_anything_is_written_but_not_by_the_plan(call, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    status, line = call("experiments.py")
    assert status == 1 and "use --keep last, or name another --results_dir" in line
    plan = ["--dataset", "tiny.npz", "--network", "small", "--exec", "0", "--results_dir", "\udcff"]
    assert SCRIPTS["experiments.py"](plan) == 0


@pytest.mark.parametrize("script, argument", [
    ("experiments.py", "--cnn_lr=nan"), ("convert.py", "missing"), ("plot.py", "missing"), ("interpolate.py", "--x"),
    ("results/tables.py", "missing"), ("results/publish.py", "missing"),
])  # fmt: skip
def test_a_process_ends_the_same_way(tmp_path, script, argument):
    """Once as a process, for the script's own last lines."""
    argv = [sys.executable, Path(__file__).parents[1] / script, argument]
    process = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == "" and not list(tmp_path.iterdir())
    assert process.stderr.startswith(f"{Path(script).name}: ") and process.stderr.count("\n") == 1
