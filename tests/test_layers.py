"""`LocallyConnected2d` computes its definition, with right derivatives, in every way it has and in anyone's program."""

import copy
import io
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from rnorm import layers
from rnorm.layers import Geometry, LocallyConnected2d, layer_shapes, unfolded

ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
DEVICES = ["cpu", GPU]
HUGE = 10**12
WAYS = {
    "as it comes": {"SHORT": layers.SHORT},
    "rows": {"SHORT": 0},
    "patches": {"SHORT": HUGE},
    "patches, as on a GPU": {"on_cpu": lambda x: False, "LARGE": HUGE},
    "kernel rows, as on a GPU": {"on_cpu": lambda x: False, "LARGE": 0},
}


def by(way):
    """Within this context, layers compute in the way named."""
    return patch.multiple(layers, **WAYS[way])


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
    out = torch.einsum("nckhw,hwkco->nohw", patches, weight.flatten(2, 3))
    return out if bias is None else out + bias.permute(2, 0, 1)


def close(actual, expected, tolerance):
    """Whether two tensors agree, relative to the largest number expected."""
    return (actual.double() - expected.double()).abs().max() <= tolerance * (1e-3 + expected.abs().max())


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


@drawn(cases(), examples=120)
def test_the_layer_computes_its_definition_and_its_gradients_in_every_way(case):
    layer, x = case.layer, case.x.requires_grad_()
    out, gradients = expected(case)
    geometry = Geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation, case.outputs)
    with by(case.way):
        for actual in (
            layer(x) if case.outputs == layer.output_size else layer.compute(x, layer.padding, case.outputs),
            unfolded(x, layer.weight, layer.bias, geometry),
        ):
            assert actual.shape == out.shape and close(actual, out, case.tolerance)
            got = torch.autograd.grad(actual, (x, *layer.parameters()), case.grad)
            assert all(close(*both, case.tolerance) for both in zip(got, gradients))


@drawn(cases(), examples=60)
def test_a_fused_step_is_a_step_of_plain_sgd_for_the_weight(case):
    layer, lr = case.layer, 0.3
    out, gradients = expected(case)
    before = layer.weight.detach().clone()
    layer.fused_step = lr
    with by(case.way):
        x = case.x.requires_grad_()
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
    with by(way):
        assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
        assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), (x, *layer.parameters()), fast_mode=True)


def test_second_derivatives_of_parts_are_right_where_the_rest_is_frozen():
    layer, x = small_layer()
    assert torch.autograd.gradgradcheck(lambda x: layer.requires_grad_(False)(x), (x,))
    layer.weight.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda _: layer(x.detach()).square(), (layer.weight,))


def small_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        LocallyConnected2d(2, 3, 7, 3), nn.Tanh(), nn.MaxPool2d(2), LocallyConnected2d(3, 4, 2, 2, bias=False),
        nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip
    return net, torch.randn(5, 2, 7, 7, dtype=torch.float64), torch.arange(5) % 3


def of_the_definition(net):
    """A copy of `net` whose locally connected layers compute by `plain`."""
    net = copy.deepcopy(net)
    for layer in net:
        if isinstance(layer, LocallyConnected2d):
            layer.forward = lambda x, layer=layer: plain(x, layer.weight, layer.bias, layer)
    return net


def hessian_vector_product(net, x, y):
    parameters = list(net.parameters())
    gradient = torch.autograd.grad(F.cross_entropy(net(x), y), parameters, create_graph=True)
    torch.manual_seed(1)
    return torch.autograd.grad(gradient, parameters, [torch.randn_like(p) for p in parameters])


@pytest.mark.parametrize("way", WAYS)
def test_the_hessian_times_a_vector_is_that_of_the_definition(way):
    net, x, y = small_net()
    with by(way):
        products = hessian_vector_product(net, x, y)
    assert all(close(*both, 1e-12) for both in zip(products, hessian_vector_product(of_the_definition(net), x, y)))


@pytest.mark.parametrize("function", [torch.autograd.functional.hessian, torch.autograd.functional.hvp])
def test_so_are_those_of_autograd_functional(function):
    net, x, y = small_net()
    extra = (torch.ones_like(x),) if function is torch.autograd.functional.hvp else ()
    ours, by_definition = (
        function(lambda x, net=net: F.cross_entropy(net(x), y), x, *extra) for net in (net, of_the_definition(net))
    )
    if extra:
        ours, by_definition = ours[1], by_definition[1]
    assert close(ours, by_definition, 1e-12)


def test_a_fused_step_refuses_second_derivatives_autocast_and_compilation():
    layer, x = small_layer()
    layer.fused_step = 0.1
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="autocast"), torch.autocast("cpu"):
        layer(x)
    with pytest.raises(ValueError, match="torch.compile"), patch.object(torch.compiler, "is_compiling", lambda: True):
        layer(x)
    with pytest.raises(ValueError, match="torch.compile"), patch.object(torch.compiler, "is_compiling", lambda: True):
        layer(x)
    assert torch.equal(layer.weight, before)


# What the docstring's table promises.


def train(net, optimizer, steps=20):
    """The losses of some steps on noise; `optimizer` makes an optimiser of parameters."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 3, 8, 8), torch.arange(32) % 2
    optimizer, losses = optimizer(net.parameters()), []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        losses.append(optimizer.step(closure).item())
    return losses


def net_of_anyone(**kwargs):
    torch.manual_seed(0)
    return nn.Sequential(LocallyConnected2d(3, 4, 8, 3, **kwargs), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))


@pytest.mark.parametrize("name, lr", [("SGD", 0.3), ("AdamW", 0.01), ("Adagrad", 0.05), ("LBFGS", 0.3)])
def test_any_optimiser_trains_it_as_it_trains_the_definition(name, lr):
    net = net_of_anyone()
    reference = of_the_definition(net)
    losses = train(net, lambda parameters: getattr(torch.optim, name)(parameters, lr=lr))
    assert losses[-1] < 0.5 * losses[0]
    assert losses == pytest.approx(
        train(reference, lambda parameters: getattr(torch.optim, name)(parameters, lr=lr)), rel=1e-3, abs=1e-4
    )


def test_its_parameters_can_be_flattened_and_pruned():
    net = net_of_anyone()
    vector = nn.utils.parameters_to_vector(net.parameters())
    nn.utils.vector_to_parameters(2 * vector, net.parameters())
    assert torch.equal(nn.utils.parameters_to_vector(net.parameters()), 2 * vector)
    nn.utils.prune.l1_unstructured(net[0], "weight", 0.25)
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    assert (net[0].weight == 0).float().mean().item() == pytest.approx(0.25, abs=1e-3)
    assert (net[0].weight_orig.grad == 0)[net[0].weight == 0].all()


@pytest.mark.parametrize("way", WAYS)
def test_autocast_is_followed_as_a_convolution_follows_it(way):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    ours, theirs = nn.Sequential(copy.deepcopy(conv), LocallyConnected2d(4, 2, 6, 3)), nn.Sequential(conv)
    theirs.append(nn.Conv2d(4, 2, 3))
    ours[1] = LocallyConnected2d.from_conv2d(theirs[1], 6)
    x = torch.randn(2, 3, 8, 8)
    with by(way), torch.autocast("cpu", torch.bfloat16):
        out, reference = ours(x), theirs(x)
    assert out.dtype == reference.dtype == torch.bfloat16 and close(out, reference, 0.02)
    out.float().square().sum().backward()
    reference.float().square().sum().backward()
    assert ours[1].weight.grad.dtype == torch.float32
    assert close(ours[1].weight.grad.sum((0, 1)).permute(3, 2, 0, 1), theirs[1].weight.grad, 0.03)


@pytest.mark.parametrize("x, weight", [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_dtypes_are_refused_by_name(x, weight):
    with pytest.raises(ValueError, match=f"{x}.*{weight}"):
        LocallyConnected2d(3, 4, 8, 3, dtype=weight)(torch.randn(2, 3, 8, 8, dtype=x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])  # the others need a C++ compiler
def test_it_can_be_compiled(backend):
    net = net_of_anyone()
    compiled = torch.compile(copy.deepcopy(net), backend=backend, fullgraph=True)
    losses = [train(n, lambda parameters: torch.optim.SGD(parameters, 0.3), 3) for n in (net, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_it_can_be_exported():
    net, x = net_of_anyone().eval(), torch.randn(2, 3, 8, 8)
    program = torch.export.export(net, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert close(torch.export.load(file).module()(x), net(x), 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_its_activations_can_be_checkpointed(reentrant):
    layer, x = small_layer()
    gradients = []
    for run in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        run(x).square().sum().backward()
        gradients.append(layer.weight.grad)
    assert torch.equal(*gradients)


def test_functional_call_takes_other_parameters():
    net, other = net_of_anyone(), net_of_anyone()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.func.functional_call(net, dict(other.named_parameters()), x), other(x))


def test_distributed_data_parallel_trains_it(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = net_of_anyone()
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(net))
        losses = [train(n, lambda parameters: torch.optim.SGD(parameters, 0.3), 3) for n in (net, parallel)]
    finally:
        torch.distributed.destroy_process_group()
    assert losses[0] == losses[1]


def test_transforms_of_torch_func_are_refused_and_work_with_the_plain_form():
    layer, x = small_layer()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: layer(x).sum())(x)
    geometry = Geometry(layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.output_size)
    got = torch.func.grad(lambda x: unfolded(x, layer.weight, layer.bias, geometry).sum())(x)
    assert close(got, torch.autograd.grad(layer(x).sum(), x)[0], 1e-12)


# Files and copies.


def test_a_state_dict_has_the_shapes_of_the_file_format_and_shares_the_parameters_memory():
    layer = LocallyConnected2d(3, 4, (7, 6), (3, 2))
    state = layer.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {"weight": (1, 4, 3, 5, 5, 6), "bias": (1, 4, 5, 5)}
    assert torch.equal(layer.filters, state["weight"])
    state["weight"][0, 1, 2, 3, 4, 5] = 7
    assert layer.weight[3, 4, 2, 1, 2, 1] == 7 and not state["weight"].requires_grad


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layout", [lambda t: t, lambda t: t.contiguous()])  # ours, and that of the released code
def test_weights_survive_a_file_in_any_memory_order(layout, assign):
    net, other = net_of_anyone(), net_of_anyone()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    file = io.BytesIO()
    torch.save({name: layout(t) for name, t in net.state_dict().items()}, file)
    file.seek(0)
    other.load_state_dict(torch.load(file), assign=assign)
    assert all(torch.equal(p, q) and q.is_contiguous() for p, q in zip(net.parameters(), other.parameters()))
    other(torch.randn(2, 3, 8, 8)).sum().backward()


def test_a_state_dict_that_does_not_fit_is_refused_with_the_shapes_of_the_file_format():
    layer = LocallyConnected2d(3, 4, 8, 3)
    for wrong in ({"weight": layer.weight.data}, {"weight": layer.filters.data[:, :2]}):
        with pytest.raises(RuntimeError, match=r"size mismatch for weight.*\(1, 4, 3, 6, 6, 9\)"):
            layer.load_state_dict(layer.state_dict() | wrong)
    with pytest.raises(RuntimeError, match="Missing key.*bias"):
        layer.load_state_dict({"weight": layer.filters.data})


def test_copies_are_independent():
    layer, x = small_layer()
    other = copy.deepcopy(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    nn.init.zeros_(layer.weight)
    assert torch.equal(other(x), loaded(x)) and not torch.equal(other(x), layer(x))


# Edges.


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_batch_has_gradients_of_zero(way):
    layer, _ = small_layer()
    x = torch.empty(0, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    with by(way):
        out = layer(x)
        out.sum().backward()
    assert out.shape == (0, 3, *layer.output_size) and x.grad.shape == x.shape
    assert not layer.weight.grad.any() and not layer.bias.grad.any()


def test_the_layer_may_be_followed_by_one_that_works_in_place():
    layer, x = small_layer()
    gradients = [torch.autograd.grad(relu(layer(x)).sum(), layer.weight)[0] for relu in (nn.ReLU(True), nn.ReLU())]
    assert torch.equal(*gradients)


def test_shapes_are_known_without_data():
    layer = LocallyConnected2d(3, 4, (7, 5), 3, padding=1, device="meta")
    x = torch.empty(2, 3, 7, 5, device="meta")
    assert layer(x).shape == (2, 4, 7, 5)
    assert layer_shapes(nn.Sequential(layer, nn.Flatten()), (3, 7, 5)) == [(3, 7, 5), (4, 7, 5), (140,)]


def test_an_untied_convolution_computes_what_it_did():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 0), (1, 2)).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    layer = LocallyConnected2d.from_conv2d(conv, (9, 8))
    assert close(layer(x), conv(x), 1e-12)
    assert torch.equal(layer.filters, conv.weight.flatten(2)[None, :, :, None, None].expand_as(layer.filters))
    for other in (nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 3, 3, padding="same"),
                  nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")):  # fmt: skip
        with pytest.raises(ValueError, match="can be untied"):
            LocallyConnected2d.from_conv2d(other, 9)


def test_the_layer_is_initialised_like_a_convolution():
    torch.manual_seed(0)
    layer, conv = LocallyConnected2d(8, 16, 12, 5), nn.Conv2d(8, 16, 5)
    assert layer.weight.abs().max() <= 1 / (8 * 25) ** 0.5
    assert layer.weight.std().item() == pytest.approx(conv.weight.std().item(), rel=0.05)


def test_the_layer_documents_what_it_does():
    layer = LocallyConnected2d(16, 33, (50, 100), kernel_size=(3, 5), stride=(2, 1), padding=(4, 2))
    assert layer(torch.randn(2, 16, 50, 100)).shape == (2, 33, 28, 100)
    assert "kernel_size=(3, 5)" in repr(layer)


@pytest.mark.parametrize(
    "arguments",
    [(0, 1, 5, 3), (1, 1, 5, 6), (1, 1, 5, 3, 0), (1, 1, 5, 3, 1, -1), (1, 1, (8, 8, 3), 3), (1, 1, (8,), 3)],
)
def test_impossible_sizes_are_refused(arguments):
    with pytest.raises(ValueError):
        LocallyConnected2d(*arguments)


def test_an_input_of_another_size_is_refused():
    with pytest.raises(ValueError, match="expected an input"):
        LocallyConnected2d(3, 4, 8, 3)(torch.zeros(1, 3, 9, 8))
