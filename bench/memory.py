"""What training ResNets with global context blocks keeps and takes: eager blocks, ours, and none.

"kept" is what autograd holds on to for the backward pass, summed over the storages of its saved tensors, each
counted once, parameters and buffers not at all. It is found by torch.autograd.graph.saved_tensors_hooks under
FakeTensorMode: every operator runs with its shapes alone, so this needs neither memory nor a GPU, and no
estimate is in it. "peak" is torch.cuda.max_memory_allocated of one training step on a GPU beyond the model,
its input and its gradients.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from cases import DETECTION
from models import BARE, FUSED, PLAIN, gcnet, variants
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gc_cuda
from gc_cuda import reference

NETS = ("resnet50", "resnet101")
INPUTS = {"800×1333, padded to 800×1344": (2, 3, 800, 1344), "224×224": (32, 3, 224, 224)}
VARIANTS = (PLAIN, FUSED, BARE)
# Bottlenecks in c3, c4 and c5, for what the blocks alone keep where there is no torchvision
BOTTLENECKS = {"resnet50": (4, 6, 3), "resnet101": (4, 23, 3)}
STRIDES = (8, 16, 32)


class Row(NamedTuple):
    """One variant of one model on one input."""

    model: str
    input: str
    shape: list[int]
    variant: str
    blocks_only: bool  # without torchvision: the blocks of the model, not the model
    kept_bytes: int
    peak_bytes: int | None


def kept_bytes(module: nn.Module, shape: tuple[int, ...], x_counts: bool = True) -> int:
    """Of the storages that autograd saves in a forward pass with gradients, without running it."""
    mode = FakeTensorMode()
    named = [*module.named_parameters(), *module.named_buffers()]
    state = {name: mode.from_tensor(tensor) for name, tensor in named}
    with mode:
        x = torch.empty(shape).requires_grad_(x_counts)
    own = {tensor.untyped_storage()._cdata for tensor in state.values()}
    saved: dict[int, Tensor] = {}  # which keeps them alive: no storage can take another's place

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = torch.func.functional_call(module, state, (x,))
    kept = sum(tensor.untyped_storage().nbytes() for storage, tensor in saved.items() if storage not in own)
    del out
    return int(kept)


def peak_bytes(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Of one training step on a GPU, beyond what lies there before it; gradients lie there already."""
    x = torch.randn(shape, device="cuda")

    def step() -> None:
        model(x).sum().backward()

    step()  # the gradients, and what cuDNN sets up
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def rows_of_blocks(name: str, title: str, shape: tuple[int, ...]) -> Iterator[Row]:
    """What the blocks alone keep: each stage's block, as often as it is there."""
    n, _, height, width = shape
    kinds: dict[str, Callable[[int], nn.Module]] = {
        PLAIN: lambda c: reference.ContextBlock(c, 1 / 16),
        FUSED: lambda c: gc_cuda.ContextBlock(c, 1 / 16),
    }
    for variant in VARIANTS:
        kept = 0
        for (c, _, _), stride, count in zip(DETECTION.values(), STRIDES, BOTTLENECKS[name]):
            size = (n, c, height // stride, width // stride)
            if variant in kinds:
                kept += count * kept_bytes(kinds[variant](c), size)
        yield Row(name, title, list(shape), variant, True, kept, None)


def rows_of_model(name: str, title: str, shape: tuple[int, ...], measure_peak: bool) -> Iterator[Row]:
    """The whole model, in all of its variants."""
    made, _ = variants(gcnet(1 / 16, name))
    for variant in VARIANTS:
        model = made[variant].train()
        kept = kept_bytes(model, shape, x_counts=False)
        peak = None
        if measure_peak:
            model.cuda()
            peak = peak_bytes(model, shape)
            model.cpu().zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        yield Row(name, title, list(shape), variant, False, kept, peak)


def rows(name: str, title: str, shape: tuple[int, ...], device: str) -> list[Row]:
    try:
        import torchvision  # noqa: F401 (asked for before anything is built)
    except ImportError:
        return list(rows_of_blocks(name, title, shape))
    return list(rows_of_model(name, title, shape, device == "cuda"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    print("| model | input | variant | kept MiB | peak MiB |\n|---|---|---|--:|--:|")
    for name in options.models:
        for title, shape in INPUTS.items():
            for row in rows(name, title, shape, options.device):
                what = f"{row.model}{', its blocks alone' * row.blocks_only}"
                peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
                print(
                    f"| {what} | {shape[0]} × {title} | {row.variant} | {row.kept_bytes / 2**20:.0f} | "
                    f"{peak} |"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
