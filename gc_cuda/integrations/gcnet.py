"""GCNet's ContextBlock, and the copies of it in mmcv, mmdetection and mmsegmentation: one structure."""

from __future__ import annotations

from typing import Any

from gc_cuda.blocks._parts import Kind, Look, Recipe, context_block


def _read(look: Look, block: Any) -> Recipe:
    return context_block(look, block, attends=look.attribute(block, "pooling_type") == "att")


_CONTEXT_BLOCK = Kind(_read, ("forward", "spatial_pool"))

KINDS = {
    "mmdet.ops.gcb.context_block.ContextBlock": _CONTEXT_BLOCK,  # GCNet, mmdetection 1.0
    "mmdet.ops.context_block.ContextBlock": _CONTEXT_BLOCK,  # mmdetection 1.1 to 2.2
    "mmseg.ops.context_block.ContextBlock": _CONTEXT_BLOCK,
    "mmcv.cnn.bricks.context_block.ContextBlock": _CONTEXT_BLOCK,  # mmcv 1.x and 2.x
}
