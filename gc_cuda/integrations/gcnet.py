"""GCNet's ContextBlock, and the copies of it in mmcv, mmdetection and mmsegmentation: one structure."""

from __future__ import annotations

from typing import Any

from gc_cuda._parts import (
    Kind,
    Look,
    Recipe,
    context_transform,
    convolution,
    mean_over_pixels,
    one_eps,
    softmax,
)


def _read(look: Look, block: Any) -> Recipe:
    mask = None
    if look.attribute(block, "pooling_type") == "att":
        mask = convolution(look, look.child(block, "conv_mask"), "conv_mask", bias=False)
        softmax(look, look.child(block, "softmax"), "softmax", dim=2)
    else:
        mean_over_pixels(look, look.child(block, "avg_pool"), "avg_pool")
    add = context_transform(look, look.child(block, "channel_add_conv"), "channel_add_conv")
    mul = context_transform(look, look.child(block, "channel_mul_conv"), "channel_mul_conv")
    return Recipe(mask, add, mul, eps=one_eps(look, add, mul))


_CONTEXT_BLOCK = Kind(_read, ("forward", "spatial_pool"))

KINDS = {
    "mmdet.ops.gcb.context_block.ContextBlock": _CONTEXT_BLOCK,  # GCNet, mmdetection 1.0
    "mmdet.ops.context_block.ContextBlock": _CONTEXT_BLOCK,  # mmdetection 1.1 to 2.2
    "mmseg.ops.context_block.ContextBlock": _CONTEXT_BLOCK,
    "mmcv.cnn.bricks.context_block.ContextBlock": _CONTEXT_BLOCK,  # mmcv 1.x and 2.x
}
