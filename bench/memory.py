"""What training ResNets with global context blocks keeps and takes: eager blocks, ours, tails, and none.

"kept" is what autograd holds on to for the backward pass, summed over the storages of its saved tensors, each
counted once, parameters and buffers not at all. It is found by torch.autograd.graph.saved_tensors_hooks under
FakeTensorMode: every operator runs with its shapes alone, so this needs neither memory nor a GPU, and no
estimate is in it. "peak" is torch.cuda.max_memory_allocated of one training step on a GPU beyond the model,
its input and its gradients.

The backbones alone (bench/bottleneck.py), without their classifier and with squeeze-and-excitation too, are
accounted for on meta tensors, with no framework: on the CPU, where tails are one operation. --out-or-bits
compares what a tail keeps for its ReLU, its output, with a bit for each element.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import bottleneck
import torch
from cases import DETECTION
from kept import keeping, kept_by
from models import BARE, BLOCK, FUSED, PLAIN, gcnet, variants
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gc_cuda
from gc_cuda import reference

NETS = ("resnet50", "resnet101")
INPUTS = {"800×1333, padded to 800×1344": (2, 3, 800, 1344), "224×224": (32, 3, 224, 224)}
VARIANTS = (PLAIN, BLOCK, FUSED, BARE)
BACKBONE_INPUT = ("800×1333", (2, 3, 800, 1333))
MEGABYTE = 10**6
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
    device = next((tensor.device for _, tensor in named), None)
    with mode:
        x = torch.empty(shape, device=device).requires_grad_(x_counts)
    with mode, keeping(state.values()) as kept:
        out = torch.func.functional_call(module, state, (x,))
    del out
    return kept.bytes


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
        BLOCK: lambda c: gc_cuda.ContextBlock(c, 1 / 16),
    }
    for variant in (PLAIN, BLOCK, BARE):
        kept = 0
        for (c, _, _), stride, count in zip(DETECTION.values(), STRIDES, BOTTLENECKS[name]):
            size = (n, c, height // stride, width // stride)
            if variant in kinds:
                kept += count * kept_bytes(kinds[variant](c), size)
        yield Row(name, title, list(shape), variant, True, kept, None)


def rows_of_model(name: str, title: str, shape: tuple[int, ...], measure_peak: bool) -> Iterator[Row]:
    """The whole model, in all of its variants."""
    made, _ = variants(gcnet(1 / 16, name))
    for variant, model in made.items():
        model.train()
        if measure_peak:
            model.cuda()
        kept = kept_bytes(model, shape, x_counts=False)
        peak = None
        if measure_peak:
            peak = peak_bytes(model, shape)
            model.cpu().zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        yield Row(name, title, list(shape), variant, False, kept, peak)


def rows_of_backbone(setting: bottleneck.Setting) -> Iterator[Row]:
    """A backbone without its classifier, in all of its variants."""
    title, shape = BACKBONE_INPUT
    for variant in VARIANTS:
        kept = kept_on_meta(setting, variant)
        yield Row(setting.name, title, list(shape), variant, False, kept, None)


def kept_on_meta(
    setting: bottleneck.Setting, variant: str, dtype: torch.dtype = torch.float32, **options: bool
) -> int:
    """What a backbone keeps; `options` are those of :func:`bottleneck.backbone`."""
    with torch.device("meta"):
        model = bottleneck.backbone(setting, variant, **options).to(dtype)
        return kept_by(model, torch.empty(BACKBONE_INPUT[1], dtype=dtype))


def out_or_bits() -> Iterator[str]:
    """MB that the tails of a backbone keep beyond a plain one's: out, or bits in its place; in Markdown."""
    yield "| backbone | dtype | and | out: MB more than plain | bits: MB more than plain |"
    yield "|---|---|---|--:|--:|"
    for setting in bottleneck.SETTINGS:
        for dtype in (torch.float32, torch.bfloat16):
            for pyramid in (False, True):
                counted = (
                    kept_on_meta(setting, variant, dtype, pyramid=pyramid, with_bits=bits)
                    for variant, bits in ((BARE, False), (FUSED, False), (FUSED, True))
                )
                plain, out, bits = (count / MEGABYTE for count in counted)
                what = f"{setting.name} | {str(dtype).partition('.')[2]} | {'FPN' if pyramid else '–'}"
                yield f"| {what} | {out - plain:+.1f} | {bits - plain:+.1f} |"


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
    parser.add_argument("--out-or-bits", action="store_true", help="that comparison alone")
    options = parser.parse_args(argv)
    if options.out_or_bits:
        print(*out_or_bits(), sep="\n")
        return 0
    print("| model | input | variant | kept MiB | peak MiB |\n|---|---|---|--:|--:|")
    for name in options.models:
        for title, shape in INPUTS.items():
            print(*map(line, rows(name, title, shape, options.device)), sep="\n")
    for setting in bottleneck.SETTINGS:
        print(*map(line, rows_of_backbone(setting)), sep="\n")
    return 0


def line(row: Row) -> str:
    what = f"{row.model}{', its blocks alone' * row.blocks_only}"
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
    kept = f"{row.kept_bytes / 2**20:.0f}"
    return f"| {what} | {row.shape[0]} × {row.input} | {row.variant} | {kept} | {peak} |"


if __name__ == "__main__":
    sys.exit(main())
