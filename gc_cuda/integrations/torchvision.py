"""torchvision's squeeze-and-excitation, and the bottleneck of its ResNets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gc_cuda.blocks._parts import Kind, Look, Recipe, mean_over_pixels, squeeze_excite
from gc_cuda.blocks._tail import Places, TailKind


def _read(look: Look, block: Any) -> Recipe:
    mean_over_pixels(look, look.child(block, "avgpool"), "avgpool")
    return squeeze_excite(look, block, "fc1", "activation", "fc2", "scale_activation")


SLOT = "context_block"  # mmdetection's name


def bottleneck_class() -> Any:
    """torchvision's Bottleneck, or None before anyone has imported it."""
    module = sys.modules.get("torchvision.models.resnet")
    return None if module is None else module.Bottleneck


def _stem(bottleneck: Any, x: Tensor) -> Tensor:
    out = bottleneck.relu(bottleneck.bn1(bottleneck.conv1(x)))
    out = bottleneck.relu(bottleneck.bn2(bottleneck.conv2(out)))
    return bottleneck.conv3(out)


def _bottleneck_forward() -> Callable[..., Tensor]:
    """The forward of a Bottleneck with a block in its slot."""

    def forward(self: Any, own_forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        out = self.context_block(self.bn3(_stem(self, x)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)

    return forward


BOTTLENECK_FORWARD = _bottleneck_forward

KINDS = {"torchvision.ops.misc.SqueezeExcitation": Kind(_read, ("forward", "_scale"))}
TAILS = {
    "torchvision.models.resnet.Bottleneck": TailKind(
        lambda bottleneck: Places("bn3", (SLOT,)), _stem, inserted=True
    )
}
