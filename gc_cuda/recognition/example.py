"""The channels that modules are given when a model runs, for those whose weights do not tell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def channels_given(model: nn.Module, example: Any, modules: Iterable[nn.Module]) -> dict[nn.Module, int]:
    """The channels of the maps that reach these modules when the model is called on the example.

    The call is made in evaluation mode, without gradients; modes and the random state are put back.
    """
    found: dict[nn.Module, int] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor) and arguments[0].dim() == 4:
            found[module] = arguments[0].shape[1]

    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            model(*example) if isinstance(example, tuple) else model(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return found
