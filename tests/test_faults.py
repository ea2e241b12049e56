"""A run is never lost: each test provokes a fault for real and looks at what is left, and at the end of the same
command. The studies are processes of their own, with the small CNN of small_study.py (see forked.py)."""

import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from compare_runs import differences, equal, files
from conftest import make_arrays
from forked import LIMIT, Server
from small_study import small_cnn

from checkpoints import Damaged, load, load_history, load_weights
from convert import untie
from cli import Interrupt, Stop, finish
from runs import Settings, read_status
from train import SAVE_EVERY

SMALL = ("--epochs", 3, "--n_splits", 2, "--batch_size", 10)  # 6 steps an epoch; CNN, eLCN from 1, eLCN from 3
STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 75}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **make_arrays())
    return path


@pytest.fixture(scope="module")
def undisturbed(server, data, tmp_path_factory):
    """The run that nothing happened to."""
    results = tmp_path_factory.mktemp("undisturbed")
    assert server.run("experiments.py", *SMALL, "--dataset", data, "--results_dir", results).status == 0
    return next(results.iterdir())


@pytest.fixture
def command(data, tmp_path):
    """A command line, and `run_of` tells where its run lies."""
    return ["experiments.py", *SMALL, "--dataset", data, "--results_dir", tmp_path / "results"]


def run_of(command: list) -> Path:
    return next(Path(command[-1]).iterdir())


@pytest.fixture
def copy(undisturbed, command):
    """The complete run's directory, as `command` left it."""
    run = Path(command[-1]) / undisturbed.name
    shutil.copytree(undisturbed, run)
    return run


def interrupted(server: Server, command: list, at_step: int) -> Path:
    """The run of `command`, stopped at a step."""
    server.run(*command, fault={"action": "SIGTERM", "at": at_step, "call": "step"})
    return run_of(command)


def line_of(study) -> str:
    """The one line that a study printed on stderr."""
    assert study.err.count("\n") == 1, study.err
    return study.err


def every_file_loads(run: Path) -> None:
    for path in run.rglob("*.pyT"):
        if not path.name.startswith("."):
            assert load(path)["history"]["checkpoints"]
    for path in run.rglob("*.hist"):
        load_history(path)
    for path in run.glob("*.json"):
        json.loads(path.read_text())


def times_of(run: Path) -> dict:
    return {path: (run / path).stat().st_mtime_ns for path in files(run)}


# Resume and signals


@pytest.mark.parametrize("name", STATUS)
@pytest.mark.parametrize("at_step", [4, 27])  # in the CNN, in an eLCN
def test_after_a_signal_the_printed_command_ends_bit_identical(server, command, undisturbed, name, at_step):
    study = server.run(*command, fault={"action": name, "at": at_step, "call": "step"})
    assert study.status == STATUS[name]
    message, _, printed = line_of(study).partition("continue with: python ")
    assert name in message and shlex.split(printed) == list(map(str, command))
    state = load(next(run_of(command).rglob("latest.pyT")))
    assert state["step"] == at_step % 6  # the current step was finished, and saved
    assert server.run(*shlex.split(printed)).status == 0
    assert differences(run_of(command), undisturbed) == []


def test_a_signal_at_any_write_is_honoured_and_loses_nothing(server, command, undisturbed):
    for at in range(5, 60, 9):
        study = server.run(*command, fault={"action": "SIGUSR1", "at": at})
        if study.status == 0:
            break
        assert study.status == 75 and line_of(study)
    assert server.run(*command).status == 0
    assert differences(run_of(command), undisturbed) == []


def test_signals_are_noted_before_torch_is_imported(data, tmp_path):
    script = Path(__file__).parents[1] / "experiments.py"
    processes = {}
    for name in STATUS:
        argv = [sys.executable, script, *map(str, SMALL), "--dataset", data, "--results_dir", tmp_path / "results"]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
        study = server.start("experiments.py", "--data_dir", tmp_path, "--results_dir", tmp_path / "results", env=env)
        silent.settimeout(LIMIT)
        connection, _ = silent.accept()
        study.kill(signal.SIGTERM)
        assert study.wait().status == 143
        connection.close()
    assert "continue with" in line_of(study)


def test_finished_networks_are_not_touched(server, command, copy, undisturbed):
    before = times_of(copy)
    study = server.run(*command)
    assert study.status == 0 and times_of(copy) == before
    assert all(f"{name}: complete" in study.out for name in ("CNN", "eLCN from 1", "eLCN from 3"))


def test_at_most_a_minute_of_work_is_lost(server, command):
    assert SAVE_EVERY < 60
    server.run(*command, fault={"action": "kill", "at": 10, "call": "step"}, save_every=0)
    state = load(run_of(command) / "latest.pyT")
    assert (state["epoch"], state["step"]) == (1, 3)  # killed in step 4, before it was taken
    assert "CNN: continues in epoch 2" in server.run(*command).out


def test_fresh_says_what_it_deletes_and_starts_over(server, command, copy, undisturbed):
    (copy / "skinnyprime_2.pyT").write_bytes(b"not what it was")
    study = server.run(*command[:-2], "--fresh", *command[-2:])
    assert study.status == 0 and differences(copy, undisturbed) == []
    assert re.search(r"--fresh: deleting \d+ files, 0.00 GB, in ", study.out)
    assert study.err == "" and "eLCN from 3: epoch 3/3" in study.out


def test_fresh_is_dropped_from_the_printed_command_and_cannot_be_abbreviated(server, command):
    study = server.run(*command, "--fresh", fault={"action": "SIGUSR1", "at": 4, "call": "step"})
    assert study.status == 75 and "--fresh" not in line_of(study)
    assert server.run(*command, "--fres").status == 2


@pytest.mark.parametrize("again", [(), ("--fresh",)])
@pytest.mark.parametrize("at", [1, 5, 16])
def test_fresh_cut_short_can_be_repeated_or_left(server, command, copy, undisturbed, again, at):
    fault = {"action": "kill", "at": at, "call": "unlink"}
    assert server.run(*command, "--fresh", fault=fault).status == -signal.SIGKILL
    assert server.run(*command, *again).status == 0
    assert differences(copy, undisturbed) == []


# Kill


def test_killed_at_30_random_moments_the_run_ends_bit_identical(server, command, undisturbed):
    moments = random.Random(0)
    started = time.monotonic()
    server.run(*command[:-1], Path(command[-1]) / "timed")
    duration = time.monotonic() - started
    command[-1] = Path(command[-1]) / "killed"
    kills = 0
    while kills < 30:
        study = server.start(*command, save_every=0.01)
        time.sleep(moments.uniform(0, duration))
        study.kill()
        killed = study.wait().status == -signal.SIGKILL
        kills += killed
        every_file_loads(Path(command[-1]))
        if not killed:
            assert differences(run_of(command), undisturbed) == []
            shutil.rmtree(command[-1])
    assert server.run(*command).status == 0
    assert differences(run_of(command), undisturbed) == []


def test_killed_within_every_kind_of_write_the_run_ends_bit_identical(server, command, undisturbed):
    """The n-th process dies at its n-th call: opening, half of a write, flush to disk, renaming, deleting."""
    for at in range(1, 200):
        study = server.run(*command, fault={"action": "kill", "at": at}, save_every=0 if at % 2 else 30)
        every_file_loads(Path(command[-1]))
        if study.status == 0:
            break
        assert study.status == -signal.SIGKILL and study.err == ""
    assert at > 15
    assert differences(run_of(command), undisturbed) == []


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
        {"file": "skinnyprime_1.pyT", "call": "open", "at": 1},
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
    assert server.run(*command).status == 0
    assert differences(run_of(command), undisturbed) == []


def test_a_full_disk_under_the_log_is_told_by_the_exit_status(server, command, undisturbed):
    study = server.run(*command, stdout="/dev/full")
    assert study.status == 1 and "No space left on device" in line_of(study)
    assert server.run(*command).status == 0
    assert differences(run_of(command), undisturbed) == []


# Damage


def flip(content: bytes, at: int, bit: int = 0) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


ELCN = "skinnyprime_lc_version_1/"


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
@pytest.mark.parametrize(
    "name",
    [
        "skinnyprime_0.pyT", "skinnyprime_1.pyT", "skinnyprime_3.pyT", "evaluation-history.hist", "config.json",
        "status.json", ELCN + "skinnyprime_lc_version_0.pyT", ELCN + "skinnyprime_lc_version_3.pyT",
        ELCN + "evaluation-history.hist",
    ],
)  # fmt: skip
def test_a_damaged_file_is_set_aside_and_the_run_ends_bit_identical(server, command, copy, undisturbed, name, how):
    path, content = copy / name, (copy / name).read_bytes()
    middle = content.find(b"lc_lr" if name == "config.json" else b"train_loss")
    damaged = {"truncated": content[: len(content) // 2], "flipped": flip(content, middle), "empty": b""}[how]
    path.write_bytes(damaged)
    study = server.run(*command)
    assert study.status == 0 and differences(copy, undisturbed) == []
    if how != "flipped" or name != "status.json":
        assert f"{path} is damaged" in line_of(study)
        assert path.with_name(path.name + ".damaged").read_bytes() == damaged


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_latest_is_set_aside_and_the_run_ends_bit_identical(server, command, undisturbed, how):
    run = interrupted(server, command, at_step=9)
    path, content = run / "latest.pyT", (run / "latest.pyT").read_bytes()
    path.write_bytes(content[:-100] if how == "truncated" else flip(content, len(content) // 2))
    study = server.run(*command)
    assert study.status == 0 and "latest.pyT is damaged" in line_of(study)
    assert differences(run, undisturbed) == []


@pytest.mark.parametrize("name", ["skinnyprime_1.pyT", ELCN + "skinnyprime_lc_version_0.pyT"])
def test_a_repair_that_is_killed_is_taken_up_again(server, command, copy, undisturbed, name):
    """Between setting a file aside and writing it anew it is missing, and later ones are there."""
    (copy / name).write_bytes(b"")
    fault = {"action": "kill", "at": 1, "call": "open", "file": ".pyT"}
    assert server.run(*command, fault=fault).status == -signal.SIGKILL
    assert not (copy / name).exists()
    assert server.run(*command).status == 0 and differences(copy, undisturbed) == []


def test_with_the_last_checkpoint_only_a_damaged_one_costs_nothing_if_latest_is_whole(server, command, undisturbed):
    command[1:1] = ["--keep", "last"]
    run = interrupted(server, command, at_step=18 + 9)
    (run / ELCN / "skinnyprime_lc_version_1.pyT").write_bytes(b"")
    study = server.run(*command)
    assert study.status == 0 and "eLCN from 1: continues in epoch 2" in study.out
    kept = {str(p) for p in files(undisturbed) if not re.search(r"lc_version_[012].pyT", p.name)}
    assert set(map(str, files(run))) == kept
    assert set(differences(run, undisturbed)) == set(map(str, files(undisturbed))) - kept


def test_any_flipped_byte_of_a_checkpoint_or_history_is_recognised_or_harmless(undisturbed, tmp_path):
    bits = random.Random(0)
    path = tmp_path / "flipped"
    for source in (undisturbed / "skinnyprime_3.pyT", undisturbed / "evaluation-history.hist"):
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


def test_any_flipped_byte_of_config_or_status_is_recognised_or_harmless(undisturbed, tmp_path):
    right, (settings, _) = read_status(undisturbed), Settings.of_run(undisturbed)
    for name in ("config.json", "status.json"):
        content = (undisturbed / name).read_bytes()
        for at in range(len(content)):
            (tmp_path / name).write_bytes(flip(content, at, at % 8))
            if name == "config.json":
                try:
                    assert Settings.of_run(tmp_path)[0] == settings
                except Stop as stop:
                    assert "config.json is damaged" in str(stop)
            status = read_status(tmp_path)
            assert status.keys() >= right.keys() and all(isinstance(n, dict) for n in status["networks"].values())


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_file_that_would_run_code_is_refused(server, command, copy, undisturbed, tmp_path, kind):
    marker, path = tmp_path / "ran", copy / "skinnyprime_2.pyT"
    content = {**load(path), "weights": Hostile(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(Damaged):
        load(path)
    study = server.run(*command)
    assert study.status == 0 and f"{path} is damaged" in line_of(study)
    assert not marker.exists() and differences(copy, undisturbed) == []


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_the_released_code_load(undisturbed, tmp_path, zipped):
    """Weights and optimizer alone, contiguous, as a zip or in the format before torch 1.6."""
    path = tmp_path / "released.pyT"
    for source, net in (
        (undisturbed / "skinnyprime_3.pyT", small_cnn(3)),
        (undisturbed / ELCN / "skinnyprime_lc_version_3.pyT", untie(small_cnn(3).net, (3, 32, 32))),
    ):
        weights = {key: value.contiguous() for key, value in load(source)["weights"].items()}
        optimizer = torch.optim.SGD(net.parameters(), 0.05).state_dict()
        torch.save({"weights": weights, "optimizer": optimizer}, path, _use_new_zipfile_serialization=zipped)
        load_weights(net, load(path))
        assert equal({key: value.contiguous() for key, value in net.state_dict().items()}, weights)


def test_weights_of_another_network_change_nothing(undisturbed):
    net = small_cnn(4)  # one class more
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(Damaged, match="do not fit"):
        load_weights(net, load(undisturbed / "skinnyprime_3.pyT"))
    assert equal(dict(net.state_dict()), before)


# Two at once


@pytest.mark.parametrize("file", ["skinnyprime_2.pyT", "lc_version_2.pyT"])
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
    assert server.run(*command).status == 0
    assert not leftover.exists() and differences(run_of(command), undisturbed) == []


def test_different_splits_of_one_run_train_side_by_side(server, command, undisturbed):
    assert server.run(*command, "--cnn_only").status == 0
    run = run_of(command)
    first = server.start("convert.py", run, "--split", 1, fault={"action": "stop", "at": 2, "call": "write"})
    first.wait_until_stopped()
    leftover = next((run / ELCN).glob(".*.tmp"))
    assert server.run("convert.py", run, "--split", 3).status == 0
    assert server.run("convert.py", run, "--split", 1).status == 1
    assert leftover.exists()
    first.kill(signal.SIGCONT)
    assert first.wait().status == 0
    assert differences(run, undisturbed) == []


def test_many_processes_write_one_status_and_lose_no_entry(server, command, undisturbed):
    server.run(*command, "--cnn_only")
    run = run_of(command)
    studies = [server.start("convert.py", run, "--split", split) for split in (1, 3)]
    assert [study.wait().status for study in studies] == [0, 0]
    status = read_status(run)
    assert {name: network["state"] for name, network in status["networks"].items()} == dict.fromkeys(
        ("CNN", "eLCN from 1", "eLCN from 3"), "complete"
    )
    assert len(status["sessions"]) == 3 and differences(run, undisturbed) == []


# Divergence


def test_a_diverged_cnn_keeps_its_history_and_skips_the_splits_past_it(server, command):
    command[1:1] = ["--cnn_lr", "1e20", "--splits", "0", "1", "3"]
    study = server.run(*command)
    run = run_of(command)
    assert study.status == 3 and "CNN: the loss is no longer finite in epoch 1" in line_of(study)
    assert "skipped, as the CNN diverged in epoch 1: splits 1 3" in study.out
    assert load_history(run / "evaluation-history.hist")["checkpoints"] == [0]
    networks = read_status(run)["networks"]
    assert networks["CNN"]["diverged_at"] == 1 and networks["eLCN from 0"]["state"] == "complete"
    before = times_of(run)
    again = server.run(*command)
    assert again.status == 3 and again.err == "" and times_of(run) == before
    assert server.run("convert.py", run).status == 3


def test_a_diverged_elcn_does_not_stop_the_others(server, command):
    command[1:1] = ["--lc_lr", "1e20"]
    study = server.run(*command)
    run = run_of(command)
    assert study.status == 3 and study.err.count("the loss is no longer finite in epoch 1") == 2
    assert read_status(run)["networks"]["CNN"]["state"] == "complete"
    before = times_of(run)
    assert server.run(*command).status == 3 and times_of(run) == before


def test_damage_to_a_diverged_run_is_repaired(server, command):
    command[1:1] = ["--lc_lr", "1e20", "--splits", "3"]
    server.run(*command)
    run = run_of(command)
    undamaged = run.with_name("undamaged")
    shutil.copytree(run, undamaged)
    (run / "skinnyprime_lc_version_3" / "skinnyprime_lc_version_0.pyT").write_bytes(b"")
    assert server.run(*command).status == 3 and differences(run, undamaged) == []
    (run / "status.json").write_text((run / "status.json").read_text().replace('"diverged_at": 1', '"diverged_at": 0'))
    assert server.run(*command).status == 3 and differences(run, undamaged) == []


# Different settings


def test_other_data_under_the_same_name_are_refused(server, command, copy, tmp_path):
    before = times_of(copy)
    other = tmp_path / "other" / "tiny.npz"
    other.parent.mkdir()
    np.savez(other, **make_arrays(seed=1))
    command[command.index("--dataset") + 1] = other
    study = server.run(*command)
    assert study.status == 2 and "data_sha256" in line_of(study) and times_of(copy) == before
    shutil.copy(other, tmp_path / "tiny.npz")
    config = json.loads((copy / "config.json").read_text())
    del config["crc32"]
    (copy / "config.json").write_text(json.dumps({**config, "dataset_file": str(other)}))
    study = server.run("convert.py", copy)
    assert study.status == 2 and "data_sha256" in line_of(study)


def test_other_settings_in_the_directory_are_refused_with_the_differences(server, command, copy):
    config = json.loads((copy / "config.json").read_text())
    del config["crc32"]  # as someone who edits the file on purpose would
    config["settings"] |= {"seed": 7, "lc_lr": 0.5}
    (copy / "config.json").write_text(json.dumps(config))
    study = server.run(*command)
    assert study.status == 2 and "lc_lr 0.5 there, 0.01 here; seed 7 there, 0 here" in line_of(study)


def test_other_versions_are_a_warning(server, command, copy):
    config = json.loads((copy / "config.json").read_text())
    del config["crc32"]
    config["versions"]["torch"] = "1.0"
    (copy / "config.json").write_text(json.dumps(config))
    study = server.run(*command)
    assert study.status == 0 and "was begun with versions" in line_of(study) and "'torch': '1.0'" in study.err


# Memory


@pytest.mark.parametrize("at_step", [1, 9, 18 + 9])
def test_out_of_gpu_memory_names_the_flag_and_saves(server, command, undisturbed, at_step):
    study = server.run(*command, fault={"action": "oom", "at": at_step, "call": "step"})
    assert study.status == 1 and "lower --batch_size" in line_of(study)
    assert any(run_of(command).rglob("latest.pyT")) == (at_step > 1)  # before the first step all is on disk
    assert server.run(*command).status == 0
    assert differences(run_of(command), undisturbed) == []


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: ...")]
)
def test_out_of_memory_anywhere_is_one_line(capsys, error):
    def main(argv, interrupt):
        raise error

    with pytest.raises(SystemExit) as exit:
        finish(main, ["experiments.py"], Interrupt())
    assert exit.value.code == 1
    assert capsys.readouterr().err == "experiments.py: out of memory; lower --batch_size or --data_size\n"
