"""What ``torch.jit.script`` is told: its compiler reads source text, and ours is not in its language.

Before it compiles a module anywhere in a model, or a function that is called anywhere, it asks for its
``__prepare_scriptable__``. So the error says what to do, and does not come from the middle of a file of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from gc_cuda.models import swap
from gc_cuda.models.accelerate import PREFIX

_INSTEAD = "torch.jit.trace, which records PyTorch's own operators, or torch.export"


def refuse(*targets: Callable[..., Any]) -> None:
    """Let ``torch.jit.script`` of these functions and of modules of these classes say what to do instead."""
    for target in targets:
        refusal = _of_a_module if isinstance(target, type) else _of_a_function(target.__name__)
        target.__prepare_scriptable__ = refusal  # type: ignore[attr-defined]


def _of_a_module(self: Any) -> NoReturn:
    kind = type(self)
    derivation = swap.derivation_of(kind)
    if derivation is None:
        _raise(kind.__qualname__, f"use {_INSTEAD}")
    name = swap.innermost(kind).__qualname__
    if derivation.prefix == PREFIX:
        advice = f"restore the model first: gc_cuda.restore(model); or use {_INSTEAD}"
        _raise(f"an accelerated {name}", advice)
    _raise(f"a {name} with a block from gc_cuda.insert", f"use {_INSTEAD}")


def _of_a_function(name: str) -> Callable[[], NoReturn]:
    return lambda: _raise(name, f"use {_INSTEAD}")


def _raise(what: str, advice: str) -> NoReturn:
    raise RuntimeError(f"gc_cuda: torch.jit.script cannot compile {what}: {advice}")
