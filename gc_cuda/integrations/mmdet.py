"""mmdetection's squeeze-and-excitation layer, of two ConvModules."""

from __future__ import annotations

from typing import Any

from torch import nn

from gc_cuda.blocks._parts import (
    Branch,
    Kind,
    Look,
    Recipe,
    Unserved,
    activation,
    convolution,
    gate,
    mean_over_pixels,
    name_of,
)

_CONV_MODULE = ("mmcv.cnn.bricks.conv_module", "ConvModule")


def _read(look: Look, block: Any) -> Recipe:
    mean_over_pixels(look, look.child(block, "global_avgpool"), "global_avgpool")
    first, last = look.child(block, "conv1"), look.child(block, "conv2")
    for name, module in (("conv1", first), ("conv2", last)):
        if name_of(module) != _CONV_MODULE:
            raise Unserved(f"{name} is a {type(module).__name__}, not a ConvModule")
        look.plain(module, name)
        if (
            look.attribute(module, "order") != ("conv", "norm", "act")
            or look.attribute(module, "with_norm")
            or not look.attribute(module, "with_activation")
        ):
            raise Unserved(f"{name} is not a convolution and an activation")
        if look.attribute(module, "with_explicit_padding"):
            raise Unserved(f"{name} pads")
    branch = Branch(_convolution(look, first, "conv1"), None, _convolution(look, last, "conv2"))
    return Recipe(
        None,
        None,
        branch,
        activation(look, look.child(first, "activate"), "conv1.activate"),
        gate(look, look.child(last, "activate"), "conv2.activate"),
    )


def _convolution(look: Look, module: Any, where: str) -> nn.Module:
    return convolution(look, look.child(module, "conv"), f"{where}.conv")


_SE_LAYER = Kind(_read)

KINDS = {
    "mmdet.models.layers.se_layer.SELayer": _SE_LAYER,  # 3.x
    "mmdet.models.utils.se_layer.SELayer": _SE_LAYER,  # 2.x
    "mmseg.models.utils.se_layer.SELayer": _SE_LAYER,
}
