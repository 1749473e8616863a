"""torchvision's squeeze-and-excitation, and the bottleneck of its ResNets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gc_cuda.blocks._middle import Middle, MiddleKind
from gc_cuda.blocks._parts import Kind, Look, Recipe, Unserved, mean_over_pixels, name_of, squeeze_excite
from gc_cuda.blocks._positions import NAME, InsertKind, plugins_after, through
from gc_cuda.blocks._tail import Places, TailKind


def _read(look: Look, block: Any) -> Recipe:
    mean_over_pixels(look, look.child(block, "avgpool"), "avgpool")
    return squeeze_excite(look, block, "fc1", "activation", "fc2", "scale_activation")


def _plugins(bottleneck: Any, position: str) -> Sequence[str]:
    """The names of the blocks there; gc_cuda 0.1.0 had one position, and pickled none."""
    if position == "after_conv3" and "with_plugins" not in bottleneck.__dict__ and hasattr(bottleneck, NAME):
        return (NAME,)
    return plugins_after(bottleneck, position)


def _stem(bottleneck: Any, x: Tensor) -> Tensor:
    out = bottleneck.relu(bottleneck.bn1(bottleneck.conv1(x)))
    out = through(bottleneck, plugins_after(bottleneck, "after_conv1"), out)
    out = bottleneck.relu(bottleneck.bn2(bottleneck.conv2(out)))
    out = through(bottleneck, plugins_after(bottleneck, "after_conv2"), out)
    return bottleneck.conv3(out)


def _bottleneck_forward() -> Callable[..., Tensor]:
    """The forward of a Bottleneck with blocks."""

    def forward(self: Any, own_forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        out = through(self, _plugins(self, "after_conv3"), self.bn3(_stem(self, x)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)

    return forward


INSERTS = {"torchvision.models.resnet.Bottleneck": InsertKind(_bottleneck_forward, plugins=_plugins)}

KINDS = {"torchvision.ops.misc.SqueezeExcitation": Kind(_read, ("forward", "_scale"))}
TAILS = {
    "torchvision.models.resnet.Bottleneck": TailKind(
        lambda bottleneck: Places("bn3", tuple(_plugins(bottleneck, "after_conv3"))), _stem, inserted=True
    )
}

_CONV_NORM_ACT = ("torchvision.ops.misc", "Conv2dNormActivation")


def _is_block(module: Any) -> bool:
    derived = getattr(type(module), "_gc_derivation", None)  # gc_cuda.models.swap, which imports this file
    kind = type(module) if derived is None else derived.original
    return f"{kind.__module__}.{kind.__qualname__}" in KINDS


def _in_a_row(row: Callable[[Any], Any], add: Callable[[Any, Tensor, Tensor], Tensor]) -> MiddleKind:
    """The kind of what calls the modules of a Sequential in turn, one of them the block."""

    def split(residual: Any) -> tuple[list[Any], Any, Any, list[Any]]:
        """What is before; convolution, norm and activation in one; the block; what is after."""
        modules = list(row(residual))
        place = next((i for i, one in enumerate(modules) if _is_block(one)), 0)
        if place == 0 or name_of(modules[place - 1]) != _CONV_NORM_ACT or len(modules[place - 1]) != 3:
            raise Unserved("there is no convolution with norm and activation before the block")
        return modules[: place - 1], modules[place - 1], modules[place], modules[place + 1 :]

    def middle(residual: Any) -> Middle:
        _, (_, norm, act), block, _ = split(residual)
        return Middle(norm, act, (), block)

    def before(residual: Any, x: Tensor) -> Tensor:
        modules, (convolution, _, _), _, _ = split(residual)
        for module in modules:
            x = module(x)
        return convolution(x)

    def after(residual: Any, out: Tensor, x: Tensor) -> Tensor:
        for module in split(residual)[-1]:
            out = module(out)
        return add(residual, out, x)

    def containers(residual: Any) -> tuple[Any, ...]:
        inside = () if row(residual) is residual else (row(residual),)
        return *inside, split(residual)[1]

    return MiddleKind(middle, before, after, containers)


def _res_connect(residual: Any, out: Tensor, x: Tensor) -> Tensor:
    if residual.use_res_connect:
        out += x
    return out


def _stochastic(residual: Any, out: Tensor, x: Tensor) -> Tensor:
    return _res_connect(residual, residual.stochastic_depth(out) if residual.use_res_connect else out, x)


MIDDLES = {
    "torchvision.models.mobilenetv3.InvertedResidual": _in_a_row(lambda one: one.block, _res_connect),
    "torchvision.models.efficientnet.MBConv": _in_a_row(lambda one: one.block, _stochastic),
    "torchvision.models.regnet.BottleneckTransform": _in_a_row(lambda one: one, lambda _, out, x: out),
}
