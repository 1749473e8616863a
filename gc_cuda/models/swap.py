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


class Recipe(NamedTuple):
    """How a class is made; it must pickle, as classes and functions of a module's top level do."""

    original: type[nn.Module]
    prefix: str  # of the name
    make: Callable[..., Forward]  # called with the arguments
    arguments: tuple[Any, ...] = ()


class Derived:
    """What the made classes share: deepcopy and pickle, which name a class by its recipe."""

    _gc_recipe: Recipe

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Protocol 2 is the first to keep the class apart from the state.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        _make_new, _its_arguments, *state = reduced
        return _new, tuple(self._gc_recipe), *state


_made: dict[Recipe, type[nn.Module]] = {}


def derive(recipe: Recipe) -> type[nn.Module]:
    """The subclass by that recipe; the same in every call."""
    if recipe not in _made:
        _made[recipe] = _make(recipe)
    return _made[recipe]


def _make(recipe: Recipe) -> type[nn.Module]:
    original, prefix, make, arguments = recipe
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
        "_gc_recipe": recipe,
        "forward": call,
    }
    metaclass: Any = type(original)
    made: type[nn.Module] = metaclass(f"{prefix}{original.__name__}", (Derived, original), members)
    return made


def recipe_of(kind: type) -> Recipe | None:
    """The recipe of a made class, also if another import of gc_cuda in this process made it; else None."""
    return getattr(kind, "_gc_recipe", None)


def original(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a made one was made of; any other is its own."""
    recipe = recipe_of(kind)
    return kind if recipe is None else recipe.original


def _new(*recipe: Any) -> nn.Module:
    made = derive(Recipe(*recipe))
    return made.__new__(made)
