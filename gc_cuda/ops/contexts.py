"""Where plain PyTorch has to run in place of the operators: for whatever understands only PyTorch's own.

That is often so for what records a call or transforms it, or for a tensor that means more than its numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def plain_pytorch_wanted() -> bool:
    """Whether the reference has to run in place of the operators, whatever the tensors.

    That is so while a model leaves Python (``torch.export``, ``torch.onnx.export``, AOTInductor,
    ``torch.jit.trace``), so that it runs where gc_cuda is not; under the transforms of ``torch.func``
    (``grad``, ``vmap``, ``jvp`` …), which know how to transform every operator of PyTorch's own; and within
    a level of forward-mode AD. ``torch.compile`` keeps the operators.
    """
    if torch.compiler.is_compiling():
        return _is_exporting() or _is_transforming()
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def is_foreign(value: Any) -> bool:
    """Whether it is of a subclass of Tensor, such as DTensor, that means more than its numbers.

    Such a class says that the operators may have its tensors by an attribute ``gc_cuda_served = True``;
    PyTorch's own stand-ins for plain tensors may.
    """
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter or not isinstance(value, Tensor):
        return False
    return (kind.__module__, kind.__name__) not in _STAND_INS and not getattr(kind, "gc_cuda_served", False)


_STAND_INS = (
    ("torch._subclasses.fake_tensor", "FakeTensor"),
    ("torch._subclasses.functional_tensor", "FunctionalTensor"),
)


def differentiable_wanted(grad: Tensor) -> bool:
    """Whether a backward pass has to be plain PyTorch: to be differentiated itself, or for a gradient that
    only PyTorch's own operators understand, such as a batch of gradients (``is_grads_batched``, ``vmap``).

    The compiler traces backward passes with grad mode on, but cannot differentiate them again, so it gets the
    operators.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        torch.is_grad_enabled()
        or torch._C._functorch.is_legacy_batchedtensor(grad)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or is_foreign(grad)
    )


def _by_flag() -> bool:
    # Dynamo of torch 2.11 takes torch.compiler.is_exporting() for a constant, True in torch.compile too; the
    # flag that it returns Dynamo reads as it is, with a guard.
    return torch.compiler._is_exporting_flag


def _without_is_exporting() -> bool:
    # Only torch.export's own tracing compiles without Dynamo.
    return not torch.compiler.is_dynamo_compiling()


def _by_level() -> bool:
    # Dynamo traces the answer None. At a level it gives up, and the transform runs uncompiled and right; with
    # fullgraph=True it says so.
    return torch._C._functorch.maybe_current_level() is not None


# A compiler that says whether it exports also understands the question for transforms; an older one would
# break every graph at it.
_MODERN = hasattr(torch.compiler, "is_exporting")
_is_transforming = torch._C._are_functorch_transforms_active if _MODERN else _by_level
if hasattr(torch.compiler, "_is_exporting_flag"):
    _is_exporting = _by_flag
else:
    _is_exporting = getattr(torch.compiler, "is_exporting", _without_is_exporting)
