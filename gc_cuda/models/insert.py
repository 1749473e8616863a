"""Global context blocks are put into the residual blocks of an existing ResNet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from gc_cuda import _values
from gc_cuda.blocks import ContextBlock
from gc_cuda.blocks._positions import NAME, POSITIONS, InsertKind, add_plugin
from gc_cuda.integrations import mmdet, timm, torchvision
from gc_cuda.models import kinds, swap
from gc_cuda.models.accelerate import PREFIX

INSERTS: dict[str, InsertKind] = {**torchvision.INSERTS, **mmdet.INSERTS, **timm.INSERTS}


class _Place(NamedTuple):
    name: str  # of the bottleneck in the model
    bottleneck: Any
    slot: str  # the attribute that takes the block
    kind: InsertKind


def insert(
    model: nn.Module,
    stages: Sequence[str] = ("layer2", "layer3", "layer4"),
    ratio: float = 1 / 16,
    *,
    position: str = "after_conv3",
    postfix: int | str = "",
    pooling_type: str = "att",
    fusion_types: Sequence[str] = ("channel_add",),
) -> list[str]:
    """Put a :class:`gc_cuda.ContextBlock` into every bottleneck of the stages, as GCNet does.

    Served are the bottlenecks of mmdetection's, torchvision's and timm's ResNet, ResNeXt and Wide ResNet. The
    positions are mmdetection's: "after_conv1" and "after_conv2" are after the norm and the ReLU of the
    convolution (in timm after the anti-aliasing, too, which has the stride of conv2), "after_conv3" is after
    the norm of the last convolution and before the addition of the shortcut. The block has the channels of
    its convolution. A position takes one block; for blocks at two of them call it twice, the second time with
    a postfix.

    A new block is the identity (times one half with "channel_mul"), so that a pretrained model computes what
    it did. Names of parameters stay; the blocks' own come after them, under mmdetection's name
    ``layer2.0.context_block`` and the postfix. In mmdetection a block is a plugin of its bottleneck: a
    ``state_dict`` passes strictly to and from a backbone that is built with ``plugins=[dict(cfg=dict(type=
    "ContextBlock", ratio=1 / 16), stages=(False, True, True, True), position="after_conv3")]``. timm's
    "after_conv3" is ``layer2.0.se``, the place that it keeps for attention. Load a checkpoint of the plain
    model before, or later with ``strict=False``.

    Each block has the device, dtype and training mode of its bottleneck. Copies and pickles keep it.

    Args:
        model: has the stages as submodules, such as a ResNet.
        stages: their names; dots reach deeper, as "backbone.layer2" in a detector. The default is c3 to c5.
        ratio: hidden units per channel; 1/16 and 1/4 are GCNet's.
        position: "after_conv1", "after_conv2" or "after_conv3".
        postfix: what the block's name ends with; of no meaning for timm's ``se``.
        pooling_type: "att" or "avg".
        fusion_types: a list or tuple of "channel_add" and "channel_mul", at least one.

    Returns:
        The names of the new blocks.

    Raises:
        ValueError: for a stage that is not there or has no bottleneck that is known (a ``BasicBlock`` has no
            place for a block), one that has a block or another attention at the position already, one that is
            accelerated already, another position, or a postfix with other than letters, digits and
            underscores; nothing was changed then.
        TypeError: for a model that is not a module, stages that are not names, or another kind of postfix.
    """
    _values.module(model, "model")
    stages = _values.names(stages, "stages")
    _values.one_of(position, "position", POSITIONS)
    name = f"{NAME}{_checked(postfix)}"
    places = {place.bottleneck: place for stage in stages for place in _places(model, stage, position, name)}
    convolutions = [getattr(bottleneck, position.removeprefix("after_")) for bottleneck in places]
    blocks = [ContextBlock(one.out_channels, ratio, pooling_type, fusion_types) for one in convolutions]
    names = []
    for place, block, convolution in zip(places.values(), blocks, convolutions):
        weight = convolution.weight
        block.to(weight.device, weight.dtype).train(place.bottleneck.training)
        _put(place, block, position)
        names.append(f"{place.name}.{place.slot}")
    return names


def _checked(postfix: object) -> str:
    if isinstance(postfix, bool) or not isinstance(postfix, (int, str)):
        raise TypeError(f"postfix must be a string or an integer, got {type(postfix).__name__}")
    text = str(postfix)
    if not f"_{text}".isidentifier():  # a name with a dot is no child's
        raise ValueError(f"postfix must be made of letters, digits and underscores, got {postfix!r}")
    return text


def _places(model: nn.Module, stage: str, position: str, name: str) -> Iterator[_Place]:
    """The bottlenecks of the stage, all of which can take a block of that name there."""
    try:
        root = model.get_submodule(stage)
    except AttributeError:
        available = [child for child, _ in model.named_children()]
        raise ValueError(
            f"stages names {stage!r}, which the model does not have; it has {available}"
        ) from None
    found = False
    for path, module in root.named_modules(prefix=stage):
        bottleneck = kinds.find(module, INSERTS)
        if bottleneck is None:
            continue
        kind, slot = INSERTS[bottleneck.name], name
        if kind.slot is not None and position == "after_conv3":
            slot = kind.slot
        _demand_known(path, module, bottleneck, position)
        _demand_free(path, module, kind, position, slot)
        found = True
        yield _Place(path, module, slot, kind)
    if not found:
        classes = sorted({type(child).__name__ for child in root.children()})
        advice = "; a BasicBlock has no place for a block: take a ResNet of 50 layers or more"
        raise ValueError(
            f"stage {stage!r} has no bottleneck of mmdetection's, torchvision's or timm's ResNet; "
            f"it is made of {classes}{advice if 'BasicBlock' in classes else ''}"
        )


def _demand_known(path: str, module: nn.Module, found: kinds.Found, position: str) -> None:
    """Demand a bottleneck whose forward is the known one."""
    own_class, kind = swap.innermost(type(module)), INSERTS[found.name]
    if own_class.forward is not found.base.forward:  # type: ignore[attr-defined]
        raise ValueError(f"{path} is a {own_class.__name__} with a forward of its own")
    lacking = [part for part in kind.parts if getattr(module, part, None) is None]
    if lacking and not (kind.slot is not None and position == "after_conv3"):
        raise ValueError(
            f"{path} is a {own_class.__name__} of another version, without {', '.join(lacking)}: "
            'it takes a block "after_conv3" alone'
        )


def _demand_free(path: str, module: nn.Module, kind: InsertKind, position: str, slot: str) -> None:
    """Demand that nothing is there yet, neither at the position nor under the name; and no acceleration."""
    for name in kind.plugins(module, position):
        kind_of_it = type(getattr(module, name)).__name__
        raise ValueError(f"{path}.{name} is taken by a {kind_of_it}: one block stands {position}")
    occupant = getattr(module, slot, None)
    if occupant is not None:
        advice = "" if slot == kind.slot else ": give the new block another name by a postfix"
        raise ValueError(f"{path}.{slot} is taken by a {type(occupant).__name__}{advice}")
    derivation = swap.derivation_of(type(module))
    if derivation is not None and derivation.prefix == PREFIX:
        raise ValueError(
            f"{path} is accelerated already: call gc_cuda.restore(model), insert, and accelerate it again"
        )


def _put(place: _Place, block: ContextBlock, position: str) -> None:
    _, bottleneck, slot, kind = place
    if slot != kind.slot:
        add_plugin(kind, bottleneck, position, slot)
        if kind.make_forward is not None and swap.derivation_of(type(bottleneck)) is None:
            derivation = swap.Derivation(type(bottleneck), "GC", kind.make_forward)
            bottleneck.__class__ = swap.derive(derivation)
    setattr(bottleneck, slot, block)
