"""The autograd Function of :func:`gc_cuda.global_context`: one operator forward, one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from gc_cuda import reference
from gc_cuda._contexts import differentiable_wanted
from gc_cuda._double_backward import differentiable_gradients
from gc_cuda._saved import save, saved
from gc_cuda.reference import Transform

# The tensors of a branch as the operators take them: six, or four without a layer norm, or none.
Present = Sequence[Tensor]
# The operators' numbers.
_ACTIVATION = {name: number for number, name in enumerate(reference.ACTIVATIONS)}
_GATE = {name: number for number, name in enumerate(reference.GATES)}
# The place of each present tensor among w1, b1, norm_weight, norm_bias, w2, b2, by how many there are.
_PLACES = {0: (), 4: (0, 1, 4, 5), 6: (0, 1, 2, 3, 4, 5)}


class Policy(NamedTuple):
    """What the block computes besides its tensors."""

    pooling_type: str
    activation: str
    gate: str
    eps: float

    def numbers(self) -> tuple[int, int]:
        """The operators' arguments activation and gate."""
        return _ACTIVATION[self.activation], _GATE[self.gate]


class _Kept(NamedTuple):
    """What the backward pass has of the forward pass."""

    x: Tensor | None
    mask_weight: Tensor | None
    add: Present
    mul: Present
    results: Sequence[Tensor]  # logits, state, normalized, inverse_deviation, scale


def whole_block(
    x: Tensor,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    add: Present,
    mul: Present,
    policy: Policy,
    *,
    unwrapped: bool = False,
) -> Tensor:
    """The output, or some error where an argument does not fit: :mod:`gc_cuda._checks` finds the words.

    unwrapped: no tensor is a wrapper of torch.func's, not even of a transform that is over.
    """
    if torch.is_grad_enabled():
        apply = _apply_unwrapped if unwrapped else _WholeBlock.apply
        out, _ = apply(x, mask_weight, mask_bias, policy, len(add), *add, *mul)
    else:  # a Function of 16 arguments would take as long as the operator does on a small map
        out, *_ = torch.ops.gc_cuda.global_context.default(
            x, mask_weight, mask_bias, add, mul, policy.eps, *policy.numbers()
        )
    return out


def present(branch: Transform | None) -> Present:
    """What the operators take for a branch; a None that should not be there stays, and is rejected there."""
    if branch is None:
        return ()
    if not isinstance(branch, (tuple, list)) or len(branch) != 6 or branch[0] is None:
        raise TypeError(f"no Transform: {type(branch).__name__}")
    w1, b1, norm_weight, norm_bias, w2, b2 = branch
    if norm_weight is None and norm_bias is None:
        return w1, b1, w2, b2
    return w1, b1, norm_weight, norm_bias, w2, b2  # type: ignore[return-value]


def as_transform(branch: Present) -> Transform | None:
    """The other way round."""
    if not branch:
        return None
    if len(branch) == 6:
        return Transform(*branch)
    w1, b1, w2, b2 = branch
    return Transform(w1, b1, None, None, w2, b2)


class _WholeBlock(Function):
    """Inputs: x, mask_weight, mask_bias, policy, how many tensors add has, then those of add and of mul.

    Outputs: out, and the operator's state, which is there for the second derivatives of average pooling with
    add alone: their first gradients depend on x by the context only, so x is not saved, and what flows back
    into the context reaches x through the state.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask_weight: Tensor | None,
        mask_bias: Tensor | None,
        policy: Policy,
        add_count: int,
        *branches: Tensor,
    ) -> tuple[Tensor, Tensor]:
        add, mul = branches[:add_count], branches[add_count:]
        out, *rest = torch.ops.gc_cuda.global_context.default(
            x, mask_weight, mask_bias, add, mul, policy.eps, *policy.numbers()
        )
        state = rest[1]
        needs_x, needs_weight, needs_bias, _, _, *needs_branches = ctx.needs_input_grad
        ctx.policy, ctx.size, ctx.dtype, ctx.counts = policy, x.shape, x.dtype, (len(add), len(mul))
        # Without gradients for the rest of them, x and the parameters need not outlive the call.
        ctx.only_bias = not (needs_x or needs_weight or any(needs_branches))
        bias = mask_bias if needs_bias else None
        if ctx.only_bias:
            save(ctx, [], [bias])
        else:
            # Dynamo of torch 2.11 cannot tell whether a list is empty.
            reads_x = len(mul) > 0 or (mask_weight is not None and (needs_x or needs_weight))
            weights, biases = _weights_and_biases(add, mul)
            save(ctx, [x if reads_x else None, mask_weight, *weights, *rest], [bias, *biases])
        ctx.set_materialize_grads(False)  # a gradient of zeros for the state would be one more launch
        return out, state

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        differentiable = grad is not None and differentiable_wanted(grad)
        tensors, (mask_bias, *biases) = saved(ctx, values_of_biases=differentiable)
        # The softmax does not feel a shift of its logits.
        grad_bias = None if mask_bias is None else torch.zeros_like(mask_bias)
        gradients: list[Tensor | None] = [None] * 14
        if not ctx.only_bias:
            if grad is not None:
                x, mask_weight, *weights = tensors
                kept = _Kept(x, mask_weight, *_joined(weights[:-5], biases, ctx.counts), weights[-5:])
                gradients = (_differentiable if differentiable else _fused)(ctx, grad, kept)
            if grad_state is not None and not torch.compiler.is_compiling():
                _add_share_of_context(ctx, gradients, grad_state)
        grad_x, grad_weight, *grad_branches = gradients
        of_add, of_mul = _PLACES[ctx.counts[0]], _PLACES[ctx.counts[1]]
        given = [grad_branches[place] for place in of_add] + [grad_branches[6 + place] for place in of_mul]
        return grad_x, grad_weight, grad_bias, None, None, *given


# Autograd's own apply; that of torch.autograd.Function first looks for torch.func's wrappers in the inputs.
_apply_unwrapped = super(Function, _WholeBlock).apply


def _weights_and_biases(add: Present, mul: Present) -> tuple[list[Tensor], list[Tensor]]:
    """Of both branches: what the backward operator reads, and b1 and b2, of which it needs the shape only."""
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for branch in (add, mul):
        if branch:
            w1, b1, *norm, w2, b2 = branch
            weights += (w1, *norm, w2)
            biases += (b1, b2)
    return weights, biases


def _joined(
    weights: Sequence[Tensor], biases: Sequence[Tensor], counts: tuple[int, int]
) -> tuple[list[Tensor], list[Tensor]]:
    """The branches again."""
    branches: list[list[Tensor]] = []
    for count in counts:
        if count == 0:
            branches.append([])
            continue
        (w1, *norm, w2), weights = weights[: count - 2], weights[count - 2 :]
        (b1, b2), biases = biases[:2], biases[2:]
        branches.append([w1, b1, *norm, w2, b2])
    add, mul = branches
    return add, mul


def _needed(ctx: Any) -> list[bool]:
    """Which of x, mask_weight, add's six and mul's six tensors need a gradient."""
    needs_x, needs_weight, _, _, _, *needs_branches = ctx.needs_input_grad
    needed = [needs_x, needs_weight] + [False] * 12
    left = iter(needs_branches)
    for first, count in zip((2, 8), ctx.counts):
        for place in _PLACES[count]:
            needed[first + place] = next(left)
    return needed


def _fused(ctx: Any, grad: Tensor, kept: _Kept) -> list[Tensor | None]:
    needed = _needed(ctx)
    *inputs, results = kept
    gradients = torch.ops.gc_cuda.global_context_backward.default(
        grad, *inputs, *results, *ctx.policy.numbers(), needed
    )
    return [gradient if wanted else None for gradient, wanted in zip(gradients, needed)]


def _differentiable(ctx: Any, grad: Tensor, kept: _Kept) -> list[Tensor | None]:
    """The same by plain PyTorch, so that it can be differentiated again."""
    x, mask_weight, add, mul, (_, state, *_) = kept
    if x is None:
        return _differentiable_without_x(ctx, grad, state, add)

    def definition(x: Tensor, mask_weight: Tensor | None, *branches: Tensor) -> Tensor:
        return reference.global_context(
            x,
            mask_weight,
            add=as_transform(branches[: len(add)]),
            mul=as_transform(branches[len(add) :]),
            **ctx.policy._asdict(),
        )

    of_x, of_weight, *of_branches = differentiable_gradients(definition, grad, x, mask_weight, *add, *mul)
    return [of_x, of_weight, *_in_places(of_branches[: len(add)]), *_in_places(of_branches[len(add) :])]


def _in_places(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Those of a branch's six tensors, None for what is not there."""
    six: list[Tensor | None] = [None] * 6
    for place, gradient in zip(_PLACES[len(gradients)], gradients):
        six[place] = gradient
    return six


def _differentiable_without_x(ctx: Any, grad: Tensor, state: Tensor, add: Present) -> list[Tensor | None]:
    """For out = x + t(context), where the context is the mean of x, or where x needs no gradient."""
    needs_x = ctx.needs_input_grad[0]
    context = state[:, 2:] if needs_x else state[:, 2:].detach()

    def definition(context: Tensor, *add: Tensor) -> Tensor:
        branch = as_transform(add)
        assert branch is not None
        return reference.transform(context, branch, ctx.policy.eps, ctx.policy.activation)

    grad_term = grad.sum((2, 3), dtype=context.dtype)
    grad_context, *grad_add = differentiable_gradients(definition, grad_term, context, *add)
    grad_x = None if grad_context is None else (grad + _spread(grad_context, ctx.size)).to(ctx.dtype)
    return [grad_x, None, *_in_places(grad_add), *_in_places(())]


def _add_share_of_context(ctx: Any, gradients: list[Tensor | None], grad_state: Tensor) -> None:
    """Add to the gradient of x what the second derivatives sent into the mean of its pixels."""
    if ctx.needs_input_grad[0]:
        share = _spread(grad_state[:, 2:], ctx.size)
        direct = gradients[0]
        gradients[0] = (share if direct is None else direct + share).to(ctx.dtype)


def _spread(grad_context: Tensor, size: Sequence[int]) -> Tensor:
    """The gradient of a mean over the pixels, as a view of N*C numbers."""
    n, c, h, w = size
    return (grad_context / (h * w))[:, :, None, None].expand(n, c, h, w)
