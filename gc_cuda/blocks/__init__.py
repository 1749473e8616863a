"""nn.Modules built on the fused operations."""

from gc_cuda.blocks.context import ContextBlock
from gc_cuda.blocks.non_local import NonLocalBlock, SimplifiedNonLocalBlock
from gc_cuda.blocks.squeeze_excite import SEBlock

__all__ = ["ContextBlock", "NonLocalBlock", "SEBlock", "SimplifiedNonLocalBlock"]
