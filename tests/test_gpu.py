"""What a GPU promises: the numbers of the CPU, graphs that change nothing, runs that repeat bit for bit.

`pytest -m cuda` runs the tests marked cuda, here and of the layer and the step, on a GPU; else a GPU is pretended.
"""

import copy
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu import start, start_study
from compare_runs import differences
from fake_gpu import pretended
from models import skinnyprime
from rnorm import fast
from rnorm.conversions import find_conversion
from rnorm.data import Data
from rnorm.devices import set_precision
from rnorm.fast import Captured, streamline
from rnorm.layers import LocallyConnected2d
from rnorm.measure import logits_of
from rnorm.runs import Member, Settings
from small_study import small_cnn
from train import SGD, make_step, start_cnn, train_epoch

ROOT = Path(__file__).parents[1]
IMAGE = (3, 32, 32)
REAL = os.environ.get("CUDA_VISIBLE_DEVICES") != ""  # hidden unless asked for: conftest.py
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
DECAYS = [(0, 0), (0.9, 0.05)]  # (momentum, weight decay)


@pytest.fixture(autouse=True)
def as_a_process_begins(monkeypatch):
    """No TF32, deterministic algorithms, and no capture has failed yet."""
    set_precision("float32")
    monkeypatch.setattr(Captured, "refused", "")
    if not REAL:
        monkeypatch.delenv("RNORM_CUDA_GRAPH", raising=False)
        monkeypatch.setattr(torch.version, "hip", None)


def random_batches(device, sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(n, *IMAGE, generator=generator, dtype=dtype) for n in sizes]
    return [(x.to(device), torch.randint(10, (len(x),), generator=generator).to(device)) for x in images]


@pytest.mark.parametrize("momentum, decay", DECAYS)
@pytest.mark.parametrize("name", ["cnn", "lc", "lc5", "fc", "tied"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_steps_of_every_conversion_in_float32_are_those_of_plain_torch_in_float64(name, device, momentum, decay):
    torch.manual_seed(0)
    make, size = (skinnyprime, 250) if REAL and device == "cuda" else (small_cnn, 25)
    conversion = find_conversion(name)
    begin = conversion.convert(make(), IMAGE)
    rates = conversion.rates(begin, IMAGE, 0.5)
    exact, net = copy.deepcopy(begin).double(), copy.deepcopy(begin).to(device)
    groups = [{"params": [p], "lr": r, "weight_decay": decay * 0.5 / r} for p, r in zip(exact.parameters(), rates)]
    optimizer = torch.optim.SGD(groups, momentum=momentum)
    step = make_step(streamline(net, IMAGE), SGD(net, rates, 0.5, momentum, decay), size)
    for x, y in random_batches("cpu", [size] * 3):
        optimizer.zero_grad()
        expected = F.cross_entropy(exact(x), y)
        expected.backward()
        optimizer.step()
        assert step(x.float().to(device), y.to(device)).item() == pytest.approx(expected.item(), rel=1e-5)
    for old, new, expected in zip(begin.parameters(), net.cpu().parameters(), exact.parameters()):
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
    first = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(4, 4, 2), nn.Flatten()
    return nn.Sequential(*first, nn.Dropout(), *layers, nn.Linear(144, 10)).double()


def two_networks(*layers):
    """A CNN and its eLCN, on the GPU."""
    cnn, elcn = drawing(*layers), drawing(*layers)
    elcn[0], elcn[4] = LocallyConnected2d.from_conv2d(cnn[0], 32), LocallyConnected2d.from_conv2d(cnn[4], 7)
    return cnn.to("cuda"), elcn.to("cuda")


def train_in_turn(nets, momentum=0.0, decay=0.0):
    """(whether all steps were captured, all weights and buffers, all losses), after the networks' turns at each batch.

    In between each is evaluated. The first batch, before a graph is captured, and the last are short.
    """
    sgds = [SGD(net, [0.05] * len(list(net.parameters())), 0.05, momentum, decay) for net in nets]
    fast_nets = [streamline(net, IMAGE) for net in nets]
    steps = [make_step(net, sgd, batch_size=8) for net, sgd in zip(fast_nets, sgds)]
    torch.manual_seed(1)
    batches = random_batches("cuda", [5, 8, 8, 8, 5])
    losses = []
    for (x, y), (net, step) in itertools.product(batches, zip(fast_nets, steps)):
        losses.append(step(x, y).item())
        logits_of(net, x)
    assert all(torch.equal(x, before) for (x, _), (before, _) in zip(batches, random_batches("cuda", [5, 8, 8, 8, 5])))
    tensors = [tensor.cpu() for net in nets for tensor in net.state_dict().values()]
    return all(step.graph is not None for step in steps), tensors, torch.tensor(losses)


def assert_same(results, expected, gpu):
    """On a pretended GPU bit for bit; cuBLAS may choose another algorithm within a graph."""
    for got, wanted in zip((*results[1], results[2]), (*expected[1], expected[2])):
        assert torch.equal(got, wanted) if gpu else torch.allclose(got, wanted, rtol=1e-8)


def without_graphs(monkeypatch, *arguments):
    """What `train_in_turn` returns where no step is captured."""
    with monkeypatch.context() as patch:
        patch.setattr(Captured, "refused", "a test")
        return train_in_turn(*arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("momentum, decay", DECAYS)
def test_replays_of_two_networks_in_turn_are_the_steps_themselves(momentum, decay, gpu, monkeypatch):
    expected = without_graphs(monkeypatch, two_networks(), momentum, decay)
    results = train_in_turn(two_networks(), momentum, decay)
    assert results[0] == (not fast._why_no_graph()) and not expected[0]
    assert_same(results, expected, gpu)


@pytest.mark.cuda
def test_a_resumed_network_with_dropout_is_the_uninterrupted_one():
    """It goes on with its weights, buffers, velocities and random state, and captures anew."""
    torch.manual_seed(0)
    whole = drawing().to("cuda")
    (x, y), rates = random_batches("cuda", [8])[0], [0.05] * len(list(whole.parameters()))
    sgd = SGD(whole, rates, 0.05, 0.9)
    step = make_step(whole, sgd, batch_size=8)
    step(x, y)
    resumed, saved, state = copy.deepcopy(whole), copy.deepcopy(sgd.state_dict()), torch.cuda.get_rng_state()
    step(x, y)
    torch.cuda.set_rng_state(state)
    sgd = SGD(resumed, rates, 0.05, 0.9)
    sgd.load_state_dict(saved)
    make_step(resumed, sgd, batch_size=8)(x, y)
    assert all(torch.equal(*both) for both in zip(whole.state_dict().values(), resumed.state_dict().values()))


@pytest.mark.cuda
@pytest.mark.parametrize("why", ["RNORM_CUDA_GRAPH=0", "ROCm 6.4", "captur"])
def test_where_there_can_be_no_graph_training_goes_on_and_says_so_once(why, gpu, monkeypatch, capfd):
    """After a failed capture another would fail on torch 2.6 to 2.12 whatever it is: it is tried once."""
    waits = [Waits()] if why == "captur" else []
    expected = without_graphs(monkeypatch, two_networks(*waits))
    if "RNORM" in why:
        monkeypatch.setenv(*why.split("="))
    elif "ROCm" in why:
        monkeypatch.setattr(torch.version, "hip", "6.4")
    results = train_in_turn(two_networks(*waits))
    assert not results[0]
    assert_same(results, expected, gpu)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("steps are computed without a CUDA graph: ")
    assert (fast._why_no_graph() or "captur") in line
    assert gpu is None or gpu.captures == (1 if why == "captur" else 0)


@pytest.mark.cuda
def test_an_epoch_waits_for_the_gpu_to_send_the_order_of_its_images_and_to_read_its_loss(gpu, tmp_path):
    settings = Settings(network="small", batch_size=10, shuffle=True, momentum=0.9)
    x, y = random_batches("cuda", [35], torch.float32)[0]
    data = Data(x, y, x, y, num_classes=10, sha256="")
    cnn = start_cnn(Member(tmp_path, settings), data)
    step = make_step(streamline(cnn.net, IMAGE), cnn.sgd, 10)
    train_epoch(cnn, step, data)  # captures
    before = len(gpu.waits) if gpu else 0
    train_epoch(cnn, step, data)
    assert cnn.epoch == 2
    assert gpu is None or gpu.waits[before:] == ["_to_copy", "_local_scalar_dense"]


@pytest.mark.cuda
def test_a_captured_step_follows_a_schedule_of_the_learning_rate(gpu):
    net = small_cnn().to("cuda")
    sgd = SGD(net, [0.05] * len(list(net.parameters())), 0.05)
    step = make_step(net, sgd, 8)
    for sgd.factor, (x, y) in zip((1, 1, 0, 0), random_batches("cuda", [8] * 4, torch.float32)):
        before = copy.deepcopy(net)
        step(x, y)
        assert torch.equal(before[-1].bias, net[-1].bias) == (sgd.factor == 0)
    assert gpu is None or gpu.captures == 2


def start_here(network, results):
    """Start a study of a CNN and an eLCN that draw random numbers, on the real or the pretended GPU."""
    command = [
        "experiments.py", "--dataset", "synthetic", "--data_size", 500, "--network", network, "--device", "cuda",
        "--epochs", 12, "--splits", 1, "--keep", "last", "--results_dir", results,
    ]  # fmt: skip
    return start_study(*command) if REAL else start("tests/fake_gpu.py", *command)


def wait(process):
    """A process's exit status; one that hangs is killed."""
    try:
        return process.wait(timeout=300)
    finally:
        process.kill()


@pytest.fixture(scope="module", params=["skinnyprime", "alexnetprime"] if REAL else ["dropping"])
def study(request, tmp_path_factory):
    """(network, the run of a study that nothing happened to)"""
    results = tmp_path_factory.mktemp("undisturbed")
    assert wait(start_here(request.param, results)) == 0
    return request.param, next(results.iterdir())


@pytest.mark.cuda
def test_the_checkpoints_of_a_study_load_where_there_is_no_gpu(study):
    for path in study[1].rglob("*.pyT"):
        assert {weight.device.type for weight in torch.load(path, weights_only=True)["weights"].values()} == {"cpu"}


@pytest.mark.cuda
def test_a_study_that_is_killed_and_stopped_and_continued_repeats_the_undisturbed_one_bit_for_bit(study, tmp_path):
    network, undisturbed = study
    for number, there in ((signal.SIGKILL, "*_1.pyT"), (signal.SIGTERM, "*_lc_version_1/evaluation-history.hist")):
        process = start_here(network, tmp_path)
        while process.poll() is None and not any(tmp_path.rglob(there)):
            time.sleep(0.005)
        process.send_signal(number)
        assert wait(process) in (-number, 128 + number)
    assert wait(start_here(network, tmp_path)) == 0
    assert differences(undisturbed, next(tmp_path.iterdir())) == []


def test_pytest_m_cuda_never_takes_a_pretended_gpu_for_a_real_one():
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "tests/test_gpu.py", "-k", "schedule", "-rs"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert "no GPU" in run.stdout and "passed" not in run.stdout


WRONG = {
    "an index on the CPU": lambda x: x[torch.tensor([1, 0])],
    "a mask": lambda x: x[x > 0],
    ".item()": lambda x: x * x.sum().item(),
    "a layer that waits": Waits(),
    "numbers from the host": lambda x: x * torch.tensor(2.0, device="cuda"),
    "numbers by the host": lambda x: x * x.cpu().to("cuda"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_pretended_gpu_captures_no_step_that_waits(what, capfd):
    with pretended() as gpu:
        x = torch.arange(2.0, device="cuda")
        step = Captured(lambda x, y: WRONG[what](x).sum(), 2, [])
        assert torch.equal(step(x, x).cpu(), WRONG[what](x).sum().cpu())  # eagerly
        assert gpu.captures == 1 and step.graph is None
    assert "not permitted when stream is capturing" in capfd.readouterr().err


def test_the_pretended_gpu_finds_mixed_devices_and_what_the_host_makes_within_a_capture():
    with pretended():
        x = torch.ones(2, device="cuda")
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(2)
        with pytest.raises(AssertionError, match="ones is computed on the host"):
            Captured(lambda x, y: x.sum() * len(torch.ones(3)), 2, [])(x, x)


def test_a_replay_on_the_pretended_gpu_computes_with_the_numbers_that_were_captured():
    with pretended():
        x, total, factors = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda"), [1.0]
        step = Captured(lambda x, y: total.add_(x, alpha=factors[-1]).sum(), 2, [total])
        step(x, x)
        factors.append(100.0)
        assert step(2 * x, x).item() == 2 * (1 + 2) and total.cpu().tolist() == [3, 3]
