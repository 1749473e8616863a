"""What an autograd Function keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gc_cuda._extension import compiled_module


def save(ctx: Any, tensors: Sequence[Tensor], biases: tuple[Tensor | None, ...] = ()) -> None:
    """Keep the tensors, none of which is None: tools that walk a graph's saved tensors do not expect it.

    Of the biases the gradients need the shape only. Autograd would refuse the backward pass after one was
    changed in place, which it does not for PyTorch's own convolution: so they are kept beside.
    """
    if torch.compiler.is_compiling():
        # A compiled graph checks no versions, and keeps tensors in one way only.
        ctx.places = [bias is not None for bias in biases]
        ctx.save_for_backward(*tensors, *[bias for bias in biases if bias is not None])
    else:
        ctx.beside = biases, compiled_module().versions(biases)
        ctx.save_for_backward(*tensors)


def saved(ctx: Any, *, values_of_biases: bool) -> tuple[Sequence[Any], Sequence[Any]]:
    """The tensors and the biases.

    Raises:
        RuntimeError: where the values of the biases are wanted, and one was changed in place.
    """
    if torch.compiler.is_compiling():
        kept = list(ctx.saved_tensors)
        biases = [kept.pop() if place else None for place in reversed(ctx.places)]
        return kept, biases[::-1]
    tensors = ctx.saved_tensors
    beside, versions = ctx.beside
    if values_of_biases and compiled_module().versions(beside) != versions:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation: a bias of the global context block was changed between its forward pass and a "
            "backward pass that has to be differentiable (create_graph=True)"
        )
    return tensors, beside
