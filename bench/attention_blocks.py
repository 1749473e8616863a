"""Finds channel attention in a model by what it computes, without asking gc_cuda.

The innermost modules that take one [N, C, H, W] and give another of the same shape, where something pools all
pixels into N * C numbers and the last function multiplies or adds a tensor that is the same for all pixels.
One forward pass on the meta device shows it, with all functions of PyTorch recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

POOLS = {"mean", "sum", "avg_pool2d", "adaptive_avg_pool2d", "matmul", "einsum", "bmm", "amax", "max_pool2d"}
POOLS |= {"adaptive_max_pool2d", "max"}
BROADCASTS = {"mul", "imul", "rmul", "add", "iadd", "radd", "multiply", "addcmul"}

Key = tuple[Any, ...]


class Seen(NamedTuple):
    """A tensor in an event."""

    identity: int
    shape: tuple[int, ...]
    same_for_all_pixels: bool


class Event(NamedTuple):
    name: str  # of a function, without underscores
    takes: tuple[Seen, ...]
    gives: Seen


def _seen(tensor: Tensor) -> Seen:
    pixels = tensor.shape[2:]
    same = tensor.dim() == 4 and all(n == 1 or s == 0 for n, s in zip(pixels, tensor.stride()[2:]))
    return Seen(id(tensor), tuple(tensor.shape), same)


class Recorder(TorchFunctionMode):
    """The functions of one forward pass, in order. It keeps every tensor, so that no id comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._kept: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        takes = tuple(_seen(one) for one in args if isinstance(one, Tensor))
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._kept.append((args, out))
            self.events.append(Event(func.__name__.strip("_"), takes, _seen(out)))
        return out


def key_of(module: nn.Module) -> Key:
    """The same for modules of one class, options and structure, whatever their widths."""
    options = {name: value for name, value in vars(module).items() if isinstance(value, (bool, str))}
    options.pop("training", None)
    parts = tuple((name, key_of(part)) for name, part in module.named_children())
    return type(module), tuple(sorted(options.items())), parts


def _is_one(x: Any, out: Any, events: list[Event]) -> bool:
    """Whether what took x, gave out and ran the events is channel attention."""
    if not isinstance(x, Tensor) or not isinstance(out, Tensor) or x.dim() != 4 or x.shape != out.shape:
        return False
    n, c, h, w = x.shape
    pools = h * w > 1 and any(
        event.name in POOLS and torch.Size(event.gives.shape).numel() == n * c for event in events
    )
    last = next((event for event in reversed(events) if event.gives.identity == id(out)), None)
    return (
        pools
        and last is not None
        and last.name in BROADCASTS
        and any(one.same_for_all_pixels for one in last.takes)
        and any(one.shape == tuple(x.shape) and not one.same_for_all_pixels for one in last.takes)
    )


def _keys(model: nn.Module) -> dict[str, Key]:
    return {
        name: key_of(module)
        for name, module in model.named_modules()
        if name and not type(module).__module__.startswith("torch.nn.")
    }


class Finder:
    """Finds the blocks of models; what it has judged of one model it knows in the next."""

    def __init__(self) -> None:
        self._judged: dict[Key, bool] = {}

    def blocks_of(self, model: nn.Module, size: tuple[int, ...]) -> dict[str, nn.Module]:
        """By their names; the model is on the meta device, and takes an image of that size.

        Raises:
            whatever the model raises there, if its forward pass is needed; `known_blocks_of` has those that
            were found until then.
        """
        keys = _keys(model)
        if any(key not in self._judged for key in keys.values()):
            self._judge(model, keys, size)
            for key in keys.values():
                self._judged.setdefault(key, False)  # never called
        return self.known_blocks_of(model)

    def known_blocks_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """Those that this or another model has shown."""
        keys = _keys(model)
        found = [name for name, key in keys.items() if self._judged.get(key)]
        outer = {other for other in found for name in found if name.startswith(f"{other}.")}
        return {name: model.get_submodule(name) for name in found if name not in outer}

    def _judge(self, model: nn.Module, keys: dict[str, Key], size: tuple[int, ...]) -> None:
        recorder, handles, begins = Recorder(), [], {}

        def before(name: str) -> Callable[..., None]:
            return lambda *_: begins.update({name: len(recorder.events)})

        def after(name: str) -> Callable[..., None]:
            def judge(_: nn.Module, inputs: Any, out: Any) -> None:
                x = inputs[0] if len(inputs) == 1 else None
                verdict = _is_one(x, out, recorder.events[begins[name] :])
                self._judged[keys[name]] = verdict or self._judged.get(keys[name], False)

            return judge

        for name, key in keys.items():
            if key not in self._judged:
                module = model.get_submodule(name)
                handles += [
                    module.register_forward_pre_hook(before(name)),
                    module.register_forward_hook(after(name)),
                ]
        try:
            with torch.no_grad(), recorder:
                model(torch.empty(2, *size, device="meta"))
        finally:
            for handle in handles:
                handle.remove()
