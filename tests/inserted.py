"""What the tests of gc_cuda.insert share: a bottleneck with a block at a position, written by hand."""

from __future__ import annotations

import copy
from typing import Any

from small_steps import assert_same_steps, steps
from torch import Tensor, nn
from whole_models import awake

import gc_cuda
from gc_cuda import reference

POSITIONS = ("after_conv1", "after_conv2", "after_conv3")


class Inner(nn.Module):
    """A module under the name that ByHand gives it, so that parameters have one name in both."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class ByHand(Inner):
    """conv1, norm, ReLU; conv2, norm, ReLU; conv3, norm; plus the shortcut, ReLU; eager blocks between."""

    def __init__(self, inner: Any, blocks: dict[str, str]) -> None:
        super().__init__(copy.deepcopy(inner))
        self.blocks = {position: self.inner.get_submodule(name) for position, name in blocks.items()}
        for block in self.blocks.values():
            assert type(block) is gc_cuda.ContextBlock
            block.__class__ = reference.ContextBlock

    def forward(self, x: Tensor) -> Tensor:
        b, out = self.inner, x
        parts = ((b.conv1, b.bn1), (b.conv2, b.bn2), (b.conv3, b.bn3))
        for (convolution, norm), position in zip(parts, POSITIONS):
            out = norm(convolution(out))
            if position != "after_conv3":
                out = out.relu()
            if position in self.blocks:
                out = self.blocks[position](out)
        return (out + (x if b.downsample is None else b.downsample(x))).relu()


def check_by_hand(bottleneck: Any, blocks: dict[str, str], x: Tensor) -> None:
    """Outputs, gradients and statistics of training, in float64; blocks: their names by position."""
    ours = awake(Inner(bottleneck)).train()
    theirs = ByHand(bottleneck, blocks).train()
    assert_same_steps(steps(ours, x, 2), steps(theirs, x, 2))


def check_positions(model: Any, position: str, name: str) -> None:
    """Of a whole model: c3 to c5, and the channels of the convolution."""
    stages = [getattr(model, f"layer{i}") for i in (1, 2, 3, 4)]
    names = gc_cuda.insert(model, position=position)
    assert len(names) == sum(len(stage) for stage in stages[1:])
    assert names[0] == f"layer2.0.{name}"
    for one in names:
        bottleneck = model.get_submodule(one.rpartition(".")[0])
        block = model.get_submodule(one)
        assert block.in_channels == getattr(bottleneck, position.removeprefix("after_")).out_channels
