"""One line for an existing model: its global context and squeeze-and-excitation blocks run fused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from gc_cuda import _extension, _values
from gc_cuda.blocks._fused import Read, recipe_of, run
from gc_cuda.blocks._parts import Kind, Unserved
from gc_cuda.integrations import gcnet, mmdet, timm, torchvision
from gc_cuda.models import swap

_KINDS: dict[str, Kind] = {**gcnet.KINDS, **mmdet.KINDS, **timm.KINDS, **torchvision.KINDS}

PREFIX = "Accelerated"  # of the names of the classes that are made

ACCELERATED = "accelerated"
ALREADY = "accelerated before"
LEFT_ALONE = "left alone"


class Entry(NamedTuple):
    """A block of the model."""

    name: str  # its path in the model
    kind: str  # the class, by its full name
    action: str  # ACCELERATED, ALREADY or LEFT_ALONE
    reason: str  # why it was left alone


class Report(NamedTuple):
    """What :func:`accelerate` found and did; it prints as a table."""

    entries: tuple[Entry, ...]

    @property
    def accelerated(self) -> list[str]:
        """The names of the blocks that run fused now."""
        return [entry.name for entry in self.entries if entry.action != LEFT_ALONE]

    @property
    def left_alone(self) -> dict[str, str]:
        """The names of the others, and why."""
        return {entry.name: entry.reason for entry in self.entries if entry.action == LEFT_ALONE}

    def __str__(self) -> str:
        if not self.entries:
            return "gc_cuda: no global context or squeeze-and-excitation block that it knows"
        rows = [("name", "class", "what was done", "reason"), *self.entries]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        total = f"{len(self.accelerated)} of {len(self.entries)} blocks run fused"
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:], total])


def accelerate(model: nn.Module) -> Report:
    """Let the model's blocks run through the fused operation, in place.

    Served are GCNet's and mmcv's ``ContextBlock``, timm's ``GlobalContext``, ``SEModule`` and
    ``SqueezeExcite``, torchvision's ``SqueezeExcitation`` and mmdetection's ``SELayer``, with ReLU, SiLU or
    Hardswish inside and sigmoid or hard sigmoid as the gate. A block with another option, with a hook on one
    of its parts, or of a subclass with a forward of its own is left alone, and the report says why.

    The modules stay the same objects with the same parameters, ``state_dict``, hooks, device, dtype and
    training mode; only their class becomes a subclass of what it was. Copies and pickles stay accelerated
    (loading one needs gc_cuda); accelerating twice is the same as once; :func:`restore` undoes it.

    A block is looked at anew in every call: if it, or a part of it, is changed later into something that is
    not served (by a hook, pruning, an adapter, another activation …), its own forward runs, which calls its
    parts. That also runs while a graph is traced, under the transforms of ``torch.func`` and forward-mode AD,
    for subclasses of Tensor such as DTensor, and for inputs that the operators do not take, as on other
    devices.

    So a model traced by ``torch.jit.trace``, ``torch.fx.symbolic_trace`` or torchvision's
    ``create_feature_extractor`` holds PyTorch's own operators and is not accelerated. To keep the blocks in
    an FX graph, name their classes as leaves: ``create_feature_extractor(model, nodes,
    tracer_kwargs={"leaf_modules": [type(model.get_submodule(name)) for name in report.accelerated]})``.
    ``torch.jit.script`` wants a restored model.

    Args:
        model: a block, or a module that has blocks anywhere inside.

    Returns:
        The blocks by name, what was done with each, and why nothing was; print it.

    Raises:
        TypeError: for what is not a module.
        ImportError: where the extension is missing, or lacks CUDA and the blocks are on a GPU; nothing was
            changed then, and it says what to run.
    """
    _values.module(model, "model")
    _extension.require()
    found = list(_blocks(model))
    if any(parameter.is_cuda for _, block, _ in found for parameter in block.parameters()):
        _extension.require_cuda()
    entries = []
    for name, block, kind in found:
        action, reason = _accelerate(block, kind)
        entries.append(Entry(name, _full_name(swap.original(type(block))), action, reason))
    return Report(tuple(entries))


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every block is of its own class again.

    Raises:
        TypeError: for what is not a module.
    """
    _values.module(model, "model")
    for module in model.modules():
        if _is_accelerated(module):
            module.__class__ = swap.original(type(module))


def fused_forward(read: Read) -> swap.Forward:
    """The forward of an accelerated block, which pickles name."""

    def forward(block: Any, own_forward: Callable[..., Any], x: Any) -> Any:
        return run(block, read, own_forward, x)

    return forward


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Kind]]:
    """Every block of a class that is served or derives from one."""
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            kind = _KINDS.get(_full_name(base))
            if kind is not None:
                yield name, module, kind
                break


def _accelerate(block: nn.Module, kind: Kind) -> tuple[str, str]:
    """What was done, and why not."""
    if _is_accelerated(block):
        return ALREADY, ""
    own = next(base for base in type(block).__mro__ if _full_name(base) in _KINDS)
    for method in kind.methods:
        if getattr(type(block), method) is not getattr(own, method):
            return LEFT_ALONE, f"{type(block).__name__} overrides {method} of {own.__name__}"
        if method in block.__dict__:
            return LEFT_ALONE, f"the instance has a {method} of its own"
    try:
        recipe_of(block, kind.read)
    except Unserved as unserved:
        return LEFT_ALONE, str(unserved)
    except AttributeError as error:  # another version of the framework
        return LEFT_ALONE, f"it is built differently: {error}"
    block.__class__ = swap.derive(swap.Derivation(type(block), PREFIX, fused_forward, (kind.read,)))
    return ACCELERATED, ""


def _is_accelerated(module: nn.Module) -> bool:
    # By the prefix, not by fused_forward: gc_cuda may have been imported anew after it accelerated the
    # module.
    derivation = swap.derivation_of(type(module))
    return derivation is not None and derivation.prefix == PREFIX


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
