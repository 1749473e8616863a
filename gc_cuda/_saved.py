"""What an autograd Function keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def save(ctx: Any, tensors: Sequence[Tensor | None], biases: Sequence[Tensor | None] = ()) -> None:
    """Keep the tensors that are there: tools that walk a graph's saved tensors do not expect None.

    Of the biases the gradients need the shape only. Autograd would refuse the backward pass after one was
    changed in place, which it does not for PyTorch's own convolution: so they are kept beside.
    """
    # A compiled graph checks no versions, and keeps tensors in one way only.
    beside = [] if torch.compiler.is_compiling() else list(biases)
    kept = [*tensors, *biases] if torch.compiler.is_compiling() else tensors
    ctx.places = [tensor is not None for tensor in kept]
    ctx.save_for_backward(*[tensor for tensor in kept if tensor is not None])
    ctx.count = len(tensors)
    ctx.beside = beside
    ctx.versions = [_version(bias) for bias in beside]


def saved(ctx: Any, *, values_of_biases: bool) -> tuple[list[Any], list[Any]]:
    """The tensors and the biases, None for what was not there.

    Raises:
        RuntimeError: where the values of the biases are wanted, and one was changed in place.
    """
    there = iter(ctx.saved_tensors)
    kept = [next(there) if place else None for place in ctx.places]
    if values_of_biases and [_version(bias) for bias in ctx.beside] != ctx.versions:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation: a bias of the global context block was changed between its forward pass and a "
            "backward pass that has to be differentiable (create_graph=True)"
        )
    return kept[: ctx.count], [*kept[ctx.count :], *ctx.beside]


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version
