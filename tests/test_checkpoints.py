"""Checkpoints and histories: what is written, what is read, and what a network continues from."""

import math
import os
import pickle
import random
import re
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from compare_runs import equal
from small_study import small_cnn

from rnorm import checkpoints
from rnorm.checkpoints import Track, check_history, load, load_history, sgd_state
from rnorm.files import Damaged, RnormError
from rnorm.measure import KEYS
from rnorm.runs import Member, Settings

VALUES = dict.fromkeys(KEYS[1:], 0.5) | {"margin": math.nan}


def new_track(run: Path, keep: str = "all") -> Track:
    return Track(Member(run, Settings(epochs=3, network="small")), small_cnn(), [0.05] * 6, keep)


def trained(run: Path, epochs: int = 3, step: int = 0, keep: str = "all") -> Track:
    """A network after so many epochs and steps, in which each epoch adds 1 to all weights, with all files on disk."""
    track = new_track(run, keep)
    track.record(VALUES)
    for epoch in range(1, epochs + 1):
        track.model.net[1].weight.data += 1
        track.epoch = epoch
        track.record(VALUES)
    track.step = step
    track.save_latest()
    track.wait()
    return track


def restored(run: Path, keep: str = "all") -> Track:
    track = new_track(run, keep)
    track.restore()
    return track


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def times(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run.iterdir()}


def test_a_checkpoint_holds_all_to_continue_from(tmp_path):
    track = trained(tmp_path, 2)
    state = load(tmp_path / "small_2.pyT")
    assert list(state) == ["weights", "optimizer", "epoch", "step", "history"]
    assert (state["epoch"], state["step"], state["history"]["checkpoints"]) == (2, 0, [0, 1, 2])
    assert equal(dict(state["weights"]), dict(track.model.state_dict()))
    assert repr(load_history(track.member)) == repr(track.history)
    torch.optim.SGD(small_cnn().parameters(), 1.0).load_state_dict(state["optimizer"])


def test_the_optimizer_of_several_learning_rates_is_that_of_torch():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [{"params": parameters[::2], "lr": 0.1}, {"params": parameters[1:2], "lr": 0.2}]
    ours, theirs = sgd_state([0.1, 0.2, 0.1]), torch.optim.SGD(groups).state_dict()
    ours["param_groups"] = [theirs["param_groups"][i] | group for i, group in enumerate(ours["param_groups"])]
    theirs["param_groups"][1]["params"] = [1]  # torch numbers them group by group
    theirs["param_groups"][0]["params"] = [0, 2]
    assert ours == theirs


def test_what_is_on_disk_does_not_depend_on_the_device(tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *to, copy: moved.append(to) or tensor.clone())
    state = new_track(tmp_path).state()
    assert moved == [("cpu",)] * len(state["weights"])


def test_a_file_holds_what_it_was_asked_to_whatever_training_does_meanwhile(tmp_path, monkeypatch):
    held, save = threading.Event(), checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda content, path: held.wait(60) and save(content, path))
    track = new_track(tmp_path)
    weight = track.model.net[1].weight
    before = weight.detach().clone()
    track.record(VALUES)
    assert names(tmp_path) == []  # `record` has returned, and nothing is written yet
    weight.data += 1
    held.set()
    track.wait()
    assert torch.equal(load(tmp_path / "small_0.pyT")["weights"]["net.1.weight"], before)


def flip(content: bytes, at: int, bit: int = 0) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


@pytest.mark.parametrize("name", ["small_3.pyT", "evaluation-history.hist"])
def test_any_flipped_byte_of_a_checkpoint_or_history_is_recognised_or_harmless(undisturbed, tmp_path, name):
    content, right = (undisturbed / name).read_bytes(), load(undisturbed / name)
    bits, path = random.Random(0), tmp_path / "flipped"
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
    trained(run, 2)
    path = run / "small_2.pyT"
    content = {**load(path), "weights": Hostile(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    assert restored(run).epoch == 1 and not marker.exists()
    assert f"{path} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("change, cause", [
    ({"checkpoints": None}, "not a history"), ({"checkpoints": []}, "not a history"),
    ({"checkpoints": [0, 2]}, "not this network's"),
    ({"checkpoints": [0, 4], "train_loss": [1, math.nan]}, "not this network's"),
    ({"train_loss": None}, "not all of length 2"), ({"margin": [0.5]}, "not all of length 2"),
    ({"margin": [0.5, "x"]}, "margin is not a list of numbers"),
    ({"margin": [0.5, True]}, "margin is not a list of numbers"), ({3: [0, 1]}, "not all of length 2"),
])  # fmt: skip
def test_a_history_is_lists_of_numbers_at_the_networks_evaluations(tmp_path, change, cause):
    track = trained(tmp_path, 1)
    with pytest.raises(Damaged, match=cause):
        check_history(track.history | change, track.member)


def test_a_quantity_is_nan_where_it_was_not_recorded(tmp_path, monkeypatch):
    """One that is added to a run that was stopped, and one that is taken away."""
    before = trained(tmp_path, 1)
    monkeypatch.setattr(checkpoints, "KEYS", (*KEYS, "sharpness"))
    track = restored(tmp_path)
    assert track.epoch == 1 and repr(track.history["sharpness"]) == "[nan, nan]"
    assert names(tmp_path) == ["evaluation-history.hist", "small_0.pyT", "small_1.pyT"]
    for track.epoch, values in ((2, {"sharpness": 0.5, "flatness": 2}), (3, {"sharpness": 0.7})):
        track.record(VALUES | values)
    track.wait()
    for history in (load_history(track.member), load(tmp_path / "small_3.pyT")["history"]):
        assert repr(history["sharpness"]) == "[nan, nan, 0.5, 0.7]"
        assert repr(history["flatness"]) == "[nan, nan, 2, nan]"
        assert history["train_loss"] == before.history["train_loss"] + [0.5, 0.5]
    assert restored(tmp_path).ended and not restored(tmp_path).diverged


@pytest.mark.parametrize("value", [torch.tensor(0.5), torch.tensor(0.5).numpy()[()], True, "0.5", None])
def test_a_quantity_that_is_no_number_is_refused_by_name_and_nothing_is_written(tmp_path, value):
    """Written, it made every file of the run a damaged one."""
    track = new_track(tmp_path)
    with pytest.raises(RnormError, match="^sharpness is recorded as a .*; it has to be a Python number"):
        track.record(VALUES | {"sharpness": value})
    track.wait()
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize("function", ["torch.load", "zipfile.ZipFile.testzip"])
def test_a_shortage_of_memory_is_no_damage(tmp_path, monkeypatch, function, error):
    trained(tmp_path, 2, step=3)
    before = times(tmp_path)
    monkeypatch.setattr(function, Mock(side_effect=error))
    with pytest.raises(type(error)):
        restored(tmp_path)
    assert times(tmp_path) == before


def test_a_state_of_another_epoch_or_network_is_none(tmp_path, capsys):
    trained(tmp_path, 2)
    state = load(tmp_path / "small_2.pyT")
    other_history, other_weights = state["history"] | {"norm": []}, small_cnn(11).state_dict()
    for change in ({"epoch": 1}, {"epoch": 9}, {"epoch": True}, {"step": -1}, {"history": other_history},
                   {"weights": other_weights}):  # fmt: skip
        torch.save(state | {"epoch": 2} | change, tmp_path / "small_2.pyT")
        (tmp_path / "evaluation-history.hist").unlink()
        track = restored(tmp_path)
        assert track.epoch == 1 and "small_2.pyT is damaged" in capsys.readouterr().err
        assert load_history(track.member)["checkpoints"] == [0, 1]  # written anew


def test_a_network_without_any_checkpoint_starts_over_and_says_so(tmp_path, capsys):
    trained(tmp_path, 1)
    for path in tmp_path.glob("*.pyT"):
        path.unlink()
    assert restored(tmp_path).history == {}
    assert "CNN: no checkpoint is left to continue from; it starts over" in capsys.readouterr().err


def test_only_the_last_checkpoint_is_kept_if_asked_for(tmp_path):
    everything, last = tmp_path / "all", tmp_path / "last"
    everything.mkdir()
    trained(everything)
    last.mkdir()
    trained(last, keep="last")
    assert names(last) == ["evaluation-history.hist", "small_3.pyT"]
    assert (last / "evaluation-history.hist").read_bytes() == (everything / "evaluation-history.hist").read_bytes()
    (everything / "small_3.pyT").rename(tmp_path / "small_3.pyT")
    restored(everything, "last")
    assert len(names(everything)) == 4  # the last one is not there, so the others are kept
    (tmp_path / "small_3.pyT").rename(everything / "small_3.pyT")
    assert restored(everything, "last").ended and names(everything) == names(last)
