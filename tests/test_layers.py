"""`LocallyConnected2d` computes its definition, with right derivatives, in every way it has and in anyone's program."""

import copy
import functools
import gc
import io
import itertools
import math
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from rnorm.layers import Geometry, LocallyConnected2d, Patches, Rows, layer_shapes, unfolded

ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}
GPU = pytest.param("cuda", marks=pytest.mark.cuda)
DEVICES = ["cpu", GPU]
WAYS = {"rows": Rows, "patches": Patches}


def by(way, net):
    """`net`, whose locally connected layers now compute in the way named."""
    for layer in net.modules():
        if isinstance(layer, LocallyConnected2d):
            layer.way = WAYS[way]
    return net


def plain(x, weight, bias, layer):
    """The definition of a locally connected layer: F.unfold and einsum."""
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (N, C_in * k, H * W)
    patches = patches.unflatten(1, (x.shape[1], -1)).unflatten(3, layer.output_size)
    out = torch.einsum("nckhw,hwkco->nohw", patches, weight.flatten(2, 3))
    return out if bias is None else out + bias.permute(2, 0, 1)


def of_the_definition(net):
    """A copy of `net` whose locally connected layers compute by `plain`."""
    net = copy.deepcopy(net)
    for layer in net:
        if isinstance(layer, LocallyConnected2d):
            layer.forward = lambda x, layer=layer: plain(x, layer.weight, layer.bias, layer)
    return net


def close(actual, expected, tolerance):
    """Whether two tensors agree, relative to the largest number expected."""
    return (actual.double() - expected.double()).abs().max() <= tolerance * (1e-3 + expected.abs().max())


def through_a_file(content, save=torch.save, load=torch.load):
    file = io.BytesIO()
    save(content, file)
    file.seek(0)
    return load(file)


def geometry_of(layer, outputs=None):
    return Geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation, outputs or layer.output_size)


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def cases(draw):
    """A layer of any geometry, an input in any memory format, how much of the output to compute, and its gradient."""
    kernel, stride, padding, dilation = draw(pairs(1, 5)), draw(pairs(1, 3)), draw(pairs(0, 4)), draw(pairs(1, 3))
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation)]
    size = tuple(draw(st.integers(n, n + 7)) for n in smallest)
    channels = draw(st.tuples(st.sampled_from([1, 2, 3, 7, 17, 49]), st.sampled_from([1, 2, 5, 19])))
    torch.manual_seed(draw(st.integers(0, 1000)))
    bias, dtype = draw(st.booleans()), draw(st.sampled_from([torch.float32, torch.float64]))
    layer = LocallyConnected2d(*channels, size, kernel, stride, padding, dilation, bias, dtype=dtype)
    x = torch.randn(draw(st.integers(1, 6)), channels[0], *size, dtype=dtype)
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    outputs = tuple(draw(st.integers(1, n)) for n in layer.output_size) if draw(st.booleans()) else layer.output_size
    grad = torch.randn(len(x), channels[1], *outputs, dtype=dtype)
    if draw(st.booleans()):
        grad = grad.mean().expand(grad.shape)  # what sum() sends back: one number, no memory of its own
    way = draw(st.sampled_from(list(WAYS)))
    return SimpleNamespace(layer=layer, x=x, outputs=outputs, grad=grad, way=way, tolerance=ROUNDING[dtype])


def expected(case):
    """(output, gradients for the input and for the parameters) by the definition, in float64."""
    x, *parameters = (t.detach().double().requires_grad_() for t in (case.x, *case.layer.parameters()))
    weight, bias = parameters if len(parameters) == 2 else (*parameters, None)
    out = plain(x, weight, bias, case.layer)[:, :, : case.outputs[0], : case.outputs[1]]
    return out, torch.autograd.grad(out, (x, *parameters), case.grad.double())


@settings(max_examples=120)
@given(cases())
def test_the_layer_computes_its_definition_its_gradients_and_fused_steps_in_every_way(case):
    layer, x, lr = by(case.way, case.layer), case.x.requires_grad_(), 0.3
    out, gradients = expected(case)
    for actual in (
        layer(x) if case.outputs == layer.output_size else layer.compute(x, layer.padding, case.outputs),
        unfolded(x, layer.weight, layer.bias, geometry_of(layer, case.outputs)),
    ):
        assert actual.shape == out.shape and close(actual, out, case.tolerance)
        got = torch.autograd.grad(actual, (x, *layer.parameters()), case.grad)
        assert all(close(*both, case.tolerance) for both in zip(got, gradients))
    before, layer.fused_step = layer.weight.detach().clone(), lr
    layer.compute(x, layer.padding, case.outputs).backward(case.grad)
    assert layer.weight.grad is None and close(layer.weight.detach(), before - lr * gradients[1], case.tolerance)
    assert close(x.grad, gradients[0], case.tolerance)
    assert layer.bias is None or close(layer.bias.grad, gradients[2], case.tolerance)


def small_layer(bias=True, device="cpu"):
    torch.manual_seed(0)
    layer = LocallyConnected2d(2, 3, (5, 4), (3, 2), (1, 2), (1, 2), (1, 2), bias, device, torch.float64)
    return layer, torch.randn(2, 2, 5, 4, dtype=torch.float64, device=device, requires_grad=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [True, False])
def test_first_and_second_derivatives_are_those_of_finite_differences(bias, way, device):
    layer, x = small_layer(bias, device)
    by(way, layer)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()), fast_mode=device == "cuda")
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), (x, *layer.parameters()), fast_mode=True)
    layer.requires_grad_(False)
    assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)
    layer.weight.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda _: layer(x.detach()).square(), (layer.weight,), fast_mode=True)


def test_a_fused_step_refuses_what_would_lose_it():
    layer, x = small_layer()
    layer.fused_step = 0.1
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    assert torch.equal(layer.weight, before)
    compiling, tracing = (patch(f"torch.{name}", lambda: True) for name in ("compiler.is_compiling", "jit.is_tracing"))
    for context in (torch.autocast("cpu"), compiling, tracing):
        with pytest.raises(ValueError, match="neither autocast, torch.compile, tracing"), context:
            layer(x)
    with pytest.raises(ValueError, match="nor parametrizations"):
        weight_norm(layer)(x)


# What the docstring's table promises.


def train(net, steps, optimizer="SGD", lr=0.3):
    """The losses of some steps on noise."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 3, 8, 8, requires_grad=True), torch.arange(32) % 2
    optimizer = getattr(torch.optim, optimizer)(net.parameters(), lr=lr)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return [optimizer.step(closure).item() for _ in range(steps)]


def net_of_anyone(seed=0, **kwargs):
    torch.manual_seed(seed)
    layer = LocallyConnected2d(3, 4, 8, 3, **kwargs)
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(4 * math.prod(layer.output_size), 2))


@pytest.mark.parametrize("optimizer, lr", [("SGD", 0.3), ("AdamW", 0.01), ("Adagrad", 0.05), ("LBFGS", 0.3)])
def test_any_optimiser_trains_it_as_it_trains_the_definition(optimizer, lr):
    net = net_of_anyone()
    losses, by_definition = (train(n, 20, optimizer, lr) for n in (net, of_the_definition(net)))
    assert losses[-1] < 0.5 * losses[0]
    assert losses == pytest.approx(by_definition, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_autocast_is_followed_as_a_convolution_follows_it(way):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 2, 3), torch.randn(2, 3, 8, 8)
    layer = by(way, LocallyConnected2d.from_conv2d(conv, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out, reference = layer(x), conv(x)
    (out.float().square().sum() + reference.float().square().sum()).backward()
    assert out.dtype == reference.dtype == torch.bfloat16 and close(out, reference, 0.02)
    assert layer.weight.grad.dtype == torch.float32
    assert close(layer.weight.grad.sum((0, 1)).permute(3, 2, 0, 1), conv.weight.grad, 0.03)


@pytest.mark.parametrize("x, weight", [
    (torch.float64, torch.float32), (torch.float32, torch.bfloat16), (torch.complex64, torch.complex64),
])  # fmt: skip
def test_mixed_and_complex_dtypes_are_refused_by_name(x, weight):
    with pytest.raises(ValueError, match=f"{x}.*{weight}"):
        LocallyConnected2d(3, 4, 8, 3, dtype=weight)(torch.randn(2, 3, 8, 8, dtype=x))


def traced(net):
    net = through_a_file(torch.jit.trace(net, torch.randn(2, 3, 8, 8)), torch.jit.save, torch.jit.load)
    assert "aten::unfold" not in str(net.inlined_graph)  # the older ONNX exporter has none for an input with padding
    return net


def exported(net):
    program = torch.export.export(net, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("n")},))
    return through_a_file(program, torch.export.save, torch.export.load).module()


def compiled(net):
    return torch.compile(net, backend="aot_eager", fullgraph=True)  # the default backend needs a C++ compiler


def checkpointed(net, reentrant):
    net[0].forward = functools.partial(torch.utils.checkpoint.checkpoint, net[0].forward, use_reentrant=reentrant)
    return net


@pytest.fixture(scope="module")
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and warns that the images' size is fixed
@pytest.mark.parametrize("form", [
    compiled, exported, traced, nn.parallel.DistributedDataParallel,
    *(functools.partial(checkpointed, reentrant=reentrant) for reentrant in (True, False)),
    lambda net: nn.Sequential(net[0], nn.ReLU(inplace=True), *net[2:]),
])  # fmt: skip
@pytest.mark.parametrize("padding", [0, 2])
def test_in_every_form_it_trains_as_it_is(form, padding, process_group):
    net = net_of_anyone(padding=padding, dilation=1 + padding)
    assert train(form(copy.deepcopy(net)), 3) == pytest.approx(train(net, 3), rel=1e-5)


def test_functional_call_takes_other_parameters_and_they_can_be_flattened():
    net, other, x = net_of_anyone(), net_of_anyone(seed=1), torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.func.functional_call(net, dict(other.named_parameters()), x), other(x))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(other.parameters()), net.parameters())
    assert torch.equal(net(x), other(x))


def test_transforms_of_torch_func_batched_gradients_and_complex_numbers_work_with_the_plain_form():
    layer, x = small_layer()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: layer(x).sum())(x)
    got = torch.func.grad(lambda x: unfolded(x, layer.weight, layer.bias, geometry_of(layer)).sum())(x)
    assert close(got, torch.autograd.grad(layer(x).sum(), x)[0], 1e-12)
    batch = torch.randn(4, *layer(x).shape, dtype=x.dtype)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.grad(layer(x), x, batch, is_grads_batched=True)
    out = unfolded(x, layer.weight, layer.bias, geometry_of(layer))
    (got,) = torch.autograd.grad(out, x, batch, is_grads_batched=True)
    assert close(got, torch.stack([torch.autograd.grad(layer(x), x, grad)[0] for grad in batch]), 1e-12)
    parts = [t.detach().to(torch.complex128).requires_grad_() for t in (x, layer.weight, layer.bias)]
    assert torch.autograd.gradcheck(lambda *parts: unfolded(*parts, geometry_of(layer)), parts, fast_mode=True)


# Files and copies.


def test_a_state_dict_has_the_shapes_of_the_file_format_and_shares_the_parameters_memory():
    layer = LocallyConnected2d(3, 4, (7, 6), (3, 2))
    state = layer.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {"weight": (1, 4, 3, 5, 5, 6), "bias": (1, 4, 5, 5)}
    assert torch.equal(layer.filters, state["weight"])
    state["weight"][0, 1, 2, 3, 4, 5] = 7
    assert layer.weight[3, 4, 2, 1, 2, 1] == 7 and not state["weight"].requires_grad
    for name, parameter in layer.named_parameters():
        assert layer.state_dict(keep_vars=True)[name] is parameter
        assert state[name].untyped_storage().nbytes() == state[name].nbytes  # else safetensors' save_model refuses it


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layout", [lambda t: t, lambda t: t.contiguous()])  # ours, and that of the released code
def test_weights_survive_a_file_in_any_memory_order(layout, assign):
    net, other = net_of_anyone(), net_of_anyone(seed=1)
    state = through_a_file({name: layout(t) for name, t in net.state_dict().items()})
    other.load_state_dict(state, assign=assign)
    assert all(torch.equal(p, q) and q.is_contiguous() for p, q in zip(net.parameters(), other.parameters()))
    other(torch.randn(2, 3, 8, 8)).sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils")  # the old kind is deprecated
@pytest.mark.parametrize("normalise", [
    lambda layer: weight_norm(layer, dim=5), spectral_norm, lambda layer: weight_norm(layer, "bias"),
    nn.utils.weight_norm, nn.utils.spectral_norm, lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.25),
])  # fmt: skip
def test_parametrized_it_trains_and_survives_a_file_and_a_copy(normalise):
    net, other, x = net_of_anyone(), net_of_anyone(), torch.randn(2, 3, 8, 8)
    normalise(net[0])
    normalise(other[0])
    losses = train(net, 10)
    assert losses[-1] < losses[0]
    other.load_state_dict(through_a_file(net.state_dict()))
    copies = [other, copy.deepcopy(net)] if hasattr(net[0], "parametrizations") else [other]
    assert all(torch.equal(n.eval()(x), net.eval()(x)) for n in copies)


def test_a_state_dict_that_does_not_fit_is_refused_with_the_shapes_of_the_file_format():
    layer = LocallyConnected2d(3, 4, 8, 3)
    for wrong in ({"weight": layer.weight.data}, {"weight": layer.filters.data[:, :2]}):
        with pytest.raises(RuntimeError, match=r"size mismatch for weight.*\(1, 4, 3, 6, 6, 9\)"):
            layer.load_state_dict(layer.state_dict() | wrong)
    with pytest.raises(RuntimeError, match="Missing key.*bias"):
        layer.load_state_dict({"weight": layer.filters.data})


@pytest.mark.parametrize("fused_step", [None, 0.3])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_in_any_memory_order_gets_its_gradient_and_its_steps(way, fused_step):
    layer, x = small_layer()
    reference = copy.deepcopy(by(way, layer))
    for order in itertools.islice(itertools.permutations(range(6)), 0, None, 37):
        back = [order.index(i) for i in range(6)]
        layer.weight = nn.Parameter(reference.weight.detach().clone().permute(order).contiguous().permute(back))
        layer.fused_step, reference.weight.grad = fused_step, None
        layer(x).square().sum().backward()
        reference(x).square().sum().backward()
        if fused_step:
            expected = reference.weight - fused_step * reference.weight.grad
            assert close(layer.weight.detach(), expected.detach(), 1e-12)
        else:
            assert close(layer.weight.grad, reference.weight.grad, 1e-12)


def test_an_orthogonal_layer_learns():
    layer, x = LocallyConnected2d(3, 5, 4, 3), torch.randn(2, 3, 4, 4)
    nn.utils.parametrizations.orthogonal(layer)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    before = layer.weight.detach().clone()
    layer(x).square().sum().backward()
    optimizer.step()
    assert not close(layer.weight.detach(), before, 1e-3)


def test_parameters_in_the_shapes_of_the_file_format_are_refused():
    """Of the second layer's weight both shapes are the same."""
    for layer in (LocallyConnected2d(3, 4, 8, 3), LocallyConnected2d(3, 3, 3, (3, 1), bias=False)):
        x = torch.randn(2, 3, *layer.input_size)
        with pytest.raises(ValueError, match="is it a state dict's"):
            torch.func.functional_call(layer, layer.state_dict(), x)
        with pytest.raises(RuntimeError, match="without keep_vars=True"):
            layer.load_state_dict(layer.state_dict(keep_vars=True))
        assert torch.equal(torch.func.functional_call(layer, dict(layer.named_parameters()), x), layer(x))


def test_copies_are_independent():
    layer, x = small_layer()
    copies = copy.deepcopy(layer), through_a_file(layer, load=functools.partial(torch.load, weights_only=False))
    expected = layer(x)
    nn.init.zeros_(layer.weight)
    assert all(torch.equal(other(x), expected) for other in copies) and not torch.equal(layer(x), expected)


# Edges.


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_batch_has_gradients_of_zero(way):
    layer, _ = small_layer()
    x = torch.empty(0, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    out = by(way, layer)(x)
    out.sum().backward()
    assert out.shape == (0, 3, *layer.output_size) and x.grad.shape == x.shape
    assert not layer.weight.grad.any() and not layer.bias.grad.any()


def test_shapes_are_those_of_the_docstrings_example_and_known_without_data():
    layer = LocallyConnected2d(16, 33, (50, 100), kernel_size=(3, 5), stride=(2, 1), padding=(4, 2), device="meta")
    assert layer(torch.empty(20, 16, 50, 100, device="meta")).shape == (20, 33, 28, 100)
    shapes = layer_shapes(nn.Sequential(layer, nn.Flatten()), (16, 50, 100))
    assert shapes == [(16, 50, 100), (33, 28, 100), (33 * 28 * 100,)]
    assert "kernel_size=(3, 5)" in repr(layer)


def test_an_untied_convolution_computes_what_it_did():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 0), (1, 2)).double(), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    layer = LocallyConnected2d.from_conv2d(conv, (9, 8))
    assert close(layer(x), conv(x), 1e-12)
    assert torch.equal(layer.filters, conv.weight.flatten(2)[None, :, :, None, None].expand_as(layer.filters))
    for other in (nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")):
        with pytest.raises(ValueError, match="can be untied"):
            LocallyConnected2d.from_conv2d(other, 9)


@pytest.mark.parametrize("init", [None, nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.orthogonal_])
def test_the_layer_is_initialised_like_a_convolution(init):
    torch.manual_seed(0)
    layer, conv = LocallyConnected2d(8, 16, 12, 5), nn.Conv2d(8, 16, 5)
    if init:
        init(conv.weight)
        layer.reset_parameters(init)
        with pytest.raises(AttributeError, match="`weight` is not"):
            weight_norm(copy.deepcopy(layer)).reset_parameters(init)  # instead of drawing what is thrown away
    for weight in (layer.weight, layer.weight[-1, -1]):  # all filters, and those of one position
        assert weight.std().item() == pytest.approx(conv.weight.std().item(), rel=0.05)
    assert layer.bias.abs().max() <= 1 / (8 * 25) ** 0.5


def bytes_of_indices():
    gc.collect()
    return sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.int64)


@pytest.mark.parametrize("way", WAYS)
def test_what_a_layer_keeps_does_not_grow_with_the_sizes_of_batches_and_goes_with_the_layer(way):
    before, layer, sizes = bytes_of_indices(), by(way, LocallyConnected2d(1, 1, 7, 2)), []
    for n in (1, 2, 9):
        layer(torch.randn(n, 1, 7, 7, requires_grad=True)).sum().backward()
        sizes.append(bytes_of_indices())
    del layer
    assert sizes[0] == sizes[-1] and bytes_of_indices() == before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", [lambda net: net, compiled, exported])
def test_the_output_has_the_memory_format_of_the_input_as_a_convolutions_has(form, way):
    conv = nn.Conv2d(3, 4, 3)
    layer = form(by(way, LocallyConnected2d.from_conv2d(conv, 8)))
    for x in (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)):
        assert layer(x).stride() == conv(x).stride() or form is exported  # which fixes that of its example
    assert layer(torch.randn(2, 3, 8, 8)).view(2, -1).shape == (2, 4 * 6 * 6)


@pytest.mark.parametrize("sizes", [
    (0, 1, 5, 3), (1, 1, 5, 6), (1, 1, 5, 3, 0), (1, 1, 5, 3, 1, -1), (1, 1, (8, 8, 3), 3), (1, 1, (8,), 3),
])  # fmt: skip
def test_impossible_sizes_and_inputs_of_another_size_are_refused(sizes):
    with pytest.raises(ValueError):
        LocallyConnected2d(*sizes)
    with pytest.raises(ValueError, match="expected an input"):
        LocallyConnected2d(3, 4, 8, 3)(torch.zeros(1, 3, 9, 8))


@pytest.mark.parametrize("kernel, dilation", [(3, 1), ((2, 4), 1), ((3, 2), (2, 3))])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_is_given_in_words_and_a_single_image_is_taken_as_by_a_convolution(padding, kernel, dilation):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 3, kernel, padding=padding, dilation=dilation).double(), torch.randn(4, 2, 9, 8).double()
    layer = LocallyConnected2d.from_conv2d(conv, (9, 8))
    assert close(layer(x), conv(x), 1e-12) and close(layer(x[0]), conv(x[0]), 1e-12)
    for word, stride in (("same", 2), ("full", 1)):
        with pytest.raises(ValueError, match='it takes numbers, "valid", and "same" with stride 1'):
            LocallyConnected2d(2, 3, 9, 3, stride, word)


def test_sizes_may_be_numpys_and_an_input_that_is_no_tensor_is_refused():
    layer = LocallyConnected2d(2, 3, np.int64(5), np.array([3, 2]), np.int32(1))
    assert layer.output_size == (3, 4) and type(layer.kernel_size[0]) is int
    with pytest.raises(TypeError, match="expected a tensor, not NoneType"):
        layer(None)


def test_it_is_one_node_of_a_symbolic_trace():
    net, x = net_of_anyone(), torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_traced_with_fake_tensors_it_computes_its_gradients_and_keeps_none_of_them(way):
    """So no number is read off the device in a step."""
    from functorch.compile import aot_module, nop

    net, x = by(way, net_of_anyone(padding=1)), torch.randn(2, 3, 8, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    for other in (net, by(way, net_of_anyone(padding=1))):  # after a step of its own, and before
        (got,) = torch.autograd.grad(aot_module(other, fw_compiler=nop, bw_compiler=nop)(x).sum(), x)
        assert close(got, expected, 1e-5)
        assert torch.equal(torch.autograd.grad(other(x).sum(), x)[0], expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert torch.autograd.grad(net(x).sum(), x)[0].shape == x.shape


def test_its_operations_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = LocallyConnected2d(16, 8, 10, 3), torch.randn(2, 16, 10, 10, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * layer.weight.numel()
