"""The same networks with less work: what makes a training step cost what its arithmetic costs.

`streamline` rewrites a network around its parameters; `Step` takes one SGD step of several networks. Neither changes
a result beyond rounding (`tests/test_fast.py`); `benchmarks/README.md` says what each is worth.
"""

import contextlib
import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnorm.layers import Geometry, LocallyConnected2d, layer_shapes, pair


class Stage(nn.Module):
    """ZeroPad2d, Conv2d or LocallyConnected2d, ReLU and MaxPool2d as one: (N, C, H, W) to (N, C_out, H', W').

    Only the outputs that the pooling reads are computed (of skinnyprime's layer 5, 49 of 64), and ReLU comes after
    the pooling, with which it commutes, where there is a quarter of the data.
    """

    def __init__(self, layer: nn.Module, padding: tuple[int, int], outputs: tuple[int, int], pool: nn.Module | None,
                 relu: bool):  # fmt: skip
        super().__init__()
        self.layer, self.padding, self.outputs, self.pool, self.relu = layer, padding, outputs, pool, relu

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, LocallyConnected2d):
            x = layer.compute(x, self.padding, self.outputs)
        else:
            x = Geometry(layer.kernel_size, layer.stride, self.padding, layer.dilation, self.outputs).pad(x)
            x = F.conv2d(x, layer.weight, layer.bias, layer.stride, 0, layer.dilation)
        x = x if self.pool is None else self.pool(x)
        return x.relu() if self.relu else x


def streamline(net: nn.Sequential, image_shape: tuple[int, ...]) -> nn.Sequential:
    """The function of `net` on images of shape (C, H, W), with the same parameters and less arithmetic.

    Layers outside the pattern of `Stage` are taken over as they are, so any `nn.Sequential` may be given.
    """
    layers, shapes = list(net), layer_shapes(net, image_shape)
    streamlined, i = [], 0
    while i < len(layers):
        padding = (0, 0, 0, 0)
        if type(layers[i]) is nn.ZeroPad2d and min(layers[i].padding) >= 0 and _untied_or_conv(layers[i + 1 : i + 2]):
            padding = layers[i].padding  # left, right, top, bottom
            i += 1
        layer, rest = layers[i], layers[i + 1 :]
        i += 1
        if not _untied_or_conv([layer]):
            streamlined.append(layer)
            continue
        outputs = shapes[i][1:]
        relu = bool(rest) and type(rest[0]) is nn.ReLU
        pool = rest[relu] if len(rest) > relu and _plain_pool(rest[relu]) else None
        i += relu + (pool is not None)
        if pool is not None:
            outputs = tuple((o - k) // s * s + k for o, k, s in zip(outputs, pair(pool.kernel_size), pair(pool.stride)))
        padding = (padding[2] + layer.padding[0], padding[0] + layer.padding[1])
        streamlined.append(Stage(layer, padding, outputs, pool, relu))
    return nn.Sequential(*streamlined)


def _untied_or_conv(layers: list[nn.Module]) -> bool:
    """Whether `layers` holds one layer that a `Stage` can be built around."""
    return bool(layers) and (
        type(layers[0]) is LocallyConnected2d
        or type(layers[0]) is nn.Conv2d
        and layers[0].groups == 1
        and layers[0].padding_mode == "zeros"
        and not isinstance(layers[0].padding, str)
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
    """One step of plain SGD: `step(x, y)` for x of shape (N, C, H, W) and labels y (N,).

    On the CPU the locally connected layers update their weights within the backward pass
    (`LocallyConnected2d.fused_step`). On CUDA the step is captured once as a CUDA graph and replayed; a batch of
    another size than the first, such as the last of an epoch, runs without the graph. Nothing in a step waits for
    the device: the losses are added up there in `loss_sum`, which `take_loss` reads.
    """

    def __init__(self, net: nn.Sequential, image_shape: tuple[int, ...], lr, batch_size=0, optimizer=None):
        keep_freed_memory()
        self.net, self.lr = streamline(net, image_shape), lr if isinstance(lr, float) else lr[0]
        self.lrs, self.optimizer = lr if isinstance(lr, list) else [lr] * len(list(net.parameters())), optimizer
        self.untied = [m for m in net.modules() if isinstance(m, LocallyConnected2d)]
        self.loss_sum = torch.zeros((), device=next(net.parameters()).device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor, y: Tensor) -> None:
        if x.device.type != "cuda":
            self._eager(x, y)
            return
        if self.graph is None:
            self._capture(x, y)
        if len(x) == len(self.x):
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
        for layer in self.untied:
            layer.fused_step = self.lr if x.device.type == "cpu" and not self.optimizer else None
        loss = F.cross_entropy(self.net(x), y)
        for layer in self.untied:
            layer.fused_step = None
        self.net.zero_grad()
        loss.backward()
        if self.optimizer:
            self.optimizer.step()
            self.net.zero_grad()
        with torch.no_grad():
            for parameter, lr in zip(self.net.parameters(), self.lrs):
                if parameter.grad is not None:  # those of fused layers have none
                    parameter.sub_(parameter.grad, alpha=lr)
            self.loss_sum += loss

    def _capture(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x.clone(), y.clone()
        weights = [p.detach().clone() for p in self.net.parameters()]
        side = torch.cuda.Stream()  # a capture wants a few steps on a stream of their own first; they are undone
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._eager(self.x, self.y)
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad():
            for parameter, weight in zip(self.net.parameters(), weights):
                parameter.copy_(weight)
        self.loss_sum.zero_()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._eager(self.x, self.y)
