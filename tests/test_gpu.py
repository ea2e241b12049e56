"""What a GPU promises: the numbers of the CPU, graphs that change nothing, runs that repeat bit for bit.

`pytest -m cuda` runs these tests, and those of the layer and the step, on a GPU. Else they run on the CPU, with a small
network and a mocked graph.
"""

import contextlib
import copy
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu import start_study
from compare_runs import differences
from models import skinnyprime
from rnorm import fast
from rnorm.conversions import find_conversion, layers_of
from rnorm.devices import set_precision
from rnorm.fast import Step
from rnorm.measure import evaluate
from small_study import small_cnn
from test_fast import IMAGE, batches, untied
from test_layers import DEVICES, GPU, close, of_the_definition

ROOT = Path(__file__).parents[1]
LARGE = pytest.param("cuda", skinnyprime, 250, marks=GPU.marks)


@pytest.fixture(autouse=True)
def as_in_a_run():
    """No TF32, and deterministic algorithms."""
    set_precision("float32")


@pytest.mark.parametrize("name", ["cnn", "lc", "lc5", "fc", "tied"])
@pytest.mark.parametrize("device, make, size", [("cpu", small_cnn, 25), LARGE])
def test_steps_of_every_conversion_in_float32_are_those_of_float64_on_the_cpu(name, device, make, size):
    torch.manual_seed(0)
    model, found = make(), find_conversion(name)
    start = layers_of(found.convert(model, IMAGE))
    rates = found.rates(start, IMAGE, 0.5)
    exact, net = of_the_definition(start).double(), copy.deepcopy(start).to(device)
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(exact.parameters(), rates)])
    step, total = Step(net, IMAGE, rates, size), 0.0
    for _ in range(3):
        x, y = torch.randn(size, *IMAGE), torch.randint(10, (size,))
        step(x.to(device), y.to(device))
        optimizer.zero_grad()
        loss = F.cross_entropy(exact(x.double()), y)
        loss.backward()
        optimizer.step()
        total += loss.item()
    assert step.take_loss() == pytest.approx(total, rel=1e-5)
    for old, new, expected in zip(start.parameters(), net.cpu().parameters(), exact.parameters()):
        change = expected - old
        assert change.norm() > 0 and (new - expected).norm() <= 1e-2 * change.norm()  # small beside float32's steps


class Waits(nn.Module):
    """A layer that waits for the device, which no graph can record."""

    def forward(self, x):
        x.sum().item()
        return x


def drawing(*layers):
    """A CNN in which a step changes all that it can: weights, buffers, the random state."""
    torch.manual_seed(0)
    start = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten()
    return nn.Sequential(*start, nn.Dropout(), *layers, nn.Linear(196, 10)).double()


@contextlib.contextmanager
def graphs(device, failing=False):
    """Within it `Step` captures graphs, on the CPU too.

    There a capture takes the step that it should only record, and a replay takes that step again. If `failing`, a
    capture ends as if a layer had waited for the device.
    """

    @contextlib.contextmanager
    def record(graph):
        yield
        if failing:
            raise RuntimeError("a layer waits, and this stream is capturing\nFor debugging consider ...")

    def capture(step, x, y):
        graph = original(step, x, y)
        if graph:
            graph.replay = lambda: step._eager(step.x, step.y)
        return graph

    if device == "cuda":
        yield
        return
    original = Step._capture
    names = ("Stream", "stream", "current_stream", "default_generators", "get_rng_state", "set_rng_state")
    mocks = {name: MagicMock() for name in names} | {"graph": record, "CUDAGraph": SimpleNamespace}
    cuda = patch.multiple(torch.cuda, **mocks)
    with cuda, patch.object(Step, "_capture", capture), patch.object(torch.Tensor, "is_cuda", True):
        yield


def train_in_turn(nets, device, graph=True):
    """(state dicts, losses) of networks that take a batch each, in turn, and are evaluated and saved in between.

    The first batch, before a graph is captured, and the last are short. `graph` is whether there has to be one.
    """
    nets = [copy.deepcopy(net).to(device) for net in nets]
    steps = [Step(net, IMAGE, 0.05, batch_size=8) for net in nets]
    torch.manual_seed(1)
    whole = list(batches(device))
    for x, y in [whole[-1], *whole]:
        for net, step in zip(nets, steps):
            step(x, y)
            data = SimpleNamespace(x_train=x, y_train=y, x_test=x, y_test=y, num_classes=10, image_shape=IMAGE)
            evaluate(net, step.net, data)
            torch.save(net.state_dict(), io.BytesIO())
    assert all(torch.equal(x, before) for (x, _), (before, _) in zip(whole, batches(device)))
    assert all(step.captures == graph and (step.graph is not None) == graph for step in steps)
    return [net.cpu().state_dict() for net in nets], [step.take_loss() for step in steps]


def train_without_graphs(nets, device):
    with patch.object(Step, "_capture", lambda step, x, y: setattr(step, "captures", False)):
        return train_in_turn(nets, device, graph=False)


def assert_equal(results, expected, device):
    """Both as `train_in_turn` returns them; on the CPU every bit is the same."""
    for got, wanted in zip(results[0], expected[0]):
        assert all(close(got[name], wanted[name], 0 if device == "cpu" else 1e-10) for name in wanted)
    assert results[1] == pytest.approx(expected[1], rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_replays_of_two_networks_in_turn_are_the_steps_themselves(device):
    nets = [drawing(), untied(drawing(), IMAGE)]
    expected = train_without_graphs(nets, device)
    with graphs(device):
        assert_equal(train_in_turn(nets, device), expected, device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_network_with_dropout_is_the_uninterrupted_one(device):
    """It goes on with its weights, buffers and random state, and captures anew."""
    random = torch.cuda if device == "cuda" else torch
    whole, (x, y) = drawing().to(device), next(batches(device))
    with graphs(device):
        step = Step(whole, IMAGE, 0.05, batch_size=8)
        step(x, y)
        resumed, state = copy.deepcopy(whole), random.get_rng_state()
        step(x, y)
        random.set_rng_state(state)
        Step(resumed, IMAGE, 0.05, batch_size=8)(x, y)
        assert step.graph is not None
    assert all(torch.equal(*both) for both in zip(whole.state_dict().values(), resumed.state_dict().values()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("why", ["RNORM_CUDA_GRAPH=0", "ROCm 6.4", "captur"])
def test_where_there_can_be_no_graph_training_goes_on_and_says_so_once(device, why, monkeypatch, capfd):
    fast._say_once.cache_clear()
    nets = [drawing(Waits()), untied(drawing(Waits()), IMAGE)]
    expected = train_without_graphs(nets, device)
    if "RNORM" in why:
        monkeypatch.setenv(*why.split("="))
    elif "ROCm" in why:
        monkeypatch.setattr(torch.version, "hip", "6.4")
    with graphs(device, failing=why == "captur"):
        assert_equal(train_in_turn(nets, device, graph=False), expected, device)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("steps are computed without a CUDA graph: ") and why in line


def test_all_graphs_are_warmed_up_on_one_stream():
    with graphs("cpu"):
        train_in_turn([drawing(), drawing()], "cpu")
        assert torch.cuda.Stream.call_count <= 1


ON_GPU = [pytest.param(("cuda", network), marks=GPU.marks) for network in ("skinnyprime", "alexnetprime")]
STUDIES = [("cpu", "small"), *ON_GPU]


def start(device, network, results):
    """Start a study of a CNN and an eLCN; with alexnetprime, one that draws random numbers."""
    return start_study(
        "experiments.py", "--dataset", "synthetic", "--data_size", 500, "--network", network, "--device", device,
        "--epochs", 12, "--splits", 1, "--keep", "last", "--results_dir", results,
    )  # fmt: skip


@pytest.fixture(scope="module", params=STUDIES)
def study(request, tmp_path_factory):
    """(device, network, the two runs of a study that nothing happened to)"""
    results = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    assert [process.wait() for process in [start(*request.param, path) for path in results]] == [0, 0]
    return *request.param, [next(path.iterdir()) for path in results]


def test_a_study_repeats_bit_for_bit_and_its_checkpoints_load_where_there_is_no_gpu(study):
    _, _, (first, second) = study
    assert differences(first, second) == []
    for path in first.rglob("*.pyT"):
        assert {weight.device.type for weight in torch.load(path, weights_only=True)["weights"].values()} == {"cpu"}


def test_so_does_one_that_is_killed_and_stopped_and_continued(study, tmp_path):
    device, network, (undisturbed, _) = study
    for number, there in ((signal.SIGKILL, "*_1.pyT"), (signal.SIGTERM, "*_lc_version_1/evaluation-history.hist")):
        process = start(device, network, tmp_path)
        while process.poll() is None and not any(tmp_path.rglob(there)):
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait() in (-number, 128 + number)
    assert start(device, network, tmp_path).wait() == 0
    assert differences(undisturbed, next(tmp_path.iterdir())) == []


PRETENDED = """
import os, sys, pytest, torch
torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_where_there_is_a_gpu_the_tests_of_cuda_run_if_asked_for():
    """They are collected, and skipped or not, with a GPU pretended; nothing is computed. No other test sees a GPU."""
    command = [sys.executable, "-c", PRETENDED, "-m", "cuda", "--setup-plan", "-rs"]
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0
    for test in ("test_layers.py::test_first", "test_fast.py::test_six_steps", "test_gpu.py::test_a_study_repeats"):
        assert f"tests/{test}" in run.stdout
    assert "SKIPPED" not in run.stdout
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
