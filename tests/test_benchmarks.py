"""The scripts that measure work, and a script that fails to measure says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import gpu, peers

ROOT = Path(__file__).parents[1]


def run(*arguments, **more):
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | more, capture_output=True, text=True)


def test_the_script_for_gpus_takes_all_its_parts_on_the_cpu_in_order():
    """With a small network; what it prints is markdown, and its claims hold."""
    result = run("--device", "cpu")
    assert (result.returncode, result.stderr) == (0, "")
    headings = [line for line in result.stdout.splitlines() if line.startswith("## ")]
    assert headings == [f"## {part}" for part in
                        ("What is there", "The tests", "One training step", "The default study", "Claims")]  # fmt: skip
    for text in ("cuDNN", " passed", "| floor: ", "| eLCN beside another | ", "minutes, extrapolated", " | holds |"):
        assert text in result.stdout
    assert "FAILS" not in result.stdout


def test_without_a_gpu_it_ends_with_one_line():
    result = run(CUDA_VISIBLE_DEVICES="")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "gpu.py: CUDA_VISIBLE_DEVICES='' hides every GPU\n"


def test_a_part_that_fails_is_shown_and_the_others_still_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    monkeypatch.setattr(gpu, "steps", lambda report, on_gpu: report.claim("a step is timed", True))
    monkeypatch.setattr(gpu, "studies", lambda report, *more: report.claim("two are one", False))
    monkeypatch.setattr(
        gpu, "tests", lambda report, on_gpu: report.outputs("no test fails", gpu.start, ("-c", "print('why'); exit(3)"))
    )
    assert gpu.main() == 1
    out = capsys.readouterr().out
    assert "**FAILS: no test fails**" in out and "    why" in out
    assert "| no test fails | FAILS |\n| a step is timed | holds |\n| two are one | FAILS |" in out


@pytest.mark.parametrize(
    ("step", "library", "variable", "value"),
    [
        (peers.jax_step, "jax", "XLA_PYTHON_CLIENT_PREALLOCATE", "false"),
        (peers.keras_step, "tensorflow", "TF_FORCE_GPU_ALLOW_GROWTH", "true"),
    ],
)
def test_jax_and_tensorflow_are_told_to_leave_memory_of_the_gpu(monkeypatch, tmp_path, step, library, variable, value):
    """Before they are imported, when they read it; here by a library that cannot be imported."""
    (tmp_path / f"{library}.py").write_text(f"import os\nraise ImportError(os.environ.get({variable!r}))")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.setenv(variable, value)  # put back afterwards
    monkeypatch.delenv(variable)
    with pytest.raises(peers.Unavailable) as caught:
        step(nn.Sequential(), torch.zeros(1), torch.zeros(1))
    assert str(caught.value.__context__) == value
