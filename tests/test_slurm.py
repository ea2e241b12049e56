"""job.sh and run_all.sh, on a real Slurm where there is one: tests/start_slurm.sh starts it. All in a copy of the
repository that knows the tests' small network."""

import contextlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from compare_runs import differences
from conftest import make_arrays
from small_study import small_cnn

from rnorm import cli
from rnorm.signals import SIGNALS

SAVED = SIGNALS[signal.SIGUSR1]
ROOT = Path(__file__).parents[1]
FLAGS = ("--network", "small", "--dataset", "tiny.npz", "--batch_size", "50")
CPU = (*FLAGS, "--device", "cpu")  # the test Slurm's GPUs are fake
OURS = ("CNN_LR", "LC_LR", "SEED", "EPOCHS", "N_SPLITS", "SLURM_", "SBATCH_", "VIRTUAL_ENV", "CONDA_")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}


def call(*command: object, cwd: Path = ROOT, status: int | None = 0, **variables: object) -> str:
    """Run a command that has to end with `status`, None being any; returns its stdout and stderr."""
    words, env = [str(word) for word in command], ENVIRONMENT | {name: str(v) for name, v in variables.items()}
    done = subprocess.run(words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert status in (None, done.returncode), done.stdout
    return done.stdout


def wait_until(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository, with a small network, a small data set, and this Python by way of job.env."""
    clone = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh")]:
        shutil.copy(path, clone)
    shutil.copytree(ROOT / "rnorm", clone / "rnorm")
    (clone / "logs").mkdir()
    with open(clone / "models.py", "a") as file:
        file.write(f"\n\n{inspect.getsource(small_cnn)}\n\nNETWORKS['small'] = small_cnn\n")
    np.savez(clone / "tiny.npz", **make_arrays(500, 100))
    path = f"export PATH={Path(sys.executable).parent}:$PATH OMP_NUM_THREADS=1\n"
    (clone / "job.env").write_text(path + 'echo "job.env: GPU ${CUDA_VISIBLE_DEVICES:-none}"\n')
    return clone


@pytest.fixture
def fake(tmp_path):
    """Makes a command out of lines of shell, beside a copy of the two scripts; returns the PATH that begins there."""
    for name in ("job.sh", "run_all.sh", "experiments.py"):
        shutil.copy(ROOT / name, tmp_path)

    def make(name: str, lines: str) -> str:
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
        return f"{tmp_path}:{os.environ['PATH']}"

    return make


@pytest.fixture
def no_slurm(tmp_path):
    """A PATH on which there is no sbatch."""
    for tool in ("bash", "dirname", "realpath", "sed", "date", "hostname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    return str(tmp_path)


@pytest.fixture(scope="module")
def slurm(clone):
    """Skips where there is no Slurm to play with."""
    facts = call("timeout", 20, "sh", "-c", "scontrol show config; sinfo --noheader --format=%T", status=None)
    if not re.search(r"^ClusterName\s*= test$", facts, re.M) or not re.search("^(idle|mixed|allocated)$", facts, re.M):
        pytest.skip("no Slurm that is a test's (ClusterName=test) and takes jobs; tests/start_slurm.sh starts one")
    yield
    for line in call("squeue", "--noheader", "--format=%F %Z").splitlines():
        if line.endswith(f" {clone}"):  # of a test that failed
            call("scancel", line.split()[0], status=None)


@pytest.mark.parametrize("command", [
    "./run_all.sh 0.1", "./run_all.sh --dry-run yes", "./run_all.sh --dataset missing.npz", "SEED='0 -1' ./run_all.sh",
    "./job.sh 0.1 0.01 2 1 5", "./job.sh --epochs 2", "./job.sh 0.1 0",
])  # fmt: skip
def test_bad_arguments_are_refused_before_anything_is_submitted(clone, tmp_path, fake, command):
    path = fake("sbatch", f"touch {tmp_path}/submitted")
    assert "Traceback" not in call("bash", "-c", command, cwd=clone, status=cli.BAD_INPUT, PATH=path)
    assert not (tmp_path / "submitted").exists()


def plan(run: str, complete: bool = False, seconds: int | None = None) -> str:
    """Lines of shell that print what `experiments.py --exec 0` does."""
    facts = {"run": run, "state": "complete" if complete else "incomplete", "bytes": 9_700_000_000, "seconds": seconds}
    return f"cat <<'END'\nstate: 1 of 4 networks\nplan: {json.dumps(facts)}\nEND"


def test_the_grid_is_printed_or_submitted_without_what_is_complete(tmp_path, fake):
    fake("sbatch", f'echo "$@" >> {tmp_path}/submitted')
    path = fake("python", f'case "$*" in *"lr 0.05"*) {plan("r/a", True)}\n;; *) {plan("my r/a b")}\n;; esac')
    variables = {"cwd": tmp_path, "PATH": path, "SEED": "0 7"}
    text = call("./run_all.sh", "--dry-run", "--", "--splits", 3, **variables)
    assert text.count("r/a: complete\n") == 4 and text.count("my r/a b: incomplete, 9.70 GB\n") == 4
    start = "--job-name=a\\ b --dependency=singleton job.sh 0.1"
    jobs = re.findall("^sbatch (.*) $", text, re.M)
    assert jobs == [f"{start} {lr} 150 20 -- --seed {seed} --splits 3" for lr in (0.01, 0.005) for seed in (0, 7)]
    assert not (tmp_path / "submitted").exists()
    call("./run_all.sh", "--splits", 3, **variables)
    assert (tmp_path / "submitted").read_text().splitlines() == [line.replace("\\", "") for line in jobs]


@pytest.mark.parametrize("name", ['a", "state": "complete", "bytes": 0, "b', "$(exit 9)", "ü 'x' \\ *", "=x y-"])
def test_a_plan_is_read_whatever_the_runs_name_is(tmp_path, fake, name):
    path = fake("python", plan(name, seconds=9_660))
    text = call("./run_all.sh", "--dry-run", "--here", cwd=tmp_path, PATH=path, SEED="1 2", LC_LR=1)
    assert text.count(f"{json.dumps(name)[1:-1]}: incomplete, 9.70 GB, about 2 h 41 min on this machine\n") == 4
    assert "\nin all: 38.80 GB, about 10 h 44 min on this machine\n" in text and text.count("\nbash job.sh ") == 4


def test_what_cannot_be_submitted_ends_the_loop_with_what_to_do(tmp_path, fake):
    fake("sbatch", f"echo >> {tmp_path}/submitted; exit 3")
    path = fake("python", plan("r/a"))
    text = call("./run_all.sh", cwd=tmp_path, status=cli.ENVIRONMENT, PATH=path)
    assert "--here" in text and (tmp_path / "submitted").read_text() == "\n"
    assert call("./run_all.sh", "--here", cwd=tmp_path, PATH=path).count("state: 1 of 4") == 4
    fake("python", "echo usage")
    assert "no plan" in call("./run_all.sh", "--", "--help", cwd=tmp_path, status=cli.ENVIRONMENT, PATH=path)


NEWER = {
    "extended globs": r"[@+?*!]\(", "declare": r"\b(declare|local|typeset) -\w*[Agnlu]", "last element": r"\[-\d",
    "case, quoting": r"\$\{\w+(\[[^]]*\])?(\^|,|@\w)", "arrays of lines": r"\b(mapfile|readarray|coproc)\b",
    "redirections": r"&>>|\|&|\{\w+\}[<>]", "case that goes on": r";&", "-v": r"\[\[? -v", "wait -n": r"\bwait -\w",
    "time": r"EPOCHSECONDS|%\(", "sed of GNU": r"\bsed\b.*\\[?+|]|\bsed -[ir]", "readlink of GNU": r"readlink -f",
}  # fmt: skip
"""What macOS's bash 3.2, or its tools, cannot read."""


@pytest.mark.parametrize("script", ["run_all.sh", "job.sh"])
def test_the_scripts_hold_nothing_that_bash_3_2_and_4_2_cannot_read(script):
    code = re.sub(r"(^|\s)#.*", "", (ROOT / script).read_text())
    assert [name for name, pattern in NEWER.items() if re.search(pattern, code)] == []
    for array in re.findall(r"\b(\w+)=\(\)", code):  # empty, it counts as unset before bash 4.4
        safe = f'${{{array}[@]+"${{{array}[@]}}"}}'
        assert f"${{{array}[@]}}" not in code.replace(safe, ""), array
    assert call("bash", "-n", ROOT / script) == ""


def test_without_slurm_the_grid_runs_here_and_is_then_complete(clone, no_slurm):
    words = ("bash", clone / "run_all.sh", "--", *CPU, "--results_dir", "my results")  # from anywhere
    grid = {"PATH": no_slurm, "CNN_LR": "1e30 0.1", "LC_LR": "0.02", "EPOCHS": 2, "N_SPLITS": 1}
    first = call(*words, **grid, status=cli.DIVERGED)
    assert first.count("\ncomplete: my results/") == 1 and first.count("\nbash job.sh ") == 2
    second = call(*words, **grid)
    assert second.count(": complete\n") == 2 and "job.sh" not in second


def test_without_slurm_a_signal_reaches_the_job_and_ends_the_loop(clone, no_slurm):
    env, processes = ENVIRONMENT | {"PATH": no_slurm, "SEED": "0 1", "CNN_LR": "0.1", "LC_LR": "0.1"}, {}
    for signum in (signal.SIGINT, signal.SIGTERM):
        words = ("bash", "run_all.sh", *CPU, "--results_dir", f"stopped_{signum}")
        processes[signum] = subprocess.Popen(words, cwd=clone, env=env, stderr=subprocess.PIPE, text=True)
    for signum, process in processes.items():
        wait_until(lambda signum=signum: list(clone.glob(f"stopped_{signum}/*/small_2.pyT")))
        process.send_signal(signum)
        assert "SIGTERM: saved" in process.communicate(timeout=60)[1] and process.returncode == 143
        assert len(list(clone.glob(f"stopped_{signum}/*/"))) == 1


def test_what_a_job_adds_to_the_command(tmp_path, fake):
    path = fake("python", 'echo "$@"')

    def command(*words: object, **variables: object) -> str:
        return call("bash", tmp_path / "job.sh", *words, PATH=path, **variables).splitlines()[-1]

    assert command("convert.py", "RUN", SLURM_ARRAY_TASK_ID=9) == "-u convert.py RUN --split 9"
    assert "--split" not in command(0.1, SLURM_ARRAY_TASK_ID=9)
    assert command(0.1, 0.2, "--", "--keep", "last") == "-u experiments.py --cnn_lr 0.1 --lc_lr 0.2 --keep last"
    assert command() == command("--") == "-u experiments.py"


def test_an_active_environment_is_not_replaced(tmp_path, fake):
    path, activate = fake("python", 'echo "${ACTIVE:-as it was}"'), tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("export ACTIVE=.venv\n")

    def active(**variables: str) -> str:
        return call("bash", tmp_path / "job.sh", PATH=path, **variables).splitlines()[-1]

    assert active() == active(CONDA_DEFAULT_ENV="base", CONDA_PREFIX="/opt/conda") == ".venv"
    assert active(CONDA_DEFAULT_ENV="rnorm", CONDA_PREFIX="/rnorm") == active(VIRTUAL_ENV="/x") == "as it was"


@pytest.mark.parametrize("scontrol", [True, False])
def test_a_saved_job_requeues_itself_alone_or_says_that_it_cannot(tmp_path, fake, no_slurm, scontrol):
    fake("python", f"exit {SAVED}")
    if scontrol:
        fake("scontrol", 'echo "scontrol $@"')
    (tmp_path / "spool").mkdir()  # where Slurm has its copy
    script = (shutil.move(tmp_path / "job.sh", tmp_path / "spool"), "convert.py", "RUN")
    variables = {"PATH": no_slurm, "SLURM_SUBMIT_DIR": tmp_path, "SLURM_JOB_ID": 50, "status": SAVED}
    task = {"SLURM_ARRAY_JOB_ID": 50, "SLURM_ARRAY_TASK_ID": 28}
    for more, number in (({}, "50"), (task, "50_28")):
        text = call("bash", *script, **variables, **more)
        assert (f"\nscontrol requeue {number}\n" in text) == scontrol
        assert ("saved, but not requeued; submit the same command again" in text) == (not scontrol)


def submit(clone: Path, *command: object, **variables: object) -> str:
    """The number of the job that a command submits."""
    return re.search(r"Submitted batch job (\d+)", call(*command, cwd=clone, **variables))[1]


def job(number: str) -> dict[str, str]:
    """What Slurm says of a job, or of a task of an array, `JOB_TASK`."""
    line = call("scontrol", "show", "job", "--oneliner", number).splitlines()[0]
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def ended(number: str) -> tuple[str, str, str]:
    """Wait until no task of a job is left in the queue; returns its state, exit status and number of restarts."""
    wait_until(lambda: not call("squeue", "--noheader", f"--jobs={number}").strip())
    facts = job(number)
    return facts["JobState"], facts["ExitCode"].split(":")[0], facts["Restarts"]


def log(clone: Path, number: str) -> str:
    return "".join(path.read_text() for path in clone.glob(f"logs/{number}.log"))


def test_requeued_jobs_end_bit_identical_and_the_siblings_of_an_arrays_task_stay_as_they_are(slurm, clone):
    command = ("job.sh", 0.05, 0.02, 24, 3, "--", *CPU)
    call("bash", *command, "--results_dir", "here", cwd=clone)  # without Slurm
    here = next((clone / "here").iterdir())
    run, array = (clone / name / here.name for name in ("results", "array"))
    shutil.copytree(here, array, ignore=shutil.ignore_patterns("*_version_*"))
    number = submit(clone, "sbatch", *command)
    wait_until(lambda: (run / "small_5.pyT").exists())
    call("scancel", "--batch", "--signal=USR1", number)  # as Slurm does ahead of the time limit
    convert = ("job.sh", "convert.py", array, "--device", "cpu")
    tasks = submit(clone, "sbatch", "--array=1,4,24", "--cpus-per-task=1", *convert)  # several GPUs for one run
    wait_until(lambda: list(array.glob("*_24/*_8.pyT")))
    call("scancel", f"{tasks}_4")
    assert job(f"{tasks}_24")["JobId"] == tasks  # the task whose number is the array's
    call("scancel", "--batch", "--signal=USR1", f"{tasks}_24")
    wait_until(lambda: list(run.glob("*_1/*_8.pyT")))
    call("scontrol", "requeue", number)
    wait_until(lambda: job(number)["Restarts"] == "2")
    assert ended(number) == ("COMPLETED", "0", "2"), log(clone, number)
    assert "SIGUSR1: saved" in log(clone, number) and "SIGTERM: saved" in log(clone, number)
    assert ended(tasks) == ("COMPLETED", "0", "1")
    siblings = [(job(f"{tasks}_{split}")["JobState"], job(f"{tasks}_{split}")["Restarts"]) for split in (1, 4)]
    assert siblings == [("COMPLETED", "0"), ("CANCELLED", "0")]
    call("bash", *convert, cwd=clone)
    assert differences(run, here) == differences(array, here) == []


def notes_signals(clone: Path) -> bool:
    """Whether a job's Python is there; it will import torch for a second."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            caught = int(re.search(r"SigCgt:\s*(\w+)", (process / "status").read_text())[1], 16)
            of_python = b"experiments.py" in (process / "cmdline").read_bytes()
            if of_python and os.readlink(process / "cwd") == str(clone) and caught >> (signal.SIGUSR1 - 1) & 1:
                return True
    return False


def test_a_job_that_fails_or_took_no_step_is_not_requeued(slurm, clone):
    no_step = submit(clone, "sbatch", "job.sh", 0.1, 0.01, 30, 1, "--", *CPU)
    wait_until(lambda: notes_signals(clone))
    call("scancel", "--batch", "--signal=USR1", no_step)
    bad = submit(clone, "sbatch", "job.sh", "--", *CPU, "--dataset", "missing.npz")
    site = {"SBATCH_GRES": "none", "SBATCH_GPUS_PER_NODE": "h100:1"}  # that knows no --gres
    no_gpu = submit(clone, "sbatch", "job.sh", 0.2, "--", *FLAGS, **site)
    assert ended(no_step) == ("FAILED", str(cli.ENVIRONMENT), "0") and "nothing new was saved" in log(clone, no_step)
    assert ended(bad) == ("FAILED", str(cli.BAD_INPUT), "0") and "missing.npz" in log(clone, bad)
    assert ended(no_gpu)[::2] == ("FAILED", "0") and not list(clone.glob("results/*cnn_lr=0.2*"))
    text = log(clone, no_gpu)
    assert re.search(r"^job.env: GPU [23]$", text, re.M) and "GPU" in text.splitlines()[-1] and "Traceback" not in text


def test_jobs_of_one_run_wait_for_each_other_and_a_cancelled_one_has_saved(slurm, clone):
    grid = {"CNN_LR": "0.03", "LC_LR": "0.01", "EPOCHS": 1000, "N_SPLITS": 1}
    splits = ("--splits", *range(900, 941))  # a name so long that with .log it would be no name of a file
    first, second = (submit(clone, "bash", "run_all.sh", *CPU, *splits, **grid) for _ in range(2))
    wait_until(lambda: list(clone.glob("results/*=0.03*/small_3.pyT")))
    run = next(clone.glob("results/*=0.03*"))
    assert len(run.name) > 242 and job(first)["JobName"] == run.name and job(second)["Reason"] == "Dependency"
    call("scancel", first)
    assert ended(first)[::2] == ("CANCELLED", "0") and "SIGTERM: saved" in log(clone, first)
    saved = max(torch.load(path, weights_only=True)["epoch"] for path in run.glob("*.pyT"))
    wait_until(lambda: f"CNN: continues in epoch {saved + 1}" in log(clone, second))
    call("scancel", second)
