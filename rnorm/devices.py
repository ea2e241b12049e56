"""The device that a run computes on: choosing it, its rounding, what is recorded of it."""

import contextlib
import ctypes
import errno
import glob
import os
import re
import warnings

import torch

from rnorm.files import RnormError

GPU_FILES = ("/dev/nvidia[0-9]*", "/usr/lib/wsl/lib/libcuda.so.1")  # of an NVIDIA GPU, on Linux and on WSL
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")  # Slurm sets them in a job with GPUs


class DeviceError(RnormError):
    """No GPU can be used, though one was asked for or is in sight; the message is one line."""


def pick_device(name: str) -> torch.device:
    """The device `cuda` or `cpu`; `auto` is the CPU only where no GPU is in sight.

    A small computation shows whether a GPU can be used. Raises DeviceError if it cannot, with torch's reason, versions
    and a remedy; ValueError for another name.
    """
    if name not in ("auto", "cuda", "cpu"):
        raise ValueError(f"no device {name!r}; there are auto, cuda and cpu")
    if name == "cpu" or (name == "auto" and not gpu_in_sight()):
        return torch.device("cpu")
    if _hidden():
        raise DeviceError(f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides every GPU")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _compute_on_gpu()
        except Exception as error:  # torch raises several kinds, AssertionError among them
            texts = [str(error), *(str(warning.message) for warning in caught)]
            raise DeviceError(_explain("; ".join(dict.fromkeys(map(_gist, texts))))) from error
    for warning in caught:  # the GPU works all the same
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return torch.device("cuda")


def gpu_in_sight() -> str:
    """What shows that there is a GPU, usable or not, that CUDA_VISIBLE_DEVICES does not hide; "" if nothing does."""
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return "torch" if torch.cuda.is_available() else ""


def _hidden() -> bool:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()  # CUDA ignores all from a -1 on
    return first in ("", "NoDevFiles") or first.startswith("-")


def _compute_on_gpu() -> None:
    """Raises an error also for a GPU that torch has no code for, which `torch.cuda.is_available` lets pass."""
    (torch.ones(2, device="cuda") + 1).sum().item()


def _gist(text: str) -> str:
    """What torch says, without where in its source it does so, and without its advice."""
    return " ".join(re.split(r"\n(?=\S)| Please | \(Triggered ", text.strip())[0].split()).rstrip(".")


def _explain(reason: str) -> str:
    """One line: what was in sight, `reason`, what torch, the driver and the GPU are, and a remedy."""
    built, driver, sight = torch.version.cuda, _driver_cuda(), gpu_in_sight()
    facts = [f"a GPU is in sight ({sight}), but cannot be used: {reason}" if sight else f"no GPU can be used: {reason}"]
    architectures = " ".join(torch.cuda.get_arch_list())
    is_built = f"built for CUDA {built} and {architectures}" if built else "a CPU build of torch"
    facts.append(f"torch {torch.__version__} is {is_built}")
    if driver:
        facts.append(f"the driver is for CUDA {driver}")
    with contextlib.suppress(Exception):  # torch cannot say it in every state
        gpu = torch.cuda.get_device_properties(0)
        facts.append(f"the GPU is {gpu.name}, sm_{gpu.major}{gpu.minor}")
    if not built:
        facts.append("install a torch built for CUDA, no newer than the driver's")
    elif driver and int(driver.split(".")[0]) < int(built.split(".")[0]):
        facts.append(f"install a torch built for CUDA {driver} or older, or a newer driver")
    elif "no kernel image" in reason:
        facts.append("install a torch built for the architecture of this GPU")
    else:
        facts.append("see whether nvidia-smi shows the GPU, and whether another process holds it")
    return "; ".join(facts)


def _driver_cuda() -> str:
    """The newest CUDA version that the driver supports; "" if there is no driver."""
    version = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):  # no such library, or no such function in it
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else ""


def set_precision(precision: str) -> None:
    """Products on CUDA in TF32 if `precision` is tf32, else without it; deterministic cuDNN. Another name: ValueError.

    `float64` does not change the type of any tensor. cuDNN's convolutions take deterministic algorithms, chosen by
    rule and not by timing. Meant to be bit-reproducible by this: the same run on the same GPU model, driver, torch and
    cuDNN. Not guaranteed: cuBLAS promises it only on a single stream, or with CUBLAS_WORKSPACE_CONFIG set, and torch's
    own kernels are not asked for it (`torch.use_deterministic_algorithms`). Not reproducible: the last bits between
    GPU models or versions, or CUDA and CPU, from which training drifts apart. None of it has run on a GPU.
    """
    if precision not in ("float32", "tf32", "float64"):
        raise ValueError(f"no precision {precision!r}; there are float32, tf32 and float64")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def describe(device: torch.device) -> dict[str, str | int | None]:
    """What a run records of its device: the type, and on CUDA the GPU's name and the versions of CUDA and cuDNN."""
    if device.type != "cuda":
        return {"device": device.type}
    name, cudnn = torch.cuda.get_device_name(device), torch.backends.cudnn.version()
    return {"device": "cuda", "gpu": name, "cuda": torch.version.cuda, "cudnn": cudnn}


def several_gpus_note(device: torch.device) -> str:
    """One line where several GPUs are visible, of which one is used; "" otherwise."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return ""
    name = torch.cuda.get_device_name(device)
    return f"one of {torch.cuda.device_count()} visible GPUs is used, {name}; CUDA_VISIBLE_DEVICES chooses which"
