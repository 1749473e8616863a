"""The autograd Function of :func:`gc_cuda.global_context`: one operator forward, one backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from gc_cuda import reference
from gc_cuda._contexts import differentiable_wanted
from gc_cuda._double_backward import differentiable_gradients
from gc_cuda._extension import compiled_module
from gc_cuda._saved import save, saved
from gc_cuda.reference import Transform

# The tensors of a branch as the operators take them: six, or four without a layer norm, or none.
Present = Sequence[Tensor]
# The operators' numbers.
_ACTIVATION = {name: number for number, name in enumerate(reference.ACTIVATIONS)}
_GATE = {name: number for number, name in enumerate(reference.GATES)}
# The place of each present tensor among w1, b1, norm_weight, norm_bias, w2, b2, by how many there are.
_PLACES = {0: (), 4: (0, 1, 4, 5), 6: (0, 1, 2, 3, 4, 5)}


def _splits(counts: tuple[int, int]) -> tuple[list[int], list[int], list[int]]:
    """Of the tensors of add and of mul in a row, so many each: where those are that the backward operator
    reads, where b1 and b2 are, of which it needs the shape only, and where each is when these follow those.
    """
    weights: list[int] = []
    biases: list[int] = []
    for first, count in ((0, counts[0]), (counts[0], counts[1])):
        for i in range(count):
            (biases if i in (1, count - 1) else weights).append(first + i)
    order = [*weights, *biases]
    return weights, biases, [order.index(i) for i in range(len(order))]


_SPLITS = {(add, mul): _splits((add, mul)) for add in _PLACES for mul in _PLACES if add or mul}


class Policy(NamedTuple):
    """What the block computes besides its tensors."""

    pooling_type: str
    activation: str
    gate: str
    eps: float

    def numbers(self) -> tuple[int, int]:
        """The operators' arguments activation and gate."""
        return _ACTIVATION[self.activation], _GATE[self.gate]


class _Backward(NamedTuple):
    """The tensors that the backward operator takes besides the gradient, in its order."""

    x: Tensor | None
    mask_weight: Tensor | None
    mask_bias: Tensor | None  # where it needs a gradient
    add: Present
    mul: Present
    kept: Tensor


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
        out = apply(policy, len(add), x, mask_weight, mask_bias, *add, *mul)
        return out[0] if isinstance(out, tuple) else out
    # A Function of 11 arguments would take as long as the operator does on a small map.
    run = _operator("global_context")
    return run(x, mask_weight, mask_bias, add, mul, policy.eps, *policy.numbers())


def _operator(name: str) -> Callable[..., Any]:
    """An operator of the whole block, by position."""
    if _watched():
        return getattr(torch.ops.gc_cuda, name).default
    return getattr(compiled_module(), name)


def _watched() -> bool:
    """Whether somebody wants to see calls of torch.ops: the compiler, or a TorchFunctionMode."""
    return torch.compiler.is_compiling() or torch._C._len_torch_function_stack() > 0


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
    """Inputs: policy, how many tensors add has, x, mask_weight, mask_bias, then those of add and of mul.

    Output: out; where x is not saved also what is kept of the forward pass, for the second derivatives of
    average pooling with add alone: their first gradients depend on x by the context only, so what flows back
    into the context reaches x through what is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        policy: Policy,
        add_count: int,
        x: Tensor,
        mask_weight: Tensor | None,
        mask_bias: Tensor | None,
        *branches: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        out, kept = _operator("global_context_kept")(
            x,
            mask_weight,
            mask_bias,
            branches[:add_count],
            branches[add_count:],
            policy.eps,
            *policy.numbers(),
        )
        needs = ctx.needs_input_grad
        counts = add_count, len(branches) - add_count
        bias = mask_bias if needs[4] else None
        # Without gradients for the rest of them, x and the parameters need not outlive the call.
        only_bias = not (needs[2] or needs[3] or any(needs[5:]))
        reads_x = counts[1] > 0 or (mask_weight is not None and (needs[2] or needs[3]))
        ctx.call = policy, counts, only_bias, reads_x
        if only_bias:
            save(ctx, (), (bias,))
            return out
        weights, biases, _ = _SPLITS[counts]
        tensors = [branches[i] for i in weights]
        if mask_weight is not None:
            tensors.insert(0, mask_weight)
        if reads_x:
            tensors.insert(0, x)
        save(ctx, (*tensors, kept), (bias, *[branches[i] for i in biases]))
        if reads_x:
            return out
        ctx.size, ctx.dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)  # a gradient of zeros for what is kept would be one more launch
        return out, kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_kept: Tensor | None = None) -> tuple[Tensor | None, ...]:
        policy, counts, only_bias, reads_x = ctx.call
        needed = ctx.needs_input_grad[2:]
        differentiable = grad is not None and differentiable_wanted(grad)
        tensors, (mask_bias, *biases) = saved(ctx, values_of_biases=differentiable)
        if only_bias:
            return None, None, None, None, torch.zeros_like(mask_bias), *[None] * sum(counts)
        *weights, kept = tensors
        x = weights.pop(0) if reads_x else None
        mask_weight = None if policy.pooling_type == "avg" else weights.pop(0)
        order = [*weights, *biases]
        branches = [order[i] for i in _SPLITS[counts][2]]
        call = _Backward(x, mask_weight, mask_bias, branches[: counts[0]], branches[counts[0] :], kept)
        gradients: list[Tensor | None] = [None] * len(needed)
        if grad is not None:
            gradients = (_differentiable if differentiable else _fused)(ctx, grad, call)
        if grad_kept is not None and needed[0] and not torch.compiler.is_compiling():
            share = _spread(_state(ctx, grad_kept)[:, 2:], ctx.size)
            direct = gradients[0]
            gradients[0] = (share if direct is None else direct + share).to(ctx.dtype)
        return None, None, *gradients


# Autograd's own apply; that of torch.autograd.Function first looks for torch.func's wrappers in the inputs.
_apply_unwrapped = super(Function, _WholeBlock).apply


def _fused(ctx: Any, grad: Tensor, call: _Backward) -> list[Tensor | None]:
    policy, counts, *_ = ctx.call
    needed = ctx.needs_input_grad[2:]
    answers = _placed(needed, counts) if _watched() else needed
    given = _operator("global_context_backward")(grad, *call, *policy.numbers(), answers)
    if len(given) == len(needed):
        return given
    gradients = iter(given)
    return [next(gradients) if wanted else None for wanted in needed]


def _placed(needed: Sequence[bool], counts: tuple[int, int]) -> list[bool]:
    """The operator's answers: for each of a branch's six tensors, False for one that is not there."""
    placed = [*needed[:3], *[False] * 12]
    given = iter(needed[3:])
    for first, count in zip((3, 9), counts):
        for place in _PLACES[count]:
            placed[first + place] = next(given)
    return placed


def _differentiable(ctx: Any, grad: Tensor, call: _Backward) -> list[Tensor | None]:
    """The same by plain PyTorch, so that it can be differentiated again."""
    policy, (add_count, _), *_ = ctx.call
    if call.x is None:
        return _differentiable_without_x(ctx, grad, call)

    def definition(x: Tensor, mask_weight: Tensor | None, *branches: Tensor) -> Tensor:
        return reference.global_context(
            x,
            mask_weight,
            add=as_transform(branches[:add_count]),
            mul=as_transform(branches[add_count:]),
            **policy._asdict(),
        )

    of_x, of_weight, *of_branches = differentiable_gradients(
        definition, grad, call.x, call.mask_weight, *call.add, *call.mul
    )
    return [of_x, of_weight, _zero(call.mask_bias), *of_branches]


def _differentiable_without_x(ctx: Any, grad: Tensor, call: _Backward) -> list[Tensor | None]:
    """For out = x + t(context), where the context is the mean of x, or where x needs no gradient."""
    policy = ctx.call[0]
    context = _state(ctx, call.kept)[:, 2:]
    if not ctx.needs_input_grad[2]:
        context = context.detach()

    def definition(context: Tensor, *add: Tensor) -> Tensor:
        branch = as_transform(add)
        assert branch is not None
        return reference.transform(context, branch, policy.eps, policy.activation)

    grad_term = grad.sum((2, 3), dtype=context.dtype)
    grad_context, *grad_add = differentiable_gradients(definition, grad_term, context, *call.add)
    grad_x = None if grad_context is None else (grad + _spread(grad_context, ctx.size)).to(ctx.dtype)
    return [grad_x, None, _zero(call.mask_bias), *grad_add]


def _zero(mask_bias: Tensor | None) -> Tensor | None:
    """The gradient of the mask's bias: the softmax does not feel a shift of its logits."""
    return None if mask_bias is None else torch.zeros_like(mask_bias)


def _state(ctx: Any, kept: Tensor) -> Tensor:
    """The first part of what is kept, or of a gradient for it, [N, C + 2]: two statistics and the context."""
    n, c, _, _ = ctx.size
    return kept[: n * (c + 2)].view(n, c + 2)


def _spread(grad_context: Tensor, size: Sequence[int]) -> Tensor:
    """The gradient of a mean over the pixels, as a view of N*C numbers."""
    n, c, h, w = size
    return (grad_context / (h * w))[:, :, None, None].expand(n, c, h, w)
