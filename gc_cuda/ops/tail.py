"""The residual tail: the end of a bottleneck as one operator forward and one backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from gc_cuda import _extension, _group, reference
from gc_cuda.ops import checks
from gc_cuda.ops.autograd import differentiable_gradients, save, saved
from gc_cuda.ops.contexts import differentiable_wanted, is_foreign, plain_pytorch_wanted
from gc_cuda.ops.operands import in_places, tensors_of, transform_of
from gc_cuda.ops.whole_block import SPLITS, Policy, operator, policy_of
from gc_cuda.reference import BatchNorm, Transform


def bn_context_add_relu(
    y: Tensor,
    identity: Tensor | None = None,
    norm: BatchNorm | None = None,
    mask_weight: Tensor | None = None,
    mask_bias: Tensor | None = None,
    add: Transform | None = None,
    mul: Transform | None = None,
    *,
    image_factor: Tensor | None = None,
    relu: bool = True,
    pooling_type: str = "att",
    activation: str = "relu",
    gate: str = "sigmoid",
    eps: float = 1e-5,
) -> Tensor:
    """out = relu(block(x) + identity), x = batch_norm(y): the end of a ResNet's bottleneck as one operation.

        x     = norm.weight * (y - mean) / sqrt(var + norm.eps) + norm.bias for each channel
        block = :func:`gc_cuda.global_context` of x: GCNet's (https://arxiv.org/abs/1904.11492) or
                squeeze-and-excitation (https://arxiv.org/abs/1709.01507), by the same arguments

    y is what the last convolution gives. x is never made, nor kept: its affine map is applied wherever y is
    read. Kept for the backward pass are y, out (which eager PyTorch's ReLU keeps as well: to change it in
    place before the backward pass is an error, as there) and small vectors; for attention N*S logits, too.
    Every part may be absent: ``norm`` None (batch norm was folded into the convolution), no ``add`` and no
    ``mul`` (no block), ``identity`` None, ``relu`` False.

    In training (``norm.training``) mean and variance are those of the batch, and ``norm.running_mean`` and
    ``norm.running_var`` are changed in place, as :class:`torch.nn.BatchNorm2d` does: once in every forward
    pass, never in a backward pass of whatever order. Error of sums does not grow with mean / deviation: the
    mean is subtracted from y as it is read.

    Reads and writes of y's size on the CPU, with attention and ``add``: 4 forward, 6 backward with given
    statistics (7 where norm.weight needs a gradient, or with ``mul``), 5 and 8 in training. On a GPU the
    definition, :func:`gc_cuda.reference.bn_context_add_relu`, runs, unless its kernels are switched on
    (docs/newer-paths.md, ``tail``); under the compiler in any case. So it does on other devices, and wherever
    :func:`gc_cuda.global_context` runs its own.

    With a ``norm.group`` of several processes, mean and variance in training are those of all their batches,
    as :class:`torch.nn.SyncBatchNorm` has them: every process calls this the same number of times, one
    without an image, too. Forward they exchange (count, mean, M2) of each channel, backward the sums of two
    gradients; the gradients of norm.weight and norm.bias are those of the process's own out. Second
    derivatives exchange as well. torch.compile leaves such a call out of its graphs.

    Args:
        y: [N, C, H, W].
        identity: [N, C, H, W], or None. Another dtype than y's is converted to y's first.
        norm: a BatchNorm, or None. Its tensors of C elements have y's dtype or that of its sums. ``group``
            counts in training alone.
        mask_weight: as in :func:`gc_cuda.global_context`; None without a block.
        mask_bias: one element, or None.
        add: a Transform, or None.
        mul: a Transform, or None.
        image_factor: N elements, of block(x) of each image: what stochastic depth draws. Without a gradient.
        relu: whether a ReLU ends it.
        pooling_type: "att" or "avg"; of no meaning without a block.
        activation: "relu", "silu" or "hardswish", of the transforms.
        gate: "sigmoid" or "hardsigmoid", of ``mul``.
        eps: of the layer norms, not negative.

    Returns:
        out, [N, C, H, W] in the dtype and memory format of y.

    Raises:
        ValueError: for a shape or device that does not fit, one value per channel in training, an unknown
            pooling_type, activation or gate, a mask_weight that is missing or of no use, or a negative eps.
        TypeError: for a dtype that does not fit, or for what is not a dense tensor, BatchNorm or Transform.
        ImportError: where the extension is missing; it says what to run.
    """
    words: Any = {"pooling_type": pooling_type, "activation": activation, "gate": gate, "eps": eps}
    options: Any = {"image_factor": image_factor, "relu": relu, **words}
    parts = norm if isinstance(norm, (tuple, list)) else ()
    branches = [part for branch in (add, mul) if isinstance(branch, (tuple, list)) for part in branch]
    if plain_pytorch_wanted() or any(
        map(is_foreign, (y, identity, mask_weight, mask_bias, image_factor, *parts, *branches))
    ):
        checks.no_exchange(norm)
        return reference.bn_context_add_relu(y, identity, norm, mask_weight, mask_bias, add, mul, **options)
    _extension.require()
    arguments = y, identity, norm, mask_weight, mask_bias, add, mul
    if torch.compiler.is_compiling():  # a check costs no run time then
        if _exchanging(norm) is not None:  # all processes in the same order, which graphs need not keep
            return _uncompiled(*arguments, **options)
        checks.bn_context_add_relu(*arguments, image_factor, **words)
        return _run(*arguments, image_factor, relu, words)
    try:
        checks.unseen_by_the_tail(
            y, identity, norm, mask_weight, mask_bias, add is mul is None, image_factor, pooling_type, eps
        )
        return _run(*arguments, image_factor, relu, words)
    except Exception:
        try:
            checks.bn_context_add_relu(*arguments, image_factor, **words)
        except (ValueError, TypeError, ImportError) as explanation:
            raise explanation from None
        raise


def _run(
    y: Tensor,
    identity: Tensor | None,
    norm: BatchNorm | None,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    add: Transform | None,
    mul: Transform | None,
    image_factor: Tensor | None,
    relu: bool,
    words: dict[str, Any],
) -> Tensor:
    arguments = y, identity, norm, mask_weight, mask_bias, add, mul
    if not (y.is_cpu or y.is_meta or (y.is_cuda and by_kernels(y.device))):
        return reference.bn_context_add_relu(*arguments, image_factor=image_factor, relu=relu, **words)
    if norm is not None and norm.training and not _in_a_row(norm):
        return _with_strided_statistics(
            y, identity, norm, *arguments[3:], image_factor=image_factor, relu=relu, **words
        )
    if identity is not None and identity.dtype != y.dtype:
        identity = identity.to(y.dtype)
    add_tensors = tensors_of(add)
    block = policy_of(words["activation"], words["gate"], words["eps"])
    policy = TailPolicy.of(norm, block, relu, len(add_tensors))
    weight, bias, mean, var = (None, None, None, None) if norm is None else norm[:4]
    # Under the compiler a Function must not change its inputs, so the running statistics are moved after it.
    moves_later = torch.compiler.is_compiling() and policy.kind == OF_BATCH and mean is not None
    moves_later = moves_later and y.numel() > 0
    running = (None, None) if moves_later else (mean, var)
    tensors = image_factor, y, identity, weight, bias, mask_weight, mask_bias, *add_tensors, *tensors_of(mul)
    if torch.is_grad_enabled():
        out = _Tail.apply(policy, *running, *tensors)
        if not isinstance(out, tuple):
            return out
        out, kept = out
    else:
        out, kept = _forward(policy, *running, *tensors)  # type: ignore[arg-type]
    if moves_later:
        assert mean is not None and var is not None
        with torch.no_grad():
            channels = y.shape[1]
            for running_one, start in ((mean, 0), (var, 2 * channels)):
                of_batch = kept[start : start + channels]
                running_one.copy_(policy.momentum * of_batch + (1 - policy.momentum) * running_one)
    return out


def by_kernels(device: torch.device) -> bool:
    """Whether the kernels of this GPU serve the tail: a newer path, which is off at first."""
    if torch.compiler.is_compiling() or not _extension.has_cuda():
        return False
    return bool(_extension.compiled_module().tail_on(capability(device)))


@functools.cache
def capability(device: torch.device) -> int:
    """The compute capability of a GPU, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _exchanging(norm: Any) -> Any:
    """The group that a norm exchanges with, or None."""
    return None if norm is None else _group.exchanging(norm[-1], norm[4])


_uncompiled: Any = torch.compiler.disable(bn_context_add_relu)


def _in_a_row(norm: BatchNorm) -> bool:
    _, _, mean, var, *_ = norm
    return (mean is None or mean.is_contiguous()) and (var is None or var.is_contiguous())


def _with_strided_statistics(
    y: Tensor, identity: Tensor | None, norm: BatchNorm, *block: Any, **words: Any
) -> Tensor:
    """The operator moves statistics that lie in a row."""
    _, _, mean, var, *_ = norm
    row = torch.contiguous_format
    copies = [None if one is None else one.clone(memory_format=row) for one in (mean, var)]
    own = norm._replace(running_mean=copies[0], running_var=copies[1])
    out = bn_context_add_relu(y, identity, own, *block, **words)
    for one, copy in zip((mean, var), copies):
        if one is not None and copy is not None:
            one.copy_(copy)
    return out


# Where the statistics of the norm come from (csrc/ops/tail_problem.h).
NO_NORM, GIVEN, OF_BATCH = 0, 1, 2


class TailPolicy(NamedTuple):
    """What the tail computes besides its tensors."""

    kind: int
    momentum: float
    norm_eps: float
    block: Policy
    relu: bool
    add_count: int  # the tensors of add
    group: Any = None  # of several processes, or None
    exchange: tuple[str, int] = ("", 1)  # the group as the operators take it: its name and size

    @classmethod
    def of(cls, norm: BatchNorm | None, block: Policy, relu: bool, add_count: int) -> TailPolicy:
        if norm is None:
            return cls(NO_NORM, 0.0, 0.0, block, relu, add_count)
        kind = OF_BATCH if norm.training else GIVEN
        numbers = float(norm.momentum), float(norm.eps)
        group = _group.exchanging(norm.group, norm.training)
        if group is None:
            return cls(kind, *numbers, block, relu, add_count)
        return cls(kind, *numbers, block, relu, add_count, group, (group.group_name, group.size()))


# Places among the inputs of the Function, of which the first four have no gradient.
_Y, _IDENTITY, _WEIGHT, _BIAS, _MASK_WEIGHT, _MASK_BIAS, _BRANCHES = range(4, 11)


def _forward(
    policy: TailPolicy,
    mean: Tensor | None,
    var: Tensor | None,
    image_factor: Tensor | None,
    y: Tensor,
    identity: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    *branches: Tensor,
) -> tuple[Tensor, Tensor]:
    """The output, and what the backward pass takes."""
    add, mul = branches[: policy.add_count], branches[policy.add_count :]
    if policy.kind == OF_BATCH and mean is not None:
        run = operator("bn_context_add_relu_training")
        first: Any = policy.momentum
    else:
        run = operator("bn_context_add_relu")
        first = policy.kind
    of_norm = weight, bias, mean, var, first, policy.norm_eps
    last = *policy.block, policy.relu, *policy.exchange, image_factor
    return run(y, identity, *of_norm, mask_weight, mask_bias, add, mul, *last)


class _Tail(Function):
    """Its inputs are the policy, running_mean and running_var, image_factor, and what the backward operator
    has gradients for. Under the compiler what is kept is an output, too, which has no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, policy: TailPolicy, mean: Tensor | None, var: Tensor | None, *operands: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        out, kept = _forward(policy, mean, var, *operands)
        image_factor, y, _, weight, bias, mask_weight, mask_bias, *branches = operands
        needs = ctx.needs_input_grad
        counts = policy.add_count, len(branches) - policy.add_count
        # Where only identity needs a gradient, y and the parameters need not outlive the call.
        only_identity = not (needs[_Y] or any(needs[_WEIGHT:]))
        ctx.call = policy, counts, only_identity
        tensors: tuple[Tensor, ...] = (out,) if policy.relu else ()
        if only_identity:
            save(ctx, tensors)
        else:
            weights, biases, _ = SPLITS[counts]
            optional = weight, mask_weight, image_factor
            ctx.given = [tensor is not None for tensor in optional]
            tensors += (y, *[tensor for tensor in optional if tensor is not None], kept)
            # Of a bias only the shape is needed (ops/autograd.py); the norm's is in what is kept.
            apart = bias, mask_bias, *[branches[i] for i in biases]
            save(ctx, (*tensors, *[branches[i] for i in weights]), apart)
        if not torch.compiler.is_compiling():
            return out
        ctx.mark_non_differentiable(kept)
        return out, kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_of_kept: Any) -> tuple[Tensor | None, ...]:
        policy, counts, only_identity = ctx.call
        differentiable = differentiable_wanted(grad)
        tensors, biases = saved(ctx, values_of_biases=differentiable)
        kept_tensors = list(tensors)
        out = kept_tensors.pop(0) if policy.relu else None
        needed = ctx.needs_input_grad[_Y:]
        if only_identity:
            of_identity = grad if out is None else _past_relu(grad, out)
            return *[None] * _IDENTITY, of_identity, *[None] * (len(needed) - 2)
        y = kept_tensors.pop(0)
        weight, mask_weight, image_factor = (kept_tensors.pop(0) if given else None for given in ctx.given)
        kept, *weights = kept_tensors
        bias, mask_bias, *vectors = biases
        row = [*weights, *vectors]
        branches = [row[i] for i in SPLITS[counts].order]
        add, mul = branches[: policy.add_count], branches[policy.add_count :]
        operands = _Operands(y, weight, bias, mask_weight, mask_bias, add, mul, kept, image_factor)
        if differentiable:
            gradients = _differentiable(grad, out, operands, policy, needed)
        else:
            gradients = _fused(grad, out, operands, policy, needed)
        return *[None] * _Y, *gradients


class _Operands(NamedTuple):
    """What the backward pass reads besides grad and out."""

    y: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mask_weight: Tensor | None
    mask_bias: Tensor | None
    add: Sequence[Tensor]
    mul: Sequence[Tensor]
    kept: Tensor
    image_factor: Tensor | None


def _fused(
    grad: Tensor, out: Tensor | None, operands: _Operands, policy: TailPolicy, needed: Sequence[bool]
) -> list[Tensor | None]:
    y, weight, bias, mask_weight, mask_bias, add, mul, kept, image_factor = operands
    if out is not None and torch.compiler.is_compiling():
        # In the compiler's sight: where nothing else keeps out it keeps a byte for each element, and it masks
        # grad as it makes it.
        grad_in = _past_relu(grad, out)
        of_y, of_identity, *others = needed
        gradients = _fused(grad_in, None, operands, policy, [of_y, False, *others])
        return [gradients[0], grad_in if of_identity else None, *gradients[2:]]
    block = mask_weight, mask_bias, add, mul, kept, policy.block.activation, policy.block.gate
    *first, of_mask, of_mask_bias = needed[: _BRANCHES - _Y]
    of_add = needed[_BRANCHES - _Y :][: policy.add_count]
    of_mul = needed[_BRANCHES - _Y :][policy.add_count :]
    answers = [*first, of_mask, of_mask_bias, *in_places(of_add, False), *in_places(of_mul, False)]
    run = operator("bn_context_add_relu_backward")
    gradients = iter(
        run(grad, y, out, weight, bias, policy.kind, *block, answers, *policy.exchange, image_factor)
    )
    return [next(gradients) if wanted else None for wanted in needed]


def _past_relu(grad: Tensor, out: Tensor) -> Tensor:
    return torch.where(out <= 0, torch.zeros_like(grad), grad)


def _differentiable(
    grad: Tensor, out: Tensor | None, operands: _Operands, policy: TailPolicy, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The same by plain PyTorch, so that it can be differentiated again. No statistics are moved."""
    y, weight, bias, mask_weight, mask_bias, add, mul, kept, image_factor = operands
    channels = y.shape[1]
    given = policy.kind == GIVEN
    mean = kept[:channels] if given else None
    var = kept[2 * channels : 3 * channels] if given else None

    def definition(y: Tensor, weight: Any, bias: Any, mask_weight: Any, *branches: Tensor) -> Tensor:
        of_batch, numbers = policy.kind == OF_BATCH, (policy.momentum, policy.norm_eps)
        norm = BatchNorm(weight, bias, mean, var, of_batch, *numbers, policy.group)
        return reference.bn_context_add_relu(
            y,
            None,
            None if policy.kind == NO_NORM else norm,
            mask_weight,
            add=transform_of(branches[: policy.add_count]),
            mul=transform_of(branches[policy.add_count :]),
            image_factor=image_factor,
            relu=False,
            pooling_type="avg" if mask_weight is None else "att",
            **policy.block.words(),
        )

    # The ReLU's gradient does not depend on its input, and identity gets it as it is.
    grad_in = grad if out is None else _past_relu(grad, out)
    _, needs_identity, *_ = needed
    of_y, of_weight, of_bias, of_mask, *of_branches = differentiable_gradients(
        definition, grad_in, y, weight, bias, mask_weight, *add, *mul
    )
    of_mask_bias = None if mask_bias is None else torch.zeros_like(mask_bias)
    return [
        of_y,
        grad_in if needs_identity else None,
        of_weight,
        of_bias,
        of_mask,
        of_mask_bias,
        *of_branches,
    ]
