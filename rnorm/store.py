"""A network's files: checkpoints and history, written whole, read with suspicion, enough to continue from."""

import io
import re
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from rnorm.data import Data
from rnorm.files import Damaged, Lock, is_out_of_memory, set_aside, write_file
from rnorm.history import History, by_epoch, check_history, completed, has_diverged, has_ended
from rnorm.layers import LocallyConnected2d
from rnorm.runs import Member

SAVE_EVERY = 30.0  # seconds of work that a killed process can lose
PREFIX = "net."  # of the keys of a CNN's weights in the files, as in those of the released code


def save(content: dict, path: Path) -> None:
    """`torch.save`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())


def load(path: Path) -> dict:
    """A .pyT or .hist file's dict, its tensors on the CPU; also a .pyT of the released code, whose .hist files hold
    numpy numbers and are refused.

    Raises Damaged for a file that is truncated, altered, holds anything that would run code, or is no such dict.
    """
    if not path.is_file():  # to read a FIFO would wait for ever
        raise FileNotFoundError(2, "No such file", str(path))
    file = io.BytesIO(path.read_bytes())  # an error here is the disk's; an error below is the file's
    try:
        if zipfile.is_zipfile(file):  # the legacy format, before torch 1.6, is not a zip and has no checksum
            with zipfile.ZipFile(file) as parts:
                for part in parts.infolist():
                    if part.external_attr & 0x10:  # torch reads nothing from a directory
                        raise Damaged("a tensor is marked as a directory")
                    if part.compress_type != zipfile.ZIP_STORED:  # torch compresses nothing; this could be any size
                        raise Damaged("it is compressed")
                if bad := parts.testzip():  # torch itself does not look at the CRC-32
                    raise Damaged(f"wrong checksum in {bad}")
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


def to_file(net: nn.Sequential) -> dict[str, Tensor]:
    """A network's weights under the keys of the files, copied to the CPU: files do not depend on the device."""
    untied = any(isinstance(layer, LocallyConnected2d) or hasattr(layer, "local") for layer in net)
    return {("" if untied else PREFIX) + key: copied(tensor) for key, tensor in net.state_dict().items()}


def from_file(checkpoint: dict) -> dict[str, Tensor]:
    """The weights in a loaded checkpoint, under the keys of a network's state dict; raises Damaged without any."""
    weights = checkpoint.get("weights")
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise Damaged("it holds no weights")
    return {key.removeprefix(PREFIX): value for key, value in weights.items()}


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def load_weights(net: nn.Module, checkpoint: dict) -> None:
    """Put a loaded checkpoint's weights into `net`; raises Damaged, and changes nothing, if they do not fit it."""
    check_weights(net, checkpoint)
    net.load_state_dict(from_file(checkpoint))


def check_weights(net: nn.Module, checkpoint: dict) -> None:
    """Raise Damaged if a loaded checkpoint's weights do not fit `net`: keys, shapes, dtypes, plain dense tensors."""
    weights, own = from_file(checkpoint), net.state_dict()
    if weights.keys() != own.keys():
        raise Damaged("its weights are not those of the network's layers")
    for key in own:
        check_tensor(weights[key], own[key], key)


def check_tensor(value: object, like: Tensor, name: str) -> None:
    """Raise Damaged unless `value` is a dense tensor on the CPU, of the shape and dtype of `like`."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not dense or value.shape != like.shape or value.dtype != like.dtype:
        raise Damaged(f"its weights do not fit the network: {name} has another shape or kind of number")


def load_history(member: Member) -> History | None:
    """A network's history on disk; None without one. Raises Damaged if it is not what `check_history` expects."""
    try:
        return check_history(load(member.history_file), member)
    except FileNotFoundError:
        return None


def good_history(member: Member) -> History | None:
    """A network's history on disk; None without a good one."""
    try:
        return load_history(member)
    except Damaged:
        return None


def past_divergence(member: Member) -> bool:
    """Whether a network cannot be made, as the CNN diverged before its split."""
    cnn = good_history(Member(member.run, member.settings))
    return cnn is not None and has_diverged(cnn) and not member.is_cnn and member.split >= cnn["checkpoints"][-1]


class Training(Protocol):
    """What a store needs of a network in training; train.py has it."""

    net: nn.Sequential
    epoch: int
    step: int
    history: History

    def state(self) -> dict: ...
    def check_state(self, state: dict) -> None: ...
    def load_state(self, state: dict) -> None: ...


class Store:
    """The files of one network.

    Every checkpoint holds the whole state with the history up to itself, so any one of them is enough to continue from.
    `record` and `save_latest` return when the state has been copied, and a thread writes the copy; `wait` waits for it.

    Args:
        member: whose files these are.
        data: what it is trained on. A checkpoint says so, and one that says otherwise is not continued from.
        lock: the lock of the network's directory; None to read only. Nothing is written once it is not that of the
            directory any longer.
        keep: "all" or "last": which checkpoints stay on disk.
    """

    def __init__(self, member: Member, data: Data, lock: Lock | None = None, keep: str = "all"):
        self.member, self.lock, self.keep = member, lock, keep
        self.identity = {"network": member.settings.network, "conversion": member.conversion, "split": member.split}
        self.identity |= {"data_sha256": data.sha256, "num_classes": data.num_classes}
        self.identity |= {"image_shape": list(data.image_shape)}
        self.on_disk = (0, 0)  # the epoch and step of the last state that was written or read
        self.saved_at = time.monotonic()
        self.writer, self.writing = ThreadPoolExecutor(1), None

    def _state(self, training: Training) -> dict:
        return {"weights": to_file(training.net), **training.state(), "identity": self.identity}

    def _write(self, write: Callable[[], None]) -> None:
        """Have `write` called by the thread, after what it was given before."""
        self.wait()
        try:
            self.writing = self.writer.submit(write)
        except RuntimeError:  # no thread is to be had
            self.writer = ThreadPoolExecutor(1)  # the other holds what it could not do
            write()

    def wait(self) -> None:
        """Wait until what is being written is on disk; if that failed, raise its error, once."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def _save(self, content: dict, path: Path) -> None:
        if self.lock:
            self.lock.check()
        save(content, path)

    def save_latest(self, training: Training) -> None:
        """Save the unfinished network, unless it is on disk as it stands or has not been evaluated yet."""
        self.saved_at = time.monotonic()
        if training.history and self.on_disk != (training.epoch, training.step):
            state, self.on_disk = self._state(training), (training.epoch, training.step)
            self._write(lambda: self._save(state, self.member.latest_file))

    def save_soon(self, training: Training) -> None:
        """`save_latest`, if the last time was SAVE_EVERY seconds ago."""
        if time.monotonic() - self.saved_at > SAVE_EVERY:
            self.save_latest(training)

    def record(self, training: Training) -> None:
        """Write checkpoint and history of a network just evaluated, and delete what is no longer needed."""
        state, self.on_disk, self.saved_at = self._state(training), (training.epoch, training.step), time.monotonic()

        def write() -> None:
            self._save(state, self.member.checkpoint(state["epoch"]))
            self._save(state["history"], self.member.history_file)
            self._tidy(state["history"])

        self._write(write)

    def write_history(self, history: History) -> None:
        """Write the history alone."""
        self._save(history, self.member.history_file)

    def record_divergence(self, training: Training) -> None:
        """Write the history of a network that diverged; there is no checkpoint of that epoch."""
        self.wait()
        self.write_history(training.history)
        self._tidy(training.history)

    def _tidy(self, history: History) -> None:
        """Delete the checkpoints that need not be kept, and of a network that has ended latest.pyT."""
        epochs = history["checkpoints"][: -1 if has_diverged(history) else None]
        older = [path for epoch in epochs[:-1] if (path := self.member.checkpoint(epoch)).exists()]
        if self.keep == "last" and older and self._is_good(self.member.checkpoint(epochs[-1])):
            for path in older:
                path.unlink(missing_ok=True)
        if has_ended(history, self.member):
            self.member.latest_file.unlink(missing_ok=True)

    def _is_good(self, path: Path) -> bool:
        """Whether a checkpoint of this network can be read back, so that it may take the place of others."""
        try:
            state = load(path)
            self._check_identity(state)
            return bool(from_file(state))
        except (Damaged, OSError):
            return False

    def restore(self, training: Training) -> None:
        """Continue from the newest good state on disk, if there is any; damaged files met on the way are set aside.

        A network whose history has ended stays so, whichever of its checkpoints are missing; its weights are not read.
        """
        try:
            history = load_history(self.member)
        except Damaged as damage:
            set_aside(self.member.history_file, str(damage))
            history = None
        if has_ended(history, self.member):
            training.history = history
        else:
            self.restore_before(training, self.member.epochs)
            state = self._read(self.member.latest_file, training)
            if state and (state["epoch"], state["step"]) > (training.epoch, training.step):
                self._take(state, training)
            if training.history and history:  # what convert.py --evaluate added since that state was saved
                training.history, _ = completed(training.history, by_epoch(history))
            if training.history and repr(history) != repr(training.history):  # repr: NaN equals NaN
                self.write_history(training.history)
            elif history and not training.history:
                print(f"{self.member.label}: no checkpoint is left to continue from; it starts over", file=sys.stderr)
        if training.history:
            self._tidy(training.history)

    def restore_before(self, training: Training, epoch: int) -> None:
        """Continue from the newest good checkpoint at or before `epoch`; the start, if there is none."""
        for found in sorted(self.checkpoints(), reverse=True):
            if found <= epoch and (state := self._read(self.member.checkpoint(found), training)):
                self._take(state, training)
                return

    def checkpoints(self) -> list[int]:
        """The epochs of the checkpoints on disk."""
        name = re.compile(re.escape(self.member.stem) + r"_(0|[1-9]\d{0,5})\.pyT")
        return [int(match[1]) for path in self.member.directory.glob("*.pyT") if (match := name.fullmatch(path.name))]

    def _take(self, state: dict, training: Training) -> None:
        training.net.load_state_dict(from_file(state))
        training.load_state(state)
        self.on_disk = (training.epoch, training.step)

    def _read(self, path: Path, training: Training) -> dict | None:
        """The state in `path`; None if there is none, or no good one, which is set aside if it is damaged."""
        try:
            state = load(path)
            self._check(state, path, training)
            return state
        except FileNotFoundError:
            return None
        except Damaged as damage:
            set_aside(path, str(damage))
        except OSError as error:  # of the disk; the file may be good
            print(f"warning: {path} cannot be read ({error.strerror}); an older one is used", file=sys.stderr)
        return None

    def _check_identity(self, state: dict) -> None:
        """Raise Damaged if a loaded checkpoint says that it is of another network or of other data."""
        identity = state.get("identity", {})  # older files do not say whose they are
        for key, value in self.identity.items():
            if isinstance(identity, dict) and key in identity and identity[key] != value:
                raise Damaged(f"it is of a run with {key} {identity[key]}")

    def _check(self, state: dict, path: Path, training: Training) -> None:
        """Raise Damaged unless the network can be continued from the state that was loaded from `path`."""
        self._check_identity(state)
        check_weights(training.net, state)
        epoch, step = state.get("epoch"), state.get("step")
        if type(epoch) is not int or type(step) is not int or step < 0 or type(state.get("loss", 0.0)) is not float:
            raise Damaged("it does not say how far training had come")
        state["history"] = check_history(state.get("history"), self.member)
        last = state["history"]["checkpoints"][-1]
        latest = path == self.member.latest_file and last <= epoch <= self.member.epochs
        if not latest and not (path == self.member.checkpoint(epoch) and last == epoch and step == 0):
            raise Damaged("it is of another epoch")
        try:
            training.check_state(state)
        except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise Damaged(f"its optimizer's or random state does not fit the network: {error}") from None
