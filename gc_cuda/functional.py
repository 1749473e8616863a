"""The public operations: fused pooling over the pixels and broadcasting back onto them, with their gradients.

Shapes: x [N, C, H, W], contiguous or channels_last (other strides are copied first); S = H*W pixels. Every
function takes float32, float16, bfloat16 and float64; sums are kept in float32 (float64 for float64), and the
result has x's dtype. The tensors that travel with x (logits, mask_weight, mask_bias, scale, term) have x's
dtype or that of its sums. N = 0 is allowed. Results are bitwise reproducible, whatever the number of threads.

Every function raises ValueError for a shape or device that does not fit, TypeError for a dtype that does not
or for what is no dense tensor, and ImportError, saying what to run, where the extension is missing or lacks
CUDA.

Saved for the backward pass are x and small vectors, never the output. Differentiating twice
(``create_graph=True``) works: the gradients are then computed by plain PyTorch as in
:mod:`gc_cuda.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gc_cuda import _checks, _extension, _fake, reference

if _extension.build_config() is not None:
    _fake.register()


def softmax_pool(x: Tensor, logits: Tensor) -> Tensor:
    """Softmax-weighted mean of the pixels: context[n, c] = sum_s softmax(logits[n])[s] * x[n, c, s].

    One read of x. As in PyTorch, an image with all logits -inf, or with a NaN or +inf logit, gives NaN.

    Args:
        x: [N, C, H, W].
        logits: [N, H*W] or [N, 1, H, W].

    Returns:
        context, [N, C].
    """
    _extension.require()
    _checks.feature_map(x)
    _checks.logits(logits, x)
    return _SoftmaxPool.apply(x, logits)


def attention_pool(x: Tensor, mask_weight: Tensor, mask_bias: Tensor | None = None) -> Tensor:
    """:func:`softmax_pool` with logits[n, s] = sum_c mask_weight[c] * x[n, c, s] + mask_bias; one read of x.

    The logits are never rounded below float32. The softmax ignores the bias, whose gradient is an exact 0.

    Args:
        x: [N, C, H, W].
        mask_weight: C elements in any shape, as in [C] or the [1, C, 1, 1] of a 1x1 convolution.
        mask_bias: one element, or None.

    Returns:
        context, [N, C].
    """
    _extension.require()
    _checks.feature_map(x)
    _checks.mask_weight(mask_weight, x)
    if mask_bias is not None:
        _checks.mask_bias(mask_bias, x)
    return _AttentionPool.apply(x, mask_weight, mask_bias)


def average_pool(x: Tensor) -> Tensor:
    """context[n, c] = mean of x[n, c] over the pixels: [N, C, H, W] -> [N, C]. One read of x."""
    _extension.require()
    _checks.feature_map(x)
    return _AveragePool.apply(x)


def broadcast_add(x: Tensor, term: Tensor) -> Tensor:
    """out[n, c, s] = x[n, c, s] + term[n, c].

    Args:
        x: [N, C, H, W].
        term: [N, C] or [N, C, 1, 1].

    Returns:
        out, [N, C, H, W] in the memory format of x.
    """
    _extension.require()
    _checks.feature_map(x)
    _checks.per_channel(term, "term", x)
    return _Broadcast.apply(x, None, term)


def broadcast_mul(x: Tensor, scale: Tensor) -> Tensor:
    """out[n, c, s] = x[n, c, s] * scale[n, c].

    Args:
        x: [N, C, H, W].
        scale: [N, C] or [N, C, 1, 1].

    Returns:
        out, [N, C, H, W] in the memory format of x.
    """
    _extension.require()
    _checks.feature_map(x)
    _checks.per_channel(scale, "scale", x)
    return _Broadcast.apply(x, scale, None)


def broadcast_mul_add(x: Tensor, scale: Tensor, term: Tensor) -> Tensor:
    """out[n, c, s] = x[n, c, s] * scale[n, c] + term[n, c], rounded once.

    Args:
        x: [N, C, H, W].
        scale: [N, C] or [N, C, 1, 1].
        term: [N, C] or [N, C, 1, 1].

    Returns:
        out, [N, C, H, W] in the memory format of x.
    """
    _extension.require()
    _checks.feature_map(x)
    _checks.per_channel(scale, "scale", x)
    _checks.per_channel(term, "term", x)
    return _Broadcast.apply(x, scale, term)


def _graph_wanted() -> bool:
    """Whether a backward pass must be differentiable itself.

    The compiler traces backward passes with grad mode on, but cannot differentiate them again, so it gets the
    operators.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _differentiable_gradients(
    definition: Callable[..., Tensor], grad: Tensor, *inputs: Tensor
) -> list[Tensor | None]:
    """The gradients of ``definition(*inputs)`` as a graph of plain PyTorch; None where none is needed."""
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        # Aliases: one input may have been computed from another, and only the direct paths count here.
        aliases = [tensor.view_as(tensor) for tensor in inputs]
        needed = [alias for alias in aliases if alias.requires_grad]
        gradients = iter(torch.autograd.grad(definition(*aliases), needed, grad, create_graph=True))
        return [next(gradients) if alias.requires_grad else None for alias in aliases]


class _SoftmaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor) -> Tensor:
        context, state = torch.ops.gc_cuda.softmax_pool.default(x, logits.flatten(1))
        ctx.save_for_backward(x, logits, state)
        return context

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, logits, state = ctx.saved_tensors
        if _graph_wanted():
            return tuple(_differentiable_gradients(reference.softmax_pool, grad, x, logits))
        grad_x, grad_logits = torch.ops.gc_cuda.softmax_pool_backward.default(
            grad, x, logits.flatten(1), state
        )
        return grad_x, grad_logits.view(logits.shape)


class _AttentionPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask_weight: Tensor, mask_bias: Tensor | None) -> Tensor:
        context, logits, state = torch.ops.gc_cuda.attention_pool.default(x, mask_weight, mask_bias)
        ctx.save_for_backward(x, mask_weight, mask_bias, logits, state)
        return context

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mask_weight, mask_bias, logits, state = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_bias:
            grad_bias = torch.zeros_like(mask_bias)
        if not (needs_x or needs_weight):
            return None, None, grad_bias
        if _graph_wanted():
            grad_x, grad_weight = _differentiable_gradients(reference.attention_pool, grad, x, mask_weight)
        else:
            grad_x, grad_weight = torch.ops.gc_cuda.attention_pool_backward.default(
                grad, x, mask_weight, logits, state
            )
        return grad_x, grad_weight, grad_bias


class _AveragePool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return torch.ops.gc_cuda.pixel_sum.default(x, True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _, _, h, w = ctx.shape
        # A view of N*C numbers: nothing of x's size is written, and it can be differentiated as it is.
        return (grad / (h * w))[:, :, None, None].expand(ctx.shape)


class _Broadcast(Function):
    """out = x * scale + term; scale or term may be absent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, term: Tensor | None) -> Tensor:
        _, needs_scale, _ = ctx.needs_input_grad
        # x matters to nothing but the gradient of scale; the gradients of an addition need nothing at all.
        ctx.save_for_backward(x if needs_scale else None, scale)
        ctx.term_shape = None if term is None else term.shape
        ctx.term_dtype = None if term is None else term.dtype
        return torch.ops.gc_cuda.broadcast.default(x, _flat(scale), _flat(term))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        gradients = _differentiable_broadcast_gradients if _graph_wanted() else _broadcast_gradients
        grad_x, grad_scale, grad_term = gradients(grad, x, scale, ctx.needs_input_grad)
        if grad_scale is not None:
            grad_scale = grad_scale.to(scale.dtype).view(scale.shape)
        if grad_term is not None:
            grad_term = grad_term.to(ctx.term_dtype).view(ctx.term_shape)
        return grad_x, grad_scale, grad_term


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.flatten(1)


def _broadcast_gradients(
    grad: Tensor, x: Tensor | None, scale: Tensor | None, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_x, needs_scale, needs_term = needed
    if needs_scale:
        grad_x, grad_scale, grad_term = torch.ops.gc_cuda.broadcast_mul_backward.default(
            grad, x, _flat(scale)
        )
        return grad_x, grad_scale, grad_term if needs_term else None
    grad_x = grad_term = None
    if needs_x:
        grad_x = grad if scale is None else torch.ops.gc_cuda.broadcast.default(grad, scale.flatten(1), None)
    if needs_term:
        grad_term = torch.ops.gc_cuda.pixel_sum.default(grad, False)
    return grad_x, None, grad_term


def _differentiable_broadcast_gradients(
    grad: Tensor, x: Tensor | None, scale: Tensor | None, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same by plain PyTorch operations, so that it can be differentiated again."""
    needs_x, needs_scale, needs_term = needed
    grad_x = grad_scale = grad_term = None
    if needs_x:
        grad_x = grad if scale is None else reference.broadcast_mul(grad, scale)
    if needs_scale and x is not None:
        grad_scale = (grad * x).sum((2, 3))
    if needs_term:
        grad_term = grad.sum((2, 3))
    return grad_x, grad_scale, grad_term
