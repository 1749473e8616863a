"""What torch.utils.flop_counter counts for the operators: 2 for each product.

It counts the products that PyTorch's convolutions and matrix products would have for the same; it does not
count sums, softmax, norms and broadcasts there either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

Shape = Sequence[int]


def _branches(x: Shape, *branches: Sequence[Shape]) -> int:
    """Both products of every transform."""
    return sum(4 * x[0] * x[1] * prod(branch[1]) for branch in branches if branch)


def softmax_pool(x: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(x)


def softmax_pool_backward(grad: Shape, x: Shape, *args: Any, **kwargs: Any) -> int:
    return 4 * prod(x)


def attention_pool(x: Shape, *args: Any, **kwargs: Any) -> int:
    return 4 * prod(x)


def attention_pool_backward(grad: Shape, x: Shape, *args: Any, **kwargs: Any) -> int:
    return 8 * prod(x)


def global_context(
    x: Shape,
    mask_weight: Shape | None,
    mask_bias: Shape | None,
    add: Sequence[Shape],
    mul: Sequence[Shape],
    *args: Any,
    **kwargs: Any,
) -> int:
    pooling = 0 if mask_weight is None else 4 * prod(x)
    return pooling + _branches(x, add, mul)


def global_context_backward(
    grad: Shape,
    x: Shape | None,
    mask_weight: Shape | None,
    mask_bias: Shape | None,
    add: Sequence[Shape],
    mul: Sequence[Shape],
    *args: Any,
    **kwargs: Any,
) -> int:
    """Where every gradient is needed."""
    pooling = 0 if mask_weight is None else 8 * prod(grad)
    return pooling + 2 * _branches(grad, add, mul)


_FORMULAS: dict[str, Callable[..., int]] = {
    "softmax_pool": softmax_pool,
    "softmax_pool_backward": softmax_pool_backward,
    "attention_pool": attention_pool,
    "attention_pool_backward": attention_pool_backward,
    "global_context": global_context,
    "global_context_kept": global_context,
    "global_context_backward": global_context_backward,
}


def register() -> None:
    """Enter every formula of this file for its operator, in place of what an earlier import entered."""
    for name, formula in _FORMULAS.items():
        operator = getattr(torch.ops.gc_cuda, name)
        for known in (operator, operator.default):
            flop_registry.pop(known, None)
        register_flop_formula(operator)(formula)
        # torch 2.4 enters it for the operator's overload, and then looks for the operator.
        if operator not in flop_registry:
            flop_registry[operator] = flop_registry[operator.default]
