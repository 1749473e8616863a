"""What a block costs: non-local, simplified non-local, squeeze-and-excitation and global context in turn.

For the feature maps c3, c4 and c5 of a ResNet-50: parameters, floating-point operations of the forward pass
(torch.utils.flop_counter), milliseconds of the forward pass and of a training step, and what autograd keeps
for the backward pass. The last lines put global context blocks into every bottleneck of c3 to c5 and compare
the parameters with those published (arXiv:1904.11492, table 1).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from cases import DETECTION, LAYOUTS
from timing import measure
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gc_cuda
from gc_cuda import blocks

BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "NL": lambda c: blocks.NonLocalBlock(c, reduction=2),
    "SNL": blocks.SimplifiedNonLocalBlock,
    "SE r16": lambda c: blocks.SEBlock(c, c // 16),
    "GC r16": lambda c: gc_cuda.ContextBlock(c, 1 / 16),
    "GC r4": lambda c: gc_cuda.ContextBlock(c, 1 / 4),
}
# Bottlenecks of a ResNet-50 in c3, c4, c5; what one block in each of them adds, in millions, as published
BOTTLENECKS = {"c3": 4, "c4": 6, "c5": 3}
PUBLISHED = {"GC r16": 2.522, "GC r4": 10.001}


class Row(NamedTuple):
    """One block on one feature map."""

    stage: str
    shape: list[int]
    block: str
    parameters: int
    gigaflops: float
    forward_ms: float
    training_ms: float
    kept_mib: float  # for the backward pass, x included, parameters not
    peak_mib: float | None  # of a training step on a GPU, beyond what was there before


def parameters(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())


def flops(make: Callable[[int], nn.Module], shape: list[int]) -> int:
    """Of the forward pass, without running it."""
    with torch.device("meta"):
        block, x = make(shape[1]), torch.empty(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(x)
    return int(counter.get_total_flops())


def kept_bytes(block: nn.Module, x: Tensor) -> int:
    """Of the tensors that autograd holds on to; a storage counts once, a parameter's not at all."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    del out
    for parameter in block.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def peak_bytes(training: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    training()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def rows(stage: str, shape: list[int], options: argparse.Namespace) -> list[Row]:
    """Every block on one feature map, timed in turn."""
    x = torch.randn(shape, device=options.device).contiguous(memory_format=LAYOUTS[options.layout])
    x.requires_grad_()
    grad = torch.randn_like(x)
    made = {name: make(shape[1]).to(options.device) for name, make in BLOCKS.items()}
    forward, training = {}, {}
    for name, block in made.items():
        inputs = [x, *block.parameters()]
        forward[name] = torch.no_grad()(lambda block=block: block(x))
        training[name] = lambda block=block, inputs=inputs: torch.autograd.grad(block(x), inputs, grad)
    forward_ms = measure(forward, options.device, options.seconds * len(made), options.rounds)
    training_ms = measure(training, options.device, options.seconds * len(made), options.rounds)
    return [
        Row(
            stage,
            shape,
            name,
            parameters(block),
            flops(BLOCKS[name], shape) / 1e9,
            statistics.median(forward_ms[name]),
            statistics.median(training_ms[name]),
            kept_bytes(block, x) / 2**20,
            peak_bytes(training[name]) / 2**20 if options.device == "cuda" else None,
        )
        for name, block in made.items()
    ]


def added_to_resnet50(make: Callable[[int], nn.Module]) -> int:
    """Parameters of a block in every bottleneck of c3 to c5."""
    return sum(count * parameters(make(DETECTION[stage][0])) for stage, count in BOTTLENECKS.items())


def table(found: list[Row]) -> str:
    """Markdown, readable as it is."""
    lines = [
        "| map | block | parameters | GFLOP | forward ms | training ms | kept MiB | peak MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        peak = "-" if row.peak_mib is None else f"{row.peak_mib:.1f}"
        lines.append(
            f"| {row.stage} {'×'.join(map(str, row.shape))} | {row.block} | {row.parameters:,} "
            f"| {row.gigaflops:.3f} | {row.forward_ms:.2f} | {row.training_ms:.2f} "
            f"| {row.kept_mib:.1f} | {peak} |"
        )
    lines.append("\nIn every bottleneck of c3 to c5 of a ResNet-50:")
    for name, make in BLOCKS.items():
        published = f" (published: +{PUBLISHED[name]:.3f} M)" if name in PUBLISHED else ""
        lines.append(f"- {name}: +{added_to_resnet50(make) / 1e6:.3f} M parameters{published}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", nargs="+", choices=DETECTION, default=list(DETECTION))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layout", choices=LAYOUTS, default="nchw")
    parser.add_argument("--shrink", type=int, default=1, help="divide H and W, for a quick look")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each block and direction")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="a file for the results")
    options = parser.parse_args(arguments)
    found = []
    for stage in options.stages:
        c, h, w = DETECTION[stage]
        shape = [options.batch, c, max(h // options.shrink, 1), max(w // options.shrink, 1)]
        found += rows(stage, shape, options)
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "CPU"
    print(
        f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, {options.layout}, float32\n"
    )
    print(table(found))
    if options.json:
        header = {"device": device, "torch": torch.__version__, "layout": options.layout}
        content = {**header, "rows": [row._asdict() for row in found]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
