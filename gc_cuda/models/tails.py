"""Tails: the end of a bottleneck, conv3 -> batch norm -> block -> += identity -> ReLU, runs as one operation.

The bottleneck's class becomes a subclass (:mod:`gc_cuda.models.swap`) whose forward calls everything up to
conv3, and the downsampling, as modules. What is after conv3 it looks at anew in each call, as a block does at
its parts. Where calling those modules would do anything but their classes' forwards, the bottleneck's own
forward runs: that is what it would be without us, with a block that is fused by itself. What only conv3's
output can tell (its dtype, say) is asked after the stem, which must not run twice, because its batch norms
count. If the answer is no, the modules after it are called one by one, as the own forward does.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from gc_cuda import _extension, reference
from gc_cuda.blocks import _fused
from gc_cuda.blocks._parts import Look, Recipe, Unserved
from gc_cuda.blocks._tail import (
    NORM_TENSORS,
    DropPath,
    NormOptions,
    Places,
    TailKind,
    batch_norm,
    drop_path,
)
from gc_cuda.integrations import mmdet, timm, torchvision
from gc_cuda.models import kinds, swap
from gc_cuda.ops import checks
from gc_cuda.ops.contexts import is_foreign, plain_pytorch_wanted
from gc_cuda.ops.operands import ACCUMULATION, filled, transform_of
from gc_cuda.ops.tail import bn_context_add_relu, by_kernels

TAILS: dict[str, TailKind] = {**torchvision.TAILS, **mmdet.TAILS, **timm.TAILS}


class _Tail(NamedTuple):
    """What a reader found."""

    places: Places
    norm: NormOptions
    options: dict[str, Any]  # of the operation
    drop_path: DropPath | None


class _Known(NamedTuple):
    notes: Any  # a gc_cuda._C.Reading
    tail: _Tail


_known: MutableMapping[nn.Module, _Known] = WeakKeyDictionary()

# Whether conv3's output and the parameters fit; those of norm and mask, of add, and of mul; the tail.
_Seen = tuple[bool, _fused.Groups, _Tail]


def forward_of(kind: TailKind, on_cuda: bool) -> swap.Forward:
    """The forward of an accelerated bottleneck of that kind; on_cuda: on CUDA, too."""

    def forward(bottleneck: Any, own_forward: Callable[..., Any], x: Any) -> Any:
        if plain_pytorch_wanted() or not isinstance(x, Tensor) or is_foreign(x) or _is_left(x, on_cuda):
            return own_forward(bottleneck, x)
        if _see(bottleneck, kind, x) is None:
            return own_forward(bottleneck, x)
        if kind.checkpoints(bottleneck, x):
            return checkpoint.checkpoint(partial(_run, bottleneck, kind, on_cuda), x)
        return _run(bottleneck, kind, on_cuda, x)

    return forward


def _is_left(tensor: Tensor, on_cuda: bool) -> bool:
    """Whether it is on CUDA without kernels for the tail: the fused block beats the tail's definition."""
    return tensor.is_cuda and not (on_cuda and by_kernels(tensor.device))


def why_not(bottleneck: nn.Module, found: kinds.Found, on_cuda: bool) -> str:
    """Why the tail cannot be one operation now, or "" if it can."""
    if "forward" in bottleneck.__dict__:
        return "the instance has a forward of its own"
    try:
        _read(Look(), bottleneck, TAILS[found.name])
    except Unserved as unserved:
        return str(unserved)
    except AttributeError as error:  # another version of the framework
        return f"it is built differently: {error}"
    if not on_cuda and any(parameter.is_cuda for parameter in bottleneck.parameters()):
        return "it is on CUDA, where a tail is one operation only with tails=True"
    return ""


def find(module: nn.Module) -> kinds.Found | None:
    """The kind of bottleneck that the module is, if a block that is known is in its tail."""
    found = kinds.find(module, TAILS)
    if found is None:
        return None
    kind = TAILS[found.name]
    if kind.inserted and swap.derivation_of(type(module)) is None:
        return None
    try:
        blocks = [getattr(module, name) for name in kind.places(module).blocks]
    except AttributeError:
        return None
    return found if any(kinds.find(block, kinds.BLOCKS) is not None for block in blocks) else None


def _run(bottleneck: Any, kind: TailKind, on_cuda: bool, x: Tensor) -> Tensor:
    """What the bottleneck's forward does; the stem is run in any case."""
    y = kind.stem(bottleneck, x)
    seen = _see(bottleneck, kind, y)
    if seen is None:  # a hook of the stem changed the tail
        return _each_module(bottleneck, kind, y, x)
    fits, groups, tail = seen
    fitting = None if _is_left(y, on_cuda) else _fitted(y, groups, fits)
    if fitting is None:
        return _each_module(bottleneck, kind, y, x)
    try:
        norm = tail.norm.now(y)
    except Unserved:
        return _each_module(bottleneck, kind, y, x)
    factor = None if tail.drop_path is None else tail.drop_path.draw(y)
    identity = _identity(bottleneck, x)
    if not _can_be_added(identity, y) or not (kind.in_place or identity.dtype == y.dtype):
        return _each_module(bottleneck, kind, y, x, identity, factor)
    tracked = bottleneck.get_submodule(tail.places.norm).num_batches_tracked if tail.norm.training else None
    if tracked is not None:
        tracked.add_(1)  # now, as the norm does: a recomputation may stop within the operation
    if torch.compiler.is_compiling():
        return _one_operation(y, identity, tail, norm, factor, fitting)
    try:
        return _one_operation(y, identity, tail, norm, factor, fitting)
    except (ValueError, TypeError):  # of an argument, before a statistic moved: in their own words
        if tracked is not None:
            tracked.sub_(1)
        return _each_module(bottleneck, kind, y, x, identity, factor)


def _one_operation(
    y: Tensor,
    identity: Tensor,
    tail: _Tail,
    options: NormOptions,
    factor: Tensor | None,
    groups: _fused.Groups,
) -> Tensor:
    (weight, bias, mean, var, *mask), add, mul = groups
    training, momentum, eps, group, _ = options
    norm = reference.BatchNorm(weight, bias, mean, var, training, momentum, eps, group)
    mask_weight, mask_bias = mask or (None, None)
    block = mask_weight, mask_bias, transform_of(filled(add)), transform_of(filled(mul))
    return bn_context_add_relu(y, identity, norm, *block, image_factor=factor, **tail.options)


def _each_module(
    bottleneck: Any,
    kind: TailKind,
    y: Tensor,
    x: Tensor,
    identity: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """What the own forward does from conv3's output on; the identity, unless there is one already, and the
    images that drop_path drops, unless they are drawn.
    """
    places = kind.places(bottleneck)
    out = bottleneck.get_submodule(places.norm)(y)
    for name in places.blocks:
        out = getattr(bottleneck, name)(out)
    if factor is not None:
        out = out * factor
    elif places.drop_path is not None and getattr(bottleneck, places.drop_path) is not None:
        out = getattr(bottleneck, places.drop_path)(out)
    identity = _identity(bottleneck, x) if identity is None else identity
    if kind.in_place:
        out += identity
    else:
        out = out + identity
    return getattr(bottleneck, places.act)(out)


def _identity(bottleneck: Any, x: Tensor) -> Any:
    return x if bottleneck.downsample is None else bottleneck.downsample(x)


def _can_be_added(identity: Any, y: Tensor) -> bool:
    return (
        isinstance(identity, Tensor)
        and not is_foreign(identity)
        and identity.shape == y.shape
        and identity.device == y.device
        and identity.dtype in ACCUMULATION
        and identity.layout == torch.strided
    )


def _fitted(y: Tensor, groups: _fused.Groups, fits: bool) -> _fused.Groups | None:
    """The parameters in dtypes that may travel with y; None if y and they are not served together."""
    first, *branches = groups
    norm, mask = first[: len(NORM_TENSORS)], first[len(NORM_TENSORS) :]
    _, _, mean, var = norm
    if mean is None or var is None:
        return None
    if fits:
        return groups
    # Autocast casts none of a batch norm's.
    block = _fused.fitted(y, [mask, *branches])
    if block is None or not all(tensor is None or checks.fits(tensor, y) for tensor in norm):
        return None
    mask, *branches = block
    return [[*norm, *mask], *branches]


def _see(bottleneck: Any, kind: TailKind, x: Tensor) -> _Seen | None:
    """What is after conv3, beside x; None where it is not served."""
    try:
        places = kind.places(bottleneck)
        if torch.compiler.is_compiling():
            return _see_anew(bottleneck, kind)
        known = _known.get(bottleneck)
        current = None if known is None or known.tail.places != places else known.notes.current(x)
        if current is None:
            _known.pop(bottleneck, None)
            known = _look(bottleneck, kind)
            current = known.notes.current(x)
            if current is None:  # Python gives the class no version
                return _see_anew(bottleneck, kind)
            _known[bottleneck] = known
    except (Unserved, AttributeError):
        return None
    assert known is not None
    fits, *groups = current
    return fits, groups, known.tail


def _look(bottleneck: Any, kind: TailKind) -> _Known:
    """Read the tail and keep the notes."""
    _extension.require()
    from gc_cuda._C import Reading

    notes = Reading()
    tail, recipe = _read(Look(notes), bottleneck, kind)
    for group, names in enumerate(_parameters(bottleneck, tail, recipe)):
        for part, name in names:
            notes.parameter(part, name, group)
    return _Known(notes, tail)


def _see_anew(bottleneck: Any, kind: TailKind) -> _Seen:
    """The same without notes: torch.compile guards what the reader looks at."""
    tail, recipe = _read(Look(), bottleneck, kind)
    if torch.compiler.is_compiling() and tail.norm.exchanges():
        raise Unserved("the operation with a group is in no graph")
    places = _parameters(bottleneck, tail, recipe)
    return False, [[getattr(part, name) for part, name in names] for names in places], tail


def _parameters(bottleneck: Any, tail: _Tail, recipe: Recipe) -> list[Any]:
    norm = bottleneck.get_submodule(tail.places.norm)
    mask, add, mul = recipe.parameters()
    return [[*((norm, name) for name in NORM_TENSORS), *mask], add, mul]


def _read(look: Look, bottleneck: Any, kind: TailKind) -> tuple[_Tail, Recipe]:
    """What the tail computes; raises Unserved if that is something else."""
    _demand_own_forward(bottleneck, kind)
    for method in kind.methods:
        if method != "forward":  # which was called if we are here, by whatever stands in its place
            look.attribute(bottleneck, method)
            if method in bottleneck.__dict__:
                raise Unserved(f"the instance has a {method} of its own")
    look.nothing_on_all_modules()
    places = kind.places(bottleneck)
    if len(places.blocks) != 1:
        raise Unserved(f"there is more than one block before the addition: {', '.join(places.blocks)}")
    (name,) = places.blocks
    norm = batch_norm(look, _part(look, bottleneck, places.norm), places.norm)
    act = look.child(bottleneck, places.act)
    if type(act) is not nn.ReLU:
        raise Unserved(f"activation {type(act).__name__}")
    look.plain(act, places.act, nn.ReLU)
    recipe = kinds.block_recipe(look, look.child(bottleneck, name), name)
    options = {
        "pooling_type": "avg" if recipe.mask is None else "att",
        "activation": recipe.activation,
        "gate": recipe.gate,
        "eps": recipe.eps,
    }
    dropping = None
    if places.drop_path is not None:
        dropping = drop_path(look, look.child(bottleneck, places.drop_path), places.drop_path)
    return _Tail(places, norm, options, dropping), recipe


def _part(look: Look, bottleneck: Any, path: str) -> Any:
    """A module in the bottleneck, if its parents would only call their children."""
    part, *names = bottleneck, *path.split(".")
    for depth, name in enumerate(names):
        if depth > 0:
            timm.convolution_and_norm(look, part, ".".join(names[:depth]))
        part = look.child(part, name)
    return part


def _demand_own_forward(bottleneck: nn.Module, kind: TailKind) -> None:
    """Demand that the class computes what the kind says."""
    found = kinds.find(bottleneck, TAILS)
    assert found is not None
    kinds.demand_own_methods(swap.innermost(type(bottleneck)), found.base, ("forward", *kind.methods))
    if kind.inserted or torch.compiler.is_compiling():
        return
    forward = found.base.forward  # type: ignore[attr-defined]
    if forward.__module__ != found.base.__module__ or hasattr(forward, "__wrapped__"):
        raise Unserved(f"forward of {found.base.__name__} was replaced")
