"""What the nodes of a traced graph are, seen from the map: the values that :mod:`.formula` follows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

aten = torch.ops.aten

# Letters of dimensions: images, channels, height, width, and all pixels.
MAP = ("NCHW", "NCS")
LOGITS = ("NHW", "NS")


class Mask(NamedTuple):
    """The parameters of attention pooling."""

    weight: fx.Node
    bias: fx.Node | None


class Map(NamedTuple):
    """x, or x * scale + term, in some shape."""

    scale: fx.Node | None = None
    term: fx.Node | None = None


class Part(NamedTuple):
    """The map after a mean, or a sum, over some of its pixels; weighted by a mask's weights, or not."""

    node: fx.Node
    is_mean: bool
    mask: Mask | None = None


class Logits(NamedTuple):
    """One for each pixel."""

    mask: Mask


class PixelWeights(NamedTuple):
    """Their softmax over the pixels."""

    mask: Mask


class Small(NamedTuple):
    """Without pixels."""

    pooled: bool  # whether it depends on x


class Spread(NamedTuple):
    """Something small, expanded to the map."""

    small: fx.Node


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Its arguments by position: numbers, nodes, lists of both."""
    return node.args


def is_random(node: fx.Node) -> bool:
    """Whether the operation draws random numbers here."""
    if node.target in (aten.dropout.default, aten.feature_dropout.default, aten.dropout_.default):
        _, p, train = arguments(node)
        return bool(train) and p != 0
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def is_pointwise(node: fx.Node) -> bool:
    """Whether a convolution is 1x1, without stride, padding or groups."""
    weight = arguments(node)[1]
    if not isinstance(weight, fx.Node) or tuple(weight.meta["val"].shape[2:]) != (1, 1):
        return False
    stride, padding, _, groups = (*arguments(node)[3:], None, None, None, None)[:4]
    return (
        stride in (None, [1, 1], [1], 1)
        and padding in (None, [0, 0], [0], 0, "same", "valid")
        and groups in (None, 1)
        and not node.kwargs
    )


def key_of(size: Any) -> str:
    return str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


def symbols_of(size: Any) -> set[str]:
    return (
        {str(symbol) for symbol in size.node.expr.free_symbols} if isinstance(size, torch.SymInt) else set()
    )


def is_size(value: Any) -> bool:
    return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def named(node: fx.Node) -> str:
    """The operation, as its author would know it."""
    target = node.target
    name = target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else str(target)
    return name if node.name == name else f"{name} ({node.name})"
