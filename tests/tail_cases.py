"""What tests of gc_cuda.bn_context_add_relu share: its configurations, inputs by name, and a run of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from block_cases import CONFIGURATIONS, Configuration, draw_inputs
from torch import Tensor

from gc_cuda import BatchNorm, Transform

NO_BLOCK = Configuration("avg", ())
BLOCKS = [*CONFIGURATIONS, NO_BLOCK]
# no batch norm, one with given statistics, one with those of the batch
MODES = ("folded", "eval", "train")


class Tail(NamedTuple):
    """What a tail is made of."""

    block: Configuration
    mode: str = "train"
    relu: bool = True
    identity: bool = True

    def __str__(self) -> str:
        parts = "-".join(filter(None, (self.identity and "identity", self.relu and "relu")))
        return f"{self.block}-{self.mode}-{parts or 'alone'}"


GC_TRAIN = Tail(Configuration("att", ("add",)))
# Every block in both modes of the norm; the rest of what may be absent, with a block of either pooling.
TAILS = [
    *(Tail(block, mode) for block in BLOCKS for mode in ("eval", "train")),
    *(Tail(block, "folded") for block in (CONFIGURATIONS[0], CONFIGURATIONS[4], NO_BLOCK)),
    *(
        Tail(block, mode, relu, identity)
        for block in (CONFIGURATIONS[2], CONFIGURATIONS[3], NO_BLOCK)
        for mode in ("eval", "train")
        for relu, identity in ((False, True), (True, False), (False, False))
    ),
]


def draw_tail(
    random: Callable[..., Tensor],
    tail: Tail,
    size: tuple[int, int, int, int],
    *,
    dtype: torch.dtype = torch.float64,
    parameters: torch.dtype | None = None,
    layout: torch.memory_format = torch.contiguous_format,
    mean: float = 0.0,
) -> dict[str, Tensor]:
    """Every tensor of a call by its name. mean: of the channels of y, in standard deviations, either sign."""
    inputs = draw_inputs(random, tail.block, size, dtype=dtype, parameters=parameters, layout=layout)
    c = size[1]
    signs = torch.where(torch.arange(c) % 2 == 0, 1.0, -1.0)
    deviations = 0.5 + torch.arange(c) % 3
    inputs["x"] = random(*size) * deviations[:, None, None] + (mean * signs * deviations)[:, None, None]
    drawn = {"y": inputs.pop("x").to(dtype).contiguous(memory_format=layout)}
    if tail.identity:
        drawn["identity"] = random(*size, dtype=dtype, layout=layout)
    if tail.mode != "folded":
        wide = parameters or dtype
        drawn["weight"], drawn["bias"] = (1 + random(c) / 2).to(wide), random(c).to(wide)
        drawn["running_mean"] = (mean * signs * deviations + random(c) / 4).to(wide)
        drawn["running_var"] = (deviations**2 * (1 + random(c).abs() / 4)).to(wide)
    return drawn | inputs


RUNNING = ("running_mean", "running_var")


def tail_of(
    library: ModuleType,
    tail: Tail,
    names: Iterable[str],
    statistics: Mapping[str, Tensor],
    *,
    momentum: float = 0.1,
    group: Any = None,
    **options: Any,
) -> Callable[..., Tensor]:
    """library.bn_context_add_relu as a function of tensors in the order of ``names``; ``statistics`` are the
    running ones, which it moves.
    """
    names = list(names)

    def call(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors))
        norm = None
        if tail.mode != "folded":
            running = (statistics.get(name) for name in RUNNING)
            affine = given.get("weight"), given.get("bias")
            norm = BatchNorm(*affine, *running, tail.mode == "train", momentum, group=group)
        branches = {
            branch: Transform(*(given.get(f"{branch}.{name}") for name in Transform._fields))
            for branch in tail.block.branches
        }
        return library.bn_context_add_relu(
            given["y"],
            given.get("identity"),
            norm,
            given.get("mask_weight"),
            given.get("mask_bias"),
            **branches,
            relu=tail.relu,
            pooling_type=tail.block.pooling_type,
            **options,
        )

    return call


class Ran(NamedTuple):
    """What a call gave: out, and by name gradients, running_mean and running_var, as they are then."""

    out: Tensor
    results: dict[str, Tensor]


def run_tail(
    library: ModuleType,
    tail: Tail,
    inputs: Mapping[str, Tensor],
    grad: Tensor,
    dtype: torch.dtype | None = None,
    *,
    needs: Iterable[str] | None = None,
    **options: Any,
) -> Ran:
    """Forward and backward at copies of the inputs; with ``dtype``, the values are converted to it first."""
    needed = set(inputs) - set(RUNNING) if needs is None else set(needs)
    leaves = {
        name: tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_(name in needed)
        for name, tensor in inputs.items()
    }
    statistics = {name: leaves.pop(name) for name in RUNNING if name in leaves}
    out = tail_of(library, tail, leaves, statistics, **options)(*leaves.values())
    out.backward(grad.to(out.dtype))
    gradients = {name: leaf.grad for name, leaf in leaves.items() if name in needed}
    assert all(value is not None for value in gradients.values()), "a gradient is missing"
    return Ran(out.detach(), {**gradients, **statistics})


def away_from_zero(
    library: ModuleType, tail: Tail, inputs: dict[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    """The inputs with an identity that leaves no sum near the ReLU's edge, where any rounding decides."""
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    statistics = {name: wide.pop(name) for name in RUNNING if name in wide}
    before = tail_of(library, tail._replace(relu=False), wide, statistics, **options)(*wide.values())
    identity = inputs["identity"].double()
    moved = torch.where(before.abs() < 0.25, identity + torch.where(before < 0, -0.5, 0.5), identity)
    layout = inputs["y"]
    return {**inputs, "identity": torch.empty_like(layout).copy_(moved)}
