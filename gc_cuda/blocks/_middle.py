"""The middle of a residual block, as :mod:`gc_cuda.models.middles` lets it run: what that demands.

convolution -> batch norm -> activation -> block -> convolution. The residual blocks of frameworks are
described in :mod:`gc_cuda.integrations`, each by a :class:`MiddleKind`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from gc_cuda.blocks._parts import Look, Unserved, activation, name_of
from gc_cuda.blocks._tail import NormOptions, batch_norm, moving_average

_BATCH_NORM_ACT = (
    ("timm.layers.norm_act", "BatchNormAct2d"),
    ("timm.models.layers.norm_act", "BatchNormAct2d"),
)


class Middle(NamedTuple):
    """The modules between a convolution and the next."""

    norm: Any
    act: Any  # None: the norm's own
    between: tuple[Any, ...]  # identities
    block: Any


class MiddleKind(NamedTuple):
    """A class of residual blocks: its forward is ``before``, the modules of ``middle``, and ``after``."""

    middle: Callable[[Any], Middle]
    before: Callable[[Any, Tensor], Tensor]  # x -> y: up to the convolution
    after: Callable[[Any, Tensor, Tensor], Tensor]  # of the block's output and x
    containers: Callable[[Any], tuple[Any, ...]] = lambda _: ()  # whose forwards are not called


def norm_and_act(look: Look, middle: Middle) -> tuple[NormOptions, str]:
    """Demand a batch norm that keeps running statistics, and after it an activation that is served."""
    for module in middle.between:
        look.plain(module, "what stands before the block", nn.Identity)
    norm = middle.norm
    if middle.act is not None:
        options = batch_norm(look, norm, "norm")
        if options.syncs:
            raise Unserved("norm has statistics of several processes")
        return options, activation(look, middle.act, "act")
    if name_of(norm) not in _BATCH_NORM_ACT:
        raise Unserved(f"norm {type(norm).__name__}")
    look.plain(norm, "norm")
    look.plain(look.child(norm, "drop"), "norm.drop", nn.Identity)
    act = activation(look, look.child(norm, "act"), "norm.act")
    return moving_average(look, norm, "norm"), act
