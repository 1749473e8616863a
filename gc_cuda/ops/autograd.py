"""What the autograd Functions share: what they keep, and gradients that can be differentiated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gc_cuda._extension import compiled_module


def save(ctx: Any, tensors: Sequence[Tensor], biases: tuple[Tensor | None, ...] = ()) -> None:
    """Keep the tensors; none may be None, which tools that walk a graph's saved tensors do not expect.

    Gradients need only the shape of a bias. If autograd kept a bias that is then changed in place, it would
    refuse the backward pass, as it does not for PyTorch's own convolution. So the biases are kept apart.
    """
    if torch.compiler.is_compiling():
        # A compiled graph checks no versions, and keeps tensors in one way only.
        ctx.bias_is_given = [bias is not None for bias in biases]
        ctx.save_for_backward(*tensors, *[bias for bias in biases if bias is not None])
    else:
        ctx.kept_apart = biases, compiled_module().versions(biases)
        ctx.save_for_backward(*tensors)


def saved(ctx: Any, *, values_of_biases: bool) -> tuple[Sequence[Any], Sequence[Any]]:
    """The tensors and the biases.

    Raises:
        RuntimeError: if the values of the biases are needed, and one was changed in place.
    """
    if torch.compiler.is_compiling():
        kept = list(ctx.saved_tensors)
        reverse = [kept.pop() if given else None for given in reversed(ctx.bias_is_given)]
        return kept, reverse[::-1]
    tensors = ctx.saved_tensors
    biases, versions = ctx.kept_apart
    if values_of_biases and compiled_module().versions(biases) != versions:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation: a bias of the global context block was changed between its forward pass and a "
            "backward pass that has to be differentiable (create_graph=True)"
        )
    return tensors, biases


def differentiable_gradients(
    definition: Callable[..., Tensor], grad: Tensor, *inputs: Tensor | None
) -> list[Tensor | None]:
    """The gradients of ``definition(*inputs)`` as a graph of plain PyTorch; None where none is needed."""
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        # Aliases, because one input may have been computed from another, and only the direct paths count.
        aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        needed = [alias for alias in aliases if alias is not None and alias.requires_grad]
        gradients = iter(torch.autograd.grad(definition(*aliases), needed, grad, create_graph=True))
        return [next(gradients) if alias is not None and alias.requires_grad else None for alias in aliases]
