"""timm's GlobalContext and its three squeeze-and-excitation modules, and the bottleneck of its ResNets."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from gc_cuda._recipe import (
    Branch,
    Kind,
    Recipe,
    Unserved,
    activation,
    convolution,
    gate,
    normalization,
    one_eps,
    plain,
)

_LAYER_NORM = (
    ("timm.layers.norm", "LayerNorm2d"),
    ("timm.layers.norm", "LayerNorm2dFp32"),
    ("timm.models.layers.norm", "LayerNorm2d"),
)


def _read_global_context(block: Any) -> Recipe:
    mask = None
    if block.conv_attn is not None:
        mask = convolution(block.conv_attn, "conv_attn", bias=False)
    add, mul = _mlp(block.mlp_add, "mlp_add"), _mlp(block.mlp_scale, "mlp_scale")
    if add is None and mul is None:
        raise Unserved("it neither adds nor scales")
    activations = {
        activation(mlp.act, f"{name}.act")
        for name, mlp in (("mlp_add", block.mlp_add), ("mlp_scale", block.mlp_scale))
        if mlp is not None
    }
    if len(activations) > 1:
        raise Unserved("its branches have different activations")
    kind = gate(block.gate, "gate") if mul is not None else "sigmoid"
    return Recipe(mask, add, mul, activations.pop(), kind, one_eps(add, mul))


def _mlp(mlp: Any, where: str) -> Branch | None:
    if mlp is None:
        return None
    if type(mlp).__name__ != "ConvMlp":
        raise Unserved(f"{where} is a {type(mlp).__name__}, not a ConvMlp")
    plain(mlp, where)
    plain(mlp.drop, f"{where}.drop")
    if getattr(mlp.drop, "p", 0) != 0:
        raise Unserved(f"{where} has dropout")
    norm = normalization(mlp.norm, f"{where}.norm", _LAYER_NORM)
    return Branch(convolution(mlp.fc1, f"{where}.fc1"), norm, convolution(mlp.fc2, f"{where}.fc2"))


def _read_se_module(block: Any) -> Recipe:
    if block.add_maxpool:
        raise Unserved("it pools by the maximum too")
    if type(block.bn) is not nn.Identity:
        raise Unserved(f"norm {type(block.bn).__name__}")
    plain(block.bn, "bn")
    branch = Branch(convolution(block.fc1, "fc1"), None, convolution(block.fc2, "fc2"))
    return Recipe(None, None, branch, activation(block.act, "act"), gate(block.gate, "gate"))


def _read_squeeze_excite(block: Any) -> Recipe:
    branch = Branch(
        convolution(block.conv_reduce, "conv_reduce"), None, convolution(block.conv_expand, "conv_expand")
    )
    return Recipe(None, None, branch, activation(block.act1, "act1"), gate(block.gate, "gate"))


def _read_senet(block: Any) -> Recipe:
    branch = Branch(convolution(block.fc1, "fc1"), None, convolution(block.fc2, "fc2"))
    return Recipe(None, None, branch, activation(block.relu, "relu"), gate(block.sigmoid, "sigmoid"))


SLOT = "se"  # timm's own forward runs what stands there after the last norm
BOTTLENECK_FORWARD = None


def bottleneck_class() -> Any:
    """timm's Bottleneck, or None before anyone has imported it."""
    module = sys.modules.get("timm.models.resnet")
    return None if module is None else module.Bottleneck


# Before 0.9 the layers were in timm.models.layers, and the private modules had no underscore.
KINDS = {
    "timm.layers.global_context.GlobalContext": Kind(_read_global_context),
    "timm.models.layers.global_context.GlobalContext": Kind(_read_global_context),
    "timm.layers.squeeze_excite.SEModule": Kind(_read_se_module),
    "timm.models.layers.squeeze_excite.SEModule": Kind(_read_se_module),
    "timm.models._efficientnet_blocks.SqueezeExcite": Kind(_read_squeeze_excite),
    "timm.models.efficientnet_blocks.SqueezeExcite": Kind(_read_squeeze_excite),
    "timm.models.senet.SEModule": Kind(_read_senet),
}
