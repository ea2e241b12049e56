"""The same network with less work: what makes a training step cost what its arithmetic costs.

`streamline` rewrites a network around its parameters; `Step` takes training steps of one network. Neither changes a
result beyond rounding (`tests/test_fast.py`); `benchmarks/README.md` says what each is worth.
"""

import contextlib
import ctypes
from collections.abc import Sequence

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


class Step:
    """One training step of a network: `step(x, y)` for x of shape (N, C, H, W) and labels y (N,).

    Args:
        net: the network, whose parameters the steps change.
        image_shape: (C, H, W).
        lr: the learning rate of plain SGD, or a list of them, one for each of net.parameters(), in that order.
        batch_size: images in a whole batch.
        optimizer: if given, its step is taken instead, and `lr` does not count.

    In plain SGD the locally connected layers update their weights within the backward pass
    (`LocallyConnected2d.fused_step`), and on CUDA the step is captured once as a CUDA graph, with the first whole
    batch, and replayed; any other batch, such as the last of an epoch, runs without the graph. Nothing in a step waits
    for the device: the losses are added up there in `loss_sum`, which `take_loss` reads.

    Raises ValueError for a list of learning rates of another length than the parameters.
    """

    def __init__(
        self,
        net: nn.Sequential,
        image_shape: tuple[int, ...],
        lr: float | Sequence[float],
        batch_size: int,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        keep_freed_memory()
        self.net, self.batch_size, self.optimizer = streamline(net, image_shape), batch_size, optimizer
        self.parameters = list(net.parameters())
        self.lrs = [float(lr)] * len(self.parameters) if isinstance(lr, (int, float)) else [float(v) for v in lr]
        if len(self.lrs) != len(self.parameters):
            raise ValueError(f"{len(self.lrs)} learning rates for {len(self.parameters)} parameters")
        self.untied = [m for m in net.modules() if isinstance(m, LocallyConnected2d)]
        self.loss_sum = torch.zeros((), device=self.parameters[0].device)
        self.one = torch.ones_like(self.loss_sum, dtype=self.parameters[0].dtype)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor, y: Tensor) -> None:
        if x.device.type != "cuda" or len(x) != self.batch_size or self.optimizer is not None:
            self._eager(x, y)
            return
        if self.graph is None:
            self._capture(x, y)
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()

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
        # An explicit gradient spares a GPU a kernel, but makes torch import its compiler, which takes seconds.
        loss.backward(None if layers.on_cpu(x) else self.one)
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

    def _capture(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x.clone(), y.clone()
        weights = [p.detach().clone() for p in self.parameters]
        side = torch.cuda.Stream()  # a capture wants a few steps on a stream of their own first; they are undone
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._eager(self.x, self.y)
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights):
                parameter.copy_(weight)
        self.loss_sum.zero_()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._eager(self.x, self.y)
