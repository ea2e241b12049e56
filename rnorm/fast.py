"""The same network with less work: what makes a training step cost what its arithmetic costs.

`streamline` rewrites a network around its parameters; `Captured` makes a CUDA graph of any step function. Neither
changes a result beyond rounding (`tests/test_fast.py`); `benchmarks/README.md` has the times.
"""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
            if x.device.type != "cpu":
                columns = layer.output_size[1]
            x = layer.compute(x, self.padding, (rows, columns))
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


class Captured:
    """Any step function, on CUDA captured once as a CUDA graph and replayed: `step(x, y)`, with a scalar as its result.

    Args:
        step: a function of images x (N, C, H, W) and labels y (N,) that changes some tensors and returns a scalar. On
            CUDA nothing in it may wait for the device.
        batch_size: images in a whole batch. A batch of another size, such as the last of an epoch, is not captured.
        changed: the tensors that a step changes.
        constants: what a graph holds as numbers, such as learning rates; once it returns another value, a new graph is
            captured.

    Everywhere else than on CUDA, with RNORM_CUDA_GRAPH=0, on ROCm, and once a capture has failed in this process, it
    calls `step` itself; on a GPU a line on stderr says why.
    """

    refused = ""  # why steps are not captured in this process; after a failure torch may fail at every later capture

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Tensor],
        batch_size: int,
        changed: Iterable[Tensor],
        constants: Callable[[], object] = lambda: None,
    ):
        self.step, self.batch_size, self.changed, self.constants = step, batch_size, list(changed), constants
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured_with: object = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if not x.is_cuda or len(x) != self.batch_size or Captured.refused:
            return self.step(x, y)
        if self.graph is None or self.captured_with != self.constants():
            self.graph, self.captured_with = self._capture(x, y), self.constants()
        if self.graph is None:
            return self.step(x, y)
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.result

    def _capture(self, x: Tensor, y: Tensor) -> torch.cuda.CUDAGraph | None:
        """A step as a CUDA graph that reads `self.x` and `self.y`; nothing else changes. None if that cannot be."""
        self.graph, reason = None, _why_no_graph()
        if not reason:
            self.x, self.y = x.clone(), y.clone()
            with self._as_before(x.device):
                self._warm_up(_side_stream(x.device))
                graph = torch.cuda.CUDAGraph()
                try:
                    # Some versions of torch leave the capture's stream the current one where a capture fails.
                    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                        self.result = self.step(self.x, self.y)
                    return graph
                except RuntimeError as error:
                    reason = str(error.__context__ or error).partition("\n")[0]  # the first error tells more
                    # Some leave the random generator waiting for the capture's end; a copy of its state does not wait.
                    generator = torch.cuda.default_generators[x.device.index]
                    generator.graphsafe_set_state(generator.clone_state())
        Captured.refused = reason
        print(f"steps are computed without a CUDA graph: {reason}", file=sys.stderr, flush=True)
        return None

    def _warm_up(self, side: torch.cuda.Stream) -> None:
        """A few steps on another stream than the capture's, which a capture wants to come after."""
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(self.x, self.y)
        torch.cuda.current_stream().wait_stream(side)

    @contextlib.contextmanager
    def _as_before(self, device: torch.device) -> Iterator[None]:
        """At its end, put back what steps change: `changed` and random states."""
        before = [tensor.detach().clone() for tensor in self.changed]
        with torch.random.fork_rng([device]):
            try:
                yield
            finally:
                with torch.no_grad():
                    for tensor, value in zip(self.changed, before):
                        tensor.copy_(value)
