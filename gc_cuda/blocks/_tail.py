"""The end of a bottleneck, as :mod:`gc_cuda.models.tails` lets it run as one operation: what that demands.

conv3 -> batch norm -> block -> += identity -> ReLU. The bottlenecks of frameworks are described in
:mod:`gc_cuda.integrations`, each by a :class:`TailKind`; the readers here go beside those of
:mod:`gc_cuda.blocks._parts`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from gc_cuda.blocks._parts import Look, Unserved


class Places(NamedTuple):
    """The names of a bottleneck's children after conv3."""

    norm: str
    blocks: tuple[str, ...]  # whatever stands between the norm and the addition; a tail has one
    act: str = "relu"


def _never(bottleneck: Any, x: Tensor) -> bool:
    return False


class TailKind(NamedTuple):
    """A class of bottlenecks, whose forward is the stem, the children at ``places``, an addition, a ReLU.

    What is added is x, or ``downsample(x)`` where the bottleneck has one.
    """

    places: Callable[[Any], Places]
    stem: Callable[[Any, Tensor], Tensor]  # x -> y: up to conv3
    methods: tuple[str, ...] = ()  # that must be the class's own
    inserted: bool = False  # the forward is that of a bottleneck after gc_cuda.insert
    checkpoints: Callable[[Any, Tensor], bool] = _never  # whether everything but x is computed again


class NormOptions(NamedTuple):
    """What a batch norm computes with, besides tensors."""

    training: bool
    momentum: float
    eps: float


NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


def batch_norm(look: Look, module: Any, where: str) -> NormOptions:
    """Demand a batch norm that keeps running statistics as a moving average."""
    if type(module) is not nn.BatchNorm2d:  # a parametrized one is of another class, too
        raise Unserved(f"norm {type(module).__name__}")
    look.plain(module, where, nn.BatchNorm2d)
    if not look.attribute(module, "track_running_stats"):
        raise Unserved(f"{where} tracks no running statistics")
    momentum = look.attribute(module, "momentum")
    if momentum is None:
        raise Unserved(f"{where} averages its statistics over all batches (momentum=None)")
    return NormOptions(look.attribute(module, "training"), momentum, look.attribute(module, "eps"))
