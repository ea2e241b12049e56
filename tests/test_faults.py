"""A run is never lost: each test provokes a fault for real, at a set place, and looks at what is left, and at the end
of the same command. The studies are processes of their own (forked.py)."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_study
from compare_runs import differences, files, states
from conftest import SMALL, make_arrays, run_of
from forked import LIMIT, Server

from rnorm.files import InUse, lock_directory
from rnorm.runs import Member, converted_members, read_config
from rnorm.store import load, load_history, save

STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 75}
ELCN = "small_lc_version_1/"
ROOT = Path(__file__).parents[1]


def line_of(study) -> str:
    """The one line that a study printed on stderr."""
    assert study.err.count("\n") == 1, study.err
    return study.err


def members_of(run: Path) -> list[Member]:
    settings, _ = read_config(run)
    return [Member(run, settings), *converted_members(run, settings)]


def every_file_loads(run: Path) -> None:
    for path in run.rglob("[!.]*.pyT"):
        assert load(path)["history"]["checkpoints"]
    for member in members_of(run):
        load_history(member)


def ends_complete(server: Server, command: list, undisturbed: Path) -> None:
    """The same command ends the run, and the run is bit-identical with the undisturbed one."""
    assert server.run(*command).status == 0
    assert differences(run_of(command), undisturbed) == []
    assert not list(run_of(command).rglob("*.tmp"))


def damage(path: Path, how: str) -> bytes | None:
    """Truncate, flip or empty a file, or delete it; returns what it holds now."""
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
        return None
    if how == "flipped":
        at = max(content.find(word) for word in (b"train_loss", b"lc_lr"))  # in a checkpoint or history, in config.json
        content[at] ^= 1
    else:
        del content[{"truncated": -100, "empty": 0}[how] :]
    path.write_bytes(content)
    return content


# Signals and kill -9


@pytest.mark.parametrize("name, call, at, step", [
    ("SIGINT", "step", 4, 4), ("SIGTERM", "step", 27, 3), ("SIGHUP", "step", 27, 3), ("SIGUSR1", "evaluate", 3, 0),
])  # fmt: skip
def test_after_a_signal_the_printed_command_ends_bit_identical(server, command, undisturbed, name, call, at, step):
    """Step 27 is an eLCN's."""
    study = server.run(*command, fault={"action": name, "at": at, "call": call})
    message, _, printed = line_of(study).partition("continue with: python ")
    assert study.status == STATUS[name] and name in message and shlex.split(printed) == list(map(str, command))
    assert load(next(run_of(command).rglob("latest.pyT")))["step"] == step  # the current step was finished, and saved
    ends_complete(server, command, undisturbed)


def test_a_job_that_took_no_step_and_recorded_nothing_is_not_to_be_continued(server, command, undisturbed):
    """Else it would be continued for ever."""
    for at, status in ((1, 1), (4, 75), (1, 1), (2, 75)):  # 4: the CNN's last evaluation; 2: after it the eLCN's first
        study = server.run(*command, fault={"action": "SIGUSR1", "call": "evaluate", "at": at})
        no_step = "nothing new was saved since the start; give the job more time" in line_of(study)
        assert study.status == status and no_step == (status == 1)
    ends_complete(server, command, undisturbed)


def test_signals_are_noted_before_torch_is_imported(data, tmp_path):
    results = tmp_path / "results"
    argv = [sys.executable, ROOT / "experiments.py", *SMALL[2:], "--dataset", data, "--results_dir", results]
    process = subprocess.Popen(map(str, argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    caught = 0
    while not caught >> (signal.SIGUSR1 - 1) & 1:  # the last of those that is caught
        caught = int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1], 16)
    process.send_signal(signal.SIGTERM)
    assert "libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text()
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 143 and err.count("\n") == 1 and "continue with: python" in err
    assert not results.exists()


def test_a_signal_ends_a_download_that_hangs(server, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = {name: f"http://127.0.0.1:{silent.getsockname()[1]}" for name in ("https_proxy", "HTTPS_PROXY")}
        arguments = ("--device", "cpu", "--data_dir", tmp_path, "--results_dir", tmp_path / "results")
        study = server.start("experiments.py", *arguments, env=env)
        silent.settimeout(LIMIT)
        connection, _ = silent.accept()
        assert study.kill(signal.SIGTERM).status == 143
        connection.close()
    assert "continue with" in line_of(study)


def test_a_killed_process_loses_what_it_has_not_saved_and_no_more(server, command):
    server.run(*command, fault={"action": "kill", "at": 10, "call": "step"}, save_every=0)
    state = load(run_of(command) / "latest.pyT")
    saved = (state["epoch"], state["step"])
    assert saved in ((1, 3), (1, 2))  # killed in step 4, before it was taken, and maybe within the write after step 3
    assert "CNN: continues in epoch 2" in server.run(*command).out


@pytest.mark.parametrize("action, status, at, call, least", [
    ("kill", -9, range(1, 200), "", 15), ("SIGTERM", 143, range(5, 99, 9), "", 2),
    *[("kill", -9, [step] * 60, "step", 5) for step in (4, 8)],
])  # fmt: skip
def test_ended_again_and_again_within_writes_or_steps_the_run_ends_bit_identical(
    server, command, undisturbed, action, status, at, call, least
):
    """The writes: opening, half of a write, flush to disk, renaming, deleting. Every other process saves each step."""
    for count, n in enumerate(at):
        study = server.run(*command, fault={"action": action, "at": n, "call": call}, save_every=30 * (count % 2))
        if (run_of(command) / "config.json").exists():
            every_file_loads(run_of(command))
        if study.status == 0:
            break
        assert study.status == status and study.err.count("\n") == (action == "SIGTERM")
    assert count >= least
    ends_complete(server, command, undisturbed)


@pytest.mark.parametrize("flags", [
    ["--momentum", "0.9", "--weight_decay", "0.01"], ["--weight_decay", "0.01", "--precision", "float64"],
    ["--network", "dropping", "--shuffle"], ["--network", "dropping", "--momentum", "0.5", "--convert_to", "fc", "lc1"],
])  # fmt: skip
def test_so_does_a_run_with_momentum_dropout_or_other_conversions_of_which_a_checkpoint_is_gone(server, command, flags):
    command[-2:-2] = flags
    assert server.run(*command).status == 0
    undisturbed = run_of(command).rename(command[-1].with_name("undisturbed"))
    for at in (3, 5, 4):  # all in the CNN
        assert server.run(*command, fault={"action": "SIGTERM", "at": at, "call": "step"}).status == 143
    assert server.run(*command, "--cnn_only").status == 0
    gone = next(run_of(command).glob("*_1.pyT"))
    gone.unlink()
    assert server.run(*command, fault={"action": "SIGTERM", "at": 9, "call": "step"}).status == 143  # in an eLCN
    assert server.run(*command).status == 0
    assert differences(run_of(command), undisturbed) == [gone.name]


# Disk and memory


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("call, at, file", [
    ("open", 1, "small_1.pyT"), ("write", 3, "lc_version_1"), ("write", 8, ".hist"), ("step", 15, ""),
])  # fmt: skip
def test_a_full_disk_is_one_line_and_the_same_command_continues(
    server, command, undisturbed, small_disk, call, at, file
):
    command[-1], filler = small_disk / "results", small_disk / "filler"
    fault = {"action": "fill", "filler": str(filler), "call": call, "at": at, "file": file}
    for options, cause in (({"fault": fault, "save_every": 0}, "No space left on device"), ({}, "free some")):
        study = server.run(*command, **options)
        assert study.status == 1 and cause in line_of(study)
        every_file_loads(run_of(command))
    filler.unlink()
    ends_complete(server, command, undisturbed)


def test_a_full_disk_under_the_log_is_told_by_the_exit_status(server, command, undisturbed):
    study = server.run(*command, stdout="/dev/full")
    assert study.status == 1 and "No space left on device" in line_of(study)
    ends_complete(server, command, undisturbed)


@pytest.mark.parametrize("at_step", [9, 18 + 9])
def test_out_of_memory_names_the_flag_and_loses_nothing_saved(server, command, undisturbed, at_step):
    """The step that fails has changed the weights."""
    study = server.run(*command, fault={"action": "oom", "at": at_step, "call": "stepped"})
    assert study.status == 1 and "lower --batch_size" in line_of(study)
    ends_complete(server, command, undisturbed)


# Files that are gone or damaged. What is complete stays so, and what is good is never written anew.


@pytest.mark.parametrize("how", ["flipped", "deleted"])
@pytest.mark.parametrize("pattern", ["none", "small_3.pyT", "**/*_[013].pyT"])
def test_what_is_complete_stays_complete_and_its_checkpoints_are_not_read(server, command, copy, pattern, how):
    for path in list(copy.glob(pattern)):
        damage(path, how)
    before = states(copy)
    study = server.run(*command, threads=2)
    assert study.status == 0 and "begun with threads 1, now 2" in line_of(study) and states(copy) == before
    assert all(f"{name}: complete" in study.out for name in ("CNN", "eLCN from 1", "eLCN from 3"))


HISTORY = "evaluation-history.hist"


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
@pytest.mark.parametrize("names", [[HISTORY], [HISTORY, "small_3.pyT", ELCN + HISTORY]])
def test_a_damaged_file_is_set_aside_once_it_is_read(server, command, copy, undisturbed, names, how):
    good, damaged = states(copy), {copy / name: damage(copy / name, how) for name in names}
    study = server.run(*command)
    assert study.status == 0 and differences(copy, undisturbed) == []
    assert {path: state for path, state in good.items() if copy / path not in damaged}.items() <= states(copy).items()
    for path, content in damaged.items():
        assert f"{path} is damaged" in study.err
        assert path.with_name(path.name + ".damaged").read_bytes() == content


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "deleted"])
def test_a_config_that_is_damaged_or_gone_is_one_line_and_nothing_is_touched(server, command, copy, how):
    config, before = copy / "config.json", states(copy)
    damaged = damage(config, how)
    for study in (server.run(*command), server.run("convert.py", copy, "--device", "cpu")):
        assert study.status == 2 and re.search("config.json is (damaged|missing).*; put back a copy", line_of(study))
        assert states(copy) == before and (config.read_bytes() if config.exists() else None) == damaged


@pytest.mark.parametrize("gone, needed, before, how", [
    ([1], 1, 0, "truncated"), ([0, 1], 1, 0, "deleted"), ([2, 3], 3, 1, "truncated"),
])  # fmt: skip
def test_what_untying_needs_is_trained_again_and_nothing_is_written(
    server, command, undisturbed, gone, needed, before, how
):
    """In a run whose CNN is complete; in the second case not even its start is there."""
    assert server.run(*command, "--cnn_only").status == 0
    run, names = run_of(command), {f"small_{epoch}.pyT" for epoch in gone}
    for name in names:
        damage(run / name, how)
    good = states(run)
    study = server.run(*command)
    assert f"CNN: small_{needed}.pyT is not on disk; its epochs from {before} on are repeated" in study.out
    assert study.status == 0 and set(differences(run, undisturbed)) == names
    assert {path: state for path, state in good.items() if path.name not in names}.items() <= states(run).items()


@pytest.mark.parametrize("how, keep", [("truncated", "all"), ("flipped", "last")])
@pytest.mark.parametrize("name, at_step", [("latest.pyT", 9), ("small_1.pyT", 9), ("small_lc_version_1.pyT", 27)])
def test_an_unfinished_network_continues_from_the_newest_good_state(
    server, command, undisturbed, name, at_step, keep, how
):
    command[1:1] = ["--keep", keep]
    server.run(*command, fault={"action": "SIGTERM", "at": at_step, "call": "step"})
    run = run_of(command)
    path = next(run.rglob(name))
    damage(path, how)
    study = server.run(*command)
    assert study.status == 0 and f"{name} is damaged" in study.err
    deleted = [str(p) for p in files(undisturbed) if keep == "last" and re.search(r"lc_version_[012].pyT", p.name)]
    assert {*deleted} <= {*differences(run, undisturbed)} <= {*deleted, str(path.relative_to(run))}
    assert name == "latest.pyT" or "continues in epoch 2" in study.out  # from latest.pyT, which is whole


# Two at once


@pytest.mark.parametrize("file", ["small_2.pyT", "lc_version_2.pyT"])
def test_a_second_process_on_a_network_stops_with_one_line_and_a_dead_one_does_not_block(
    server, command, undisturbed, file
):
    first = server.start(*command, fault={"action": "stop", "at": 1, "file": file, "call": "fsync"})
    leftover = next(run_of(command).rglob(".*.tmp"))
    second = server.run(*command)
    assert second.status == 1 and leftover.exists()
    assert f"in use by process {first.pid} on {socket.gethostname()}" in line_of(second)
    first.kill()
    ends_complete(server, command, undisturbed)


@pytest.mark.parametrize("moved, at_step", [(".", 8), (".", 27), (ELCN, 27)])
def test_a_process_whose_directory_was_moved_away_writes_nothing_into_the_one_in_its_place(
    server, command, undisturbed, moved, at_step
):
    """It is stopped before a write or, as that is a thread's, within one."""
    first = server.start(*command, fault={"action": "stop", "call": "step", "at": at_step})
    run = run_of(command)
    (run / moved).rename(command[-1].with_name("moved"))
    ends_complete(server, command, undisturbed)
    before = states(run)
    assert first.kill(signal.SIGCONT).status == 1
    assert re.search("was moved or deleted|No such file or directory", line_of(first))
    assert states(run) == before and not list(run.rglob(".*.tmp"))


def test_a_network_is_trained_once_at_a_time_within_a_process_too(command, copy):
    for directory, call in ((copy, command), (copy / ELCN, ("convert.py", copy, "--split", 1))):
        with lock_directory(directory), pytest.raises(InUse, match=f"in use by process {os.getpid()} on "):
            small_study.run(*call)


def test_different_splits_of_one_run_train_side_by_side(server, command, undisturbed):
    assert server.run(*command, "--cnn_only").status == 0
    run, cpu = run_of(command), ("--device", "cpu")
    fault = {"action": "stop", "at": 1, "call": "write", "file": "lc_version_1.pyT"}
    first = server.start("convert.py", run, "--split", 1, *cpu, fault=fault)
    leftover = next((run / ELCN).glob(".*.tmp"))
    assert server.run("convert.py", run, "--split", 3, *cpu).status == 0
    assert server.run("convert.py", run, "--split", 1, *cpu).status == 1
    assert leftover.exists()
    assert first.kill(signal.SIGCONT).status == 0
    assert differences(run, undisturbed) == []


# Divergence


def test_a_diverged_cnn_keeps_its_history_and_skips_the_splits_past_it(server, command):
    command[1:1] = ["--cnn_lr", "1e20", "--splits", "0", "1", "3"]
    study = server.run(*command)
    run = run_of(command)
    assert study.status == 3 and "CNN: the loss is no longer finite in epoch 1" in line_of(study)
    assert "skipped, as the CNN diverged before: eLCN from 1, eLCN from 3" in study.out
    cnn, elcn = members_of(run)
    history = load_history(cnn)
    assert history.pop("checkpoints") == [0, 1]
    assert all(math.isfinite(values[0]) or "normalized" in key for key, values in history.items())
    assert all(math.isnan(values[1]) for values in history.values())
    assert load_history(elcn)["checkpoints"] == [0, 1, 2, 3]
    before = states(run)
    again = server.run(*command)
    assert again.status == 3 and again.err == "" and states(run) == before
    assert server.run("convert.py", run, "--device", "cpu").status == 3


def test_a_diverged_elcn_does_not_stop_the_others_and_damage_changes_no_result(server, command):
    command[1:1] = ["--lc_lr", "1e20"]
    study = server.run(*command)
    run, elcn = run_of(command), "small_lc_version_3/"
    assert study.status == 3 and study.err.count("the loss is no longer finite in epoch 1") == 2
    assert [load_history(member)["checkpoints"] for member in members_of(run)] == [[0, 1, 2, 3], [0, 1], [0, 1]]
    undamaged = run.with_name("undamaged")
    shutil.copytree(run, undamaged)
    names = [elcn + "small_lc_version_0.pyT", elcn + "evaluation-history.hist"]
    for damaged, different in ((names[:1], names[:1]), (names, []), (names[1:], [])):
        for name in damaged:
            damage(run / name, "empty")
        assert server.run(*command).status == 3 and differences(run, undamaged) == different


# Earlier versions, other data


def edit_config(run: Path, change) -> None:
    """Change config.json as someone who edits it on purpose would: without its checksum."""
    config = json.loads((run / "config.json").read_text())
    del config["crc32"]
    change(config)
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("lc_lr, at_step, status", [("0.01", 27, 0), ("1e20", 24, 3)])
def test_a_run_that_an_earlier_version_began_is_continued(server, command, lc_lr, at_step, status):
    """Its config.json had no layers, and that a network had diverged was in status.json, not in its history."""
    command[1:1] = ["--lc_lr", lc_lr]
    assert server.run(*command).status == status
    run = run_of(command)
    undisturbed = run.rename(run.parents[1] / "undisturbed")
    server.run(*command, fault={"action": "SIGTERM", "at": at_step, "call": "step"})
    edit_config(run, lambda config: config.pop("layers"))
    (run / "status.json").write_text('{"networks": {"CNN": {"state": "diverged", "diverged_at": 1}}, "sessions": []}')
    for member in members_of(run):
        history = load_history(member)
        if math.isnan(history["train_loss"][-1]):
            save({key: values[:-1] for key, values in history.items()}, member.history_file)
    assert server.run(*command).status == status
    assert differences(run, undisturbed) == []


def test_other_data_under_the_same_name_are_refused(server, command, copy, tmp_path):
    before = states(copy)
    other = tmp_path / "other" / "tiny.npz"
    other.parent.mkdir()
    np.savez(other, **make_arrays(seed=1))
    command[command.index("--dataset") + 1] = other
    study = server.run(*command)
    assert study.status == 2 and "data_sha256" in line_of(study) and states(copy) == before
    edit_config(copy, lambda config: config.update(dataset_file=str(other)))
    study = server.run("convert.py", copy, "--device", "cpu")
    assert study.status == 2 and "tiny here is not the data of" in line_of(study)
