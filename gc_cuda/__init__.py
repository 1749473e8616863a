"""Fused global context block (GCNet) for PyTorch: CUDA and CPU kernels, one read of the map per pass.

``ContextBlock`` is the module, and ``global_context`` the function that it calls. ``softmax_pool``,
``attention_pool``, ``average_pool`` and the ``broadcast_*`` functions compute its parts. ``reference`` has
the same in plain PyTorch. ``python -m gc_cuda`` reports the build.

The operators from Python are in ``ops``, the modules in ``blocks``, and what is done to whole models in
``models``; ``integrations`` knows the blocks of other frameworks.
"""

__version__ = "0.1.0"

from gc_cuda import _paths, blocks, reference
from gc_cuda._pages import keep_pages
from gc_cuda.blocks import ContextBlock
from gc_cuda.models import scripting, swap
from gc_cuda.models.accelerate import Report, accelerate, restore
from gc_cuda.models.convert import convert_state_dict
from gc_cuda.models.insert import insert
from gc_cuda.ops.functional import (
    attention_pool,
    average_pool,
    bn_context_add_relu,
    broadcast_add,
    broadcast_mul,
    broadcast_mul_add,
    global_context,
    softmax_pool,
)
from gc_cuda.reference import BatchNorm, Transform

__all__ = [
    "BatchNorm",
    "ContextBlock",
    "Report",
    "Transform",
    "accelerate",
    "attention_pool",
    "average_pool",
    "blocks",
    "bn_context_add_relu",
    "broadcast_add",
    "broadcast_mul",
    "broadcast_mul_add",
    "convert_state_dict",
    "global_context",
    "insert",
    "keep_pages",
    "reference",
    "restore",
    "softmax_pool",
]

_paths.register()
scripting.refuse(
    *(swap.Derived, reference.ContextBlock),
    *(blocks.NonLocalBlock, blocks.SEBlock, blocks.SimplifiedNonLocalBlock),
    *(attention_pool, average_pool, softmax_pool),
    *(broadcast_add, broadcast_mul, broadcast_mul_add, global_context, bn_context_add_relu),
)
