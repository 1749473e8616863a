"""What ``torch.jit.script`` is told: its compiler reads source text, and ours is not in its language.

It asks a module, anywhere in a model, and a function, called from anywhere, for ``__prepare_scriptable__``
before it compiles them. So the error says what to do, and does not come from the middle of a file of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

_INSTEAD = "torch.jit.trace, which records PyTorch's own operators, or torch.export"


def refuse(*targets: Callable[..., Any]) -> None:
    """Let ``torch.jit.script`` of these functions and of modules of these classes say what to do instead."""
    for target in targets:
        refusal = _of_a_module if isinstance(target, type) else _of_a_function(target.__name__)
        target.__prepare_scriptable__ = refusal  # type: ignore[attr-defined]


def _of_a_module(self: Any) -> NoReturn:
    kind = type(self)
    recipe = getattr(kind, "_gc_recipe", None)  # of a class that gc_cuda._swap has made
    if recipe is None:
        _raise(kind.__qualname__, f"use {_INSTEAD}")
    original, prefix, *_ = recipe
    if prefix == "Accelerated":
        advice = f"restore the model first: gc_cuda.restore(model); or use {_INSTEAD}"
        _raise(f"an accelerated {original.__qualname__}", advice)
    _raise(f"a {original.__qualname__} with a block from gc_cuda.insert", f"use {_INSTEAD}")


def _of_a_function(name: str) -> Callable[[], NoReturn]:
    return lambda: _raise(name, f"use {_INSTEAD}")


def _raise(what: str, advice: str) -> NoReturn:
    raise RuntimeError(f"gc_cuda: torch.jit.script cannot compile {what}: {advice}")
