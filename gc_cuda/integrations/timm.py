"""timm's GlobalContext and squeeze-and-excitation modules, and the residual blocks of its ResNets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gc_cuda.blocks._middle import Middle, MiddleKind
from gc_cuda.blocks._parts import (
    Branch,
    Kind,
    Look,
    Recipe,
    Unserved,
    activation,
    convolution,
    gate,
    name_of,
    normalization,
    one_eps,
    squeeze_excite,
)
from gc_cuda.blocks._positions import InsertKind, plugins_after, through
from gc_cuda.blocks._tail import Places, TailKind

_LAYER_NORM = (
    ("timm.layers.norm", "LayerNorm2d"),
    ("timm.layers.norm", "LayerNorm2dFp32"),
    ("timm.models.layers.norm", "LayerNorm2d"),
)
_MLP = (("timm.layers.mlp", "ConvMlp"), ("timm.models.layers.mlp", "ConvMlp"))


def _read_global_context(look: Look, block: Any) -> Recipe:
    mask = look.child(block, "conv_attn")
    if mask is not None:
        mask = convolution(look, mask, "conv_attn")
    mlp_add, mlp_scale = look.child(block, "mlp_add"), look.child(block, "mlp_scale")
    add, mul = _mlp(look, mlp_add, "mlp_add"), _mlp(look, mlp_scale, "mlp_scale")
    if add is None and mul is None:
        raise Unserved("it neither adds nor scales")
    activations = {
        activation(look, look.child(mlp, "act"), f"{name}.act")
        for name, mlp in (("mlp_add", mlp_add), ("mlp_scale", mlp_scale))
        if mlp is not None
    }
    if len(activations) > 1:
        raise Unserved("its branches have different activations")
    kind = gate(look, look.child(block, "gate"), "gate") if mul is not None else "sigmoid"
    return Recipe(mask, add, mul, activations.pop(), kind, one_eps(look, add, mul))


def _mlp(look: Look, mlp: Any, where: str) -> Branch | None:
    if mlp is None:
        return None
    if name_of(mlp) not in _MLP:
        raise Unserved(f"{where} is a {type(mlp).__name__}, not a ConvMlp")
    look.plain(mlp, where)
    drop = look.child(mlp, "drop")
    look.plain(drop, f"{where}.drop")
    if type(drop) is not nn.Identity and look.attribute(drop, "p") != 0:
        raise Unserved(f"{where} has dropout")
    norm = normalization(look, look.child(mlp, "norm"), f"{where}.norm", _LAYER_NORM)
    return Branch(
        convolution(look, look.child(mlp, "fc1"), f"{where}.fc1"),
        norm,
        convolution(look, look.child(mlp, "fc2"), f"{where}.fc2"),
    )


def _read_se_module(look: Look, block: Any) -> Recipe:
    if look.attribute(block, "add_maxpool"):
        raise Unserved("it pools by the maximum too")
    norm = look.child(block, "bn")
    if type(norm) is not nn.Identity:
        raise Unserved(f"norm {type(norm).__name__}")
    look.plain(norm, "bn")
    return squeeze_excite(look, block, "fc1", "act", "fc2", "gate")


def _read_squeeze_excite(look: Look, block: Any) -> Recipe:
    return squeeze_excite(look, block, "conv_reduce", "act1", "conv_expand", "gate")


def _read_senet(look: Look, block: Any) -> Recipe:
    return squeeze_excite(look, block, "fc1", "relu", "fc2", "sigmoid")


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


_CONV_NORM_ACT = (
    ("timm.layers.conv_bn_act", "ConvNormAct"),
    ("timm.models.layers.conv_bn_act", "ConvNormAct"),
)


def convolution_and_norm(look: Look, module: Any, where: str) -> None:
    """Demand a ConvNormAct that calls its convolution and its norm."""
    if name_of(module) not in _CONV_NORM_ACT:
        raise Unserved(f"{where} is a {type(module).__name__}, not a ConvNormAct")
    look.plain(module, where)
    if look.child(module, "aa") is not None:
        raise Unserved(f"{where} has anti-aliasing")


SLOT = "se"  # timm's own forward runs what stands there after the last norm


def _bottleneck_stem(bottleneck: Any, x: Tensor) -> Tensor:
    out = bottleneck.act1(bottleneck.bn1(bottleneck.conv1(x)))
    out = through(bottleneck, plugins_after(bottleneck, "after_conv1"), out)
    out = bottleneck.drop_block(bottleneck.bn2(bottleneck.conv2(out)))
    out = bottleneck.aa(bottleneck.act2(out))  # aa has the stride of conv2, where it is no identity
    return bottleneck.conv3(through(bottleneck, plugins_after(bottleneck, "after_conv2"), out))


def _bottleneck_forward() -> Callable[..., Tensor]:
    """The forward of a Bottleneck with blocks after conv1 and conv2, which timm's has no place for."""

    def forward(self: Any, own_forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        out = self.bn3(_bottleneck_stem(self, x))
        for name in (SLOT, "drop_path"):
            if getattr(self, name) is not None:
                out = getattr(self, name)(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.act3(out)

    return forward


INSERTS = {
    "timm.models.resnet.Bottleneck": InsertKind(
        _bottleneck_forward,
        SLOT,
        ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3", "act3"),
    )
}


def _basic_stem(block: Any, x: Tensor) -> Tensor:
    out = block.drop_block(block.bn1(block.conv1(x)))
    return block.conv2(block.aa(block.act1(out)))


def _legacy_stem(bottleneck: Any, x: Tensor) -> Tensor:
    out = bottleneck.relu(bottleneck.bn1(bottleneck.conv1(x)))
    out = bottleneck.relu(bottleneck.bn2(bottleneck.conv2(out)))
    return bottleneck.conv3(out)


TAILS = {
    "timm.models.resnet.Bottleneck": TailKind(
        lambda bottleneck: Places("bn3", (SLOT,), "act3", "drop_path"), _bottleneck_stem
    ),
    "timm.models.resnet.BasicBlock": TailKind(
        lambda block: Places("bn2", (SLOT,), "act2", "drop_path"), _basic_stem
    ),
    # Its SEResNetBlock has a ReLU before its block, and no tail.
    "timm.models.senet.Bottleneck": TailKind(
        lambda bottleneck: Places("bn3", ("se_module",)), _legacy_stem, in_place=False
    ),
    "timm.models.tresnet.BasicBlock": TailKind(
        lambda block: Places("conv2.bn", ("se",), "act", "drop_path"),
        lambda block, x: block.conv2.conv(block.conv1(x)),
        in_place=False,
    ),
}


def _present(*modules: Any) -> tuple[Any, ...]:
    return tuple(module for module in modules if module is not None)


def _space_to_depth(residual: Any, x: Tensor) -> Tensor:
    if getattr(residual, "conv_s2d", None) is None:  # which old versions lack
        return x
    return residual.bn_s2d(residual.conv_s2d(x))


def _with_skip(residual: Any, out: Tensor, x: Tensor) -> Tensor:
    return residual.drop_path(out) + x if residual.has_skip else out


def _before_inverted(residual: Any, x: Tensor) -> Tensor:
    return residual.conv_dw(residual.bn1(residual.conv_pw(_space_to_depth(residual, x))))


_INVERTED = MiddleKind(
    lambda residual: Middle(residual.bn2, None, _present(residual.aa), residual.se),
    _before_inverted,
    lambda residual, out, x: _with_skip(residual, residual.bn3(residual.conv_pwl(out)), x),
)
_SEPARABLE = MiddleKind(
    lambda residual: Middle(residual.bn1, None, _present(residual.aa), residual.se),
    lambda residual, x: residual.conv_dw(_space_to_depth(residual, x)),
    lambda residual, out, x: _with_skip(residual, residual.bn2(residual.conv_pw(out)), x),
)


def _after_regnet(residual: Any, out: Tensor, x: Tensor) -> Tensor:
    out = residual.conv3(out)
    if residual.downsample is not None:
        out = residual.drop_path(out) + residual.downsample(x)
    return residual.act3(out)


_REGNET = MiddleKind(
    lambda residual: Middle(residual.conv2.bn, None, _present(residual.conv2.aa), residual.se),
    lambda residual, x: residual.conv2.conv(residual.conv1(x)),
    _after_regnet,
    lambda residual: (residual.conv2,),
)


def _after_byob(residual: Any, out: Tensor, x: Tensor) -> Tensor:
    out = residual.drop_path(residual.attn_last(residual.conv3_1x1(out)))
    if residual.shortcut is not None:
        out = out + residual.shortcut(x)
    return residual.act(out)


_BYOB = MiddleKind(
    lambda residual: Middle(
        residual.conv2_kxk.bn,
        None,
        _present(residual.conv2_kxk.aa, residual.conv2b_kxk),
        residual.attn,
    ),
    lambda residual, x: residual.conv2_kxk.conv(residual.conv1_1x1(x)),
    _after_byob,
    lambda residual: (residual.conv2_kxk,),
)

MIDDLES = {
    "timm.models._efficientnet_blocks.InvertedResidual": _INVERTED,
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": _SEPARABLE,
    "timm.models.regnet.Bottleneck": _REGNET,
    "timm.models.byobnet.BottleneckBlock": _BYOB,
}
