"""Checkpoints and histories: written whole, read with suspicion, and enough to continue a network from."""

import io
import math
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from rnorm.cli import is_out_of_memory
from rnorm.conversions import layers_of
from rnorm.files import Damaged, RnormError, set_aside, write_file
from rnorm.measure import KEYS
from rnorm.runs import Member

SAVE_EVERY = 30.0  # seconds of work that a killed process can lose
History = dict[str, list]  # a recorded quantity's key to its values, one for each evaluation


def save(content: dict, path: Path) -> None:
    """`torch.save`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())


def load(path: Path) -> dict:
    """A .pyT or .hist file's dict, its tensors on the CPU; also a .pyT of the released code, whose .hist files hold
    numpy arrays and are refused.

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
        if is_out_of_memory(error):
            raise
        reason = "it holds more than tensors and numbers" if "eights only" in str(error) else type(error).__name__
        raise Damaged(reason) from None
    if not isinstance(content, dict):
        raise Damaged("it is not a dict")
    return content


def load_weights(model: nn.Module, checkpoint: dict) -> None:
    """Put a loaded checkpoint's weights into `model`; raises Damaged, and changes nothing, if they do not fit it."""
    check_weights(model, checkpoint)
    model.load_state_dict(checkpoint["weights"])


def check_weights(model: nn.Module, checkpoint: dict) -> None:
    """Raise Damaged if a loaded checkpoint's weights do not fit `model`."""
    weights, own = checkpoint.get("weights"), model.state_dict()
    if not isinstance(weights, dict) or weights.keys() != own.keys():
        raise Damaged("its weights are not those of the network's layers")
    for key in own:
        if not isinstance(weights[key], Tensor) or weights[key].shape != own[key].shape:
            raise Damaged(f"its weights do not fit the network: shape of {key}")


def load_history(member: Member) -> History | None:
    """A network's history on disk; None without one. Raises Damaged if it is not what `check_history` expects."""
    try:
        return check_history(load(member.history_file), member)
    except FileNotFoundError:
        return None


def recorded(member: Member) -> History | None:
    """A network's history on disk; None without a good one."""
    try:
        return load_history(member)
    except Damaged:
        return None


def past_divergence(member: Member) -> bool:
    """Whether a network cannot be made, as the CNN diverged before its split."""
    cnn = recorded(Member(member.run, member.settings))
    return cnn is not None and has_diverged(cnn) and not member.is_cnn and member.split >= cnn["checkpoints"][-1]


def check_history(history: object, member: Member) -> History:
    """`history`, if it is one of `member`; raises Damaged otherwise.

    It has to be a dict of lists of numbers, all as long as `checkpoints`. These are the network's evaluations as far as
    it has come; the last may be any later epoch, if the network diverged in it. What of KEYS it lacks, as it was
    written before they were recorded, is NaN.
    """
    evaluated = history.get("checkpoints") if isinstance(history, dict) else None
    if not isinstance(evaluated, list) or not evaluated or "train_loss" not in history:
        raise Damaged("it is not a history")
    history = dict.fromkeys(KEYS, [math.nan] * len(evaluated)) | history
    for key, values in history.items():
        if not isinstance(key, str) or not isinstance(values, list) or len(values) != len(evaluated):
            raise Damaged(f"its lists are not all of length {len(evaluated)}")
        if not all(type(value) in (int, float) for value in values):
            raise Damaged(f"{key} is not a list of numbers")
    expected = member.evaluations[: len(evaluated)]
    if has_diverged(history):
        last, before = evaluated[-1], member.evaluations[: len(evaluated) - 1]
        if all(epoch < last <= member.epochs for epoch in before):
            expected = [*before, last]
    if evaluated != expected:
        raise Damaged("it is not this network's history")
    return history


def has_diverged(history: History) -> bool:
    """Whether the network's loss ceased to be finite, in the last epoch of its history; all is NaN there."""
    return not math.isfinite(history["train_loss"][-1])


def has_ended(history: History | None, member: Member) -> bool:
    """Whether nothing is left to train, as the network is complete or diverged."""
    return history is not None and (has_diverged(history) or history["checkpoints"][-1] == member.epochs)


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


@dataclass
class Track:
    """One network's training, as far as it has come, and its files.

    Every checkpoint holds the history up to itself, so any one of them is enough to continue from. `record` and
    `save_latest` return when the state has been copied, and a thread writes the copy; `wait` waits for it.
    """

    member: Member
    model: nn.Module
    rates: list[float]  # learning rates, one for each parameter
    keep: str = "all"  # or "last": which checkpoints stay on disk
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the next epoch
    history: History = field(default_factory=dict)
    on_disk: tuple[int, int] = (0, 0)  # the epoch and step of the last state that was written or read
    saved_at: float = field(default_factory=time.monotonic)
    optimizer: torch.optim.Optimizer | None = field(default=None, init=False)  # with momentum or weight decay
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    writing: Future | None = field(default=None, init=False)

    def __post_init__(self):
        settings, parameters = self.member.settings, list(self.model.parameters())
        if settings.momentum or settings.weight_decay:
            groups = [{"params": [parameters[i] for i in group], "lr": lr} for lr, group in by_rate(self.rates).items()]
            self.optimizer = torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay)
            for group in self.optimizer.param_groups:
                # SGD multiplies the decay by the group's rate, but a tied filter's decay is no smaller than its eLCN's.
                group["weight_decay"] *= self.member.lr / group["lr"]

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
        """The epochs that are in the history."""
        return self.history.get("checkpoints", [])

    @property
    def ended(self) -> bool:
        """Whether nothing is left to train."""
        return bool(self.history) and has_ended(self.history, self.member)

    @property
    def diverged(self) -> bool:
        return bool(self.history) and has_diverged(self.history)

    @property
    def due(self) -> bool:
        """Whether the network is to be evaluated as it stands."""
        return self.step == 0 and self.epoch in self.member.evaluations and self.epoch not in self.evaluated

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

    def _write(self, write: Callable[[], None]) -> None:
        """Have `write` called by the thread, after what it was given before."""
        self.wait()
        self.writing = self.writer.submit(write)

    def wait(self) -> None:
        """Wait until what is being written is on disk; if that failed, raise its error, once."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def save_latest(self) -> None:
        """Save the unfinished network, unless it is on disk as it stands or has not been evaluated yet."""
        self.saved_at = time.monotonic()
        if self.history and self.on_disk != (self.epoch, self.step):
            state, self.on_disk = self.state(), (self.epoch, self.step)
            self._write(lambda: save(state, self.member.latest_file))

    def save_now_and_then(self) -> None:
        """`save_latest`, if the last time was SAVE_EVERY seconds ago."""
        if time.monotonic() - self.saved_at > SAVE_EVERY:
            self.save_latest()

    def append(self, values: dict[str, float]) -> None:
        """Append an evaluation to the history. A quantity that was not recorded before, or no longer is, is NaN there.

        Raises RnormError for a value that is no Python number.
        """
        for key, value in values.items():
            if type(value) not in (int, float):
                kind = type(value).__name__
                raise RnormError(f"{key} is recorded as a {kind}; it has to be a Python number, such as tensor.item()")
        past, values = [math.nan] * len(self.evaluated), {"checkpoints": self.epoch, **values}
        keys = dict.fromkeys([*self.history, *values])
        self.history = {key: [*self.history.get(key, past), values.get(key, math.nan)] for key in keys}

    def record(self, values: dict[str, float]) -> None:
        """Append an evaluation; write checkpoint and history, and delete what is no longer needed."""
        self.wait()  # `_tidy` goes by the history
        self.append(values)
        state, self.on_disk, self.saved_at = self.state(), (self.epoch, self.step), time.monotonic()

        def write() -> None:
            save(state, self.member.checkpoint(state["epoch"]))
            save(state["history"], self.member.history_file)
            self._tidy()

        self._write(write)

    def record_divergence(self) -> None:
        """End the history here, with NaN in every quantity; there is no checkpoint of it."""
        self.wait()
        self.append(dict.fromkeys(KEYS[1:], math.nan))
        save(self.history, self.member.history_file)
        self._tidy()

    def _tidy(self) -> None:
        """Delete the checkpoints that need not be kept, and of a network that has ended latest.pyT."""
        kept = self.evaluated[: -1 if self.diverged else None]
        if self.keep == "last" and kept and self.member.checkpoint(kept[-1]).exists():
            for epoch in kept[:-1]:
                self.member.checkpoint(epoch).unlink(missing_ok=True)
        if self.ended:
            self.member.latest_file.unlink(missing_ok=True)

    def restore(self) -> None:
        """Continue from the newest good state on disk, if there is any; damaged files met on the way are set aside.

        A network whose history has ended stays so, whichever of its checkpoints are missing; its weights are not read.
        """
        recorded = self._read_history()
        if has_ended(recorded, self.member):
            self.history = recorded
        else:
            self.restore_before(self.member.epochs)
            state = self._read(self.member.latest_file)
            if state and (state["epoch"], state["step"]) > (self.epoch, self.step):
                self._take(state)
            if self.history and repr(recorded) != repr(self.history):  # repr: NaN equals NaN
                save(self.history, self.member.history_file)
            elif recorded and not self.history:
                print(f"{self.member.label}: no checkpoint is left to continue from; it starts over", file=sys.stderr)
        self._tidy()

    def restore_before(self, epoch: int) -> None:
        """Continue from the newest good checkpoint at or before `epoch`; the start, if there is none."""
        torch.manual_seed(self.member.settings.seed)  # of dropout, whatever this process did before
        for evaluated in reversed(self.member.evaluations):
            if evaluated <= epoch and (state := self._read(self.member.checkpoint(evaluated))):
                self._take(state)
                return

    def _take(self, state: dict) -> None:
        """Continue from a state that `_check` has passed."""
        self.model.load_state_dict(state["weights"])
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
            self._check(state, path)
            return state
        except FileNotFoundError:
            return None
        except Damaged as damage:
            set_aside(path, str(damage))
            return None

    def _check(self, state: dict, path: Path) -> None:
        """Raise Damaged unless the network can be continued from the state that was loaded from `path`."""
        check_weights(self.model, state)
        epoch, step = state.get("epoch"), state.get("step")
        if type(epoch) is not int or type(step) is not int or step < 0:
            raise Damaged("it does not say how far training had come")
        state["history"] = check_history(state.get("history"), self.member)
        evaluated = state["history"]["checkpoints"]
        due = [e for e in self.member.evaluations if e <= epoch]
        of_latest = path == self.member.latest_file and evaluated in (due, due[:-1]) and epoch <= self.member.epochs
        if not of_latest and not (path == self.member.checkpoint(epoch) and evaluated == due):
            raise Damaged("it is of another epoch")
        try:
            if self.optimizer:
                buffers, expected = state["optimizer"]["state"], {}
                if self.member.settings.momentum and (epoch, step) > (0, 0):
                    parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                    expected = {i: p.shape for i, p in enumerate(parameters) if p.requires_grad}
                if {i: values["momentum_buffer"].shape for i, values in buffers.items()} != expected:
                    raise Damaged("its optimizer's state does not fit the network")
            if self.random and state["random"].shape == self.random.get_state().shape:
                torch.Generator(self.random.device).set_state(state["random"])
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise Damaged(f"its optimizer's or random state is no such thing: {type(error).__name__}") from None

    def _read_history(self) -> History | None:
        try:
            return load_history(self.member)
        except Damaged as damage:
            set_aside(self.member.history_file, str(damage))
            return None
