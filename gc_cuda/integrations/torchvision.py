"""torchvision's squeeze-and-excitation, and the bottleneck of its ResNets."""

from __future__ import annotations

from typing import Any

from gc_cuda._recipe import Branch, Kind, Recipe, activation, convolution, gate, plain


def _read(block: Any) -> Recipe:
    plain(block.avgpool, "avgpool")
    branch = Branch(convolution(block.fc1, "fc1"), None, convolution(block.fc2, "fc2"))
    return Recipe(
        None,
        None,
        branch,
        activation(block.activation, "activation"),
        gate(block.scale_activation, "scale_activation"),
    )


KINDS = {"torchvision.ops.misc.SqueezeExcitation": Kind(_read, ("forward", "_scale"))}
