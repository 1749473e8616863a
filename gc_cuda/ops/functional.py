"""The public operations: the whole block, and its parts, pooling over the pixels and broadcasting back.

Shapes: x [N, C, H, W], contiguous or channels_last (other strides are copied first); S = H*W pixels. Every
function takes float32, float16, bfloat16 and float64; sums are kept in float32 (float64 for float64), and the
result has x's dtype. The tensors that travel with x (logits, mask_weight, mask_bias, scale, term, those of a
Transform) have x's dtype or that of its sums. N = 0 is allowed. Results are bitwise reproducible, whatever
the number of threads. On the CPU the bits do not depend on where a tensor lies in memory; on CUDA the
alignment of x alone may change them.

Every function raises ValueError for a shape or device that does not fit, TypeError for a dtype that does not
or for what is not a dense tensor, and ImportError, saying what to run, if the extension is missing or lacks
CUDA.

Saved for the backward pass are x and small vectors, never the output. Differentiating twice
(``create_graph=True``) works: the gradients are then computed by plain PyTorch as in
:mod:`gc_cuda.reference`, as are those of a batch of gradients (``is_grads_batched=True``, ``vmap``). While a
model is exported (``torch.export``, ``torch.onnx.export``, ``torch.jit.trace``), under ``torch.func``
transforms, within ``torch.autograd.forward_ad.dual_level``, and for tensors of a subclass of Tensor (DTensor,
say) every function is its reference. A subclass whose tensors the operators may have says so by a class
attribute ``gc_cuda_served = True``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gc_cuda import _extension, reference
from gc_cuda.ops import checks, fake, flops
from gc_cuda.ops.autograd import differentiable_gradients, save, saved
from gc_cuda.ops.contexts import differentiable_wanted, is_foreign, plain_pytorch_wanted
from gc_cuda.ops.operands import tensors_of
from gc_cuda.ops.tail import bn_context_add_relu as bn_context_add_relu
from gc_cuda.ops.whole_block import policy_of, whole_block
from gc_cuda.reference import Transform

bn_context_add_relu.__module__ = __name__  # it is one of the public operations, in a file of its own

if _extension.build_config() is not None:
    fake.register()
    flops.register()


def softmax_pool(x: Tensor, logits: Tensor) -> Tensor:
    """Softmax-weighted mean of the pixels: context[n, c] = sum_s softmax(logits[n])[s] * x[n, c, s].

    One read of x. As in PyTorch, an image with all logits -inf, or with a NaN or +inf logit, gives NaN.

    Args:
        x: [N, C, H, W].
        logits: [N, H*W] or [N, 1, H, W].

    Returns:
        context, [N, C].
    """
    if _plain_pytorch_wanted(x, logits):
        return reference.softmax_pool(x, logits)
    _extension.require()
    checks.feature_map(x)
    checks.logits(logits, x)
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
    if _plain_pytorch_wanted(x, mask_weight, mask_bias):
        return reference.attention_pool(x, mask_weight, mask_bias)
    _extension.require()
    checks.feature_map(x)
    checks.mask_weight(mask_weight, x)
    if mask_bias is not None:
        checks.mask_bias(mask_bias, x)
    return _AttentionPool.apply(x, mask_weight, mask_bias)


def average_pool(x: Tensor) -> Tensor:
    """context[n, c] = mean of x[n, c] over the pixels: [N, C, H, W] -> [N, C]. One read of x."""
    if _plain_pytorch_wanted(x):
        return reference.average_pool(x)
    _extension.require()
    checks.feature_map(x)
    return _AveragePool.apply(x)


def broadcast_add(x: Tensor, term: Tensor) -> Tensor:
    """out[n, c, s] = x[n, c, s] + term[n, c].

    Args:
        x: [N, C, H, W].
        term: [N, C] or [N, C, 1, 1].

    Returns:
        out, [N, C, H, W] in the memory format of x.
    """
    if _plain_pytorch_wanted(x, term):
        return reference.broadcast_add(x, term)
    _extension.require()
    checks.feature_map(x)
    checks.per_channel(term, "term", x)
    return _Broadcast.apply(x, None, term)


def broadcast_mul(x: Tensor, scale: Tensor) -> Tensor:
    """out[n, c, s] = x[n, c, s] * scale[n, c].

    Args:
        x: [N, C, H, W].
        scale: [N, C] or [N, C, 1, 1].

    Returns:
        out, [N, C, H, W] in the memory format of x.
    """
    if _plain_pytorch_wanted(x, scale):
        return reference.broadcast_mul(x, scale)
    _extension.require()
    checks.feature_map(x)
    checks.per_channel(scale, "scale", x)
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
    if _plain_pytorch_wanted(x, scale, term):
        return reference.broadcast_mul_add(x, scale, term)
    _extension.require()
    checks.feature_map(x)
    checks.per_channel(scale, "scale", x)
    checks.per_channel(term, "term", x)
    return _Broadcast.apply(x, scale, term)


def global_context(
    x: Tensor,
    mask_weight: Tensor | None = None,
    mask_bias: Tensor | None = None,
    add: Transform | None = None,
    mul: Transform | None = None,
    *,
    pooling_type: str = "att",
    activation: str = "relu",
    gate: str = "sigmoid",
    eps: float = 1e-5,
) -> Tensor:
    """The global context block: pool, transform, broadcast back; one operator forward, one backward.

    out = x * gate(t_mul(context)) if there is a ``mul``, then + t_add(context) if there is an ``add``:

        context    = sum_s softmax(logits)[s] * x[:, s], logits[s] = mask_weight . x[:, s] + mask_bias,
                     for "att"; the mean of the pixels for "avg"
        t(context) = w2 act(norm_weight * (h - mean h) / sqrt(var h + eps) + norm_bias) + b2,
                     h = w1 context + b1, mean and (biased) variance over the P hidden units;
                     w2 act(h) + b2 where norm_weight and norm_bias are None

    "att" with ``add`` is the block of Cao et al., GCNet (https://arxiv.org/abs/1904.11492); "avg" with
    ``mul`` and no layer norm that of Hu et al., Squeeze-and-Excitation (https://arxiv.org/abs/1709.01507).

    Three passes over memory: x is read twice, out is written; backward four (five with ``mul``). Between the
    pixels of x and those of out nothing is rounded below float32. The gradient of mask_bias is an exact 0.
    Saved for the backward pass are float32 logits and vectors, and x unless nothing needs it: for "avg"
    without ``mul`` it is not kept. The small tensors may have x's dtype or that of its sums, each its own:
    half x beside float32 parameters needs no casts. Autocast changes nothing here.

    Args:
        x: [N, C, H, W].
        mask_weight: C elements in any shape, as in [C] or the [1, C, 1, 1] of a 1x1 convolution; None for
            "avg".
        mask_bias: one element, or None.
        add: a Transform (w1, b1, norm_weight, norm_bias, w2, b2) with w1 [P, C], w2 [C, P], b1, norm_weight
            and norm_bias of P elements (or both None) and b2 of C; trailing dimensions of size 1 do not
            matter. Or None.
        mul: the same, with a P of its own. One of the two must be given.
        pooling_type: "att" or "avg".
        activation: act of both branches: "relu", "silu" or "hardswish".
        gate: of ``mul``: "sigmoid" or "hardsigmoid", which is relu6(t + 3) / 6.
        eps: of the layer norms, not negative.

    Returns:
        out, [N, C, H, W] in the dtype and memory format of x; it may be changed in place.

    Raises:
        ValueError: for a shape or device that does not fit, an unknown pooling_type, activation or gate, a
            mask_weight that is missing or of no use, no branch at all, or a negative eps.
        TypeError: for a dtype that does not fit, or for what is not a dense tensor or Transform.
        ImportError: where the extension is missing or lacks CUDA; it says what to run.
    """
    if _plain_pytorch_wanted(x, mask_weight, mask_bias, *_tensors(add), *_tensors(mul)):
        options: Any = {"pooling_type": pooling_type, "activation": activation, "gate": gate, "eps": eps}
        return reference.global_context(x, mask_weight, mask_bias, add, mul, **options)
    _extension.require()
    arguments = x, mask_weight, mask_bias, add, mul, pooling_type, activation, gate, eps
    if torch.compiler.is_compiling():  # a check costs no run time then
        checks.global_context(*arguments)
        policy = policy_of(activation, gate, eps)
        return whole_block(x, mask_weight, mask_bias, tensors_of(add), tensors_of(mul), policy)
    try:
        checks.unseen_by_the_operator(x, mask_weight, pooling_type, eps)
        policy = policy_of(activation, gate, eps)
        return whole_block(x, mask_weight, mask_bias, tensors_of(add), tensors_of(mul), policy)
    except Exception:
        try:
            checks.global_context(*arguments)
        except (ValueError, TypeError, ImportError) as explanation:
            raise explanation from None
        raise


def _tensors(branch: Any) -> tuple[Any, ...]:
    return tuple(branch) if isinstance(branch, (tuple, list)) else ()


def _plain_pytorch_wanted(*tensors: Any) -> bool:
    """Whether the reference has to run: because of where the call is made, or because of its tensors."""
    return plain_pytorch_wanted() or any(map(is_foreign, tensors))


class _SoftmaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor) -> Tensor:
        context, state = torch.ops.gc_cuda.softmax_pool.default(x, logits.flatten(1))
        ctx.save_for_backward(x, logits, state)
        return context

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, logits, state = ctx.saved_tensors
        if differentiable_wanted(grad):
            return tuple(differentiable_gradients(reference.softmax_pool, grad, x, logits))
        grad_x, grad_logits = torch.ops.gc_cuda.softmax_pool_backward.default(
            grad, x, logits.flatten(1), state
        )
        return grad_x, grad_logits.view(logits.shape)


class _AttentionPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask_weight: Tensor, mask_bias: Tensor | None) -> Tensor:
        context, logits, state = torch.ops.gc_cuda.attention_pool.default(x, mask_weight, mask_bias)
        save(ctx, (x, mask_weight, logits, state), (mask_bias,))
        return context

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, mask_weight, logits, state), (mask_bias,) = saved(ctx, values_of_biases=False)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_bias:
            grad_bias = torch.zeros_like(mask_bias)
        if not (needs_x or needs_weight):
            return None, None, grad_bias
        if differentiable_wanted(grad):
            grad_x, grad_weight = differentiable_gradients(reference.attention_pool, grad, x, mask_weight)
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
        # Only the gradient of scale reads x; the gradients of an addition read nothing at all.
        ctx.is_kept = needs_scale, scale is not None
        ctx.save_for_backward(*[tensor for tensor, kept in zip((x, scale), ctx.is_kept) if kept])
        ctx.term_shape = None if term is None else term.shape
        ctx.term_dtype = None if term is None else term.dtype
        return torch.ops.gc_cuda.broadcast.default(x, _flat(scale), _flat(term))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        x, scale = (next(tensors) if kept else None for kept in ctx.is_kept)
        needed = ctx.needs_input_grad
        if differentiable_wanted(grad):
            grad_x, grad_scale, grad_term = _differentiable_broadcast_gradients(grad, x, scale, needed)
        else:
            grad_x, grad_scale, grad_term = _broadcast_gradients(grad, x, scale, needed, ctx.term_dtype)
        if grad_scale is not None:
            assert scale is not None
            grad_scale = grad_scale.to(scale.dtype).view(scale.shape)
        if grad_term is not None:
            grad_term = grad_term.to(ctx.term_dtype).view(ctx.term_shape)
        return grad_x, grad_scale, grad_term


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.flatten(1)


def _broadcast_gradients(
    grad: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    needed: tuple[bool, bool, bool],
    term_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_x, needs_scale, needs_term = needed
    # The operators return a sum in the dtype of what they read: that for a float32 term beside half x would
    # lose digits there, or overflow.
    if needs_scale:
        assert scale is not None
        wide = scale if term_dtype is None else scale.to(torch.promote_types(scale.dtype, term_dtype))
        grad_x, grad_scale, grad_term = torch.ops.gc_cuda.broadcast_mul_backward.default(
            grad, x, wide.flatten(1)
        )
        return grad_x, grad_scale, grad_term if needs_term else None
    grad_x = grad_term = None
    if needs_x:
        grad_x = grad if scale is None else torch.ops.gc_cuda.broadcast.default(grad, scale.flatten(1), None)
    if needs_term:
        grad_term = torch.ops.gc_cuda.pixel_sum.default(grad.to(term_dtype), False)
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
