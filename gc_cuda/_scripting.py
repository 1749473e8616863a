"""What ``torch.jit.script`` is told: its compiler reads source text, and ours is not in its language.

It asks a module, anywhere in a model, and a function, called from anywhere, for ``__prepare_scriptable__``
before it compiles them. So the error comes first, and not from the middle of a file of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

_TRACE = "torch.jit.trace, which records PyTorch's own operators, or torch.export"


class NotScriptable:
    """A module that ``torch.jit.script`` cannot compile: one of ours, or one that got our forward."""

    def __prepare_scriptable__(self) -> NoReturn:
        recipe = getattr(type(self), "_gc_recipe", None)  # of a class that gc_cuda._swap has made
        if recipe is None:
            _refuse(type(self).__qualname__, f"use {_TRACE}")
        original, prefix = recipe[0].__qualname__, recipe[1]
        if prefix == "Accelerated":
            advice = f"restore the model first: gc_cuda.restore(model); or use {_TRACE}"
            _refuse(f"an accelerated {original}", advice)
        _refuse(f"a {original} with a block that gc_cuda.insert put in", f"use {_TRACE}")


Function = TypeVar("Function", bound=Callable[..., Any])


def not_scriptable(function: Function) -> Function:
    """The function, so that ``torch.jit.script`` of it, or of what calls it, says what to do instead."""

    def refuse() -> NoReturn:
        _refuse(function.__name__, f"use {_TRACE}")

    function.__prepare_scriptable__ = refuse  # type: ignore[attr-defined]
    return function


def _refuse(what: str, advice: str) -> NoReturn:
    raise RuntimeError(f"gc_cuda: torch.jit.script cannot compile {what}: {advice}")
