"""The proof of a plan: on a copy, in float64, it gives what the module itself gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gc_cuda.blocks._parts import Unserved
from gc_cuda.ops.operands import filled
from gc_cuda.ops.whole_block import policy_of, whole_block
from gc_cuda.recognition.plan import Around, FusedPlan
from gc_cuda.recognition.tracing import sizes

# Relative to the largest value. PyTorch's double hard sigmoid is differentiated with one sixth in float32.
_FLOAT64, _FLOAT32_CONSTANT = 1e-9, 1e-6


def demand(plan: FusedPlan | Around, twin: Any, channels: int) -> None:
    """Demand equal outputs, gradients and buffers for maps of several sizes.

    Raises:
        Unserved: if any differs.
    """
    n, _, h, w = sizes(channels)
    for size in ((n, h, w), (2, w, h + w), (1, 1, 1)):
        x = torch.randn(size[0], channels, *size[1:], dtype=torch.float64, device="cpu")
        buffers = [buffer.clone() for buffer in twin.buffers()]
        try:
            expected = _results(twin, x, twin.forward)
        except (ValueError, RuntimeError):  # a batch norm refuses a single value
            if size[0] > 1:
                raise Unserved("it fails on random numbers") from None
            continue
        _put_back(twin, buffers)
        actual = _results(twin, x, lambda x: _run(plan, twin, x))
        _put_back(twin, buffers)
        for (name, one), (_, other) in zip(expected, actual):
            if not _equal(one, other, _tolerance(plan)):
                raise Unserved(f"the fused operation gives another {name}")


def _run(plan: FusedPlan | Around, twin: Any, x: Tensor) -> Tensor:
    recipe = plan.recipe(twin)
    mask, add, mul = ([getattr(part, name) for part, name in names] for names in recipe.parameters())
    if isinstance(plan, Around):
        return plan.compute(x, mask)
    weight, bias = mask or (None, None)
    policy = policy_of(plan.fused.activation, plan.fused.gate, plan.fused.eps)
    return whole_block(x, weight, bias, filled(add), filled(mul), policy)


def _results(twin: Any, x: Tensor, forward: Any) -> list[tuple[str, Tensor | None]]:
    x = x.clone().requires_grad_()
    parameters = dict(twin.named_parameters())
    out = forward(x)
    if not isinstance(out, Tensor) or out.shape != x.shape:
        raise Unserved("its output is no map like its input")
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device="cpu").view(out.shape)
    grads = torch.autograd.grad(out, [x, *parameters.values()], weights, allow_unused=True)
    names = ["gradient of x", *(f"gradient of {name}" for name in parameters)]
    buffers = [(f"buffer {name}", buffer.clone()) for name, buffer in twin.named_buffers()]
    return [("output", out.detach()), *zip(names, grads), *buffers]


def _put_back(twin: Any, buffers: list[Tensor]) -> None:
    for buffer, value in zip(twin.buffers(), buffers):
        buffer.copy_(value)


def _tolerance(plan: FusedPlan | Around) -> float:
    is_hard = isinstance(plan, FusedPlan) and "hardsigmoid" in plan.fused
    return _FLOAT32_CONSTANT if is_hard else _FLOAT64


def _equal(one: Tensor | None, other: Tensor | None, tolerance: float) -> bool:
    if one is None or other is None:
        # A bias before a softmax has a gradient of zero, here computed, there left out.
        some = one if other is None else other
        return some is None or not some.any()
    if one.shape != other.shape or one.numel() == 0:
        return one.shape == other.shape
    largest = max(1.0, one.abs().max().item())
    return bool((one - other).abs().max() <= tolerance * largest)
