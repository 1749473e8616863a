"""The global context block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gc_cuda import _checks, reference
from gc_cuda._recipe import Branch, Recipe, part, run
from gc_cuda._tracing import node_of, standard_operators_wanted


class ContextBlock(reference.ContextBlock):
    """The global context block of GCNet (https://arxiv.org/abs/1904.11492) on one fused operation.

    Constructor, parameter names and shapes, initial values and errors are those of mmcv's ``ContextBlock``,
    so a ``state_dict`` passes strictly both ways; the definition is :class:`gc_cuda.reference.ContextBlock`.
    Cropped and strided feature maps work too. The output may be changed in place.

    Args:
        in_channels: C, the channels of the feature map.
        ratio: hidden units per channel; int(in_channels * ratio) of them.
        pooling_type: "att" or "avg".
        fusion_types: a list or tuple of "channel_add" and "channel_mul", at least one.
        eps: of the layer norms.

    Raises:
        AssertionError: for an unknown pooling or fusion, or fusion types that are no list or tuple.
        ValueError: when no hidden unit is left.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape, dtype and memory format."""
        if isinstance(x, torch.fx.Proxy):
            return node_of(self, x)
        if not standard_operators_wanted():  # a tracer would take the sizes that are compared for constants
            self._check_channels(x)
        add, mul = _branch(part(self, "channel_add_conv")), _branch(part(self, "channel_mul_conv"))
        return run(Recipe(part(self, "conv_mask"), add, mul, eps=self.eps), x)

    def _check_channels(self, x: Tensor) -> None:
        if isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] == self.in_channels:
            return
        _checks.feature_map(x)
        raise ValueError(
            f"x must have {self.in_channels} channels (in_channels of the block), got shape {list(x.shape)}"
        )


def _branch(transform: nn.Sequential | None) -> Branch | None:
    if transform is None:
        return None
    first, norm, _, last = transform
    return Branch(first, norm, last)
