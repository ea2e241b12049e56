"""The device that a run computes on: choosing it, its rounding, what is recorded of it. AMD's GPUs are `cuda` too."""

import contextlib
import ctypes
import errno
import glob
import os

import torch

from rnorm.files import RnormError

GPU_FILES = ("/dev/nvidia[0-9]*", "/usr/lib/wsl/lib/libcuda.so.1", "/dev/kfd")  # NVIDIA, on Linux and on WSL; AMD
HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
GPU_VARIABLES = (*HIDING, "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")


def pick_device(name: str) -> torch.device:
    """The device `cuda` or `cpu`; `auto` is the CPU only where no GPU is in sight. Another name: ValueError.

    Raises RnormError for a GPU that cannot be used, with torch's reason; docs/cluster.md has the remedies.
    """
    if name not in ("auto", "cuda", "cpu"):
        raise ValueError(f"no device {name!r}; there are auto, cuda and cpu")
    if name == "cpu" or (name == "auto" and not gpu_in_sight()):
        return torch.device("cpu")
    if hidden := _hidden():
        raise RnormError(f"{hidden} hides every GPU")
    try:
        _compute_on_gpu()
    except Exception as error:  # torch raises several kinds, AssertionError among them
        sight, reason = gpu_in_sight(), str(error).partition("\n")[0]
        what = f"a GPU is in sight ({sight}), but cannot be used" if sight else "no GPU can be used"
        raise RnormError(f"{what}: {reason}; {_versions()}") from None
    return torch.device("cuda")


def gpu_in_sight() -> str:
    """What shows that there is a GPU, usable or not, that is not hidden; "" if nothing does."""
    if _hidden():
        return ""
    for variable in GPU_VARIABLES:
        if value := os.environ.get(variable):
            return f"{variable}={value}"
    for path in sorted(path for pattern in GPU_FILES for path in glob.glob(pattern)):
        try:
            os.close(os.open(path, os.O_RDONLY))
        except OSError as error:
            if error.errno == errno.EPERM:  # the node has a GPU, but Slurm keeps it from this job
                continue
        return path
    return "torch" if torch.cuda.is_available() else ""


def _hidden() -> str:
    """The setting that hides every GPU; "" if none does. A torch built for CUDA knows the first of HIDING alone."""
    for variable in HIDING[:1] if torch.version.cuda else HIDING:
        first = os.environ.get(variable, "0").split(",")[0].strip()  # all from a -1 on are ignored
        if first in ("", "NoDevFiles") or first.startswith("-"):
            return f"{variable}={os.environ[variable]!r}"
    return ""


def _compute_on_gpu() -> None:
    """Raises an error also for a GPU that torch has no code for, which `torch.cuda.is_available` lets pass."""
    (torch.ones(2, device="cuda") + 1).sum().item()


def _versions() -> str:
    """What torch is built for, and the newest CUDA that the driver is for, if there is one."""
    kinds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built = [f"{kind} {version}" for kind, version in kinds.items() if version] or ["the CPU alone"]
    facts, version = f"torch {torch.__version__} is built for {built[0]}", ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):  # no such library, or no such function in it
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
        facts += f"; the driver is for CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    return facts


def set_precision(precision: str) -> None:
    """On CUDA, products in TF32 if `precision` is tf32, else without it. Another name: ValueError.

    cuDNN takes deterministic algorithms, by rule and not by timing: the same GPU model, driver, torch and cuDNN should
    repeat a run bit for bit. That has not been seen on a GPU yet; `make gpu` tests it. float64 is set with the tensors.
    """
    if precision not in ("float32", "tf32", "float64"):
        raise ValueError(f"no precision {precision!r}; there are float32, tf32 and float64")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def describe(device: torch.device) -> dict[str, str | int | None]:
    """What a run records of its device: its type; of a GPU also the name and the versions of CUDA or ROCm and cuDNN."""
    if device.type != "cuda":
        return {"device": device.type}
    built = {"hip": torch.version.hip} if torch.version.hip else {"cuda": torch.version.cuda}
    gpu, cudnn = torch.cuda.get_device_name(device), torch.backends.cudnn.version()
    return {"device": "cuda", "gpu": gpu, **built, "cudnn": cudnn}


def several_gpus_note(device: torch.device) -> str:
    """One line where several GPUs are visible, of which one is used; "" otherwise."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return ""
    name = torch.cuda.get_device_name(device)
    return f"one of {torch.cuda.device_count()} visible GPUs is used, {name}; CUDA_VISIBLE_DEVICES chooses which"
