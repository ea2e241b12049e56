"""A run is never lost: each test provokes a fault for real, at a set place, and looks at what is left, and at the end
of the same command. The studies are processes of their own (forked.py)."""

import json
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
from compare_runs import differences, files
from conftest import SMALL, make_arrays, run_of
from forked import LIMIT, Server

from rnorm.checkpoints import load, load_history
from rnorm.runs import Member, read_config, read_status

STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 75}
ELCN = "small_lc_version_1/"


def line_of(study) -> str:
    """The one line that a study printed on stderr."""
    assert study.err.count("\n") == 1, study.err
    return study.err


def every_file_loads(run: Path) -> None:
    for path in run.rglob("*.pyT"):
        if not path.name.startswith("."):
            assert load(path)["history"]["checkpoints"]
    for path in run.rglob("*.hist"):
        load_history(path, Member(read_config(run)[0], "" if path.parent == run else "lc"))
    for path in run.glob("*.json"):
        json.loads(path.read_text())


def states(run: Path) -> dict:
    """What tells whether a file of the run was written anew."""
    return {path: ((run / path).stat().st_mtime_ns, (run / path).stat().st_ino) for path in files(run)}


def ends_complete(server: Server, command: list, undisturbed: Path) -> None:
    """The same command ends the run, and the run is bit-identical with the undisturbed one."""
    assert server.run(*command).status == 0
    assert differences(run_of(command), undisturbed) == []
    networks = read_status(run_of(command))["networks"]
    assert {name: n["state"] for name, n in networks.items()} == dict.fromkeys(
        ("CNN", "eLCN from 1", "eLCN from 3"), "complete"
    )
    assert not list(run_of(command).rglob("*.tmp"))


# Signals


@pytest.mark.parametrize("name", STATUS)
@pytest.mark.parametrize("call, at, step", [("step", 4, 4), ("step", 27, 3), ("evaluate", 3, 0)])  # 27: in an eLCN
def test_after_a_signal_the_printed_command_ends_bit_identical(server, command, undisturbed, name, call, at, step):
    study = server.run(*command, fault={"action": name, "at": at, "call": call})
    assert study.status == STATUS[name]
    message, _, printed = line_of(study).partition("continue with: python ")
    assert name in message and shlex.split(printed) == list(map(str, command))
    assert load(next(run_of(command).rglob("latest.pyT")))["step"] == step  # the current step was finished, and saved
    ends_complete(server, command, undisturbed)


def test_a_signal_at_any_write_is_honoured_and_loses_nothing(server, command, undisturbed):
    for at in range(5, 60, 9):
        study = server.run(*command, fault={"action": "SIGUSR1", "at": at})
        if study.status == 0:
            break
        assert study.status == 75 and line_of(study)
    ends_complete(server, command, undisturbed)


def test_signals_are_noted_before_torch_is_imported(data, tmp_path):
    script = Path(__file__).parents[1] / "experiments.py"
    processes = {}
    for name in STATUS:
        argv = [sys.executable, script, *SMALL[2:], "--dataset", data, "--results_dir", tmp_path / "results"]
        process = subprocess.Popen(map(str, argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        caught = 0
        while not caught >> (signal.SIGUSR1 - 1) & 1:  # the last of the three that is caught
            caught = int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1], 16)
        process.send_signal(signal.Signals[name])
        assert "libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text()
        processes[name] = process
    for name, process in processes.items():
        _, err = process.communicate(timeout=LIMIT)
        assert process.returncode == STATUS[name], err
        assert err.count("\n") == 1 and "continue with: python" in err, err
    assert not (tmp_path / "results").exists()


def test_a_signal_ends_a_download_that_hangs(server, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = {name: f"http://127.0.0.1:{silent.getsockname()[1]}" for name in ("https_proxy", "HTTPS_PROXY")}
        arguments = ("--device", "cpu", "--data_dir", tmp_path, "--results_dir", tmp_path / "results")
        study = server.start("experiments.py", *arguments, env=env)
        silent.settimeout(LIMIT)
        connection, _ = silent.accept()
        study.kill(signal.SIGTERM)
        assert study.wait().status == 143
        connection.close()
    assert "continue with" in line_of(study)


# Kill


@pytest.mark.parametrize("at, save_every", [(4, 0), (7, 0), (8, 30)])
def test_killed_again_and_again_at_a_step_the_run_ends_bit_identical(server, command, undisturbed, at, save_every):
    """Each process takes some steps, and saves after each of them or at the ends of epochs alone."""
    for _ in range(60):
        study = server.run(*command, fault={"action": "kill", "at": at, "call": "step"}, save_every=save_every)
        every_file_loads(run_of(command))
        if study.status == 0:
            break
        assert study.status == -signal.SIGKILL and study.err == ""
    ends_complete(server, command, undisturbed)


def test_a_killed_process_loses_what_it_has_not_saved_and_no_more(server, command):
    server.run(*command, fault={"action": "kill", "at": 10, "call": "step"}, save_every=0)
    state = load(run_of(command) / "latest.pyT")
    saved = (state["epoch"], state["step"])
    assert saved in ((1, 3), (1, 2))  # killed in step 4, before it was taken, and maybe within the write after step 3
    assert "CNN: continues in epoch 2" in server.run(*command).out


def test_killed_within_every_kind_of_write_the_run_ends_bit_identical(server, command, undisturbed):
    """The n-th process dies at its n-th call: opening, half of a write, flush to disk, renaming, deleting."""
    for at in range(1, 200):
        study = server.run(*command, fault={"action": "kill", "at": at}, save_every=0 if at % 2 else 30)
        if (run_of(command) / "config.json").exists():
            every_file_loads(run_of(command))
        if study.status == 0:
            break
        assert study.status == -signal.SIGKILL and study.err == ""
    assert at > 15
    ends_complete(server, command, undisturbed)


# Deleting on purpose


def test_fresh_says_what_it_deletes_and_starts_over(server, command, copy, undisturbed):
    (copy / "small_2.pyT").write_bytes(b"not what it was")
    study = server.run(*command[:-2], "--fresh", *command[-2:])
    assert study.status == 0 and differences(copy, undisturbed) == []
    assert re.search(r"--fresh: deleting \d+ files, 0.00 GB, in ", study.out)
    assert study.err == "" and "eLCN from 3 (network 3 of 3): epoch 3/3" in study.out


def test_fresh_is_dropped_from_the_printed_command(server, command):
    study = server.run(*command, "--fresh", fault={"action": "SIGUSR1", "at": 4, "call": "step"})
    assert study.status == 75 and "--fresh" not in line_of(study)


@pytest.mark.parametrize("again", [(), ("--fresh",)])
@pytest.mark.parametrize("at", [1, 5, 16])
def test_fresh_cut_short_can_be_repeated_or_left(server, command, copy, undisturbed, again, at):
    fault = {"action": "kill", "at": at, "call": "unlink"}
    assert server.run(*command, "--fresh", fault=fault).status == -signal.SIGKILL
    assert server.run(*command, *again).status == 0
    there = set(map(str, files(copy)))
    assert set(differences(copy, undisturbed)) == set(map(str, files(undisturbed))) - there  # what is there is good
    assert not again or len(there) == len(files(undisturbed))


# Disk


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize(
    "when",
    [
        {"file": "small_1.pyT", "call": "open", "at": 1},
        {"file": "lc_version_1", "call": "write", "at": 3},
        {"file": "status.json", "call": "write", "at": 8},
        {"call": "step", "at": 15},
    ],
)
def test_a_full_disk_is_one_line_and_the_same_command_continues(server, command, undisturbed, small_disk, when):
    command[-1] = small_disk / "results"
    filler = small_disk / "filler"
    study = server.run(*command, fault={"action": "fill", "filler": str(filler), **when}, save_every=0)
    assert study.status == 1 and "No space left on device" in line_of(study)
    every_file_loads(run_of(command))
    again = server.run(*command)
    assert again.status == 1 and line_of(again)
    every_file_loads(run_of(command))
    filler.unlink()
    ends_complete(server, command, undisturbed)


def test_a_full_disk_under_the_log_is_told_by_the_exit_status(server, command, undisturbed):
    study = server.run(*command, stdout="/dev/full")
    assert study.status == 1 and "No space left on device" in line_of(study)
    ends_complete(server, command, undisturbed)


# Memory


@pytest.mark.parametrize("at_step", [1, 9, 18 + 9])
def test_out_of_memory_names_the_flag_and_loses_nothing_saved(server, command, undisturbed, at_step):
    """The step that fails has changed the weights."""
    study = server.run(*command, fault={"action": "oom", "at": at_step, "call": "stepped"})
    assert study.status == 1 and "lower --batch_size" in line_of(study)
    ends_complete(server, command, undisturbed)


# Files that are gone or damaged. What is complete stays so, and what is good is never written anew.


def test_finished_networks_are_not_touched(server, command, copy):
    before = states(copy)
    study = server.run(*command)
    assert study.status == 0 and study.err == "" and states(copy) == before
    assert all(f"{name}: complete" in study.out for name in ("CNN", "eLCN from 1", "eLCN from 3"))


@pytest.mark.parametrize(
    "pattern",
    ["small_0.pyT", "small_1.pyT", "small_3.pyT", ELCN + "small_lc_version_1.pyT", ELCN + "*.pyT", "**/*.pyT"],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_complete_stays_complete_without_its_checkpoints(server, command, copy, pattern, threads):
    deleted = list(copy.glob(pattern))
    for path in deleted:
        path.unlink()
    before = states(copy)
    study = server.run(*command, threads=threads)
    assert study.status == 0 and states(copy) == before
    assert all(path.name in study.err for path in deleted)
    assert ("begun with threads 1, now 2" in study.err) == (threads == 2)


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
@pytest.mark.parametrize(
    "name, is_read",
    [
        ("small_0.pyT", False), ("small_1.pyT", False), ("small_3.pyT", True), ("evaluation-history.hist", True),
        ("config.json", True), ("status.json", True), (ELCN + "small_lc_version_0.pyT", False),
        (ELCN + "small_lc_version_3.pyT", True), (ELCN + "evaluation-history.hist", True),
    ],
)  # fmt: skip
def test_a_damaged_file_is_set_aside_once_it_is_read(server, command, copy, undisturbed, name, is_read, how):
    path, content = copy / name, (copy / name).read_bytes()
    middle = content.find(b"lc_lr" if name == "config.json" else b"train_loss")
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    damaged = {"truncated": content[: len(content) // 2], "flipped": flipped, "empty": b""}[how]
    path.write_bytes(damaged)
    before = states(copy)
    study = server.run(*command)
    assert study.status == 0
    after = states(copy)
    assert all(after[other] == before[other] for other in after if copy / other != path)
    if how == "flipped" and name == "status.json":
        return
    if not is_read:
        assert study.err == "" and path.read_bytes() == damaged
        return
    assert f"{path} is damaged" in study.err
    assert path.with_name(path.name + ".damaged").read_bytes() == damaged
    if path.suffix == ".pyT":  # the network is complete, so the file is not needed
        assert not path.exists() and f"not needed to go on: {path.name}" in study.err
    else:
        assert differences(copy, undisturbed) == []


@pytest.mark.parametrize("how", ["truncated", "deleted"])
@pytest.mark.parametrize("before", [{1}, {1, 0}, {3, 2}])
def test_a_checkpoint_that_untying_needs_is_made_anew_and_that_alone(server, command, undisturbed, before, how):
    """In a run whose CNN is complete; in the first and last case an earlier checkpoint is there."""
    assert server.run(*command, "--cnn_only").status == 0
    run = run_of(command)
    for epoch in before:
        path = run / f"small_{epoch}.pyT"
        path.write_bytes(path.read_bytes()[:-100]) if how == "truncated" else path.unlink()
    good = states(run)
    study = server.run(*command)
    assert study.status == 0
    needed = max(before)
    assert f"CNN: small_{needed}.pyT is not on disk; it is made anew" in study.out
    after = states(run)
    gone = {Path(f"small_{epoch}.pyT") for epoch in before}
    assert all(after[path] == good[path] for path in good if path not in gone)
    assert set(differences(run, undisturbed)) <= {str(path) for path in gone} - {f"small_{needed}.pyT"}


def test_making_anew_that_is_killed_is_taken_up_again(server, command, undisturbed):
    server.run(*command, "--cnn_only")
    (run_of(command) / "small_1.pyT").unlink()
    fault = {"action": "kill", "at": 1, "call": "replace", "file": "small_1.pyT"}
    assert server.run(*command, fault=fault).status == -signal.SIGKILL
    ends_complete(server, command, undisturbed)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
@pytest.mark.parametrize("name, at_step", [("latest.pyT", 9), ("small_1.pyT", 9), ("small_lc_version_1.pyT", 27)])
def test_an_unfinished_network_continues_from_the_newest_good_state(
    server, command, undisturbed, name, at_step, how
):
    server.run(*command, fault={"action": "SIGTERM", "at": at_step, "call": "step"})
    path = next(run_of(command).rglob(name))
    content, middle = path.read_bytes(), path.stat().st_size // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes(content[:-100] if how == "truncated" else flipped)
    study = server.run(*command)
    assert study.status == 0 and f"{name} is damaged" in study.err
    assert set(differences(run_of(command), undisturbed)) <= {str(path.relative_to(run_of(command)))}


def test_with_the_last_checkpoint_only_a_damaged_one_costs_nothing_if_latest_is_whole(server, command, undisturbed):
    command[1:1] = ["--keep", "last"]
    server.run(*command, fault={"action": "SIGTERM", "at": 18 + 9, "call": "step"})
    run = run_of(command)
    (run / ELCN / "small_lc_version_1.pyT").write_bytes(b"")
    study = server.run(*command)
    assert study.status == 0 and "eLCN from 1: continues in epoch 2" in study.out
    kept = {str(p) for p in files(undisturbed) if not re.search(r"lc_version_[012].pyT", p.name)}
    assert set(map(str, files(run))) == kept
    assert set(differences(run, undisturbed)) == set(map(str, files(undisturbed))) - kept


def test_a_deleted_config_is_made_anew_by_the_same_command(server, command, copy, undisturbed):
    before = read_config(copy)
    (copy / "config.json").unlink()
    study = server.run("convert.py", copy, "--device", "cpu")
    assert study.status == 2 and "config.json is missing; repeat the run's experiments.py command" in line_of(study)
    study = server.run(*command)
    assert study.status == 0 and "config.json was missing and is made anew" in line_of(study)
    assert read_config(copy) == before and differences(copy, undisturbed) == []


# Two at once


@pytest.mark.parametrize("file", ["small_2.pyT", "lc_version_2.pyT"])
def test_a_second_process_on_a_network_stops_with_one_line_and_a_dead_one_does_not_block(
    server, command, undisturbed, file
):
    first = server.start(*command, fault={"action": "stop", "at": 1, "file": file, "call": "fsync"})
    first.wait_until_stopped()
    leftover = next(run_of(command).rglob(".*.tmp"))
    for arguments in ((), ("--fresh",)):
        second = server.run(*command, *arguments)
        assert second.status == 1 and leftover.exists()
        assert f"in use by process {first.pid} on {socket.gethostname()}" in line_of(second)
    first.kill()
    first.wait()
    ends_complete(server, command, undisturbed)


def test_different_splits_of_one_run_train_side_by_side(server, command, undisturbed):
    assert server.run(*command, "--cnn_only").status == 0
    run, cpu = run_of(command), ("--device", "cpu")
    fault = {"action": "stop", "at": 1, "call": "write", "file": "lc_version_1.pyT"}
    first = server.start("convert.py", run, "--split", 1, *cpu, fault=fault)
    first.wait_until_stopped()
    leftover = next((run / ELCN).glob(".*.tmp"))
    assert server.run("convert.py", run, "--split", 3, *cpu).status == 0
    assert server.run("convert.py", run, "--split", 1, *cpu).status == 1
    assert leftover.exists()
    first.kill(signal.SIGCONT)
    assert first.wait().status == 0
    assert differences(run, undisturbed) == []


def test_many_processes_write_one_status_and_lose_no_entry(server, command, undisturbed):
    server.run(*command, "--cnn_only")
    run = run_of(command)
    studies = [server.start("convert.py", run, "--split", split, "--device", "cpu") for split in (1, 3)]
    assert [study.wait().status for study in studies] == [0, 0]
    assert len(read_status(run)["sessions"]) == 3
    ends_complete(server, command, undisturbed)


# Divergence


def test_a_diverged_cnn_keeps_its_history_and_skips_the_splits_past_it(server, command):
    command[1:1] = ["--cnn_lr", "1e20", "--splits", "0", "1", "3"]
    study = server.run(*command)
    run = run_of(command)
    assert study.status == 3 and "CNN: the loss is no longer finite in epoch 1" in line_of(study)
    assert "skipped, as the CNN diverged in epoch 1: eLCN from 1, eLCN from 3" in study.out
    assert load_history(run / "evaluation-history.hist", Member(read_config(run)[0]))["checkpoints"] == [0]
    networks = read_status(run)["networks"]
    assert networks["CNN"]["diverged_at"] == 1 and networks["eLCN from 0"]["state"] == "complete"
    before = states(run)
    again = server.run(*command)
    assert again.status == 3 and again.err == "" and states(run) == before
    assert server.run("convert.py", run, "--device", "cpu").status == 3


def test_a_diverged_elcn_does_not_stop_the_others(server, command):
    command[1:1] = ["--lc_lr", "1e20"]
    study = server.run(*command)
    run = run_of(command)
    assert study.status == 3 and study.err.count("the loss is no longer finite in epoch 1") == 2
    assert read_status(run)["networks"]["CNN"]["state"] == "complete"
    before = states(run)
    assert server.run(*command).status == 3 and states(run) == before


def test_damage_to_a_diverged_run_changes_none_of_its_results(server, command):
    command[1:1] = ["--lc_lr", "1e20", "--splits", "3"]
    server.run(*command)
    run = run_of(command)
    undamaged = run.with_name("undamaged")
    shutil.copytree(run, undamaged)
    damaged = "small_lc_version_3/small_lc_version_0.pyT"
    (run / damaged).write_bytes(b"")
    assert server.run(*command).status == 3 and set(differences(run, undamaged)) <= {damaged}
    (run / "status.json").write_text((run / "status.json").read_text().replace('"diverged_at": 1', '"diverged_at": 0'))
    assert server.run(*command).status == 3 and differences(run, undamaged) == []


# Other settings, other data


def test_other_data_under_the_same_name_are_refused(server, command, copy, tmp_path):
    before = states(copy)
    other = tmp_path / "other" / "tiny.npz"
    other.parent.mkdir()
    np.savez(other, **make_arrays(seed=1))
    command[command.index("--dataset") + 1] = other
    study = server.run(*command)
    assert study.status == 2 and "data_sha256" in line_of(study) and states(copy) == before
    config = json.loads((copy / "config.json").read_text())
    del config["crc32"]  # as someone who edits the file on purpose would
    (copy / "config.json").write_text(json.dumps({**config, "dataset_file": str(other)}))
    study = server.run("convert.py", copy, "--device", "cpu")
    assert study.status == 2 and "tiny here is not the data of" in line_of(study)


def test_other_settings_in_the_directory_are_refused_with_the_remedy(server, command, copy):
    config = json.loads((copy / "config.json").read_text())
    del config["crc32"]
    config["settings"]["seed"] = 7
    (copy / "config.json").write_text(json.dumps(config))
    study = server.run(*command)
    assert study.status == 2 and "seed 7 there, 0 here; give the same" in line_of(study) and "--fresh" in study.err
