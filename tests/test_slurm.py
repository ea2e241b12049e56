"""job.sh and run_all.sh, on a real Slurm where there is one: tests/start_slurm.sh starts it. All in a copy of the
repository that knows the tests' small network."""

import contextlib
import inspect
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

ROOT = Path(__file__).parents[1]
FLAGS = ("--network", "small", "--dataset", "tiny.npz", "--batch_size", "50")
CPU = (*FLAGS, "--device", "cpu")  # the test Slurm's GPUs are fake
OURS = ("CNN_LR", "LC_LR", "SEED", "EPOCHS", "N_SPLITS", "SLURM_", "SBATCH_")
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
    for tool in ("bash", "dirname", "realpath", "basename", "sed", "date", "hostname"):
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


def test_the_grid_is_printed_or_submitted_without_what_is_complete(tmp_path, fake):
    fake("sbatch", f'echo "$@" >> {tmp_path}/submitted')
    path = fake("python", 'case "$*" in *"lr 0.05"*) s=complete ;; *) s=new ;; esac; echo "run   r/$4\nstate   $s"')
    variables = {"cwd": tmp_path, "PATH": path, "SEED": "0 7"}
    jobs = re.findall("^sbatch (.*) $", call("./run_all.sh", "--dry-run", "--", "--splits", 3, **variables), re.M)
    start = "--job-name=0.1 --dependency=singleton job.sh 0.1"
    assert jobs == [f"{start} {lr} 150 20 -- --seed {seed} --splits 3" for lr in (0.01, 0.005) for seed in (0, 7)]
    assert not (tmp_path / "submitted").exists()
    assert call("./run_all.sh", "--dry-run", "--fresh", **variables).count("\nsbatch ") == 8
    call("./run_all.sh", "--splits", 3, **variables)
    assert (tmp_path / "submitted").read_text().splitlines() == jobs
    fake("sbatch", "exit 1")  # Slurm does not answer
    call("./run_all.sh", **variables, status=1)
    fake("python", "echo usage")
    assert "no plan" in call("./run_all.sh", "--", "--help", **variables, status=1)


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

    for script in ("experiments.py", "convert.py"):  # the GPU that Slurm gave it
        assert command(script, SLURM_JOB_GPUS=0) == f"-u {script} --device cuda"
        assert command(script, SLURM_GPUS_ON_NODE=1) == f"-u {script} --device cuda"
        assert command(script, "--device=auto", SLURM_JOB_GPUS=0) == f"-u {script} --device=auto"
        assert "--device" not in command(script)
    assert "--device" not in command("plot.py", SLURM_JOB_GPUS=0)
    assert command("convert.py", "RUN", SLURM_ARRAY_TASK_ID=9) == "-u convert.py RUN --split 9"
    assert "--split" not in command(0.1, SLURM_ARRAY_TASK_ID=9)
    words = (0.1, 0.2, "--", "--fresh", "--keep", "last")
    assert command(*words) == "-u experiments.py --cnn_lr 0.1 --lc_lr 0.2 --fresh --keep last"
    assert command(*words, SLURM_RESTART_COUNT=1) == "-u experiments.py --cnn_lr 0.1 --lc_lr 0.2 --keep last"


def submit(clone: Path, *command: object, **variables: object) -> str:
    """The number of the job that a command submits."""
    return re.search(r"Submitted batch job (\d+)", call(*command, cwd=clone, **variables))[1]


def job(number: str) -> dict[str, str]:
    """What Slurm says of a job; of an array, of its first task."""
    line = call("scontrol", "show", "job", "--oneliner", number).splitlines()[0]
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def ended(number: str) -> tuple[str, str, str]:
    """Wait until no task of a job is left in the queue; returns its state, exit status and number of restarts."""
    wait_until(lambda: not call("squeue", "--noheader", f"--jobs={number}").strip())
    facts = job(number)
    return facts["JobState"], facts["ExitCode"].split(":")[0], facts["Restarts"]


def log(clone: Path, number: str) -> str:
    return "".join(path.read_text() for path in clone.glob(f"logs/*-{number}.log"))


def test_requeued_jobs_end_bit_identical(slurm, clone):
    command = ("job.sh", 0.05, 0.02, 24, 2, "--", *CPU)
    call("bash", *command, "--results_dir", "here", cwd=clone)  # without Slurm
    here = next((clone / "here").iterdir())
    run, array = (clone / name / here.name for name in ("results", "array"))
    shutil.copytree(here, array, ignore=shutil.ignore_patterns("*_version_*"))
    number = submit(clone, "sbatch", *command, "--fresh")
    wait_until(lambda: (run / "small_5.pyT").exists())
    call("scancel", "--batch", "--signal=USR1", number)  # as Slurm does ahead of the time limit
    tasks = submit(clone, "sbatch", "--array=1,24", "job.sh", "convert.py", array, "--device", "cpu")  # several GPUs
    wait_until(lambda: list(array.glob("*_24/*_8.pyT")))
    call("scancel", "--batch", "--signal=USR1", f"{tasks}_24")
    wait_until(lambda: list(run.glob("*_1/*_8.pyT")))
    call("scontrol", "requeue", number)
    wait_until(lambda: job(number)["Restarts"] == "2")
    assert ended(number) == ("COMPLETED", "0", "2"), log(clone, number)
    text = log(clone, number)
    assert "SIGUSR1: saved" in text and "SIGTERM: saved" in text and text.count("--fresh") == 1
    assert ended(tasks)[0] == "COMPLETED" and job(f"{tasks}_24")["Restarts"] == "1"
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
    no_gpu = submit(clone, "sbatch", "job.sh", 0.2, "--", *FLAGS)
    assert ended(no_step) == ("FAILED", str(cli.ENVIRONMENT), "0") and "nothing new was saved" in log(clone, no_step)
    assert ended(bad) == ("FAILED", str(cli.BAD_INPUT), "0") and "missing.npz" in log(clone, bad)
    assert ended(no_gpu)[::2] == ("FAILED", "0") and not list(clone.glob("results/*cnn_lr=0.2*"))
    text = log(clone, no_gpu)
    assert re.search(r"^job.env: GPU \d$", text, re.M) and "GPU" in text.splitlines()[-1] and "Traceback" not in text


def test_jobs_of_one_run_wait_for_each_other_and_a_cancelled_one_has_saved(slurm, clone):
    grid = {"CNN_LR": "0.03", "LC_LR": "0.01", "EPOCHS": 1000, "N_SPLITS": 1}
    first, second = (submit(clone, "bash", "run_all.sh", *CPU, **grid) for _ in range(2))
    wait_until(lambda: list(clone.glob("results/*=0.03*/small_3.pyT")))
    run = next(clone.glob("results/*=0.03*"))
    assert job(first)["JobName"] == run.name and job(second)["Reason"] == "Dependency"
    call("scancel", first)
    assert ended(first)[::2] == ("CANCELLED", "0") and "SIGTERM: saved" in log(clone, first)
    saved = max(torch.load(path, weights_only=True)["epoch"] for path in run.glob("*.pyT"))
    wait_until(lambda: f"CNN: continues in epoch {saved + 1}" in log(clone, second))
    call("scancel", second)
