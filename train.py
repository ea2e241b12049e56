"""Training: the step of SGD, an epoch, and a network from wherever it stands to its last epoch.

To change what is learned, change `sgd_step`: the loss, its backward pass and the update are there, and nowhere else.
A schedule of the learning rate is a line at the top of `train_epoch`, such as
`training.sgd.factor = 0.1 if training.epoch >= 100 else 1.0`.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import make_network
from rnorm.cli import ENVIRONMENT, Stop
from rnorm.data import Data
from rnorm.fast import Captured, keep_freed_memory, streamline
from rnorm.files import is_out_of_memory
from rnorm.history import History, append, append_divergence, has_diverged, has_ended
from rnorm.layers import LocallyConnected2d
from rnorm.measure import evaluate
from rnorm.progress import Progress
from rnorm.runs import Member, Settings
from rnorm.signals import check_signals
from rnorm.store import Store, check_tensor, copied


class SGD:
    """Stochastic gradient descent with a learning rate for each parameter.

    For a parameter w with gradient g and velocity v, which begins at 0:
        v <- momentum * v + g + weight_decay * (lr / rate) * w
        w <- w - factor * rate * v
    The same as `torch.optim.SGD`, bit for bit, but for the decay: it is that of the network's own rate `lr`, so a tied
    filter, whose rate is lower, decays no slower than the filters of its eLCN. Source of the rule: Sutskever et al.
    (2013), "On the importance of initialization and momentum in deep learning", in torch's form.

    Args:
        net: the network; the steps change its parameters. Those without a gradient stay as they are.
        rates: a learning rate for each of net.parameters(), in that order. Raises ValueError for another number.
        lr: the learning rate of the network as a whole.

    Attributes:
        factor: multiplies all rates; a schedule sets it.
    """

    def __init__(self, net: nn.Sequential, rates: list[float], lr: float, momentum: float = 0, weight_decay: float = 0):
        self.parameters, self.rates, self.factor = list(net.parameters()), rates, 1.0
        if len(rates) != len(self.parameters):
            raise ValueError(f"{len(rates)} learning rates for {len(self.parameters)} parameters")
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.groups: dict[float, list[int]] = {}  # a rate to the parameters that have it, by their numbers
        for i, rate in enumerate(rates):
            self.groups.setdefault(rate, []).append(i)
        self.velocities: dict[int, Tensor] = {}
        if momentum:
            self.velocities = {i: torch.zeros_like(p) for i, p in enumerate(self.parameters) if p.requires_grad}
        self.untied = [layer for layer in net if isinstance(layer, LocallyConnected2d)]
        if momentum or weight_decay:
            self.untied = []

    @contextlib.contextmanager
    def within_backward(self) -> Iterator[None]:
        """In a forward pass within it, untied layers are told to take their weights' steps in the backward pass.

        So their gradients, the largest tensors of all, are never stored. Only in plain SGD.
        """
        rates = dict(zip(map(id, self.parameters), self.rates))
        try:
            for layer in self.untied:
                layer.fused_step = self.factor * rates[id(layer.weight)]
            yield
        finally:
            for layer in self.untied:
                layer.fused_step = None

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for rate, group in self.groups.items():
            group = [i for i in group if self.parameters[i].grad is not None]
            weights = [self.parameters[i] for i in group]
            updates = [weight.grad for weight in weights]
            if not weights:
                continue
            if self.weight_decay:
                updates = torch._foreach_add(updates, weights, alpha=self.weight_decay * (self.lr / rate))
            if self.momentum:
                velocities = [self.velocities[i] for i in group]
                torch._foreach_mul_(velocities, self.momentum)
                torch._foreach_add_(velocities, updates)
                updates = velocities
            torch._foreach_sub_(weights, updates, alpha=self.factor * rate)

    def numbered_velocities(self) -> dict[int, Tensor]:
        """The velocities by the numbers that `torch.optim.SGD` gives the parameters, group by group."""
        order = [i for group in self.groups.values() for i in group]
        return {n: self.velocities[i] for n, i in enumerate(order) if i in self.velocities}

    def state_dict(self) -> dict:
        """As that of `torch.optim.SGD` with a group for each rate; a copy, on the CPU."""
        off = {"dampening": 0, "nesterov": False, "maximize": False, "foreach": None, "differentiable": False}
        groups, count = [], 0
        for rate, group in self.groups.items():
            numbers, decay = list(range(count, count + len(group))), self.weight_decay * (self.lr / rate)
            groups.append({"lr": rate, "momentum": self.momentum, "weight_decay": decay, **off, "fused": None})
            groups[-1]["params"], count = numbers, count + len(group)
        buffers = {n: {"momentum_buffer": copied(v)} for n, v in self.numbered_velocities().items()}
        return {"state": buffers, "param_groups": groups}

    def load_state_dict(self, state: dict) -> None:
        """Take the velocities of a state dict; 0 where it has none."""
        for n, velocity in self.numbered_velocities().items():
            velocity.zero_()
            if n in state["state"]:
                velocity.copy_(state["state"][n]["momentum_buffer"])


def sgd_step(net: nn.Module, sgd: SGD, x: Tensor, y: Tensor) -> Tensor:
    """One step on images x (N, C, H, W) and labels y (N,); returns the loss before it, a scalar on the device."""
    with sgd.within_backward():
        loss = F.cross_entropy(net(x), y)
    net.zero_grad()
    loss.backward()
    sgd.step()
    return loss.detach()


@dataclass
class Training:
    """A network in training, as far as it has come."""

    member: Member
    net: nn.Sequential
    sgd: SGD
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the next epoch
    history: History = field(default_factory=dict)

    def __post_init__(self):
        parameter = next(self.net.parameters())
        self.loss = torch.zeros((), dtype=torch.float64, device=parameter.device)  # the sum over this epoch's steps
        self.random = None  # what dropout draws from
        if any(isinstance(layer, (nn.Dropout, nn.Dropout2d)) for layer in self.net):
            self.random = torch.default_generator
            if parameter.is_cuda:
                self.random = torch.cuda.default_generators[parameter.device.index]

    @property
    def ended(self) -> bool:
        """Whether nothing is left to train."""
        return has_ended(self.history, self.member)

    @property
    def diverged(self) -> bool:
        return bool(self.history) and has_diverged(self.history)

    @property
    def due(self) -> bool:
        """Whether the network is to be evaluated as it stands."""
        evaluated = self.history.get("checkpoints", [])
        return self.step == 0 and self.epoch in self.member.evaluations and self.epoch not in evaluated

    def state(self) -> dict:
        """What to continue from, beside the weights: a copy, whose tensors are the CPU's."""
        optimizer = self.sgd.state_dict()
        if (self.epoch, self.step) == (0, 0):
            optimizer["state"] = {}  # as torch has it before the first step
        state = {"optimizer": optimizer, "epoch": self.epoch, "step": self.step, "history": self.history}
        if self.random:
            state["random"] = self.random.get_state()
        return state | {"loss": self.loss.item()}

    def check_state(self, state: dict) -> None:
        """Raise Damaged, or what Python raises, unless `load_state` can take the state."""
        buffers = self.sgd.numbered_velocities()
        saved = state["optimizer"]["state"] if buffers else {}
        if saved.keys() != buffers.keys() and (saved or state["epoch"] or state["step"]):
            raise ValueError("other parameters have a velocity")
        for n in saved:
            check_tensor(saved[n]["momentum_buffer"], buffers[n], f"velocity {n}")
        if self.random and state["random"].shape == self.random.get_state().shape:
            torch.Generator(self.random.device).set_state(state["random"])

    def load_state(self, state: dict) -> None:
        """Continue from a state that `check_state` has passed."""
        self.sgd.load_state_dict(state["optimizer"])
        if self.random and state["random"].shape == self.random.get_state().shape:  # else it is of another device
            self.random.set_state(state["random"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        self.loss.fill_(state.get("loss", 0.0))


def make_step(net: nn.Sequential, sgd: SGD, batch_size: int) -> Captured:
    """`sgd_step` of a streamlined network, on CUDA as a graph: a function of x and y that returns the loss."""
    keep_freed_memory()
    changed = [*net.parameters(), *net.buffers(), *sgd.velocities.values()]
    return Captured(functools.partial(sgd_step, net, sgd), batch_size, changed, lambda: sgd.factor)


def start_cnn(cnn: Member, data: Data) -> Training:
    """The CNN of a run before any training, on the device of `data`."""
    settings = cnn.settings
    torch.manual_seed(settings.seed)
    net = make_network(settings.network, data.num_classes, data.image_shape)
    net.to(data.x_train.device, data.x_train.dtype, memory_format=torch.channels_last)
    torch.manual_seed(settings.seed)  # of dropout
    rates = [cnn.lr for _ in net.parameters()]
    return Training(cnn, net, SGD(net, rates, cnn.lr, settings.momentum, settings.weight_decay))


def epoch_order(n: int, settings: Settings, epoch: int) -> Tensor | None:
    """The order of the training images in epoch `epoch` of any network; None: as they lie in the data set."""
    if not settings.shuffle:
        return None
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator)


def train_epoch(
    training: Training, take_step: Captured, data: Data, store: Store | None = None, progress: Progress | None = None
) -> bool:
    """Train to the end of the epoch that `training` stands in; returns whether the loss is finite.

    `progress`, if given, is told of every step, and `store`, if given, saves now and then.
    """
    x, y, size = data.x_train, data.y_train, training.member.settings.batch_size
    order = epoch_order(len(x), training.member.settings, training.epoch)
    if order is not None:
        order = order.to(x.device)
    training.net.train()
    for start in range(training.step * size, len(x), size):
        check_signals()
        batch = slice(start, start + size)
        if order is not None:
            batch = order[batch]
        training.loss += take_step(x[batch], y[batch])
        training.step += 1
        if progress:
            progress.stepped(len(y[batch]))
        if store:
            store.save_soon(training)
    training.epoch, training.step = training.epoch + 1, 0
    finite = math.isfinite(training.loss.item())  # the only time in an epoch that the device is waited for
    training.loss.zero_()
    return finite


def train(training: Training, store: Store, data: Data, progress: Progress) -> bool:
    """Train a network to its last epoch; returns whether its loss stayed finite.

    Evaluates and saves it at its evaluations, saves it now and then and when interrupted. A network whose loss is no
    longer finite ends there, and its history says so. One that has ended is not trained.
    """
    member = training.member
    progress.begin(member, training.epoch, training.step, training.ended)
    if training.ended:
        state = f"diverged in epoch {training.history['checkpoints'][-1]}" if training.diverged else "complete"
        print(f"{member.label}: {state}")
        return not training.diverged
    if training.history:
        print(f"{member.label}: continues in epoch {min(training.epoch + 1, member.epochs)}")
    fast = streamline(training.net, data.image_shape)
    take_step = make_step(fast, training.sgd, member.settings.batch_size)
    try:
        while not training.ended:
            if training.due:
                values = evaluate(training.net, fast, data)
                finite = math.isfinite(values["train_loss"] + values["test_loss"])
                if finite:
                    training.history = append(training.history, training.epoch, values)
                    store.record(training)
                    progress.recorded(training.epoch, values)
            else:
                finite = train_epoch(training, take_step, data, store, progress)
            if not finite:
                training.history = append_divergence(training.history, training.epoch)
                store.record_divergence(training)
    except KeyboardInterrupt:
        store.save_latest(training)
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # Nothing is saved now: memory may have ended in the midst of a step, when some weights had taken it.
        message = f"{member.label}: out of memory; lower --batch_size. What was saved before is intact"
        raise Stop(message, ENVIRONMENT) from None
    finally:
        store.wait()
        progress.bar.clear()
    if training.diverged:
        remedy = "lower its learning rate" + (" or --weight_decay" if member.settings.weight_decay else "")
        print(f"{member.label}: the loss is no longer finite in epoch {training.epoch}; {remedy}", file=sys.stderr)
    return not training.diverged
