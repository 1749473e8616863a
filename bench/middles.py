"""The middle of a residual block (batch norm, activation, block): recomputed in the backward pass or kept.

One middle in training: the output, and the gradients of the convolution's output y and of all parameters. As
it is: eager PyTorch; accelerated: the block is one operator; recomputed: nothing but y is kept
(gc_cuda/ops/recompute.py). Compared with eager before they are timed, in turn; kept is what autograd holds on
to besides y (bench/kept.py), in maps of its size. --families adds what whole models keep for an image of
224x224, on meta tensors; they are timm's and torchvision's.
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

import models
import torch
from cases import LAYOUTS
from compiled import ACTIVATIONS, SE, Block, Kind
from kept import keeping, kept_by
from models import BARE, FUSED, PLAIN, RECOMPUTED
from timing import measure
from torch import Tensor, nn
from torch.nn import functional

import gc_cuda
from gc_cuda import BatchNorm, reference
from gc_cuda.ops.operands import tensors_of
from gc_cuda.ops.recompute import bn_act_context
from gc_cuda.ops.whole_block import policy_of

KINDS = (SE, Kind("att", "add"))
VARIANTS = (PLAIN, FUSED, RECOMPUTED)
SIZES = {"56x56": (96, 56, 56), "28x28": (240, 28, 28), "14x14": (672, 14, 14)}  # C, H, W
FAMILIES = ("regnety_008", "tf_efficientnetv2_s", "gcresnext26ts", "seresnet33ts")  # timm's, besides MODELS


class Row(NamedTuple):
    """One middle, by VARIANTS."""

    kind: str
    act: str
    shape: list[int]
    maps: dict[str, float]
    ms: dict[str, float]


class Middle(NamedTuple):
    """The tensors of a middle."""

    y: Tensor
    norm: nn.BatchNorm2d
    act: str
    block: Block

    def run(self, variant: str) -> Tensor:
        norm, options = self.norm, self.block.options()
        given = norm.weight, norm.bias, norm.running_mean, norm.running_var
        if variant == RECOMPUTED:
            of_norm = BatchNorm(*given, True, 0.1, norm.eps)
            add, mul = (tensors_of(options.get(name)) for name in ("add", "mul"))
            policy = policy_of("relu", "sigmoid", 1e-5)
            return bn_act_context(self.y, of_norm, self.act, options["mask_weight"], None, add, mul, policy)
        weight, bias, mean, var = given
        z = functional.batch_norm(self.y, mean, var, weight, bias, True, 0.1, norm.eps)
        return (reference if variant == PLAIN else gc_cuda).global_context(
            ACTIVATIONS[self.act](z), **options
        )


def measured(kind: Kind, act: str, size: tuple[int, int, int], options: argparse.Namespace) -> Row:
    torch.manual_seed(0)
    layout = LAYOUTS[options.layout]
    y, grad = (torch.randn(options.batch, *size).contiguous(memory_format=layout) for _ in range(2))
    channels, *_ = size
    middle = Middle(y.requires_grad_(), nn.BatchNorm2d(channels), act, Block(kind, channels))
    nn.init.uniform_(middle.norm.weight, 0.5, 1.5)
    leaves = [y, *middle.norm.parameters(), *middle.block.parameters()]

    def results(variant: str) -> list[Tensor]:
        out = middle.run(variant)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    def call(variant: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(middle.run(variant), leaves, grad)

    expected, maps = results(PLAIN), {}
    for variant in VARIANTS:
        for one, other in zip(results(variant), expected):
            torch.testing.assert_close(one, other, rtol=0, atol=5e-3 * float(other.abs().max()))
        with keeping(leaves) as kept:
            middle.run(variant)
        maps[variant] = kept.bytes / y.nbytes
    calls = {variant: call(variant) for variant in VARIANTS}
    times = measure(calls, "cpu", options.seconds * len(calls), options.rounds)
    ms = {variant: statistics.median(values) for variant, values in times.items()}
    return Row(kind.name, act, [options.batch, *size], maps, ms)


def families() -> dict[str, dict[str, float]]:
    """MB for an image, of the models of bench/models.py and FAMILIES that have middles."""
    import timm

    makers = {name: make for name, make in models.MODELS.items() if "GC r" not in name}
    makers |= {f"timm {name}": lambda name=name: timm.create_model(name) for name in FAMILIES}
    x, found = torch.empty(8, 3, 224, 224, device="meta"), {}
    for name, make in makers.items():
        made, _ = models.variants(make(), recompute=True)
        if RECOMPUTED in made:
            found[name] = {
                variant: kept_by(model.to("meta").train(), x) / 8e6 for variant, model in made.items()
            }
    return found


def table(rows: list[Row]) -> str:
    lines = ["| block | act | map | " + " | ".join(f"maps kept {one}" for one in VARIANTS) + " | "]
    lines[0] += " | ".join(f"ms {one}" for one in VARIANTS) + " |"
    lines.append("|---|---|---|" + "---:|" * (2 * len(VARIANTS)))
    for row in rows:
        numbers = [f"{values[one]:.2f}" for values in (row.maps, row.ms) for one in VARIANTS]
        lines.append(f"| {row.kind} | {row.act} | {'×'.join(map(str, row.shape))} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def table_of_families(found: dict[str, dict[str, float]]) -> str:
    order = (*VARIANTS, BARE)
    lines = ["| model | " + " | ".join(f"MB {one}" for one in order) + " |", "|---|" + "---:|" * len(order)]
    lines += [
        f"| {name} | " + " | ".join(f"{mb[one]:.1f}" for one in order) + " |" for name, mb in found.items()
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--acts", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each variant")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--reuse-pages", action="store_true", help="the process keeps freed memory")
    parser.add_argument("--families", action="store_true", help="what whole models keep, too")
    parser.add_argument("--json", type=Path, help="a file for the results")
    options = parser.parse_args(arguments)
    if options.reuse_pages:
        gc_cuda.keep_pages()
    device = platform.processor() or "CPU"
    setting = f"batch {options.batch}, {options.layout}, float32"
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads; {setting}\n")
    rows = [
        measured(kind, act, SIZES[size], options)
        for kind in KINDS
        for size in options.sizes
        for act in options.acts
    ]
    print(table(rows), flush=True)
    of_models = families() if options.families else {}
    if of_models:
        print(f"\n{table_of_families(of_models)}")
    if options.json:
        content = {"device": device, "torch": torch.__version__, "setting": setting}
        content |= {"rows": [row._asdict() for row in rows], "families": of_models}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
