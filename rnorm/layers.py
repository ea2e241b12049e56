"""tmp"""
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_shapes(net: nn.Sequential, image_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """What each layer of `net` receives for images of shape (C, H, W), and the output: shapes without the batch."""
    parameter = next(net.parameters())
    x = torch.zeros(1, *image_shape, dtype=parameter.dtype, device=parameter.device)
    shapes, training = [tuple(image_shape)], net.training
    with torch.no_grad():
        net.eval()
        for layer in net:
            x = layer(x)
            shapes.append(tuple(x.shape[1:]))
        net.train(training)
    return shapes


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


class LocallyConnected2d(nn.Module):
    r"""A two-dimensional convolution without weight sharing: every output position has filters of its own.

    For an input of size :math:`(N, C_{in}, H, W)` the output at position :math:`(h, w)` is

    .. math::
        \text{out}(n, o, h, w) = \text{bias}(o, h, w) + \sum_{c, i, j}
            \text{weight}(o, c, h, w, i k_w + j)\; \text{input}(n, c, h s_h + i d_h - p_h, w s_w + j d_w - p_w)

    with kernel :math:`k`, stride :math:`s`, padding :math:`p` (zeros) and dilation :math:`d`.

    Args:
        in_channels: channels of the input, C_in.
        out_channels: channels of the output, C_out.
        input_size: height and width of the input, which fix the number of filters.
        kernel_size, stride, padding, dilation: as for `nn.Conv2d`; an int or a pair (vertical, horizontal).
        bias: learn a bias for every channel and position.

    Shapes:
        - Input: (N, C_in, H, W), with (H, W) equal to `input_size`.
        - Output: (N, C_out, H_out, W_out), with H_out = (H + 2 p_h - d_h (k_h - 1) - 1) // s_h + 1 and W_out
          alike. On the CPU it is channels-last in memory.

    Attributes:
        weight: (1, C_out, C_in, H_out, W_out, k_h * k_w), uniform in +-1/sqrt(C_in k_h k_w) as in `nn.Conv2d`.
            In memory it lies in the order (H_out, W_out, k_h, k_w, C_in, C_out), that of the matrix products;
            any other order computes the same, slower.
        bias: (1, C_out, H_out, W_out) or None, initialised like the weight.
        fused_step: None, or a learning rate: then the backward pass takes the step of plain SGD itself,
            weight -= fused_step * gradient, and likewise for the bias, and leaves both `.grad` as they are. That
            saves writing and reading the gradient. CPU only, for a layer used once per step.

    Raises:
        ValueError: sizes that are not positive, a kernel larger than the padded input, or an input of another size.

    The CPU path has first derivatives only; on other devices the layer is made of differentiable operations.

    Example:
        >>> layer = LocallyConnected2d(16, 33, (50, 100), kernel_size=(3, 5), stride=(2, 1), padding=(4, 2))
        >>> layer(torch.randn(20, 16, 50, 100)).shape
        torch.Size([20, 33, 28, 100])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        input_size: int | tuple[int, int],
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.input_size, self.kernel_size = pair(input_size), pair(kernel_size)
        self.stride, self.padding, self.dilation = pair(stride), pair(padding), pair(dilation)
        positive = (in_channels, out_channels, *self.input_size, *self.kernel_size, *self.stride, *self.dilation)
        if min(positive) < 1 or min(self.padding) < 0:
            raise ValueError("channels, sizes, stride and dilation must be at least 1, and padding at least 0")
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(self.input_size, self.padding, self.dilation, self.kernel_size, self.stride)
        )
        if min(height, width) < 1:
            raise ValueError(f"a kernel of {self.kernel_size} does not fit an input of {self.input_size}")
        self.output_size = (height, width)
        weight = torch.empty(height, width, *self.kernel_size, in_channels, out_channels, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight.permute(5, 4, 0, 1, 2, 3).flatten(4)[None])
        if bias:
            bias = torch.empty(height, width, out_channels, device=device, dtype=dtype)
            self.bias = nn.Parameter(bias.permute(2, 0, 1)[None])
        else:
            self.register_parameter("bias", None)
        self.fused_step: float | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, as `nn.Conv2d` does."""
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, input_size: int | tuple[int, int]) -> "LocallyConnected2d":
        """The layer that computes what `conv` computes on inputs of `input_size`, with its filter at every position.

        Raises ValueError for a convolution with groups, padding other than zeros, or padding given as a word.
        """
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"{conv}: only groups=1 and zero padding given in numbers can be untied")
        layer = cls(
            conv.in_channels, conv.out_channels, input_size, conv.kernel_size, conv.stride, conv.padding,
            conv.dilation, conv.bias is not None, conv.weight.device, conv.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(conv.weight.flatten(2)[None, :, :, None, None, :])
            if conv.bias is not None:
                layer.bias.copy_(conv.bias[None, :, None, None])
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or tuple(x.shape[1:]) != (self.in_channels, *self.input_size):
            expected = ("N", self.in_channels, *self.input_size)
            raise ValueError(f"expected an input of shape {expected}, not {tuple(x.shape)}")
        return self.compute(x, self.padding, self.output_size)

    def compute(self, x: Tensor, padding: tuple[int, int], outputs: tuple[int, int]) -> Tensor:
        """The first `outputs` (rows, columns) of the output, for an input with `padding` zeros (above, to the left)."""
        geometry = Geometry(self.kernel_size, self.stride, padding, self.dilation, outputs)
        if x.device.type == "cpu":
            out = _InPlace.apply(x, self.weight, self.bias, geometry, self.fused_step)
            return out.permute(0, 3, 1, 2)  # here, as layers after this one may change a view of it in place
        return unfolded(x, self.weight, self.bias, geometry)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, input_size={self.input_size}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}"
        )


class Geometry(NamedTuple):
    """Where a locally connected layer, or a convolution, reads; each a pair (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]  # zeros above and to the left
    dilation: tuple[int, int]
    outputs: tuple[int, int]  # how many output rows and columns to compute

    def pad(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) with its padding and without what the outputs do not read."""
        height, width = (
            (o - 1) * s + (k - 1) * d + 1 for o, s, k, d in zip(self.outputs, self.stride, self.kernel, self.dilation)
        )
        (top, left), (_, _, h, w) = self.padding, x.shape
        return F.pad(x, (left, max(0, width - left - w), top, max(0, height - top - h)))[:, :, :height, :width]

    def products(self, height: int, width: int) -> Iterator[tuple[slice, int, int, slice, slice, slice]]:
        """Cut the layer on an input of (height, width) into matrix products that leave out the padding.

        Yields (output rows, output column, kernel row, taps, input rows, input columns): of each output row, the taps
        read the input columns of one input row, all adjacent.
        """
        (k_h, k_w), (s_h, s_w), (p_h, p_w), (d_h, d_w), (rows, columns) = self
        for w in range(columns):
            x = w * s_w - p_w
            taps = _inside(x, d_w, k_w, width)
            adjacent = [taps] if d_w == 1 else [range(j, j + 1) for j in taps]
            for i in range(k_h):
                y = i * d_h - p_h
                h = _inside(y, s_h, rows, height)
                for j in adjacent if h and taps else ():
                    first_row, first_column = h.start * s_h + y, j.start * d_w + x
                    input_rows = slice(first_row, first_row + (len(h) - 1) * s_h + 1, s_h)
                    input_columns = slice(first_column, first_column + len(j))
                    yield slice(h.start, h.stop), w, i, slice(j.start, j.stop), input_rows, input_columns


def _inside(start: int, step: int, count: int, size: int) -> range:
    """The k in range(count) for which start + k * step lies in range(size)."""
    return range(max(0, -(start // step)), min(count, (size - 1 - start) // step + 1))


def _matrices(weight: Tensor, kernel: tuple[int, int]) -> Tensor:
    """`LocallyConnected2d.weight` as (H_out, W_out, k_h, k_w, C_in, C_out), in memory too."""
    return weight[0].unflatten(-1, kernel).permute(2, 3, 4, 5, 1, 0).contiguous()


def _patches(x: Tensor, g: Geometry) -> Tensor:
    """What every output position sees of x (N, C_in, H, W), as (H_out, W_out, N, k_h * k_w * C_in)."""
    x = g.pad(x)
    for dim in (0, 1):
        x = x.unfold(dim + 2, (g.kernel[dim] - 1) * g.dilation[dim] + 1, g.stride[dim])[..., :: g.dilation[dim]]
    return x.permute(2, 3, 0, 4, 5, 1).flatten(3)


def unfolded(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    """A locally connected layer as one matrix of patches times one matrix of filters at every position.

    On any device, differentiable any number of times. x: (N, C_in, H, W); returns (N, C_out, *g.outputs).
    """
    rows, columns = g.outputs
    filters = _matrices(weight, g.kernel)[:rows, :columns].flatten(2, 4)  # (H_out, W_out, k_h * k_w * C_in, C_out)
    out = (_patches(x, g) @ filters).permute(2, 3, 0, 1)  # (N, C_out, H_out, W_out)
    out = out.contiguous(memory_format=torch.channels_last)
    return out if bias is None else out + bias[:, :, :rows, :columns]


class _InPlace(torch.autograd.Function):
    """A locally connected layer on the CPU, as batched matrix products that read their patches in place.

    What one row of the kernel sees of one image is, with the channels last, k_w * C_in adjacent numbers. So for one
    kernel row and one output column the patches of all output rows are a strided view of the input, which `baddbmm`
    reads as it is; the gradient for the input is added through the same view. Where that would be less than SHORT
    numbers (the first layer has 3 channels), a copy of all patches is the faster way.
    """

    SHORT = 48

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, fused_step: float | None
    ) -> Tensor:
        filters = _matrices(weight, g.kernel)[: g.outputs[0], : g.outputs[1]]
        if fused_step is not None and filters.data_ptr() != weight.data_ptr():
            raise ValueError("fused_step needs the weight in the memory order the layer was made with")
        result = x.new_empty(len(x), *g.outputs, weight.shape[1])
        out = result.permute(1, 2, 0, 3)  # (H_out, W_out, N, C_out)
        out[:] = 0 if bias is None else bias[0, :, : g.outputs[0], : g.outputs[1]].permute(1, 2, 0)[:, :, None]
        ctx.copied = x.shape[1] * (g.kernel[1] if g.dilation[1] == 1 else 1) < _InPlace.SHORT
        if ctx.copied:
            seen = _patches(x, g)
            out.flatten(0, 1).baddbmm_(seen.flatten(0, 1), filters.flatten(2, 4).flatten(0, 1))
        else:
            seen = x.permute(2, 0, 3, 1).contiguous()  # (H, N, W, C_in)
            for h, w, i, j, rows, columns in g.products(*x.shape[2:]):
                out[h, w].baddbmm_(seen[rows, :, columns].flatten(2), filters[h, w, i, j].flatten(1, 2))
        ctx.g, ctx.fused_step, ctx.size = g, fused_step, x.shape
        ctx.save_for_backward(seen, weight, bias)
        return result  # (N, H_out, W_out, C_out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):
        (seen, weight, bias), g, fused = ctx.saved_tensors, ctx.g, ctx.fused_step is not None
        alpha = -ctx.fused_step if fused else 1
        n, channels, height, width = ctx.size
        filters = _matrices(weight, g.kernel)
        grad = grad.permute(1, 2, 0, 3)  # (H_out, W_out, N, C_out)
        if grad.stride(3) != 1:
            grad = grad.contiguous()

        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.new_zeros(height, n, width, channels)
            for h, w, i, j, rows, columns in g.products(height, width):
                seen_by = grad_x[rows, :, columns].view(h.stop - h.start, n, -1)
                seen_by.baddbmm_(grad[h, w], filters[h, w, i, j].flatten(1, 2).transpose(1, 2))
            grad_x = grad_x.permute(1, 3, 0, 2)
        if ctx.needs_input_grad[1]:
            if not fused:
                filters = torch.zeros_like(filters)
                grad_weight = filters.permute(5, 4, 0, 1, 2, 3).flatten(4)[None]
            if ctx.copied:
                products = torch.bmm(seen.flatten(0, 1).transpose(1, 2), grad.flatten(0, 1)).unflatten(0, g.outputs)
                filters[: g.outputs[0], : g.outputs[1]].flatten(2, 4).add_(products, alpha=alpha)
            else:
                for h, w, i, j, rows, columns in g.products(height, width):
                    patches = seen[rows, :, columns].flatten(2).transpose(1, 2)
                    filters[h, w, i, j].flatten(1, 2).baddbmm_(patches, grad[h, w], alpha=alpha)
        if ctx.needs_input_grad[2]:
            if not fused:
                bias = grad_bias = torch.zeros_like(bias)
            total = grad.sum(2).permute(2, 0, 1)  # (C_out, rows, columns)
            bias[0, :, : g.outputs[0], : g.outputs[1]].add_(total, alpha=alpha)
        return grad_x, grad_weight, grad_bias, None, None
