"""Global context blocks are put into the residual blocks of an existing ResNet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from gc_cuda import _values
from gc_cuda.blocks import ContextBlock
from gc_cuda.integrations import timm, torchvision
from gc_cuda.models import swap


class _Place(NamedTuple):
    name: str  # of the bottleneck in the model
    bottleneck: Any
    slot: str  # the attribute that takes the block
    forward: Any  # makes the forward of a bottleneck with a block; None where its own has a place for it


def insert(
    model: nn.Module,
    stages: Sequence[str] = ("layer2", "layer3", "layer4"),
    ratio: float = 1 / 16,
    *,
    pooling_type: str = "att",
    fusion_types: Sequence[str] = ("channel_add",),
) -> list[str]:
    """Put a :class:`gc_cuda.ContextBlock` into every bottleneck of the stages, as GCNet does.

    It stands after the norm of the last 1x1 convolution and before the addition of the shortcut. Served are
    the bottlenecks of torchvision's and timm's ResNet, ResNeXt and Wide ResNet. A new block is the identity
    (times one half with "channel_mul"), so that a pretrained model computes what it did. Names of parameters
    stay; the blocks' own come after them: in torchvision's ``layer2.0.context_block``, the name that
    mmdetection's backbones have too, and in timm's ``layer2.0.se``, the place that timm keeps for attention.
    Load a checkpoint of the plain model before, or later with ``strict=False``.

    Each block has the device, dtype and training mode of its bottleneck. Copies and pickles keep it.

    Args:
        model: has the stages as submodules, such as a ResNet.
        stages: their names; dots reach deeper.
        ratio: hidden units per channel; 1/16 and 1/4 are GCNet's.
        pooling_type: "att" or "avg".
        fusion_types: a list or tuple of "channel_add" and "channel_mul", at least one.

    Returns:
        The names of the new blocks.

    Raises:
        ValueError: for a stage that is not there or has no bottleneck that is known, or one that has a block
            or another attention already; nothing was changed then.
        TypeError: for a model that is not a module, or stages that are not names.
    """
    _values.module(model, "model")
    stages = _values.names(stages, "stages")
    places = {place.bottleneck: place for stage in stages for place in _places(model, stage)}
    blocks = [
        ContextBlock(bottleneck.conv3.out_channels, ratio, pooling_type, fusion_types)
        for bottleneck in places
    ]
    names = []
    for (name, bottleneck, slot, make_forward), block in zip(places.values(), blocks):
        weight = bottleneck.conv3.weight
        block.to(weight.device, weight.dtype).train(bottleneck.training)
        setattr(bottleneck, slot, block)
        if make_forward is not None:
            bottleneck.__class__ = swap.derive(swap.Derivation(type(bottleneck), "GC", make_forward))
        names.append(f"{name}.{slot}")
    return names


def _places(model: nn.Module, stage: str) -> Iterator[_Place]:
    try:
        root = model.get_submodule(stage)
    except AttributeError:
        available = [name for name, _ in model.named_children()]
        raise ValueError(
            f"stages names {stage!r}, which the model does not have; it has {available}"
        ) from None
    found = False
    for name, module in root.named_modules(prefix=stage):
        kind = swap.innermost(type(module))
        for framework in (torchvision, timm):
            bottleneck = framework.bottleneck_class()
            if bottleneck is None or not issubclass(kind, bottleneck):
                continue
            if kind.forward is not bottleneck.forward:
                raise ValueError(f"{name} is a {kind.__name__} with a forward of its own")
            occupant = getattr(module, framework.SLOT, None)
            if occupant is not None:
                raise ValueError(f"{name}.{framework.SLOT} is taken by a {type(occupant).__name__}")
            found = True
            yield _Place(name, module, framework.SLOT, framework.BOTTLENECK_FORWARD)
    if not found:
        kinds = sorted({type(child).__name__ for child in root.children()})
        raise ValueError(
            f"stage {stage!r} has no bottleneck of torchvision's or timm's ResNet; it is made of {kinds}"
        )
