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


def _pool(products: int) -> Callable[..., int]:
    """So many products for each element of x."""
    return lambda x, *args, **kwargs: 2 * products * prod(x)


def _pool_backward(products: int) -> Callable[..., int]:
    return lambda grad, x, *args, **kwargs: 2 * products * prod(x)


def _transforms(x: Shape, *branches: Sequence[Shape]) -> int:
    """The two matrix products of each branch."""
    n, c, *_ = x
    return sum(4 * n * c * prod(b1) for _, b1, *_ in filter(None, branches))


def _block(x: Shape, mask_weight: Any, mask_bias: Any, add: Any, mul: Any, *args: Any, **kwargs: Any) -> int:
    pooling = 0 if mask_weight is None else 4 * prod(x)
    return pooling + _transforms(x, add, mul)


def _block_backward(grad: Shape, x: Shape | None, *operands: Any, **kwargs: Any) -> int:
    """Where every gradient is needed: twice what the forward pass takes."""
    return 2 * _block(grad, *operands)


def _tail(
    y: Shape, identity: Any, weight: Any, bias: Any, mean: Any, var: Any, *args: Any, **kwargs: Any
) -> int:
    """The block's; a batch norm is not counted, as it is not in PyTorch."""
    _, _, mask_weight, mask_bias, add, mul, *_ = args
    return _block(y, mask_weight, mask_bias, add, mul) if add or mul else 0


def _tail_backward(
    grad: Shape, y: Any, out: Any, weight: Any, bias: Any, kind: int, *args: Any, **kwargs: Any
) -> int:
    mask_weight, mask_bias, add, mul, *_ = args
    return 2 * _block(grad, mask_weight, mask_bias, add, mul) if add or mul else 0


_FORMULAS: dict[str, Callable[..., int]] = {
    "softmax_pool": _pool(1),
    "softmax_pool_backward": _pool_backward(2),
    "attention_pool": _pool(2),
    "attention_pool_backward": _pool_backward(4),
    "global_context": _block,
    "global_context_kept": _block,
    "global_context_backward": _block_backward,
    "bn_context_add_relu": _tail,
    "bn_context_add_relu_training": _tail,
    "bn_context_add_relu_backward": _tail_backward,
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
