"""nn.Modules built on the fused operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gc_cuda import _checks, reference
from gc_cuda.functional import (
    attention_pool,
    average_pool,
    broadcast_add,
    broadcast_mul,
    broadcast_mul_add,
)


class ContextBlock(reference.ContextBlock):
    """The global context block of GCNet (https://arxiv.org/abs/1904.11492) on the fused operations.

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
        _checks.feature_map(x)
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must have {self.in_channels} channels (in_channels of the block), "
                f"got shape {list(x.shape)}"
            )
        if self.conv_mask is not None:
            bias = self.conv_mask.bias
            context = attention_pool(
                x, _fitting(self.conv_mask.weight, x), None if bias is None else _fitting(bias, x)
            )
        else:
            context = average_pool(x)

        term = self._branch(self.channel_add_conv, context)
        scale = self._branch(self.channel_mul_conv, context)
        if scale is not None:
            scale = _fitting(torch.sigmoid(scale), x)
            return broadcast_mul(x, scale) if term is None else broadcast_mul_add(x, scale, _fitting(term, x))
        assert term is not None, "the constructor demands one fusion at least"
        return broadcast_add(x, _fitting(term, x))

    @staticmethod
    def _branch(branch: nn.Sequential | None, context: Tensor) -> Tensor | None:
        return None if branch is None else _transform(branch, context)


def _fitting(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` in a dtype that may travel with ``x``; autocast and parameters of another dtype need it."""
    return tensor if _checks.fits(tensor, x) else tensor.to(x.dtype)


def _transform(branch: nn.Sequential, context: Tensor) -> Tensor:
    """W2 ReLU(LN(W1 context + b1)) + b2; on an [N, C] context the 1x1 convolutions are matrix products."""
    modules: list[Any] = list(branch)
    first, norm, _, last = modules
    if context.dtype != first.weight.dtype:
        context = context.to(first.weight.dtype)
    hidden = functional.linear(context, first.weight.flatten(1), first.bias)
    hidden = functional.layer_norm(
        hidden, hidden.shape[1:], norm.weight.flatten(), norm.bias.flatten(), norm.eps
    )
    return functional.linear(functional.relu(hidden), last.weight.flatten(1), last.bias)
