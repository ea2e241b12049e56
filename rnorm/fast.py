"""The same network with less work: what makes a training step cost what its arithmetic costs.

`streamline` rewrites a network around its parameters; `Step` takes training steps of one network. Neither changes a
result beyond rounding (`tests/test_fast.py`); `benchmarks/README.md` has the times.
"""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnorm import layers
from rnorm.layers import Geometry, LocallyConnected2d, layer_shapes, pair


class Stage(nn.Module):
    """ZeroPad2d, Conv2d or LocallyConnected2d, ReLU and MaxPool2d as one: (N, C, H, W) to (N, C_out, H', W').

    Only the outputs that the pooling reads are computed (of skinnyprime's layer 5, 49 of 64; on a GPU, which is
    quicker with whole rows, 56), and ReLU comes after the pooling, with which it commutes, where there is a quarter of
    the data.
    """

    def __init__(self, layer: nn.Module, padding: tuple[int, int], outputs: tuple[int, int], pool: nn.Module | None,
                 relu: bool):  # fmt: skip
        super().__init__()
        self.layer, self.padding, self.outputs, self.pool, self.relu = layer, padding, outputs, pool, relu

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, LocallyConnected2d):
            rows, columns = self.outputs
            x = layer.compute(x, self.padding, (rows, columns if layers.on_cpu(x) else layer.output_size[1]))
        else:
            x = Geometry(layer.kernel_size, layer.stride, self.padding, layer.dilation, self.outputs).pad(x)
            x = F.conv2d(x, layer.weight, layer.bias, layer.stride, 0, layer.dilation)
        x = x if self.pool is None else self.pool(x)
        return x.relu() if self.relu else x


def streamline(net: nn.Sequential, image_shape: tuple[int, ...]) -> nn.Sequential:
    """The function of `net` on images of shape (C, H, W), with the same parameters and less arithmetic.

    Layers outside the pattern of `Stage` are taken over as they are, so any `nn.Sequential` may be given.
    """
    shapes = layer_shapes(net, image_shape)
    streamlined, i = [], 0
    while i < len(net):
        if type(net[i]) is nn.ZeroPad2d and min(net[i].padding) >= 0 and _untied_or_conv(net[i + 1 : i + 2]):
            zeros = net[i].padding  # left, right, top, bottom
            i += 1
        else:
            zeros = (0, 0, 0, 0)
        layer = net[i]
        i += 1
        if not _untied_or_conv([layer]):
            streamlined.append(layer)
            continue
        outputs, relu, pool = shapes[i][1:], False, None
        if i < len(net) and type(net[i]) is nn.ReLU:
            relu = True
            i += 1
        if i < len(net) and _plain_pool(net[i]):
            pool = net[i]
            i += 1
            outputs = tuple((o - k) // s * s + k for o, k, s in zip(outputs, pair(pool.kernel_size), pair(pool.stride)))
        padding = (zeros[2] + layer.padding[0], zeros[0] + layer.padding[1])
        streamlined.append(Stage(layer, padding, outputs, pool, relu))
    return nn.Sequential(*streamlined)


def _untied_or_conv(candidates: Sequence[nn.Module]) -> bool:
    """Whether `candidates` holds one layer that a `Stage` can be built around."""
    return len(candidates) == 1 and (
        type(candidates[0]) is LocallyConnected2d
        or type(candidates[0]) is nn.Conv2d
        and candidates[0].groups == 1
        and candidates[0].padding_mode == "zeros"
        and not isinstance(candidates[0].padding, str)
    )


def _plain_pool(layer: nn.Module) -> bool:
    """Whether `layer` is max pooling in which the last rows and columns of its input may remain unread."""
    return (
        type(layer) is nn.MaxPool2d
        and pair(layer.padding) == (0, 0)
        and pair(layer.dilation) == (1, 1)
        and not layer.ceil_mode
        and not layer.return_indices
    )


def keep_freed_memory() -> None:
    """Have glibc keep what is freed; else each step's large buffers are new pages, which the kernel has to clear."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its largest


def _why_no_graph() -> str:
    """Why steps on this machine are not to be captured as CUDA graphs; "" where they are."""
    if os.environ.get("RNORM_CUDA_GRAPH") == "0":
        return "RNORM_CUDA_GRAPH=0"
    if torch.version.hip:
        return f"replays on ROCm {torch.version.hip} are reported to leak memory"
    return ""


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all warm-ups, one for all networks, as cuBLAS keeps memory for every stream that it has seen."""
    return torch.cuda.Stream(device)


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Step:
    """One training step of a network: `step(x, y)` for x of shape (N, C, H, W) and labels y (N,).

    Args:
        net: the network, whose parameters the steps change.
        image_shape: (C, H, W).
        lr: the learning rate of plain SGD, or a list of them, one for each of net.parameters(), in that order.
        batch_size: images in a whole batch.
        optimizer: if given, its step is taken instead, and `lr` does not count.
        graph: False to capture no CUDA graph, such as where each of many networks would keep one.

    In plain SGD the locally connected layers update their weights within the backward pass
    (`LocallyConnected2d.fused_step`), and on CUDA the step is captured once as a CUDA graph, with the first whole
    batch, and replayed. A batch of another size, such as the last of an epoch, is computed without the graph. So are
    all where none can be captured: on ROCm, with RNORM_CUDA_GRAPH=0, and where torch fails to; a line on stderr says
    so. Nothing in a step waits for the device: the losses are added up there in `loss_sum`, which `take_loss` reads.

    Raises ValueError for a list of learning rates of another length than the parameters.
    """

    def __init__(
        self,
        net: nn.Sequential,
        image_shape: tuple[int, ...],
        lr: float | Sequence[float],
        batch_size: int,
        optimizer: torch.optim.Optimizer | None = None,
        graph: bool = True,
    ):
        keep_freed_memory()
        self.net, self.batch_size, self.optimizer = streamline(net, image_shape), batch_size, optimizer
        self.parameters = list(net.parameters())
        self.lrs = [float(lr)] * len(self.parameters) if isinstance(lr, (int, float)) else [float(v) for v in lr]
        if len(self.lrs) != len(self.parameters):
            raise ValueError(f"{len(self.lrs)} learning rates for {len(self.parameters)} parameters")
        self.untied = [m for m in net.modules() if isinstance(m, LocallyConnected2d)]
        self.loss_sum = torch.zeros((), device=self.parameters[0].device)
        self.captures = graph and optimizer is None and self.loss_sum.is_cuda
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor, y: Tensor) -> None:
        whole = len(x) == self.batch_size
        if whole and self.captures and self.graph is None:
            self.graph = self._capture(x, y)
        if whole and self.graph is not None:
            self.x.copy_(x)
            self.y.copy_(y)
            self.graph.replay()
        else:
            self._eager(x, y)

    def take_loss(self) -> float:
        """The sum of the losses of the steps since the last call."""
        loss = self.loss_sum.item()
        self.loss_sum.zero_()
        return loss

    def _eager(self, x: Tensor, y: Tensor) -> None:
        if self.optimizer is None:
            rates = {id(parameter): lr for parameter, lr in zip(self.parameters, self.lrs)}
            for layer in self.untied:
                layer.fused_step = rates[id(layer.weight)]
        try:
            loss = F.cross_entropy(self.net(x), y)
        finally:
            for layer in self.untied:
                layer.fused_step = None
        self.net.zero_grad()
        loss.backward()
        if self.optimizer is None:
            self._descend()
        else:
            self.optimizer.step()
        with torch.no_grad():
            self.loss_sum += loss

    @torch.no_grad()
    def _descend(self) -> None:
        """Plain SGD for all parameters that have a gradient; the weights of fused layers have none."""
        for lr in dict.fromkeys(self.lrs):
            chosen = [p for p, rate in zip(self.parameters, self.lrs) if rate == lr and p.grad is not None]
            if chosen:
                torch._foreach_sub_(chosen, [p.grad for p in chosen], alpha=lr)

    def _capture(self, x: Tensor, y: Tensor) -> torch.cuda.CUDAGraph | None:
        """A step as a CUDA graph that reads `self.x` and `self.y`; nothing else changes.

        None where there can be no graph; then `captures` is False from now on, and a line on stderr says why.
        """
        reason = _why_no_graph()
        if not reason:
            self.x, self.y = x.clone(), y.clone()
            with self._as_before(x.device):
                self._warm_up(_side_stream(x.device))
                graph = torch.cuda.CUDAGraph()
                try:
                    # Some versions of torch leave the capture's stream the current one where a capture fails.
                    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                        self._eager(self.x, self.y)
                    return graph
                except RuntimeError as error:
                    reason = str(error.__context__ or error).partition("\n")[0]  # the first error tells more
                    # Some leave the random generator waiting for the capture's end; a copy of its state does not wait.
                    generator = torch.cuda.default_generators[x.device.index]
                    generator.graphsafe_set_state(generator.clone_state())
        self.captures = False
        _say_once(f"steps are computed without a CUDA graph: {reason}")
        return None

    def _warm_up(self, side: torch.cuda.Stream) -> None:
        """A few steps on another stream than the capture's, which a capture wants to come after."""
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._eager(self.x, self.y)
        torch.cuda.current_stream().wait_stream(side)

    @contextlib.contextmanager
    def _as_before(self, device: torch.device) -> Iterator[None]:
        """At its end, put back what steps change: parameters, buffers, the sum of the losses, random states."""
        changed = [*self.parameters, *self.net.buffers(), self.loss_sum]
        before = [tensor.detach().clone() for tensor in changed]
        with torch.random.fork_rng([device]):
            try:
                yield
            finally:
                with torch.no_grad():
                    for tensor, value in zip(changed, before):
                        tensor.copy_(value)
