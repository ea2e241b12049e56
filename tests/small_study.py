"""The study's scripts with a CNN small enough for tests, a network like any other: `--network small`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import nn

import convert
import experiments
from models import NETWORKS


def small_cnn(num_classes: int = 10) -> nn.Sequential:
    """Padding, stride, unread rows and two convolutions, as in skinnyprime, with 1,000 times less arithmetic."""
    return nn.Sequential(
        nn.ZeroPad2d(1), nn.Conv2d(3, 4, 4, stride=4), nn.ReLU(), nn.MaxPool2d(3, 2),  # 4 x 8 x 8, then 3 x 3
        nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2),  # 4 x 3 x 3, then 1 x 1
        nn.Flatten(), nn.Linear(4, num_classes),
    )  # fmt: skip


def dropping_cnn(num_classes: int = 10) -> nn.Sequential:
    """The same with dropout."""
    layers = list(small_cnn(num_classes))
    return nn.Sequential(*layers[:-1], nn.Dropout(0.3), layers[-1])


NETWORKS |= {"small": small_cnn, "dropping": dropping_cnn}
SCRIPTS = {"experiments.py": experiments.main, "convert.py": convert.main}


def run(script: str, *arguments: object) -> int:
    """One script in this process, on the CPU and with the small CNN; returns its exit status or raises cli.Stop."""
    network = ["--network", "small"] if script == "experiments.py" else []
    return SCRIPTS[script]([*map(str, arguments), "--device", "cpu", *network])
