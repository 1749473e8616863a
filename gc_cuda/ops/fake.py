"""Fake (meta) kernels: the shapes, dtypes and strides that the operators return, for torch.compile.

That of the whole block demands what the real ones do, as one meta tensor among others is enough to get here.
Registration needs the operators, which the extension defines: hence :func:`register`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from gc_cuda.ops import checks
from gc_cuda.ops.operands import (
    ACCUMULATION,
    ACTIVATIONS,
    GATES,
    STATISTICS,
    TAIL_VECTORS,
    Kept,
    Tensors,
    in_places,
    transform_of,
)
from gc_cuda.reference import BatchNorm


def _feature_map_like(x: Tensor) -> Tensor:
    # The kernels read NCHW if x is that, else the layout that x suggests, and write what they read.
    layout = torch.contiguous_format if x.is_contiguous() else suggest_memory_format(x)
    return torch.empty_like(x, memory_format=layout)


def _per_channel(x: Tensor, dtype: torch.dtype) -> Tensor:
    n, c, _, _ = x.shape
    return x.new_empty((n, c), dtype=dtype)


def _state(x: Tensor) -> Tensor:
    n, c, _, _ = x.shape
    return x.new_empty((n, STATISTICS + c), dtype=ACCUMULATION[x.dtype])


def _dense_like(tensor: Tensor) -> Tensor:
    # A contiguous tensor's strides stay as they are: those of dimensions of one element are not unique.
    layout = torch.preserve_format if tensor.is_contiguous() else torch.contiguous_format
    return torch.empty_like(tensor, memory_format=layout)


def softmax_pool(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return _per_channel(x, x.dtype), _state(x)


def softmax_pool_backward(
    grad_context: Tensor, x: Tensor, logits: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    return _feature_map_like(x), _dense_like(logits)


def attention_pool(x: Tensor, mask_weight: Tensor, mask_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    n, _, h, w = x.shape
    return _per_channel(x, x.dtype), x.new_empty((n, h * w), dtype=ACCUMULATION[x.dtype]), _state(x)


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


def broadcast_sums(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return _per_channel(x, x.dtype), _per_channel(x, x.dtype)


def global_context(
    x: Tensor,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    add: Tensors,
    mul: Tensors,
    eps: float,
    activation: int,
    gate: int,
) -> Tensor:
    checks.operands(x, mask_weight, mask_bias, add, mul, eps)
    for name, number, numbers in (("activation", activation, ACTIVATIONS), ("gate", gate, GATES)):
        if number not in numbers.values():
            raise ValueError(f"{name} must be one of 0 to {len(numbers) - 1}, got {number}")
    return _feature_map_like(x)


def global_context_kept(
    x: Tensor, mask_weight: Tensor | None, mask_bias: Tensor | None, add: Tensors, mul: Tensors, *policy: Any
) -> tuple[Tensor, Tensor]:
    out = global_context(x, mask_weight, mask_bias, add, mul, *policy)
    sizes = Kept.sizes(x, attends=mask_weight is not None, add=add, mul=mul)
    return out, x.new_empty(sum(sizes), dtype=ACCUMULATION[x.dtype])


def global_context_backward(
    grad: Tensor,
    x: Tensor | None,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    add: Tensors,
    mul: Tensors,
    kept: Tensor,
    activation: int,
    gate: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    needs_x, *needs_parameters = needed
    gradients = [_feature_map_like(grad if x is None else x)] if needs_x else []
    parameters = mask_weight, mask_bias, *in_places(add), *in_places(mul)
    for parameter, wanted in zip(parameters, needs_parameters):
        if wanted and parameter is not None:
            gradients.append(_dense_like(parameter))
    return gradients


def bn_context_add_relu(
    y: Tensor,
    identity: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    norm_kind: int,
    norm_eps: float,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    add: Tensors,
    mul: Tensors,
    eps: float,
    activation: int,
    gate: int,
    relu: bool,
    group_name: str = "",
    group_size: int = 1,
    image_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    given = norm_kind == 1
    norm = BatchNorm(weight, bias, mean, variance, not given, 0.0, norm_eps) if norm_kind else None
    names = "avg" if mask_weight is None else "att"
    add_transform, mul_transform = transform_of(add), transform_of(mul)
    checks.bn_context_add_relu(
        y,
        identity,
        norm,
        mask_weight,
        mask_bias,
        add_transform,
        mul_transform,
        image_factor,
        names,
        "relu",
        "sigmoid",
        eps,
    )
    kept = TAIL_VECTORS * y.shape[1]
    if add or mul:
        kept += sum(Kept.sizes(y, attends=mask_weight is not None, add=add, mul=mul))
    return _feature_map_like(y), y.new_empty(kept, dtype=ACCUMULATION[y.dtype])


def bn_context_add_relu_training(
    y: Tensor,
    identity: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    norm_eps: float,
    *block: Any,
) -> tuple[Tensor, Tensor]:
    return bn_context_add_relu(y, identity, weight, bias, running_mean, running_var, 2, norm_eps, *block)


def bn_context_add_relu_backward(
    grad: Tensor,
    y: Tensor | None,
    out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_kind: int,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    add: Tensors,
    mul: Tensors,
    kept: Tensor,
    activation: int,
    gate: int,
    needed: Sequence[bool],
    *_: Any,
) -> list[Tensor]:
    needs_y, needs_identity, *needs_parameters = needed
    like = next(tensor for tensor in (y, out, grad) if tensor is not None)
    gradients = [_feature_map_like(like) for wanted in (needs_y, needs_identity) if wanted]
    parameters = weight, bias, mask_weight, mask_bias, *in_places(add), *in_places(mul)
    for parameter, wanted in zip(parameters, needs_parameters):
        if wanted and parameter is not None:
            gradients.append(_dense_like(parameter))
    return gradients


_KERNELS = (
    softmax_pool,
    softmax_pool_backward,
    attention_pool,
    attention_pool_backward,
    pixel_sum,
    broadcast,
    broadcast_mul_backward,
    broadcast_sums,
    global_context,
    global_context_kept,
    global_context_backward,
    bn_context_add_relu,
    bn_context_add_relu_training,
    bn_context_add_relu_backward,
)


def register() -> None:
    """Attach every kernel of this file to the operator of its name, in place of what an earlier import has
    attached: the namespace of the operators outlives a module.
    """
    held = torch.ops.gc_cuda.__dict__
    if "_fakes" in held:
        held.pop("_fakes")._destroy()
    library = torch.library.Library("gc_cuda", "FRAGMENT")
    for kernel in _KERNELS:
        torch.library.register_fake(f"gc_cuda::{kernel.__name__}", kernel, lib=library)
    held["_fakes"] = library
