"""The end of a bottleneck, as :mod:`gc_cuda.models.tails` lets it run as one operation: what that demands.

conv3 -> batch norm -> block -> += identity -> ReLU. The bottlenecks of frameworks are described in
:mod:`gc_cuda.integrations`, each by a :class:`TailKind`; the readers here go beside those of
:mod:`gc_cuda.blocks._parts`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from gc_cuda.blocks._parts import Look, Unserved, name_of


class Places(NamedTuple):
    """The names of a bottleneck's modules after conv3."""

    norm: str  # with dots where it is deeper
    blocks: tuple[str, ...]  # whatever stands between the norm and the addition; a tail has one
    act: str = "relu"
    drop_path: str | None = None  # stochastic depth of images, before the addition


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
    in_place: bool = True  # the addition, else its result has the wider dtype of the two


class NormOptions(NamedTuple):
    """What a batch norm computes with, besides tensors."""

    training: bool
    momentum: float
    eps: float
    group: Any = None  # as in gc_cuda.BatchNorm
    syncs: bool = False  # it is a SyncBatchNorm, whose group is the default one if it names none

    def now(self, y: Tensor) -> NormOptions:
        """With the group that it exchanges with in this call; raises Unserved where it refuses y."""
        if not self.exchanges():
            return self if self.group is None else self._replace(group=None)
        if not y.is_cuda:
            raise Unserved("a SyncBatchNorm takes no tensors of the CPU in a process group")
        return self if self.group else self._replace(group=dist.group.WORLD)

    def exchanges(self) -> bool:
        """Whether it asks for the other processes: there may be none when the model is made."""
        return self.syncs and self.training and dist.is_available() and dist.is_initialized()


NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


class _NormKind(NamedTuple):
    syncs: bool  # as torch.nn.SyncBatchNorm does
    then: tuple[str, ...] = ()  # the children that its forward calls after the norm


_NORMS = {
    "torch.nn.modules.batchnorm.BatchNorm2d": _NormKind(syncs=False),
    "torch.nn.modules.batchnorm.SyncBatchNorm": _NormKind(syncs=True),
    "mmengine.utils.dl_utils.parrots_wrapper.SyncBatchNorm": _NormKind(syncs=True),  # mmdetection 3
    "mmcv.utils.parrots_wrapper.SyncBatchNorm": _NormKind(syncs=True),  # mmdetection 2
    "timm.layers.norm_act.BatchNormAct2d": _NormKind(syncs=False, then=("drop", "act")),
    "timm.layers.norm_act.SyncBatchNormAct": _NormKind(syncs=True, then=("drop", "act")),
}


def batch_norm(look: Look, module: Any, where: str) -> NormOptions:
    """Demand a batch norm and nothing else, that keeps running statistics as a moving average."""
    own_class = type(module)  # a parametrized one is of another
    kind = _NORMS.get(f"{own_class.__module__}.{own_class.__qualname__}")
    if kind is None:
        raise Unserved(f"norm {own_class.__name__}")
    look.plain(module, where, own_class)
    for name in kind.then:
        part = look.child(module, name)
        if type(part) is not nn.Identity:
            raise Unserved(f"{where}.{name} is a {type(part).__name__}")
        look.plain(part, f"{where}.{name}", nn.Identity)
    options = moving_average(look, module, where)
    if not kind.syncs:
        return options
    return options._replace(group=look.attribute(module, "process_group"), syncs=True)


def moving_average(look: Look, module: Any, where: str) -> NormOptions:
    """Demand that a batch norm, of whatever class, keeps running statistics as a moving average."""
    if not look.attribute(module, "track_running_stats"):
        raise Unserved(f"{where} tracks no running statistics")
    momentum = look.attribute(module, "momentum")
    if momentum is None:
        raise Unserved(f"{where} averages its statistics over all batches (momentum=None)")
    return NormOptions(look.attribute(module, "training"), momentum, look.attribute(module, "eps"))


class DropPath(NamedTuple):
    """Stochastic depth that drops images."""

    probability: float
    scales: bool  # what is kept, to the same mean

    def draw(self, y: Tensor) -> Tensor:
        """The factor of each image, [N, 1, 1, 1]: the numbers that timm's module draws."""
        keep = 1 - self.probability
        factor = y.new_empty((y.shape[0], 1, 1, 1)).bernoulli_(keep)
        return factor.div_(keep) if keep > 0 and self.scales else factor


_DROP_PATHS = (("timm.layers.drop", "DropPath"), ("timm.models.layers.drop", "DropPath"))


def drop_path(look: Look, module: Any, where: str) -> DropPath | None:
    """What drops images now, or None."""
    if module is None:
        return None
    look.plain(module, where)
    if type(module) is nn.Identity:
        return None
    if name_of(module) not in _DROP_PATHS:
        raise Unserved(f"{where} is a {type(module).__name__}")
    probability = look.attribute(module, "drop_prob")
    scales = look.attribute(module, "scale_by_keep")
    if not look.attribute(module, "training") or probability == 0:
        return None
    return DropPath(probability, scales)
