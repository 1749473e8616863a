"""What a block of another framework computes, read off the block, in the terms of ``global_context``.

The readers in :mod:`gc_cuda.integrations` make a :class:`Recipe` of a block or raise :class:`Unserved`. They
run in every forward, so that a block whose parts were exchanged or hooked later is noticed; they only look at
attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gc_cuda import _checks
from gc_cuda._swap import Forward
from gc_cuda.functional import global_context
from gc_cuda.reference import Transform


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


class Kind(NamedTuple):
    """A class that is served: its reader, and the methods that must be its own for that to be true."""

    read: Callable[[Any], Recipe]
    methods: tuple[str, ...] = ("forward",)


def fused_forward(read: Callable[[Any], Recipe]) -> Forward:
    """The forward of an accelerated block: the fused one while the block and x are served, else its own."""

    def forward(block: Any, own_forward: Callable[..., Any], x: Any) -> Any:
        if not _is_served(x):
            return own_forward(block, x)
        try:
            recipe = read(block)
        except Unserved:
            return own_forward(block, x)
        return run(recipe, x)

    return forward


def _is_served(x: Any) -> bool:
    """Not torch.fx's stand-in for a tensor, nor what the operators do not take; and neither a trace is
    recorded nor a transform of torch.func under way, which needs more of an autograd.Function.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False
    return (
        isinstance(x, Tensor)
        and x.dim() == 4
        and (x.is_cpu or x.is_cuda or x.is_meta)
        and x.is_floating_point()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


def run(recipe: Recipe, x: Tensor) -> Tensor:
    """The block's output, in the dtype that its eager form has under autocast too."""
    mask, add, mul, activation, gate, eps = recipe
    x = _as_autocast_promotes(x)
    return global_context(
        x,
        None if mask is None else _parameter(mask, "weight", x),
        None if mask is None else _parameter(mask, "bias", x),
        _transform(add, x),
        _transform(mul, x),
        pooling_type="avg" if mask is None else "att",
        activation=activation,
        gate=gate,
        eps=eps,
    )


def _as_autocast_promotes(x: Tensor) -> Tensor:
    """x in the dtype of the eager block's output: x plus what a convolution gives under autocast.

    It changes nothing but a half x under autocast to the other half type, which eager widens to float32.
    """
    kind = "cuda" if x.is_cuda else "cpu"
    if not torch.is_autocast_enabled(kind) or x.is_meta or not _checks.is_served(x.dtype):
        return x
    dtype = torch.get_autocast_dtype(kind)
    return x if x.dtype == dtype else x.to(torch.promote_types(x.dtype, dtype))


def _transform(branch: Branch | None, x: Tensor) -> Transform | None:
    """The parameters of a branch, read by their names: a parametrization keeps its say."""
    if branch is None:
        return None
    first, norm, last = branch
    return Transform(
        _parameter(first, "weight", x),
        _parameter(first, "bias", x),
        None if norm is None else _parameter(norm, "weight", x),
        None if norm is None else _parameter(norm, "bias", x),
        _parameter(last, "weight", x),
        _parameter(last, "bias", x),
    )


def _parameter(module: nn.Module, name: str, x: Tensor) -> Any:
    """A parameter, or None, in a dtype that may travel with ``x``."""
    tensor = part(module, name)
    return tensor if tensor is None or _checks.fits(tensor, x) else tensor.to(x.dtype)


def part(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)``, in 0.1 us and not 0.4 for a parameter or a submodule: nn.Module finds them
    where this does, but is asked only when Python has looked everywhere else and made an AttributeError.
    """
    for held in (module._parameters, module._modules):
        if name in held:
            return held[name]
    return getattr(module, name)


def plain(module: nn.Module, where: str) -> None:
    """Demand that calling the module does nothing but its forward: hooks would not run, and the old weight
    norm, spectral norm and pruning are hooks.
    """
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        raise Unserved(f"{where} has a hook")
    if "forward" in module.__dict__:
        raise Unserved(f"{where} has a forward of its own")


def convolution(module: Any, where: str, *, bias: bool = True) -> nn.Module:
    """Demand a 1x1 convolution, with a bias unless that is not needed."""
    if not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward:
        raise Unserved(f"{where} is {_article(module)}, not a Conv2d")
    plain(module, where)
    if (
        module.kernel_size != (1, 1)
        or module.stride != (1, 1)
        or module.padding not in ((0, 0), "same", "valid")
        or module.groups != 1
    ):
        raise Unserved(f"{where} is no plain 1x1 convolution")
    if bias and part(module, "bias") is None:
        raise Unserved(f"{where} has no bias")
    return module


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


def activation(module: Any, where: str = "act") -> str:
    """The name of an activation that is served."""
    plain(module, where)
    kind = type(module)
    name = _ACTIVATIONS.get((kind.__module__, kind.__qualname__))
    if name is None:
        raise Unserved(f"activation {kind.__name__}")
    return name


def gate(module: Any, where: str = "gate") -> str:
    """The name of a gate that is served."""
    plain(module, where)
    kind = type(module)
    key = (kind.__module__, kind.__qualname__)
    if key == _MMCV_HARD_SIGMOID:
        constants = (module.bias, module.divisor, module.min_value, module.max_value)
        if constants != (3, 6, 0, 1):
            raise Unserved(f"gate {kind.__name__} with the constants {constants}, not (3, 6, 0, 1)")
        return "hardsigmoid"
    name = _GATES.get(key)
    if name is None:
        raise Unserved(f"gate {kind.__name__}")
    return name


def normalization(module: Any, where: str, kinds: tuple[tuple[str, str], ...]) -> nn.Module:
    """Demand a layer norm over the hidden units, of one of the classes, with weight and bias."""
    kind = type(module)
    if (kind.__module__, kind.__qualname__) not in kinds:
        raise Unserved(f"norm {kind.__name__}")
    plain(module, where)
    if part(module, "weight") is None or part(module, "bias") is None:
        raise Unserved(f"{where} has no weight or no bias")
    assert isinstance(module, nn.Module)
    return module


def squeeze_excite(block: Any, first: str, act: str, last: str, gating: str) -> Recipe:
    """The recipe of a block that has these parts under these names, and averages over the pixels."""
    branch = Branch(convolution(part(block, first), first), None, convolution(part(block, last), last))
    return Recipe(None, None, branch, activation(part(block, act), act), gate(part(block, gating), gating))


def one_eps(add: Branch | None, mul: Branch | None) -> float:
    """The eps of the norms, which the branches must share."""
    values = {float(b.norm.eps) for b in (add, mul) if b is not None and b.norm is not None}  # type: ignore[arg-type]
    if len(values) != 1:
        raise Unserved(f"its norms have different eps, {sorted(values)}")
    return values.pop()


def _article(module: Any) -> str:
    return f"a {type(module).__name__}"
