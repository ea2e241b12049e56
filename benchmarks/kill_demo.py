"""Kill a study (kill -9) at random moments, continue it each time, and compare the end with an undisturbed run.

    python benchmarks/kill_demo.py [--kills 30] [--seed 0] [-- ARGUMENTS OF experiments.py]

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

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from compare_runs import differences, files

REPOSITORY = Path(__file__).parents[1]


def demo() -> list[str]:
    """The arguments with which the Makefile's `demo` calls experiments.py, but for --results_dir."""
    settings = re.search(r"^DEMO = (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)[1]
    return [*settings.split(), "--keep", "last", "--device", "cpu"]


def start(study: list[str], results: Path) -> subprocess.Popen:
    command = [sys.executable, REPOSITORY / "experiments.py", *study, "--results_dir", results]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def damaged(results: Path) -> list[str]:
    """Files under their final names that do not load."""
    bad = []
    for path in [*results.rglob("*.pyT"), *results.rglob("*.hist")]:
        try:
            torch.load(path, weights_only=True)
        except Exception as error:  # a damaged file has many
            bad.append(f"{path}: {error}")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("study", nargs="*", default=demo(), help="arguments of experiments.py")
    args = parser.parse_args()
    moments, work = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="kill_demo"))
    undisturbed, results = work / "undisturbed", work / "killed"
    began = time.monotonic()
    if start(args.study, undisturbed).wait():
        return 1
    seconds = time.monotonic() - began
    print(f"undisturbed: {seconds:.0f} s", flush=True)

    kills, runs, problems = 0, 0, []
    while kills < args.kills or runs == 0 or results.exists():
        process = start(args.study, results)
        delay = moments.uniform(0, seconds / 2) if kills < args.kills else None
        try:
            process.wait(timeout=delay)
            runs += 1
            problems += differences(next(undisturbed.iterdir()), next(results.iterdir()))
            shutil.rmtree(results)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            problems += damaged(results)
            print(f"kill {kills} after {delay:.1f} s: {len([*results.rglob('*.pyT')])} checkpoints", flush=True)
    compared = len(files(next(undisturbed.iterdir())))
    shutil.rmtree(work)
    print(*problems, sep="\n", end="")
    identical = "NOT bit-identical" if problems else "bit-identical"
    print(f"{kills} kills, {runs} runs of {compared} files: {identical} to the undisturbed run")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
