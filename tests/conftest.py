import os
import shutil
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ["OMP_NUM_THREADS"] = "1"  # before torch loads: on busy cores, threads wait for each other

import numpy as np
import pytest
import torch
from fake_gpu import pretended
from forked import Server
from hypothesis import HealthCheck, settings

settings.register_profile(
    "the same examples in every run", derandomize="FUZZ_CASES" not in os.environ, database=None, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
settings.load_profile("the same examples in every run")


def pytest_configure(config):
    """`pytest -m cuda` computes on a GPU. From all other tests, and from what they start, GPUs are hidden.

    Nothing else that whoever runs the tests has set counts either.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
    os.environ.pop("RNORM_RESULTS", None)
    os.environ.pop("RNORM_DATA", None)
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch has not looked for them yet


@pytest.fixture(autouse=True)
def gpu(request):
    """Tests marked cuda compute on a pretended GPU, which this returns; with `pytest -m cuda` on a real one: None."""
    if not request.node.get_closest_marker("cuda"):
        yield None
    elif request.config.option.markexpr != "cuda":
        with pretended() as gpu:
            yield gpu
    elif torch.cuda.is_available():
        yield None
    else:
        pytest.skip("no GPU")


SMALL = ("--network", "small", "--device", "cpu", "--epochs", 3, "--n_splits", 2, "--batch_size", 10)
"""A study of three networks, 6 steps an epoch: the CNN, the eLCN from 1 and the eLCN from 3."""


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
def npz(data, tmp_path):
    """A copy of `data` of a test's own."""
    return Path(shutil.copy(data, tmp_path))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The path of a data set of 60 + 30 images of 3 classes."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **make_arrays())
    return path


@pytest.fixture(scope="session")
def undisturbed(server, data, tmp_path_factory):
    """The run of the study SMALL that nothing happened to."""
    results = tmp_path_factory.mktemp("undisturbed")
    assert server.run("experiments.py", *SMALL, "--dataset", data, "--results_dir", results).status == 0
    return next(results.iterdir())


@pytest.fixture
def command(data, tmp_path):
    """The command line of the study SMALL; `run_of` tells where its run lies."""
    return ["experiments.py", *SMALL, "--dataset", data, "--results_dir", tmp_path / "results"]


def run_of(command: list) -> Path:
    return next(Path(command[-1]).iterdir())


@pytest.fixture
def copy(undisturbed, command):
    """The complete run's directory, as `command` left it."""
    run = Path(command[-1]) / undisturbed.name
    shutil.copytree(undisturbed, run)
    return run
