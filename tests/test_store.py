"""Checkpoints: what is written, what is read, and what a network continues from."""

import copy
import errno
import math
import os
import pickle
import random
import re
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from compare_runs import equal
from small_study import small_cnn

from models import converted_network
from rnorm import store
from rnorm.data import Data
from rnorm.files import Damaged, InUse, lock_directory
from rnorm.history import append
from rnorm.measure import KEYS
from rnorm.runs import Member, Settings
from rnorm.store import Store, load, load_history, load_weights, save, to_file
from train import Training, start_cnn, train_epoch

VALUES = dict.fromkeys(KEYS[1:], 0.5) | {"margin": math.nan}
HISTORY = "evaluation-history.hist"
DATA = Data(torch.zeros(40, 3, 32, 32), torch.zeros(40).long(), torch.zeros(1), torch.zeros(1), 10, "a" * 64)


def started(run: Path, keep: str = "all", data: Data = DATA, **settings) -> tuple[Training, Store]:
    member = Member(run, Settings(**{"epochs": 3, "network": "small", "batch_size": 10} | settings))
    return start_cnn(member, data), Store(member, data, keep=keep)


def record(training: Training, files: Store, epoch: int) -> None:
    training.epoch, training.history = epoch, append(training.history, epoch, VALUES)
    files.record(training)


def trained(run: Path, epochs: int = 3, step: int = 0, **options) -> Training:
    """A network after so many epochs and steps, in which each epoch adds 1 to all weights, with all files on disk."""
    run.mkdir(exist_ok=True)
    training, files = started(run, **options)
    for epoch in range(epochs + 1):
        training.net[1].weight.data += 1
        record(training, files, epoch)
    training.step = step
    files.save_latest(training)
    files.wait()
    return training


def restored(run: Path, **options) -> Training:
    training, files = started(run, **options)
    files.restore(training)
    return training


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


# What is written


def test_a_checkpoint_holds_all_to_continue_from(tmp_path):
    training = trained(tmp_path, 2)
    state = load(tmp_path / "small_2.pyT")
    assert list(state) == ["weights", "optimizer", "epoch", "step", "history", "loss", "identity"]
    assert (state["epoch"], state["step"], state["history"]["checkpoints"]) == (2, 0, [0, 1, 2])
    assert state["identity"] == {
        "network": "small", "conversion": "", "split": 0, "data_sha256": "a" * 64, "num_classes": 10,
        "image_shape": [3, 32, 32],
    }  # fmt: skip
    assert repr(load_history(training.member)) == repr(training.history) == repr(state["history"])
    assert equal(dict(restored(tmp_path).net.state_dict()), dict(training.net.state_dict()))


@pytest.mark.parametrize("conversion, prefix", [
    ("", "net."), ("tied", "net."), ("cnn", "net."), ("head", "net."), ("lc", ""), ("lc5", ""), ("fc", ""),
])  # fmt: skip
def test_keys_of_weights_begin_with_net_unless_the_network_is_untied(conversion, prefix):
    """As in the files of the released code."""
    net, other = (converted_network("small", conversion, 10) for _ in range(2))
    weights = to_file(net)
    assert list(weights) == [prefix + key for key in net.state_dict()]
    load_weights(other, {"weights": weights})
    assert equal(dict(other.state_dict()), dict(net.state_dict()))


def test_a_file_holds_what_it_was_asked_to_whatever_training_does_meanwhile(tmp_path, monkeypatch):
    held = threading.Event()
    monkeypatch.setattr(store, "save", lambda content, path: held.wait(60) and save(content, path))
    training, files = started(tmp_path)
    weight = training.net[1].weight
    before = weight.detach().clone()
    record(training, files, 0)
    assert names(tmp_path) == []  # `record` has returned, and nothing is written yet
    weight.data += 1
    held.set()
    files.wait()
    assert torch.equal(load(tmp_path / "small_0.pyT")["weights"]["net.1.weight"], before)


def test_without_a_thread_it_is_written_all_the_same_and_once(tmp_path, monkeypatch):
    training, files = started(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        record(training, files, 0)
        assert names(tmp_path) == [HISTORY, "small_0.pyT"]
    (tmp_path / "small_0.pyT").unlink()
    record(training, files, 1)
    files.wait()
    assert names(tmp_path) == [HISTORY, "small_1.pyT"]


def test_an_error_of_the_thread_is_raised_once_by_who_waits(tmp_path):
    training, files = started(tmp_path / "missing")
    record(training, files, 0)
    with pytest.raises(FileNotFoundError):
        files.wait()
    files.wait()


def test_nothing_is_written_once_the_lock_is_not_that_of_the_directory(tmp_path):
    run = tmp_path / "run"
    with lock_directory(run) as lock:
        training, files = started(run)
        files.lock = lock
        run.rename(tmp_path / "moved")
        run.mkdir()
        record(training, files, 0)
        with pytest.raises(InUse, match="was moved or deleted"):
            files.wait()
        with pytest.raises(InUse):
            files.write_history(training.history)
    assert names(run) == [] and names(tmp_path / "moved") == [".lock"]


@pytest.mark.parametrize("damage", ["deleted", "truncated", "empty"])
def test_only_the_last_checkpoint_is_kept_if_asked_for_and_it_is_good(tmp_path, damage):
    everything, last = tmp_path / "all", tmp_path / "last"
    trained(everything)
    trained(last, keep="last")
    assert names(last) == [HISTORY, "small_3.pyT"]
    assert (last / HISTORY).read_bytes() == (everything / HISTORY).read_bytes()
    path = everything / "small_3.pyT"
    content = path.read_bytes()
    path.unlink() if damage == "deleted" else path.write_bytes(content[: -100 if damage == "truncated" else 0])
    assert restored(everything, keep="last").ended
    assert {"small_0.pyT", "small_1.pyT", "small_2.pyT"} < set(names(everything))
    path.write_bytes(content)
    assert restored(everything, keep="last").ended and names(everything) == names(last)


# What is read


def flip(content: bytes, at: int, bit: int = 0) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


@pytest.mark.parametrize("name", ["small_3.pyT", HISTORY])
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
    trained(run, 2)
    path = run / "small_2.pyT"
    content = {**load(path), "weights": Hostile(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    assert restored(run).epoch == 1 and not marker.exists()
    assert f"{path} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["small_2.pyT", HISTORY])
def test_a_compressed_file_is_refused_before_it_is_read(tmp_path, capsys, name):
    """It could become any size."""
    trained(tmp_path, 2)
    with zipfile.ZipFile(tmp_path / name) as parts, zipfile.ZipFile(tmp_path / "new", "w", zipfile.ZIP_DEFLATED) as new:
        for part in parts.namelist():
            new.writestr(part, parts.read(part))
    (tmp_path / "new").replace(tmp_path / name)
    assert restored(tmp_path).history["checkpoints"] == ([0, 1] if name == "small_2.pyT" else [0, 1, 2])
    assert f"{name} is damaged (it is compressed)" in capsys.readouterr().err


@pytest.mark.parametrize("name, epoch", [("small_2.pyT", 1), ("latest.pyT", 2), (HISTORY, 2)])
def test_a_fifo_in_the_place_of_a_file_is_none(tmp_path, name, epoch):
    """To read it would wait for ever."""
    trained(tmp_path, 2)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    training = restored(tmp_path)
    assert (training.epoch, training.step) == (epoch, 0)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize("function", ["torch.load", "zipfile.ZipFile.testzip"])
def test_a_shortage_of_memory_is_no_damage(tmp_path, monkeypatch, function, error):
    trained(tmp_path, 2, step=3)
    before = names(tmp_path)
    monkeypatch.setattr(function, Mock(side_effect=error))
    with pytest.raises(type(error)):
        restored(tmp_path)
    assert names(tmp_path) == before


def test_a_checkpoint_that_the_disk_cannot_read_is_named_and_stays_and_an_older_one_is_used(
    tmp_path, monkeypatch, capsys
):
    trained(tmp_path, 2)
    bad, read = tmp_path / "small_2.pyT", Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path == bad:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert restored(tmp_path).epoch == 1 and bad.exists()
    warning = f"warning: {bad} cannot be read (Input/output error); an older one is used\n"
    assert capsys.readouterr().err == warning


# What a network continues from


@pytest.mark.parametrize("change", [
    {"epoch": 1}, {"epoch": 9}, {"epoch": True}, {"step": -1}, {"step": 1}, {"loss": "0"}, {"loss": 10**400},
    {"history": {"checkpoints": [0, 1, 2], "train_loss": [1.0]}}, {"weights": to_file(small_cnn(11))},
    {"weights": {}}, {"weights": None}, {"weights": {1: 2}},
])  # fmt: skip
def test_a_state_of_another_epoch_or_network_is_set_aside(tmp_path, capsys, change):
    trained(tmp_path, 2)
    save(load(tmp_path / "small_2.pyT") | change, tmp_path / "small_2.pyT")
    training = restored(tmp_path)
    assert training.epoch == 1 and "small_2.pyT is damaged" in capsys.readouterr().err
    assert load_history(training.member)["checkpoints"] == [0, 1]  # written anew


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [
    torch.Tensor.double, torch.Tensor.half, torch.Tensor.long, torch.Tensor.cfloat, torch.Tensor.tolist,
    torch.Tensor.to_sparse, lambda weight: weight.to("meta"), lambda weight: weight[None],
    lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
])  # fmt: skip
def test_weights_are_dense_tensors_of_the_networks_own_kind_of_number(tmp_path, capsys, change):
    trained(tmp_path, 2)
    state, net = load(tmp_path / "small_2.pyT"), small_cnn()
    before = copy.deepcopy(net)
    state["weights"]["net.1.weight"] = change(state["weights"]["net.1.weight"])
    with pytest.raises(Damaged, match="1.weight has another shape or kind of number"):
        load_weights(net, state)
    assert equal(dict(net.state_dict()), dict(before.state_dict()))  # nothing was changed
    torch.save(state, tmp_path / "small_2.pyT")
    assert restored(tmp_path).epoch == 1 and "small_2.pyT is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("part, value", [
    *[("optimizer", value) for value in (None, {}, {"state": {0: 1}}, {"state": {}}, {"state": [1, 2]})],
    *[("random", value) for value in (None, {}, torch.zeros(5056, dtype=torch.uint8))],
])  # fmt: skip
def test_a_checkpoint_without_its_optimizers_or_random_state_is_set_aside(tmp_path, capsys, part, value):
    options = {"network": "dropping", "momentum": 0.9}
    trained(tmp_path, 2, **options)
    assert restored(tmp_path, **options).epoch == 2
    save(load(tmp_path / "dropping_2.pyT") | {part: value}, tmp_path / "dropping_2.pyT")
    assert restored(tmp_path, **options).epoch == 1 and "dropping_2.pyT is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("key, value", [
    ("data_sha256", "b" * 64), ("network", "other"), ("conversion", "lc"), ("split", 1), ("num_classes", 3),
    ("image_shape", [1, 28, 28]),
])  # fmt: skip
def test_a_checkpoint_of_another_run_is_set_aside_and_an_older_file_that_does_not_say_is_taken(
    tmp_path, capsys, key, value
):
    trained(tmp_path, 2, step=1)
    state = load(tmp_path / "latest.pyT")
    save(state | {"identity": state["identity"] | {key: value}}, tmp_path / "latest.pyT")
    training = restored(tmp_path)
    assert (training.epoch, training.step) == (2, 0)
    assert f"latest.pyT is damaged (it is of a run with {key} {value})" in capsys.readouterr().err
    del state["identity"]
    save(state, tmp_path / "latest.pyT")
    assert restored(tmp_path).step == 1 and capsys.readouterr().err == ""


def test_checkpoints_of_other_data_are_not_continued_from(tmp_path, capsys):
    trained(tmp_path, 1)
    assert restored(tmp_path, data=replace(DATA, sha256="b" * 64)).epoch == 0
    assert capsys.readouterr().err.count("it is of a run with data_sha256 aaa") == 2


def test_a_network_without_any_checkpoint_starts_over_and_says_so(tmp_path, capsys):
    trained(tmp_path, 1)
    for path in tmp_path.glob("*.pyT"):
        path.unlink()
    assert restored(tmp_path).history == {}
    assert "CNN: no checkpoint is left to continue from; it starts over" in capsys.readouterr().err


@pytest.mark.parametrize("lost", [math.inf, math.nan])
def test_a_network_diverges_in_the_same_epoch_though_it_was_stopped_after_the_step_that_did_it(tmp_path, lost):
    """The sum of the epoch's losses is saved; those of its later steps may be finite."""
    run = tmp_path / "run"
    training = trained(run, 1)
    training.step, training.loss = 2, training.loss + lost
    files = Store(training.member, DATA)
    files.save_latest(training)
    files.wait()
    for network in (training, restored(run)):
        assert network.step == 2
        assert not train_epoch(network, lambda x, y: torch.tensor(0.5), DATA)
        assert train_epoch(network, lambda x, y: torch.tensor(0.5), DATA)  # the next epoch begins at 0
