"""GCNet's ContextBlock, and the copies of it in mmcv, mmdetection and mmsegmentation: one structure."""

from __future__ import annotations

from typing import Any

from torch import nn

from gc_cuda._recipe import (
    Branch,
    Kind,
    Recipe,
    Unserved,
    activation,
    convolution,
    normalization,
    one_eps,
    part,
    plain,
)

_LAYER_NORM = (("torch.nn.modules.normalization", "LayerNorm"),)


def _read(block: Any) -> Recipe:
    mask = None
    if block.pooling_type == "att":
        mask = convolution(part(block, "conv_mask"), "conv_mask", bias=False)
        plain(part(block, "softmax"), "softmax")
    else:
        plain(part(block, "avg_pool"), "avg_pool")
    add = _branch(part(block, "channel_add_conv"), "channel_add_conv")
    mul = _branch(part(block, "channel_mul_conv"), "channel_mul_conv")
    return Recipe(mask, add, mul, eps=one_eps(add, mul))


def _branch(transform: Any, where: str) -> Branch | None:
    if transform is None:
        return None
    if type(transform) is not nn.Sequential or len(transform) != 4:
        raise Unserved(f"{where} is no Sequential of four modules")
    plain(transform, where)
    first, norm, act, last = transform
    if activation(act, f"{where}.2") != "relu":
        raise Unserved(f"activation {type(act).__name__}")
    norm = normalization(norm, f"{where}.1", _LAYER_NORM)
    return Branch(convolution(first, f"{where}.0"), norm, convolution(last, f"{where}.3"))


_CONTEXT_BLOCK = Kind(_read, ("forward", "spatial_pool"))

KINDS = {
    "mmdet.ops.gcb.context_block.ContextBlock": _CONTEXT_BLOCK,  # GCNet, mmdetection 1.0
    "mmdet.ops.context_block.ContextBlock": _CONTEXT_BLOCK,  # mmdetection 1.1 to 2.2
    "mmseg.ops.context_block.ContextBlock": _CONTEXT_BLOCK,
    "mmcv.cnn.bricks.context_block.ContextBlock": _CONTEXT_BLOCK,  # mmcv 1.x and 2.x
}
