"""mmdetection's squeeze-and-excitation layer, of two ConvModules, and the bottleneck of its ResNets."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

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
from gc_cuda.blocks._positions import InsertKind
from gc_cuda.blocks._tail import Places, TailKind

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


def _places(bottleneck: Any) -> Places:
    plugins = bottleneck.after_conv3_plugin_names if bottleneck.with_plugins else ()
    return Places(bottleneck.norm3_name, tuple(plugins))


def _stem(bottleneck: Any, x: Tensor) -> Tensor:
    out = bottleneck.relu(bottleneck.norm1(bottleneck.conv1(x)))
    if bottleneck.with_plugins:
        out = bottleneck.forward_plugin(out, bottleneck.after_conv1_plugin_names)
    out = bottleneck.relu(bottleneck.norm2(bottleneck.conv2(out)))
    if bottleneck.with_plugins:
        out = bottleneck.forward_plugin(out, bottleneck.after_conv2_plugin_names)
    return bottleneck.conv3(out)


def _checkpoints(bottleneck: Any, x: Tensor) -> bool:
    return bottleneck.with_cp and x.requires_grad


_BOTTLENECK = "mmdet.models.backbones.resnet.Bottleneck"  # from which ResNeXt's derives

INSERTS = {_BOTTLENECK: InsertKind()}
TAILS = {
    _BOTTLENECK: TailKind(
        _places,
        _stem,
        ("forward", "forward_plugin", "norm1", "norm2", "norm3"),
        checkpoints=_checkpoints,
    )
}
