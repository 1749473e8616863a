"""The paths that modules have besides those of their rooms: users import them, and pickles name them.

Such a path and the room give the same module. What the module defines has the path for its ``__module__``: so
pickles name no room, and modules can move again. The .pyi files show type checkers the public paths.

The other public modules lie at their public paths: :mod:`gc_cuda.reference`, :mod:`gc_cuda.blocks` and
:mod:`gc_cuda.integrations`. The import of ``gc_cuda.integrations.mmcv`` registers a block; by two paths it
would do so twice.
"""

import sys

from gc_cuda.models import accelerate, convert, insert, swap
from gc_cuda.ops import functional

PATHS = {
    "accelerate": accelerate,
    "convert": convert,
    "functional": functional,
    "insert": insert,
    # For pickles alone, those of gc_cuda 0.1.0 and of its development:
    "_swap": swap,
    "_recipe": accelerate,
    "_fused": accelerate,
}


def register() -> None:
    """Let every path lead to its module."""
    for name, module in PATHS.items():
        path = f"gc_cuda.{name}"
        sys.modules[path] = module
        vars(sys.modules["gc_cuda"]).setdefault(name, module)  # the functions accelerate and insert stay
        for value in list(vars(module).values()):
            if getattr(value, "__module__", None) == module.__name__:
                value.__module__ = path
