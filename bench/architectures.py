"""Every architecture of timm and torchvision by its name, made without the weights of a training."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import timm
import torch
import torchvision
from torch import nn

TORCHVISION = "torchvision "  # before the names of its models and families


def names() -> list[str]:
    return timm.list_models() + [TORCHVISION + name for name in torchvision.models.list_models()]


def family_of(name: str) -> str:
    if name.startswith(TORCHVISION):
        builder = torchvision.models.get_model_builder(name.removeprefix(TORCHVISION))
        return TORCHVISION + builder.__module__.removeprefix("torchvision.models.")
    return timm.models._registry._model_to_module[name]


def build(name: str, **options: Any) -> nn.Module:
    """The model without weights of a training."""
    if not name.startswith(TORCHVISION):
        return timm.create_model(name, **options).eval()
    builder = torchvision.models.get_model_builder(name.removeprefix(TORCHVISION))
    without = dict.fromkeys(("weights", "weights_backbone"))
    accepted = {key: None for key in without if key in inspect.signature(builder).parameters}
    return builder(**accepted, **options).eval()


def size_of(name: str, model: nn.Module) -> tuple[int, ...]:
    if not name.startswith(TORCHVISION):
        return tuple(model.default_cfg["input_size"])
    if ".video" in type(model).__module__:
        return 3, 16, 224, 224
    return (3, 299, 299) if "inception" in name else (3, 224, 224)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """torchvision's RegNet computes its widths with tensors, for which it needs numbers."""
    kind = torchvision.models.regnet.BlockParams
    made = kind.__dict__["from_init_params"]

    def with_numbers(cls: Any, *arguments: Any, **options: Any) -> Any:
        with torch.device("cpu"):
            return made.__func__(cls, *arguments, **options)

    kind.from_init_params = classmethod(with_numbers)
    try:
        with torch.device("meta"):
            yield
    finally:
        kind.from_init_params = made
