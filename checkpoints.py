"""Checkpoints and histories: written whole, read with suspicion, and enough to continue a network from."""

import io
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from measure import KEYS
from runs import HISTORY, LATEST, checkpoint_path, network_directory, set_aside, write_file


class Damaged(Exception):
    """A file that is not what it should be; the message says how."""


def save(content: dict, path: Path) -> None:
    """`torch.save`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def load(path: Path) -> dict:
    """A .pyT or .hist file's dict, of this repository or of the released code.

    Raises Damaged for a file that is truncated, altered, holds anything that would run code, or is no such dict.
    """
    file = io.BytesIO(path.read_bytes())  # what fails here is the disk; what fails below is the file
    try:
        if zipfile.is_zipfile(file):  # the legacy format, before torch 1.6, is not a zip and has no checksum
            with zipfile.ZipFile(file) as parts:
                if bad := parts.testzip():  # torch itself does not look at the CRC-32
                    raise Damaged(f"wrong checksum in {bad}")
                if any(part.external_attr & 0x10 for part in parts.infolist()):  # torch reads nothing from a directory
                    raise Damaged("a tensor is marked as a directory")
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said in one line, below
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Damaged:
        raise
    except Exception as error:  # a hostile file can raise anything
        reason = "it holds more than tensors and numbers" if "eights only" in str(error) else type(error).__name__
        raise Damaged(reason) from None
    if not isinstance(content, dict):
        raise Damaged("it is not a dict")
    return content


def load_weights(model: nn.Module, checkpoint: dict) -> None:
    """Put a loaded checkpoint's weights into `model`; raises Damaged, and changes nothing, if they do not fit it."""
    try:
        weights, own = checkpoint["weights"], model.state_dict()
        wrong = [key for key in {**own, **weights} if weights[key].shape != own[key].shape]
        if wrong:
            raise Damaged(f"its weights do not fit the network: shape of {wrong[0]}")
        model.load_state_dict(weights)
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise Damaged(f"its weights do not fit the network: {' '.join(str(error).split())[:200]}") from None


def load_history(path: Path) -> dict[str, list]:
    """A history; raises Damaged unless it is a dict of lists of numbers, all as long as `checkpoints`."""
    return _check_history(load(path))


def _check_history(history: object) -> dict[str, list]:
    if not isinstance(history, dict) or not isinstance(history.get("checkpoints"), list):
        raise Damaged("it is not a history")
    length = len(history["checkpoints"])
    for key, values in history.items():
        if not isinstance(key, str) or not isinstance(values, list) or len(values) != length:
            raise Damaged(f"its lists are not all of length {length}")
        if not all(type(value) in (int, float) for value in values):
            raise Damaged(f"{key} is not a list of numbers")
    return history


def sgd_state(lr: float, parameters: int) -> dict:
    """The state dict of `torch.optim.SGD`, whose making would import torch's compiler, 2 seconds in every process."""
    off = {"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "maximize": False, "foreach": None,
           "differentiable": False, "fused": None}  # fmt: skip
    return {"state": {}, "param_groups": [{"lr": lr, **off, "params": list(range(parameters))}]}


@dataclass
class Track:
    """One network's training, as far as it has come, and its files.

    Every checkpoint holds the history up to itself, so that any one of them is enough to continue from.
    """

    run: Path
    split: int | None  # None: the CNN
    model: nn.Module
    lr: float
    epochs: int
    evaluations: list[int]  # own epochs at which it is evaluated and checkpointed, 0 among them
    keep: str = "all"  # or "last": which checkpoints stay on disk
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the next epoch
    history: dict[str, list] = field(default_factory=dict)
    on_disk: tuple[int, int] = (0, 0)  # the epoch and step of the last state that was written or read

    def __post_init__(self):
        self.directory = network_directory(self.run, self.split)

    @property
    def net(self) -> nn.Sequential:
        """The layers; of a CNN they lie in `model.net`."""
        return getattr(self.model, "net", self.model)

    def path(self, epoch: int) -> Path:
        return checkpoint_path(self.run, self.split, epoch)

    @property
    def complete(self) -> bool:
        return bool(self.history) and self.history["checkpoints"][-1] == self.epochs

    def _write(self, path: Path) -> None:
        state = {
            "weights": self.model.state_dict(),
            "optimizer": sgd_state(self.lr, len(list(self.model.parameters()))),
            "epoch": self.epoch, "step": self.step, "history": self.history,
        }  # fmt: skip
        save(state, path)
        self.on_disk = (self.epoch, self.step)

    def save_latest(self) -> None:
        """Save the unfinished network, unless it is on disk as it stands or has not been evaluated yet."""
        if self.history and self.on_disk != (self.epoch, self.step):
            self._write(self.directory / LATEST)

    def discard_latest(self) -> None:
        (self.directory / LATEST).unlink(missing_ok=True)

    def record(self, values: dict[str, float]) -> None:
        """Append an evaluation to the history and write checkpoint and history; tidy up after the last."""
        values = {"checkpoints": self.epoch, **values}
        self.history = {key: [*self.history.get(key, []), value] for key, value in values.items()}
        self._write(self.path(self.epoch))
        save(self.history, self.directory / HISTORY)
        self._tidy()

    def _tidy(self) -> None:
        if self.keep == "last":
            for epoch in self.history["checkpoints"][:-1]:
                self.path(epoch).unlink(missing_ok=True)
        if self.complete:
            self.discard_latest()

    def restore(self) -> None:
        """Continue from the last good state on disk, if there is any; damaged files are set aside.

        What comes after a damaged or missing checkpoint is made anew, so that the end is that of an undisturbed run.
        """
        there = [e for e in self.evaluations if self.path(e).exists()]
        for epoch in self.evaluations[: self.evaluations.index(there[-1]) + 1] if there else []:
            path = self.path(epoch)
            if not self._take_over(path) and self.keep == "all":
                kept_last = self.split is not None and epoch < there[0]  # before this call, only the last was kept
                if not kept_last or path.with_name(f"{path.name}.damaged").exists():
                    break
        if not self._take_over(self.directory / LATEST):
            self.discard_latest()
        if self.history:
            self._restore_history()
            self._tidy()

    def _take_over(self, path: Path) -> bool:
        """Continue from the state in `path`; False if it is missing, behind, or no good and so set aside."""
        if not path.exists():
            return False
        try:
            state = load(path)
            epoch, step, history = state.get("epoch"), state.get("step"), state.get("history")
            if not (type(epoch) is int and type(step) is int and 0 <= epoch <= self.epochs and step >= 0):
                raise Damaged("it does not say how far training had come")
            evaluated = _check_history(history)["checkpoints"]
            due = [e for e in self.evaluations if e <= epoch]
            if evaluated not in (due, due[:-1]) or not set(KEYS) <= set(history):
                raise Damaged("its history does not belong to this network")
            if path.name == LATEST:
                follows = self.keep == "last" or evaluated == self.history.get("checkpoints")
                if not follows or (epoch, step) < (self.epoch, self.step):
                    return False
            elif path != self.path(epoch) or evaluated != due:
                raise Damaged("it is of another epoch")
            load_weights(self.model, state)
        except Damaged as damage:
            set_aside(path, str(damage))
            return False
        self.epoch, self.step, self.history, self.on_disk = epoch, step, history, (epoch, step)
        return True

    def _restore_history(self) -> None:
        path = self.directory / HISTORY
        try:
            if repr(load_history(path)) == repr(self.history):  # repr: NaN equals NaN
                return
        except FileNotFoundError:
            pass
        except Damaged as damage:
            set_aside(path, str(damage))
        save(self.history, path)
