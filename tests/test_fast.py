"""Speed changes no result beyond rounding: every fast path against a plain reference."""

import copy
import math
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import models
from convert import untie
from fast import Stage, Step, streamline
from models import LocallyConnected2d, layer_shapes, skinnyprime, unfolded

ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}


def drawn(strategy, examples):
    """The same random examples in every run, however long one takes."""
    quiet = settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    return lambda test: quiet(given(strategy)(test))


def plain(x, weight, bias, layer):
    """The definition of a locally connected layer: F.unfold and einsum."""
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (N, C_in * k, H * W)
    patches = patches.unflatten(1, (x.shape[1], -1)).unflatten(3, layer.output_size)
    out = torch.einsum("nckhw,ochwk->nohw", patches, weight[0])
    return out if bias is None else out + bias


def portable(layer, x, padding, outputs):
    """`LocallyConnected2d.compute` as on devices other than the CPU."""
    geometry = models.Geometry(layer.kernel_size, layer.stride, padding, layer.dilation, outputs)
    return unfolded(x, layer.weight, layer.bias, geometry)


def close(actual, expected, tolerance):
    """Whether two tensors agree, relative to the largest number expected."""
    return (actual.double() - expected.double()).abs().max() <= tolerance * (1e-3 + expected.abs().max())


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def layers(draw):
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
    short = draw(st.sampled_from([0, 48, math.inf]))  # kernel rows in place, as it comes, patches copied
    return SimpleNamespace(layer=layer, x=x, outputs=outputs, grad=grad, short=short, tolerance=ROUNDING[dtype])


def expected(case):
    """(output, gradients for the input and for the parameters) by the plain reference, in float64."""
    x, *parameters = (t.detach().double().requires_grad_() for t in (case.x, *case.layer.parameters()))
    weight, bias = parameters if len(parameters) == 2 else (*parameters, None)
    out = plain(x, weight, bias, case.layer)[:, :, : case.outputs[0], : case.outputs[1]]
    return out, torch.autograd.grad(out, (x, *parameters), case.grad.double())


@drawn(layers(), examples=120)
def test_the_cpu_layer_and_the_portable_one_compute_the_definition_and_its_gradients(case):
    layer, x = case.layer, case.x.requires_grad_()
    out, gradients = expected(case)
    with patch.object(models._InPlace, "SHORT", case.short):
        for actual in (
            layer(x) if case.outputs == layer.output_size else layer.compute(x, layer.padding, case.outputs),
            portable(layer, x, layer.padding, case.outputs),
        ):
            assert actual.shape == out.shape and close(actual, out, case.tolerance)
            got = torch.autograd.grad(actual, (x, *layer.parameters()), case.grad)
            assert all(close(*both, case.tolerance) for both in zip(got, gradients))


@drawn(layers(), examples=60)
def test_a_fused_step_is_a_step_of_plain_sgd(case):
    layer, lr = case.layer, 0.3
    gradients = expected(case)[1]
    before = [p.detach().clone() for p in layer.parameters()]
    layer.fused_step = lr
    with patch.object(models._InPlace, "SHORT", case.short):
        x = case.x.requires_grad_()
        layer.compute(x, layer.padding, case.outputs).backward(case.grad)
    assert close(x.grad, gradients[0], case.tolerance)
    for parameter, old, gradient in zip(layer.parameters(), before, gradients[1:]):
        assert parameter.grad is None
        assert close(parameter.detach(), old - lr * gradient, case.tolerance)


@pytest.mark.parametrize("short", [0, math.inf])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias, short):
    torch.manual_seed(0)
    layer = LocallyConnected2d(2, 3, (5, 4), (3, 2), (2, 1), (1, 2), (1, 2), bias, dtype=torch.float64)
    inputs = (torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True), *layer.parameters())
    with patch.object(models._InPlace, "SHORT", short):
        assert torch.autograd.gradcheck(lambda x, *_: layer(x), inputs)
    assert torch.autograd.gradgradcheck(lambda x, *_: portable(layer, x, layer.padding, layer.output_size), inputs)


def test_the_order_of_the_weight_in_memory_changes_nothing_but_a_fused_step_refuses_another():
    torch.manual_seed(0)
    layer = LocallyConnected2d(3, 4, 6, 3)
    other = copy.deepcopy(layer)
    other.weight.data = other.weight.data.contiguous()
    x = torch.randn(2, 3, 6, 6)
    for net in (layer, other):
        net(x).square().sum().backward()
    assert torch.equal(layer(x), other(x)) and torch.equal(layer.weight.grad, other.weight.grad)
    other.fused_step = 0.1
    with pytest.raises(ValueError, match="memory order"):
        other(x)


def test_other_devices_get_the_portable_layer():
    layer = LocallyConnected2d(3, 4, (7, 5), 3, padding=1, device="meta")
    out = layer(torch.empty(2, 3, 7, 5, device="meta"))
    assert out.shape == (2, 4, 7, 5) and "PatchRows" not in type(out.grad_fn).__name__


def head(*layers):
    """`layers` with ReLU and max pooling after them, as in skinnyprime."""
    return (*layers, nn.ReLU(), nn.MaxPool2d(3, 2))


NETWORKS = {
    "no padding layer": head(nn.Conv2d(3, 4, 3)),
    "padding in the convolution": head(nn.Conv2d(3, 4, 3, padding=(2, 1))),
    "padding in both, uneven": head(nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(3, 4, 3, padding=1)),
    "two padding layers": head(nn.ZeroPad2d(1), nn.ZeroPad2d(2), nn.Conv2d(3, 4, 3)),
    "negative padding": head(nn.ZeroPad2d((-1, 1, 2, -2)), nn.Conv2d(3, 4, 3)),
    "padding with nothing to pad for": (nn.Conv2d(3, 4, 3), nn.ZeroPad2d(1), nn.ReLU(), nn.ZeroPad2d(1)),
    "stride leaves a rest": head(nn.Conv2d(3, 4, 2, stride=3)),
    "dilation, no bias": head(nn.Conv2d(3, 4, (3, 2), dilation=(1, 2), bias=False)),
    "no ReLU": (nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2)),
    "two ReLUs": (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2)),
    "ReLU in place": (nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    "pooling before ReLU": (nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2), nn.ReLU()),
    "no pooling": (nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)),
    "average pooling": (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(3, 2)),
    "pooling with padding": (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)),
    "pooling with ceil_mode": (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
    "pooling with dilation": (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2, dilation=2)),
    "pooling with gaps": (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d((1, 2), (3, 4))),
    "dropout between": (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.MaxPool2d(2), nn.Dropout2d(0.5)),
    "batch normalisation between": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2)),
    "groups": head(nn.ZeroPad2d(1), nn.Conv2d(3, 6, 3, groups=3)),
    "padding as a word": head(nn.Conv2d(3, 4, 3, padding="same")),
    "reflected padding": head(nn.ZeroPad2d(1), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
    "layers within a layer": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.MaxPool2d(3, 2)),
}  # fmt: skip


def untied_where_possible(net, image_shape):
    """`net` with every convolution that can be untied untied, and different filters at every position."""
    layers, shapes = copy.deepcopy(list(net)), layer_shapes(net, image_shape)
    for i, layer in enumerate(layers):
        if type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros" and layer.padding != "same":
            layers[i] = LocallyConnected2d.from_conv2d(layer, shapes[i][1:])
            layers[i].weight.data += 0.1 * torch.randn_like(layers[i].weight)
    return nn.Sequential(*layers)


def assert_streamlined_is_the_same(net, image_shape, n=3):
    fast = streamline(net, image_shape)
    assert set(fast.parameters()) == set(net.parameters())
    x = torch.randn(n, *image_shape, dtype=torch.float64, requires_grad=True)
    inputs = (x, *net.parameters())
    out, fast_out = net(x), fast(x)
    grad = torch.randn_like(out)
    assert fast_out.shape == out.shape and close(fast_out, out, 1e-12)
    gradients = zip(torch.autograd.grad(fast_out, inputs, grad), torch.autograd.grad(out, inputs, grad))
    assert all(close(*both, 1e-12) for both in gradients)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_streamlined_network_computes_the_same_function_and_gradients(name):
    torch.manual_seed(0)
    net = nn.Sequential(*NETWORKS[name]).double()
    if "dropout" in name:
        net.eval()
    for image_shape in ((3, 11, 14), (3, 12, 9)):
        assert_streamlined_is_the_same(net, image_shape)
        assert_streamlined_is_the_same(untied_where_possible(net, image_shape).train(net.training), image_shape)


@drawn(st.data(), examples=40)
def test_so_does_a_streamlined_network_of_any_geometry(data):
    def draw(low, high):
        return data.draw(pairs(low, high))

    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, draw(1, 4), draw(1, 3), draw(0, 2), draw(1, 2), bias=data.draw(st.booleans()))
    net = nn.Sequential(
        nn.ZeroPad2d(draw(0, 3) + draw(0, 3)), conv, *[nn.ReLU()] * data.draw(st.integers(0, 2)),
        nn.MaxPool2d(draw(1, 3), draw(1, 4)), nn.Flatten(),
    ).double()  # fmt: skip
    # The largest kernel reaches over 7 rows, at stride 3 three outputs over 13: enough for any pooling.
    image_shape = (3, *(data.draw(st.integers(13, 20)) for _ in "HW"))
    assert_streamlined_is_the_same(net, image_shape)
    assert_streamlined_is_the_same(untied_where_possible(net, image_shape), image_shape)


def test_streamlining_leaves_out_of_skinnyprime_what_its_pooling_never_reads():
    torch.manual_seed(0)
    cnn = skinnyprime().double().net
    for net in (cnn, untied_where_possible(cnn, (3, 32, 32))):
        stages = [layer for layer in streamline(net, (3, 32, 32)) if isinstance(layer, Stage)]
        assert [stage.outputs for stage in stages] == [(17, 17), (7, 7), (3, 3)]
        assert_streamlined_is_the_same(net, (3, 32, 32), n=2)


def batches(device="cpu"):
    """20 batches of skinnyprime's images, the last one smaller."""
    generator = torch.Generator().manual_seed(0)
    for n in [8] * 19 + [5]:
        x = torch.randn(n, 3, 32, 32, generator=generator)
        yield x.to(device), torch.randint(10, (n,), generator=generator).to(device)


def largest_change(net, other):
    """The largest distance of two networks' parameters, relative to their norm."""
    pairs = zip(net.cpu().parameters(), other.cpu().parameters())
    return max(((p - q).norm() / q.norm()).item() for p, q in pairs)


@pytest.fixture(scope="module", params=["CNN", "eLCN"])
def trained(request):
    """(a network before training, after 20 steps in plain torch, the sum of its losses)."""
    torch.manual_seed(0)
    start = skinnyprime().net
    start = untie(start, (3, 32, 32)) if request.param == "eLCN" else start
    net = copy.deepcopy(start)
    for layer in net:
        if isinstance(layer, LocallyConnected2d):
            layer.forward = lambda x, layer=layer: plain(x, layer.weight, layer.bias, layer)
    optimizer, total = torch.optim.SGD(net.parameters(), 0.05), 0.0
    for x, y in batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        total += loss.item()
    assert largest_change(net, start) > 1e-3
    return start, net, total


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_twenty_steps_end_at_the_weights_of_plain_torch(trained, device):
    start, expected, loss = trained
    net = copy.deepcopy(start).to(device)
    step = Step(net, (3, 32, 32), 0.05)
    for x, y in batches(device):
        step(x, y)
    assert step.take_loss() == pytest.approx(loss, rel=1e-4) and step.take_loss() == 0
    assert largest_change(net, expected) < 1e-4


def test_so_do_they_with_the_layer_that_other_devices_get(trained, monkeypatch):
    monkeypatch.setattr(LocallyConnected2d, "compute", portable)
    start, expected, _ = trained
    net = copy.deepcopy(start)
    step = Step(net, (3, 32, 32), 0.05)
    for x, y in batches():
        step(x, y)
    assert largest_change(net, expected) < 1e-4


def test_what_is_frozen_stays_as_it_is(trained):
    net = copy.deepcopy(trained[0])
    before = copy.deepcopy(net)
    frozen = [net[5].weight, net[9].bias, net[13].weight]
    for parameter in frozen:
        parameter.requires_grad = False
    step = Step(net, (3, 32, 32), 0.05)
    for x, y in batches():
        step(x, y)
    for parameter, old in zip(net.parameters(), before.parameters()):
        assert torch.equal(parameter, old) == any(parameter is p for p in frozen)


def test_the_steps_that_warm_up_a_cuda_graph_leave_no_trace(monkeypatch):
    """On the CPU a mocked capture runs the step it should only record, so that one step is what has to remain."""
    for name in ("Stream", "stream", "current_stream", "graph", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    torch.manual_seed(0)
    net = skinnyprime().net
    once = copy.deepcopy(net)
    x, y = next(batches())
    captured, plain_step = Step(net, (3, 32, 32), 0.05), Step(once, (3, 32, 32), 0.05)
    captured._capture(x, y)
    plain_step(x, y)
    assert largest_change(net, once) < 1e-6
    assert captured.take_loss() == pytest.approx(plain_step.take_loss(), rel=1e-6)
