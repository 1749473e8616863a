"""Pooling and broadcasting around a middle of the caller's own: out = x * scale + term.

(scale, term) = middle(context), where the context is the mean of x over the pixels. Eager PyTorch sweeps over
the map about nine times in a training step; here it is read twice and out is written, and backward

    read grad and x       grad_scale = sum_s grad * x, grad_term = sum_s grad
    read grad, write      grad_x = grad * scale + grad_context / S

The middle, plain PyTorch, stands between two autograd Functions, and grad_x depends on what both of them are
given. So the later one, which autograd runs first in the backward pass, hands grad and scale on to the
earlier one, as the gradients of two outputs of it that hold no numbers (the tokens), and the earlier one
makes grad_x of them in one sweep. Saved for the backward pass are x and scale, as in eager.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gc_cuda import _extension, reference
from gc_cuda.ops import functional
from gc_cuda.ops.contexts import differentiable_wanted, is_foreign, plain_pytorch_wanted
from gc_cuda.ops.operands import ACCUMULATION
from gc_cuda.ops.tail import capability

# context [N, C] -> (scale, term), each [N, C] or [N, C, 1, 1], or None
Middle = Callable[[Tensor], "tuple[Tensor | None, Tensor | None]"]

_DEVICES = ("cpu", "cuda", "meta")


def around(x: Tensor, middle: Middle, mask: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
    """out = x * scale + term with (scale, term) = middle(context), context[n, c] = mean_s x[n, c, s].

    With a mask the context is :func:`gc_cuda.attention_pool`'s, and both gradients of x are made, and added.

    What the operators do not serve is computed by plain PyTorch, with the same results: an x that is not a
    dense [N, C, H, W], contiguous or channels_last, of float32, float16, bfloat16 or float64; a scale or term
    of another shape, or of a dtype that makes that of out wider than x's, as it may be under autocast; under
    the compiler, and wherever gc_cuda's other functions are plain PyTorch.

    Args:
        x: [N, C, H, W].
        middle: of the context, [N, C] in x's dtype. It is called once, and autograd records what it does.
        mask: weight and bias of the 1x1 convolution that gives the logits of attention pooling; None: the mean.

    Returns:
        out, [N, C, H, W]; it may be changed in place.

    Raises:
        ValueError: if the middle gives neither scale nor term.
        ImportError: where the extension is missing or lacks CUDA; it says what to run.
    """
    if plain_pytorch_wanted() or torch.compiler.is_compiling() or not _is_served(x):
        pooled = reference.average_pool(x) if mask is None else reference.attention_pool(x, *mask)
        return _plain_broadcast(x, *_of_middle(middle, pooled))
    _extension.require()
    if x.is_cuda:
        _extension.require_cuda()
    if mask is not None:
        return _around_attention(x, middle, mask)
    if not torch.is_grad_enabled():
        scale, term = _of_middle(middle, torch.ops.gc_cuda.pixel_sum.default(x, True))
        if not _fit(x, scale, term):
            return _plain_broadcast(x, scale, term)
        return torch.ops.gc_cuda.broadcast.default(x, _like(x, scale), _like(x, term))
    context, map_token, vector_token = _Pool.apply(x)
    scale, term = _of_middle(middle, context)
    if not _fit(x, scale, term):
        return _plain_broadcast(x, scale, term)
    return _Broadcast.apply(x, map_token, vector_token, _like(x, scale), _like(x, term))


def by_kernels(device: torch.device) -> bool:
    """Whether a GPU takes this way: a newer path (docs/newer-paths.md), which is off at first."""
    return _extension.has_cuda() and bool(_extension.compiled_module().around_on(capability(device)))


def _around_attention(x: Tensor, middle: Middle, mask: tuple[Tensor, Tensor | None]) -> Tensor:
    scale, term = _of_middle(middle, functional.attention_pool(x, *mask))
    if not _fit(x, scale, term):
        return _plain_broadcast(x, scale, term)
    scale, term = _like(x, scale), _like(x, term)
    if scale is None:
        assert term is not None
        return functional.broadcast_add(x, term)
    return functional.broadcast_mul(x, scale) if term is None else functional.broadcast_mul_add(x, scale, term)


def _is_served(x: Any) -> bool:
    if not isinstance(x, Tensor) or is_foreign(x) or x.dim() != 4 or x.dtype not in ACCUMULATION:
        return False
    if x.layout is not torch.strided or x.is_nested or x.device.type not in _DEVICES or 0 in x.shape[1:]:
        return False
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _of_middle(middle: Middle, context: Tensor) -> tuple[Tensor | None, Tensor | None]:
    scale, term = middle(context)
    if scale is None and term is None:
        raise ValueError("middle must give a scale, a term or both, got neither")
    return scale, term


def _fit(x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether each vector has a value per image and channel, and x * scale + term has x's dtype."""
    shape = x.shape[:2]
    for vector in vectors:
        if vector is None:
            continue
        if vector.shape != shape and vector.shape != (*shape, 1, 1):
            return False
        if vector.dtype != x.dtype and torch.promote_types(vector.dtype, x.dtype) != x.dtype:
            return False
        if vector.device != x.device or is_foreign(vector):
            return False
    return True


def _like(x: Tensor, vector: Tensor | None) -> Tensor | None:
    """As [N, C] in x's dtype, to which PyTorch would convert a narrower one, too."""
    return None if vector is None else vector.flatten(1).to(x.dtype)


def _plain_broadcast(x: Tensor, scale: Tensor | None, term: Tensor | None) -> Tensor:
    if scale is not None:
        x = x * _on_pixels(scale)
    return x if term is None else x + _on_pixels(term)


def _on_pixels(vector: Tensor) -> Tensor:
    return vector[:, :, None, None] if vector.dim() == 2 else vector


class _Pool(Function):
    """x -> the context, and the tokens: a map and a vector in shape and dtype, each one element in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        context = torch.ops.gc_cuda.pixel_sum.default(x, True)
        return context, x.new_empty(()).expand(x.shape), x.new_empty(()).expand(context.shape)

    @staticmethod
    def backward(
        ctx: Any, grad_context: Tensor | None, grad: Tensor | None, scale: Tensor | None
    ) -> Tensor | None:
        """grad * scale + grad_context / S, where scale is None for 1 and any other None is 0."""
        _, _, h, w = ctx.shape
        term = None if grad_context is None else grad_context / (h * w)
        if grad is None:
            # A view of N*C numbers: what is written is the sum that autograd makes of it.
            return None if term is None else term[:, :, None, None].expand(ctx.shape)
        if scale is None and term is None:
            return grad
        if any(differentiable_wanted(one) for one in (grad, grad_context) if one is not None):
            return _plain_broadcast(grad, scale, term)
        return torch.ops.gc_cuda.broadcast.default(grad, scale, term)


class _Broadcast(Function):
    """out = x * scale + term; scale or term may be absent.

    x gets no gradient here: the tokens carry what _Pool makes it of. But x is an input, so that second
    derivatives find it in the gradient of scale.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        map_token: Tensor,
        vector_token: Tensor,
        scale: Tensor | None,
        term: Tensor | None,
    ) -> Tensor:
        needs_x, _, _, needs_scale, _ = ctx.needs_input_grad
        # None of what is saved may be None, which tools that walk a graph's saved tensors do not expect.
        ctx.is_kept = needs_scale, needs_x and scale is not None
        ctx.save_for_backward(*[one for one, kept in zip((x, scale), ctx.is_kept) if kept])
        ctx.layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        return torch.ops.gc_cuda.broadcast.default(x, scale, term)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        x, scale = (next(tensors) if kept else None for kept in ctx.is_kept)
        _, _, _, needs_scale, needs_term = ctx.needs_input_grad
        grad_scale = grad_term = None
        if differentiable_wanted(grad):
            if x is not None and needs_scale:
                grad_scale = (grad * x).sum((2, 3))
            if needs_term:
                grad_term = grad.sum((2, 3))
            return None, grad, scale, grad_scale, grad_term
        grad = grad.contiguous(memory_format=ctx.layout)
        if needs_scale:
            grad_scale, grad_term = torch.ops.gc_cuda.broadcast_sums.default(grad, x)
        elif needs_term:
            grad_term = torch.ops.gc_cuda.pixel_sum.default(grad, False)
        return None, grad, scale, grad_scale, grad_term if needs_term else None
