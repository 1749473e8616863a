"""A traced graph as a formula: out = x * scale + term, where both are made from the pooled x alone.

Every node is followed by what it is: the map itself, seen in some shape; logits or weights of its pixels; the
context; something small, without pixels. Spelling does not matter: a ``view``, a ``mean`` in two steps and an
``expand_as`` are the same to it as any other way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from gc_cuda.blocks._parts import Unserved
from gc_cuda.recognition.tracing import Traced

aten = torch.ops.aten

# Letters of dimensions: images, channels, height, width, and all pixels.
_MAP = ("NCHW", "NCS")
_LOGITS = ("NHW", "NS")


class Mask(NamedTuple):
    """The parameters of attention pooling."""

    weight: fx.Node
    bias: fx.Node | None


class Formula(NamedTuple):
    """out = x * scale + term; scale and term are nodes, one of which may be absent."""

    mask: Mask | None  # None: the mean of the pixels
    contexts: tuple[fx.Node, ...]  # the nodes that are the pooled x, in several shapes
    small: tuple[fx.Node, ...]  # the nodes between, in their order, effects on buffers among them
    scale: fx.Node | None
    term: fx.Node | None


class _Map(NamedTuple):
    scale: fx.Node | None = None
    term: fx.Node | None = None


class _Part(NamedTuple):
    """The map after a mean, or a sum, over some of its pixels; weighted by a mask's weights, or not."""

    node: fx.Node
    is_mean: bool
    mask: Mask | None = None


class _Logits(NamedTuple):
    mask: Mask


class _Weights(NamedTuple):
    mask: Mask


class _Small(NamedTuple):
    pooled: bool  # whether it depends on x


class _Spread(NamedTuple):
    """Something small, expanded to the map."""

    small: fx.Node


def formula_of(traced: Traced) -> Formula:
    """The formula of the graph.

    Raises:
        Unserved: if it computes something else; the message names the operation at which it does.
    """
    return _Follower(traced).result()


class _Follower:
    def __init__(self, traced: Traced) -> None:
        self.graph = traced.graph
        (self.x,) = (node for node in self.graph.nodes if node.op == "placeholder")
        n, c, h, w = self.x.meta["val"].shape
        self.letters = {_key(n): "N", _key(c): "C", _key(h): "H", _key(w): "W", _key(h * w): "S"}
        self.pixels = {str(h), str(w)}
        if len(self.letters) < 5 or _key(c) == "1":
            raise Unserved("it has one channel")
        self.values: dict[fx.Node, Any] = {}
        self.contexts: list[fx.Node] = []
        self.small: list[fx.Node] = []
        self.masks: set[Mask | None] = set()

    def result(self) -> Formula:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = _Map()
            elif node.op == "get_attr":
                self.values[node] = _Small(False)
            elif node.op == "call_function":
                self.call(node)
            elif node.op == "output":
                return self.output(arguments(node)[0])
        raise AssertionError("a graph has an output")

    def output(self, out: Any) -> Formula:
        found = self.values.get(out) if isinstance(out, fx.Node) else None
        if not isinstance(found, _Map) or found == _Map() or self.dims(out) != "NCHW":
            raise Unserved("its output is not the map after a broadcast")
        if len(self.masks) != 1:
            raise Unserved(
                "it pools in more than one way" if self.masks else "it does not pool over the pixels"
            )
        for node in (found.scale, found.term):
            if node is not None and not self.values[node].pooled:
                raise Unserved(f"{_named(node)} does not depend on the pooled map")
        (mask,) = self.masks
        return Formula(mask, tuple(self.contexts), tuple(self.small), found.scale, found.term)

    def call(self, node: fx.Node) -> None:
        if not isinstance(node.meta.get("val"), Tensor) and node.target is not operator.getitem:
            if _is_size(node.meta.get("val")):
                return
            if not isinstance(node.meta.get("val"), (tuple, list)):
                raise Unserved(f"{_named(node)} is no operation on tensors")
        is_own = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
        if not is_own and node.target is not operator.getitem:
            raise Unserved(f"{_named(node)} is not one of PyTorch's own operations")
        inputs = [self.values[one] for one in node.all_input_nodes if one in self.values]
        if all(isinstance(one, _Small) for one in inputs):
            self.values[node] = self.small_of(node, inputs)
            return
        handler = _HANDLERS.get(node.target)
        found = None if handler is None else handler(self, node)
        if found is None:
            for part in inputs:
                if isinstance(part, _Part):
                    kind = "over a part of the pixels" if part.is_mean else "a sum of the pixels, and no mean"
                    raise Unserved(f"{_named(part.node)} is {kind}")
            raise Unserved(f"{_named(node)} is done to the whole map")
        self.values[node] = found

    def small_of(self, node: fx.Node, inputs: list[_Small]) -> Any:
        if node.target in _EXPANSIONS and self.dims(node) in _MAP:
            return self.expand(node)
        if self.touches_pixels(node):
            raise Unserved(f"{_named(node)} depends on the number of pixels")
        if not inputs:
            raise Unserved(f"{_named(node)} makes a tensor of its own")
        if is_random(node):
            raise Unserved(f"{_named(node)} is random")
        self.small.append(node)
        return _Small(any(one.pooled for one in inputs))

    def expand(self, node: fx.Node) -> _Spread | None:
        source = arguments(node)[0]
        return _Spread(source) if isinstance(source, fx.Node) and self.aligned(source, node) else None

    def touches_pixels(self, node: fx.Node) -> bool:
        sizes: list[Any] = [one.meta["val"] for one in node.all_input_nodes if _is_size(one.meta.get("val"))]
        values = node.meta["val"]
        for value in values if isinstance(values, (tuple, list)) else (values,):
            sizes += value.shape if isinstance(value, Tensor) else ()
        return any(not self.pixels.isdisjoint(_symbols(size)) for size in sizes)

    def dims(self, node: fx.Node) -> str:
        """The letters of its shape without ones; "?" for a size that is none of x's."""
        return self.all_dims(node).replace("1", "")

    def all_dims(self, node: fx.Node) -> str:
        return "".join(self.letter(size) for size in node.meta["val"].shape)

    def letter(self, size: Any) -> str:
        key = _key(size)
        return "1" if key == "1" else self.letters.get(key, "?")

    def reduced(self, node: fx.Node, dims: Any) -> str:
        """The letters of the dimensions of the first argument that these numbers name."""
        letters = self.all_dims(arguments(node)[0])
        numbers = dims if isinstance(dims, (list, tuple)) else [dims]
        return "".join(letters[number] for number in numbers).replace("1", "")

    def aligned(self, small: fx.Node, map_node: fx.Node) -> bool:
        """Whether it is [N, C] and ones, so that each number meets its own image and channel of the map."""
        letters = self.all_dims(map_node)
        return self.all_dims(small) == "".join("1" if letter in "HWS" else letter for letter in letters)

    def one_map(self, node: fx.Node, kind: type) -> Any:
        """The value of the first argument, if it is of that kind and no other argument is more than small."""
        first = self.values.get(arguments(node)[0])
        return first if isinstance(first, kind) else None

    def context(self, node: fx.Node, mask: Mask | None) -> _Small:
        self.contexts.append(node)
        self.masks.add(mask)
        return _Small(True)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Its arguments by position: numbers, nodes, lists of both."""
    return node.args


def is_random(node: fx.Node) -> bool:
    """Whether the operation draws random numbers here."""
    if node.target in (aten.dropout.default, aten.feature_dropout.default, aten.dropout_.default):
        _, p, train = arguments(node)
        return bool(train) and p != 0
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _same_map(self: _Follower, node: fx.Node) -> Any:
    """The same numbers in the same order, in another shape."""
    value = self.values.get(arguments(node)[0])
    letters = {_Map: _MAP, _Logits: _LOGITS, _Weights: _LOGITS, _Spread: ()}.get(type(value), ())
    if isinstance(value, _Part):
        return value if self.dims(node) == self.dims(arguments(node)[0]) else None
    return value if self.dims(node) in letters else None


def _mean(self: _Follower, node: fx.Node) -> Any:
    value = self.values[arguments(node)[0]]
    dims = arguments(node)[1] if len(arguments(node)) > 1 else None
    if value == _Map():
        value = _Part(node, True)
    if not isinstance(value, _Part) or not value.is_mean or value.mask is not None or not dims:
        return None
    return _left(self, node, dims, value)


def _left(self: _Follower, node: fx.Node, dims: Any, part: _Part) -> Any:
    """What a mean or a sum over those dimensions leaves."""
    if set(self.reduced(node, dims)) - set("HWS"):
        return None
    left = self.dims(node)
    if left == "NC":
        return self.context(node, part.mask) if part.is_mean or part.mask is not None else part
    return part if left in ("NCH", "NCW") else None


def _sum(self: _Follower, node: fx.Node) -> Any:
    value = self.values[arguments(node)[0]]
    dims = arguments(node)[1] if len(arguments(node)) > 1 else None
    if value == _Map():
        value = _Part(node, False)
    if not isinstance(value, _Part) or value.is_mean or not dims:
        return None
    return _left(self, node, dims, value)


def _divide(self: _Follower, node: fx.Node) -> Any:
    """A sum over the pixels becomes their mean."""
    value, divisor = self.values.get(arguments(node)[0]), arguments(node)[1]
    if not isinstance(value, _Part) or value.is_mean or value.mask is not None or self.dims(node) != "NC":
        return None
    if not isinstance(divisor, fx.Node) or not _is_size(divisor.meta.get("val")):
        return None
    return self.context(node, None) if self.letter(divisor.meta["val"]) == "S" else None


def _average(self: _Follower, node: fx.Node) -> Any:
    size = arguments(node)[1]
    if self.values[arguments(node)[0]] != _Map() or size not in ([1], [1, 1], 1):
        return None
    return self.context(node, None) if self.dims(node) == "NC" else None


def _convolution(self: _Follower, node: fx.Node) -> Any:
    """One logit of each pixel."""
    x, weight, bias, *_ = (*arguments(node), None)
    if self.values.get(x) != _Map() or not is_pointwise(node):
        return None
    if not isinstance(weight, fx.Node) or weight.meta["val"].shape[0] != 1 or self.dims(node) != "NHW":
        return None
    if any(isinstance(one, fx.Node) and one.op != "get_attr" for one in (weight, bias)):
        return None  # they are computed
    return _Logits(Mask(weight, bias if isinstance(bias, fx.Node) else None))


def _softmax(self: _Follower, node: fx.Node) -> Any:
    value, dim = self.values[arguments(node)[0]], arguments(node)[1]
    if (
        not isinstance(value, _Logits)
        or any(one not in (None, False) for one in arguments(node)[2:])
        or node.kwargs
    ):
        return None
    return _Weights(value.mask) if self.reduced(node, dim) == "S" else None


def _product(self: _Follower, node: fx.Node) -> Any:
    """The map times the weights, summed over the pixels."""
    x, weights = arguments(node)
    value = self.values.get(weights)
    if self.values.get(x) != _Map() or not isinstance(value, _Weights):
        return None
    if not (self.all_dims(x).endswith("CS") and self.all_dims(weights).endswith("S1")):
        return None
    return self.context(node, value.mask) if self.dims(node) == "NC" else None


def _einsum(self: _Follower, node: fx.Node) -> Any:
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
    maps = [one for one in operands if self.values.get(one) == _Map()]
    masks = [value.mask for value in map(self.values.get, operands) if isinstance(value, _Weights)]
    summed = "".join(letter for name, letter in ours.items() if name not in result).replace("1", "")
    kept = "".join(ours[name] for name in result).replace("1", "")
    return (
        self.context(node, masks[0]) if (len(maps), len(masks), summed, kept) == (1, 1, "S", "NC") else None
    )


def _multiply(self: _Follower, node: fx.Node) -> Any:
    x, other = _ordered(self, node)
    value, by = self.values.get(x), self.values.get(other)
    if value == _Map() and isinstance(by, _Weights):
        letters = self.all_dims(x).replace("C", "1")
        return _Part(node, False, by.mask) if self.all_dims(other) == letters else None
    small = _broadcast(self, x, other)
    if small is None or not isinstance(value, _Map):
        return None
    if value != _Map():
        raise Unserved(
            f"{_named(node)} scales the map after it was {'scaled' if value.scale else 'added to'}"
        )
    return _Map(scale=small)


def _add(self: _Follower, node: fx.Node) -> Any:
    x, other = _ordered(self, node)
    value = self.values.get(x)
    if isinstance(value, _Map) and isinstance(self.values.get(other), _Map):
        raise Unserved(f"{_named(node)} adds the map to itself")
    small = _broadcast(self, x, other)
    if small is None or not isinstance(value, _Map) or node.kwargs.get("alpha", 1) != 1:
        return None
    if value.term is not None:
        raise Unserved(f"{_named(node)} adds to the map twice")
    return value._replace(term=small)


def _ordered(self: _Follower, node: fx.Node) -> tuple[Any, Any]:
    """The two arguments, the map first."""
    one, other = arguments(node)
    return (one, other) if isinstance(self.values.get(one), _Map) else (other, one)


def _broadcast(self: _Follower, x: Any, other: Any) -> fx.Node | None:
    """What is small, if each of its numbers meets its own image and channel of x."""
    value = self.values.get(other) if isinstance(other, fx.Node) else None
    if isinstance(value, _Spread) and self.all_dims(other) == self.all_dims(x):
        return value.small
    return other if isinstance(value, _Small) and self.aligned(other, x) else None


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
_EXPANSIONS = (aten.expand.default, aten.expand_as.default)
_HANDLERS: dict[Any, Callable[[_Follower, fx.Node], Any]] = {
    **dict.fromkeys(_VIEWS, _same_map),
    **dict.fromkeys(_EXPANSIONS, _Follower.expand),
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


def _key(size: Any) -> str:
    return str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


def _symbols(size: Any) -> set[str]:
    return (
        {str(symbol) for symbol in size.node.expr.free_symbols} if isinstance(size, torch.SymInt) else set()
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def _named(node: fx.Node) -> str:
    """The operation, as its author would know it."""
    target = node.target
    name = target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else str(target)
    return name if node.name == name else f"{name} ({node.name})"
