"""What one training step of the eLCN asks of a GPU: operations, and bytes that they read and write.

    python benchmarks/operations.py             skinnyprime's eLCN, batch 250; runs on any machine, in seconds

The step is `fast.Step`'s, computed on the CPU in the way that CUDA takes. Counted is every operation that PyTorch
dispatches, but views and plain allocations, which launch nothing. Its bytes are those of the tensors it is given and of
those it returns, each once; a tensor changed in place is read and written. Some operations launch several kernels, and
the backward pass of pooling reads none of the input that it is given.
"""

import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import IMAGE_SHAPE, skinnyprime
from rnorm import layers
from rnorm.conversions import untie
from rnorm.fast import Step

NO_WORK = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view")
OVERWRITING = ("aten::copy_", "aten::zero_", "aten::fill_")


class Operations(TorchDispatchMode):
    """Within this context, `calls` collects (name, bytes read, bytes written) of every operation."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, name = func(*args, **kwargs), func._schema.name
        if func.is_view or name.startswith(NO_WORK):
            return result
        read, written = {}, sizes(result)
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            changed = argument.alias_info is not None and argument.alias_info.is_write
            if changed:
                written |= sizes(value)
            if not (argument.is_out or (changed and name in OVERWRITING)):
                read |= sizes(value)
        self.calls.append((name.removeprefix("aten::"), sum(read.values()), sum(written.values())))
        return result


def sizes(value):
    """The bytes of each tensor in `value`; what is expanded, or read several times by windows, counts once."""
    found = {}
    for t in tree_leaves(value):
        if isinstance(t, torch.Tensor):
            span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
            found[t.data_ptr(), t.shape, t.stride()] = min(t.numel(), max(0, span)) * t.element_size()
    return found


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


def main():
    calls = count_step(untie(skinnyprime().net, IMAGE_SHAPE), IMAGE_SHAPE, 250)
    totals = {}
    for name, read, written in calls:
        for each in (name, "all"):
            n, r, w = totals.get(each, (0, 0, 0))
            totals[each] = n + 1, r + read / 1e6, w + written / 1e6
    print("| operation | count | read, MB | written, MB | moved, MB |\n| --- | --- | --- | --- | --- |")
    for name, (n, r, w) in sorted(totals.items(), key=lambda item: sum(item[1][1:])):
        print(f"| {name} | {n} | {r:.1f} | {w:.1f} | {r + w:.1f} |")


if __name__ == "__main__":
    main()
