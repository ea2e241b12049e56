"""What one training step of the eLCN asks of a GPU: operations, and bytes that they read and write.

    python benchmarks/operations.py             skinnyprime's eLCN, batch 250; runs on any machine, in seconds
    python benchmarks/operations.py --all       every operation, in order

The step is `fast.Step`'s, computed on the CPU in the way that CUDA takes. Counted is every operation that PyTorch
dispatches, but views and plain allocations, which launch nothing. Its bytes are those of the tensors it is given and
of those it returns, each once; a tensor changed in place is read and written. So a count is a measure of the work, not
a prediction of kernels: some operations launch several (padding, a product with an addend), and the backward pass of
pooling is given its input, but reads none of it.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rnorm import layers
from rnorm.fast import Step

NO_WORK = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view")


class Operations(TorchDispatchMode):
    """Within this context, `calls` collects (name, bytes read, bytes written) of every operation."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        if func.is_view or name.startswith(NO_WORK):
            return result
        read, written = {}, {}
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            tensors = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
            changed = argument.alias_info is not None and argument.alias_info.is_write
            if changed:
                written.update((_identity(t), _bytes(t)) for t in tensors)
            overwritten = argument.is_out or name in ("aten::copy_", "aten::zero_", "aten::fill_") and changed
            if not overwritten:
                read.update((_identity(t), _bytes(t)) for t in tensors)
        returned = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        written.update((_identity(t), _bytes(t)) for t in returned)
        self.calls.append((func._schema.name.removeprefix("aten::"), sum(read.values()), sum(written.values())))
        return result


def _identity(t):
    return t.data_ptr(), t.shape, t.stride()


def _bytes(t):
    """The memory that `t` covers: what is expanded, or read several times by overlapping windows, counts once."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return min(t.numel(), max(0, span)) * t.element_size()


def count_step(net, image_shape, batch_size):
    """The operations of one training step in the way that CUDA takes: a list of (name, bytes read, bytes written)."""
    step = Step(net, image_shape, 0.01, batch_size=batch_size)
    x = torch.randn(batch_size, *image_shape).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch_size,))
    with patch.object(layers, "on_cpu", lambda x: False):
        step._eager(x, y)  # makes what later steps find made
        with Operations() as operations:
            step._eager(x, y)
    return operations.calls


def skinnyprime_elcn():
    from models import skinnyprime

    net, shapes = skinnyprime().net, layers.layer_shapes(skinnyprime().net, (3, 32, 32))
    return torch.nn.Sequential(*[
        layers.LocallyConnected2d.from_conv2d(layer, shapes[i][1:]) if isinstance(layer, torch.nn.Conv2d) else layer
        for i, layer in enumerate(net)
    ])  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="list every operation, in order")
    parser.add_argument("--batch_size", type=int, default=250)
    args = parser.parse_args()
    calls = count_step(skinnyprime_elcn(), (3, 32, 32), args.batch_size)
    if args.all:
        rows = [(name, 1, read, written) for name, read, written in calls]
    else:
        counts, reads, writes = Counter(), Counter(), Counter()
        for name, read, written in calls:
            counts[name] += 1
            reads[name] += read
            writes[name] += written
        names = sorted(counts, key=lambda name: -reads[name] - writes[name])
        rows = [(name, counts[name], reads[name], writes[name]) for name in names]
    rows.append(("all", len(calls), sum(c[1] for c in calls), sum(c[2] for c in calls)))
    print("| operation | count | read, MB | written, MB | moved, MB |\n| --- | --- | --- | --- | --- |")
    for name, count, read, written in rows:
        print(f"| {name} | {count} | {read / 1e6:.1f} | {written / 1e6:.1f} | {(read + written) / 1e6:.1f} |")


if __name__ == "__main__":
    main()
