"""The plan of a command: what will be trained and written, and the time and the disk space that are still to come."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_of
from small_study import run, small_cnn

from rnorm.data import load_data
from rnorm.measure import KEYS
from rnorm.plan import Item, disk_space, time_of
from rnorm.runs import Member, Settings
from rnorm.store import Store, save
from train import SGD, Training

PARAMETERS = sum(parameter.numel() for parameter in small_cnn(3).parameters())


@pytest.fixture
def plan(command, capsys):
    """Plan the study SMALL with more flags: (what people read, what programs read)."""

    def plan(*flags: object) -> tuple[str, dict]:
        assert run(command[0], *flags, *command[1:], "--exec", 0) == 0
        text, _, facts = capsys.readouterr().out.rpartition("plan: ")
        return text, json.loads(facts)

    return plan


def items(path: Path, conversion: str = "lc") -> list[Item]:
    """The networks of the study SMALL in a run's directory."""
    settings = Settings(epochs=3, n_splits=2, network="small", dataset="tiny", batch_size=10)
    members = [Member(path, settings), *(Member(path, settings, conversion, split) for split in (1, 3))]
    return [Item(member, PARAMETERS, step=2.0, evaluation=10.0) for member in members]


def bytes_needed(items: list[Item], keep: str | None = None) -> int:
    ((_, needed, _),) = disk_space(items, keep)
    return needed


def test_a_plan_trains_nothing_and_does_not_load_torchs_compiler(tmp_path, data):
    """To load it takes seconds."""
    code = "import sys, small_study; small_study.run(*sys.argv[1:]); sys.exit('sympy' in sys.modules)"
    flags = ("--exec", 0, "--dataset", data, "--results_dir", tmp_path / "results", "--convert_to", "lc", "tied")
    argv = [sys.executable, "-c", code, "experiments.py", *map(str, flags)]
    text = subprocess.run(argv, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
    assert text.count("1 2 3 4 6 8 10 13 18 23 30 40 52 67 88 115 150") == 3  # the splits twice, and the evaluations
    assert "GB needed" in text and "GB free" in text and "tied        17, from these epochs" in text
    assert "0 of 35 networks complete" in text and not (tmp_path / "results").exists()


def test_the_last_line_is_for_programs(plan, command, undisturbed, copy):
    (copy / "small_lc_version_1" / "evaluation-history.hist").unlink()
    text, facts = plan()
    assert "2 of 3 networks complete" in text and list(facts) == ["run", "state", "bytes", "seconds"]
    assert facts["run"] == str(run_of(command)) and facts["state"] == "incomplete"
    assert facts["bytes"] > 0 and facts["seconds"] >= 0
    text, facts = plan("--cnn_only")
    assert "state       complete\n" in text and "time" not in text
    assert facts == {"run": str(copy), "state": "complete", "bytes": 0, "seconds": 0}


def test_a_plan_of_fc_keeps_the_last_checkpoint(plan):
    text, _ = plan("--convert_to", "fc", "lc")
    assert "eFCN        2, from these epochs of the CNN: 1 3\n            1 checkpoint stays of each, " in text
    assert "eLCN        2, from these epochs of the CNN: 1 3\n            4 checkpoints of each, " in text


def test_a_complete_run_needs_no_space_whichever_of_its_checkpoints_were_deleted(copy):
    for path in copy.rglob("*_[012].pyT"):
        path.unlink()
    assert bytes_needed(items(copy)) == 0 and sum(item.seconds(60) for item in items(copy)) == 0


def test_files_of_networks_that_are_not_asked_for_do_not_count(copy, tmp_path):
    cnn, *tied = items(copy, "tied")
    elsewhere = items(tmp_path / "empty", "tied")[1:]
    assert bytes_needed([cnn, *tied]) == bytes_needed(elsewhere) > 2 * 4 * tied[0].checkpoint_bytes


def test_what_is_left_of_an_unfinished_run(copy):
    """The CNN after one of three epochs; from there 6 steps an epoch of 60 images in batches of 10."""
    save(dict.fromkeys(KEYS, [1.0, 1.0]) | {"checkpoints": [0, 1]}, copy / "evaluation-history.hist")
    cnn, elcn, _ = items(copy)
    assert cnn.seconds(60) == 2 * 6 * 2.0 + 2 * 10.0 and elcn.seconds(60) == 0
    assert cnn.bytes_to_write(None) == 2 * cnn.checkpoint_bytes
    assert bytes_needed(items(copy)) == 3 * cnn.checkpoint_bytes  # and once latest.pyT


@pytest.mark.parametrize("keep, count", [("all", 4), ("last", 1), (None, 4)])
def test_keep_decides_how_many_checkpoints_of_a_converted_network_are_to_be_written(tmp_path, keep, count):
    cnn, elcn, _ = items(tmp_path / "run")
    assert (cnn.checkpoints(keep), elcn.checkpoints(keep)) == (4, count)
    assert elcn.bytes_to_write(keep) == count * elcn.checkpoint_bytes


def test_the_space_planned_is_enough_for_what_is_written_and_hardly_more(tmp_path, data):
    """At 10,000 epochs histories are most of it."""
    member = Member(tmp_path, Settings(epochs=10_000, network="small"))
    images = load_data(str(data), tmp_path, 0, torch.device("cpu"))
    net, sizes = small_cnn(3), []
    keys, rng = [*KEYS[1:], "untied_1", "untied_5"], np.random.default_rng(0)
    for epoch in (0, 10_000):
        values = rng.random((len(keys), epoch + 1)).tolist()
        history = {"checkpoints": list(range(epoch + 1)), **dict(zip(keys, values))}
        training = Training(member, net, SGD(net, [0.05] * 6, 0.05), epoch, history=history)
        save(Store(member, images)._state(training), tmp_path / "file")
        sizes.append((tmp_path / "file").stat().st_size)
    planned = Item(member, PARAMETERS, 0.0, 0.0).bytes_to_write(None)
    assert 1 <= planned / (10_001 * sum(sizes) / 2) < 1.2


def test_times_are_told_as_people_tell_them():
    assert [time_of(seconds) for seconds in (0, 39.2, 60, 725, 3599, 9600)] == [
        "0 s", "40 s", "1 min", "12 min", "1 h 0 min", "2 h 40 min"
    ]  # fmt: skip
