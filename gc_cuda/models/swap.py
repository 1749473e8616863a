"""Giving a module another forward in place: its class becomes a subclass of its class, made for that.

The instance itself stays as it is: so do its parameters, buffers, hooks, its place in its parents and other
references to it; ``isinstance`` stays true, and one assignment undoes it. A new module in its place would
leave old references and hooks behind and could not keep the names of other frameworks' parameters; a
``forward`` in the instance's dictionary does not pickle; and a forward hook would let the old one run first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

# forward(module, the forward of its own class, x)
Forward = Callable[[Any, Callable[..., Any], Any], Any]


class Derivation(NamedTuple):
    """How a class is made; it must pickle, as classes and functions of a module's top level do."""

    original: type[nn.Module]
    prefix: str  # of the name
    make: Callable[..., Forward]  # called with the arguments
    arguments: tuple[Any, ...] = ()


class Derived:
    """What the made classes share: deepcopy and pickle, which name a class by its derivation."""

    _gc_derivation: Derivation

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Protocol 2 is the first to keep the class apart from the state.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        _make_new, _its_arguments, *state = reduced
        return _new, _by_name(self._gc_derivation), *state


_made: dict[Derivation, type[nn.Module]] = {}


def derive(derivation: Derivation) -> type[nn.Module]:
    """The subclass by that derivation; the same in every call."""
    if derivation not in _made:
        _made[derivation] = _make(derivation)
    return _made[derivation]


def _make(derivation: Derivation) -> type[nn.Module]:
    original, prefix, make, arguments = derivation
    forward = make(*arguments)
    of_x = list(inspect.signature(original.forward).parameters)[1]  # the name of the argument after self

    @functools.wraps(original.forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            return forward(self, original.forward, args[0])
        if not args and len(kwargs) == 1 and of_x in kwargs:
            return forward(self, original.forward, kwargs[of_x])
        return original.forward(self, *args, **kwargs)

    call.__qualname__ = f"{prefix}{original.__qualname__}.forward"
    members = {
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "_gc_derivation": derivation,
        "forward": call,
    }
    metaclass: Any = type(original)
    bases = (original,) if issubclass(original, Derived) else (Derived, original)
    made: type[nn.Module] = metaclass(f"{prefix}{original.__name__}", bases, members)
    return made


def derivation_of(kind: type) -> Derivation | None:
    """The derivation of a made class, even if an earlier import of gc_cuda made it; else None."""
    return getattr(kind, "_gc_derivation", None)


def original(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a made one was made of; any other is its own."""
    derivation = derivation_of(kind)
    return kind if derivation is None else derivation.original


def innermost(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that was there before any was made of it."""
    while derivation_of(kind) is not None:
        kind = original(kind)
    return kind


def _by_name(derivation: Derivation) -> tuple[Any, ...]:
    """The derivation for a pickle, to which a made class has no name: in its place is a tuple like this."""
    original, *others = derivation
    inner = derivation_of(original)
    return (original if inner is None else _by_name(inner), *others)


def _new(*derivation: Any) -> nn.Module:
    made = _derive_by_name(derivation)
    return made.__new__(made)


def _derive_by_name(derivation: tuple[Any, ...]) -> type[nn.Module]:
    original, *others = derivation
    return derive(Derivation(_derive_by_name(original) if isinstance(original, tuple) else original, *others))
