"""Whether a graph is some kind of attention block: for the report, which names those that are not served."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_COMBINES = (aten.mul.Tensor, aten.add.Tensor, aten.mul_.Tensor, aten.add_.Tensor)


def is_attention(graph: fx.Graph) -> bool:
    """Whether a whole map is multiplied by, or added to, something that was made of a smaller one."""
    whole: set[fx.Node] = set()
    reduced: set[fx.Node] = set()  # made of x by way of something smaller
    size = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            whole.add(node)
            size = _numel(node.meta["val"])
        if node.op != "call_function":
            continue
        inputs = node.all_input_nodes
        if node.target in _COMBINES and whole.intersection(inputs) and reduced.intersection(inputs):
            return True
        if reduced.intersection(inputs):
            reduced.add(node)
        elif whole.intersection(inputs):
            value = node.meta.get("val")
            first = value[0] if isinstance(value, (tuple, list)) and value else value
            if isinstance(first, Tensor):
                (reduced if _numel(first) < size else whole).add(node)
    return False


def _numel(value: Any) -> int:
    numel = 1
    for size in value.shape:
        numel *= size.node.hint if isinstance(size, torch.SymInt) else size
    return numel
