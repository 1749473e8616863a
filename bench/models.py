"""Whole models with and without accelerate in one run: forward pass, training step, and the blocks' share.

Three variants of a model are timed in turn: as its framework made it, accelerated, and with its blocks passed
over. What the blocks take is the difference to the last one. Outputs of the first two are compared before
anything is timed. The models are timm's and torchvision's; without a framework its models are left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from cases import LAYOUTS
from peers import full_precision
from timing import measure
from torch import Tensor, nn

import gc_cuda
from gc_cuda import reference

PLAIN, FUSED, BARE = "as it is", "accelerated", "without blocks"


def _timm(name: str) -> nn.Module:
    return importlib.import_module("timm").create_model(name)


def _torchvision(name: str) -> nn.Module:
    return importlib.import_module("torchvision").models.get_model(name)


def gcnet(ratio: float, name: str = "resnet50") -> nn.Module:
    """GCNet's backbone: torchvision's ResNet with a block in every bottleneck of c3 to c5."""
    model = _torchvision(name)
    gc_cuda.insert(model, ratio=ratio)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision resnet50 + GC r16": lambda: gcnet(1 / 16),
    "torchvision resnet50 + GC r4": lambda: gcnet(1 / 4),
    **{
        f"timm {name}": lambda name=name: _timm(name)
        for name in ("gcresnet50t", "seresnet50", "efficientnet_b0", "mobilenetv3_large_100")
    },
    **{
        f"torchvision {name}": lambda name=name: _torchvision(name)
        for name in ("efficientnet_b0", "mobilenet_v3_large", "regnet_y_400mf")
    },
}


class Row(NamedTuple):
    """A model in one direction."""

    model: str
    direction: str
    blocks: int
    milliseconds: dict[str, float]

    @property
    def speed_up(self) -> float:
        return self.milliseconds[PLAIN] / self.milliseconds[FUSED]

    def share(self, variant: str) -> float:
        """Of the time, what the blocks take."""
        return 1 - self.milliseconds[BARE] / self.milliseconds[variant]


def variants(model: nn.Module) -> tuple[dict[str, nn.Module], int]:
    """The three, with parameters of their own, and how many blocks there are."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # some begin with zero, which would hide every branch
            nn.init.uniform_(module.weight, 0.5, 1.5)
    fused = copy.deepcopy(model)
    blocks = gc_cuda.accelerate(fused).accelerated
    inserted = [name for name, module in model.named_modules() if isinstance(module, gc_cuda.ContextBlock)]
    for name in inserted:  # the eager form of what was inserted
        ours = model.get_submodule(name)
        eager = reference.ContextBlock(ours.in_channels, ours.ratio, ours.pooling_type, ours.fusion_types)
        eager.load_state_dict(ours.state_dict())
        model.set_submodule(name, eager.to(next(ours.parameters()).device))
    bare = copy.deepcopy(model)
    for name in [*blocks, *inserted]:
        bare.set_submodule(name, nn.Identity())
    return {PLAIN: model, FUSED: fused, BARE: bare}, len(blocks) + len(inserted)


def forward_call(model: nn.Module, x: Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: model(x))


def training_call(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> None:
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)

    return call


class Times(NamedTuple):
    """Milliseconds of every round in one direction, by variant."""

    direction: str
    blocks: int
    milliseconds: dict[str, list[float]]


def measured(name: str, options: argparse.Namespace) -> list[Times]:
    """Both directions of a model, its outputs compared before.

    Raises:
        ModuleNotFoundError: where its framework is not installed.
    """
    torch.manual_seed(0)
    layout = LAYOUTS[options.layout]
    model = MODELS[name]().to(options.device, memory_format=layout)
    made, blocks = variants(model)
    x = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    x = x.contiguous(memory_format=layout)
    for variant in made.values():
        variant.eval()
    with torch.no_grad(), full_precision():
        expected = made[PLAIN](x)
        torch.testing.assert_close(made[FUSED](x), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    found = []
    for direction, make in (("forward", forward_call), ("training", training_call)):
        for variant in made.values():
            variant.train(direction == "training")
        calls = {kind: make(variant, x) for kind, variant in made.items()}
        times = measure(calls, options.device, 3 * options.seconds, options.rounds)
        found.append(Times(direction, blocks, times))
    return found


def rows(name: str, options: argparse.Namespace) -> list[Row]:
    return [
        Row(name, direction, blocks, {kind: statistics.median(values) for kind, values in times.items()})
        for direction, blocks, times in measured(name, options)
    ]


def line(row: Row) -> str:
    times = " | ".join(f"{row.milliseconds[kind]:.2f}" for kind in (PLAIN, FUSED, BARE))
    return (
        f"| {row.model} | {row.blocks} | {row.direction} | {times} | {row.speed_up:.2f}× "
        f"| {row.share(PLAIN):.0%} → {row.share(FUSED):.0%} |"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="parts of their names")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="of the square images")
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each variant and direction")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="a file for the results")
    options = parser.parse_args(arguments)
    chosen = [name for name in MODELS if any(part in name for part in options.models)]
    if not chosen:
        parser.error(f"no such model; there are {', '.join(MODELS)}")
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "CPU"
    setting = f"batch {options.batch}, {options.size}×{options.size}, {options.layout}, float32"
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads; {setting}\n")
    print("| model | blocks | | ms as it is | ms accelerated | ms without blocks | faster | blocks' share |")
    print("|---|---:|---|---:|---:|---:|---:|---|")
    found = []
    for name in chosen:
        try:
            of_model = rows(name, options)
        except ModuleNotFoundError as error:
            print(f"| {name} | left out: {error} |")
            continue
        found += of_model
        print(*map(line, of_model), sep="\n", flush=True)
    if options.json:
        content = {"device": device, "torch": torch.__version__, "setting": setting}
        content["rows"] = [row._asdict() for row in found]
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
