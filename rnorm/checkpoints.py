"""Checkpoints and histories: written whole, read with suspicion, and enough to continue a network from."""

import io
import sys
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from rnorm.conversions import layers_of
from rnorm.files import Damaged, set_aside, write_file
from rnorm.measure import KEYS
from rnorm.runs import Member, diverged_at, note_network


def save(content: dict, path: Path) -> None:
    """`torch.save`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())


def load(path: Path) -> dict:
    """A .pyT or .hist file's dict, of this repository or of the released code, its tensors on the CPU.

    Raises Damaged for a file that is truncated, altered, holds anything that would run code, or is no such dict.
    """
    file = io.BytesIO(path.read_bytes())  # an error here is the disk's; an error below is the file's
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


def check_weights(model: nn.Module, checkpoint: dict) -> None:
    """Raise Damaged if a loaded checkpoint's weights do not fit `model`."""
    try:
        weights, own = checkpoint["weights"], model.state_dict()
        for key in {**own, **weights}:
            if not isinstance(weights[key], Tensor) or weights[key].shape != own[key].shape:
                raise Damaged(f"its weights do not fit the network: shape of {key}")
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"its weights do not fit the network: {' '.join(str(error).split())[:200]}") from None


def load_weights(model: nn.Module, checkpoint: dict) -> None:
    """Put a loaded checkpoint's weights into `model`; raises Damaged, and changes nothing, if they do not fit it."""
    check_weights(model, checkpoint)
    model.load_state_dict(checkpoint["weights"])


def load_history(path: Path, member: Member) -> dict[str, list]:
    """The history of `member`; raises Damaged unless it is a dict of lists of numbers, all as long as `checkpoints`,
    which are the network's evaluations as far as they have come."""
    return check_history(load(path), member)


def check_history(history: object, member: Member) -> dict[str, list]:
    """`history`, if it is one of `member`; raises Damaged otherwise."""
    if not isinstance(history, dict) or not isinstance(history.get("checkpoints"), list):
        raise Damaged("it is not a history")
    length = len(history["checkpoints"])
    for key, values in history.items():
        if not isinstance(key, str) or not isinstance(values, list) or len(values) != length:
            raise Damaged(f"its lists are not all of length {length}")
        if not all(type(value) in (int, float) for value in values):
            raise Damaged(f"{key} is not a list of numbers")
    if not set(KEYS) <= set(history) or history["checkpoints"] != member.evaluations[:length]:
        raise Damaged("it is not this network's history")
    return history


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def sgd_state(rates: list[float]) -> dict:
    """The state dict of `torch.optim.SGD` with a learning rate for each parameter.

    Written by hand: to make the optimizer itself imports torch's compiler, 2 seconds in every process.
    """
    off = {"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "maximize": False, "foreach": None,
           "differentiable": False, "fused": None}  # fmt: skip
    groups = [{"lr": lr, **off, "params": numbers} for lr, numbers in by_rate(rates).items()]
    return {"state": {}, "param_groups": groups}


def by_rate(rates: list[float]) -> dict[float, list[int]]:
    """The numbers of the parameters with each learning rate: the groups of an optimizer."""
    return {lr: [i for i, rate in enumerate(rates) if rate == lr] for lr in dict.fromkeys(rates)}


class Writer:
    """A thread that writes while training goes on; one thing after another."""

    def __init__(self):
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Have `write` called, after waiting for what was started before."""
        self.wait()
        self.pending = self.thread.submit(write)

    def wait(self) -> None:
        """Wait until what was started is done; if it failed, raise its error, once."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


@dataclass
class Track:
    """One network's training, as far as it has come, and its files.

    Every checkpoint holds the history up to itself, so any one of them is enough to continue from. `record` and
    `save_latest` return when the state has been copied, and `writer` writes the copy; `writer.wait()` waits for it.
    """

    run: Path
    member: Member
    model: nn.Module
    rates: list[float]  # learning rates, one for each parameter
    keep: str = "all"  # or "last": which checkpoints stay on disk
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the next epoch
    history: dict[str, list] = field(default_factory=dict)
    on_disk: tuple[int, int] = (0, 0)  # the epoch and step of the last state that was written or read
    optimizer: torch.optim.Optimizer | None = field(default=None, init=False)  # with momentum or weight decay
    writer: Writer = field(default_factory=Writer, init=False)

    def __post_init__(self):
        settings, parameters = self.member.settings, list(self.model.parameters())
        if settings.momentum or settings.weight_decay:
            groups = [{"params": [parameters[i] for i in group], "lr": lr} for lr, group in by_rate(self.rates).items()]
            self.optimizer = torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay)

    @property
    def net(self) -> nn.Sequential:
        return layers_of(self.model)

    @property
    def random(self) -> torch.Generator | None:
        """What the network's dropout draws from; None if it has none."""
        if not any(isinstance(layer, (nn.Dropout, nn.Dropout2d)) for layer in self.model.modules()):
            return None
        device = next(self.model.parameters()).device
        return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator

    @property
    def evaluated(self) -> list[int]:
        """The epochs whose evaluation is in the history."""
        return self.history.get("checkpoints", [])

    @property
    def complete(self) -> bool:
        return self.evaluated[-1:] == [self.member.epochs]

    @property
    def due(self) -> bool:
        """Whether the network is to be evaluated as it stands."""
        return self.step == 0 and self.epoch in self.member.evaluations and self.epoch not in self.evaluated

    @property
    def ended(self) -> bool:
        """Whether nothing is left to train: the network is complete, or status.json says that it diverged."""
        return bool(self.history) and self._ended(self.history)

    def path(self, epoch: int) -> Path:
        return self.member.checkpoint(self.run, epoch)

    @property
    def latest(self) -> Path:
        return self.member.latest(self.run)

    def state(self) -> dict:
        """A copy of the whole state. Its tensors are the CPU's: what is on disk does not depend on the device."""
        optimizer = sgd_state(self.rates) if self.optimizer is None else dict(self.optimizer.state_dict())
        buffers = {i: values["momentum_buffer"] for i, values in optimizer["state"].items()}
        optimizer["state"] = {i: {"momentum_buffer": _copy(buffer)} for i, buffer in buffers.items()}
        weights = self.model.state_dict()
        for name, tensor in weights.items():
            weights[name] = _copy(tensor)
        state = {
            "weights": weights,
            "optimizer": optimizer,
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history,
        }
        if self.random:
            state["random"] = self.random.get_state()
        return state

    def save_latest(self) -> None:
        """Save the unfinished network, unless it is on disk as it stands or has not been evaluated yet."""
        if self.history and self.on_disk != (self.epoch, self.step):
            state, self.on_disk = self.state(), (self.epoch, self.step)
            self.writer.start(lambda: save(state, self.latest))

    def discard_latest(self) -> None:
        self.latest.unlink(missing_ok=True)

    def append(self, values: dict[str, float]) -> None:
        """Append an evaluation to the history."""
        values = {"checkpoints": self.epoch, **values}
        self.history = {key: [*self.history.get(key, []), value] for key, value in values.items()}

    def record(self, values: dict[str, float], seconds: float = 0.0) -> None:
        """Append an evaluation; write checkpoint, history and status, and delete what is no longer needed.

        `seconds` is the time spent on the network so far.
        """
        self.writer.wait()  # `_tidy` goes by the history
        self.append(values)
        state, self.on_disk = self.state(), (self.epoch, self.step)

        def write() -> None:
            save(state, self.path(state["epoch"]))
            save(state["history"], self.member.history(self.run))
            self._tidy()
            note_network(self.run, self.member, state="training", epoch=state["epoch"], seconds=seconds)

        self.writer.start(write)

    def _tidy(self) -> None:
        if self.keep == "last" and self.path(self.evaluated[-1]).exists():
            for epoch in self.evaluated[:-1]:
                self.path(epoch).unlink(missing_ok=True)
        if self.complete:
            self.discard_latest()

    def restore(self) -> None:
        """Continue from the newest good state on disk, if there is any; damaged files met on the way are set aside.

        A network whose history is complete stays complete, whichever of its checkpoints are missing.
        """
        recorded = self._read_history()
        self.restore_before(self.member.epochs)
        state = self._read(self.latest)
        if state and (state["epoch"], state["step"]) > (self.epoch, self.step):
            self._take(state)
        if recorded and self._ended(recorded):
            self.history = recorded
        elif self.history and repr(recorded) != repr(self.history):  # repr: NaN equals NaN
            save(self.history, self.member.history(self.run))
        elif recorded and not self.history:
            print(f"{self.member.label}: no checkpoint is left to continue from; it starts over", file=sys.stderr)
        self._say_what_is_missing()
        if self.history:
            self._tidy()

    def recorded_epochs(self) -> list[int]:
        """The epochs in the history on disk."""
        return (self._read_history() or {"checkpoints": []})["checkpoints"]

    def restore_before(self, epoch: int) -> None:
        """Continue from the newest good checkpoint at or before `epoch`; the start, if there is none."""
        torch.manual_seed(self.member.settings.seed)  # of dropout, whatever this process did before
        for evaluated in reversed(self.member.evaluations):
            if evaluated <= epoch and (state := self._read(self.path(evaluated))):
                self._take(state)
                return

    def _take(self, state: dict) -> None:
        load_weights(self.model, state)
        if self.optimizer:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.optimizer.state.clear()
            for i, saved in state["optimizer"]["state"].items():
                buffer = torch.empty_like(parameters[i]).copy_(saved["momentum_buffer"])
                self.optimizer.state[parameters[i]]["momentum_buffer"] = buffer
        if self.random and state["random"].shape == self.random.get_state().shape:  # else it is of another device
            self.random.set_state(state["random"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        self.on_disk = (self.epoch, self.step)

    def _read(self, path: Path) -> dict | None:
        """The state in `path`; None if there is none, or no good one, which is set aside."""
        try:
            state = load(path)
            epoch, step = state.get("epoch"), state.get("step")
            if not (type(epoch) is int and type(step) is int and 0 <= epoch <= self.member.epochs and step >= 0):
                raise Damaged("it does not say how far training had come")
            evaluated = check_history(state.get("history"), self.member)["checkpoints"]
            due = [e for e in self.member.evaluations if e <= epoch]
            if path == self.latest:
                if evaluated not in (due, due[:-1]) or not evaluated:
                    raise Damaged("its history is of another epoch")
            elif path != self.path(epoch) or evaluated != due:
                raise Damaged("it is of another epoch")
            check_weights(self.model, state)
            self._check_optimizer_and_random(state)
            return state
        except FileNotFoundError:
            return None
        except Damaged as damage:
            set_aside(path, str(damage))
            return None

    def _check_optimizer_and_random(self, state: dict) -> None:
        """Raise Damaged if the network cannot be continued from these parts of a loaded checkpoint."""
        try:
            if self.optimizer:
                saved, expected = state["optimizer"]["state"], []
                if self.member.settings.momentum and (state["epoch"], state["step"]) > (0, 0):
                    expected = [p.shape for group in self.optimizer.param_groups for p in group["params"]]
                if [saved[i]["momentum_buffer"].shape for i in range(len(saved))] != expected:
                    raise Damaged("its optimizer's state does not fit the network")
            if self.random and state["random"].shape == self.random.get_state().shape:
                torch.Generator(self.random.device).set_state(state["random"])
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise Damaged(f"its optimizer's or random state is no such thing: {type(error).__name__}") from None

    def _read_history(self) -> dict[str, list] | None:
        path = self.member.history(self.run)
        try:
            return load_history(path, self.member) or None
        except FileNotFoundError:
            return None
        except Damaged as damage:
            set_aside(path, str(damage))
            return None

    def _say_what_is_missing(self) -> None:
        if self.keep == "last" or not self.history:
            return
        missing = [self.path(epoch).name for epoch in self.evaluated if not self.path(epoch).exists()]
        if missing:
            print(f"{self.member.label}: not on disk, and not needed to go on: {' '.join(missing)}", file=sys.stderr)

    def _ended(self, history: dict[str, list]) -> bool:
        """Whether a history is that of a network which is complete, or which diverged after its last evaluation."""
        diverged = diverged_at(self.run, self.member)
        evaluated = history["checkpoints"]
        if diverged is not None and evaluated == [e for e in self.member.evaluations if e < diverged]:
            return True
        return evaluated[-1:] == [self.member.epochs]
