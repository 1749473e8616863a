"""Run a function forward and backward on given values; the devices and memory formats to do it on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from gc_cuda import _extension

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def missing_gpu() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if _extension.has_cuda() else "gc_cuda was built without CUDA"


class Evaluation(NamedTuple):
    """What a function returned, and the gradients of its inputs (None where there is none)."""

    out: Tensor
    gradients: tuple[Tensor | None, ...]


def evaluate(
    function: Callable[..., Tensor],
    inputs: Iterable[Tensor | None],
    grad: Tensor,
    dtype: torch.dtype | None = None,
) -> Evaluation:
    """Evaluate at detached inputs, strides kept; with ``dtype``, the values are converted to it first."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out = function(*leaves)
    out.backward(grad.to(out.dtype))
    return Evaluation(out.detach(), tuple(None if leaf is None else leaf.grad for leaf in leaves))
