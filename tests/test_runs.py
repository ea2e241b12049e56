"""What a run is: settings and name, networks and their files, config.json and status.json."""

import json
import re
from pathlib import Path

import pytest

from rnorm import runs
from rnorm.files import RnormError
from rnorm.runs import (
    AnotherRun, Member, Settings, converted_members, diverged_at, environment, log_spaced_epochs, network_status,
    note_network, read_config, read_status, write_config,
)  # fmt: skip

HERE = environment({"device": "cpu"}, 1)


def test_the_published_split_epochs():
    assert Settings().split_epochs == [1, 2, 3, 4, 6, 8, 10, 13, 18, 23, 30, 40, 52, 67, 88, 115, 150]
    assert Settings(n_splits=10).split_epochs == [1, 3, 5, 9, 16, 28, 49, 85, 150]


@pytest.mark.parametrize("n", [2, 3, 30, 40, 50, 80, 150, 1000])
def test_the_last_epoch_is_always_evaluated(n):
    assert log_spaced_epochs(n, 20)[-1] == n and log_spaced_epochs(n, 20)[0] == 1


def test_run_names_hold_what_differs_from_the_defaults():
    assert Settings().run_name == "epochs=150-n_splits=20-cnn_lr=0.05-lc_lr=0.01"
    settings = Settings(
        splits=(28, 9, 9), lc_epochs=3, network="mine", dataset="ours", data_size=5, batch_size=7, seed=1, shuffle=True,
        precision="tf32",
    )  # fmt: skip
    assert settings.run_name == (
        "epochs=150-cnn_lr=0.05-lc_lr=0.01-splits=9+28-lc_epochs=3-network=mine-dataset=ours-data_size=5-batch_size=7"
        "-seed=1-shuffle-precision=tf32"
    )


def test_settings_that_mean_the_same_are_equal():
    assert Settings(lc_epochs=150) == Settings()
    assert Settings(splits=(3, 1, 3), n_splits=7) == Settings(splits=(1, 3))


@pytest.mark.parametrize(
    "name, values",
    [
        ("epochs", (0, -3, 10**5 + 1)), ("n_splits", (0, 10**4 + 1)), ("data_size", (-1, 10**9 + 1)),
        ("batch_size", (0, 10**6 + 1)), ("lc_epochs", (-1, 10**5 + 1)), ("seed", (-1, 2**32)),
        ("cnn_lr", (0.0, -1.0, float("nan"))), ("lc_lr", (float("inf"), 1e39)), ("splits", ((4,), (-1, 2))),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} .*(between|positive)"):
            Settings(**{"epochs": 3, name: value})


def test_a_network_is_found_by_its_name():
    settings = Settings(epochs=30, lc_epochs=4, network="mine")
    cnn, elcn, tied = Member(settings), Member(settings, "lc", 9), Member(settings, "tied", 9)
    run = Path("run")
    assert (cnn.label, elcn.label, tied.label) == ("CNN", "eLCN from 9", "tied from 9")
    assert (cnn.lr, elcn.lr, cnn.epochs, elcn.epochs) == (0.05, 0.01, 30, 4)
    assert cnn.evaluations == [*range(31)] and elcn.evaluations == [0, 1, 2, 3, 4]
    assert cnn.checkpoint(run, 3) == run / "mine_3.pyT" and cnn.history(run) == run / "evaluation-history.hist"
    assert elcn.checkpoint(run, 3) == run / "mine_lc_version_9" / "mine_lc_version_3.pyT"
    assert tied.latest(run) == run / "mine_tied_version_9" / "latest.pyT"


def test_the_converted_networks_of_a_run_are_those_with_a_directory(tmp_path):
    settings = Settings(epochs=30, splits=(0, 9, 10), network="mine")
    for name in ("mine_tied_version_9", "mine_lc_version_10", "mine_lc_version_9", "mine_lc1+5_version_0",
                 "mine_lc_version_8", "mine_lc_version_09", "mine_lc_version_x", "other_lc_version_9"):  # fmt: skip
        (tmp_path / name).mkdir()
    members = converted_members(tmp_path, settings)
    assert [(m.conversion, m.split) for m in members] == [("lc", 9), ("lc", 10), ("lc1+5", 0), ("tied", 9)]


def test_a_config_says_what_the_run_is(tmp_path, capsys):
    settings = Settings(splits=(1, 3), lc_lr=0.1)
    write_config(tmp_path, settings, "5ec", "/data/tiny.npz", HERE)
    before = (tmp_path / "config.json").read_bytes()
    assert read_config(tmp_path)[0] == settings
    config = read_config(tmp_path)[1]
    assert (config["data_sha256"], config["dataset_file"]) == ("5ec", "/data/tiny.npz")
    assert {"device", "threads", "versions", "git_commit"} <= set(config)
    write_config(tmp_path, settings, "5ec", "/elsewhere/tiny.npz", HERE)
    assert (tmp_path / "config.json").read_bytes() == before and capsys.readouterr().err == ""


def test_other_versions_or_threads_are_a_warning(tmp_path, capsys):
    write_config(tmp_path, Settings(), "5ec", None, HERE | {"versions": {"torch": "1.0"}})
    write_config(tmp_path, Settings(), "5ec", None, HERE | {"threads": 2})
    err = capsys.readouterr().err
    assert "was begun with versions {'torch': '1.0'}" in err and "begun with threads 1, now 2" in err


def test_another_run_in_the_directory_is_refused_with_the_differences(tmp_path):
    write_config(tmp_path, Settings(seed=7, lc_lr=0.5), "5ec", None, HERE)
    with pytest.raises(AnotherRun, match="lc_lr 0.5 there, 0.01 here; seed 7 there, 0 here$"):
        write_config(tmp_path, Settings(), "5ec", None, HERE)
    with pytest.raises(AnotherRun, match="data_sha256 5ec there, 0ther here$"):
        write_config(tmp_path, Settings(seed=7, lc_lr=0.5), "0ther", None, HERE)


def edit_config(run: Path, **changes) -> None:
    """Change config.json as someone who edits it on purpose would: without its checksum."""
    config = json.loads((run / "config.json").read_text())
    del config["crc32"]
    (run / "config.json").write_text(json.dumps(config | changes))


def test_a_config_that_lacks_a_later_setting_has_its_default(tmp_path, capsys):
    settings = Settings(seed=3)
    write_config(tmp_path, settings, "5ec", None, HERE)
    old = {"epochs": 150, "n_splits": 20, "cnn_lr": 0.05, "lc_lr": 0.01, "splits": [], "seed": 3}
    edit_config(tmp_path, settings=old)
    assert read_config(tmp_path)[0] == settings
    write_config(tmp_path, settings, "5ec", None, HERE)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "changes",
    [{"settings": {"splits": [0.5]}}, {"settings": {"splits": [], "seed": ""}}, {"settings": {"x": 1}},
     {"settings": {"splits": [], "epochs": 0}}, {"settings": 3}, {"dataset_file": 5}],
)  # fmt: skip
def test_no_setting_of_the_wrong_type_is_read(tmp_path, changes):
    write_config(tmp_path, Settings(), "5ec", None, HERE)
    edit_config(tmp_path, **changes)
    with pytest.raises(RnormError, match="config.json is damaged .*; repeat the run's experiments.py command"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b"[" * 9999, b"\xff"])
def test_a_config_that_is_missing_or_damaged_is_made_anew_with_a_warning(tmp_path, capsys, content):
    (tmp_path / "small_0.pyT").touch()  # so it is a run
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RnormError, match="(missing|damaged).*; repeat the run's experiments.py command") as refused:
        read_config(tmp_path)
    assert "\n" not in str(refused.value)
    write_config(tmp_path, Settings(), "5ec", None, HERE)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and ("was missing and is made anew" in err or "is now config.json.damaged" in err)
    assert read_config(tmp_path)[0] == Settings()


def test_a_new_run_warns_of_nothing_and_a_directory_without_a_run_is_none(tmp_path, capsys):
    for place in (tmp_path, tmp_path / "missing", Path(__file__)):
        with pytest.raises(RnormError, match="is not a run of experiments.py"):
            read_config(place)
    write_config(tmp_path, Settings(), "5ec", None, HERE)
    assert capsys.readouterr().err == ""


def test_any_flipped_bit_of_config_or_status_is_recognised_or_harmless(undisturbed, tmp_path):
    right, (settings, _) = read_status(undisturbed), read_config(undisturbed)
    for name in ("config.json", "status.json"):
        content = (undisturbed / name).read_bytes()
        for at in range(len(content)):
            (tmp_path / name).write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
            if name == "config.json":
                try:
                    assert read_config(tmp_path)[0] == settings
                except RnormError as error:
                    assert re.search("config.json is damaged", str(error))
            status = read_status(tmp_path)
            assert status.keys() >= right.keys() and all(isinstance(n, dict) for n in status["networks"].values())


def test_the_status_of_a_network_is_noted_beside_those_of_others(tmp_path):
    cnn, elcn = Member(Settings()), Member(Settings(), "lc", 9)
    assert network_status(tmp_path, cnn) == {} and diverged_at(tmp_path, cnn) is None
    note_network(tmp_path, cnn, state="training", epoch=3)
    note_network(tmp_path, elcn, state="diverged", diverged_at=4)
    note_network(tmp_path, cnn, state="complete")
    runs.begin_session(tmp_path, "cpu")
    assert network_status(tmp_path, cnn) == {"state": "complete", "epoch": 3}
    assert diverged_at(tmp_path, elcn) == 4
    session = read_status(tmp_path)["sessions"][0]
    assert {"started", "host", "pid", "device", "command"} == set(session)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"networks": [], "sessions": []}', '{"networks": {"CNN": 3}, "sessions": []}', "[" * 9999]
)
def test_a_damaged_status_reads_as_empty_and_is_set_aside_when_written(tmp_path, capsys, content):
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) == {"networks": {}, "sessions": []}
    note_network(tmp_path, Member(Settings()), state="training")
    assert "status.json is damaged" in capsys.readouterr().err
    assert (tmp_path / "status.json.damaged").read_text() == content
    assert network_status(tmp_path, Member(Settings())) == {"state": "training"}
