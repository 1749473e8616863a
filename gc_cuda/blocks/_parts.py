"""When a block may run fused: the one rule, for our own blocks and for accelerated ones.

A fused block computes with the parameters of its parts and calls none of them. That is right only while a
call of each part would do nothing but its class's own forward on its own parameters. The functions here
demand what makes it so: the part's class and options, no hook on it or on all modules, no forward of its own.
Every kind of block has a reader (those of other frameworks' blocks are in :mod:`gc_cuda.integrations`). It
goes through the parts with these functions and returns a :class:`Recipe`, or raises :class:`Unserved`: then
the block runs as it does without us, and calls its parts.

The reader sees the block through a :class:`Look`, which takes notes (csrc/python/reading.h), so that the next
call only asks whether they still hold. While torch.compile traces, nothing is noted: it guards what the
reader looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as all_modules
from torch.nn.utils import parametrize


class Unserved(ValueError):
    """The block does something that the fused operation does not; the message says what."""


class Branch(NamedTuple):
    """The modules of a transform."""

    first: nn.Module
    norm: nn.Module | None
    last: nn.Module


class Recipe(NamedTuple):
    """A block: the modules that hold its parameters, and how they are used."""

    mask: nn.Module | None
    add: Branch | None
    mul: Branch | None
    activation: str = "relu"
    gate: str = "sigmoid"
    eps: float = 0.0

    def parameters(self) -> tuple[Names, Names, Names]:
        """Where the parameters are: of the mask, of add and of mul, each in the operators' order."""
        mask = () if self.mask is None else ((self.mask, "weight"), (self.mask, "bias"))
        return mask, _names(self.add), _names(self.mul)


def left_to_the_compiler(*, attends: bool, scales: bool, on_cuda: bool) -> bool:
    """Whether torch.compile sees PyTorch's own operations in place of the operator: docs/torch-compile.md.

    So it is with the mean over the pixels. Where that scales x, the compiler computes x again in the backward
    pass from what it keeps for a batch norm before, while an operator's input has to be kept, on every
    device. Where it is added alone, neither keeps x, and the operator is slower on the CPU; on CUDA nobody
    has measured it.
    """
    return not attends and (scales or not on_cuda)


# Modules, and the name of a parameter in each.
Names = tuple[tuple[nn.Module, str], ...]


def _names(branch: Branch | None) -> Names:
    parts = () if branch is None else branch
    return tuple((part, name) for part in parts if part is not None for name in ("weight", "bias"))


class Weights(NamedTuple):
    """The parameters with which a block of several operations computes."""

    places: Names

    def parameters(self) -> tuple[Names, Names, Names]:
        """In the first of the groups that a Recipe has."""
        return self.places, (), ()


class Kind(NamedTuple):
    """A class that is served: its reader, and the methods that must be its own for the reader to be right."""

    read: Callable[[Look, Any], Recipe]
    methods: tuple[str, ...] = ("forward",)


class Look:
    """How a reader sees modules: it takes a note of everything that the reader looks at."""

    def __init__(self, notes: Any = None) -> None:
        self.notes = notes  # a gc_cuda._C.Reading, or None

    def attribute(self, module: Any, name: str) -> Any:
        """An option of the module."""
        if self.notes is not None:
            self.notes.attribute(module, name)
        return getattr(module, name)

    def child(self, module: Any, name: str) -> Any:
        """A part, or None if the module has None in its place."""
        if self.notes is not None:
            self.notes.child(module, name)
        return getattr(module, name)

    def noted(self, module: Any, name: str) -> None:
        """Take a note of an attribute in the module's own dictionary, which may be absent."""
        if self.notes is not None:
            self.notes.attribute(module, name)

    def entry(self, dictionary: dict[str, Any], name: str) -> None:
        """Take a note of what a dictionary holds, such as a global; it may be absent."""
        if self.notes is not None:
            self.notes.entry(dictionary, name)

    def function(self, function: Any) -> None:
        """Take a note of the instructions of a function in Python, and of its defaults."""
        if self.notes is not None:
            self.notes.function(function)
            for name in function.__kwdefaults__ or ():
                self.notes.entry(function.__kwdefaults__, name)

    def children(self, module: nn.Module) -> list[Any]:
        """Every part, in order."""
        if self.notes is not None:
            self.notes.all_children(module)
        return list(module.children())

    def plain(self, module: Any, where: str, kind: type[nn.Module] | None = None) -> None:
        """Demand that calling the module does nothing but its class's forward; of this kind, if one is given.

        Hooks would not run. The old weight norm, spectral norm and pruning are hooks, too, and so are units
        of FSDP and offloading.
        """
        own_class = _class_of(module)
        if kind is not None and own_class is not kind:
            raise Unserved(f"{where} is a {type(module).__name__}, not a {kind.__name__}")
        if self.notes is not None:
            self.notes.part(module)
        for name, method in _METHODS.get(own_class, {}).items():
            if getattr(own_class, name) is not method:
                raise Unserved(f"{name} of {own_class.__name__} was replaced")
        for name in ("forward", "_conv_forward", "_call_impl"):
            if name in module.__dict__:
                raise Unserved(f"{where} has a {name} of its own")
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            raise Unserved(f"{where} has a hook")
        if module._compiled_call_impl is not None:
            raise Unserved(f"{where} is compiled by itself")

    def nothing_on_all_modules(self) -> None:
        """Demand that there is no hook on all modules, and that nobody has replaced nn.Module.__call__."""
        for hooks in _HOOKS_ON_ALL_MODULES:
            if hooks:
                raise Unserved("there is a hook on all modules")
            if self.notes is not None:
                self.notes.empty(hooks)
        if nn.Module.__call__ is not _CALL and not torch.compiler.is_compiling():
            raise Unserved("torch.nn.Module.__call__ was replaced")


_CALL = nn.Module.__call__
_HOOKS_ON_ALL_MODULES = (
    all_modules._global_forward_pre_hooks,
    all_modules._global_forward_hooks,
    all_modules._global_backward_pre_hooks,
    all_modules._global_backward_hooks,
)
# The methods that a call of PyTorch's own modules runs, as they were when gc_cuda was imported.
_METHODS: dict[type, dict[str, Any]] = {
    kind: {"forward": kind.forward}
    for kind in (
        *(nn.AdaptiveAvgPool2d, nn.BatchNorm2d, nn.Hardsigmoid, nn.Hardswish, nn.Identity, nn.LayerNorm),
        *(nn.ReLU, nn.Sequential, nn.Sigmoid, nn.SiLU, nn.Softmax),
    )
}
_METHODS[nn.Conv2d] = {"forward": nn.Conv2d.forward, "_conv_forward": nn.Conv2d._conv_forward}


def convolution(look: Look, module: Any, where: str) -> nn.Module:
    """Demand a 1x1 convolution, with or without a bias."""
    look.plain(module, where, nn.Conv2d)
    if (
        look.attribute(module, "kernel_size") != (1, 1)
        or look.attribute(module, "stride") != (1, 1)
        or look.attribute(module, "padding") not in ((0, 0), "same", "valid")
        or look.attribute(module, "groups") != 1
    ):
        raise Unserved(f"{where} is no plain 1x1 convolution")
    return module


def mean_over_pixels(look: Look, module: Any, where: str) -> None:
    """Demand adaptive average pooling to one pixel."""
    look.plain(module, where, nn.AdaptiveAvgPool2d)
    if look.attribute(module, "output_size") not in (1, (1, 1), [1, 1]):
        raise Unserved(f"{where} does not pool to one pixel")


def softmax(look: Look, module: Any, where: str, dim: int) -> None:
    """Demand a softmax over that dimension."""
    look.plain(module, where, nn.Softmax)
    if look.attribute(module, "dim") != dim:
        raise Unserved(f"{where} is not over dimension {dim}")


# The class of an activation: what it computes
_ACTIVATIONS = {
    ("torch.nn.modules.activation", "ReLU"): "relu",
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("torch.nn.modules.activation", "Hardswish"): "hardswish",
    ("timm.layers.activations", "Swish"): "silu",
    ("timm.layers.activations", "HardSwish"): "hardswish",
    ("timm.layers.activations_me", "SwishMe"): "silu",
    ("timm.layers.activations_me", "HardSwishMe"): "hardswish",
    ("mmcv.cnn.bricks.swish", "Swish"): "silu",
    ("mmcv.cnn.bricks.hswish", "HSwish"): "hardswish",
}
_GATES = {
    ("torch.nn.modules.activation", "Sigmoid"): "sigmoid",
    ("torch.nn.modules.activation", "Hardsigmoid"): "hardsigmoid",
    ("timm.layers.activations", "Sigmoid"): "sigmoid",
    ("timm.layers.activations", "HardSigmoid"): "hardsigmoid",
    ("timm.layers.activations_me", "HardSigmoidMe"): "hardsigmoid",
}
_MMCV_HARD_SIGMOID = ("mmcv.cnn.bricks.hsigmoid", "HSigmoid")


def activation(look: Look, module: Any, where: str) -> str:
    """The name of an activation that is served."""
    name = _ACTIVATIONS.get(name_of(module))
    if name is None:
        raise Unserved(f"activation {type(module).__name__}")
    look.plain(module, where)
    return name


def gate(look: Look, module: Any, where: str) -> str:
    """The name of a gate that is served."""
    if name_of(module) == _MMCV_HARD_SIGMOID:
        look.plain(module, where)
        constants = tuple(
            look.attribute(module, name) for name in ("bias", "divisor", "min_value", "max_value")
        )
        if constants != (3, 6, 0, 1):
            raise Unserved(f"gate {type(module).__name__} with the constants {constants}, not (3, 6, 0, 1)")
        return "hardsigmoid"
    name = _GATES.get(name_of(module))
    if name is None:
        raise Unserved(f"gate {type(module).__name__}")
    look.plain(module, where)
    return name


LAYER_NORM = (("torch.nn.modules.normalization", "LayerNorm"),)


def normalization(
    look: Look, module: Any, where: str, kinds: tuple[tuple[str, str], ...] = LAYER_NORM
) -> nn.Module:
    """Demand a layer norm over the hidden units, of one of the classes, with weight and bias."""
    if name_of(module) not in kinds:
        raise Unserved(f"norm {type(module).__name__}")
    look.plain(module, where)
    if not _has(module, "weight") or not _has(module, "bias"):
        raise Unserved(f"{where} has no weight or no bias")
    if any(one != 1 for one in look.attribute(module, "normalized_shape")[1:]):
        raise Unserved(f"{where} is not over the hidden units alone")
    assert isinstance(module, nn.Module)
    return module


def context_transform(look: Look, transform: Any, where: str) -> Branch | None:
    """GCNet's transform: a Sequential of convolution, layer norm, ReLU, convolution; or None."""
    if transform is None:
        return None
    look.plain(transform, where, nn.Sequential)
    parts = look.children(transform)
    if len(parts) != 4:
        raise Unserved(f"{where} is no Sequential of four modules")
    first, norm, act, last = parts
    if activation(look, act, f"{where}.2") != "relu":
        raise Unserved(f"activation {type(act).__name__}")
    return Branch(
        convolution(look, first, f"{where}.0"),
        normalization(look, norm, f"{where}.1"),
        convolution(look, last, f"{where}.3"),
    )


def context_block(look: Look, block: Any, *, attends: bool) -> Recipe:
    """The recipe of a block that has GCNet's parts: with attention pooling, or the mean of the pixels."""
    mask = None
    if attends:
        mask = convolution(look, look.child(block, "conv_mask"), "conv_mask")
        softmax(look, look.child(block, "softmax"), "softmax", dim=2)
    else:
        mean_over_pixels(look, look.child(block, "avg_pool"), "avg_pool")
    add = context_transform(look, look.child(block, "channel_add_conv"), "channel_add_conv")
    mul = context_transform(look, look.child(block, "channel_mul_conv"), "channel_mul_conv")
    return Recipe(mask, add, mul, eps=one_eps(look, add, mul))


def squeeze_excite(look: Look, block: Any, first: str, act: str, last: str, gating: str) -> Recipe:
    """The recipe of a block that has these parts under these names, and averages over the pixels."""
    branch = Branch(
        convolution(look, look.child(block, first), first),
        None,
        convolution(look, look.child(block, last), last),
    )
    return Recipe(
        None,
        None,
        branch,
        activation(look, look.child(block, act), act),
        gate(look, look.child(block, gating), gating),
    )


def one_eps(look: Look, add: Branch | None, mul: Branch | None) -> float:
    """The eps of the norms, which the branches must share."""
    values = {
        float(look.attribute(branch.norm, "eps"))
        for branch in (add, mul)
        if branch is not None and branch.norm is not None
    }
    if len(values) != 1:
        raise Unserved(f"its norms have different eps, {sorted(values)}")
    return values.pop()


def _class_of(module: Any) -> type:
    """The class before parametrizations, which make a subclass that changes nothing but where a tensor is."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def name_of(module: Any) -> tuple[str, str]:
    """The module and the name of its class."""
    kind = _class_of(module)
    return kind.__module__, kind.__qualname__


def _has(module: Any, name: str) -> bool:
    """Whether the module has such a parameter, without a look-up: a parametrization would compute it."""
    if name in module._parameters:
        return module._parameters.get(name) is not None
    return parametrize.is_parametrized(module, name) or getattr(module, name, None) is not None
