"""One training step of the study's networks beside every other way to compute it, and beside the hardware's floor.

    make bench                                                       all of it, on the CPU
    python benchmarks/step.py --rounds 3 --skip broadcast --no_memory    a first look, in a minute
    python benchmarks/step.py --device cuda --precision tf32         on a GPU; not yet run on one

A step is forward, backward and SGD on one batch of 250 images. Before anything is timed, every implementation starts
from the same weights, takes three steps and has to meet the reference's losses. Then rounds: in each, the machine's
own matrix product and every implementation, one after another, so that all see the same machine. Ratios are taken
within a round; medians over the rounds are printed, with the smallest and the largest. Memory is the peak of a fresh
process that holds the whole data set and takes two steps (on CUDA what torch allocated), the data set not counted.
JAX and tf-keras are optional: pip install -r benchmarks/requirements.txt
"""

import argparse
import contextlib
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert import untie
from fast import Step, streamline
from measure import training_flop, weighted_layers
from models import LocallyConnected2d, layer_shapes, skinnyprime
from train import pick_device, set_precision

IMAGE, BATCH, LR, DATASET = (3, 32, 32), 250, 0.05, 50_000


class Unavailable(Exception):
    """An implementation that cannot be measured here; the message says why."""


class Broadcast(nn.Module):
    """The approach of the released code: multiply patches and filters, broadcast against each other, and sum."""

    def __init__(self, layer: LocallyConnected2d):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(p.detach().clone().contiguous()) for p in (layer.weight, layer.bias))
        self.kernel, self.stride = layer.kernel_size, layer.stride

    def forward(self, x: Tensor) -> Tensor:
        x = x.unfold(2, self.kernel[0], self.stride[0]).unfold(3, self.kernel[1], self.stride[1])
        return (x.flatten(4)[:, None] * self.weight).sum((2, -1)) + self.bias  # product: (N, C_out, C_in, H, W, k * k)


class Unfold(nn.Module):
    """What a PyTorch user would write: F.unfold, then one batched product over the positions."""

    def __init__(self, layer: LocallyConnected2d):
        super().__init__()
        weight = layer.weight.detach()[0].permute(2, 3, 1, 4, 0)  # (H_out, W_out, C_in, k * k, C_out)
        self.weight = nn.Parameter(weight.flatten(2, 3).flatten(0, 1).contiguous())
        self.bias = nn.Parameter(layer.bias.detach()[0].flatten(1).T[:, None].contiguous())  # (H_out * W_out, 1, C_out)
        self.kernel, self.stride, self.size = layer.kernel_size, layer.stride, layer.output_size

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, self.kernel, stride=self.stride).permute(2, 0, 1)  # (H_out * W_out, N, C_in * k * k)
        return torch.baddbmm(self.bias, patches, self.weight).permute(1, 2, 0).unflatten(2, self.size)


def with_layers(make: Callable) -> Callable:
    """A step of the eLCN with other locally connected layers."""
    return lambda net, x, y: autograd_step(
        nn.Sequential(*[make(m) if isinstance(m, LocallyConnected2d) else m for m in net]), x, y
    )


def autograd_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Callable:
    """A step of plain PyTorch; it returns what waits for the loss."""
    optimizer = torch.optim.SGD(net.parameters(), LR)

    def step() -> Callable[[], float]:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        return loss.item

    return step


def streamlined_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Callable:
    return autograd_step(streamline(net, IMAGE), x, y)


def channels_last_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Callable:
    channels_last = torch.channels_last
    return autograd_step(net.to(memory_format=channels_last), x.contiguous(memory_format=channels_last), y)


def training_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Callable:
    net, step = net.to(memory_format=torch.channels_last), Step(net, IMAGE, LR)
    x = x.contiguous(memory_format=torch.channels_last)  # as data.py holds the images

    def take() -> Callable[[], float]:
        step(x, y)
        return step.take_loss

    return take


def jax_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Callable:
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        raise Unavailable("JAX is not installed") from None
    if jax.default_backend() != ("gpu" if x.is_cuda else "cpu"):
        raise Unavailable(f"this JAX computes on {jax.default_backend()} only")
    convs, dense = [m for m in net if isinstance(m, LocallyConnected2d)], net[-1]
    paddings = [m.padding[0] for m in net if isinstance(m, nn.ZeroPad2d)]
    values = [(m.weight[0].permute(0, 1, 4, 2, 3).flatten(1, 2), m.bias) for m in convs]  # (C_out, C_in k k, H, W)
    values = [tuple(jnp.array(p.detach().cpu().numpy()) for p in v) for v in (*values, (dense.weight.T, dense.bias))]
    images, labels = jnp.array(x.cpu().numpy()), jnp.array(y.cpu().numpy())

    def loss(values: list) -> "jax.Array":
        h = images
        for (weight, bias), m, p in zip(values, convs, paddings):
            h = jax.lax.conv_general_dilated_local(h, weight, m.stride, [(p, p), (p, p)], m.kernel_size) + bias
            h = jax.nn.relu(h)
            h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), "VALID")
        logits = jax.nn.log_softmax(h.reshape(len(h), -1) @ values[-1][0] + values[-1][1])
        return -jnp.take_along_axis(logits, labels[:, None], 1).mean()

    @jax.jit
    def update(values: list) -> tuple:
        value, gradients = jax.value_and_grad(loss)(values)
        return value, jax.tree.map(lambda v, g: v - LR * g, values, gradients)

    def step() -> Callable[[], float]:
        nonlocal values
        value, values = update(values)
        return lambda: float(jax.block_until_ready((value, values))[0])

    return step


def keras_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Callable:
    try:
        import tensorflow as tf
        import tf_keras as keras
    except ImportError:
        raise Unavailable("tf-keras is not installed") from None
    if x.is_cuda and not tf.config.list_physical_devices("GPU"):
        raise Unavailable("this TensorFlow finds no GPU")
    layers, weights = [], []
    for m in net:
        if isinstance(m, nn.ZeroPad2d):
            layers.append(keras.layers.ZeroPadding2D(m.padding[0]))
        elif isinstance(m, LocallyConnected2d):
            layers.append(keras.layers.LocallyConnected2D(m.out_channels, m.kernel_size, m.stride, implementation=1))
            weights.append(m.weight[0].permute(2, 3, 4, 1, 0).flatten(2, 3).flatten(0, 1))  # (H W, k k C_in, C_out)
            weights.append(m.bias[0].permute(1, 2, 0))
        elif isinstance(m, nn.Linear):
            layers.append(keras.layers.Dense(m.out_features))
            weights += [m.weight.T, m.bias]
        else:
            layers.append({nn.ReLU: keras.layers.ReLU(), nn.Flatten: keras.layers.Flatten(),
                           nn.MaxPool2d: keras.layers.MaxPool2D(3, 2)}[type(m)])  # fmt: skip
    model = keras.Sequential([keras.Input((*IMAGE[1:], IMAGE[0])), *layers])
    model.set_weights([w.detach().cpu().numpy() for w in weights])
    images, labels = tf.constant(x.permute(0, 2, 3, 1).cpu().numpy()), tf.constant(y.cpu().numpy())
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(LR)
    optimizer.build(model.trainable_variables)

    @tf.function
    def update() -> "tf.Tensor":
        with tf.GradientTape() as tape:
            loss = cross_entropy(labels, model(images, training=True))
        optimizer.apply_gradients(zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables))
        return loss

    def step() -> Callable[[], float]:
        value = update()
        return lambda: float(value)

    return step


OURS = ": as training takes it (`fast.Step`)"
# name: (network, step); a step is built from the network, which it may use up, and a batch
STEPS = {
    "eLCN: broadcast product and sum": ("eLCN", with_layers(Broadcast)),
    "eLCN: JAX `conv_general_dilated_local`, jitted": ("eLCN", jax_step),
    "eLCN: Keras 2 `LocallyConnected2D(implementation=1)`": ("eLCN", keras_step),
    "eLCN: PyTorch unfold + `baddbmm`": ("eLCN", with_layers(Unfold)),
    "eLCN: `LocallyConnected2d` in any network": ("eLCN", autograd_step),
    "eLCN: the same, streamlined": ("eLCN", streamlined_step),
    "eLCN" + OURS: ("eLCN", training_step),
    "CNN: PyTorch": ("CNN", autograd_step),
    "CNN: PyTorch, channels_last": ("CNN", channels_last_step),
    "CNN" + OURS: ("CNN", training_step),
}


def inputs(device: torch.device, network: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """(the network, images, labels), the same in every call."""
    torch.manual_seed(0)
    cnn = skinnyprime().net
    x, y = torch.randn(BATCH, *IMAGE), torch.randint(10, (BATCH,))
    net = cnn if network == "CNN" else untie(cnn, IMAGE)
    return net.to(device), x.to(device), y.to(device)


def build(name: str, device: torch.device) -> Callable:
    """The implementation's step; raises Unavailable if it cannot run here."""
    network, make = STEPS[name]
    if "broadcast" in name:
        meminfo = Path("/proc/meminfo").read_text()
        free = 1024 * int(re.search(r"MemAvailable: *(\d+)", meminfo).group(1))
        if (torch.cuda.mem_get_info()[0] if device.type == "cuda" else free) < 16e9:
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
    calls = max(1, round(at_least / once))
    start = time.perf_counter()
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
    shapes = layer_shapes(net, IMAGE)
    read = sum(math.prod(shapes[i]) for i, _, _ in weighted_layers(net, IMAGE))
    moved = 4 * (3 * sum(p.numel() for p in net.parameters()) + 2 * BATCH * read)
    return BATCH * training_flop(net, IMAGE) / flop_rate, moved / bandwidth


def peak_memory(name: str, device: torch.device) -> int:
    """Peak memory in bytes of this process, which should be a fresh one, without the data set."""
    data = torch.ones(DATASET, *IMAGE)
    step = build(name, device)
    for _ in range(2):
        step()()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # not getrusage's ru_maxrss, which a process inherits from the one that started it
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text()).group(1)) - data.nbytes


def peak_memory_of_process(name: str, device: torch.device) -> str:
    command = [sys.executable, __file__, "--device", device.type, "--memory_of", name]
    result = subprocess.run(command, capture_output=True, text=True)
    return f"{int(result.stdout.split()[-1]) / 1e9:.2f} GB" if result.returncode == 0 else "not measured"


def machine(device: torch.device) -> str:
    """What a result has to say about where it comes from."""
    cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text()).group(1)
    gpu = f", {torch.cuda.get_device_name()}" if device.type == "cuda" else ""
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "jax", "tensorflow", "tf-keras"):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return (
        f"{cpu} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads of {os.cpu_count()}, "
        f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB{gpu}; {', '.join(versions)}; "
        f"{date.today()}; load before {os.getloadavg()[0]:.1f}\n\n    {shlex.join(['python', *sys.argv])}\n"
    )


def spread(values: list[float]) -> str:
    """The median, and the smallest and the largest, as two columns of a table."""
    return f"{statistics.median(values):.3g} | {min(values):.3g} .. {max(values):.3g}"


def prepare(skip: list[str], device: torch.device, precision: str) -> tuple[dict[str, Callable], dict[str, str]]:
    """The checked implementations whose names have no word of `skip`, and why others are missing."""
    steps, missing = {}, {}
    for name in STEPS:
        if not any(word.lower() in name.lower() for word in skip):
            try:
                set_precision("float32")
                check(name, device)
                set_precision(precision)
                steps[name] = build(name, device)
                steps[name]()()  # compiles, captures
                print(f"computes what it should: {name}", file=sys.stderr)
            except Unavailable as reason:
                missing[name] = str(reason)
    return steps, missing


def measure(steps: dict[str, Callable], rounds: int, slow_rounds: int, device: torch.device) -> list[dict[str, float]]:
    """For each round the ceilings, the floors and every step's seconds, by name."""
    net, results = inputs(torch.device("cpu"), "eLCN")[0], []
    for i in range(rounds):
        print(f"round {i + 1} of {rounds}", file=sys.stderr)
        rate, bandwidth = ceilings(device)
        arithmetic, traffic = floors(net, rate, bandwidth)
        now = {"rate": rate, "bandwidth": bandwidth, "arithmetic": arithmetic, "traffic": traffic}
        fast = [name for name in steps if i < slow_rounds or min(r[name] for r in results if name in r) < 2]
        now |= {name: seconds(steps[name]) for name in fast}
        results.append(now)
    return results


def print_table(steps: dict, missing: dict, results: list[dict[str, float]], memory_of: Callable[[str], str]) -> None:
    print(f"| one step, batch {BATCH} | ms | min .. max | times the floor | min .. max | times ours | peak memory |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, reason in missing.items():
        print(f"| {name} | {reason} | | | | | |")
    for name in steps:
        there, ours = [r for r in results if name in r], name.split(":")[0] + OURS
        ratios = [r[name] / max(r["arithmetic"], r["traffic"]) for r in there]
        to_ours = [r[name] / r[ours] for r in there if ours in r]
        times_ours = f"{statistics.median(to_ours):.3g}" if to_ours else ""
        columns = [spread([1e3 * r[name] for r in there]), spread(ratios), times_ours, memory_of(name)]
        print(f"| {name} | {' | '.join(columns)} |", flush=True)
    for key, text in (("arithmetic", "arithmetic at the rate of a matrix product"), ("traffic", "bytes of the eLCN")):
        print(f"| floor: {text} | {spread([1e3 * r[key] for r in results])} | | | | |")
    rate, bandwidth = (statistics.median(r[key] for r in results) / 1e9 for key in ("rate", "bandwidth"))
    print(f"\nThe matrix product runs at {rate:.0f} GFLOP/s, the copy at {bandwidth:.1f} GB/s.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="(default: 15)")
    parser.add_argument("--slow_rounds", type=int, default=2, help="rounds of steps over 2 seconds (default: 2)")
    parser.add_argument("--skip", nargs="+", default=[], metavar="WORD", help="leave out rows with these words")
    parser.add_argument("--no_memory", action="store_true", help="do not measure memory")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("float32", "tf32"), default="float32", help="on CUDA")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.memory_of:
        print(peak_memory(args.memory_of, device))
        return
    print(machine(device), flush=True)
    steps, missing = prepare(args.skip, device, args.precision)
    results = measure(steps, args.rounds, args.slow_rounds, device)
    memory_of = (lambda name: "") if args.no_memory else lambda name: peak_memory_of_process(name, device)
    print_table(steps, missing, results, memory_of)


if __name__ == "__main__":
    main()
