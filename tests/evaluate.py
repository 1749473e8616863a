"""Run a function forward and backward on given values; the devices, dtypes and memory formats to do it on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

import gc_cuda
from gc_cuda import _extension, reference

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
HALVES = [torch.float16, torch.bfloat16]
# Views that are not contiguous in either memory format, of a tensor of 3 x 8 x 7 x 9.
STRIDED = {
    "cropped": lambda x: x[:, :, 1:-1, 2:-1],
    "cropped channels_last": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, 1:-1, 2:-1],
    "channel slice": lambda x: x[:, 1:6],
    "channel slice of channels_last": lambda x: x.contiguous(memory_format=torch.channels_last)[:, 1:6],
    "every other pixel": lambda x: x[:, :, ::2, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "batch and channels swapped": lambda x: x.transpose(0, 1),
    "flipped pair of images": lambda x: x.flip(0)[::2],
    "expanded over the batch": lambda x: x[:1].expand(4, -1, -1, -1),
    "expanded over the pixels": lambda x: x[:, :, :1, :1].expand(-1, -1, 6, 7),
    "misaligned": lambda x: x.flatten()[1 : 1 + 2 * 8 * 7 * 5].view(2, 8, 7, 5),
}


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


def evaluate_all(function: str, inputs: Iterable[Tensor | None], grad: Tensor) -> tuple[Evaluation, ...]:
    """Ours, PyTorch's from the same inputs, and PyTorch's in float64."""
    eager, inputs = getattr(reference, function), tuple(inputs)
    ours = evaluate(getattr(gc_cuda, function), inputs, grad)
    return ours, evaluate(eager, inputs, grad), evaluate(eager, inputs, grad, torch.float64)
