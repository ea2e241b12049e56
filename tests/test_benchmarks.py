"""The scripts that measure work, and a script that fails to measure says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, step

ROOT = Path(__file__).parents[1]


def run(*arguments, **more):
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | more, capture_output=True, text=True, timeout=600)


def test_the_script_for_gpus_takes_all_its_parts_on_the_cpu_in_order(tmp_path):
    """With a small network; what it prints is markdown, and its claims hold."""
    result = run("--device", "cpu", "--work", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    headings = [line for line in result.stdout.splitlines() if line.startswith("## ")]
    assert headings == [f"## {part}" for part in
                        ("What is there", "The tests", "One training step", "The default study", "Claims")]  # fmt: skip
    for text in ("cuDNN", " passed", "| floor: ", "| eLCN beside another | ", "minutes, extrapolated", " | holds |"):
        assert text in result.stdout
    assert "FAILS" not in result.stdout
    assert os.listdir(tmp_path) == []


def test_where_a_gpu_takes_one_process_no_two_are_started_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "ask_driver", {"compute_mode": "Exclusive_Process"}.get)
    report = gpu.Report()
    gpu.studies(report, False, tmp_path, gpu.noise(tmp_path / "noise.npz", 500), tmp_path)
    out = capsys.readouterr().out
    assert "allows one process at a time" in out and "| eLCN | " in out and "beside another" not in out
    assert set(report.claims.values()) == {True} and "two eLCNs are trained at once" not in report.claims


def test_without_a_gpu_it_ends_with_one_line():
    result = run(CUDA_VISIBLE_DEVICES="")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith(("gpu.py: no GPU can be used: ", "gpu.py: there is a GPU "))


def test_a_command_that_hangs_is_killed_and_its_claim_fails(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "LIMIT", 1.0)
    report = gpu.Report()
    with pytest.raises(gpu.Failed):
        report.outputs("it ends", gpu.start, ("-c", "import time; print('begun', flush=True); time.sleep(100)"))
    out = capsys.readouterr().out
    assert "**FAILS: it ends**" in out and "    begun" in out and "killed after 1 s" in out
    assert report.claims == {"it ends": False}


def test_a_step_that_runs_out_of_memory_is_a_row_of_the_table_that_says_so(monkeypatch, capsys):
    def fails(when):
        """A step that runs out of memory at its call number `when`; 0: when it is built."""
        calls = iter(range(100))

        def take():
            if next(calls) == when:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return lambda: 1.0

        return lambda net, x, y: take() and take

    monkeypatch.setattr(step, "check", lambda name, device: None)
    monkeypatch.setattr(step, "seconds", lambda take: take()() * 1e-3)
    monkeypatch.setattr(step, "ceilings", lambda device: (1e12, 1e12))
    monkeypatch.setattr(step, "STEPS", {f"CNN: fails {when}": ("CNN", fails(when)) for when in (0, 3, 99)})
    monkeypatch.setattr(sys, "argv", ["step.py", "--rounds", "2"])
    step.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| CNN")]
    assert rows[:2] == [f"| CNN: fails {when} | out of memory | | | |" for when in (0, 3)]
    assert rows[2].startswith("| CNN: fails 99 | ") and "memory" not in rows[2]
