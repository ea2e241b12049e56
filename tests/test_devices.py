"""A run computes on a GPU wherever one can be used, and says why where it does not."""

import json

import pytest
import torch

from rnorm import devices
from rnorm.cli import ENVIRONMENT, Stop
from rnorm.devices import describe, pick_device, set_precision, several_gpus_note
from rnorm.files import RnormError
from rnorm.flags import open_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine without GPU and Slurm; the directory in the place of /dev."""
    for variable in (*devices.SLURM_GPUS, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(devices, "GPU_FILES", devices.GPU_FILES.replace("/dev", str(tmp_path)))
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "all devices are busy")
    return tmp_path


def test_a_gpu_that_computes_is_used_unless_the_cpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "")
    assert (pick_device("auto"), pick_device("cuda"), pick_device("cpu")) == (CUDA, CUDA, CPU)
    with pytest.raises(ValueError, match="tpu"):
        pick_device("tpu")


def test_without_a_gpu_auto_is_the_cpu_and_a_line_gives_torchs_reason(machine, capsys):
    (machine / "nvidiactl").touch()  # a file of the driver, of no GPU
    assert open_device("auto") == CPU
    assert capsys.readouterr().out.startswith("device: cpu; no GPU can be used: ")
    assert open_device("cpu") == CPU and capsys.readouterr().out == "device: cpu\n"
    with pytest.raises(RnormError, match="^no GPU can be used: all devices are busy$"):
        pick_device("cuda")


def test_torchs_reason_is_one_line_with_its_version_and_what_hides_gpus(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("Torch not compiled with CUDA enabled\nCompile with ...")

    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(torch, "ones", fail)
    facts = f"torch {torch.__version__}, CUDA_VISIBLE_DEVICES='-1'"
    assert devices.why_no_cuda() == f"Torch not compiled with CUDA enabled ({facts})"


@pytest.mark.parametrize("sign", ["nvidia0", *devices.SLURM_GPUS])
def test_a_gpu_that_is_there_but_cannot_be_used_ends_the_command_unless_it_is_hidden(machine, monkeypatch, sign):
    if sign == "nvidia0":
        (machine / sign).touch()
    else:
        monkeypatch.setenv(sign, "1")
    with pytest.raises(Stop, match=f"there is a GPU .*{sign}.* busy; or use --device cpu$") as stop:
        open_device("auto")
    assert stop.value.status == ENVIRONMENT
    assert open_device("cpu") == CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert pick_device("auto") == CPU


@pytest.mark.parametrize(("precision", "tf32"), [("float32", False), ("tf32", True), ("float64", False)])
def test_only_tf32_rounds_to_tf32_whatever_was_set_before_and_cudnn_is_deterministic(precision, tf32):
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    cuda.matmul.allow_tf32 = cudnn.allow_tf32 = not tf32
    cudnn.benchmark, cudnn.deterministic, parts = True, False, []
    if hasattr(torch.backends, "fp32_precision"):  # since torch 2.9
        parts = [cudnn.conv, cudnn.rnn, cuda.matmul]
        for part in (torch.backends, *parts):
            part.fp32_precision = "ieee" if tf32 else "tf32"
    with pytest.raises(ValueError, match="float16"):
        set_precision("float16")
    assert cudnn.benchmark and not cudnn.deterministic
    set_precision(precision)
    assert [part.fp32_precision for part in parts] == ["tf32" if tf32 else "ieee" for _ in parts]
    assert (cuda.matmul.allow_tf32, cudnn.allow_tf32) == (tf32, tf32)
    assert cudnn.deterministic and not cudnn.benchmark
    set_precision("float32")


@pytest.mark.parametrize(("hip", "built"), [(None, {"cuda": "13.2"}), ("6.4.1", {"hip": "6.4.1"})])
def test_a_run_records_its_gpu_and_versions_and_notes_further_gpus(monkeypatch, hip, built):
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    assert describe(CPU) == {"device": "cpu"}
    assert json.loads(json.dumps(describe(CUDA))) == {"device": "cuda", "gpu": "A100", **built, "cudnn": 91000}
    for count, noted in ((1, False), (4, True)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert several_gpus_note(CPU) == "" and bool(several_gpus_note(CUDA)) == noted
    assert "one of 4 visible GPUs is used, A100" in several_gpus_note(CUDA) and "\n" not in several_gpus_note(CUDA)
