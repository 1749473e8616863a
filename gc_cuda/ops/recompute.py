"""A batch norm, an activation and a block after it, with nothing kept that can be computed again.

x = act(batch_norm(y)), out = block(x): the middle of MobileNetV3's, EfficientNet's and RegNet's blocks.
Eager PyTorch keeps y for the norm, the norm's output for SiLU and Hardswish, and x for the block. Here y and
vectors of channels are kept. The backward pass computes the norm and the activation again, by the same calls
on the same numbers, so that x has the same bits: four passes more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from gc_cuda import reference
from gc_cuda.ops.autograd import differentiable_gradients, save, saved
from gc_cuda.ops.contexts import differentiable_wanted
from gc_cuda.ops.operands import Tensors, transform_of
from gc_cuda.ops.whole_block import SPLITS, Policy, operator
from gc_cuda.ops.whole_block import _fused as block_gradients

aten = torch.ops.aten


class _Activation(NamedTuple):
    run: Callable[..., Tensor]  # may overwrite its argument
    backward: Callable[..., Tensor]  # of the gradient, the argument and the result
    reads_argument: bool  # and not the result


ACTIVATIONS = {
    "relu": _Activation(torch.relu_, lambda grad, z, x: aten.threshold_backward(grad, x, 0), False),
    "silu": _Activation(functional.silu, lambda grad, z, x: aten.silu_backward(grad, z), True),
    "hardswish": _Activation(functional.hardswish, lambda grad, z, x: aten.hardswish_backward(grad, z), True),
}


class MiddlePolicy(NamedTuple):
    """What is computed besides the tensors."""

    training: bool  # of the norm: statistics of the batch
    momentum: float
    norm_eps: float
    act: str  # between norm and block
    block: Policy
    add_count: int  # the tensors of add


def bn_act_context(
    y: Tensor,
    norm: reference.BatchNorm,
    act: str,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    add: Tensors,
    mul: Tensors,
    block: Policy,
) -> Tensor:
    """:func:`gc_cuda.global_context` of act(batch_norm(y)), for training on the CPU; for arguments that fit.

    The norm has weight, bias and running statistics, which move as in :func:`torch.nn.functional.batch_norm`.
    All tensors are of one dtype, float32 or float64.
    """
    policy = MiddlePolicy(norm.training, norm.momentum, norm.eps, act, block, len(add))
    running = norm.running_mean, norm.running_var
    return _Middle.apply(policy, *running, y, norm.weight, norm.bias, mask_weight, mask_bias, *add, *mul)


# Places among the inputs of the Function, of which the first three have no gradient.
_Y, _WEIGHT, _BIAS, _MASK_WEIGHT, _MASK_BIAS, _BRANCHES = range(3, 9)


class _Middle(Function):
    """Its inputs are the policy, the running statistics, y, weight and bias of the norm, and the block's.

    The norm's bias and statistics are copied: they may change before the backward pass, in which eager does
    not read them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        policy: MiddlePolicy,
        running_mean: Tensor,
        running_var: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        mask_weight: Tensor | None,
        mask_bias: Tensor | None,
        *branches: Tensor,
    ) -> Tensor:
        if not policy.training:
            mean, var = running_mean.clone(), running_var.clone()
        elif y.is_meta:
            mean, var = torch.empty_like(weight), torch.empty_like(weight)
        else:
            mean, var = aten.batch_norm_update_stats(y, running_mean, running_var, policy.momentum)
        shift = bias.detach().clone()
        _, x = _again(policy, y, weight, shift, mean, var)
        add, mul = branches[: policy.add_count], branches[policy.add_count :]
        out, kept = operator("global_context_kept")(x, mask_weight, mask_bias, add, mul, *policy.block)
        counts = policy.add_count, len(mul)
        weights, biases, _ = SPLITS[counts]
        ctx.call = policy, counts, mask_weight is not None
        tensors = [y, weight, shift, mean, var, kept, *[branches[i] for i in weights]]
        if mask_weight is not None:
            tensors.append(mask_weight)
        save(ctx, tensors, (mask_bias, bias, *[branches[i] for i in biases]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        policy, counts, attends = ctx.call
        differentiable = differentiable_wanted(grad)
        tensors, (mask_bias, bias, *biases) = saved(ctx, values_of_biases=differentiable)
        y, weight, shift, mean, var, kept, *weights = tensors
        mask_weight = weights.pop() if attends else None
        row = [*weights, *biases]
        branches = [row[i] for i in SPLITS[counts].order]
        operands = _Operands(y, weight, shift, mean, var, mask_weight, mask_bias, branches, kept)
        if differentiable:
            return None, None, None, *_differentiable(grad, operands._replace(bias=bias), policy)
        return None, None, None, *_computed_again(grad, operands, policy, ctx.needs_input_grad[_Y:])


class _Operands(NamedTuple):
    """What the backward pass reads besides grad."""

    y: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    mask_weight: Tensor | None
    mask_bias: Tensor | None
    branches: Sequence[Tensor]
    kept: Tensor


def _again(
    policy: MiddlePolicy, y: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The norm's output, if the activation's gradient reads it, and x: the same bits in every call."""
    z, _, _ = torch.native_batch_norm(y, weight, bias, mean, var, False, 0.0, policy.norm_eps)
    act = ACTIVATIONS[policy.act]
    x = act.run(z)
    return z if act.reads_argument else None, x


def _computed_again(
    grad: Tensor, operands: _Operands, policy: MiddlePolicy, needed: Sequence[bool]
) -> list[Tensor | None]:
    y, weight, bias, mean, var, mask_weight, mask_bias, branches, kept = operands
    of_y, of_weight, of_bias, *of_block = needed
    of_norm = [of_y, of_weight, of_bias]
    z, x = _again(policy, y, weight, bias, mean, var)
    add, mul = branches[: policy.add_count], branches[policy.add_count :]
    block = x, mask_weight, mask_bias, add, mul, kept
    grad_x, *of_others = block_gradients(grad, block, policy.block, [any(of_norm), *of_block])
    if grad_x is None:
        return [None, None, None, *of_others]
    grad_z = ACTIVATIONS[policy.act].backward(grad_x, z, x)
    del x, z, block, grad_x
    inverse_std = (var + policy.norm_eps).rsqrt()
    gradients = aten.native_batch_norm_backward(
        grad_z, y, weight, mean, var, mean, inverse_std, policy.training, policy.norm_eps, of_norm
    )
    return [one if wanted else None for one, wanted in zip(gradients, of_norm)] + of_others


def _differentiable(grad: Tensor, operands: _Operands, policy: MiddlePolicy) -> list[Tensor | None]:
    """The same by plain PyTorch, so that it can be differentiated again. No statistics are moved."""
    y, weight, bias, mean, var, mask_weight, mask_bias, branches, _ = operands
    given_mean, given_var = (None, None) if policy.training else (mean, var)

    def definition(y: Tensor, weight: Tensor, bias: Tensor, mask_weight: Any, *branches: Tensor) -> Tensor:
        norm = given_mean, given_var, weight, bias, policy.training, 0.0, policy.norm_eps
        z = functional.batch_norm(y, *norm)
        return reference.global_context(
            reference.ACTIVATIONS[policy.act](z),
            mask_weight,
            add=transform_of(branches[: policy.add_count]),
            mul=transform_of(branches[policy.add_count :]),
            pooling_type="avg" if mask_weight is None else "att",
            **policy.block.words(),
        )

    of_y, of_weight, of_bias, of_mask, *of_branches = differentiable_gradients(
        definition, grad, y, weight, bias, mask_weight, *branches
    )
    of_mask_bias = None if mask_bias is None else torch.zeros_like(mask_bias)
    return [of_y, of_weight, of_bias, of_mask, of_mask_bias, *of_branches]
