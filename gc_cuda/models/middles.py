"""Middles: batch norm -> activation -> block, between two convolutions, computed again in the backward pass.

The class of the residual block becomes a subclass (:mod:`gc_cuda.models.swap`) whose forward calls what is
before and after as modules, and looks at what is between anew in each call. Where calling those would do
anything but their classes' forwards, the block's own forward runs, with a block that is fused by itself; so
it does without gradients, under autocast, under the compiler, which recomputes by itself, and on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gc_cuda import _extension, reference
from gc_cuda.blocks._middle import MiddleKind, norm_and_act
from gc_cuda.blocks._parts import Look, Unserved
from gc_cuda.blocks._tail import NORM_TENSORS
from gc_cuda.integrations import timm, torchvision
from gc_cuda.models import kinds, swap
from gc_cuda.ops import checks
from gc_cuda.ops.contexts import is_foreign, plain_pytorch_wanted
from gc_cuda.ops.operands import filled
from gc_cuda.ops.recompute import bn_act_context
from gc_cuda.ops.whole_block import policy_of

MIDDLES: dict[str, MiddleKind] = {**torchvision.MIDDLES, **timm.MIDDLES}

DTYPES = (torch.float32, torch.float64)


def forward_of(kind: MiddleKind) -> swap.Forward:
    """The forward of an accelerated residual block of that kind, which recomputes."""

    def forward(residual: Any, own_forward: Callable[..., Any], x: Any) -> Any:
        if not torch.is_grad_enabled() or plain_pytorch_wanted() or torch.compiler.is_compiling():
            return own_forward(residual, x)
        if not isinstance(x, Tensor) or is_foreign(x) or torch._C._is_any_autocast_enabled():
            return own_forward(residual, x)
        if not (x.is_cpu or x.is_meta):
            return own_forward(residual, x)
        try:
            _read(residual, kind)
        except (Unserved, AttributeError):
            return own_forward(residual, x)
        y = kind.before(residual, x)
        return kind.after(residual, _middle(residual, kind, y), x)

    return forward


def why_not(residual: nn.Module, found: kinds.Found) -> str:
    """Why the middle cannot be computed again, or "" if it can."""
    if "forward" in residual.__dict__:
        return "the instance has a forward of its own"
    try:
        _read(residual, MIDDLES[found.name])
    except Unserved as unserved:
        return str(unserved)
    except AttributeError as error:  # another version of the framework
        return f"it is built differently: {error}"
    return ""


def find(module: nn.Module) -> kinds.Found | None:
    """The kind of residual block that the module is, if a block that is known is in its middle."""
    found = kinds.find(module, MIDDLES)
    if found is None:
        return None
    try:
        block = MIDDLES[found.name].middle(module).block
    except (AttributeError, IndexError, Unserved):
        return None
    return found if kinds.find(block, kinds.BLOCKS) is not None else None


def _middle(residual: Any, kind: MiddleKind, y: Any) -> Any:
    """What stands between the two convolutions, of the first one's output."""
    try:  # a hook of what came before may have changed it
        middle, options, act, recipe = _read(residual, kind)
    except (Unserved, AttributeError):
        return _each_module(kind.middle(residual), y)
    groups = [[getattr(part, name) for part, name in names] for names in recipe.parameters()]
    norm = [getattr(middle.norm, name) for name in NORM_TENSORS]
    if not _fits(y, [*norm, *[one for group in groups for one in group]]):
        return _each_module(middle, y)
    _extension.require()
    mask, add, mul = groups
    mask_weight, mask_bias = mask or (None, None)
    tracked = middle.norm.num_batches_tracked
    if options.training and tracked is not None:
        tracked.add_(1)
    block = policy_of(recipe.activation, recipe.gate, recipe.eps)
    of_norm = reference.BatchNorm(*norm)._replace(
        training=options.training, momentum=options.momentum, eps=options.eps
    )
    return bn_act_context(y, of_norm, act, mask_weight, mask_bias, filled(add), filled(mul), block)


def _fits(y: Any, parameters: list[Any]) -> bool:
    """Whether all are plain tensors of one dtype, and a batch has statistics; else eager runs."""
    _, _, mean, var, *_ = parameters
    weight, bias, *_ = parameters
    if any(one is None for one in (weight, bias, mean, var)) or not isinstance(y, Tensor) or y.dim() != 4:
        return False
    tensors = [y, *(one for one in parameters if one is not None)]
    if any(map(is_foreign, tensors)) or y.dtype not in DTYPES or y.numel() <= y.shape[1]:
        return False
    return all(one.dtype == y.dtype and checks.fits(one, y) for one in tensors)


def _each_module(middle: Any, y: Any) -> Any:
    """What the own forward does there."""
    act = () if middle.act is None else (middle.act,)
    for module in (middle.norm, *act, *middle.between, middle.block):
        y = module(y)
    return y


def _read(residual: Any, kind: MiddleKind) -> tuple[Any, Any, str, Any]:
    """What the middle computes; raises Unserved if that is something else."""
    found = kinds.find(residual, MIDDLES)
    assert found is not None
    kinds.demand_own_methods(swap.innermost(type(residual)), found.base, ("forward",))
    look = Look()
    look.nothing_on_all_modules()
    for container in kind.containers(residual):
        look.plain(container, "a container of the middle")
    middle = kind.middle(residual)
    options, act = norm_and_act(look, middle)
    return middle, options, act, kinds.block_recipe(look, middle.block, "the block")
