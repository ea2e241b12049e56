"""Kill a study (kill -9) at random moments, continue it each time, and compare the end with an undisturbed run.

    python benchmarks/kill_demo.py [--kills 30] [--seed 0] [--work DIR] [-- ARGUMENTS OF experiments.py]

The default study is that of `make demo`. A run that completes before it was killed as often as asked is compared, and
begun anew. The last line says whether every end was bit-identical; exit status 0 if so.
"""

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from compare_runs import differences, files  # noqa: E402

from rnorm.checkpoints import load  # noqa: E402
from rnorm.files import Damaged  # noqa: E402


def demo() -> list[str]:
    """The arguments with which the Makefile's `demo` calls experiments.py, but for --results_dir."""
    settings = re.search(r"^DEMO = (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)[1]
    return [*settings.split(), "--keep", "last", "--device", "cpu"]


def start(study: list[str], results: Path) -> subprocess.Popen:
    command = [sys.executable, "-u", REPOSITORY / "experiments.py", *study, "--results_dir", results]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def complete(study: list[str], results: Path) -> tuple[float, float]:
    """Run a study to its end; returns the seconds until it had started, and until its end."""
    began = time.monotonic()
    process = start(study, results)
    lines = [process.stdout.readline()]
    started = time.monotonic() - began
    lines += process.stdout
    if process.wait():
        sys.exit(f"the study ended with status {process.returncode}:\n{''.join(lines)}")
    return started, time.monotonic() - began


def damaged(results: Path) -> list[str]:
    """Files under their final names that do not load."""
    bad = []
    for path in [*results.rglob("*.pyT"), *results.rglob("*.hist")]:
        try:
            load(path)
        except Damaged as damage:
            bad.append(f"{path}: {damage}")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--work", type=Path, help="where the runs lie (default: a temporary directory)")
    parser.add_argument("study", nargs="*", default=demo(), help="arguments of experiments.py")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="kill_demo"))
    moments = random.Random(args.seed)
    undisturbed, results = work / "undisturbed", work / "killed"
    startup, seconds = complete(args.study, undisturbed)
    print(f"undisturbed: {seconds:.0f} s, of which {startup:.0f} s to start", flush=True)

    kills = in_training = in_write = runs = 0
    problems = []

    def compare() -> None:
        nonlocal runs
        runs += 1
        problems.extend(differences(next(undisturbed.iterdir()), next(results.iterdir())))
        shutil.rmtree(results)

    while kills < args.kills:
        before = set(results.rglob("*.tmp"))
        process = start(args.study, results)
        delay = moments.uniform(0, startup + seconds / 4)
        try:
            process.communicate(timeout=delay)
            compare()
            continue
        except subprocess.TimeoutExpired:
            process.kill()
        out, _ = process.communicate()
        kills += 1
        in_training += "run:" in out
        leftovers = set(results.rglob("*.tmp")) - before
        in_write += bool(leftovers)
        problems.extend(damaged(results))
        saved = sum(1 for _ in results.rglob("*.pyT"))
        print(f"kill {kills} after {delay:.1f} s: {saved} checkpoints, {len(leftovers)} half-written files", flush=True)
    complete(args.study, results)
    compared = len(files(next(undisturbed.iterdir())))
    compare()
    if not args.work:
        shutil.rmtree(work)
    for problem in problems:
        print(problem)
    print(
        f"{kills} kills, {in_training} of them in training and {in_write} within a write, {runs} runs of {compared} "
        f"files: {'NOT ' if problems else ''}bit-identical to the undisturbed run"
    )
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
