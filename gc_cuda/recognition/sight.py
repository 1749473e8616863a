"""Whether a graph is some kind of attention block: for the report, which names those that are not served."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_EXPANSIONS = (aten.expand.default, aten.expand_as.default, aten.repeat.default)
_COMBINES = (aten.mul.Tensor, aten.add.Tensor, aten.mul_.Tensor, aten.add_.Tensor)


def is_attention(graph: fx.Graph) -> bool:
    """Whether a whole map is multiplied by, or added to, something smaller that was made of it."""
    whole: set[fx.Node] = set()
    small: set[fx.Node] = set()  # also expanded again
    size = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            whole.add(node)
            size = _numel(node.meta["val"])
        if node.op != "call_function":
            continue
        inputs = node.all_input_nodes
        if node.target in _COMBINES and whole.intersection(inputs) and small.intersection(inputs):
            return True
        if not whole.union(small).intersection(inputs):
            continue
        value = node.meta.get("val")
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if isinstance(first, Tensor):
            is_small = _numel(first) < size or (node.target in _EXPANSIONS and node.args[0] in small)
            (small if is_small else whole).add(node)
    return False


def _numel(value: Any) -> int:
    numel = 1
    for size in value.shape:
        numel *= size.node.hint if isinstance(size, torch.SymInt) else size
    return numel
