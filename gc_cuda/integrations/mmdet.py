"""mmdetection's squeeze-and-excitation layer, of two ConvModules."""

from __future__ import annotations

from typing import Any

from torch import nn

from gc_cuda._recipe import Branch, Kind, Recipe, Unserved, activation, convolution, gate, plain


def _read(block: Any) -> Recipe:
    plain(block.global_avgpool, "global_avgpool")
    for name in ("conv1", "conv2"):
        module = getattr(block, name)
        plain(module, name)
        if module.order != ("conv", "norm", "act") or module.with_norm or not module.with_activation:
            raise Unserved(f"{name} is not a convolution and an activation")
        if module.with_explicit_padding:
            raise Unserved(f"{name} pads")
    branch = Branch(_convolution(block.conv1, "conv1"), None, _convolution(block.conv2, "conv2"))
    return Recipe(
        None,
        None,
        branch,
        activation(block.conv1.activate, "conv1.activate"),
        gate(block.conv2.activate, "conv2.activate"),
    )


def _convolution(module: Any, where: str) -> nn.Module:
    return convolution(module.conv, f"{where}.conv")


_SE_LAYER = Kind(_read)

KINDS = {
    "mmdet.models.layers.se_layer.SELayer": _SE_LAYER,  # 3.x
    "mmdet.models.utils.se_layer.SELayer": _SE_LAYER,  # 2.x
    "mmseg.models.utils.se_layer.SELayer": _SE_LAYER,
}
