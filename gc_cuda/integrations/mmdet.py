"""mmdetection's squeeze-and-excitation layer, of two ConvModules."""

from __future__ import annotations

from typing import Any

from torch import nn

from gc_cuda._recipe import Branch, Kind, Recipe, Unserved, activation, convolution, gate, part, plain


def _read(block: Any) -> Recipe:
    plain(part(block, "global_avgpool"), "global_avgpool")
    first, last = part(block, "conv1"), part(block, "conv2")
    for name, module in (("conv1", first), ("conv2", last)):
        plain(module, name)
        if module.order != ("conv", "norm", "act") or module.with_norm or not module.with_activation:
            raise Unserved(f"{name} is not a convolution and an activation")
        if module.with_explicit_padding:
            raise Unserved(f"{name} pads")
    branch = Branch(_convolution(first, "conv1"), None, _convolution(last, "conv2"))
    return Recipe(
        None,
        None,
        branch,
        activation(part(first, "activate"), "conv1.activate"),
        gate(part(last, "activate"), "conv2.activate"),
    )


def _convolution(module: Any, where: str) -> nn.Module:
    return convolution(part(module, "conv"), f"{where}.conv")


_SE_LAYER = Kind(_read)

KINDS = {
    "mmdet.models.layers.se_layer.SELayer": _SE_LAYER,  # 3.x
    "mmdet.models.utils.se_layer.SELayer": _SE_LAYER,  # 2.x
    "mmseg.models.utils.se_layer.SELayer": _SE_LAYER,
}
