"""A traced graph as a formula: out = x * scale + term, where both are made from the pooled x alone.

Every node is followed by what it is: the map itself, seen in some shape; logits or weights of its pixels; the
context; something small, without pixels. Spelling does not matter: a ``view``, a ``mean`` in two steps and an
``expand_as`` are the same to it as any other way.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from gc_cuda.blocks._parts import Unserved
from gc_cuda.recognition.operations import EXPANSIONS, FOLLOWED
from gc_cuda.recognition.tracing import Traced
from gc_cuda.recognition.values import (
    MAP,
    Map,
    Mask,
    Part,
    Small,
    Spread,
    arguments,
    is_random,
    is_size,
    key_of,
    named,
    symbols_of,
)


class Formula(NamedTuple):
    """out = x * scale + term; scale and term are nodes, one of which may be absent."""

    mask: Mask | None  # None: the mean of the pixels
    contexts: tuple[fx.Node, ...]  # the nodes that are the pooled x, in several shapes
    small: tuple[fx.Node, ...]  # the nodes between, in their order, effects on buffers among them
    scale: fx.Node | None
    term: fx.Node | None


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
        self.letters = {key_of(n): "N", key_of(c): "C", key_of(h): "H", key_of(w): "W", key_of(h * w): "S"}
        self.pixels = {str(h), str(w)}
        if len(self.letters) < 5 or key_of(c) == "1":
            raise Unserved("it has one channel")
        self.values: dict[fx.Node, Any] = {}
        self.contexts: list[fx.Node] = []
        self.small: list[fx.Node] = []
        self.masks: set[Mask | None] = set()

    def result(self) -> Formula:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = Map()
            elif node.op == "get_attr":
                self.values[node] = Small(False)
            elif node.op == "call_function":
                self.call(node)
            elif node.op == "output":
                return self.output(arguments(node)[0])
        raise AssertionError("a graph has an output")

    def output(self, out: Any) -> Formula:
        found = self.values.get(out) if isinstance(out, fx.Node) else None
        if not isinstance(found, Map) or found == Map() or self.dims(out) != "NCHW":
            raise Unserved("its output is not the map after a broadcast")
        if len(self.masks) != 1:
            raise Unserved(
                "it pools in more than one way" if self.masks else "it does not pool over the pixels"
            )
        for node in (found.scale, found.term):
            if node is not None and not self.values[node].pooled:
                raise Unserved(f"{named(node)} does not depend on the pooled map")
        (mask,) = self.masks
        return Formula(mask, tuple(self.contexts), tuple(self.small), found.scale, found.term)

    def call(self, node: fx.Node) -> None:
        if not isinstance(node.meta.get("val"), Tensor) and node.target is not operator.getitem:
            if is_size(node.meta.get("val")):
                return
            if not isinstance(node.meta.get("val"), (tuple, list)):
                raise Unserved(f"{named(node)} is no operation on tensors")
        is_own = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
        if not is_own and node.target is not operator.getitem:
            raise Unserved(f"{named(node)} is not one of PyTorch's own operations")
        inputs = [self.values[one] for one in node.all_input_nodes if one in self.values]
        if all(isinstance(one, Small) for one in inputs):
            self.values[node] = self.small_of(node, inputs)
            return
        handler = FOLLOWED.get(node.target)
        found = None if handler is None else handler(self, node)
        if found is None:
            for part in inputs:
                if isinstance(part, Part):
                    kind = "over a part of the pixels" if part.is_mean else "a sum of the pixels, and no mean"
                    raise Unserved(f"{named(part.node)} is {kind}")
            raise Unserved(f"{named(node)} is done to the whole map")
        self.values[node] = found

    def small_of(self, node: fx.Node, inputs: list[Small]) -> Any:
        if node.target in EXPANSIONS and self.dims(node) in MAP:
            return self.expand(node)
        if self.touches_pixels(node):
            raise Unserved(f"{named(node)} depends on the number of pixels")
        if not inputs:
            raise Unserved(f"{named(node)} makes a tensor of its own")
        if is_random(node):
            raise Unserved(f"{named(node)} is random")
        self.small.append(node)
        return Small(any(one.pooled for one in inputs))

    def expand(self, node: fx.Node) -> Spread | None:
        source = arguments(node)[0]
        return Spread(source) if isinstance(source, fx.Node) and self.aligned(source, node) else None

    def touches_pixels(self, node: fx.Node) -> bool:
        sizes: list[Any] = [one.meta["val"] for one in node.all_input_nodes if is_size(one.meta.get("val"))]
        values = node.meta["val"]
        for value in values if isinstance(values, (tuple, list)) else (values,):
            sizes += value.shape if isinstance(value, Tensor) else ()
        return any(not self.pixels.isdisjoint(symbols_of(size)) for size in sizes)

    def dims(self, node: fx.Node) -> str:
        """The letters of its shape without ones; "?" for a size that is none of x's."""
        return self.all_dims(node).replace("1", "")

    def all_dims(self, node: fx.Node) -> str:
        return "".join(self.letter(size) for size in node.meta["val"].shape)

    def letter(self, size: Any) -> str:
        key = key_of(size)
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

    def context(self, node: fx.Node, mask: Mask | None) -> Small:
        self.contexts.append(node)
        self.masks.add(mask)
        return Small(True)
