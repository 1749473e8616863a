"""What autograd holds on to for the backward pass, by the storages of its saved tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class Kept:
    """Counts each storage once, and those of `own` not at all."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own = {_storage(tensor) for tensor in own}
        # Which keeps them alive: no storage can take another's place.
        self._saved: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self._own:
            self._saved.setdefault(_storage(tensor), tensor.detach())
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._saved.values())


@contextlib.contextmanager
def keeping(own: Iterable[Tensor]) -> Iterator[Kept]:
    """What is saved within."""
    kept = Kept(own)
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        yield kept


def kept_by(module: nn.Module, x: Tensor) -> int:
    """In a forward pass, which is run (on meta tensors: without memory); without parameters and buffers."""
    with keeping([*module.parameters(), *module.buffers()]) as kept:
        out = module(x)
    del out
    return kept.bytes


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
