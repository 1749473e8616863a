"""nn.Modules built on the fused operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gc_cuda import _checks, reference
from gc_cuda._tracing import node_of, standard_operators_wanted
from gc_cuda.functional import global_context
from gc_cuda.reference import Transform


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
            _checks.feature_map(x)
            if x.shape[1] != self.in_channels:
                raise ValueError(
                    f"x must have {self.in_channels} channels (in_channels of the block), "
                    f"got shape {list(x.shape)}"
                )
        x = _as_autocast_promotes(x)
        mask_weight = mask_bias = None
        if self.conv_mask is not None:
            mask_weight, mask_bias = _fitting(self.conv_mask.weight, x), self.conv_mask.bias
            mask_bias = None if mask_bias is None else _fitting(mask_bias, x)
        return global_context(
            x,
            mask_weight,
            mask_bias,
            _transform(self.channel_add_conv, x),
            _transform(self.channel_mul_conv, x),
            pooling_type=self.pooling_type,
            eps=self.eps,
        )


def _as_autocast_promotes(x: Tensor) -> Tensor:
    """x in the dtype of the eager block's output: x plus what a convolution gives under autocast.

    It changes nothing but a half x under autocast to the other half type, which eager widens to float32.
    """
    kind = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(kind):
        return x
    dtype = torch.get_autocast_dtype(kind)
    return x if x.dtype == dtype else x.to(torch.promote_types(x.dtype, dtype))


def _transform(branch: nn.Sequential | None, x: Tensor) -> Transform | None:
    """The parameters of a branch, read by their names: a parametrization or weight norm keeps its say."""
    if branch is None:
        return None
    modules: list[Any] = list(branch)
    first, norm, _, last = modules
    return Transform(
        _fitting(first.weight, x),
        _fitting(first.bias, x),
        _fitting(norm.weight, x),
        _fitting(norm.bias, x),
        _fitting(last.weight, x),
        _fitting(last.bias, x),
    )


def _fitting(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` in a dtype that may travel with ``x``; parameters of another dtype need it."""
    return tensor if _checks.fits(tensor, x) else tensor.to(x.dtype)
