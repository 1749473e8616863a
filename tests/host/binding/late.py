"""Prints a digest of a block's gradients, from the same kept values, for maps in few splits and in many."""

from __future__ import annotations

import hashlib

import on_the_host  # noqa: F401  (its launches run here)
import torch

PARAMETERS = (("p", "c"), ("p",), ("p",), ("p",), ("c", "p"), ("c",))
# A few splits, in whole vectors and in single elements; more of them than the transform merges.
SIZES = ((2, 64, 40, 40), (1, 33, 25, 43), (2, 8, 128, 128))


def gradients(size, layout, attention, fusion, generator):
    def random(*shape):
        return torch.rand(*shape, generator=generator) + 0.25

    images, channels, height, width = size
    hidden, lengths = 9, {"p": 9, "c": channels}
    branches = [[random(*(lengths[n] for n in names)) for names in PARAMETERS] for _ in range(2)]
    add, mul = (own if name in fusion else [] for name, own in zip(("add", "mul"), branches, strict=True))
    pixels, count = height * width, bool(add) + bool(mul)
    elements = images * (channels + 2 + (pixels if attention else 0) + count * (hidden + 1))
    kept = random(elements + (images * channels if mul else 0))
    grad, x = (random(*size).contiguous(memory_format=layout) - 0.75 for _ in range(2))
    mask = (random(channels), random(1)) if attention else (None, None)
    needed = [True, attention, attention] + [bool(add)] * 6 + [bool(mul)] * 6
    backward = torch.ops.gc_cuda.global_context_backward
    return backward(grad, x, *mask, add, mul, kept, 0, 0, needed)


for size in SIZES:
    for layout in (torch.contiguous_format, torch.channels_last):
        for attention in (True, False):
            for fusion in (("add",), ("mul",), ("add", "mul")):
                digest = hashlib.sha256()
                found = gradients(size, layout, attention, fusion, torch.Generator().manual_seed(1))
                for one in found:
                    assert one is None or bool(torch.isfinite(one).all())
                    digest.update(b"" if one is None else one.contiguous().numpy().tobytes())
                print(size, layout, "att" if attention else "avg", *fusion, digest.hexdigest())
