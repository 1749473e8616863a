"""Formulas whose small part is the fused operation's: linear, layer norm or none, act, linear, gate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from gc_cuda.recognition.formula import Formula
from gc_cuda.recognition.structure import Place
from gc_cuda.recognition.tracing import Traced
from gc_cuda.recognition.values import arguments, aten, is_pointwise, is_random

_SHAPES_ONLY = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, aten.unflatten.int),
    *(aten.contiguous.default, aten.clone.default, aten.alias.default, aten.slice.Tensor),
)
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.dropout_.default)
_ACTIVATIONS = {
    **{aten.relu.default: "relu", aten.relu_.default: "relu"},
    **{aten.silu.default: "silu", aten.silu_.default: "silu"},
    **{aten.hardswish.default: "hardswish", aten.hardswish_.default: "hardswish"},
}
_GATES = {
    **{aten.sigmoid.default: "sigmoid", aten.sigmoid_.default: "sigmoid"},
    **{aten.hardsigmoid.default: "hardsigmoid", aten.hardsigmoid_.default: "hardsigmoid"},
}
# relu6(x + 3) / 6, operation by operation.
_RELU6 = (aten.relu6.default, aten.relu6_.default)
_CLAMPS = (aten.hardtanh.default, aten.hardtanh_.default, aten.clamp.default, aten.clamp_.default)
_ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
_DIVISIONS = (aten.div.Tensor, aten.div_.Tensor)
_PRODUCTS = (aten.mul.Tensor, aten.mul_.Tensor)


class FusedBranch(NamedTuple):
    """Where a transform's parameters are; a bias may be absent."""

    w1: Place
    b1: Place | None
    norm: tuple[Place, Place] | None
    w2: Place
    b2: Place | None


class Fused(NamedTuple):
    """A block that is the fused operation, by the places of its parameters."""

    mask: tuple[Place, Place | None] | None
    add: FusedBranch | None
    mul: FusedBranch | None
    activation: str
    gate: str
    eps: float


class _Step(NamedTuple):
    kind: str  # "linear", "norm", "act", "gate"
    word: str = ""
    tensors: tuple[fx.Node | None, ...] = ()
    eps: float = 0.0


def fused_of(traced: Traced, formula: Formula) -> Fused | None:
    """The fused operation that the formula is; None where it is another."""
    visited: set[fx.Node] = set(formula.contexts)
    branches: dict[str, FusedBranch | None] = {}
    words: dict[str, set[Any]] = {"act": set(), "gate": set(), "eps": set()}
    for name, end in (("add", formula.term), ("mul", formula.scale)):
        if end is None:
            branches[name] = None
            continue
        steps = _steps(end, formula, visited)
        branch = None if steps is None else _branch(traced, steps, words, gated=name == "mul")
        if branch is None:
            return None
        branches[name] = branch
    if any(len(found) > 1 for found in words.values()) or not visited.issuperset(formula.small):
        return None
    mask = formula.mask
    return Fused(
        None if mask is None else (traced.places[mask.weight], _place(traced, mask.bias)),
        branches["add"],
        branches["mul"],
        next(iter(words["act"])),
        next(iter(words["gate"]), "sigmoid"),
        next(iter(words["eps"]), 0.0),
    )


def _place(traced: Traced, node: fx.Node | None) -> Place | None:
    return None if node is None else traced.places[node]


def _branch(
    traced: Traced, steps: list[_Step], words: dict[str, set[Any]], *, gated: bool
) -> FusedBranch | None:
    kinds = [step.kind for step in steps]
    wanted = ["linear", "act", "linear", *(["gate"] if gated else [])]
    norm = None
    if kinds[1:2] == ["norm"]:
        norm = steps.pop(1)
        kinds.pop(1)
    if kinds != wanted or any(node not in traced.places for step in steps for node in step.tensors if node):
        return None
    if norm is not None and any(node not in traced.places for node in norm.tensors if node):
        return None
    first, act, last, *gate = steps
    words["act"].add(act.word)
    words["gate"].update(one.word for one in gate)
    if norm is not None:
        words["eps"].add(norm.eps)
    w1, b1, w2, b2 = (_place(traced, node) for node in (*first.tensors, *last.tensors))
    assert w1 is not None and w2 is not None
    norms = None
    if norm is not None:
        weight, bias = (_place(traced, node) for node in norm.tensors)
        if weight is None or bias is None:
            return None
        norms = weight, bias
    return FusedBranch(w1, b1, norms, w2, b2)


def _steps(end: fx.Node, formula: Formula, visited: set[fx.Node]) -> list[_Step] | None:
    """What is done to the context, in its order, to give ``end``."""
    steps: list[_Step] = []
    node = end
    while node not in formula.contexts:
        found = _step(node)
        if found is None:
            return None
        step, source, passed = found
        visited.update(passed)
        if step is not None:
            steps.insert(0, step)
        node = source
    return steps


# The step, the node before it, and the nodes that it is made of.
_Found = tuple["_Step | None", fx.Node, tuple[fx.Node, ...]]


def _step(node: fx.Node) -> _Found | None:
    target, source = node.target, arguments(node)[0] if arguments(node) else None
    if not isinstance(source, fx.Node) or node.op != "call_function":
        return None
    if target in _SHAPES_ONLY:
        return (None, source, (node,)) if _same_vectors(node, source) else None
    if target in _DROPOUTS and not is_random(node):
        return None, source, (node,)
    if target in _ACTIVATIONS:
        return _Step("act", _ACTIVATIONS[target]), source, (node,)
    if target in _GATES:
        return _Step("gate", _GATES[target]), source, (node,)
    if target == aten.linear.default and _width(source) == 1:
        return _Step("linear", "", _operands(node)), source, (node,)
    if target in (aten.conv2d.default, aten.conv2d.padding) and is_pointwise(node):
        return _Step("linear", "", _operands(node)), source, (node,)
    if target == aten.layer_norm.default:
        return _layer_norm(node, source)
    if target in (*_DIVISIONS, *_PRODUCTS):
        return _hard_sigmoid(node, source)
    return None


def _operands(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    weight, bias = (*arguments(node)[1:3], None)[:2]
    assert isinstance(weight, fx.Node)
    return weight, bias if isinstance(bias, fx.Node) else None


def _layer_norm(node: fx.Node, source: fx.Node) -> _Found | None:
    """Over all of each image's vector."""
    _, shape, *others = arguments(node)
    weight, bias, eps = (*others, *(None, None, 1e-5)[len(others) :])[:3]
    vector = [size for size in source.meta["val"].shape[1:] if size != 1]
    if [size for size in shape if size != 1] != vector or len(shape) != source.meta["val"].dim() - 1:
        return None
    tensors = tuple(one if isinstance(one, fx.Node) else None for one in (weight, bias))
    return _Step("norm", "", tensors, float(eps)), source, (node,)


def _hard_sigmoid(node: fx.Node, source: fx.Node) -> _Found | None:
    """relu6(x + 3) / 6."""
    factor = arguments(node)[1]
    by = 6.0 if node.target in _DIVISIONS else 1 / 6
    clamp, addition = source, arguments(source)[0] if arguments(source) else None
    limits = tuple(arguments(clamp)[1:3])
    if factor != by or not isinstance(addition, fx.Node):
        return None
    if not (clamp.target in _RELU6 or (clamp.target in _CLAMPS and limits == (0, 6))):
        return None
    if addition.target not in _ADDITIONS or arguments(addition)[1] != 3 or addition.kwargs:
        return None
    before = arguments(addition)[0]
    return _Step("gate", "hardsigmoid"), before, (node, clamp, addition)


def _width(node: fx.Node) -> int:
    """The dimensions beside the images that are more than one."""
    return sum(1 for size in node.meta["val"].shape[1:] if not (isinstance(size, int) and size == 1))


def _same_vectors(node: fx.Node, source: fx.Node) -> bool:
    """Whether both have a vector for each image, the same."""
    shapes = [one.meta["val"].shape for one in (node, source)]
    return all(_is_tensor(one) for one in (node, source)) and all(
        [str(size) for size in shape if str(size) != "1"]
        == [str(size) for size in shapes[0] if str(size) != "1"]
        for shape in shapes
    )


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], Tensor) and not isinstance(node.meta["val"], torch.nn.Parameter)
