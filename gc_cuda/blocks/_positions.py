"""Where :func:`gc_cuda.insert` puts a block into a bottleneck, and how the bottleneck finds it there.

The positions are mmdetection's, and so is the way: the bottleneck is said to be ``with_plugins``, and
``after_conv1_plugin_names`` and so on name the children that run there. mmdetection's forward reads them by
itself; those of torchvision and timm know nothing of them and are replaced by one that does. The bottlenecks
are described in :mod:`gc_cuda.integrations`, each by an :class:`InsertKind`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# After the norm and the ReLU of the convolution; after the norm of the last, before the addition.
POSITIONS = ("after_conv1", "after_conv2", "after_conv3")

NAME = "context_block"  # mmdetection's name of the block


def plugins_after(bottleneck: Any, position: str) -> Sequence[str]:
    """The names of the children that run there."""
    if "with_plugins" not in bottleneck.__dict__ or not bottleneck.with_plugins:
        return ()
    names: Sequence[str] = getattr(bottleneck, f"{position}_plugin_names")
    return names


def through(bottleneck: Any, names: Sequence[str], out: Any) -> Any:
    """``out`` through the children of these names in turn."""
    for name in names:
        out = getattr(bottleneck, name)(out)
    return out


class InsertKind(NamedTuple):
    """A class of bottlenecks of three convolutions: conv1, conv2, conv3."""

    make_forward: Callable[..., Any] | None = None  # of a swap.Derivation; None: its own runs what is named
    slot: str | None = None  # the attribute that its own forward runs after conv3, whatever stands there
    parts: tuple[str, ...] = ()  # what make_forward's forward calls
    plugins: Callable[[Any, str], Sequence[str]] = plugins_after  # by position


def add_plugin(kind: InsertKind, bottleneck: Any, position: str, name: str) -> None:
    """Let the child of that name, which is not there yet, run there, after what runs there already."""
    names = {one: [*kind.plugins(bottleneck, one)] for one in POSITIONS}
    names[position].append(name)
    for one, there in names.items():
        setattr(bottleneck, f"{one}_plugin_names", there)
    bottleneck.with_plugins = True
