"""Pooling and broadcasting fused around a middle that stays PyTorch's (gc_cuda/ops/around.py), and eager.

out = x * scale with scale = middle(mean of x over the pixels), for middles that the fused operation does not
compute: ECA (a convolution over the channels), EffectiveSE (one 1x1 convolution, hard sigmoid), squeeze-and-
excitation with a batch norm between its layers, and with GELU and a gate of 1 + tanh. A training step is the
output and the gradients of x and of the parameters; inference is without gradients, the batch norm in eval
mode. The two are compared before they are timed, in turn; a ratio is the median over the rounds of ours by
eager.
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
from cases import LAYOUTS
from timing import measure
from torch import Tensor, nn

import gc_cuda
from gc_cuda.ops.around import around

EAGER, AROUND = "eager", "around"
PASSES = ("training", "inference")
SIZES = {"56x56": (256, 56, 56), "28x28": (512, 28, 28), "14x14": (1024, 14, 14), "7x7": (2048, 7, 7)}
REDUCTION = 16


class AsVector(nn.Module):
    """[N, C, 1, 1] -> [N, 1, C], as a convolution over the channels reads it, or back."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, None] if x.dim() == 4 else x[:, 0, :, None, None]


class OnePlusTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 + x.tanh()


def _two_layers(channels: int, between: Callable[[int], list[nn.Module]], gate: nn.Module) -> nn.Module:
    hidden = channels // REDUCTION
    first = nn.Conv2d(channels, hidden, 1, bias=False)  # a batch norm would take a bias away again
    return nn.Sequential(first, *between(hidden), nn.Conv2d(hidden, channels, 1), gate)


# Of channels: [N, C, 1, 1] -> scale [N, C, 1, 1]
MIDDLES: dict[str, Callable[[int], nn.Module]] = {
    "ECA": lambda c: nn.Sequential(
        AsVector(), nn.Conv1d(1, 1, 5, padding=2, bias=False), nn.Sigmoid(), AsVector()
    ),
    "EffectiveSE": lambda c: nn.Sequential(nn.Conv2d(c, c, 1), nn.Hardsigmoid()),
    "SE, batch norm": lambda c: _two_layers(c, lambda p: [nn.BatchNorm2d(p), nn.ReLU()], nn.Sigmoid()),
    "SE, GELU, 1 + tanh": lambda c: _two_layers(c, lambda p: [nn.GELU()], OnePlusTanh()),
}


class Row(NamedTuple):
    """One middle on one map: milliseconds, and ours by eager."""

    work: str
    layout: str
    shape: list[int]
    middle: str
    ms: dict[str, float]
    ratio: float
    quartiles: list[float]


def run(variant: str, x: Tensor, middle: nn.Module) -> Tensor:
    if variant == EAGER:
        return x * middle(x.mean((2, 3), keepdim=True))
    return around(x, lambda context: (middle(context[:, :, None, None]), None))


def calls_of(work: str, x: Tensor, grad: Tensor, middle: nn.Module) -> dict[str, Callable[[], list[Tensor]]]:
    """Each variant's results."""
    leaves = [x, *middle.parameters()]

    def training(variant: str) -> list[Tensor]:
        out = run(variant, x, middle)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    @torch.no_grad()
    def inference(variant: str) -> list[Tensor]:
        return [run(variant, x, middle)]

    call = training if work == "training" else inference
    return {variant: lambda variant=variant: call(variant) for variant in (EAGER, AROUND)}


def measured(shape: list[int], layout: str, options: argparse.Namespace) -> list[Row]:
    """Every middle on maps of one shape and layout."""
    torch.manual_seed(0)
    x, grad = (torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    x.requires_grad_()
    rows = []
    for work in options.passes:
        for name in options.middles:
            middle = MIDDLES[name](shape[1]).train(work == "training")
            calls = calls_of(work, x, grad, middle)
            for one, other in zip(*(call() for call in calls.values())):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-3 * float(other.detach().abs().max()))
            times = measure(calls, "cpu", options.seconds * len(calls), options.rounds)
            ratios = [ours / eager for eager, ours in zip(times[EAGER], times[AROUND])]
            ms = {variant: statistics.median(values) for variant, values in times.items()}
            low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
            rows.append(Row(work, layout, shape, name, ms, median, [low, high]))
    return rows


def table(rows: list[Row]) -> str:
    """Markdown, readable as it is."""
    lines = ["| pass | layout | map | middle | eager ms | around ms | ratio | quartiles |"]
    lines.append("|---|---|---|---|---:|---:|---:|---:|")
    for row in rows:
        low, high = row.quartiles
        lines.append(
            f"| {row.work} | {row.layout} | {'×'.join(map(str, row.shape))} | {row.middle} "
            f"| {row.ms[EAGER]:.2f} | {row.ms[AROUND]:.2f} | {row.ratio:.2f} | {low:.2f} to {high:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--middles", nargs="+", choices=MIDDLES, default=list(MIDDLES))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 2])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each variant")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--reuse-pages", action="store_true", help="the process keeps freed memory")
    parser.add_argument("--json", type=Path, help="a file for the results")
    options = parser.parse_args(arguments)
    if options.reuse_pages:
        gc_cuda.keep_pages()
    device = platform.processor() or "CPU"
    pages = "reused pages" if options.reuse_pages else "fresh pages"
    setting = f"float32, {pages}"
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads; {setting}\n")
    rows = [
        row
        for layout in options.layouts
        for batch in options.batches
        for size in options.sizes
        for row in measured([batch, *SIZES[size]], layout, options)
    ]
    rows.sort(key=lambda row: PASSES.index(row.work))
    print(table(rows))
    if options.json:
        content = {"device": device, "torch": torch.__version__, "setting": setting}
        content |= {"rows": [row._asdict() for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
