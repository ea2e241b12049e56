"""What a GPU computes here and how fast, as markdown on stdout; we expect ten minutes on one GPU.

    make gpu
    python benchmarks/gpu.py --dataset cifar10.npz      times the study on CIFAR-10; or --data_dir, where it lies
    python benchmarks/gpu.py --device cpu               the same parts with a small network: does this script work?

Ends with the claims that it tested, and with status 1 if one fails; with one line where no GPU can be used. It writes
up to 2 GB to a temporary directory. Audited on a pretended GPU; not yet run on a real one.
"""

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from rnorm.devices import pick_device
from rnorm.files import RnormError
from step import OURS, machine

ROOT = Path(__file__).parents[1]
EPOCHS, ELCNS = 150, 17  # of the default study
LIMIT = 1200.0  # seconds that a command may take
LOOK = """
import sys
sys.path[:0] = [".", "benchmarks"]
import gpu
_, device, *sys.argv = sys.argv
sys.exit(gpu.what_is_there(device))
"""
STUDY = """
import atexit, runpy, sys, torch
sys.path[:0] = [".", "tests"]
import small_study  # makes `--network small` known
del sys.argv[0]
atexit.register(lambda: print("peak memory:", torch.cuda.max_memory_allocated()))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(*command: object, **options: object) -> subprocess.Popen:
    """Start Python in the repository with these arguments."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True, **options)


def start_study(*command: object, **options: object) -> subprocess.Popen:
    """Start experiments.py or convert.py, whose last line then tells the bytes that torch allocated at the peak."""
    return start("-c", STUDY, *command, **options)


class Failed(Exception):
    """A command failed, without which the rest of a part means nothing."""


class Report:
    """Runs commands, and remembers which claims hold."""

    def __init__(self):
        self.claims = {}

    def claim(self, text: str, holds: bool) -> None:
        self.claims[text] = holds
        if not holds:
            print(f"**FAILS: {text}**\n", flush=True)

    def outputs(self, claim: str, start: Callable, *commands: tuple) -> list[str]:
        """What commands print that run at once. The claim is that each ends with status 0 in time; else: Failed."""
        options, end = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}, time.monotonic() + LIMIT
        processes, outputs = [start(*command, **options) for command in commands], []
        for process in processes:
            try:
                outputs.append(process.communicate(timeout=max(0, end - time.monotonic()))[0])
            except subprocess.TimeoutExpired as error:
                process.kill()
                outputs.append(f"{(error.output or b'').decode(errors='replace')}\nkilled after {LIMIT:.0f} s")
        self.claim(claim, not any(process.poll() is None or process.returncode for process in processes))
        if not self.claims[claim]:
            print("    " + "\n".join(outputs).replace("\n", "\n    "), flush=True)
            raise Failed
        return outputs


def ask_driver(what: str) -> str:
    """What nvidia-smi says of the first GPU; "unknown" without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return "unknown"
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


def what_is_there(name: str) -> str | None:
    """Print what computes; returns why it cannot. For a process of its own, whose end gives the GPU back."""
    try:
        device = pick_device(name)
    except RnormError as error:
        return f"gpu.py: {error}"
    print(f"## What is there\n\n{machine(device)}")
    versions = f"CUDA {torch.version.cuda}, ROCm {torch.version.hip}, cuDNN {torch.backends.cudnn.version()}"
    driver = f"driver {ask_driver('driver_version')}; {torch.cuda.device_count()} GPUs"
    print(f"torch {torch.__version__}, {versions}, {driver}", flush=True)


def tests(report: Report, on_gpu: bool, work: Path) -> None:
    """Those that compute in their own process, then those that start studies: a GPU may take one process at a time."""
    print("\n## The tests\n")
    chosen = {"tests of a step": ["tests/test_gpu.py", "-k", "float64 and cpu"]}
    if on_gpu:
        chosen = {"tests of a step": ["-m", "cuda", "-k", "not study"], "studies": ["-m", "cuda", "-k", "study"]}
    for what, which in chosen.items():
        command = ["-m", "pytest", *which, "--basetemp", work / "pytest"]
        (output,) = report.outputs(f"the {what} pass", start, command)
        summary = output.splitlines()[-1]
        print(f"{what}: {summary}", flush=True)
        report.claim(f"there are {what}, and none is skipped", "passed" in summary and "skipped" not in summary)


def steps(report: Report, on_gpu: bool, work: Path) -> None:
    print("\n## One training step")
    options = ["--rounds", 1, "--skip", "broadcast", "JAX", "Keras", "PyTorch", "network", "CNN"]
    if on_gpu:
        options = ["--device", "cuda", "--rounds", 7, "--slow_rounds", 1]
    for precision in ("float32", "tf32") if on_gpu else ("float32",):
        command = ["benchmarks/step.py", "--precision", precision, *options]
        (output,) = report.outputs(f"a step is timed in {precision}", start, command)
        lines = [line for line in output.splitlines() if line.startswith(("|", "The matrix"))]
        print(f"\nIn {precision}:\n", *lines, sep="\n", flush=True)
        ours = [line for line in lines if re.match(rf"\| \w+{OURS} \| \d", line)]
        report.claim(f"our steps compute what they should, {precision}", len(ours) == (2 if on_gpu else 1))


def noise(path: Path, images: int) -> Path:
    """A data set of random images, on which a step takes as long as on any others."""
    random, arrays = np.random.default_rng(0), {}
    for part, n in (("train", images), ("test", images // 5)):
        arrays[f"x_{part}"] = random.integers(0, 256, (n, 32, 32, 3), np.uint8)
        arrays[f"y_{part}"] = np.arange(n) % 10
    np.savez(path, **arrays)
    return path


def epoch_seconds(directory: Path) -> float:
    """Seconds per epoch after the first, with its evaluations, by the times of a network's checkpoints."""
    times = {int(path.stem.rpartition("_")[2]): path.stat().st_mtime for path in directory.glob("*_*.pyT")}
    return (times[max(times)] - times[1]) / (max(times) - 1)


def studies(report: Report, on_gpu: bool, work: Path, dataset: str | Path, data_dir: Path) -> None:
    """A whole study, then the CNN and eLCNs on the data given: one eLCN alone, and two at once."""
    print("\n## The default study\n", flush=True)
    where = ["--data_dir", data_dir, "--device", "cuda" if on_gpu else "cpu"]
    network, epochs = ("skinnyprime", 30) if on_gpu else ("small", 3)
    study = ["experiments.py", "--network", network, *where]
    few = ["--dataset", "synthetic", "--epochs", 3, "--results_dir", work / "few"]
    report.outputs("the default study, of three epochs, runs to its end", start_study, [*study, *few])
    timed = ["--dataset", dataset, "--epochs", epochs, "--splits", 0, 1, 2, "--results_dir", work / "timed"]
    outputs = report.outputs("the CNN is trained", start_study, [*study, *timed, "--cnn_only"])
    (run,) = (work / "timed").iterdir()
    seconds = [epoch_seconds(run)]
    claims = {"an eLCN is trained": [0], "two eLCNs are trained at once": [1, 2]}
    if "Exclusive" in ask_driver("compute_mode"):
        print("The GPU's compute mode allows one process at a time: two eLCNs at once are left out.\n")
        del claims["two eLCNs are trained at once"]
    for claim, splits in claims.items():
        outputs += report.outputs(claim, start_study, *(("convert.py", run, "--split", s, *where) for s in splits))
        seconds += [epoch_seconds(directory) for s in splits for directory in run.glob(f"*_lc_version_{s}")]

    print(f"On {Path(dataset).name}, {epochs} epochs of each network:\n")
    print("| network | seconds per epoch, with evaluations | peak memory that torch allocated |\n| --- | --- | --- |")
    for name, s, output in zip(("CNN", "eLCN", "eLCN beside another", "the other eLCN"), seconds, outputs):
        memory = int(re.search("peak memory: (.*)", output)[1])
        print(f"| {name} | {s:.3g} | {memory / 1e9:.2f} GB |")
    cnn, alone, *together = seconds
    if together:
        print(f"\nTwo eLCNs at once go {2 * alone / max(together):.2f} times as fast as one after the other.")
    minutes = EPOCHS * (cnn + ELCNS * alone) / 60
    print(f"\nThe default study, {EPOCHS} epochs of the CNN and {ELCNS} eLCNs: {minutes:.1f} minutes, extrapolated.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dataset", help="FILE.npz; default: CIFAR-10 if it is in --data_dir, else random images")
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--work", metavar="DIR", default=tempfile.gettempdir(), help="for 2 GB of temporary files")
    args = parser.parse_args()
    on_gpu, needed = args.device == "cuda", 2.0 if args.device == "cuda" else 0.1
    if not Path(args.work).is_dir():
        sys.exit(f"gpu.py: --work {args.work}: there is no such directory")
    if (free := shutil.disk_usage(args.work).free / 1e9) < needed:
        sys.exit(f"gpu.py: {args.work} has {free:.1f} GB free of the {needed} GB needed; name another with --work DIR")
    if start("-c", LOOK, args.device, *sys.argv).wait(timeout=LIMIT):
        return 1
    report = Report()
    with tempfile.TemporaryDirectory(prefix="gpu", dir=Path(args.work).absolute()) as work:
        dataset = "cifar10"
        if args.dataset:
            dataset = Path(args.dataset).absolute()
        elif not (args.data_dir / "cifar-10-batches-py").exists():
            dataset = noise(Path(work) / "noise.npz", 50_000 if on_gpu else 500)
        for part in (tests, steps, lambda *more: studies(*more, dataset, args.data_dir.absolute())):
            with contextlib.suppress(Failed):  # it is among the claims, and the other parts are worth seeing
                part(report, on_gpu, Path(work))
    print("\n## Claims\n\n| claim | |\n| --- | --- |")
    for claim, holds in report.claims.items():
        print(f"| {claim} | {'holds' if holds else 'FAILS'} |")
    return int(not all(report.claims.values()))


if __name__ == "__main__":
    sys.exit(main())
