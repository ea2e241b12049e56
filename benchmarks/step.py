"""One training step of the study's networks beside every other way to compute it, and beside the hardware's floor.

    make bench                                                   all of it, on the CPU
    python benchmarks/step.py --rounds 3 --skip broadcast        a first look, in a minute
    python benchmarks/step.py --device cuda --precision tf32     on a GPU; not yet run on one

A step is forward, backward and SGD on one batch of 250 images. benchmarks/README.md says how it is checked and timed.
Memory, on CUDA, is the peak of what torch allocates for two steps, weights included. JAX and tf-keras are optional
(requirements.txt).
"""

import argparse
import contextlib
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

from models import skinnyprime
from peers import IMAGE, LR, Broadcast, Unavailable, Unfold, autograd_step, jax_step, keras_step, with_layers
from rnorm.conversions import untie
from rnorm.devices import pick_device, set_precision
from rnorm.fast import streamline
from rnorm.layers import LocallyConnected2d, layer_shapes
from train import SGD, make_step

BATCH = 250


def channels_last_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Callable:
    net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return autograd_step(net, x, y)


def training_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Callable:
    """`train.sgd_step` of the streamlined network, on CUDA as a graph."""
    net = net.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)  # as data.py holds the images
    step = make_step(streamline(net, IMAGE), SGD(net, [LR] * len(list(net.parameters())), LR), BATCH)
    return lambda: step(x, y).item


OURS = ": as training takes it"
# name: (network, step); a step is built from the network, which it may use up, and a batch
STEPS = {
    "eLCN: broadcast product and sum": ("eLCN", with_layers(Broadcast)),
    "eLCN: JAX `conv_general_dilated_local`, jitted": ("eLCN", jax_step),
    "eLCN: Keras 2 `LocallyConnected2D(implementation=1)`": ("eLCN", keras_step),
    "eLCN: PyTorch unfold + `baddbmm`": ("eLCN", with_layers(Unfold)),
    "eLCN: `LocallyConnected2d` in any network": ("eLCN", autograd_step),
    "eLCN" + OURS: ("eLCN", training_step),
    "CNN: PyTorch": ("CNN", autograd_step),
    "CNN: PyTorch, channels_last": ("CNN", channels_last_step),
    "CNN" + OURS: ("CNN", training_step),
}


def inputs(device: torch.device, network: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """(the network, images, labels), the same in every call."""
    torch.manual_seed(0)
    cnn = skinnyprime()
    x, y = torch.randn(BATCH, *IMAGE), torch.randint(10, (BATCH,))
    net = cnn if network == "CNN" else untie(cnn, IMAGE)
    return net.to(device), x.to(device), y.to(device)


def build(name: str, device: torch.device) -> Callable:
    """The implementation's step; raises Unavailable if it cannot run here."""
    network, make = STEPS[name]
    if "broadcast" in name:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what torch keeps from implementations before would not count as free
            free, _ = torch.cuda.mem_get_info()
        else:
            free = 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
        if free < 16e9:
            raise Unavailable("less than the 16 GB of memory free that it needs")
    return make(*inputs(device, network))


def check(name: str, device: torch.device) -> None:
    """Raises Unavailable unless the loss, and the loss after one step, are those of plain PyTorch in float64."""
    network = STEPS[name][0]
    net, x, y = inputs(device, network)
    reference = (autograd_step if network == "CNN" else with_layers(Unfold))(net.double(), x.double(), y)
    step = build(name, device)
    (first, second), losses = ([step()() for _ in range(2)] for step in (reference, step))
    if not max(abs(losses[0] - first), abs(losses[1] - second)) < 1e-2 * (first - second):
        raise Unavailable(f"computes something else: losses {losses} instead of {[first, second]}")


def seconds(step: Callable, at_least: float = 0.3) -> float:
    """Seconds per call, of as many calls in a row as take `at_least` seconds, after one that is not counted."""
    start = time.perf_counter()
    step()()
    once = time.perf_counter() - start
    if once > 2:  # nothing to settle
        return once
    calls, start = max(1, round(at_least / once)), time.perf_counter()
    for _ in range(calls):
        wait = step()
    wait()
    return (time.perf_counter() - start) / calls


def ceilings(device: torch.device) -> tuple[float, float]:
    """(floating-point operations per second of a matrix product, bytes per second of a copy) of the device."""
    n = 8192 if device.type == "cuda" else 2048
    a, b, c = (torch.randn(n, n, device=device) for _ in range(3))
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)

    def product() -> Callable:
        torch.mm(a, b, out=c)
        return c[0, 0].item

    def copy() -> Callable:
        target.copy_(source)
        return target[0].item

    return 2 * n**3 / seconds(product), 8 * source.numel() / seconds(copy)


def floors(net: nn.Sequential, flop_rate: float, bandwidth: float) -> tuple[float, float]:
    """Seconds that one step's arithmetic takes, and its bytes: weights read twice and written once, inputs read twice.

    For the eLCN. The CNN has the same arithmetic, and next to no weights.
    """
    shapes, flop, inputs = layer_shapes(net, IMAGE), 0, 0
    for i, layer in enumerate(net):
        if isinstance(layer, LocallyConnected2d | nn.Linear):
            flop += 2 * layer.weight.numel() * (3 if flop else 2)  # the images need no gradient
            inputs += math.prod(shapes[i])
    moved = 4 * (3 * sum(p.numel() for p in net.parameters()) + 2 * BATCH * inputs)
    return BATCH * flop / flop_rate, moved / bandwidth


def machine(device: torch.device) -> str:
    """What a result has to say about where it comes from."""
    cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text()).group(1)
    gpu = f", {torch.cuda.get_device_name()}" if device.type == "cuda" else ""
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "jax", "tensorflow", "tf-keras"):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    threads = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads of {os.cpu_count()}"
    when = f"{date.today()}; load before {os.getloadavg()[0]:.1f}"
    command = shlex.join(["python", *sys.argv])
    return f"{cpu} ({threads}){gpu}; {', '.join(versions)}; {when}\n\n    {command}\n"


def spread(values: list[float]) -> str:
    """The median, and the smallest and the largest: two columns of a table."""
    return f"{statistics.median(values):.3g} | {min(values):.3g} .. {max(values):.3g}"


@contextlib.contextmanager
def reasons_noted(name: str, steps: dict[str, Callable], notes: dict[str, str]) -> Iterator[None]:
    """An implementation that is unavailable or runs out of memory within this context is left out from then on."""
    try:
        yield
    except Unavailable as reason:
        notes[name] = str(reason)
    except Exception as error:  # JAX and TensorFlow have errors of their own
        if not re.search("out of memory|RESOURCE_EXHAUSTED|OOM when|DefaultCPUAllocator", str(error), re.IGNORECASE):
            raise
        notes[name] = "out of memory"
        steps.pop(name, None)


def prepare(skip: list[str], device: torch.device, precision: str) -> tuple[dict[str, Callable], dict[str, str]]:
    """The checked implementations whose names have no word of `skip`, and of each the memory, or what is amiss."""
    steps, notes, cuda = {}, {}, device.type == "cuda"
    for name in [name for name in STEPS if not any(word.lower() in name.lower() for word in skip)]:
        with reasons_noted(name, steps, notes):
            set_precision("float32")
            check(name, device)
            set_precision(precision)
            before = torch.cuda.memory_allocated() if cuda else 0
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            step = steps[name] = build(name, device)
            step()()  # compiles, captures
            step()()
            notes[name] = f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.2f} GB" if cuda else ""
    return steps, notes


def measure(
    steps: dict[str, Callable], notes: dict[str, str], rounds: int, slow_rounds: int, device: torch.device
) -> list[dict[str, float]]:
    """For each round the ceilings, the floors and every step's seconds, by name."""
    net, results = inputs(torch.device("cpu"), "eLCN")[0], []
    for i in range(rounds):
        rate, bandwidth = ceilings(device)
        arithmetic, traffic = floors(net, rate, bandwidth)
        now = {"rate": rate, "bandwidth": bandwidth, "arithmetic": arithmetic, "traffic": traffic}
        for name in list(steps):
            if i < slow_rounds or min(r[name] for r in results if name in r) < 2:
                with reasons_noted(name, steps, notes):
                    now[name] = seconds(steps[name])
        results.append(now)
    return results


def print_table(notes: dict[str, str], results: list[dict[str, float]], cuda: bool) -> None:
    """Ratios; on CUDA also times, which on the CPUs of a shared machine mean little."""
    print(f"| one step, batch {BATCH} | times the floor | min .. max | times ours | memory |{' ms | |' * cuda}")
    print(f"|{' --- |' * (7 if cuda else 5)}")
    floors = {"arithmetic": "floor: arithmetic at the rate of a matrix product", "traffic": "floor: bytes of the eLCN"}
    for name in [*notes, *floors]:
        there, ours = [r for r in results if name in r], name.split(":")[0] + OURS
        if not there:
            print(f"| {name} | {notes[name]} | | | |{' | |' * cuda}")
            continue
        to_ours = [r[name] / r[ours] for r in there if ours in r]
        times_ours = f"{statistics.median(to_ours):.3g}" if to_ours else ""
        ratios = spread([r[name] / max(r["arithmetic"], r["traffic"]) for r in there])
        times = f" {spread([1e3 * r[name] for r in there])} |" * cuda
        print(f"| {floors.get(name, name)} | {ratios} | {times_ours} | {notes.get(name, '')} |{times}")
    rate, bandwidth = (statistics.median(r[key] for r in results) / 1e9 for key in ("rate", "bandwidth"))
    print(f"\nThe matrix product runs at {rate:.0f} GFLOP/s, the copy at {bandwidth:.1f} GB/s.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="(default: 15)")
    parser.add_argument("--slow_rounds", type=int, default=2, help="rounds of steps over 2 seconds (default: 2)")
    parser.add_argument("--skip", nargs="+", default=[], metavar="WORD", help="leave out rows with these words")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("float32", "tf32"), default="float32", help="on CUDA")
    args = parser.parse_args()
    device = pick_device(args.device)
    print(machine(device), flush=True)
    steps, notes = prepare(args.skip, device, args.precision)
    results = measure(steps, notes, args.rounds, args.slow_rounds, device)
    print_table(notes, results, device.type == "cuda")


if __name__ == "__main__":
    main()
