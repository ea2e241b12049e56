"""Whether two runs are bit-identical: `python compare_runs.py RUN RUN` lists the differences."""

import sys
from pathlib import Path

import torch


def files(run: Path) -> set[Path]:
    """What the comparison is about: everything but the locks, the two .json files, and damaged files set aside."""
    paths = {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
    return {p for p in paths if p.suffix not in (".lock", ".json") and p.name != ".lock" and ".damaged" not in p.name}


def states(run: Path) -> dict[Path, tuple[int, int]]:
    """What tells whether a file of the run was written anew."""
    return {path: ((run / path).stat().st_mtime_ns, (run / path).stat().st_ino) for path in files(run)}


def equal(a: object, b: object) -> bool:
    """Equal types, keys, lengths, numbers and tensors, in which NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(1e30), b.nan_to_num(1e30))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


def differences(a: Path, b: Path) -> list[str]:
    """The names of files that only one of two runs has, or whose contents are not equal; none if bit-identical."""
    unequal = files(a) ^ files(b)
    for path in files(a) & files(b):
        try:
            contents = [torch.load(run / path, map_location="cpu", weights_only=True) for run in (a, b)]
        except Exception:  # one is damaged
            contents = 0, 1
        if not equal(*contents):
            unequal.add(path)
    return sorted(map(str, unequal))


if __name__ == "__main__":
    found = differences(*map(Path, sys.argv[1:3]))
    print("\n".join(found) or "bit-identical")
    sys.exit(bool(found))
