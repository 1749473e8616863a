"""The classes of blocks that are served, by their names: no framework is imported for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from torch import nn

from gc_cuda.blocks import context, squeeze_excite
from gc_cuda.blocks._parts import Kind, Look, Recipe, Unserved
from gc_cuda.integrations import gcnet, mmdet, timm, torchvision
from gc_cuda.models import swap

# What accelerate changes. Our own blocks run fused by themselves.
OTHERS: dict[str, Kind] = {**gcnet.KINDS, **mmdet.KINDS, **timm.KINDS, **torchvision.KINDS}
OURS: dict[str, Kind] = {**context.KINDS, **squeeze_excite.KINDS}
BLOCKS: dict[str, Kind] = {**OTHERS, **OURS}

AnyKind = TypeVar("AnyKind")


class Found(NamedTuple):
    """The class by which a module was recognized."""

    name: str  # the full one
    base: type


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def find(module: nn.Module, kinds: Mapping[str, Any]) -> Found | None:
    """The class of these that the module is of or derives from."""
    for base in type(module).__mro__:
        name = full_name(base)
        if name in kinds:
            return Found(name, base)
    return None


def demand_own_methods(kind: type, base: type, methods: tuple[str, ...]) -> None:
    """Demand that a class computes what the one that it derives from does."""
    for method in methods:
        if getattr(kind, method) is not getattr(base, method):
            raise Unserved(f"{kind.__name__} overrides {method} of {base.__name__}")


def block_recipe(look: Look, block: Any, where: str) -> Recipe:
    """What a block inside of a module computes, if calling it does nothing but that."""
    found = find(block, BLOCKS)
    if found is None:
        raise Unserved(f"{where} is a {type(block).__name__}, no block that is known")
    look.plain(block, where)
    kind = BLOCKS[found.name]
    demand_own_methods(swap.innermost(type(block)), found.base, kind.methods)
    return kind.read(look, block)
