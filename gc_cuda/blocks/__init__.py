"""nn.Modules built on the fused operations."""

from gc_cuda.blocks.context import ContextBlock

__all__ = ["ContextBlock"]
