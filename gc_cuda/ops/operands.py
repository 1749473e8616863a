"""The operands of the operators, as csrc/ops takes and returns them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gc_cuda.reference import Transform

# The dtypes of a feature map, and the dtype in which sums over one are kept; small tensors may have both.
ACCUMULATION = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float64,
}
# The operators' numbers for the names (csrc/ops/policy.h).
ACTIVATIONS = {"relu": 0, "silu": 1, "hardswish": 2}
GATES = {"sigmoid": 0, "hardsigmoid": 1}

# The tensors of a branch as the operators take them: all of a Transform, or those without a layer norm, or
# none where the block has no such branch.
Tensors = Sequence[Tensor]
WITHOUT_NORM = ("w1", "b1", "w2", "b2")
NAMES: dict[int, tuple[str, ...]] = {len(names): names for names in ((), WITHOUT_NORM, Transform._fields)}


def tensors_of(transform: Transform | None) -> Tensors:
    """The tensors of a branch. A None where a tensor is due stays, and the operator rejects it.

    Raises:
        TypeError, ValueError: for what is not a Transform.
    """
    if transform is None:
        return ()
    w1, b1, norm_weight, norm_bias, w2, b2 = transform
    if not isinstance(transform, (tuple, list)) or w1 is None:
        raise TypeError(f"not a Transform: {type(transform).__name__}")
    if norm_weight is None and norm_bias is None:
        return w1, b1, w2, b2
    return w1, b1, norm_weight, norm_bias, w2, b2  # type: ignore[return-value]


def filled(branch: Sequence[Tensor | None]) -> Tensors:
    """The tensors of a branch, with zeros in the place of a bias that is absent."""
    if not any(tensor is None for tensor in branch):
        return branch  # type: ignore[return-value]
    w1, b1, *norm, w2, b2 = branch
    if w1 is None or w2 is None:
        return branch  # type: ignore[return-value] # the operator rejects it
    return (
        w1,
        _zeros(w1) if b1 is None else b1,
        *norm,  # type: ignore[arg-type]
        w2,
        _zeros(w2) if b2 is None else b2,
    )


_kept_zeros: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def _zeros(weight: Tensor) -> Tensor:
    """A bias for that weight, kept for later calls; nobody writes to it."""
    key = weight.shape[0], weight.dtype, weight.device
    found = _kept_zeros.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = weight.new_zeros(weight.shape[0], requires_grad=False)
        # Not from within a graph that is traced or captured: its memory, or its tensor, is that graph's own.
        captured = weight.is_cuda and torch.cuda.is_current_stream_capturing()
        if type(found) is Tensor and not captured and not torch.compiler.is_compiling():
            _kept_zeros[key] = found
    return found


def in_places(branch: Sequence[Any], absent: Any = None) -> tuple[Any, ...]:
    """A value for each field of a Transform: those of the branch's tensors, and ``absent`` for the others."""
    if len(branch) == len(WITHOUT_NORM):
        w1, b1, w2, b2 = branch
        return w1, b1, absent, absent, w2, b2
    return tuple(branch) or (absent,) * len(Transform._fields)


def transform_of(branch: Tensors) -> Transform | None:
    """The inverse of :func:`tensors_of`."""
    return Transform(*in_places(branch)) if branch else None


STATISTICS = 2  # of an image's softmax: the largest logit, and the sum of the exponentials


class Kept(NamedTuple):
    """The parts of what the block's forward pass keeps, in their order, by their number of elements."""

    state: int  # [N, 2 + C]: the statistics and the context
    logits: int  # [N, S]; none for average pooling
    normalized: int  # [N, P] of add, then of mul
    inverse_deviation: int  # [branches, N]
    scale: int  # [N, C]; none without mul

    @classmethod
    def sizes(cls, x: Tensor, *, attends: bool, add: Tensors, mul: Tensors) -> Kept:
        n, c, h, w = x.shape
        hidden = [b1.numel() for _, b1, *_ in filter(None, (add, mul))]
        return cls(
            state=n * (STATISTICS + c),
            logits=n * h * w if attends else 0,
            normalized=n * sum(hidden),
            inverse_deviation=n * len(hidden),
            scale=n * c if mul else 0,
        )


# What the residual tail keeps before the block's: mean, 1 / deviation, variance and bias of each channel
# (TailKept in csrc/ops/tail_problem.h).
TAIL_VECTORS = 4


def context_in(kept: Tensor, size: Sequence[int]) -> Tensor:
    """The context [N, C] in what is kept for an x of that size, or its gradient in a gradient for that."""
    n, c, _, _ = size
    state = kept[: n * (STATISTICS + c)].view(n, STATISTICS + c)
    return state[:, STATISTICS:]
