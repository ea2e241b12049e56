"""A convolution without weight sharing, `LocallyConnected2d`, and what it computes with. Needs torch and nothing else.

The layer multiplies, at every output position, a matrix of patches with a matrix of filters. There are two quick ways
to do so, `Rows` and `Patches`, with first derivatives of their own, and a plain one, `unfolded`, which PyTorch can
differentiate any number of times.
"""

import itertools
import math
import numbers
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.overrides import handle_torch_function, has_torch_function_unary

SHORT = 48  # numbers; where a kernel row sees less of an image, copying all patches is quicker on the CPU


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """An int twice, or a pair (vertical, horizontal) as ints; raises ValueError for anything else."""
    values = (value, value) if isinstance(value, numbers.Integral) else tuple(value)
    if len(values) != 2:
        raise ValueError(f"expected an int or a pair, not {values}")
    return operator.index(values[0]), operator.index(values[1])


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


class LocallyConnected2d(nn.Module):
    r"""A two-dimensional convolution without weight sharing: every output position has filters of its own.

    For an input of size :math:`(N, C_{in}, H, W)` the output at position :math:`(h, w)` is

    .. math::
        \text{out}(n, o, h, w) = \text{bias}(h, w, o) + \sum_{c, i, j}
            \text{weight}(h, w, i, j, c, o)\; \text{input}(n, c, h s_h + i d_h - p_h, w s_w + j d_w - p_w)

    with kernel :math:`k`, stride :math:`s`, padding :math:`p` (zeros) and dilation :math:`d`.

    Args:
        in_channels: channels of the input, C_in.
        out_channels: channels of the output, C_out.
        input_size: height and width of the input, which fix the number of filters.
        kernel_size, stride, padding, dilation: as for `nn.Conv2d`; an int or a pair (vertical, horizontal). `padding`
            may be "valid", which is 0, or with stride 1 "same": the output has the size of the input.
        bias: learn a bias for every channel and position.

    Shapes:
        - Input: (N, C_in, H, W) or (C_in, H, W), with (H, W) equal to `input_size`; N may be 0.
        - Output: (N, C_out, H_out, W_out) or (C_out, H_out, W_out), with
          H_out = (H + 2 p_h - d_h (k_h - 1) - 1) // s_h + 1 and W_out alike. Its memory format is the input's, of
          which channels last takes a copy less.

    Attributes:
        padding: (above, to the left), also where it was given as a word.
        weight: (H_out, W_out, k_h, k_w, C_in, C_out), the order of the matrix products.
        bias: (H_out, W_out, C_out) or None.
        filters: a view of the weight in the shape of the file format, (1, C_out, C_in, H_out, W_out, k_h * k_w).
        fused_step: None, or a learning rate: then the backward pass takes the step of plain SGD for the weight itself,
            weight -= fused_step * gradient, and leaves `weight.grad` as it is. That saves writing and reading the
            largest gradient. For a layer used once per step.
        way: `Rows`, `Patches`, or None: the quicker one.

    State dict: views of `weight` in the shape of `filters`, and of `bias` as (1, C_out, H_out, W_out). With
    `keep_vars=True` the parameters themselves. What a parametrization puts in their place is saved as it is.

    ====================================  ============================================================================
    works with
    ====================================  ============================================================================
    any optimiser, also LBFGS             and whatever flattens parameters: `parameters_to_vector`, pruning
    `nn.init.kaiming_normal_` and others  by `reset_parameters(init)`; applied to the weight they find a wrong fan
    parametrizations                      yes; `weight_norm(layer, dim=5)` has a norm for every output channel
    autocast                              as `nn.Conv2d`: computes in autocast's dtype
    second derivatives, Hessians          on every device; they take the plain form, which is slower
    batched gradients, `vectorize=True`   no: PyTorch says so in a RuntimeError; `unfolded` works with them
    torch.compile, torch.export           they get the plain form; so do torch.jit.trace and both ONNX exporters
    FakeTensorMode, `aot_module`          yes, and memory trackers
    `fx.symbolic_trace`                   yes; the layer is one node of the graph
    FlopCounterMode                       counts what is computed, without products with padding
    memory formats                        as `nn.Conv2d`: after a contiguous input `view` works
    activation checkpointing              yes, with and without reentry
    deepcopy, pickle, `functional_call`   yes; `functional_call` takes parameters, and refuses a state dict
    `nn.init.orthogonal_`, `permute`      a weight in any memory order; the file formats stay as they are
    averages of weights (EMA)             yes; changing a state dict's tensors in place changes the layer
    safetensors                           by `save_model`; `save_file` refuses the views of a state dict
    DistributedDataParallel               yes
    torch.func.grad, vmap, jvp            no: PyTorch says so in a RuntimeError; `unfolded` works with them
    complex numbers                       no: ValueError; `unfolded` works with them
    ====================================  ============================================================================

    Raises:
        ValueError: sizes that are not positive or no pairs, a kernel larger than the padded input, another word as
            `padding`, an input of another size, of another dtype than the weight, or complex, a weight of another
            shape; with `fused_step` also autocast, parametrizations, and where the plain form is taken.
        TypeError: an input that is no tensor, a size that is no whole number.
        RuntimeError: second derivatives with `fused_step`.

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
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.input_size, self.kernel_size = pair(input_size), pair(kernel_size)
        self.stride, self.dilation = pair(stride), pair(dilation)
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]
        zeros = [0, 0]  # above and below together, to the left and to the right together
        if not isinstance(padding, str):
            self.padding = pair(padding)
            zeros = [2 * p for p in self.padding]
        elif padding == "same" and self.stride == (1, 1):
            zeros, self.padding = reach, (reach[0] // 2, reach[1] // 2)
        elif padding == "valid":
            self.padding = (0, 0)
        else:
            raise ValueError(f'padding={padding!r}: it takes numbers, "valid", and "same" with stride 1')
        positive = (in_channels, out_channels, *self.input_size, *self.kernel_size, *self.stride, *self.dilation)
        if min(positive) < 1 or min(self.padding) < 0:
            raise ValueError("channels, sizes, stride and dilation must be at least 1, and padding at least 0")
        sizes = zip(self.input_size, zeros, reach, self.stride)
        self.output_size = tuple((n + p - r - 1) // s + 1 for n, p, r, s in sizes)
        if min(self.output_size) < 1:
            raise ValueError(f"a kernel of {self.kernel_size} does not fit an input of {self.input_size}")
        shape = (*self.output_size, *self.kernel_size, in_channels, out_channels)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(*self.output_size, out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.fused_step: float | None = None
        self.way: type[Rows] | type[Patches] | None = None
        # What `_readers` returns, by its arguments. A CUDA graph reads it, so it lives as long as the layer.
        self._tables: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.reset_parameters()

    def reset_parameters(self, init: Callable[[Tensor], Any] | None = None) -> None:
        """Draw weight and bias anew, uniform in +-1/sqrt(C_in k_h k_w) as in `nn.Conv2d`.

        `init`, such as `nn.init.kaiming_normal_`, then fills each position's filters, as (C_out, C_in, k_h, k_w).
        """
        weight = self.get_parameter("weight")  # AttributeError where it is parametrized: initialise it before
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        if init is not None:
            filters = weight.new_empty(self.out_channels, self.in_channels, *self.kernel_size)
            for row in weight.detach():
                for position in row:
                    init(filters)
                    position.copy_(filters.permute(2, 3, 1, 0))

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, input_size: int | tuple[int, int]) -> "LocallyConnected2d":
        """The layer that computes what `conv` computes on inputs of `input_size`, with its filter at every position.

        Frozen where `conv` is. Raises ValueError for groups, or padding other than zeros.
        """
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise ValueError(f"{conv}: only groups=1 and padding with zeros can be untied")
        layer = cls(
            conv.in_channels, conv.out_channels, input_size, conv.kernel_size, conv.stride, conv.padding,
            conv.dilation, conv.bias is not None, conv.weight.device, conv.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(conv.weight.permute(2, 3, 1, 0)).requires_grad_(conv.weight.requires_grad)
            if conv.bias is not None:
                layer.bias.copy_(conv.bias).requires_grad_(conv.bias.requires_grad)
        return layer

    @property
    def filters(self) -> Tensor:
        return _to_file(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if has_torch_function_unary(x):  # of torch.fx, to which the layer is one function
            return handle_torch_function(self.__class__.forward, (x,), self, x)
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor, not {type(x).__name__}")
        if x.dim() not in (3, 4) or tuple(x.shape[-3:]) != (self.in_channels, *self.input_size):
            expected = ("N", self.in_channels, *self.input_size)
            raise ValueError(f"expected an input of shape {expected} or {expected[1:]}, not {tuple(x.shape)}")
        if x.dim() == 3:
            return self.forward(x[None])[0]
        out = self.compute(x, self.padding, self.output_size)
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return out.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def compute(self, x: Tensor, padding: tuple[int, int], outputs: tuple[int, int]) -> Tensor:
        """The first `outputs` (rows, columns) of the output, for an input with `padding` zeros (above, to the left).

        Its memory format is the one that takes no copy, whatever the input's is.
        """
        geometry = Geometry(self.kernel_size, self.stride, padding, self.dilation, outputs)
        weight, bias, device = self.weight, self.bias, x.device.type
        self._check_weight(weight, bias)
        plain = torch.compiler.is_compiling() or torch.jit.is_tracing()
        known = device in ("cpu", "cuda") if plain else torch.amp.is_autocast_available(device)
        autocast = known and torch.is_autocast_enabled(device)
        if self.fused_step is not None and (autocast or plain or not weight.is_leaf):
            raise ValueError("fused_step is for neither autocast, torch.compile, tracing nor parametrizations")
        if autocast:
            dtype = torch.get_autocast_dtype(device)
            x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
        if x.dtype != weight.dtype or weight.is_complex():
            raise ValueError(f"the input is {x.dtype} and the weight {weight.dtype}; they have to be alike and real")
        if plain:
            return unfolded(x, weight, bias, geometry)
        way = self.way or quicker_way(x, geometry)
        out = _LocallyConnected.apply(x, weight, bias, geometry, self.fused_step, way, self._tables)
        return out.permute(0, 3, 1, 2)  # here, as layers after this one may change a view of it in place

    def _check_weight(self, weight: Tensor, bias: Tensor | None) -> None:
        """Raise ValueError for parameters in the shape of the file format, as `functional_call` may bring them."""
        shape = (*self.output_size, *self.kernel_size, self.in_channels, self.out_channels)
        in_file = (1, self.out_channels, self.in_channels, *self.output_size, math.prod(self.kernel_size))
        # Of a few sizes the two shapes are one; then only its memory order tells a state dict's view.
        view = shape == in_file and not isinstance(weight, nn.Parameter) and not weight.is_contiguous()
        if weight.shape != shape or view or (bias is not None and bias.dim() != 3):
            raise ValueError(f"a weight of shape {tuple(weight.shape)} where {shape} is needed; is it a state dict's?")

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, input_size={self.input_size}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}"
        )

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("weight", "bias"):
            if not keep_vars and self._parameters.get(name) is not None:
                destination[prefix + name] = _to_file(destination[prefix + name])

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, metadata: dict, strict: bool, missing: list, unexpected: list, errors: list
    ) -> None:
        state_dict = dict(state_dict)
        for name in ("weight", "bias"):
            saved, parameter = state_dict.get(prefix + name), self._parameters.get(name)
            if isinstance(saved, Tensor) and parameter is not None:
                shape = _to_file(parameter).shape
                if isinstance(saved, nn.Parameter):
                    errors.append(f"{prefix + name} is a parameter; load a state dict made without keep_vars=True")
                    state_dict[prefix + name] = parameter
                elif saved.shape == shape:
                    state_dict[prefix + name] = _from_file(saved, self.kernel_size)
                else:
                    errors.append(f"size mismatch for {prefix + name}: {tuple(saved.shape)} instead of {tuple(shape)}")
                    state_dict[prefix + name] = parameter
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def _to_file(parameter: Tensor) -> Tensor:
    """A view of a weight as (1, C_out, C_in, H_out, W_out, k_h * k_w), or of a bias as (1, C_out, H_out, W_out)."""
    if parameter.dim() == 3:
        return parameter.permute(2, 0, 1)[None]
    return parameter.permute(5, 4, 0, 1, 2, 3).flatten(4)[None]


def _from_file(saved: Tensor, kernel: tuple[int, int]) -> Tensor:
    """The inverse of `_to_file`, contiguous."""
    if saved.dim() == 4:
        return saved[0].permute(1, 2, 0).contiguous()
    return saved[0].unflatten(-1, kernel).permute(2, 3, 4, 5, 1, 0).contiguous()


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
        top, left = min(self.padding[0], height), min(self.padding[1], width)
        h, w = min(x.shape[2], height - top), min(x.shape[3], width - left)
        x = x.narrow(2, 0, h).narrow(3, 0, w)  # torch 2.6 cannot export a slice here
        return F.pad(x, (left, width - left - w, top, height - top - h))

    def patches(self, x: Tensor) -> Tensor:
        """What every output position sees of x (N, C, H, W), as (H_out, W_out, N, k_h * k_w * C); a copy."""
        x = self.pad(x)
        if torch.jit.is_tracing():  # ONNX's older exporter unfolds nothing that was padded
            x = F.unfold(x, self.kernel, self.dilation, 0, self.stride)  # (N, C * k_h * k_w, H_out * W_out)
            return x.unflatten(2, self.outputs).unflatten(1, (-1, *self.kernel)).permute(4, 5, 0, 2, 3, 1).flatten(3)
        for dim in (0, 1):
            x = x.unfold(dim + 2, (self.kernel[dim] - 1) * self.dilation[dim] + 1, self.stride[dim])
            x = x[..., :: self.dilation[dim]]
        return x.permute(2, 3, 0, 4, 5, 1).flatten(3).contiguous()

    def products(self, height: int, width: int) -> Iterator["Product"]:
        """Cut the layer on an input of (height, width) into matrix products that leave out the padding."""
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
                    weights = slice(h.start, h.stop), w, i, slice(j.start, j.stop)
                    yield Product(weights, (weights[0], w), (input_rows, slice(None), input_columns))


class Product(NamedTuple):
    """One matrix product of `Rows`: what it takes of each tensor, as indices. All of its taps are adjacent."""

    weight: tuple  # of the weight, (H_out, W_out, k_h, k_w, ...): output rows, an output column, a kernel row, taps
    output: tuple  # of the output, (H_out, W_out, N, C_out): the same rows and column
    input: tuple  # of the input, (H, N, W, C_in): the rows and columns that these taps read


def _inside(start: int, step: int, count: int, size: int) -> range:
    """The k in range(count) for which start + k * step lies in range(size)."""
    return range(max(0, -(start // step)), min(count, (size - 1 - start) // step + 1))


def unfolded(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    """The layer in plain operations, on any device, differentiable any number of times.

    x: (N, C_in, H, W); weight and bias as in `LocallyConnected2d`; returns (N, C_out, *g.outputs).
    """
    rows, columns = g.outputs
    out = g.patches(x) @ weight[:rows, :columns].flatten(2, 4)  # (H_out, W_out, N, C_out)
    if bias is not None:
        out = out + bias[:rows, :columns, None]
    return out.permute(2, 3, 0, 1)


def add_product(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1) -> None:
    """total += alpha * a @ b, for batches of matrices; `total` may be any view."""
    torch.baddbmm(total, a, b, alpha=alpha, out=total)  # which, unlike `baddbmm_`, FlopCounterMode counts


class Rows:
    """Products that read their patches in place: the quickest way on the CPU.

    What one row of the kernel sees of one image is, with the channels last, k_w * C_in adjacent numbers. So for one
    kernel row and one output column the patches of all output rows are a strided view of the input, which `baddbmm`
    reads as it is; the gradient for the input is added through the same view.
    """

    @staticmethod
    def forward(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, g: Geometry) -> Tensor:
        """Fill out (H_out, W_out, N, C_out); returns what the backward pass needs of x: (H, N, W, C_in)."""
        out[:] = bias[:, :, None]
        seen = x.permute(2, 0, 3, 1).contiguous()
        for part in g.products(*x.shape[2:]):
            add_product(out[part.output], seen[part.input].flatten(2), weight[part.weight].flatten(1, 2))
        return seen

    @staticmethod
    def add_weight_gradient(total: Tensor, seen: Tensor, grad: Tensor, g: Geometry, alpha: float) -> None:
        """total += alpha * gradient, for total as the weight, contiguous, and grad (H_out, W_out, N, C_out)."""
        for part in g.products(seen.shape[0], seen.shape[2]):
            patches = seen[part.input].flatten(2).transpose(1, 2)
            add_product(total[part.weight].flatten(1, 2), patches, grad[part.output], alpha)

    @staticmethod
    def input_gradient(grad: Tensor, weight: Tensor, g: Geometry, size: tuple[int, ...], tables: dict) -> Tensor:
        """The gradient for an input of size (N, C_in, H, W)."""
        n, channels, height, width = size
        grad_x = grad.new_zeros(height, n, width, channels)
        for part in g.products(height, width):
            part_grad, taps = grad[part.output], weight[part.weight].flatten(1, 2).transpose(1, 2)
            add_product(grad_x[part.input].view(*part_grad.shape[:2], taps.shape[2]), part_grad, taps)
        return grad_x.permute(1, 3, 0, 2)


class Patches:
    """One product for all output positions, of patches copied beforehand: few operations, on any device.

    On the CPU it is the quicker way where a kernel row sees less than SHORT numbers.
    """

    @staticmethod
    def forward(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, g: Geometry) -> Tensor:
        """Fill out (H_out, W_out, N, C_out); returns patches, (H_out, W_out, N, k_h * k_w * C_in)."""
        seen = g.patches(x)
        filters = weight.flatten(2, 4).flatten(0, 1)
        torch.baddbmm(bias.flatten(0, 1)[:, None], seen.flatten(0, 1), filters, out=out.flatten(0, 1))
        return seen

    @staticmethod
    def add_weight_gradient(total: Tensor, seen: Tensor, grad: Tensor, g: Geometry, alpha: float) -> None:
        """total += alpha * gradient, for total as the weight, contiguous, and grad (H_out, W_out, N, C_out)."""
        part = total.flatten(2, 4)
        patches, part_grad = seen.flatten(0, 1).transpose(1, 2), grad.flatten(0, 1)
        adjacent = part.stride(0) == part.shape[1] * part.stride(1)  # then all positions are one batch
        if adjacent and grad.device.type != "cpu":
            add_product(part.flatten(0, 1), patches, part_grad, alpha)
        else:
            part.add_(torch.bmm(patches, part_grad).unflatten(0, part.shape[:2]), alpha=alpha)

    @staticmethod
    def input_gradient(grad: Tensor, weight: Tensor, g: Geometry, size: tuple[int, ...], tables: dict) -> Tensor:
        """The gradient for an input of size (N, C_in, H, W): every pixel's is a sum over the taps that read it.

        What `_readers` returns is kept in `tables`.
        """
        n, channels, height, width = size
        filters = weight.flatten(2, 4).flatten(0, 1)
        taps = torch.bmm(grad.flatten(0, 1), filters.transpose(1, 2))  # (H_out * W_out, N, k_h * k_w * C_in)
        key = g, height, width, grad.device
        if detect_fake_mode(grad):
            tables = {}  # fake tensors are neither kept nor mixed with others
        if key not in tables:
            tables[key] = _readers(*key)
        readers, first = tables[key]
        # The same for n images. In `taps` all images of a position lie together, and of each image a whole window.
        window, images = math.prod(g.kernel), torch.arange(n, device=grad.device)[:, None]
        first = (first + images * len(readers)).flatten()
        readers = (readers // window * (n * window) + readers % window + images * window).flatten()
        grad_x = F.embedding_bag(readers, taps.view(-1, channels), first, mode="sum")
        return grad_x.view(n, height, width, channels).permute(0, 3, 1, 2)


def quicker_way(x: Tensor, g: Geometry) -> type[Rows] | type[Patches]:
    """By which of the two a layer of this geometry is the quicker on x (N, C, H, W)."""
    adjacent = x.shape[1] * (g.kernel[1] if g.dilation[1] == 1 else 1)
    return Rows if x.device.type == "cpu" and adjacent >= SHORT else Patches


def _readers(g: Geometry, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which taps read which pixel of one image (C_in, height, width).

    Returns (the taps, as indices into (H_out, W_out, k_h, k_w) flattened, in the order of the pixels; for each pixel
    where its taps begin).
    """
    readers: list[list[int]] = [[] for _ in range(height * width)]
    (s_h, s_w), (p_h, p_w), (d_h, d_w) = g.stride, g.padding, g.dilation
    for tap, (h, w, i, j) in enumerate(itertools.product(*map(range, (*g.outputs, *g.kernel)))):
        y, x = h * s_h + i * d_h - p_h, w * s_w + j * d_w - p_w
        if 0 <= y < height and 0 <= x < width:
            readers[y * width + x].append(tap)
    first = itertools.accumulate(map(len, readers[:-1]), initial=0)
    flat = itertools.chain.from_iterable(readers)
    return tuple(torch.tensor(list(numbers), dtype=torch.int64).to(device) for numbers in (flat, first))


class _LocallyConnected(torch.autograd.Function):
    """`LocallyConnected2d` by `Rows` or `Patches`; returns (N, H_out, W_out, C_out)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, fused_step: float | None, way: type,
        tables: dict,
    ) -> Tensor:  # fmt: skip
        rows, columns = g.outputs
        result = x.new_empty(len(x), rows, columns, weight.shape[-1])
        addend = x.new_zeros(1, 1, 1) if bias is None else bias[:rows, :columns]
        seen = way.forward(result.permute(1, 2, 0, 3), x, weight[:rows, :columns], addend, g)
        ctx.way, ctx.g, ctx.fused_step, ctx.tables = way, g, fused_step, tables
        ctx.save_for_backward(x, seen, weight, bias)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        (x, seen, weight, bias), g = ctx.saved_tensors, ctx.g
        if torch.is_grad_enabled():  # create_graph
            if ctx.fused_step is not None:
                raise RuntimeError("fused_step takes its step in the backward pass; there are no second derivatives")
            out = unfolded(x, weight, bias, g).permute(0, 2, 3, 1)
            inputs = [t for t, needed in zip((x, weight, bias), ctx.needs_input_grad) if needed]
            gradients = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
            return tuple(next(gradients) if needed else None for needed in ctx.needs_input_grad)
        rows, columns = g.outputs
        grad = grad.permute(1, 2, 0, 3)  # (H_out, W_out, N, C_out)
        if grad.stride(3) != 1:
            grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.way.input_gradient(grad, weight[:rows, :columns], g, x.shape, ctx.tables)
        if ctx.needs_input_grad[1] and ctx.fused_step is None:
            grad_weight = weight.new_zeros(weight.shape)  # contiguous, whatever the weight is
            ctx.way.add_weight_gradient(grad_weight[:rows, :columns], seen, grad, g, 1)
        elif ctx.needs_input_grad[1]:
            step = weight if weight.is_contiguous() else weight.new_zeros(weight.shape)
            ctx.way.add_weight_gradient(step[:rows, :columns], seen, grad, g, -ctx.fused_step)
            if step is not weight:
                weight.add_(step)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(2)
            if grad_bias.shape != bias.shape:
                grad_bias = F.pad(grad_bias, (0, 0, 0, bias.shape[1] - columns, 0, bias.shape[0] - rows))
        return grad_x, grad_weight, grad_bias, None, None, None, None
