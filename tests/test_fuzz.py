"""Hostile input: never a traceback, never a half-written file, never exit status 0 on nonsense.

hypothesis drives the command lines and the readers of .npz files, checkpoints, histories and the two .json files.
300 cases each; `FUZZ_CASES=10000 pytest tests/test_fuzz.py` tries more, and other ones each time.
"""

import contextlib
import io
import json
import math
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_arrays
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from small_study import SCRIPTS, run, small_cnn

from models import load_network
from rnorm.checkpoints import Track, check_history, load, load_weights
from rnorm.cli import finish
from rnorm.conversions import find_conversion
from rnorm.data import ARRAYS, load_data
from rnorm.files import Damaged, RnormError
from rnorm.runs import Member, Settings, note_network, read_config, read_status

CASES = int(os.environ.get("FUZZ_CASES", 300))
fuzz = settings(
    max_examples=CASES, derandomize="FUZZ_CASES" not in os.environ, database=None, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a data set, a run of one CNN epoch, and nothing else; the tests work in it."""
    place = tmp_path_factory.mktemp("fuzz")
    old, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(place)
    torch.set_num_threads(1)  # where other work keeps the cores busy, several threads make tiny networks very slow
    np.savez("tiny.npz", **make_arrays(12, 6))
    assert run("experiments.py", "--dataset", "tiny.npz", "--epochs", 1, "--splits", 1) == 0
    Path("results").rename("good")
    yield place
    os.chdir(old)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def good(place):
    return next(Path("good").iterdir())


def called(script: str, argv: list[str]) -> tuple[int, str, str]:
    """A script called as a process would be: (exit status, stdout, stderr); anything but an exit is raised."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            finish(SCRIPTS[script], [script, *argv])
        except SystemExit as exit:
            status = exit.code
    return status, *(stream.buffer.getvalue().decode() for stream in (out, err) if not stream.flush())


def half_written(directory: Path) -> list[Path]:
    return list(directory.rglob("*.tmp"))


# Command lines. For every flag, values that make sense and values that do not.

GOOD_WORDS = {
    "auto", "cpu", "cuda", "all", "last", "float32", "tf32", "cifar10", "synthetic", "tiny.npz", "tiny", "small",
    "skinnyprime", "lc", "tied", "cnn", "lc1", "lc5", "lc1+5",
}  # fmt: skip
WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=[]), max_size=8)
WORDS = WORDS.filter(lambda word: word not in GOOD_WORDS)  # hypothesis reads the source for words to try
NO_NUMBERS = st.sampled_from(["", "x", "1e", "--", "0x10", "1,5", "\udcff", "9" * 5000, "١x", "None", "1 2"])


def integers(low: int, high: int, most: int = 2) -> tuple:
    """Values for a flag of `low` to `high`; of the good ones at most `most`, so that a study takes no time."""
    outside = st.one_of(st.integers(max_value=low - 1), st.integers(min_value=high + 1)).map(str)
    return st.integers(low, most).map(str), st.one_of(outside, NO_NUMBERS, st.just("1.5"))


RATES = (
    st.floats(1e-30, 1e38).map(repr),
    st.one_of(st.sampled_from(["0", "-0.0", "-1", "nan", "inf", "-inf", "1e39", "1e999", "1e-999"]), NO_NUMBERS),
)
FLAGS = {
    "--epochs": integers(1, 10**5),
    "--n_splits": integers(1, 10**4, 10**4),
    "--cnn_lr": RATES,
    "--lc_lr": RATES,
    "--lc_epochs": integers(0, 10**5),
    "--data_size": integers(0, 12, 12),
    "--batch_size": integers(1, 10**6, 10**6),
    "--seed": integers(0, 2**32 - 1, 2**32 - 1),
    "--splits": (st.sampled_from(["0", "1", "0 1", "1 1 0"]), st.sampled_from(["-1", "3", "1 99999", "x", ""])),
    "--device": (st.sampled_from(["auto", "cpu"]), WORDS),
    "--network": (st.just("small"), WORDS),
    "--convert_to": (st.sampled_from(["lc", "lc5 tied", "cnn"]), st.sampled_from(["lc tide", "lc2", "lc5+1", ""])),
    "--keep": (st.sampled_from(["all", "last"]), WORDS),
    "--precision": (st.just("float32"), WORDS),
    "--exec": (st.just("0"), st.sampled_from(["2", "-1", "", "x"])),
    "--results_dir": (
        st.sampled_from(["out", "./out", "out/../out"]),
        st.sampled_from(["tiny.npz", "tiny.npz/x", "/dev/null", "y" * 300]),
    ),
    "--data_dir": (st.sampled_from([".", "missing", "tiny.npz"]), st.just(None)),
    "--cnn_only": (st.just(None), st.sampled_from(["x", "1"])),
    "--shuffle": (st.just(None), st.just("yes")),
    "--fresh": (st.just(None), st.just("no")),
}


SPELLINGS = {"--lc_lr": ["--lc_lr", "--lcn_lr"]}


@st.composite
def command_lines(draw) -> tuple[list[str], bool]:
    """A command line of experiments.py, and whether it makes sense."""
    argv, sense = ["--dataset", "tiny.npz", "--epochs", "2", "--results_dir", "out", "--network", "small"], True
    for flag in draw(st.lists(st.sampled_from(sorted(FLAGS)), unique=True, max_size=5)):
        nonsense = draw(st.integers(0, 3)) == 0
        value = draw(FLAGS[flag][nonsense])
        assume(not (nonsense and value is None))
        sense &= not nonsense
        if value is None:
            argv.append(flag)
        elif flag in ("--splits", "--convert_to"):
            argv += [flag, *value.split()]
        else:
            argv.append(f"{draw(st.sampled_from(SPELLINGS.get(flag, [flag])))}={value}")
    if draw(st.integers(0, 9)) == 0:
        word = draw(st.one_of(WORDS.map(lambda word: "=" + word), st.sampled_from(["--fre", "--epoch=2", "--="])))
        argv.insert(0, word)
        sense = False
    if draw(st.integers(0, 9)) == 0:
        dataset = draw(st.one_of(WORDS, WORDS.map(lambda w: w + ".npz"), st.sampled_from(["out", "/dev/zero"])))
        argv[argv.index("--dataset") + 1] = dataset
        sense = False
    if sense and draw(st.integers(0, 2)):
        argv.append("--exec=0")  # most of those that would train only plan
    return argv, sense


@fuzz
@given(line=command_lines())
def test_command_lines(place, line):
    argv, sense = line
    shutil.rmtree("out", ignore_errors=True)
    status, out, err = called("experiments.py", argv)
    if sense:
        assert status in (0, 3), err  # such learning rates may diverge
        assert "complete: " in out or "disk space" in out or status == 3
    else:
        assert status in (1, 2) and out == ""
        assert err.startswith("experiments.py: ") and err.count("\n") == 1
        assert not Path("out").exists()
    assert not half_written(place)


@fuzz
@given(words=st.lists(st.one_of(WORDS, st.sampled_from(["--split", "1", "--keep", "last", "tiny.npz"])), max_size=4))
def test_command_lines_of_convert(place, words):
    assume(not {"-h", "--help"} & set(words))
    before = sorted(place.rglob("*"))
    status, out, err = called("convert.py", words)
    assert status == 2 and out == "" and err.startswith("convert.py: ") and err.count("\n") == 1
    assert sorted(place.rglob("*")) == before


# Files. Bytes of a good one changed, or something else of the right kind.


EMPTY_ZIP = b"PK\x05\x06" + bytes(18)


@st.composite
def changed(draw, content: bytes) -> bytes:
    """`content` with a few changes: bits, bytes, a piece cut out, repeated or put in, or the end cut off."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 30, 1000]))
        piece = content[at : at + length]
        flipped = bytes([piece[0] ^ 1 << draw(st.integers(0, 7))]) if piece else b""
        new = draw(st.sampled_from([b"", flipped, piece * 2, bytes(length), b"\xff" * length, EMPTY_ZIP]))
        content = content[:at] + new + content[at + (len(new) or length) :]
    if draw(st.integers(0, 4)) == 0:
        content = content[: draw(st.integers(0, len(content)))]
    return content


def saved(value: object, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.binary(max_size=3),
    st.sampled_from([torch.zeros(()), torch.zeros(4), torch.zeros(2, 3, dtype=torch.int64), torch.tensor(math.nan)]),
    st.sampled_from([print, os.system, Path("x"), np.float64(1), np.zeros(3), Exception(), object]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=4),
        st.tuples(inner, inner),
    ),
    max_leaves=12,
)  # fmt: skip
KEYS = ["weights", "optimizer", "epoch", "step", "history", "checkpoints", "train_loss", "net.1.weight", "net.9.bias"]


@st.composite
def hostile_files(draw, contents: list[bytes], state: dict) -> bytes:
    """What may lie where a checkpoint or a history is expected."""
    kind = draw(st.integers(0, 5))
    if kind <= 2:
        return draw(changed(draw(st.sampled_from(contents))))
    if kind == 3:
        return draw(st.one_of(st.binary(max_size=200), VALUES.map(pickle.dumps)))
    value = draw(st.one_of(VALUES, st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1)))
    if kind == 5:  # a good one, with something else in it
        value = {**state, **(value if isinstance(value, dict) else {draw(st.sampled_from(KEYS)): value})}
    return saved(value, draw(st.booleans()))


def test_checkpoint_and_history_readers(place, good):
    path, state = Path("small_1.pyT"), load(good / "small_1.pyT")
    member = Member(read_config(good)[0])
    right = small_cnn(3)
    load_weights(right, state)
    contents = [
        (good / "small_1.pyT").read_bytes(), (good / "evaluation-history.hist").read_bytes(), saved(state, False),
    ]  # fmt: skip

    @fuzz
    @given(content=hostile_files(contents, state))
    def read(content):
        path.write_bytes(content)
        with contextlib.suppress(Damaged):
            history = check_history(load(path), member)
            assert all(len(values) == len(history["checkpoints"]) for values in history.values())
        net = small_cnn(3)
        before = {key: value.clone() for key, value in net.state_dict().items()}
        try:
            load_weights(net, load(path))
        except Damaged as damage:
            assert "\n" not in str(damage)
            assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        with contextlib.suppress(RnormError):
            assert load_network(path)(torch.zeros(1, 3, 32, 32)).shape[0] == 1

    read()


def test_resuming_from_hostile_files(place, good):
    """What is taken over is a state that this network could have been in; everything else is set aside."""
    names = ["small_0.pyT", "small_1.pyT", "evaluation-history.hist", "latest.pyT"]
    state, member = load(good / "small_1.pyT"), Member(read_config(good)[0])
    contents = [(good / name).read_bytes() for name in names[:3]]
    directory = Path("resume")

    @fuzz
    @given(name=st.sampled_from(names), content=hostile_files(contents, state))
    def resume(name, content):
        shutil.copytree(good, directory)
        (directory / name).write_bytes(content)
        track = Track(directory, member, small_cnn(3), [0.05] * 6)
        with contextlib.redirect_stderr(io.StringIO()):
            track.restore()
        assert (track.epoch, track.step) in ((0, 0), (1, 0)) or name == "latest.pyT"
        if track.history:
            assert check_history(load(directory / "evaluation-history.hist"), member)
            assert track.history["checkpoints"] in ([0], [0, 1])
        assert not half_written(directory)
        shutil.rmtree(directory)

    resume()


@fuzz
@given(name=st.one_of(WORDS, st.from_regex(r"lc[0-9+]{0,6}", fullmatch=True)))
def test_names_of_conversions(name):
    """One that is taken is a directory's name, and the only one of what it does."""
    try:
        find_conversion(name).convert(small_cnn(3), (3, 32, 32))
    except ValueError:
        return
    assert name in ("lc", "lc1", "lc5", "lc1+5", "tied", "cnn")


SHAPES = [(), (0,), (3,), (6,), (6, 1), (6, 32, 32, 3), (3, 32, 32, 3), (1, 32, 32)]
DTYPES = ["u1", "i8", "u8", ">i2", "f4", "f8", "c16", "?", "S3", "U2", "M8[s]", "m8[s]", "i4,f4"]


@st.composite
def hostile_npz(draw, content: bytes) -> bytes:
    if draw(st.booleans()):
        return draw(changed(content))
    arrays = make_arrays(6, 3)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as parts:
        for name in draw(st.lists(st.sampled_from([*ARRAYS, *ARRAYS, "more"]), max_size=6, unique=True)) + list(ARRAYS):
            if name in parts.namelist() or name + ".npy" in parts.namelist():
                continue
            kind = draw(st.integers(0, 9))
            array = arrays.get(name, np.zeros(3))
            if kind <= 1:
                array = np.zeros(draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES)))
            array = np.asarray(array - draw(st.integers(-300, 300)) * (array == 0)) if kind == 2 else array
            npy = io.BytesIO()
            np.lib.format.write_array(npy, array)
            npy = npy.getvalue()
            if kind == 3:
                npy = draw(st.sampled_from([b"", b"no array", npy[:40], npy[:-1], npy.replace(b"(6,", b"(9**9,")]))
            if kind == 4:
                npy = npy.replace(b"'shape': (", b"'shape': (9999999999, ")
            parts.writestr(name + (".npy" if draw(st.integers(0, 9)) else ""), npy)
    return file.getvalue()


def test_npz_reader(place):
    path = Path("hostile.npz")

    @fuzz
    @given(content=hostile_npz(Path("tiny.npz").read_bytes()), size=st.sampled_from([0, 0, 1, 12, 13]))
    def read(content, size):
        path.write_bytes(content)
        try:
            data = load_data(str(path), Path(), size, torch.device("cpu"))
        except RnormError as error:
            assert "\n" not in str(error)
            return
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
            assert x.shape == (len(y), 3, 32, 32) and len(y) and bool(torch.isfinite(x).all())
            assert 0 <= int(y.min()) <= int(y.max()) < data.num_classes
        assert data.num_classes >= 3 and len(data.y_train) == (size or len(data.y_train))

    read()


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)


def test_config_and_status_readers(place, good):
    texts = {name: (good / name).read_bytes() for name in ("config.json", "status.json")}
    whole = {name: json.loads(text) for name, text in texts.items()}
    whole["config.json"].pop("crc32")
    directory = Path("json")
    directory.mkdir(exist_ok=True)

    @st.composite
    def hostile_json(draw, name: str) -> bytes:
        kind = draw(st.integers(0, 3))
        if kind == 0:
            return draw(changed(texts[name]))
        if kind == 1:
            return draw(st.one_of(JSON.map(lambda v: json.dumps(v).encode()), st.binary(max_size=50)))
        value = json.loads(json.dumps(whole[name]))
        inner = value[draw(st.sampled_from(["settings", "versions"] if name == "config.json" else ["networks"]))]
        target = inner if kind == 2 else value
        target[draw(st.sampled_from([*target, "more"]))] = draw(JSON)
        return json.dumps(value).encode()

    @fuzz
    @given(config=hostile_json("config.json"), status=hostile_json("status.json"))
    def read(config, status):
        (directory / "config.json").write_bytes(config)
        (directory / "status.json").write_bytes(status)
        try:
            settings, rest = read_config(directory)
            assert settings.split_epochs and settings.run_name and isinstance(rest, dict)
        except RnormError as error:
            assert "\n" not in str(error)
        with contextlib.redirect_stderr(io.StringIO()):
            note_network(directory, Member(Settings()), state="training")
        assert read_status(directory)["networks"]["CNN"]["state"] == "training"
        assert not half_written(directory)
        called_status, _, err = called("convert.py", [str(directory), "--split", "1"])
        assert called_status in (1, 2) and err

    read()


def test_a_checkpoint_with_a_false_size_is_damaged(place, good):
    """Sizes in a zip's directory are not covered by its checksums."""
    content = bytearray((good / "small_1.pyT").read_bytes())
    at = content.find(b"PK\x01\x02")
    while at >= 0:
        size = struct.unpack_from("<I", content, at + 24)[0]
        struct.pack_into("<I", content, at + 24, size + 2**20)
        at = content.find(b"PK\x01\x02", at + 4)
    Path("false.pyT").write_bytes(content)
    with pytest.raises(Damaged):
        load(Path("false.pyT"))
