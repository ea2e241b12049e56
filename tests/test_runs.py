"""What a run is: settings and name, networks and their files, config.json."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rnorm import runs
from rnorm.files import RnormError
from rnorm.runs import Member, Settings, converted_members, environment, log_spaced_epochs, read_config, write_config

CONFIG = {"data_sha256": "5ec", "layers": ["Flatten()", "Linear(9)"], "dataset_file": None}
CONFIG |= environment({"device": "cpu"}, 1)
RUN = Settings(seed=7, lc_lr=0.5)


def test_the_published_split_epochs():
    assert Settings().split_epochs == [1, 2, 3, 4, 6, 8, 10, 13, 18, 23, 30, 40, 52, 67, 88, 115, 150]
    assert Settings(n_splits=10).split_epochs == [1, 3, 5, 9, 16, 28, 49, 85, 150]
    for n in (2, 3, 30, 40, 50, 80, 150, 1000):
        assert log_spaced_epochs(n, 20)[0] == 1 and log_spaced_epochs(n, 20)[-1] == n  # the last, whatever n


def test_run_names_hold_what_differs_from_the_defaults():
    assert Settings().run_name == "epochs=150-n_splits=20-cnn_lr=0.05-lc_lr=0.01"
    settings = Settings(
        splits=(28, 9, 9), lc_epochs=3, network="mine", dataset="ours", data_size=5, batch_size=7, seed=1, shuffle=True,
        precision="tf32", momentum=0.9, weight_decay=5e-4, lc_evaluations=5,
    )  # fmt: skip
    assert settings.run_name == (
        "epochs=150-cnn_lr=0.05-lc_lr=0.01-splits=9+28-lc_epochs=3-network=mine-dataset=ours-data_size=5-batch_size=7"
        "-seed=1-shuffle-precision=tf32-momentum=0.9-weight_decay=0.0005-lc_evaluations=5"
    )
    assert Settings(lc_epochs=150) == Settings()  # what means the same is equal
    assert Settings(splits=(3, 1, 3), n_splits=7) == Settings(splits=(1, 3))


@pytest.mark.parametrize("name, values", [
    ("epochs", (0, -3, 10**5 + 1)), ("n_splits", (0, 10**4 + 1)), ("data_size", (-1, 10**9 + 1)),
    ("batch_size", (0, 10**6 + 1)), ("lc_epochs", (-1, 10**5 + 1)), ("seed", (-1, 2**32)),
    ("cnn_lr", (0.0, -1.0, float("nan"))), ("lc_lr", (float("inf"), 1e39)), ("splits", ((4,), (-1, 2))),
    ("momentum", (-0.1, 1.0)), ("weight_decay", (-0.1, float("nan"))), ("lc_evaluations", (1, 10**4 + 1)),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} .*between .* and "):
            Settings(**{"epochs": 3, name: value})


def test_a_network_is_found_by_its_name():
    settings, run = Settings(epochs=30, lc_epochs=4, network="mine"), Path("run")
    cnn, elcn, tied = Member(run, settings), Member(run, settings, "lc", 9), Member(run, settings, "tied", 9)
    assert (cnn.label, elcn.label, tied.label) == ("CNN", "eLCN from 9", "tied from 9")
    assert (cnn.lr, elcn.lr, cnn.epochs, elcn.epochs) == (0.05, 0.01, 30, 4)
    assert cnn.evaluations == [*range(31)] and elcn.evaluations == [0, 1, 2, 3, 4]
    assert cnn.checkpoint(3) == run / "mine_3.pyT" and cnn.history_file == run / "evaluation-history.hist"
    assert elcn.checkpoint(3) == run / "mine_lc_version_9" / "mine_lc_version_3.pyT"
    assert tied.latest_file == run / "mine_tied_version_9" / "latest.pyT"


def test_the_converted_networks_of_a_run_are_those_with_a_directory(tmp_path):
    settings = Settings(epochs=30, splits=(0, 9, 10), network="mine")
    for name in ("mine_tied_version_9", "mine_lc_version_10", "mine_lc_version_9", "mine_lc1+5_version_0",
                 "mine_lc_version_8", "mine_lc_version_09", "mine_lc_version_x", "other_lc_version_9"):  # fmt: skip
        (tmp_path / name).mkdir()
    members = converted_members(tmp_path, settings)
    assert [(m.conversion, m.split) for m in members] == [("lc", 9), ("lc", 10), ("lc1+5", 0), ("tied", 9)]


def test_a_config_says_what_the_run_is(tmp_path, capsys):
    for place in (tmp_path, tmp_path / "missing", Path(__file__)):
        with pytest.raises(RnormError, match="is not a run of experiments.py"):
            read_config(place)
    write_config(tmp_path, RUN, CONFIG)
    before = (tmp_path / "config.json").read_bytes()
    settings, config = read_config(tmp_path)
    assert settings == RUN and {key: config[key] for key in CONFIG} == CONFIG
    write_config(tmp_path, RUN, CONFIG | {"dataset_file": "/elsewhere/tiny.npz"})
    assert capsys.readouterr().err == ""
    write_config(tmp_path, RUN, CONFIG | {"threads": 2})
    assert "was begun with threads 1, now 2" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_bytes() == before  # written once


def test_the_commit_of_another_repository_is_not_recorded(tmp_path):
    """As where this one was unpacked without its .git inside another."""
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", environment({}, 1)["git_commit"])
    git = ("git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(tmp_path))
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    shutil.copytree(Path(runs.__file__).parent, tmp_path / "inside" / "rnorm")
    code = "from rnorm.runs import environment; print(environment({}, 1)['git_commit'])"
    inside = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "inside", capture_output=True, text=True)
    assert inside.stdout == "unknown\n"


@pytest.mark.parametrize("settings, changes, differences", [
    (Settings(), {}, "lc_lr 0.5 there, 0.01 here; seed 7 there, 0 here"),
    (RUN, {"data_sha256": "0ther"}, "data_sha256 5ec there, 0ther here"),
    (RUN, {"layers": ["Flatten()", "Linear(8)"]}, "layer 1 Linear(9) there, Linear(8) here"),
    (RUN, {"layers": ["Flatten()"]}, "layer 1 Linear(9) there, None here"),
])  # fmt: skip
def test_another_run_in_the_directory_is_refused_with_the_differences(tmp_path, settings, changes, differences):
    write_config(tmp_path, RUN, CONFIG)
    with pytest.raises(RnormError, match="give .*--results_dir, or delete .* to start over$") as refused:
        write_config(tmp_path, settings, CONFIG | changes)
    assert f"is another run: {differences}; give" in str(refused.value)


def test_what_an_older_config_lacks_has_its_default_or_is_not_compared(tmp_path, capsys):
    old = {"epochs": 150, "n_splits": 20, "cnn_lr": 0.05, "lc_lr": 0.5, "splits": [], "seed": 7}
    config = {key: CONFIG[key] for key in CONFIG if key != "layers"}
    (tmp_path / "config.json").write_text(json.dumps({"settings": old, **config}))
    assert read_config(tmp_path)[0] == RUN
    write_config(tmp_path, RUN, CONFIG)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [
    None, b"", b"{}", b"[]", b"[" * 9999, b"\xff", b'{"settings": 3}', b'{"settings": {"splits": [], "seed": ""}}',
    b'{"settings": {"splits": [0.5]}}', b'{"settings": {"x": 1}}', b'{"settings": {"splits": [], "epochs": 0}}',
    b'{"settings": {"splits": []}, "dataset_file": 5}', b'{"settings": {"splits": []}, "layers": 5}',
    b'{"settings": {"splits": []}, "crc32": 0}', b'{"settings": {"splits": [], "network": "../x"}}',
])  # fmt: skip
def test_a_config_that_is_missing_or_damaged_is_one_line_and_nothing_is_touched(tmp_path, content):
    (tmp_path / "small_0.pyT").touch()  # so it is a run
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    for call in (read_config, lambda run: write_config(run, Settings(), CONFIG)):
        with pytest.raises(RnormError, match="(missing|damaged).*; put back a copy of it, or delete ") as refused:
            call(tmp_path)
        assert "\n" not in str(refused.value)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left == {"small_0.pyT": b""} | ({} if content is None else {"config.json": content})


def test_any_flipped_bit_of_config_is_recognised_or_harmless(tmp_path):
    write_config(tmp_path, RUN, CONFIG)
    content, right = (tmp_path / "config.json").read_bytes(), read_config(tmp_path)[1]
    for at in range(len(content)):
        (tmp_path / "config.json").write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        try:
            settings, config = read_config(tmp_path)
            assert settings == RUN and {key: config.get(key) for key in right} == right
        except RnormError as error:
            assert "config.json is damaged" in str(error)
