"""How modules of a structure run: as the fused operation, or fused around their own middle."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from gc_cuda.blocks._parts import Names
from gc_cuda.ops import checks
from gc_cuda.ops.around import around, by_kernels
from gc_cuda.ops.contexts import is_foreign
from gc_cuda.recognition.formula import Formula
from gc_cuda.recognition.fused import Fused, FusedBranch, fused_of
from gc_cuda.recognition.structure import Place
from gc_cuda.recognition.tracing import Traced

# The smallest maps on which a training step on the CPU gains from pooling and broadcast around a middle.
LEAST_NCHW_BYTES = 3_000_000
LEAST_CHANNELS_LAST_BYTES = 1_500_000


class FusedRecipe(NamedTuple):
    """What :class:`gc_cuda.blocks._parts.Recipe` says of a block, for one that was recognized."""

    mask: Names | None
    add: Names | None
    mul: Names | None
    activation: str
    gate: str
    eps: float

    def parameters(self) -> tuple[Names, Names, Names]:
        return self.mask or (), self.add or (), self.mul or ()


class AroundRecipe(NamedTuple):
    """A block whose middle runs as it is, by PyTorch's own operations."""

    plan: Around
    places: Names

    @property
    def mask(self) -> None:
        return None

    @property
    def mul(self) -> None:
        return None

    def parameters(self) -> tuple[Names, Names, Names]:
        return self.places, (), ()


class FusedPlan(NamedTuple):
    """One operation."""

    fused: Fused

    def recipe(self, block: nn.Module) -> FusedRecipe:
        """With the modules of that block."""
        mask, add, mul, *words = self.fused
        found: Any = (_places(block, mask), _places(block, _row(add)), _places(block, _row(mul)), *words)
        return FusedRecipe(*found)


class Around(NamedTuple):
    """Pooling and broadcast fused around the middle of the block."""

    middle: Callable[..., tuple[Tensor | None, Tensor | None]]
    mask: int  # the tensors at the beginning that are of attention pooling: 0, 1 or 2
    places: tuple[Place, ...]  # of the mask's, then of what the middle takes after the context
    shapes: tuple[torch.Size, ...]
    channels: int | None  # that x has to have; None: any number
    text: str

    @property
    def runs_itself(self) -> bool:
        return True

    def recipe(self, block: nn.Module) -> AroundRecipe:
        return AroundRecipe(self, _places(block, self.places) or ())

    def run(self, block: Any, own_forward: Callable[..., Any], x: Tensor, tensors: Sequence[Any]) -> Any:
        """The output; by ``own_forward`` where nothing is gained or the graph does not stand for the call."""
        if x.dim() != 4 or self.channels not in (None, x.shape[1]) or not self.gains(x):
            return own_forward(block, x)
        for tensor, shape in zip(tensors, self.shapes):
            if tensor is None or is_foreign(tensor) or tensor.shape != shape:
                return own_forward(block, x)
        if self.mask and not all(checks.fits(tensor, x) for tensor in tensors[: self.mask]):
            return own_forward(block, x)
        return self.compute(x, tensors)

    def gains(self, x: Tensor) -> bool:
        """Whether this is the faster way: bench/results/amd-epyc-around.md."""
        if x.is_cuda and not by_kernels(x.device):
            return False
        if self.mask > 0:
            return True
        least = LEAST_NCHW_BYTES if x.is_contiguous() else LEAST_CHANNELS_LAST_BYTES
        return torch.is_grad_enabled() and (x.is_cuda or x.nbytes >= least)

    def compute(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        of_mask, others = tensors[: self.mask], tensors[self.mask :]
        mask = (of_mask[0], of_mask[1] if self.mask > 1 else None) if self.mask else None
        return around(x, lambda context: self.middle(context, *others), mask)


def plan_of(traced: Traced, formula: Formula, block: nn.Module) -> FusedPlan | Around:
    """The plan for a graph."""
    fused = fused_of(traced, formula)
    if fused is not None and all(_has_its_biases(block, branch) for branch in (fused.add, fused.mul)):
        return FusedPlan(fused)
    return _around(traced, formula)


def _around(traced: Traced, formula: Formula) -> Around:
    graph = fx.Graph()
    context = graph.placeholder("context")
    (x,) = (node for node in traced.graph.nodes if node.op == "placeholder")
    copies: dict[fx.Node, fx.Node] = {}
    mask = [node for node in formula.mask or () if node is not None]
    places = [traced.places[node] for node in mask]
    shapes = [node.meta["val"].shape for node in mask]
    used = {one for node in formula.small for one in node.all_input_nodes}
    for node in traced.graph.nodes:
        if node.op == "get_attr" and node in used:
            copies[node] = graph.placeholder(f"tensor_{len(places)}")
            places.append(traced.places[node])
            shapes.append(node.meta["val"].shape)
    n, c = (graph.call_method("size", (context, dim)) for dim in (0, 1))
    symbols = {str(size): copy for size, copy in zip(x.meta["val"].shape, (n, c))}

    def size(value: Any) -> Any:
        """A size of the graph: a number, or a node of the new one."""
        return symbols.get(str(value), value) if isinstance(value, torch.SymInt) else value

    small = set(formula.small)
    for node in traced.graph.nodes:
        value = node.meta.get("val")
        if node in formula.contexts:
            shape = [size(one) for one in value.shape]
            copies[node] = graph.call_function(torch.ops.aten.reshape.default, (context, shape))
        elif node in small:
            copies[node] = graph.node_copy(node, lambda one: copies[one])
        elif isinstance(value, (int, torch.SymInt)) and str(value) in symbols:
            copies[node] = symbols[str(value)]
        elif isinstance(value, int) and not isinstance(value, bool):
            copies[node] = value  # type: ignore[assignment]
        elif isinstance(value, torch.SymInt) and all(one in copies for one in node.all_input_nodes):
            copies[node] = graph.node_copy(node, lambda one: copies[one])
    graph.output(tuple(None if end is None else copies[end] for end in (formula.scale, formula.term)))
    graph.eliminate_dead_code(lambda node: node.op != "call_method")
    module = fx.GraphModule(nn.Module(), graph)
    operations = [_word(node) for node in formula.small if node.target is not operator.getitem]
    pooled = "attention(x)" if mask else "mean(x)"
    factor = "" if formula.scale is None else " * s"
    term = "" if formula.term is None else " + t"
    ends = ", ".join(name for name, end in (("s", formula.scale), ("t", formula.term)) if end is not None)
    text = f"x{factor}{term}, {ends} = its own {' '.join(word for word in operations if word)} of {pooled}"
    return Around(module.forward, len(mask), tuple(places), tuple(shapes), traced.channels, text)


_UNTOLD = ("view", "reshape", "unsqueeze", "squeeze", "transpose", "flatten", "add", "permute", "contiguous")


def _word(node: fx.Node) -> str:
    name = node.target.overloadpacket.__name__.rstrip("_")  # type: ignore[union-attr]
    return "" if name in _UNTOLD else name


def _row(branch: FusedBranch | None) -> tuple[Place, ...] | None:
    """The places of a branch in the operators' order; those of its biases are the linear layers' own."""
    if branch is None:
        return None
    w1, b1, norm, w2, b2 = branch
    return w1, b1 or (w1[0], "bias"), *(norm or ()), w2, b2 or (w2[0], "bias")


def _has_its_biases(block: nn.Module, branch: FusedBranch | None) -> bool:
    """Whether a bias that is absent is one of PyTorch's own layers, where it would be seen if it came."""
    if branch is None:
        return True
    return all(
        bias is not None or isinstance(block.get_submodule(path), (nn.Linear, nn.Conv2d))
        for bias, (path, _) in ((branch.b1, branch.w1), (branch.b2, branch.w2))
    )


def _places(block: nn.Module, places: Sequence[Place | None] | None) -> Names | None:
    if places is None:
        return None
    return tuple((block.get_submodule(path), name) for path, name in filter(None, places))
