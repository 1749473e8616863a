"""Which modules are worth a trace: small ones that may pool, by their classes and shapes."""

from __future__ import annotations

import types

from torch import nn

from gc_cuda.models import swap
from gc_cuda.recognition.source import is_of_torch

MOST_PARTS = 32
_MOST_TENSORS = 24
_FEW = 2  # channels of a map that a convolution over pixels may read: those of spatial attention

# Words of code that may pool, or weigh pixels.
_POOL_NAMES = """
    mean sum avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d max amax
    adaptive_max_pool2d softmax std var norm einsum
"""
_POOLS = frozenset(_POOL_NAMES.split())
_MEANS = frozenset(name for name in _POOLS if name in ("mean", "sum") or "avg_pool" in name)
_POOLING_MODULES = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d),
    *(nn.AvgPool2d, nn.Softmax, nn.Softmax2d),
)


def is_candidate(module: nn.Module) -> bool:
    """Whether the module may be a block: of its own class, with few weights, none of them over pixels."""
    kind = swap.innermost(type(module))
    if is_of_torch(kind.__module__) or kind.forward is nn.Module.forward:
        return False
    tensors = 0
    for number, part in enumerate(module.modules()):
        if number == MOST_PARTS or isinstance(part, (nn.ConvTranspose2d, nn.Conv3d, nn.Embedding)):
            return False
        for parameter in part._parameters.values():
            tensors += parameter is not None
            if tensors > _MOST_TENSORS:
                return False
        if isinstance(part, nn.Conv2d) and part.kernel_size != (1, 1) and part.in_channels > _FEW:
            return False
    has_weights = any(parameter.dim() > 1 for parameter in module.parameters())
    return has_weights and any(map(_may_pool, module.modules()))


def may_average(module: nn.Module) -> bool:
    """Whether its code, or that of a part, may take the mean over pixels."""
    return any(
        isinstance(part, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d))
        or not _MEANS.isdisjoint(_names(swap.innermost(type(part))))
        for part in module.modules()
    )


def channels_of(module: nn.Module) -> list[int]:
    """What the channels of its input may be by its weights: those that its first layer reads come first."""
    found: dict[int, None] = {}
    for place in (1, 0):
        for parameter in module.parameters():
            if parameter.dim() in (2, 4):
                found[parameter.shape[place]] = None
    return list(found)


def _may_pool(part: nn.Module) -> bool:
    if isinstance(part, _POOLING_MODULES):
        return True
    kind = swap.innermost(type(part))
    if is_of_torch(kind.__module__):
        return False
    return not _POOLS.isdisjoint(_names(kind))


_names_of: dict[type, frozenset[str]] = {}


def _names(kind: type) -> frozenset[str]:
    """The names in the code of a class, and of its module's functions that it uses."""
    if kind not in _names_of:
        found: set[str] = set()
        for base in kind.__mro__:
            if is_of_torch(base.__module__):
                break
            for member in vars(base).values():
                if isinstance(member, types.FunctionType) and member.__name__ != "__init__":
                    _collect(member.__code__, found)
                    for name in list(found):
                        helper = member.__globals__.get(name)
                        if isinstance(helper, types.FunctionType) and not is_of_torch(helper.__module__):
                            _collect(helper.__code__, found)
        _names_of[kind] = frozenset(found)
    return _names_of[kind]


def _collect(code: types.CodeType, found: set[str]) -> None:
    found.update(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _collect(constant, found)
