"""Training: the step, the order of the images, when a network is evaluated and saved, and what who watches sees."""

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from small_study import dropping_cnn, small_cnn

import train as training
from rnorm import store
from rnorm.conversions import find_conversion, untie
from rnorm.data import load_data
from rnorm.fast import streamline
from rnorm.layers import LocallyConnected2d
from rnorm.progress import Progress
from rnorm.runs import Member, Settings
from rnorm.store import Store
from train import SGD, Training, epoch_order, make_step, sgd_step, start_cnn, train, train_epoch

SETTINGS = Settings(epochs=2, splits=(1, 2), network="small", dataset="tiny", batch_size=20)  # 3 steps an epoch
IMAGE = (3, 32, 32)


@pytest.fixture
def images(npz):
    return load_data(str(npz), npz.parent, 0, torch.device("cpu"))


@pytest.fixture
def members(tmp_path):
    """The CNN and two eLCNs."""
    return [Member(tmp_path, SETTINGS), Member(tmp_path, SETTINGS, "lc", 1), Member(tmp_path, SETTINGS, "lc", 2)]


@pytest.fixture
def progress(members):
    return Progress(members, 60)


@pytest.fixture
def cnn(members, images):
    """The CNN's training and files, at its start."""
    return start_cnn(members[0], images), Store(members[0], images)


# The step


def by_torch(net, rates, lr, momentum, decay):
    """torch's optimizer with a group for each rate, the decay of each that of the network's own rate."""
    parameters, groups = list(net.parameters()), []
    for rate in dict.fromkeys(rates):
        group = [p for p, r in zip(parameters, rates) if r == rate]
        groups.append({"params": group, "lr": rate, "weight_decay": decay * (lr / rate)})
    return torch.optim.SGD(groups, momentum=momentum)


SETUPS = list(itertools.product(["cnn", "lc", "tied", "lc5", "fc", "head"], [0, 0.9], [0, 0.05]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("conversion, momentum, decay", SETUPS)
def test_steps_are_those_of_torchs_optimizer_bit_for_bit(conversion, momentum, decay, dtype):
    torch.manual_seed(0)
    found = find_conversion(conversion)
    net = found.convert(small_cnn().to(dtype), IMAGE)
    rates, other = found.rates(net, IMAGE, 0.1), copy.deepcopy(net)
    sgd, reference = SGD(net, rates, 0.1, momentum, decay), by_torch(other, rates, 0.1, momentum, decay)
    fast, others = streamline(net, IMAGE), streamline(other, IMAGE)
    for _ in range(3):
        x, y = torch.randn(8, *IMAGE, dtype=dtype), torch.arange(8)
        expected = F.cross_entropy(others(x), y)
        reference.zero_grad()
        expected.backward()
        reference.step()
        assert torch.equal(sgd_step(fast, sgd, x, y), expected)
    fused = not momentum and not decay and any(isinstance(layer, LocallyConnected2d) for layer in net)
    for ours, theirs in zip(net.parameters(), other.parameters()):
        # Where the layers take their own steps no gradient is stored, and the last bit may be rounded otherwise.
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6) if fused else torch.equal(ours, theirs)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("conversion", ["lc", "tied"])
def test_an_epoch_is_sgd_over_all_images_in_their_order(conversion, decay, momentum, npz, tmp_path):
    """Of `tied` the eLCN's with its gradient averaged over the positions: the weight decay is no smaller for that."""
    settings = Settings(network="small", batch_size=20, lc_lr=0.3, momentum=momentum, weight_decay=decay)
    images = load_data(str(npz), npz.parent, 0, torch.device("cpu"), torch.float64)
    cnn, shape, how = small_cnn(3).double(), images.image_shape, find_conversion(conversion)
    elcn, net = untie(cnn, shape), how.convert(cnn, shape)
    sgd = SGD(net, how.rates(net, shape, 0.3), 0.3, momentum, decay)
    state = Training(Member(tmp_path, settings, conversion, 1), net, sgd)
    optimizer = torch.optim.SGD(elcn.parameters(), 0.3, momentum, weight_decay=decay)
    for x, y in zip(images.x_train.split(20), images.y_train.split(20)):
        optimizer.zero_grad()
        F.cross_entropy(elcn(x), y).backward()
        for parameter in [*elcn[1].parameters(), *elcn[5].parameters()]:
            if conversion == "tied":
                parameter.grad[:] = parameter.grad.mean((0, 1), keepdim=True)  # (H_out, W_out, ...)
        optimizer.step()
    assert train_epoch(state, make_step(streamline(net, shape), sgd, 20), images)
    assert (state.epoch, state.step) == (1, 0)
    trained = untie(net, shape) if conversion == "tied" else net
    for ours, theirs, before in zip(trained.parameters(), elcn.parameters(), untie(cnn, shape).parameters()):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12) and not torch.allclose(ours, before, rtol=1e-3)


def test_the_state_of_the_optimizer_is_torchs_and_continues_where_it_was():
    """Its parameters are numbered group by group, as torch numbers them."""
    rates = [0.1, 0.1, 0.05, 0.05, 0.1, 0.1]
    net, x, y = small_cnn(), torch.randn(8, *IMAGE), torch.arange(8)
    sgd = SGD(net, rates, 0.1, 0.9, 0.01)
    sgd_step(net, sgd, x, y)
    state = sgd.state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0, 1, 2, 3], [4, 5]]
    other, again = copy.deepcopy(net), copy.deepcopy(net)
    theirs, ours = by_torch(other, rates, 0.1, 0.9, 0.01), SGD(again, rates, 0.1, 0.9, 0.01)
    theirs.load_state_dict(state)
    ours.load_state_dict(state)
    F.cross_entropy(other(x), y).backward()
    theirs.step()
    sgd_step(again, ours, x, y)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), other.parameters()))
    with pytest.raises(ValueError, match="7 learning rates for 6 parameters"):
        SGD(net, [*rates, 0.1], 0.1)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_a_schedule_multiplies_all_rates(momentum):
    nets = [untie(small_cnn(), IMAGE)]
    nets.append(copy.deepcopy(nets[0]))
    x, y = torch.randn(8, *IMAGE), torch.arange(8)
    for net, lr, factor in zip(nets, (0.1, 0.05), (0.5, 1.0)):
        sgd = SGD(net, [lr] * 6, lr, momentum)
        sgd.factor = factor
        sgd_step(net, sgd, x, y)
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters()))


def test_what_is_frozen_stays_and_a_failed_step_leaves_no_layer_fused():
    net = untie(small_cnn(), IMAGE)
    net[1].requires_grad_(False)
    before, sgd = copy.deepcopy(net), SGD(net, [0.1] * 6, 0.1)
    sgd_step(net, sgd, torch.randn(8, *IMAGE), torch.arange(8))
    moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters())]
    assert moved == [False, False, True, True, True, True]
    with pytest.raises(ValueError):
        sgd_step(net, sgd, torch.randn(8, *IMAGE, dtype=torch.float64), torch.arange(8))
    assert all(layer.fused_step is None for layer in net if isinstance(layer, LocallyConnected2d))


# An epoch, and all of them


def test_shuffling_depends_on_the_seed_and_the_epoch_alone():
    settings = Settings(shuffle=True, seed=3)
    assert epoch_order(10, Settings(), 0) is None
    assert torch.equal(epoch_order(10, settings, 4), epoch_order(10, settings, 4))
    assert not torch.equal(epoch_order(10, settings, 4), epoch_order(10, settings, 5))
    assert not torch.equal(epoch_order(10, settings, 4), epoch_order(10, Settings(shuffle=True, seed=4), 4))
    assert sorted(epoch_order(10, settings, 4).tolist()) == list(range(10))


def test_a_mistake_in_the_code_is_not_taken_for_exhausted_memory(cnn, images, progress, monkeypatch):
    monkeypatch.setattr(training, "evaluate", lambda *_: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train(*cnn, images, progress)


def test_less_than_a_minute_of_work_is_lost(cnn, images, progress, monkeypatch):
    assert store.SAVE_EVERY < 60
    monkeypatch.setattr(store, "SAVE_EVERY", 0)
    saved = []
    monkeypatch.setattr(cnn[1], "save_latest", lambda state: saved.append((state.epoch, state.step)))
    train(*cnn, images, progress)
    assert saved == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]


def test_dropout_draws_what_it_drew_after_a_stop(images, tmp_path):
    """Its random state is part of the state."""
    member = Member(tmp_path, SETTINGS)
    nets = []
    for stopped in (False, True):
        torch.manual_seed(0)
        net = dropping_cnn(3)
        state = Training(member, net, SGD(net, [0.1] * 6, 0.1))
        for epoch in range(2):
            if stopped and epoch == 1:
                saved = copy.deepcopy(state.state())
                torch.rand(5)
                state.load_state(saved)
            train_epoch(state, make_step(net, state.sgd, 20), images)
        nets.append(net)
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters()))


# What who watches sees


def test_who_watches_a_log_sees_which_network_of_how_many_and_when_all_ends(cnn, images, progress, capsys):
    train(*cnn, images, progress)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    place = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d CNN \(1 of 3\): epoch %d/2, loss \d\.\d{3}, test \d+\.\d\d %%, "
    assert re.fullmatch(place % 0 + r"\? left in all", lines[0])
    for epoch in (1, 2):
        assert re.fullmatch(place % epoch + r"\d\d:\d\d left in all", lines[epoch])


def test_who_watches_a_terminal_sees_images_per_second(cnn, images, members, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    progress = Progress(members, 60)
    train(*cnn, images, progress)
    print("message")
    shown = capsys.readouterr().out
    assert re.search(r"\rCNN \(1 of 3\):  33%.*images/s, epoch 2/2, loss ", shown)
    assert re.search(r"\r +\r(\x1b\[A)?message\n$", shown)  # the line was cleared before


def test_what_is_left_is_told_from_what_this_process_did(members, progress):
    """A finished network, and what was done of another, count as done, but in no time; a skipped one is left out."""
    progress.begin(members[0], 1, 2, False)
    assert progress.bar.n == progress.bar.initial == 60 + 2 * 20
    progress.stepped(20)
    assert progress.bar.n == 2 * 60 > progress.bar.initial
    progress.skip(members[2])
    assert progress.bar.total == 2 * 2 * 60


def test_a_clock_that_is_set_back_makes_no_negative_time(members, progress, capsys, monkeypatch):
    progress.begin(members[0], 1, 0, False)
    progress.stepped(60)
    now = progress.bar._time()
    monkeypatch.setattr(progress.bar, "_time", lambda: now - 10**5)
    progress.recorded(2, {"train_loss": 1.0, "test_acc": 50.0})
    assert "? left in all" in capsys.readouterr().out


def test_a_divergence_names_the_weight_decay_where_there_is_one(images, tmp_path, capsys):
    member = Member(tmp_path, Settings(epochs=1, network="small", batch_size=20, weight_decay=1e30))
    assert not train(start_cnn(member, images), Store(member, images), images, Progress([member], 60))
    assert "lower its learning rate or --weight_decay" in capsys.readouterr().err
