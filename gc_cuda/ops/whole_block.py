"""The autograd Function of :func:`gc_cuda.global_context`: one operator forward, one backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from gc_cuda import reference
from gc_cuda._extension import compiled_module
from gc_cuda.ops.autograd import differentiable_gradients, save, saved
from gc_cuda.ops.contexts import differentiable_wanted
from gc_cuda.ops.operands import ACTIVATIONS, GATES, NAMES, Tensors, context_in, in_places, transform_of


class Policy(NamedTuple):
    """What the block computes besides its tensors: the operators' last arguments."""

    eps: float
    activation: int
    gate: int

    @property
    def lacks_bias(self) -> bool:
        return False

    @property
    def runs_itself(self) -> bool:
        """Whether it has a ``run`` of its own. Its class would not tell: a reload makes another."""
        return False

    def words(self) -> dict[str, Any]:
        """The same as arguments of the reference."""
        (activation,) = (name for name, number in ACTIVATIONS.items() if number == self.activation)
        (gate,) = (name for name, number in GATES.items() if number == self.gate)
        return {"activation": activation, "gate": gate, "eps": self.eps}


class PolicyWithoutBias(Policy):
    """That of a block where a linear layer may have no bias: zeros are put in its place."""

    @property
    def lacks_bias(self) -> bool:
        return True


def policy_of(activation: str, gate: str, eps: float) -> Policy:
    return Policy(eps, ACTIVATIONS[activation], GATES[gate])


# What the backward operator takes after the gradient: x, mask_weight and mask_bias, each None where it reads
# none, the tensors of add and of mul, and what is kept. To make a class of it would take longer.
_Operands = tuple[Any, ...]


class Split(NamedTuple):
    """Where the tensors of add, followed by those of mul, go: by their places in that row."""

    weights: list[int]  # the backward operator reads these
    biases: list[int]  # b1 and b2, of which it needs only the shape
    order: list[int]  # of each tensor in the row of the weights followed by the biases

    @classmethod
    def of(cls, add: int, mul: int) -> Split:
        names = list(enumerate(NAMES[add] + NAMES[mul]))
        weights = [i for i, name in names if name not in ("b1", "b2")]
        biases = [i for i, name in names if name in ("b1", "b2")]
        return cls(weights, biases, [(weights + biases).index(i) for i, _ in names])


SPLITS = {(add, mul): Split.of(add, mul) for add in NAMES for mul in NAMES}


def whole_block(
    x: Tensor,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    add: Tensors,
    mul: Tensors,
    policy: Policy,
    *,
    unwrapped: bool = False,
) -> Tensor:
    """The output, or some error if an argument does not fit; :mod:`gc_cuda.ops.checks` has the words for it.

    unwrapped: no tensor is a wrapper of torch.func's, not even of a transform that has ended.
    """
    if torch.is_grad_enabled():
        apply = _apply_unwrapped if unwrapped else _WholeBlock.apply
        out = apply(policy, len(add), x, mask_weight, mask_bias, *add, *mul)
        if isinstance(out, tuple):
            out, _kept = out
        return out
    # A Function of 11 arguments would take as long as the operator does on a small map.
    return operator("global_context")(x, mask_weight, mask_bias, add, mul, *policy)


def operator(name: str) -> Callable[..., Any]:
    """An operator of the whole block or of the tail, which takes its arguments by position."""
    if _watched():
        return getattr(torch.ops.gc_cuda, name).default
    return getattr(compiled_module(), name)


def _watched() -> bool:
    """Whether the compiler or a TorchFunctionMode wants to see calls of torch.ops."""
    return torch.compiler.is_compiling() or torch._C._len_torch_function_stack() > 0


# Places among the inputs of the Function.
_X, _MASK_WEIGHT, _MASK_BIAS, _BRANCHES = 2, 3, 4, 5


class _WholeBlock(Function):
    """Its inputs are the policy, the number of add's tensors, x, mask_weight, mask_bias, and the tensors of
    add and of mul.

    The output is out. Where x is not saved, what the forward pass keeps is an output, too, for the second
    derivatives of average pooling with add alone: the first gradients depend on x only by the context, so
    what flows back into the context reaches x through what is kept.
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
        add, mul = branches[:add_count], branches[add_count:]
        out, kept = operator("global_context_kept")(x, mask_weight, mask_bias, add, mul, *policy)
        needs = ctx.needs_input_grad
        needs_context = needs[_X] or needs[_MASK_WEIGHT]
        attends = mask_weight is not None
        bias = mask_bias if needs[_MASK_BIAS] else None
        # If nothing else needs a gradient, x and the parameters need not outlive the call.
        only_bias = not (needs_context or any(needs[_BRANCHES:]))
        reads_x = len(mul) > 0 or (attends and needs_context)
        counts = add_count, len(mul)
        ctx.call = policy, counts, attends, only_bias, reads_x
        if only_bias:
            save(ctx, (), (bias,))
            return out
        weights, biases, _ = SPLITS[counts]
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
        policy, counts, attends, only_bias, reads_x = ctx.call
        differentiable = grad is not None and differentiable_wanted(grad)
        tensors, (mask_bias, *biases) = saved(ctx, values_of_biases=differentiable)
        if only_bias:
            return None, None, None, None, torch.zeros_like(mask_bias), *[None] * sum(counts)
        *weights, kept = tensors
        x = weights.pop(0) if reads_x else None
        mask_weight = weights.pop(0) if attends else None
        _, _, order = SPLITS[counts]
        row = [*weights, *biases]
        branches = [row[i] for i in order]
        add_count, _ = counts
        operands = x, mask_weight, mask_bias, branches[:add_count], branches[add_count:], kept
        needed = ctx.needs_input_grad[_X:]
        gradients: list[Tensor | None] = [None] * len(needed)
        if grad is not None and differentiable:
            gradients = _differentiable(ctx, grad, operands, policy)
        elif grad is not None:
            gradients = _fused(grad, operands, policy, needed)
        if grad_kept is not None and ctx.needs_input_grad[_X] and not torch.compiler.is_compiling():
            of_x, *others = gradients
            through_context = _spread(context_in(grad_kept, ctx.size), ctx.size)
            of_x = (through_context if of_x is None else of_x + through_context).to(ctx.dtype)
            gradients = [of_x, *others]
        return None, None, *gradients


# Autograd's own apply; that of torch.autograd.Function looks for torch.func's wrappers in the inputs first.
_apply_unwrapped = super(Function, _WholeBlock).apply


def _fused(grad: Tensor, operands: _Operands, policy: Policy, needed: Sequence[bool]) -> list[Tensor | None]:
    _, _, _, add, _, _ = operands
    answers = _answers(needed, len(add)) if _watched() else needed
    run = operator("global_context_backward")
    given = run(grad, *operands, policy.activation, policy.gate, answers)
    if len(given) == len(needed):
        return given
    gradients = iter(given)
    return [next(gradients) if wanted else None for wanted in needed]


def _answers(needed: Sequence[bool], add_count: int) -> list[bool]:
    """The operator's argument needed, which has a place for each field of a branch, whether given or not."""
    of_x, of_weight, of_bias, *of_branches = needed
    of_add, of_mul = of_branches[:add_count], of_branches[add_count:]
    return [of_x, of_weight, of_bias, *in_places(of_add, False), *in_places(of_mul, False)]


def _differentiable(ctx: Any, grad: Tensor, operands: _Operands, policy: Policy) -> list[Tensor | None]:
    """The same by plain PyTorch, so that it can be differentiated again."""
    x, mask_weight, mask_bias, add, mul, kept = operands
    if x is None:
        return _differentiable_without_x(ctx, grad, kept, mask_bias, add, policy)

    def definition(x: Tensor, mask_weight: Tensor | None, *branches: Tensor) -> Tensor:
        return reference.global_context(
            x,
            mask_weight,
            add=transform_of(branches[: len(add)]),
            mul=transform_of(branches[len(add) :]),
            pooling_type="avg" if mask_weight is None else "att",
            **policy.words(),
        )

    of_x, of_weight, *of_branches = differentiable_gradients(definition, grad, x, mask_weight, *add, *mul)
    return [of_x, of_weight, _zero(mask_bias), *of_branches]


def _differentiable_without_x(
    ctx: Any, grad: Tensor, kept: Tensor, mask_bias: Tensor | None, add: Tensors, policy: Policy
) -> list[Tensor | None]:
    """For out = x + t(context), where the context is the mean of x, or where x needs no gradient."""
    context = context_in(kept, ctx.size)
    if not ctx.needs_input_grad[_X]:
        context = context.detach()
    words = policy.words()

    def definition(context: Tensor, *add: Tensor) -> Tensor:
        branch = transform_of(add)
        assert branch is not None
        return reference.transform(context, branch, words["eps"], words["activation"])

    grad_term = grad.sum((2, 3), dtype=context.dtype)
    grad_context, *grad_add = differentiable_gradients(definition, grad_term, context, *add)
    grad_x = None if grad_context is None else (grad + _spread(grad_context, ctx.size)).to(ctx.dtype)
    return [grad_x, None, _zero(mask_bias), *grad_add]


def _zero(mask_bias: Tensor | None) -> Tensor | None:
    """The gradient of the mask's bias: a shift of all the logits does not change a softmax."""
    return None if mask_bias is None else torch.zeros_like(mask_bias)


def _spread(grad_context: Tensor, size: Sequence[int]) -> Tensor:
    """The gradient of a mean over the pixels, as a view of N*C numbers."""
    n, c, h, w = size
    return (grad_context / (h * w))[:, :, None, None].expand(n, c, h, w)
