"""The device that a run computes on: choosing it, its rounding, what is recorded of it. AMD's GPUs are `cuda` too."""

import glob
import os

import torch

from rnorm.files import RnormError

GPU_FILES = "/dev/nvidia[0-9]*"
SLURM_GPUS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")


def pick_device(name: str) -> torch.device:
    """The device `cuda` or `cpu`; for `auto` CUDA if it computes, else the CPU. Another name: ValueError.

    Raises RnormError, with torch's reason, if CUDA was asked for and does not compute; for `auto` also if Slurm gave a
    GPU or a GPU's device file is there, unless CUDA_VISIBLE_DEVICES hides it. docs/cluster.md has the remedies.
    """
    if name not in ("auto", "cuda", "cpu"):
        raise ValueError(f"no device {name!r}; there are auto, cuda and cpu")
    if name == "cpu":
        return torch.device("cpu")
    reason = why_no_cuda()
    if not reason:
        return torch.device("cuda")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles")
    signs = [variable for variable in SLURM_GPUS if os.environ.get(variable)] + sorted(glob.glob(GPU_FILES))
    if name == "auto" and (hidden or not signs):
        return torch.device("cpu")
    what = f"there is a GPU ({signs[0]}), but it cannot be used" if signs else "no GPU can be used"
    raise RnormError(f"{what}: {reason}")


def why_no_cuda() -> str:
    """torch's reason why no GPU can be used, and torch's version; "" if one can.

    A sum is computed there: `torch.cuda.is_available` lets pass a GPU that this torch has no code for.
    """
    try:
        (torch.ones(2, device="cuda") + 1).sum().item()
    except Exception as error:  # torch raises several kinds, AssertionError among them
        facts = f"torch {torch.__version__}"
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            facts += f", CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r}"
        reason, _, _ = str(error).partition("\n")
        return f"{reason} ({facts})"
    return ""


def set_precision(precision: str) -> None:
    """On CUDA, products and convolutions in TF32 if `precision` is tf32, else without it. Another name: ValueError.

    cuDNN takes deterministic algorithms, by rule and not by timing: the same GPU model, driver, torch and cuDNN should
    repeat a run bit for bit. That has not been seen on a GPU yet; `make gpu` tests it. float64 is set with the tensors.
    """
    if precision not in ("float32", "tf32", "float64"):
        raise ValueError(f"no precision {precision!r}; there are float32, tf32 and float64")
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    cuda.matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    if hasattr(torch.backends, "fp32_precision"):  # since torch 2.9, which computes as these say and not as those above
        torch.backends.fp32_precision = "ieee"
        for part in (cuda.matmul, cudnn, cudnn.conv, cudnn.rnn):
            part.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    cudnn.deterministic, cudnn.benchmark = True, False


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
