"""The networks of the study, and a locally connected layer for PyTorch.

`skinnyprime` is the tied network (a CNN). `LocallyConnected2d` is a convolution whose filters are not shared: one
filter per output position. `convert.py` turns the first into a network of the second.
"""

from torch import Tensor, nn

from rnorm.layers import Geometry, LocallyConnected2d, layer_shapes, pair, unfolded  # noqa: F401


class ConvNet(nn.Module):
    """A tied network: all layers, in order, in the `nn.Sequential` named `net`.

    The name is part of the file format: checkpoints hold `net.1.weight`, `net.1.bias`, ...
    """

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def skinnyprime(num_classes: int = 10) -> ConvNet:
    """The CNN of the study: images (N, 3, 32, 32) to logits (N, num_classes); 64 channels in every layer.

    Source: the released code of arXiv:2206.05317, after arXiv:1906.06766.
    """
    return ConvNet(
        nn.ZeroPad2d(2), nn.Conv2d(3, 64, 4, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2),  # 64 x 17 x 17, then 8 x 8
        nn.ZeroPad2d(2), nn.Conv2d(64, 64, 5), nn.ReLU(), nn.MaxPool2d(3, 2),           # 64 x 8 x 8, then 3 x 3
        nn.ZeroPad2d(1), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(3, 2),           # 64 x 3 x 3, then 1 x 1
        nn.Flatten(), nn.Linear(64, num_classes),
    )  # fmt: skip
