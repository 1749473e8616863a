"""The autograd Function of :func:`gc_cuda.global_context`: one operator forward, one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from gc_cuda import reference
from gc_cuda._double_backward import differentiable_gradients, graph_wanted
from gc_cuda.reference import Transform

_ABSENT = (None,) * 6  # the six tensors of a branch that is not there
# The operators' numbers.
_ACTIVATION = {name: number for number, name in enumerate(reference.ACTIVATIONS)}
_GATE = {name: number for number, name in enumerate(reference.GATES)}


class Policy(NamedTuple):
    """What the block computes besides its tensors."""

    pooling_type: str
    activation: str
    gate: str
    eps: float

    def numbers(self) -> tuple[int, int]:
        """The operators' arguments activation and gate."""
        return _ACTIVATION[self.activation], _GATE[self.gate]


def whole_block(
    x: Tensor,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    add: Transform | None,
    mul: Transform | None,
    policy: Policy,
) -> Tensor:
    """The output, or some error where an argument does not fit: :mod:`gc_cuda._checks` finds the words."""
    of_add, of_mul = _six(add), _six(mul)
    if torch.is_grad_enabled():
        out, _ = _WholeBlock.apply(x, mask_weight, mask_bias, policy, *of_add, *of_mul)
    else:  # a Function of 16 arguments would take as long as the operator does on a small map
        out, *_ = torch.ops.gc_cuda.global_context.default(
            x, mask_weight, mask_bias, _present(of_add), _present(of_mul), policy.eps, *policy.numbers()
        )
    return out


class _WholeBlock(Function):
    """Inputs: x, mask_weight, mask_bias, policy, then the six tensors of add and of mul, or six None.

    Outputs: out, and the operator's state, which is there for the second derivatives of average pooling with
    add alone: their first gradients depend on x by the context only, so x is not saved, and what flows back
    into the context reaches x through the state. A branch without a layer norm has None for its two.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask_weight: Tensor | None,
        mask_bias: Tensor | None,
        policy: Policy,
        *branches: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        add, mul = _present(branches[:6]), _present(branches[6:])
        out, *rest = torch.ops.gc_cuda.global_context.default(
            x, mask_weight, mask_bias, add, mul, policy.eps, *policy.numbers()
        )
        state = rest[1]
        needs_x, needs_weight, needs_bias, _, *needs_branches = ctx.needs_input_grad
        ctx.policy, ctx.size, ctx.dtype = policy, x.shape, x.dtype
        # Without gradients for the rest of them, x and the parameters need not outlive the call.
        ctx.only_bias = not (needs_x or needs_weight or any(needs_branches))
        bias = mask_bias if needs_bias else None
        if ctx.only_bias:
            ctx.save_for_backward(bias)
        else:
            # mul's first tensor stands for it: Dynamo of torch 2.11 cannot tell whether a list is empty.
            reads_x = branches[6] is not None or (mask_weight is not None and (needs_x or needs_weight))
            ctx.save_for_backward(bias, x if reads_x else None, mask_weight, *branches, *rest)
        ctx.set_materialize_grads(False)  # a gradient of zeros for the state would be one more launch
        return out, state

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        mask_bias, *saved = ctx.saved_tensors
        # The softmax does not feel a shift of its logits.
        grad_bias = None if mask_bias is None else torch.zeros_like(mask_bias)
        gradients: list[Tensor | None] = [None] * 14
        if not ctx.only_bias:
            if grad is not None:
                gradients = (_differentiable if graph_wanted() else _fused)(ctx, grad, *saved)
            if grad_state is not None and not torch.compiler.is_compiling():
                _add_share_of_context(ctx, gradients, grad_state)
        grad_x, grad_weight, *grad_branches = gradients
        return grad_x, grad_weight, grad_bias, None, *grad_branches


def _six(branch: Transform | None) -> Sequence[Tensor | None]:
    """The tensors of a branch by their places; what has no six places, or none in the first, is no branch."""
    if branch is None:
        return _ABSENT
    if not isinstance(branch, (tuple, list)) or len(branch) != 6 or branch[0] is None:
        raise TypeError(f"no Transform: {type(branch).__name__}")
    return branch


def _present(branch: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What the operator takes for a branch; a None that should not be there stays, and is rejected there."""
    w1, b1, norm_weight, norm_bias, w2, b2 = branch
    if w1 is None:
        return []
    if norm_weight is None and norm_bias is None:
        return [w1, b1, w2, b2]
    return [w1, b1, norm_weight, norm_bias, w2, b2]


def _as_transform(branch: Sequence[Tensor | None]) -> Transform | None:
    return None if branch[0] is None else Transform(*branch)  # type: ignore[arg-type]


def _needed(ctx: Any) -> list[bool]:
    """Which of x, mask_weight, add's six and mul's six tensors need a gradient."""
    needs_x, needs_weight, _, _, *needs_branches = ctx.needs_input_grad
    return [needs_x, needs_weight, *needs_branches]


def _fused(
    ctx: Any, grad: Tensor, x: Tensor | None, mask_weight: Tensor | None, *saved: Tensor | None
) -> list[Tensor | None]:
    needed = _needed(ctx)
    gradients = torch.ops.gc_cuda.global_context_backward.default(
        grad,
        x,
        mask_weight,
        _present(saved[:6]),
        _present(saved[6:12]),
        *saved[12:],
        *ctx.policy.numbers(),
        needed,
    )
    return [gradient if wanted else None for gradient, wanted in zip(gradients, needed)]


def _differentiable(
    ctx: Any, grad: Tensor, x: Tensor | None, mask_weight: Tensor | None, *saved: Tensor | None
) -> list[Tensor | None]:
    """The same by plain PyTorch, so that it can be differentiated again."""
    branches, state = saved[:12], saved[13]
    if x is None:
        assert state is not None
        return _differentiable_without_x(ctx, grad, state, branches[:6])

    def definition(x: Tensor, mask_weight: Tensor | None, *branches: Tensor | None) -> Tensor:
        return reference.global_context(
            x,
            mask_weight,
            add=_as_transform(branches[:6]),
            mul=_as_transform(branches[6:]),
            **ctx.policy._asdict(),
        )

    return differentiable_gradients(definition, grad, x, mask_weight, *branches)


def _differentiable_without_x(
    ctx: Any, grad: Tensor, state: Tensor, add: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """For out = x + t(context), where the context is the mean of x, or where x needs no gradient."""
    needs_x = ctx.needs_input_grad[0]
    context = state[:, 2:] if needs_x else state[:, 2:].detach()

    def definition(context: Tensor, *add: Tensor | None) -> Tensor:
        branch = _as_transform(add)
        assert branch is not None
        return reference.transform(context, branch, ctx.policy.eps, ctx.policy.activation)

    grad_term = grad.sum((2, 3), dtype=context.dtype)
    grad_context, *grad_add = differentiable_gradients(definition, grad_term, context, *add)
    grad_x = None if grad_context is None else (grad + _spread(grad_context, ctx.size)).to(ctx.dtype)
    return [grad_x, None, *grad_add, *_ABSENT]


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
