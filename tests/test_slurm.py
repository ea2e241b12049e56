"""job.sh and run_all.sh, on a real Slurm where there is one: tests/start_slurm.sh starts it. All in a copy of the
repository that knows the tests' small network."""

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
from conftest import make_arrays
from small_study import run as run_small
from small_study import small_cnn

from rnorm import cli, grid, runs

ROOT = Path(__file__).parents[1]
FLAGS = ("--network", "small", "--dataset", "tiny.npz", "--batch_size", "50")
CPU = ("--device", "cpu")  # the test Slurm's GPUs are fake
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}


def call(*command: object, cwd: Path = ROOT, status: int = 0, **variables: str) -> str:
    """Run a command that has to end with `status`; returns its stdout and stderr."""
    words, env = [str(word) for word in command], ENVIRONMENT | variables
    done = subprocess.run(words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == status, done.stdout
    return done.stdout


def run_all(clone: Path, *words: object, **status_and_variables: object) -> str:
    return call("bash", "run_all.sh", *words, cwd=clone, **status_and_variables)


def wait_until(condition, seconds: float = 600) -> None:
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
    for name in ("rnorm", "logs"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("*.log", "__pycache__"))
    with open(clone / "models.py", "a") as file:
        file.write(f"\n\n{inspect.getsource(small_cnn)}\n\nNETWORKS['small'] = small_cnn\n")
    np.savez(clone / "tiny.npz", **make_arrays(500, 100))
    path = f"export PATH={Path(sys.executable).parent}:$PATH OMP_NUM_THREADS=1\n"
    (clone / "job.env").write_text(path + 'echo "job.env: GPU ${CUDA_VISIBLE_DEVICES:-none}"\n')
    return clone


@pytest.fixture(scope="module")
def slurm(clone):
    """Skips where there is no Slurm to play with."""

    def ask(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.TimeoutExpired):
            return ""

    if not shutil.which("sbatch"):
        pytest.skip("no Slurm here; tests/start_slurm.sh installs and starts one")
    if not re.search(r"^ClusterName\s*= test$", ask("scontrol", "show", "config"), re.M):
        pytest.skip("no Slurm that answers and is a test's (ClusterName=test); tests/start_slurm.sh starts one")
    if not re.search("idle|mixed|allocated", ask("sinfo", "--noheader", "--format=%T")):
        pytest.skip("Slurm's node is not up; tests/start_slurm.sh resumes it")
    yield
    jobs = (line.split(maxsplit=1) for line in ask("squeue", "--noheader", "--format=%F %Z").splitlines())
    for number in {number for number, directory in jobs if directory == str(clone)}:  # of a test that failed
        call("scancel", number)


@pytest.fixture
def fake(tmp_path):
    """Makes a command out of lines of shell; returns the PATH on which it comes first."""

    def make(name: str, lines: str) -> str:
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
        return f"{tmp_path}:{os.environ['PATH']}"

    return make


def sbatch(clone: Path, *words: object) -> str:
    """Submit job.sh; returns the job's id."""
    return call("sbatch", "--parsable", "job.sh", *words, cwd=clone).strip()


def job(number: str) -> dict[str, str]:
    """What Slurm says of a job; of an array, of its first task."""
    text = call("scontrol", "show", "job", "--oneliner", number)
    return dict(word.split("=", 1) for word in text.splitlines()[0].split() if "=" in word)


def ended(number: str) -> dict[str, str]:
    """Wait until no task of a job is left in the queue."""
    wait_until(lambda: not call("squeue", "--noheader", f"--jobs={number}").strip())
    return job(number)


def log(clone: Path, number: str) -> str:
    return "".join(path.read_text() for path in clone.glob(f"logs/*-{number}*.log"))


def content(run: Path) -> dict[str, object]:
    """Everything in a run's checkpoints and histories, in a form that compares bit by bit, NaN with NaN."""

    def plain(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.shape, value.contiguous().numpy().tobytes()
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        return repr(value)

    paths = [path for path in run.rglob("*") if path.suffix in (".pyT", ".hist")]
    return {str(p.relative_to(run)): plain(torch.load(p, weights_only=True)) for p in paths}


def name(cnn_lr: float, lc_lr: float, epochs: int, n_splits: int) -> str:
    return runs.Settings(epochs, n_splits, cnn_lr, lc_lr, network="small", dataset="tiny", batch_size=50).run_name


def job_numbers(text: str) -> list[str]:
    """The jobs that run_all.sh says it submitted."""
    return re.findall(r"^job (\d+): ", text, re.M)


@pytest.fixture(scope="module")
def undisturbed(clone):
    """A run made by job.sh without Slurm: its command, its name and its content."""
    words = (0.05, 0.02, 24, 2, "--", *FLAGS, *CPU)
    text = call("bash", clone / "job.sh", *words, "--results_dir", "undisturbed")  # from anywhere
    assert "job.env: GPU none" in text and "\ncomplete: undisturbed/" in text
    return words, name(*words[:4]), content(clone / "undisturbed" / name(*words[:4]))


# Without Slurm


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("run_all.sh", ["0.1"]), ("run_all.sh", ["--cnn_lr"]), ("run_all.sh", ["--dry-run", "yes"]),
        ("run_all.sh", ["--seed", "0", "-1"]), ("run_all.sh", ["--cnn_lr", "0.1", "fast"]),
        ("run_all.sh", ["--split-jobs", "0"]), ("run_all.sh", ["--split-jobs", "two"]),
        ("run_all.sh", ["--split-jobs", "--local"]), ("run_all.sh", ["--lc_lr", "0"]),
        ("run_all.sh", ["--epochs", "2", "--", "--sed", "1"]), ("run_all.sh", ["--", "--exec", "0"]),
        ("run_all.sh", ["--", "--help"]), ("run_all.sh", ["--", "--data_dir", ""]),
        ("run_all.sh", ["--", "--convert_to", "lc", "lc3"]), ("run_all.sh", ["--", "--dataset", "missing.npz"]),
        ("job.sh", ["0.1", "0.01", "2", "1", "5"]), ("job.sh", ["--epochs", "2"]), ("job.sh", ["0.1", "0"]),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_anything_is_submitted(clone, tmp_path, fake, script, words):
    path = fake("sbatch", f"touch {tmp_path}/submitted; echo 1")
    fake("squeue", "true")
    assert "Traceback" not in call("bash", script, *words, cwd=clone, status=2, PATH=path)
    assert not (tmp_path / "submitted").exists()


def test_without_slurm_run_all_says_what_to_do(clone, tmp_path):
    for tool in ("bash", "dirname", "realpath"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    text = run_all(clone, status=1, PATH=str(tmp_path))
    assert "no answer from Slurm" in text and "--local" in text


def test_where_slurm_does_not_answer_there_is_a_plan_but_no_submission(clone, tmp_path, fake):
    path = fake("squeue", "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    fake("sbatch", f"touch {tmp_path}/submitted; echo 1")
    assert run_all(clone, "--dry-run", PATH=path).count("\nsbatch ") == 5
    assert "no answer from Slurm" in run_all(clone, status=1, PATH=path)
    assert not (tmp_path / "submitted").exists()


def test_dry_run_prints_the_sbatch_lines_and_runs_nothing(clone, fake):
    flags = ("--", "--results_dir", "nothing")
    text = run_all(clone, "--dry-run", "--seed", 0, 7, *flags, PATH=fake("squeue", "true"))
    lines = [line for line in text.splitlines() if line.startswith("sbatch ")]
    assert len(lines) == 2 * 2 * 2 + 1
    assert " job.sh 0.1 0.005 150 20 -- --seed 7 --results_dir nothing " in lines[3]
    assert "--dependency=afterany:ID1:ID2:" in lines[-1] and " plot.py " in lines[-1]
    assert not (clone / "nothing").exists()


def test_split_jobs_hand_on_what_concerns_them(clone, fake):
    words = ("--dry-run", "--cnn_lr", 0.1, "--lc_lr", 0.01, "--split-jobs", 2, "--", "--splits", 1, 9, "--fresh")
    words += ("--data_dir", "my data", "--convert_to", "lc", "tied", "--device", "cuda", "--keep", "last")
    path = fake("squeue", "true")
    cnn, array, _ = re.findall("^sbatch .*", run_all(clone, *words, PATH=path), re.M)
    assert " --cnn_only " in cnn and "--array=1\\,9%2 " in array and " --dependency=afterok:ID1 " in array
    command = f" convert.py results/{runs.Settings(splits=(1, 9), cnn_lr=0.1).run_name} "
    assert command + "--data_dir my\\ data --device cuda --keep last --convert_to lc tied #" in array
    assert run_all(clone, *words, "--cnn_only", PATH=path).count("\nsbatch ") == 2  # the CNN and the plot


def test_local_runs_the_grid_and_draws_it(clone):
    words = ("--local", "--cnn_lr", 0.1, "--lc_lr", 0.02, 0.01, "--epochs", 2, "--n_splits", 1)
    text = run_all(clone, *words, "--", *FLAGS, *CPU, "--results_dir", "local")
    assert text.count("\ncomplete: local/") == 2
    assert (clone / "local/figure.png").exists() and (clone / "local/table.md").exists()


def test_a_run_is_complete_when_all_that_was_asked_for_is_done(tmp_path, capsys):
    settings = runs.Settings(epochs=10, splits=(1, 5))
    run = tmp_path / settings.run_name
    run.mkdir()

    def state(*flags: str) -> str:
        words = ("--cnn_lr", "0.05", "--lc_lr", "0.01", "--epochs", "10", "--", "--splits", "1", "5")
        assert grid.main([*words, "--results_dir", str(tmp_path), *flags]) == cli.COMPLETE
        return capsys.readouterr().out.split("\t")[0]

    assert state() == "new"
    runs.note_network(run, runs.Member(settings), state="complete")
    assert (state(), state("--cnn_only")) == ("new", "complete")
    runs.note_network(run, runs.Member(settings, "lc", 1), state="complete")
    runs.note_network(run, runs.Member(settings, "lc", 5), state="diverged", diverged_at=3)
    assert (state(), state("--convert_to", "lc", "tied"), state("--fresh")) == ("complete", "new", "new")
    runs.note_network(run, runs.Member(settings, "tied", 1), state="complete")
    runs.note_network(run, runs.Member(settings), state="diverged", diverged_at=4)  # then nothing is converted at 5
    assert state("--convert_to", "lc", "tied") == "complete"


def test_local_stops_at_a_signal(clone):
    words = ("--local", "--epochs", "50", "--", *FLAGS, *CPU, "--results_dir", "stopped")
    process = subprocess.Popen(["bash", "run_all.sh", *words], cwd=clone, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(clone.glob("stopped/*/small_2.pyT")))
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "SIGTERM: saved" in text
    assert len(list(clone.glob("stopped/*/"))) == 1


@pytest.mark.parametrize("script", ["experiments.py", "convert.py"])
def test_a_gpu_from_slurm_is_asked_for(tmp_path, fake, script):
    shutil.copy(ROOT / "job.sh", tmp_path)
    (tmp_path / "experiments.py").touch()
    path = fake("python", 'echo "run  somewhere"; echo "$@"')

    def devices(*words: str, **variables: str) -> list[str]:
        text = call("bash", tmp_path / "job.sh", script, "RUN", *words, PATH=path, **variables)
        return re.findall(r"--device[ =](\w+)", text.splitlines()[-1])

    assert devices(SLURM_JOB_GPUS="0") == devices(SLURM_GPUS_ON_NODE="1") == ["cuda"]
    assert devices("--device", "cpu", SLURM_JOB_GPUS="0") == ["cpu"]  # the user's own wins
    assert devices("--device=auto", SLURM_JOB_GPUS="0") == ["auto"]
    assert devices() == []


def test_a_stop_without_progress_saves_the_same_bytes(npz, tmp_path):
    """What job.sh tells progress by."""

    def stop_after(steps: int) -> list[bytes]:
        left = steps

        def check() -> None:
            nonlocal left
            if left == 0:
                raise cli.Interrupted
            left -= 1

        with pytest.MonkeyPatch.context() as patch, pytest.raises(cli.Interrupted):
            patch.setattr("train.check_signals", check)
            words = ("--epochs", 3, "--n_splits", 1, "--batch_size", 10, "--results_dir", tmp_path)
            run_small("experiments.py", "--dataset", npz, *words)
        return [path.read_bytes() for path in sorted(tmp_path.rglob("latest.pyT"))]

    saved = stop_after(11)  # of the CNN's 18
    assert saved and stop_after(0) == saved
    saved = stop_after(14)
    assert list(tmp_path.glob("*/*/latest.pyT"))  # an eLCN's
    assert stop_after(0) == saved != stop_after(1)


# With Slurm


def test_a_job(slurm, clone):
    number = sbatch(clone, 0.1, 0.01, 2, 1, "--", *FLAGS, *CPU)
    assert ended(number)["JobState"] == "COMPLETED"
    text = (clone / f"logs/rnorm-{number}.log").read_text()
    assert re.search(r"^job.env: GPU \d$", text, re.M) and "\ncomplete: results/" in text


def test_a_gpu_that_does_not_work_ends_the_job(slurm, clone):
    number = sbatch(clone, 0.2, 0.01, 2, 1, "--", *FLAGS)
    assert ended(number)["JobState"] == "FAILED"
    assert "--device cuda" in log(clone, number).splitlines()[-1] and "Traceback" not in log(clone, number)


def test_a_grid_is_drawn_however_its_jobs_ended(slurm, clone):
    words = ("--cnn_lr", 0.05, 1e30, "--lc_lr", 0.01, "--epochs", 3, "--n_splits", 1, "--", *FLAGS, *CPU)
    words += ("--results_dir", "grid")
    first = run_all(clone, *words)
    *numbers, plot = job_numbers(first)
    assert len(numbers) == 2 and f"scancel {' '.join(numbers)} {plot}" in first
    again = run_all(clone, *words)
    assert again.count("queued already") == 2 and "nothing to submit" in again
    assert ended(plot)["JobState"] == "COMPLETED", log(clone, plot)
    assert [ended(number)["ExitCode"] for number in numbers] == ["0:0", f"{cli.DIVERGED}:0"]
    assert (clone / "grid/figure.png").exists() and (clone / "grid/table.md").exists()
    third = run_all(clone, "--dry-run", *words)
    assert third.count("complete: grid/") == 2 and third.count("sbatch ") == 1


def test_a_requeued_job_ends_bit_identical(slurm, clone, undisturbed):
    words, run, expected = undisturbed
    number = sbatch(clone, *words, "--fresh")
    wait_until(lambda: (clone / "results" / run / "small_5.pyT").exists())
    call("scancel", "--batch", "--signal=USR1", number)  # as Slurm does ahead of the time limit
    wait_until(lambda: list((clone / "results" / run).glob("*_1/*_8.pyT")))
    call("scontrol", "requeue", number)
    wait_until(lambda: job(number)["Restarts"] == "2")
    state = ended(number)
    text = log(clone, number)
    assert state["JobState"] == "COMPLETED" and state["Restarts"] == "2", text
    assert "SIGUSR1: saved" in text and "SIGTERM: saved" in text and text.count("--fresh") == 1
    assert content(clone / "results" / run) == expected


def test_a_job_without_progress_is_not_requeued(slurm, clone):
    number = sbatch(clone, 0.1, 0.01, 30, 1, "--", *FLAGS, *CPU)
    wait_until(lambda: "python experiments.py" in log(clone, number))
    time.sleep(1)  # Python has to be there; torch's import takes longer
    call("scancel", "--batch", "--signal=USR1", number)
    state = ended(number)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", f"{cli.SAVED}:0", "0")
    assert "no progress" in log(clone, number)


def test_a_job_that_fails_is_not_requeued(slurm, clone):
    number = sbatch(clone, "--", "--dataset", "missing.npz")
    state = ended(number)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", f"{cli.BAD_INPUT}:0", "0")
    assert "missing.npz" in log(clone, number)


def test_a_cancelled_job_has_saved(slurm, clone):
    number = sbatch(clone, 0.03, 0.01, 1000, 1, "--", *FLAGS, *CPU)
    run = clone / "results" / name(0.03, 0.01, 1000, 1)
    wait_until(lambda: (run / "small_3.pyT").exists())
    call("scancel", number)
    state = ended(number)
    wait_until(lambda: "SIGTERM: saved" in log(clone, number))
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")
    states = [torch.load(path, weights_only=True) for path in run.glob("*.pyT")]  # latest.pyT, if between two others
    saved = max(states, key=lambda state: (state["epoch"], state["step"]))
    assert saved["epoch"] >= 3 and len(saved["history"]["checkpoints"]) > 3


def test_split_jobs_end_bit_identical(slurm, clone, undisturbed):
    (cnn_lr, lc_lr, epochs, n_splits, *flags), run, expected = undisturbed
    grid = ("--cnn_lr", cnn_lr, "--lc_lr", lc_lr, "--epochs", epochs, "--n_splits", n_splits)
    text = run_all(clone, "--split-jobs", 2, *grid, *flags, "--results_dir", "split")
    cnn, array, plot = job_numbers(text)
    wait_until(lambda: list((clone / "split" / run).glob("*_24/*_8.pyT")))
    call("scancel", "--batch", "--signal=USR1", f"{array}_24")
    assert ended(plot)["JobState"] == "COMPLETED", log(clone, array) + log(clone, plot)
    assert "requeueing" in log(clone, f"{array}_24")
    assert content(clone / "split" / run) == expected


def test_split_jobs_are_cancelled_when_the_cnn_fails(slurm, clone):
    run = clone / "taken" / name(0.5, 0.5, 2, 1)
    run.mkdir(parents=True)
    (run / "notes.txt").touch()  # so it is no run, which only the job finds out
    words = ("--cnn_lr", 0.5, "--lc_lr", 0.5, "--epochs", 2, "--n_splits", 1, "--split-jobs", "--", *FLAGS, *CPU)
    cnn, array, plot = job_numbers(run_all(clone, *words, "--results_dir", "taken"))
    ended(plot)
    assert job(cnn)["ExitCode"] == f"{cli.BAD_INPUT}:0" and job(array)["JobState"] == "CANCELLED"
    assert "left out" in log(clone, plot)
