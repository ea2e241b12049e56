"""The device is the GPU wherever there is one, and a run never falls back to the CPU unasked."""

import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch

from rnorm import devices
from rnorm.devices import describe, gpu_in_sight, pick_device, set_precision, several_gpus_note
from rnorm.files import RnormError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPU_FILES = devices.GPU_FILES


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Nothing shows a GPU, and none can be used."""

    def fail():
        raise AssertionError("all devices are busy\nCompile with ...")

    for variable in devices.GPU_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(devices, "GPU_FILES", ())
    monkeypatch.setattr(devices, "_compute_on_gpu", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")


@pytest.fixture(params=["nvidia0", "kfd"])
def device_file(monkeypatch, tmp_path, request):
    """The file of a GPU, where /dev is another directory."""
    path = tmp_path / request.param
    path.touch()
    monkeypatch.setattr(devices, "GPU_FILES", [pattern.replace("/dev", str(tmp_path)) for pattern in GPU_FILES])
    return path


def error_of(name):
    """The one line of the error."""
    with pytest.raises(RnormError) as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_auto_is_the_cpu_where_no_gpu_is_in_sight_and_there_is_no_other_device():
    assert pick_device("auto") == CPU
    with pytest.raises(ValueError, match="tpu"):
        pick_device("tpu")


def assert_used_or_missed(sight, monkeypatch):
    """The GPU that shows in `sight` is used; if it cannot be used, that is an error, and the CPU must be asked for."""
    for name in ("auto", "cuda"):
        assert f"a GPU is in sight ({sight}), but cannot be used: all devices are busy; torch" in error_of(name)
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(devices, "_compute_on_gpu", lambda: None)
    assert pick_device("auto") == pick_device("cuda") == CUDA


@pytest.mark.parametrize("variable", devices.GPU_VARIABLES)
@pytest.mark.parametrize("value", ["0", "3,1", "GPU-8932f937", "MIG-GPU-8932f937/1/0"])
def test_a_gpu_in_the_environment_is_used_or_missed(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert_used_or_missed(f"{variable}={value}", monkeypatch)


def test_so_is_one_with_a_device_file_but_other_files_of_the_driver_are_no_gpu(monkeypatch, device_file):
    assert_used_or_missed(device_file, monkeypatch)
    device_file.rename(device_file.with_name("nvidiactl"))
    assert pick_device("auto") == CPU


def test_so_is_one_that_only_torch_knows_of(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert_used_or_missed("torch", monkeypatch)


@pytest.mark.parametrize(("number", "in_sight"), [(errno.EPERM, False), (errno.EACCES, True), (errno.EIO, True)])
def test_a_gpu_that_is_kept_from_the_job_is_not_in_sight_but_a_broken_one_is(
    monkeypatch, device_file, number, in_sight
):
    def refuse(path, flags):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", refuse)
    assert bool(gpu_in_sight()) == in_sight


@pytest.mark.parametrize("value", ["", " ", "-1", "-1,0", "NoDevFiles"])
@pytest.mark.parametrize("variable", devices.HIDING)
def test_hidden_gpus_are_not_missed_and_cannot_be_asked_for(monkeypatch, device_file, variable, value):
    monkeypatch.setattr(torch.version, "cuda", "13.2" if variable.startswith("CUDA") else None)
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    monkeypatch.setenv(variable, value)
    assert pick_device("auto") == CPU
    assert f"{variable}={value!r} hides every GPU" in error_of("cuda")


def test_amds_variables_hide_nothing_from_a_torch_built_for_cuda(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "-1")
    assert "(HIP_VISIBLE_DEVICES=-1)" in error_of("auto")


@pytest.mark.parametrize(
    ("cuda", "hip", "built"), [("12.8", None, "CUDA 12.8"), (None, "6.4", "ROCm 6.4"), (None, None, "the CPU alone")]
)
def test_an_error_names_what_torch_and_the_driver_are_for(monkeypatch, device_file, cuda, hip, built):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    error = f": all devices are busy; torch {torch.__version__} is built for {built}"
    assert error_of("auto").endswith(error)
    driver = SimpleNamespace(cuDriverGetVersion=lambda pointer: setattr(pointer._obj, "value", 10020))
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: driver)
    assert error_of("auto").endswith(f"{error}; the driver is for CUDA 10.2")


@pytest.mark.parametrize(("precision", "tf32"), [("float32", False), ("tf32", True), ("float64", False)])
def test_only_tf32_rounds_to_tf32_and_cudnn_is_deterministic_always(precision, tf32):
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    with cudnn.flags(cudnn.enabled, benchmark=True, deterministic=False, allow_tf32=not tf32):  # puts back its four
        before, cuda.matmul.allow_tf32 = cuda.matmul.allow_tf32, not tf32
        with pytest.raises(ValueError, match="float16"):
            set_precision("float16")
        assert (cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == (not tf32, not tf32, True)
        set_precision(precision)
        assert (cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == (tf32, tf32, False)
        assert cudnn.deterministic
        cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("hip", "built"), [(None, {"cuda": "13.2"}), ("6.4.1", {"hip": "6.4.1"})])
def test_a_run_records_its_gpu_and_versions_and_notes_further_gpus(monkeypatch, hip, built):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    assert describe(CPU) == {"device": "cpu"}
    assert json.loads(json.dumps(describe(CUDA))) == {"device": "cuda", "gpu": "A100", **built, "cudnn": 91000}
    for count, noted in ((1, False), (4, True)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert several_gpus_note(CPU) == "" and bool(several_gpus_note(CUDA)) == noted
    assert "one of 4 visible GPUs is used, A100" in several_gpus_note(CUDA) and "\n" not in several_gpus_note(CUDA)
