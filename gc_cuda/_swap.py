"""Giving a module another forward in place: its class becomes a subclass of what it was, made for that.

Why the class: the instance itself stays untouched, so that parameters, buffers, hooks, the place in its
parents and whoever else holds it stay what they are, ``isinstance`` stays true, and undoing it is one
assignment. A new module in its place would leave old references and hooks behind and could not keep the
names of other frameworks' parameters; a ``forward`` in the instance's dictionary does not pickle, and a
forward hook would let the old forward run first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

# forward(module, the forward of its own class, x)
Forward = Callable[[Any, Callable[..., Any], Any], Any]


class Derived:
    """What the made classes share: deepcopy and pickle, which name a class by what it is made of."""

    _gc_recipe: tuple[type[nn.Module], str, Callable[..., Forward], tuple[Any, ...]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Protocol 2 is the first to keep the class apart from the state.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return _new, self._gc_recipe, *reduced[2:]


_made: dict[tuple[Any, ...], type[nn.Module]] = {}


def derive(
    original: type[nn.Module], prefix: str, make: Callable[..., Forward], arguments: tuple[Any, ...]
) -> type[nn.Module]:
    """The subclass of ``original`` with the forward ``make(*arguments)``; the same in every call.

    ``make`` and what it takes must pickle, as functions of a module's top level do.
    """
    recipe = (original, prefix, make, arguments)
    if recipe not in _made:
        _made[recipe] = _make(*recipe)
    return _made[recipe]


def _make(
    original: type[nn.Module], prefix: str, make: Callable[..., Forward], arguments: tuple[Any, ...]
) -> type[nn.Module]:
    forward = make(*arguments)
    of_x = list(inspect.signature(original.forward).parameters)[1]  # the name of the argument

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
        "_gc_recipe": (original, prefix, make, arguments),
        "forward": call,
    }
    metaclass: Any = type(original)
    made: type[nn.Module] = metaclass(f"{prefix}{original.__name__}", (Derived, original), members)
    return made


def original(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a made one was made of; any other is its own."""
    recipe = getattr(kind, "_gc_recipe", None)  # not by Derived, of which a new import makes another
    return kind if recipe is None else recipe[0]


def _new(*recipe: Any) -> nn.Module:
    made = derive(*recipe)
    return made.__new__(made)
