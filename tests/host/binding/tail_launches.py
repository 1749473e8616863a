"""Prints how many launches a residual tail's passes take, on the CPU."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import on_the_host  # noqa: F401  (its launches run here)
import torch

import gc_cuda

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ops"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from block_cases import Configuration
from tail_cases import NO_BLOCK, RUNNING, Tail, draw_tail, tail_of

library = ctypes.CDLL(os.environ["GC_CUDA_BINDING"])
GC, SE = Configuration("att", ("add",)), Configuration("avg", ("mul",))


def random(*shape, dtype=torch.float64, layout=torch.contiguous_format, **_):
    drawn = torch.rand(*shape, dtype=dtype) - 0.5
    return drawn.contiguous(memory_format=layout) if drawn.dim() == 4 else drawn


def count(what: str, tail: Tail, without: tuple[str, ...] = ()) -> None:
    inputs = draw_tail(random, tail, (2, 64, 12, 12))
    statistics = {name: inputs.pop(name) for name in RUNNING if name in inputs}
    leaves = {name: tensor.requires_grad_(name not in without) for name, tensor in inputs.items()}
    before = library.gc_launches()
    out = tail_of(gc_cuda, tail, leaves, statistics)(*leaves.values())
    print(what, "forward", library.gc_launches() - before)
    before = library.gc_launches()
    out.sum().backward()
    print(what, "backward", library.gc_launches() - before)


for mode in ("eval", "train"):
    for name, block in (("GC", GC), ("SE", SE), ("plain", NO_BLOCK)):
        count(f"{name} {mode}", Tail(block, mode))
count("GC eval without y", Tail(GC, "eval"), ("y",))
count("plain frozen without ReLU", Tail(NO_BLOCK, "eval", relu=False), ("weight", "bias"))
