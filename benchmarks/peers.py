"""The other ways to train the untied network that step.py measures: the released code's, PyTorch's, JAX's, Keras's.

Each takes the network, images (N, 3, 32, 32) and labels (N,), and returns a step: a function that trains once and
returns another, which waits for the loss and returns it.
"""

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnorm.layers import LocallyConnected2d

IMAGE, LR = (3, 32, 32), 0.05


class Unavailable(Exception):
    """An implementation that cannot be measured here; the message says why."""


def autograd_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Callable:
    """A step of plain PyTorch."""
    optimizer = torch.optim.SGD(net.parameters(), LR)

    def step() -> Callable[[], float]:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        return loss.item

    return step


def in_file(layer: LocallyConnected2d) -> tuple[Tensor, Tensor]:
    """Weight (1, C_out, C_in, H_out, W_out, k * k) and bias (1, C_out, H_out, W_out), as in the file format."""
    state = layer.state_dict()
    return state["weight"], state["bias"]


class Broadcast(nn.Module):
    """The approach of the released code: multiply patches and filters, broadcast against each other, and sum."""

    def __init__(self, layer: LocallyConnected2d):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(p.clone().contiguous()) for p in in_file(layer))
        self.kernel, self.stride = layer.kernel_size, layer.stride

    def forward(self, x: Tensor) -> Tensor:
        x = x.unfold(2, self.kernel[0], self.stride[0]).unfold(3, self.kernel[1], self.stride[1])
        return (x.flatten(4)[:, None] * self.weight).sum((2, -1)) + self.bias  # product: (N, C_out, C_in, H, W, k * k)


class Unfold(nn.Module):
    """What a PyTorch user would write: F.unfold, then one batched product over the positions."""

    def __init__(self, layer: LocallyConnected2d):
        super().__init__()
        weight, bias = in_file(layer)
        weight = weight[0].permute(2, 3, 1, 4, 0)  # (H_out, W_out, C_in, k * k, C_out)
        self.weight = nn.Parameter(weight.flatten(2, 3).flatten(0, 1).contiguous())
        self.bias = nn.Parameter(bias[0].flatten(1).T[:, None].contiguous())  # (H_out * W_out, 1, C_out)
        self.kernel, self.stride, self.size = layer.kernel_size, layer.stride, layer.output_size

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, self.kernel, stride=self.stride).permute(2, 0, 1)  # (H_out * W_out, N, C_in * k * k)
        return torch.baddbmm(self.bias, patches, self.weight).permute(1, 2, 0).unflatten(2, self.size)


def with_layers(make: Callable) -> Callable:
    """A step of the eLCN with other locally connected layers."""
    return lambda net, x, y: autograd_step(
        nn.Sequential(*[make(m) if isinstance(m, LocallyConnected2d) else m for m in net]), x, y
    )


def jax_step(net: nn.Sequential, x: Tensor, y: Tensor) -> Callable:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes most of the GPU's memory
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        raise Unavailable("JAX is not installed") from None
    if jax.default_backend() != ("gpu" if x.is_cuda else "cpu"):
        raise Unavailable(f"this JAX computes on {jax.default_backend()} only")
    convs, dense = [m for m in net if isinstance(m, LocallyConnected2d)], net[-1]
    paddings = [m.padding[0] for m in net if isinstance(m, nn.ZeroPad2d)]
    values = [(w[0].permute(0, 1, 4, 2, 3).flatten(1, 2), b) for w, b in map(in_file, convs)]  # (C_out, C_in k k, H, W)
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
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # else it takes all of the GPU's memory
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
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
            weights.append(m.weight.detach().flatten(2, 4).flatten(0, 1))  # (H W, k k C_in, C_out)
            weights.append(m.bias)
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
