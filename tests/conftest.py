import signal
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


@pytest.fixture(autouse=True)
def restore_signals():
    """Scripts called within a test catch signals; put the handlers back afterwards."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def make_arrays(train: int = 60, test: int = 30, classes: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """A data set of noise, a tenth of it brighter by class."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, n in (("train", train), ("test", test)):
        y = np.arange(n) % classes
        arrays[f"x_{part}"] = (rng.integers(0, 200, (n, 32, 32, 3)) + 20 * y[:, None, None, None]).astype(np.uint8)
        arrays[f"y_{part}"] = y
    return arrays


@pytest.fixture
def npz(tmp_path):
    """The path of a data set of 60 + 30 images of 3 classes."""
    path = tmp_path / "tiny.npz"
    np.savez(path, **make_arrays())
    return path
