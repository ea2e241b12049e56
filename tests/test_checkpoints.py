"""Checkpoints and histories: what is written, what is read, and what a network continues from."""

import errno
import json
import math
import os
import pickle
import random
import re
import threading
from pathlib import Path

import pytest
import torch
from compare_runs import equal
from small_study import small_cnn

from rnorm import checkpoints
from rnorm.checkpoints import Track, load, load_history, load_weights, sgd_state
from rnorm.files import Damaged
from rnorm.measure import KEYS
from rnorm.runs import Member, Settings, note_network

MEMBER = Member(Settings(epochs=3, network="small"))
VALUES = dict.fromkeys(KEYS[1:], 0.5) | {"margin": math.nan}


def new_track(run: Path, keep: str = "all") -> Track:
    model = small_cnn()
    return Track(run, MEMBER, model, [0.05] * len(list(model.parameters())), keep)


def trained(run: Path, epochs: int = 3, step: int = 0, keep: str = "all") -> Track:
    """A network after so many epochs and steps, in which each step adds 1 to all weights, with all files on disk."""
    track = new_track(run, keep)
    track.record(VALUES)
    for epoch in range(1, epochs + 1):
        track.model.net[1].weight.data += 1
        track.epoch = epoch
        track.record(VALUES)
    track.step = step
    track.save_latest()
    track.writer.wait()
    return track


def restored(run: Path, keep: str = "all") -> Track:
    track = new_track(run, keep)
    track.restore()
    return track


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.suffix != ".json" and path.name != ".status.lock")


def test_a_checkpoint_holds_all_to_continue_from(tmp_path):
    track = trained(tmp_path, 2)
    state = load(tmp_path / "small_2.pyT")
    assert list(state) == ["weights", "optimizer", "epoch", "step", "history"]
    assert (state["epoch"], state["step"], state["history"]["checkpoints"]) == (2, 0, [0, 1, 2])
    assert equal(dict(state["weights"]), dict(track.model.state_dict()))
    assert repr(load_history(tmp_path / "evaluation-history.hist", MEMBER)) == repr(track.history)
    optimizer = torch.optim.SGD(small_cnn().parameters(), 1.0, momentum=0.9)
    optimizer.load_state_dict(state["optimizer"])
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.05, 0)


def test_the_optimizer_of_several_learning_rates_is_that_of_torch():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": parameters[::2], "lr": 0.1}, {"params": parameters[1:2], "lr": 0.2}], lr=1)
    ours = sgd_state([0.1, 0.2, 0.1])
    theirs = optimizer.state_dict()
    assert [group["lr"] for group in ours["param_groups"]] == [0.1, 0.2]
    assert [group["params"] for group in ours["param_groups"]] == [[0, 2], [1]]
    assert set(ours["param_groups"][0]) <= set(theirs["param_groups"][0])


def test_what_is_on_disk_does_not_depend_on_the_device(tmp_path, monkeypatch):
    written, on_cpu, to = {}, [], torch.Tensor.to
    monkeypatch.setattr(checkpoints, "save", lambda content, path: written.update({path.name: content}))

    def noted(tensor, *args, **kwargs):
        result = to(tensor, *args, **kwargs)
        if args == ("cpu",):
            on_cpu.append(result)
        return result

    monkeypatch.setattr(torch.Tensor, "to", noted)
    trained(tmp_path, 1, step=2)
    for name in ("small_0.pyT", "small_1.pyT", "latest.pyT"):
        weights = written[name]["weights"].values()
        assert weights and all(any(tensor is moved for moved in on_cpu) for tensor in weights)


# Writing while training goes on


@pytest.fixture
def held(monkeypatch):
    """Writes that wait until `held.set()`."""
    held, save = threading.Event(), checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda content, path: held.wait(60) and save(content, path))
    yield held
    held.set()


def test_a_file_holds_what_it_was_asked_to_whatever_training_does_meanwhile(tmp_path, held):
    track = new_track(tmp_path)
    weight = track.model.net[1].weight
    before = weight.detach().clone()
    track.record(VALUES)
    assert names(tmp_path) == []  # `record` has returned, and nothing is written yet
    weight.data += 1
    held.set()
    track.writer.wait()
    assert torch.equal(load(tmp_path / "small_0.pyT")["weights"]["net.1.weight"], before)


def test_files_are_written_in_the_order_of_training(tmp_path, held):
    track = new_track(tmp_path, "last")
    track.record(VALUES)
    threading.Timer(0.2, held.set).start()
    for track.epoch in (1, 2, 3):
        track.step = 2
        track.save_latest()
        track.step = 0
        track.record(VALUES)
    track.writer.wait()
    assert names(tmp_path) == ["evaluation-history.hist", "small_3.pyT"]  # `latest.pyT` was written first, then deleted
    assert load_history(tmp_path / "evaluation-history.hist", MEMBER)["checkpoints"] == [0, 1, 2, 3]


def test_a_failed_write_is_raised_once_at_the_next_and_leaves_what_was_there(tmp_path, monkeypatch):
    track = trained(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_file", fail)
        track.epoch = 2
        track.record(VALUES)
        with pytest.raises(OSError, match="No space"):
            track.writer.wait()
    track.writer.wait()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def fail(path: Path, content: bytes) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_weights_survive_the_way_through_a_state_dict_of_any_layout():
    """Files of the released code hold contiguous tensors; ours lie as the computation wants them."""
    ours, other = (small_cnn().to(memory_format=torch.channels_last) for _ in range(2))
    load_weights(other, {"weights": {name: p.contiguous() for name, p in ours.state_dict().items()}})
    assert other.net[5].weight.stride() == ours.net[5].weight.stride() != small_cnn().net[5].weight.stride()
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(ours(x), other(x))


@pytest.mark.parametrize("weights", ["another network's", None, 3, [], {}, {"net.1.weight": 3}])
def test_weights_that_do_not_fit_change_nothing(weights):
    net = small_cnn(4)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    content = {"weights": small_cnn(5).state_dict() if weights == "another network's" else weights}
    with pytest.raises(Damaged, match="do not fit"):
        load_weights(net, content)
    assert equal(dict(net.state_dict()), before)


# Reading with suspicion


def flip(content: bytes, at: int, bit: int = 0) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def test_any_flipped_byte_of_a_checkpoint_or_history_is_recognised_or_harmless(undisturbed, tmp_path):
    bits = random.Random(0)
    path = tmp_path / "flipped"
    for source in (undisturbed / "small_3.pyT", undisturbed / "evaluation-history.hist"):
        content, right = source.read_bytes(), load(source)
        directory = content.rfind(b"PK\x01\x02", 0, content.find(b"PK\x01\x02") + 1)  # the zip's own structures
        recognised = 0
        for at in (*range(0, directory, 19), *range(directory, len(content), 5)):
            path.write_bytes(flip(content, at, bits.randrange(8)))
            try:
                assert equal(load(path), right)
            except Damaged:
                recognised += 1
        assert recognised > len(content) // 60
        for entry in re.finditer(rb"PK\x01\x02", content[directory:]):  # its mark as a directory
            path.write_bytes(flip(content, directory + entry.start() + 38, 4))
            with pytest.raises(Damaged):
                load(path)
        for length in range(0, len(content), len(content) // 20):
            path.write_bytes(content[:length])
            with pytest.raises(Damaged):
                load(path)


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_file_that_would_run_code_is_set_aside_and_not_run(tmp_path, capsys, kind):
    run, marker = tmp_path / "run", tmp_path / "ran"
    run.mkdir()
    trained(run)
    path = run / "small_3.pyT"
    content = {**load(path), "weights": Hostile(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(Damaged):
        load(path)
    assert restored(run).epoch == 2 and not marker.exists()
    assert f"{path} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, cause",
    [
        ({"checkpoints": None}, "not a history"),
        ({"checkpoints": [0, 2]}, "not this network's"),
        ({"margin": [0.5]}, "not all of length 2"),
        ({"margin": [0.5, "x"]}, "margin is not a list of numbers"),
        ({"margin": [0.5, True]}, "margin is not a list of numbers"),
        ({3: [0, 1]}, "not all of length 2"),
    ],
)
def test_a_history_is_lists_of_numbers_at_the_networks_evaluations(tmp_path, change, cause):
    history = trained(tmp_path, 1).history | change
    torch.save(history, tmp_path / "evaluation-history.hist")
    with pytest.raises(Damaged, match=cause):
        load_history(tmp_path / "evaluation-history.hist", MEMBER)
    del history["margin"]
    torch.save(history | {"checkpoints": [0, 1]}, tmp_path / "evaluation-history.hist")
    with pytest.raises(Damaged):
        load_history(tmp_path / "evaluation-history.hist", MEMBER)


# What a network continues from


@pytest.mark.parametrize("epochs, step", [(1, 0), (1, 4), (3, 0)])
def test_a_network_continues_where_it_was(tmp_path, epochs, step):
    before = trained(tmp_path, epochs, step)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    track = restored(tmp_path)
    assert (track.epoch, track.step, repr(track.history)) == (epochs, step, repr(before.history))
    assert equal(dict(track.model.state_dict()), dict(before.model.state_dict()))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert track.complete == track.ended == (epochs == 3)
    track.save_latest()  # it is on disk as it stands
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


def test_nothing_on_disk_is_the_start(tmp_path):
    track = restored(tmp_path)
    assert (track.epoch, track.step, track.history, track.ended) == (0, 0, {}, False)
    track.step = 3
    track.save_latest()  # there is no evaluation of epoch 0 yet
    track.writer.wait()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [b"", b"PK not a zip", None])
def test_the_newest_good_state_counts_and_later_good_files_stay(tmp_path, capsys, damage):
    trained(tmp_path, 2, step=3)
    for name, expected in (("latest.pyT", (2, 0)), ("small_2.pyT", (1, 0)), ("small_0.pyT", (1, 0))):
        (tmp_path / name).unlink() if damage is None else (tmp_path / name).write_bytes(damage)
        capsys.readouterr()
        track = restored(tmp_path)
        assert (track.epoch, track.step) == expected
        assert track.model.net[1].weight.min() > 0.5 * track.epoch
        err = capsys.readouterr().err
        if name == "small_0.pyT":  # not read, as later states are there
            assert "damaged" not in err and ("not needed to go on: small_0.pyT" in err) == (damage is None)
        else:
            assert (f"{name} is damaged" in err) == (damage is not None)


def test_a_state_of_another_epoch_or_network_is_none(tmp_path, capsys):
    trained(tmp_path, 3)
    state = load(tmp_path / "small_2.pyT")
    other_history, other_weights = state["history"] | {"norm": []}, small_cnn(11).state_dict()
    for change in ({"epoch": 1}, {"epoch": 9}, {"epoch": True}, {"step": -1}, {"history": other_history},
                   {"weights": other_weights}):  # fmt: skip
        for path in tmp_path.glob("small_3*"):
            path.unlink()
        torch.save(state | {"epoch": 3} | change, tmp_path / "small_3.pyT")
        (tmp_path / "evaluation-history.hist").unlink()
        assert restored(tmp_path).epoch == 2
        assert "small_3.pyT is damaged" in capsys.readouterr().err
        assert load_history(tmp_path / "evaluation-history.hist", MEMBER)["checkpoints"] == [0, 1, 2]  # written anew


def test_a_finished_network_stays_finished_whichever_of_its_checkpoints_are_gone(tmp_path, capsys):
    trained(tmp_path)
    for gone in ("small_0.pyT", "small_3.pyT", "small_1.pyT", "small_2.pyT"):
        (tmp_path / gone).unlink()
        left = names(tmp_path)
        assert restored(tmp_path).complete and names(tmp_path) == left
        assert gone in capsys.readouterr().err


def test_a_network_without_any_checkpoint_starts_over_and_says_so(tmp_path, capsys):
    trained(tmp_path, 1)
    for path in tmp_path.glob("*.pyT"):
        path.unlink()
    assert restored(tmp_path).history == {}
    assert "CNN: no checkpoint is left to continue from; it starts over" in capsys.readouterr().err


def test_a_network_that_diverged_has_ended_where_status_json_says(tmp_path):
    trained(tmp_path, 1)
    note_network(tmp_path, MEMBER, state="diverged", diverged_at=2)
    track = restored(tmp_path)
    assert track.ended and not track.complete
    for wrong in (1, 3, "2", None):  # a history that ends elsewhere
        note_network(tmp_path, MEMBER, diverged_at=wrong)
        assert not restored(tmp_path).ended
    json.loads((tmp_path / "status.json").read_text())


def test_only_the_last_checkpoint_is_kept_if_asked_for(tmp_path):
    everything, last = tmp_path / "all", tmp_path / "last"
    for run, keep in ((everything, "all"), (last, "last")):
        run.mkdir()
        trained(run, keep=keep)
    assert names(last) == ["evaluation-history.hist", "small_3.pyT"]
    assert (last / "evaluation-history.hist").read_bytes() == (everything / "evaluation-history.hist").read_bytes()
    assert restored(everything, "last").complete
    assert names(everything) == names(last)
    trained(everything)
    (everything / "small_3.pyT").unlink()
    restored(everything, "last")
    assert len(names(everything)) == 4  # the last one is not there, so the others are kept
