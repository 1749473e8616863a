"""Prints how many launches of each operator began early, on the CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import on_the_host  # noqa: F401  (its launches run here)
import torch

import gc_cuda

library = ctypes.CDLL(os.environ["GC_CUDA_BINDING"])
x = torch.randn(2, 16, 6, 6, requires_grad=True)
vector = torch.randn(2, 16)


def count(what: str, call: Callable[[], object]) -> None:
    before = library.gc_early_launches()
    call()
    print(what, library.gc_early_launches() - before)


for pooling in ("att", "avg"):
    for fusion in ("channel_add", "channel_mul"):
        block = gc_cuda.ContextBlock(16, 1 / 4, pooling, (fusion,))
        out: list[torch.Tensor] = []
        count(f"{pooling} {fusion} forward", lambda block=block, out=out: out.append(block(x)))
        count(f"{pooling} {fusion} backward", lambda out=out: out[0].sum().backward())
wide = torch.randn(1, 9000, 2, 2)
count("many channels forward", lambda: gc_cuda.ContextBlock(9000, 1 / 4500, "att", ("channel_add",))(wide))
norm = [torch.ones(16) for _ in range(4)]
weight, hidden = torch.randn(16), [torch.randn(*size) for size in ((4, 16), (4,), (4,), (4,), (16, 4), (16,))]
with torch.no_grad():
    for training in (False, True):
        statistics = gc_cuda.BatchNorm(*norm, training)
        kind = "training" if training else "given"
        for pooling, mask in (("att", weight), ("avg", None)):
            block = {"mask_weight": mask, "add": gc_cuda.Transform(*hidden), "pooling_type": pooling}
            count(
                f"tail {pooling} {kind}",
                lambda of=statistics, block=block: gc_cuda.bn_context_add_relu(x, x, of, **block),
            )
        count(f"tail alone {kind}", lambda of=statistics: gc_cuda.bn_context_add_relu(x, x, of))
    count("broadcast alone", lambda: torch.ops.gc_cuda.broadcast(x, vector, None))
    count("pool alone", lambda: torch.ops.gc_cuda.attention_pool(x, vector[:1], None))
