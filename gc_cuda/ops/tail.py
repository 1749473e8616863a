"""The end of a bottleneck as one operation: batch norm, global context block, addition and ReLU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gc_cuda import reference
from gc_cuda.reference import BatchNorm, Transform


def bn_context_add_relu(
    y: Tensor,
    identity: Tensor | None = None,
    norm: BatchNorm | None = None,
    mask_weight: Tensor | None = None,
    mask_bias: Tensor | None = None,
    add: Transform | None = None,
    mul: Transform | None = None,
    *,
    relu: bool = True,
    pooling_type: str = "att",
    activation: str = "relu",
    gate: str = "sigmoid",
    eps: float = 1e-5,
) -> Tensor:
    """The fused form of :func:`gc_cuda.reference.bn_context_add_relu`."""
    options: Any = {"pooling_type": pooling_type, "activation": activation, "gate": gate, "eps": eps}
    return reference.bn_context_add_relu(
        y, identity, norm, mask_weight, mask_bias, add, mul, relu=relu, **options
    )
