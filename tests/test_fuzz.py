"""Hostile input: never a traceback, never a half-written file, never exit status 0 on nonsense.

hypothesis drives the command line and the readers of .npz files, checkpoints and histories (test_runs.py has those of
config.json). 200 cases each; `FUZZ_CASES=10000 pytest tests/test_fuzz.py` tries more, and other ones each time.
"""

import contextlib
import io
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_arrays
from hypothesis import given, settings
from hypothesis import strategies as st
from small_study import SCRIPTS, run, small_cnn

from models import load_network
from rnorm.cli import finish
from rnorm.data import ARRAYS, load_data
from rnorm.files import Damaged, RnormError
from rnorm.runs import Member, read_config
from rnorm.store import Store, load, load_history, load_weights
from train import start_cnn

fuzz = settings(max_examples=int(os.environ.get("FUZZ_CASES", 200)))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A run of one CNN epoch; the tests work in the directory above, with a data set and nothing else."""
    place, old = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    os.chdir(place)
    np.savez("tiny.npz", **make_arrays(12, 6))
    assert run("experiments.py", "--dataset", "tiny.npz", "--epochs", 1, "--splits", 1, "--results_dir", "good") == 0
    yield next(Path("good").iterdir())
    os.chdir(old)


FLAGS = ["--epochs", "--cnn_lr", "--seed", "--momentum", "--precision", "--splits", "--network", "--convert_to",
         "--dataset", "--exec"]  # fmt: skip
NONSENSE = st.one_of(
    st.sampled_from(["x", "1e", "--", "0x10", "1,5", "\udcff", "9" * 5000, "١x", "None", "-1", "x.npz"]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=[]), max_size=8).map("?".__add__),
)


@fuzz
@given(flag=st.sampled_from(FLAGS), word=NONSENSE)
def test_command_lines(good, flag, word):
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    argv = ["--dataset=tiny.npz", "--results_dir=out", "--network=small", f"{flag}={word}"]
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit:
        finish(SCRIPTS["experiments.py"], ["experiments.py", *argv])
    line = err.buffer.getvalue().decode()
    assert exit.value.code in (1, 2) and line.startswith("experiments.py: ") and line.count("\n") == 1
    assert not Path("out").exists()


@st.composite
def changed(draw, content: bytes) -> bytes:
    """`content` with a few changes: bits, bytes, a piece cut out, repeated or put in, or the end cut off."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 30, 1000]))
        piece = content[at : at + length]
        flipped = bytes([piece[0] ^ 1 << draw(st.integers(0, 7))]) if piece else b""
        end_of_zip = b"PK\x05\x06" + bytes(18)
        new = draw(st.sampled_from([b"", flipped, piece * 2, bytes(length), b"\xff" * length, end_of_zip]))
        content = content[:at] + new + content[at + (len(new) or length) :]
    return content[: draw(st.sampled_from([None, None, None, len(content) // 3, -1]))]


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.binary(max_size=3),
    st.sampled_from([torch.zeros(()), torch.zeros(4), torch.zeros(2, 3, dtype=torch.int64), torch.tensor(math.nan)]),
    st.sampled_from([print, os.system, Path("x"), np.float64(1), np.zeros(3), Exception(), object]),
)  # fmt: skip
KEYS = ["weights", "optimizer", "epoch", "step", "history", "loss", "identity", "checkpoints", "train_loss",
        "data_sha256", "net.1.weight", "net.9.bias"]  # fmt: skip
NAMES = st.one_of(st.sampled_from(KEYS), st.text(max_size=3), st.integers())
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=9
)


def saved(value: object, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def test_files_of_networks(good):
    """What is read is what was written, and what is continued from a state that the network could have been in;
    everything else is set aside."""
    names = ["small_0.pyT", "small_1.pyT", "evaluation-history.hist", "latest.pyT"]
    state, member = load(good / "small_1.pyT"), Member(Path("resume"), read_config(good)[0])
    images = load_data("tiny.npz", Path(), 0, torch.device("cpu"))
    good_but_for_one = st.builds(lambda key, value: state | {key: value}, st.sampled_from(KEYS), VALUES)
    hostile = [changed((good / name).read_bytes()) for name in names[:3]]
    hostile += [VALUES.map(pickle.dumps), st.builds(saved, VALUES | good_but_for_one, st.booleans())]

    @fuzz
    @given(name=st.sampled_from(names), content=st.one_of(hostile))
    def read(name, content):
        path, net = member.run / name, small_cnn(3)
        shutil.copytree(good, member.run)
        if name.endswith(".pyT"):  # else the network is complete, and no checkpoint is read
            member.history_file.unlink()
        path.write_bytes(content)
        before = {key: value.clone() for key, value in net.state_dict().items()}
        try:
            load_weights(net, load(path))
        except Damaged as damage:
            assert "\n" not in str(damage)
            assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        with contextlib.suppress(RnormError):
            assert load_network(path)(torch.zeros(1, 3, 32, 32)).shape[0] == 1
        training = start_cnn(member, images)
        with contextlib.redirect_stderr(io.StringIO()):
            Store(member, images).restore(training)
        assert (training.epoch, training.step) in ((0, 0), (1, 0)) or name == "latest.pyT"
        if training.history:
            assert load_history(member)["checkpoints"] == training.history["checkpoints"] in ([0], [1], [0, 1])
        assert not list(member.run.rglob("*.tmp"))
        shutil.rmtree(member.run)

    read()


SHAPES = [(), (0,), (3,), (6,), (6, 1), (6, 32, 32, 3), (3, 32, 32, 3), (1, 32, 32)]
DTYPES = ["u1", "i8", "u8", ">i2", "f4", "f8", "c16", "?", "S3", "U2", "M8[s]", "m8[s]", "i4,f4"]
ARRAY = st.builds(np.full, st.sampled_from(SHAPES), st.integers(0, 4), st.sampled_from(DTYPES))


def zipped(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **make_arrays(6, 3) | arrays)
    return file.getvalue()


def test_npz_reader(good):
    hostile = st.dictionaries(st.sampled_from([*ARRAYS, "more"]), ARRAY, max_size=2).map(zipped)

    @fuzz
    @given(content=changed(Path("tiny.npz").read_bytes()) | hostile, size=st.sampled_from([0, 0, 1, 12, 13]))
    def read(content, size):
        Path("hostile.npz").write_bytes(content)
        try:
            data = load_data("hostile.npz", Path(), size, torch.device("cpu"))
        except RnormError as error:
            assert "\n" not in str(error)
            return
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
            assert x.shape == (len(y), 3, 32, 32) and len(y) and bool(torch.isfinite(x).all())
            assert 0 <= int(y.min()) <= int(y.max()) < data.num_classes
        assert data.num_classes >= 3 and len(data.y_train) == (size or len(data.y_train))

    read()
