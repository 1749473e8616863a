"""What each of PyTorch's operations makes of the map; what is not here ends a formula.

A function takes the follower of a graph and a node, and returns what the node is, or None where the operation
does something else to the map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from gc_cuda.blocks._parts import Unserved
from gc_cuda.recognition.values import (
    LOGITS,
    MAP,
    Logits,
    Map,
    Mask,
    Part,
    PixelWeights,
    Small,
    Spread,
    arguments,
    aten,
    is_pointwise,
    is_size,
    named,
)


def _same_map(self: Any, node: fx.Node) -> Any:
    """The same numbers in the same order, in another shape."""
    value = self.values.get(arguments(node)[0])
    letters = {Map: MAP, Logits: LOGITS, PixelWeights: LOGITS, Spread: ()}.get(type(value), ())
    if isinstance(value, Part):
        return value if self.dims(node) == self.dims(arguments(node)[0]) else None
    return value if self.dims(node) in letters else None


def _expand(self: Any, node: fx.Node) -> Any:
    return self.expand(node)


def _mean(self: Any, node: fx.Node) -> Any:
    value = self.values[arguments(node)[0]]
    dims = arguments(node)[1] if len(arguments(node)) > 1 else None
    if value == Map():
        value = Part(node, True)
    if not isinstance(value, Part) or not value.is_mean or value.mask is not None or not dims:
        return None
    return _left(self, node, dims, value)


def _left(self: Any, node: fx.Node, dims: Any, part: Part) -> Any:
    """What a mean or a sum over those dimensions leaves."""
    if set(self.reduced(node, dims)) - set("HWS"):
        return None
    left = self.dims(node)
    if left == "NC":
        return self.context(node, part.mask) if part.is_mean or part.mask is not None else part
    return part if left in ("NCH", "NCW") else None


def _sum(self: Any, node: fx.Node) -> Any:
    value = self.values[arguments(node)[0]]
    dims = arguments(node)[1] if len(arguments(node)) > 1 else None
    if value == Map():
        value = Part(node, False)
    if not isinstance(value, Part) or value.is_mean or not dims:
        return None
    return _left(self, node, dims, value)


def _divide(self: Any, node: fx.Node) -> Any:
    """A sum over the pixels becomes their mean."""
    value, divisor = self.values.get(arguments(node)[0]), arguments(node)[1]
    if not isinstance(value, Part) or value.is_mean or value.mask is not None or self.dims(node) != "NC":
        return None
    if not isinstance(divisor, fx.Node) or not is_size(divisor.meta.get("val")):
        return None
    return self.context(node, None) if self.letter(divisor.meta["val"]) == "S" else None


def _average(self: Any, node: fx.Node) -> Any:
    size = arguments(node)[1]
    if self.values[arguments(node)[0]] != Map() or size not in ([1], [1, 1], 1):
        return None
    return self.context(node, None) if self.dims(node) == "NC" else None


def _convolution(self: Any, node: fx.Node) -> Any:
    """One logit of each pixel."""
    x, weight, bias, *_ = (*arguments(node), None)
    if self.values.get(x) != Map() or not is_pointwise(node):
        return None
    if not isinstance(weight, fx.Node) or weight.meta["val"].shape[0] != 1 or self.dims(node) != "NHW":
        return None
    if any(isinstance(one, fx.Node) and one.op != "get_attr" for one in (weight, bias)):
        return None  # they are computed
    return Logits(Mask(weight, bias if isinstance(bias, fx.Node) else None))


def _softmax(self: Any, node: fx.Node) -> Any:
    value, dim = self.values[arguments(node)[0]], arguments(node)[1]
    if (
        not isinstance(value, Logits)
        or any(one not in (None, False) for one in arguments(node)[2:])
        or node.kwargs
    ):
        return None
    return PixelWeights(value.mask) if self.reduced(node, dim) == "S" else None


def _product(self: Any, node: fx.Node) -> Any:
    """The map times the weights, summed over the pixels."""
    x, weights = arguments(node)
    value = self.values.get(weights)
    if self.values.get(x) != Map() or not isinstance(value, PixelWeights):
        return None
    if not (self.all_dims(x).endswith("CS") and self.all_dims(weights).endswith("S1")):
        return None
    return self.context(node, value.mask) if self.dims(node) == "NC" else None


def _einsum(self: Any, node: fx.Node) -> Any:
    """The same product, spelled by letters of its author's."""
    equation, operands = arguments(node)[0], arguments(node)[1]
    labels, arrow, result = str(equation).replace(" ", "").partition("->")
    each = labels.split(",")
    if not arrow or len(each) != 2 or "." in labels:
        return None
    ours: dict[str, str] = {}  # an author's letter: that of the dimension
    for names, operand in zip(each, operands):
        for name, letter in zip(names, self.all_dims(operand)):
            if ours.setdefault(name, letter) != letter:
                return None
    maps = [one for one in operands if self.values.get(one) == Map()]
    masks = [value.mask for value in map(self.values.get, operands) if isinstance(value, PixelWeights)]
    summed = "".join(letter for name, letter in ours.items() if name not in result).replace("1", "")
    kept = "".join(ours[name] for name in result).replace("1", "")
    return (
        self.context(node, masks[0]) if (len(maps), len(masks), summed, kept) == (1, 1, "S", "NC") else None
    )


def _multiply(self: Any, node: fx.Node) -> Any:
    x, other = _ordered(self, node)
    value, by = self.values.get(x), self.values.get(other)
    if value == Map() and isinstance(by, PixelWeights):
        letters = self.all_dims(x).replace("C", "1")
        return Part(node, False, by.mask) if self.all_dims(other) == letters else None
    small = _broadcast(self, x, other)
    if small is None or not isinstance(value, Map):
        return None
    if value != Map():
        raise Unserved(f"{named(node)} scales the map after it was {'scaled' if value.scale else 'added to'}")
    return Map(scale=small)


def _add(self: Any, node: fx.Node) -> Any:
    x, other = _ordered(self, node)
    value = self.values.get(x)
    if isinstance(value, Map) and isinstance(self.values.get(other), Map):
        raise Unserved(f"{named(node)} adds the map to itself")
    small = _broadcast(self, x, other)
    if small is None or not isinstance(value, Map) or node.kwargs.get("alpha", 1) != 1:
        return None
    if value.term is not None:
        raise Unserved(f"{named(node)} adds to the map twice")
    return value._replace(term=small)


def _ordered(self: Any, node: fx.Node) -> tuple[Any, Any]:
    """The two arguments, the map first."""
    one, other = arguments(node)
    return (one, other) if isinstance(self.values.get(one), Map) else (other, one)


def _broadcast(self: Any, x: Any, other: Any) -> fx.Node | None:
    """What is small, if each of its numbers meets its own image and channel of x."""
    value = self.values.get(other) if isinstance(other, fx.Node) else None
    if isinstance(value, Spread) and self.all_dims(other) == self.all_dims(x):
        return value.small
    return other if isinstance(value, Small) and self.aligned(other, x) else None


_VIEWS = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
    *(
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.default,
        aten.squeeze.dims,
        aten.contiguous.default,
    ),
    *(aten.clone.default, aten.alias.default, aten.unflatten.int, aten.slice.Tensor),
)
EXPANSIONS = (aten.expand.default, aten.expand_as.default)
FOLLOWED: dict[Any, Callable[[Any, fx.Node], Any]] = {
    **dict.fromkeys(_VIEWS, _same_map),
    **dict.fromkeys(EXPANSIONS, _expand),
    **dict.fromkeys((aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default), _average),
    **dict.fromkeys((aten.conv2d.default, aten.conv2d.padding), _convolution),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), _product),
    aten.einsum.default: _einsum,
    aten.mean.dim: _mean,
    aten.sum.dim_IntList: _sum,
    aten.div.Tensor: _divide,
    aten.softmax.int: _softmax,
    aten.mul.Tensor: _multiply,
    aten.add.Tensor: _add,
}
