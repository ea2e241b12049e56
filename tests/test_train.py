"""Training: the order of the images, when a network is evaluated and saved, and what who watches sees."""

import re
from unittest.mock import Mock

import pytest
import torch
from small_study import small_cnn

import train as training
from rnorm import checkpoints
from rnorm.checkpoints import Track
from rnorm.conversions import find_conversion, layers_of, untie
from rnorm.data import load_data
from rnorm.runs import Member, Settings
from train import Progress, epoch_order, make_step, start_cnn, train, train_epoch, work_of

SETTINGS = Settings(epochs=2, splits=(1, 2), network="small", dataset="tiny", batch_size=20)  # 3 steps an epoch


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
    """What makes the CNN's track at its start."""
    return lambda: Track(members[0], start_cnn(SETTINGS, images), [0.05] * 6)


def test_shuffling_depends_on_the_seed_and_the_epoch_alone():
    settings = Settings(shuffle=True, seed=3)
    assert epoch_order(10, Settings(), 0) is None
    assert torch.equal(epoch_order(10, settings, 4), epoch_order(10, settings, 4))
    assert not torch.equal(epoch_order(10, settings, 4), epoch_order(10, settings, 5))
    assert not torch.equal(epoch_order(10, settings, 4), epoch_order(10, Settings(shuffle=True, seed=4), 4))
    assert sorted(epoch_order(10, settings, 4).tolist()) == list(range(10))


def test_the_order_of_an_epoch_goes_to_the_device_once(cnn, images, monkeypatch):
    taken, order = [], Mock()
    order.to.return_value = torch.arange(59, -1, -1)
    monkeypatch.setattr(training, "epoch_order", lambda n, settings, epoch: order)
    step = Mock(side_effect=lambda x, y: taken.append(x))
    step.take_loss.return_value = 0.0
    train_epoch(cnn(), step, images)
    assert order.to.call_count == 1 and len(taken) == 3
    assert torch.equal(torch.cat(taken), images.x_train.flip(0))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("conversion", ["lc", "tied"])
def test_an_epoch_is_sgd_over_all_images_in_their_order(conversion, decay, momentum, npz, tmp_path):
    """Of `tied` the eLCN's with its gradient averaged over the positions: the weight decay is no smaller for that."""
    settings = Settings(network="small", batch_size=20, lc_lr=0.3, momentum=momentum, weight_decay=decay)
    images = load_data(str(npz), npz.parent, 0, torch.device("cpu"), torch.float64)
    cnn, shape, how = small_cnn(3).double(), images.image_shape, find_conversion(conversion)
    elcn, model = untie(cnn.net, shape), how.convert(cnn, shape)
    track = Track(Member(tmp_path, settings, conversion, 1), model, how.rates(layers_of(model), shape, 0.3))
    optimizer = torch.optim.SGD(elcn.parameters(), 0.3, momentum, weight_decay=decay)
    for x, y in zip(images.x_train.split(20), images.y_train.split(20)):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(elcn(x), y).backward()
        for parameter in [*elcn[1].parameters(), *elcn[5].parameters()]:
            if conversion == "tied":
                parameter.grad[:] = parameter.grad.mean((0, 1), keepdim=True)  # (H_out, W_out, ...)
        optimizer.step()
    assert train_epoch(track, make_step(track, images), images) and (track.epoch, track.step) == (1, 0)
    trained = untie(track.net, shape) if conversion == "tied" else track.net
    for ours, theirs, before in zip(trained.parameters(), elcn.parameters(), untie(cnn.net, shape).parameters()):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12) and not torch.allclose(ours, before, rtol=1e-3)


def test_a_mistake_in_the_code_is_not_taken_for_exhausted_memory(cnn, images, progress, monkeypatch):
    monkeypatch.setattr(training, "evaluate", lambda *_: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train(cnn(), images, progress)


def test_less_than_a_minute_of_work_is_lost(cnn, images, progress, monkeypatch):
    assert checkpoints.SAVE_EVERY < 60
    monkeypatch.setattr(checkpoints, "SAVE_EVERY", 0)
    saved, track = [], cnn()
    monkeypatch.setattr(track, "save_latest", lambda: saved.append((track.epoch, track.step)))
    train(track, images, progress)
    assert saved == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]


# What who watches sees


def test_who_watches_a_log_sees_which_network_of_how_many_and_when_all_ends(cnn, images, progress, capsys):
    train(cnn(), images, progress)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    place = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d CNN \(1 of 3\): epoch %d/2, loss \d\.\d{3}, test \d+\.\d\d %%, "
    assert re.fullmatch(place % 0 + r"\? left in all", lines[0])
    for epoch in (1, 2):
        assert re.fullmatch(place % epoch + r"\d\d:\d\d left in all", lines[epoch])


def test_who_watches_a_terminal_sees_the_same(cnn, images, members, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    progress = Progress(members, 60)
    train(cnn(), images, progress)
    print("message")
    shown = capsys.readouterr().out
    assert re.search(r"\rCNN \(1 of 3\):  33%.*FLOP/s, epoch 2/2, loss ", shown)
    assert re.search(r"\r +\r(\x1b\[A)?message\n$", shown)  # the line was cleared before


def test_what_is_left_is_told_from_what_this_process_did(cnn, images, members, progress):
    """A finished network, and what was done of another, count as done, but in no time; a skipped one is left out."""
    track = cnn()
    track.epoch, track.step = 1, 2
    progress.begin(track)
    assert progress.bar.n == progress.bar.initial == (60 + 2 * 20) * progress.flop[members[0]]
    progress.stepped(20)
    assert progress.bar.n == work_of(members[0], 60) and progress.bar.n > progress.bar.initial
    progress.skip(members[2])
    assert progress.bar.total == work_of(members[0], 60) + work_of(members[1], 60)
