"""A pretended GPU: tests of CUDA compute on it where there is no real one.

    with pretended() as gpu:               torch makes tensors of the pretended GPU for the device "cuda"
    python tests/fake_gpu.py SCRIPT ...    a script with its arguments, on a pretended GPU

Its tensors say that they are on "cuda:0" and hold their numbers in a CPU tensor. What breaks on a real GPU breaks here:

- An operation on tensors of both devices raises torch's error.
- `gpu.waits` lists whatever makes the host wait for the GPU, copies between the two among them. Inside the capture of a
  graph such an operation raises CUDA's error. After a failed capture every other fails, as in torch 2.6 to 2.12.
- Inside a capture, an operation on the host is an AssertionError: CUDA lets it pass, but no replay repeats it.
- A capture changes no tensor. A replay repeats the captured operations, on the memory that they were captured on.
- The GPU has a random generator of its own.

It cannot show how a GPU rounds, how long it takes, or what its streams do at once.
"""

import contextlib
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE, META = torch.device("cuda", 0), torch.device("meta")
WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "repeat_interleave")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class OnGpu(Tensor):
    """A tensor of the pretended GPU; `held` is the CPU tensor with its numbers. For torch's C++ it is on META."""

    @staticmethod
    def __new__(cls, held: Tensor, gpu: "Gpu"):
        tensor = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=META,
        )  # fmt: skip
        tensor.held, tensor.gpu = held, gpu
        return tensor

    device = property(lambda self: DEVICE)
    is_cuda, is_cpu, is_meta = True, False, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"OnGpu({self.held})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = copied = self.detach().clone().requires_grad_(self.requires_grad)
            copied._is_param = getattr(self, "_is_param", False)
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Reached in threads other than the one that pretends."""
        gpu = next(leaf.gpu for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, OnGpu))
        return gpu.__torch_dispatch__(func, types, args, kwargs)


class Names(TorchFunctionMode):
    """Tells torch's C++ META where a function is called with the device "cuda"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def rename(value):
            named = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
            return META if named and func is not torch.device else value

        kwargs = {name: rename(value) for name, value in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META:  # no mode sees these filled
            return func(*args, **kwargs | {"device": "cpu"}).to(META)
        return func(*map(rename, args), **kwargs)


class Graph:
    """What a capture records: (function, its arguments, its results), and the storages it read, as they were before."""

    def __init__(self):
        self.calls, self.before = [], {}

    def replay(self):
        for func, args, kwargs, results in self.calls:
            for old, new in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor changed in place
                    old.copy_(new)


class Generator(torch.Generator):
    def graphsafe_set_state(self, other):
        self.set_state(other.get_state())


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


class Gpu(TorchDispatchMode):
    """Sees every operation of torch. `captures` counts the captures that were tried."""

    def __init__(self):
        super().__init__()
        self.waits, self.captures, self.graph, self.stuck = [], 0, None, False
        self.generator = Generator()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
        on_host = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
        if kwargs.get("device") is not None:
            to_gpu, kwargs["device"] = kwargs["device"] in (META, DEVICE), torch.device("cpu")
        else:
            to_gpu = isinstance(args[0], OnGpu) if name == "copy_" else bool(on_gpu)
        self._judge(name, args, on_gpu, on_host, to_gpu)
        if to_gpu and any(argument.name == "generator" for argument in func._schema.arguments):
            kwargs["generator"] = self.generator

        args, kwargs = tree_map_only(OnGpu, lambda tensor: tensor.held, (args, kwargs))
        if self.graph:
            for storage in [tensor.held.untyped_storage() for tensor in on_gpu]:
                self.graph.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        results = func(*args, **kwargs)
        if self.graph:
            self.graph.calls.append((func, args, kwargs, results))
        if not to_gpu:
            return results
        given = {id(tensor.held): tensor for tensor in on_gpu}  # returned by what changes them in place
        return tree_map_only(Tensor, lambda result: given.get(id(result), OnGpu(result, self)), results)

    def _judge(self, name, args, on_gpu, on_host, to_gpu):
        """Note a wait; raise the error that a GPU would raise."""
        moves = name in ("copy_", "_to_copy") and bool(on_host or not to_gpu) and bool(on_gpu or to_gpu)
        indexes = name in INDEXING and isinstance(args[0], OnGpu)
        if on_gpu and any(tensor.dim() for tensor in on_host) and not moves and not indexes:
            raise RuntimeError(f"Expected all tensors to be on the same device, cuda:0 and cpu! ({name})")
        indices = [index for index in tree_leaves(args[1]) if isinstance(index, Tensor)] if indexes else []
        masks = any(not isinstance(index, OnGpu) or index.dtype in (torch.bool, torch.uint8) for index in indices)
        waits = moves or masks or (name in WAITING and bool(on_gpu))
        if waits:
            self.waits.append(name)
        if self.graph and waits:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({name})\nSearch for ...")
        if self.graph and name != "lift_fresh":  # torch.tensor's, which moves it next
            assert to_gpu and not on_host, f"{name} is computed on the host inside a capture"

    @contextlib.contextmanager
    def capture(self, graph, **options):
        self.captures += 1
        if self.stuck:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED, please report a bug to PyTorch")
        self.graph, random = graph, self.generator.get_state()
        try:
            yield
        except RuntimeError as error:
            self.stuck = True
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nSearch") from error
        finally:
            self.graph = None
            self.generator.set_state(random)
            for storage, content in graph.before.values():
                storage.copy_(content)


@contextlib.contextmanager
def pretended():
    gpu = Gpu()
    names = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "get_device_name": lambda device=None: "a pretended GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "max_memory_allocated": lambda device=None: 0, "empty_cache": lambda: None,
        "synchronize": lambda device=None: gpu.waits.append("synchronize"),
        "manual_seed_all": gpu.generator.manual_seed, "default_generators": {None: gpu.generator, 0: gpu.generator},
        "get_rng_state": lambda device=None: gpu.generator.get_state(),
        "set_rng_state": lambda state, device=None: gpu.generator.set_state(state),
        "Stream": Stream, "stream": contextlib.nullcontext, "current_stream": Stream,
        "CUDAGraph": Graph, "graph": gpu.capture,
    }  # fmt: skip
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # .data cannot take a tensor of another class
    try:
        with patch.multiple(torch.cuda, **names), gpu, Names():
            yield gpu
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


if __name__ == "__main__":
    sys.argv[:1], sys.path[:0] = [], [str(Path(__file__).parents[1])]
    import small_study  # noqa: F401  makes `--network small` known

    with pretended():
        runpy.run_path(sys.argv[0], run_name="__main__")
