"""The global context block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gc_cuda import reference
from gc_cuda.blocks import _fused
from gc_cuda.blocks._parts import Kind, Look, Recipe, context_block


class ContextBlock(reference.ContextBlock):
    """The global context block of GCNet (https://arxiv.org/abs/1904.11492) on one fused operation.

    Constructor, parameter names and shapes, initial values and errors are those of mmcv's ``ContextBlock``,
    so a ``state_dict`` passes strictly both ways; the definition is :class:`gc_cuda.reference.ContextBlock`.
    Cropped and strided feature maps work too. The output may be changed in place.

    The fused operation runs while calling the parts would do nothing but their classes' forwards. With a hook
    on a part (on ``softmax`` to see the attention, say), another activation, norm or convolution in its
    place, pruning, an adapter and the like, the block runs as its definition does and calls its parts. So
    does a block with average pooling under ``torch.compile`` (docs/torch-compile.md).

    Args:
        in_channels: C, the channels of the feature map.
        ratio: hidden units per channel; int(in_channels * ratio) of them.
        pooling_type: "att" or "avg".
        fusion_types: a list or tuple of "channel_add" and "channel_mul", at least one.
        eps: of the layer norms.

    Raises:
        AssertionError: for an unknown pooling or fusion, or fusion types that are not a list or tuple.
        ValueError: when no hidden unit is left.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape, dtype and memory format.

        Raises:
            ValueError: for a shape or device that does not fit the parameters.
            TypeError: for a dtype that does not, or for what is not a dense tensor.
            ImportError: where the extension is missing or lacks CUDA; it says what to run.
        """
        return _fused.run(self, _read, reference.ContextBlock.forward, x, strict=True)

    def init_weights(self) -> None:
        """What :meth:`reset_parameters` does: a new block is the identity again.

        mmengine calls it after the ``init_cfg`` of the model that holds the block has filled every
        convolution.
        """
        self.reset_parameters()


def _read(look: Look, block: Any) -> Recipe:
    return context_block(look, block, attends=look.child(block, "conv_mask") is not None)


KINDS = {"gc_cuda.blocks.context.ContextBlock": Kind(_read, ("forward", "spatial_pool"))}
