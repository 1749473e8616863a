"""Fake (meta) kernels: the shapes, dtypes and strides that the operators return, for torch.compile.

That of the whole block demands what the real ones demand: one meta tensor among others is enough to get here.

They can be registered only once the extension has defined the operators, hence :func:`register`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from gc_cuda import _checks, _values
from gc_cuda.reference import ACTIVATIONS, GATES, Transform


def _accumulation(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _feature_map_like(x: Tensor) -> Tensor:
    # The kernels read NCHW where x is that, else the layout that x suggests, and write what they read.
    if x.is_contiguous():
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def _per_channel(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1]), dtype=dtype)


def _state(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] + 2), dtype=_accumulation(x))


def _dense_like(tensor: Tensor) -> Tensor:
    # The elements in a row, with the strides of the tensor where that is how it is.
    kept = torch.preserve_format if tensor.is_contiguous() else torch.contiguous_format
    return torch.empty_like(tensor, memory_format=kept)


def softmax_pool(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return _per_channel(x, x.dtype), _state(x)


def softmax_pool_backward(
    grad_context: Tensor, x: Tensor, logits: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    return _feature_map_like(x), _dense_like(logits)


def attention_pool(x: Tensor, mask_weight: Tensor, mask_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    n, _, h, w = x.shape
    return _per_channel(x, x.dtype), x.new_empty((n, h * w), dtype=_accumulation(x)), _state(x)


def attention_pool_backward(
    grad_context: Tensor, x: Tensor, mask_weight: Tensor, logits: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    return _feature_map_like(x), _dense_like(mask_weight)


def pixel_sum(x: Tensor, mean: bool) -> Tensor:
    return _per_channel(x, x.dtype)


def broadcast(x: Tensor, scale: Tensor | None, term: Tensor | None) -> Tensor:
    return _feature_map_like(x)


def broadcast_mul_backward(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _feature_map_like(x), _per_channel(x, scale.dtype), _per_channel(x, scale.dtype)


def global_context(
    x: Tensor,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    add: Sequence[Tensor],
    mul: Sequence[Tensor],
    eps: float,
    activation: int,
    gate: int,
) -> Tensor:
    _checks.feature_map(x)
    _checks.pooling("avg" if mask_weight is None else "att", mask_weight, mask_bias, x)
    _checks.branches(_transform(add), _transform(mul), x)
    _values.epsilon(eps)
    for name, number, kinds in (("activation", activation, ACTIVATIONS), ("gate", gate, GATES)):
        if number not in range(len(kinds)):
            raise ValueError(f"{name} must be one of 0 to {len(kinds) - 1}, got {number}")
    return _feature_map_like(x)


def global_context_kept(
    x: Tensor,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    add: Sequence[Tensor],
    mul: Sequence[Tensor],
    eps: float,
    activation: int,
    gate: int,
) -> tuple[Tensor, Tensor]:
    out = global_context(x, mask_weight, mask_bias, add, mul, eps, activation, gate)
    n, c, h, w = x.shape
    branches = [branch for branch in (add, mul) if branch]
    elements = (  # as Kept in csrc/ops/state.h
        n * (c + 2)
        + (0 if mask_weight is None else n * h * w)
        + n * sum(branch[1].numel() for branch in branches)
        + n * len(branches)
        + (n * c if mul else 0)
    )
    return out, x.new_empty(elements, dtype=_accumulation(x))


def global_context_backward(
    grad: Tensor,
    x: Tensor | None,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    add: Sequence[Tensor],
    mul: Sequence[Tensor],
    kept: Tensor,
    activation: int,
    gate: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    small = (mask_weight, mask_bias, *_numbered(add), *_numbered(mul))
    gradients = [_feature_map_like(grad if x is None else x)] if needed[0] else []
    for tensor, wanted in zip(small, needed[1:]):
        if wanted and tensor is not None:
            gradients.append(_dense_like(tensor))
    return gradients


def _transform(branch: Sequence[Tensor]) -> Transform | None:
    return Transform(*_numbered(branch)) if branch else None  # type: ignore[arg-type]


def _numbered(branch: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """w1, b1, norm_weight, norm_bias, w2, b2, None for what is not there."""
    if len(branch) == 4:
        return *branch[:2], None, None, *branch[2:]
    return tuple(branch) or (None,) * 6


_KERNELS = (
    softmax_pool,
    softmax_pool_backward,
    attention_pool,
    attention_pool_backward,
    pixel_sum,
    broadcast,
    broadcast_mul_backward,
    global_context,
    global_context_kept,
    global_context_backward,
)


def register() -> None:
    """Attach every kernel of this file to the operator of its name, in place of those that an earlier import
    in this process has attached: the operators' namespace outlives a module.
    """
    held = torch.ops.gc_cuda.__dict__
    if "_fakes" in held:
        held.pop("_fakes")._destroy()
    library = torch.library.Library("gc_cuda", "FRAGMENT")
    for kernel in _KERNELS:
        torch.library.register_fake(f"gc_cuda::{kernel.__name__}", kernel, lib=library)
    held["_fakes"] = library
