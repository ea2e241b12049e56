"""The device is the GPU wherever there is one, and a run never falls back to the CPU unasked."""

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rnorm import devices
from rnorm.cli import is_out_of_memory
from rnorm.devices import DeviceError, describe, pick_device, set_precision, several_gpus_note

ROOT = Path(__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPU_FILES = devices.GPU_FILES
COMPILER = shutil.which("cc")
HIDING = ["", " ", "-1", "-1,0", "NoDevFiles"]


def fail(text, kind=RuntimeError):
    def computation():
        raise kind(text)

    return computation


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Nothing shows a GPU, and none can be used."""
    for variable in devices.GPU_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(devices, "GPU_FILES", ())
    monkeypatch.setattr(devices, "_compute_on_gpu", fail("no such GPU"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def working_gpu(monkeypatch):
    """A GPU computes, though nothing shows it yet."""
    monkeypatch.setattr(devices, "_compute_on_gpu", lambda: None)


@pytest.fixture
def device_file(monkeypatch, tmp_path):
    """The file of a GPU, where /dev is another directory."""
    path = tmp_path / "nvidia0"
    path.touch()
    monkeypatch.setattr(devices, "GPU_FILES", [pattern.replace("/dev", str(tmp_path)) for pattern in GPU_FILES])
    return path


def error_of(name):
    """The one line of the DeviceError, beside which nothing is printed."""
    with pytest.raises(DeviceError) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        pick_device(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_auto_is_the_cpu_where_no_gpu_is_in_sight():
    assert pick_device("auto") == CPU


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("variable", ["CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS"])
@pytest.mark.parametrize("value", ["0", "3,1", "GPU-8932f937", "MIG-GPU-8932f937/1/0"])
def test_a_gpu_in_the_environment_is_used_or_missed(monkeypatch, name, variable, value):
    monkeypatch.setenv(variable, value)
    assert f"{variable}={value}" in error_of(name)
    monkeypatch.setattr(devices, "_compute_on_gpu", lambda: None)
    assert pick_device(name).type == "cuda"


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_so_is_one_with_a_device_file(monkeypatch, name, device_file):
    assert str(device_file) in error_of(name)
    monkeypatch.setattr(devices, "_compute_on_gpu", lambda: None)
    assert pick_device(name).type == "cuda"


def test_other_files_of_the_driver_are_no_gpu(device_file):
    device_file.rename(device_file.with_name("nvidiactl"))
    assert pick_device("auto") == CPU


@pytest.mark.parametrize(("number", "in_sight"), [(errno.EPERM, False), (errno.EACCES, True), (errno.EIO, True)])
def test_a_gpu_that_is_kept_from_the_job_is_not_in_sight_but_a_broken_one_is(
    monkeypatch, device_file, number, in_sight
):
    def refuse(path, flags):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", refuse)
    assert bool(devices.gpu_in_sight()) == in_sight


def test_a_gpu_that_only_torch_knows_of_is_used(monkeypatch, working_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"


@pytest.mark.parametrize("value", HIDING)
def test_hidden_gpus_are_not_missed(monkeypatch, device_file, value):
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert pick_device("auto") == CPU


@pytest.mark.parametrize("value", HIDING)
def test_hidden_gpus_cannot_be_asked_for(monkeypatch, working_gpu, value):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU" in error_of("cuda")


def test_the_cpu_is_there_beside_a_broken_gpu(device_file):
    assert pick_device("cpu") == CPU


def test_there_is_no_other_device():
    with pytest.raises(ValueError, match="tpu"):
        pick_device("tpu")


def test_a_gpu_too_old_for_torch_is_named_with_what_torch_has_code_for(monkeypatch, device_file):
    def computation():
        warnings.warn(
            "\n    Found GPU0 Tesla K80 which is of\n    capability 3.7. (Triggered internally at x.cpp:9)",
            stacklevel=1,
        )
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    properties = SimpleNamespace(name="Tesla K80", major=3, minor=7)
    monkeypatch.setattr(devices, "_compute_on_gpu", computation)
    monkeypatch.setattr(devices, "_driver_cuda", lambda: "13.2")
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    line = error_of("auto")
    assert "no kernel image is available for execution on the device; Found GPU0 Tesla K80 which is of capab" in line
    assert "Tesla K80, sm_37" in line and "CUDA 13.2 and sm_75 sm_80" in line
    assert "Compile" not in line and "x.cpp" not in line
    assert line.endswith("install a torch built for the architecture of this GPU")


@pytest.mark.parametrize(
    ("built", "driver", "remedy"),
    [
        ("13.2", "12.4", "install a torch built for CUDA 12.4 or older, or a newer driver"),
        ("9.2", "10.1", "see whether nvidia-smi shows the GPU"),
        ("12.8", "12.4", "see whether nvidia-smi shows the GPU"),  # within 12, any driver serves any torch
        ("12.8", "", "see whether nvidia-smi shows the GPU"),
        (None, "12.4", "install a torch built for CUDA, no newer than the driver's"),
    ],
)
def test_the_remedy_is_another_torch_where_the_versions_say_so(monkeypatch, device_file, built, driver, remedy):
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(devices, "_driver_cuda", lambda: driver)
    monkeypatch.setattr(devices, "_compute_on_gpu", fail("all devices are busy", AssertionError))
    line = error_of("auto")
    assert "all devices are busy" in line and remedy in line
    assert (f"the driver is for CUDA {driver}" in line) == bool(driver)
    assert (f"is built for CUDA {built} and" if built else "is a CPU build of torch") in line


def test_a_warning_about_a_gpu_that_works_is_passed_on(monkeypatch, device_file):
    monkeypatch.setattr(devices, "_compute_on_gpu", lambda: warnings.warn("runs hot", stacklevel=1))
    with pytest.warns(UserWarning, match="runs hot"):
        assert pick_device("auto").type == "cuda"


STUB = "int cuInit(unsigned flags) { return 0; } int cuDriverGetVersion(int *v) { *v = 10020; return 0; }"
SCRIPT = """
import os
from rnorm.devices import DeviceError, pick_device
os.environ["CUDA_VISIBLE_DEVICES"] = ""
print(pick_device("auto"))
os.environ["CUDA_VISIBLE_DEVICES"] = "0"
for name in ("auto", "cuda"):
    try:
        print(pick_device(name))
    except DeviceError as error:
        print(error)
"""


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch")
def test_a_driver_older_than_torch_is_found_out(tmp_path):
    """With a library in place of the driver's that says it is for CUDA 10.2."""
    (tmp_path / "stub.c").write_text(STUB)
    command = [COMPILER, "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "stub.c"]
    subprocess.run(command, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stderr == ""  # no warning of torch's beside the error
    hidden, *lines = run.stdout.splitlines()
    assert hidden == "cpu" and len(lines) == 2
    for line in lines:
        assert "The NVIDIA driver on your system is too old (found version 10020);" in line
        assert f"is built for CUDA {torch.version.cuda} and sm_" in line and "the driver is for CUDA 10.2" in line
        assert line.endswith("install a torch built for CUDA 10.2 or older, or a newer driver")


@pytest.fixture
def flags():
    """The flags that `set_precision` sets, here all set the other way and put back afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = False, True
    yield lambda: (matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark)
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


@pytest.mark.parametrize(("precision", "tf32"), [("float32", False), ("tf32", True), ("float64", False)])
def test_only_tf32_rounds_to_tf32_and_cudnn_is_deterministic_always(flags, precision, tf32):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not tf32
    set_precision(precision)
    assert flags() == (tf32, tf32, True, False)


def test_another_precision_is_refused_and_changes_nothing(flags):
    before = flags()
    with pytest.raises(ValueError, match="float16"):
        set_precision("float16")
    assert flags() == before


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many GPUs torch says there are."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_a_run_records_its_gpu_and_versions(gpus):
    assert describe(CPU) == {"device": "cpu"}
    on_gpu = {"device": "cuda", "gpu": "NVIDIA A100", "cuda": torch.version.cuda, "cudnn": 91000}
    assert json.loads(json.dumps(describe(CUDA))) == on_gpu


def test_several_gpus_are_noted_where_one_is_used(gpus):
    gpus(1)
    assert several_gpus_note(CUDA) == ""
    gpus(4)
    assert several_gpus_note(CPU) == ""
    note = several_gpus_note(CUDA)
    assert "one of 4 visible GPUs is used, NVIDIA A100" in note and "\n" not in note


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory\nSearch for ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    ],
)
def test_an_error_of_full_memory_is_told(error):
    assert is_out_of_memory(error)


def test_so_is_that_of_a_tensor_too_large_for_this_machine():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: an illegal memory access was encountered"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)
