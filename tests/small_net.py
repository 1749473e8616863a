"""A small model that holds the block, for the tests of what PyTorch does with whole models."""

from __future__ import annotations

import torch
from torch import nn

import gc_cuda

BOTH = ("channel_add", "channel_mul")


class Net(nn.Module):
    """A convolution, the block, what a backbone does after it, a second block, a classifier."""

    def __init__(
        self, block: type[nn.Module] = gc_cuda.ContextBlock, pooling_type: str = "att", channels: int = 16
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.first = block(channels, 1 / 4, pooling_type, BOTH)
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.second = block(channels, 1 / 2, pooling_type, ("channel_add",))
        self.head = nn.Linear(channels, 5)

    def forward(self, x):  # a graph of torch.fx with annotations that are strings cannot be pickled
        x = self.stem(x)
        x = (self.first(x) + x).relu()
        x = self.second(self.down(x)).relu()
        return self.head(x.mean((2, 3)))


def new_net(seed: int = 0, **arguments: object) -> Net:
    """With parameters from the seed, none of them zero: a new block would be the identity."""
    torch.manual_seed(seed)
    net = Net(**arguments)  # type: ignore[arg-type]
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net
