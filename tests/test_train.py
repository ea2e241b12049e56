"""Training: the order of the images, when a network is evaluated and saved, and what who watches sees."""

import json
import re
from pathlib import Path

import pytest
import torch
from small_study import small_cnn

import train as training
from convert import cnn_track, work_of
from rnorm.cli import Interrupted, Stop
from rnorm.data import load_data
from rnorm.runs import Member, Settings, network_status
from train import SAVE_EVERY, Session, duration, epoch_order, make_step, train, train_epoch

CPU = torch.device("cpu")


@pytest.fixture
def session(npz, tmp_path):
    """A session of the CNN and two eLCNs, 3 steps an epoch."""
    settings = Settings(epochs=2, splits=(1, 2), network="small", dataset="tiny", batch_size=20)
    members = [Member(settings), Member(settings, "lc", 1), Member(settings, "lc", 2)]
    run = tmp_path / "run"
    run.mkdir()
    return Session(run, settings, load_data(str(npz), npz.parent, 0, CPU), CPU, work=work_of(members, 60))


class FakeStep:
    """In place of `fast.Step`: calls `function` and has no loss."""

    def __init__(self, function):
        self.function = function

    def __call__(self, x, y):
        self.function(x, y)

    def take_loss(self):
        return 0.0


def test_shuffling_depends_on_the_seed_and_the_epoch_alone():
    settings = Settings(shuffle=True, seed=3)
    assert epoch_order(10, Settings(), 0) is None
    assert torch.equal(epoch_order(10, settings, 4), epoch_order(10, settings, 4))
    assert not torch.equal(epoch_order(10, settings, 4), epoch_order(10, settings, 5))
    assert not torch.equal(epoch_order(10, settings, 4), epoch_order(10, Settings(shuffle=True, seed=4), 4))
    assert sorted(epoch_order(10, settings, 4).tolist()) == list(range(10))


def test_the_order_of_an_epoch_goes_to_the_device_once(session, monkeypatch):
    class Order:
        """An order that lies elsewhere until it is moved."""

        moved = 0

        def to(self, device):
            Order.moved += 1
            return torch.arange(59, -1, -1)

    taken = []
    track = cnn_track(session)
    monkeypatch.setattr(training, "epoch_order", lambda n, settings, epoch: Order())
    train_epoch(track, FakeStep(lambda x, y: taken.append(x)), session)
    assert Order.moved == 1 and len(taken) == 3
    assert torch.equal(torch.cat(taken), session.data.x_train.flip(0))


def test_an_epoch_is_plain_sgd_over_all_images_in_their_order(session):
    track, reference = cnn_track(session), small_cnn(3)
    reference.load_state_dict(track.model.state_dict())
    optimizer = torch.optim.SGD(reference.parameters(), 0.05)
    for x, y in zip(session.data.x_train.split(20), session.data.y_train.split(20)):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(reference(x), y).backward()
        optimizer.step()
    assert train_epoch(track, make_step(track, session), session) and (track.epoch, track.step) == (1, 0)
    for ours, theirs in zip(track.model.parameters(), reference.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_after_an_interrupted_evaluation_the_network_is_evaluated(session, monkeypatch, evaluation):
    """The epoch is over and saved, and its evaluation is not to be lost."""
    count, evaluate = [0], training.evaluate

    def interrupted(*args):
        count[0] += 1
        if count[0] == evaluation:
            raise Interrupted
        return evaluate(*args)

    monkeypatch.setattr(training, "evaluate", interrupted)
    track = cnn_track(session)
    with pytest.raises(Interrupted):
        train(track, session)
    assert track.latest.exists() == (evaluation > 1)
    again = cnn_track(session)
    again.restore()
    assert again.due and train(again, session)
    assert again.evaluated == [0, 1, 2]


def test_a_state_in_the_midst_of_a_step_is_not_saved_when_memory_runs_out(session, monkeypatch):
    track, steps = cnn_track(session), [0]

    def failing(x, y):
        steps[0] += 1
        if steps[0] == 5:
            track.net[1].weight.data += 1  # this layer has taken the step
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    step = FakeStep(failing)
    step.net = track.net
    monkeypatch.setattr(training, "make_step", lambda track, session: step)
    with pytest.raises(Stop, match="CNN: out of memory; lower --batch_size. What was saved before is intact") as stop:
        train(track, session)
    assert stop.value.status == 1
    again = cnn_track(session)
    again.restore()
    assert (again.epoch, again.step) == (1, 0) and again.net[1].weight.max() < 0.9


def test_a_mistake_in_the_code_is_not_taken_for_exhausted_memory(session, monkeypatch):
    monkeypatch.setattr(training, "evaluate", lambda *_: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train(cnn_track(session), session)


def test_less_than_a_minute_of_work_is_lost(session, monkeypatch):
    assert SAVE_EVERY < 60
    monkeypatch.setattr(training, "SAVE_EVERY", 0)
    saved = []
    track = cnn_track(session)
    monkeypatch.setattr(track, "save_latest", lambda: saved.append((track.epoch, track.step)))
    train(track, session)
    assert saved == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]


def test_who_watches_a_log_sees_which_network_of_how_many_and_when_all_ends(session, capsys):
    train(cnn_track(session), session)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    place = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d CNN \(network 1 of 3\): epoch %d/2, loss \d\.\d{3}, test \d+\.\d\d %%"
    assert re.fullmatch(place % 0, lines[0])
    for epoch in (1, 2):
        assert re.fullmatch(place % epoch + r", \d+ s left, \d+ s in all, until \w{3} \d\d:\d\d", lines[epoch])


def test_who_watches_a_terminal_sees_the_same(session, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    train(cnn_track(session), session)
    shown = capsys.readouterr().out
    assert "CNN, network 1 of 3: 100%" in shown and "6/6" in shown and "in all, until" in shown


def test_the_time_of_all_sessions_is_noted_and_a_lost_note_of_the_end_is_made_up_for(session, capsys):
    train(cnn_track(session), session)
    member = Member(session.settings)
    status = network_status(session.run, member)
    assert status["state"] == "complete" and status["epoch"] == 2 and status["seconds"] > 0
    path = session.run / "status.json"
    path.write_text(path.read_text().replace('"complete"', '"training"'))  # as after a kill at the right moment
    track = cnn_track(session)
    track.restore()
    assert train(track, session) and network_status(session.run, member) == status
    before = path.stat().st_mtime_ns
    train(track, session)
    assert path.stat().st_mtime_ns == before and json.loads(Path(path).read_text())


def test_durations_are_said_as_people_say_them():
    assert [duration(s) for s in (0.2, 40, 89, 100, 5000, 12000)] == [
        "0 s", "40 s", "89 s", "2 min", "83 min", "3 h 20 min",
    ]  # fmt: skip
