"""Gradients that can be differentiated again: a graph of plain PyTorch in place of the operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def differentiable_gradients(
    definition: Callable[..., Tensor], grad: Tensor, *inputs: Tensor | None
) -> list[Tensor | None]:
    """The gradients of ``definition(*inputs)`` as a graph of plain PyTorch; None where none is needed."""
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        # Aliases: one input may have been computed from another, and only the direct paths count here.
        aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        needed = [alias for alias in aliases if alias is not None and alias.requires_grad]
        gradients = iter(torch.autograd.grad(definition(*aliases), needed, grad, create_graph=True))
        return [next(gradients) if alias is not None and alias.requires_grad else None for alias in aliases]
