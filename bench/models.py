"""Whole models with and without accelerate in one run: forward pass, training step, and the blocks' share.

The variants of a model are timed in turn: as its framework made it, accelerated, and with its blocks passed
over; where accelerate takes tails, with the blocks alone accelerated, too; with --recompute, accelerated with
recompute=True where that changes anything. What the blocks take is the difference to the last one. Outputs
are compared before anything is timed. With --compile each variant runs under torch.compile besides, in the
same turns. The models are timm's and torchvision's; without a framework its models are left out.

--kept adds what autograd holds on to in a training step's forward pass (bench/kept.py), --peak the resident
memory that a training step takes at most, in a process of its own (bench/peak.py).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from cases import LAYOUTS
from kept import kept_by
from peers import full_precision
from timing import measure
from torch import Tensor, nn

import gc_cuda
from gc_cuda import reference

PLAIN, BLOCK, FUSED, BARE = "as it is", "block only", "accelerated", "without blocks"
RECOMPUTED = "recomputed"
ORDER = (PLAIN, BLOCK, FUSED, BARE)
EVERY = (PLAIN, BLOCK, FUSED, RECOMPUTED, BARE)  # with --recompute
FORWARD, TRAINING = "forward", "training"
DIRECTIONS = (FORWARD, TRAINING)
COMPILED = ", torch.compile"  # after the name of a direction
# Tails are held to the model without blocks; under torch.compile, to that times 1.02
LINES = {"": 1.0, COMPILED: 1.02}


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

    @property
    def of_bare(self) -> float:
        """The accelerated model's time over that of the model without blocks."""
        return self.milliseconds[FUSED] / self.milliseconds[BARE]

    @property
    def line(self) -> float | None:
        """What `of_bare` is held to; None where no tail is accelerated."""
        if BLOCK not in self.milliseconds:
            return None
        return LINES[COMPILED if self.direction.endswith(COMPILED) else ""]


def variants(
    model: nn.Module, recompute: bool = False, tails: bool | None = None
) -> tuple[dict[str, nn.Module], int]:
    """Those of EVERY, with parameters of their own, and how many blocks there are; BLOCK where tails are,
    RECOMPUTED where middles are, if it is wanted.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # some begin with zero, which would hide every branch
            nn.init.uniform_(module.weight, 0.5, 1.5)
    fused = copy.deepcopy(model)
    report = gc_cuda.accelerate(fused, tails=tails)
    blocks = report.accelerated
    made = {FUSED: fused}
    if getattr(report, "tails", None):
        made[BLOCK] = copy.deepcopy(model)
        gc_cuda.accelerate(made[BLOCK], tails=False)
    if recompute:
        again = copy.deepcopy(model)
        if gc_cuda.accelerate(again, recompute=True).middles:
            made[RECOMPUTED] = again
    inserted = [name for name, module in model.named_modules() if isinstance(module, gc_cuda.ContextBlock)]
    for name in inserted:  # the eager form of what was inserted
        ours = model.get_submodule(name)
        eager = reference.ContextBlock(ours.in_channels, ours.ratio, ours.pooling_type, ours.fusion_types)
        eager.load_state_dict(ours.state_dict())
        model.set_submodule(name, eager.to(next(ours.parameters()).device))
    bare = copy.deepcopy(model)
    for name in [*blocks, *inserted]:
        bare.set_submodule(name, nn.Identity())
    made |= {PLAIN: model, BARE: bare}
    return {name: made[name] for name in EVERY if name in made}, len(blocks) + len(inserted)


def forward_call(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: model(x))


def training_call(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> None:
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)

    return call


CALLS = {FORWARD: forward_call, TRAINING: training_call}


class Times(NamedTuple):
    """Milliseconds of every round in one direction, by variant."""

    direction: str
    blocks: int
    milliseconds: dict[str, list[float]]


class Prepared(NamedTuple):
    """The variants of a model, and an input."""

    made: dict[str, nn.Module]
    blocks: int
    x: Tensor


def prepared(name: str, options: argparse.Namespace) -> Prepared:
    torch.manual_seed(0)
    layout = LAYOUTS[options.layout]
    model = MODELS[name]().to(options.device, memory_format=layout)
    made, blocks = variants(model, options.recompute, True if options.tails else None)
    height, width = sides(options.size)
    x = torch.randn(options.batch, 3, height, width, device=options.device)
    return Prepared(made, blocks, x.contiguous(memory_format=layout))


def measured(name: str, options: argparse.Namespace) -> list[Times]:
    """The directions of a model, its outputs compared before.

    Raises:
        ModuleNotFoundError: where its framework is not installed.
    """
    made, blocks, x = prepared(name, options)
    for variant in made.values():
        variant.eval()
    with torch.no_grad(), full_precision():
        expected = made[PLAIN](x)
        allowed = 1e-3 * float(expected.abs().max())
        for kind in made.keys() - {PLAIN, BARE}:
            torch.testing.assert_close(made[kind](x), expected, rtol=0, atol=allowed)
    found = []
    for direction in options.directions:
        for variant in made.values():
            variant.train(direction == TRAINING)
        of_ways = {"": made} | ({COMPILED: compiled(made)} if options.compile else {})
        calls = {
            kind + way: CALLS[direction](variant, x)
            for way, those in of_ways.items()
            for kind, variant in those.items()
        }
        times = measure(calls, options.device, 3 * options.seconds, options.rounds)
        found += [
            Times(direction + way, blocks, {kind: times[kind + way] for kind in those})
            for way, those in of_ways.items()
        ]
    return found


def compiled(made: dict[str, nn.Module]) -> dict[str, nn.Module]:
    torch.compiler.reset()
    return {kind: torch.compile(variant, dynamic=False) for kind, variant in made.items()}


def rows(name: str, options: argparse.Namespace) -> list[Row]:
    return [
        Row(name, direction, blocks, {kind: statistics.median(values) for kind, values in times.items()})
        for direction, blocks, times in measured(name, options)
    ]


def line(row: Row, order: tuple[str, ...] = ORDER) -> str:
    times = " | ".join(f"{row.milliseconds[kind]:.2f}" if kind in row.milliseconds else "–" for kind in order)
    held = "" if row.line is None else f" (≤ {row.line:g})" + " MISSED" * (row.of_bare > row.line)
    return (
        f"| {row.model} | {row.blocks} | {row.direction} | {times} | {row.speed_up:.2f}× "
        f"| {row.share(PLAIN):.0%} → {row.share(FUSED):.0%} | {row.of_bare:.3f}{held} |"
    )


class Memory(NamedTuple):
    """MiB of the variants of a model in training: `what` is KEPT or PEAK, and under torch.compile or not."""

    model: str
    what: str
    mib: dict[str, float]


KEPT, PEAK = "kept for the backward pass", "peak of a training step"


def memory(name: str, options: argparse.Namespace) -> list[Memory]:
    """What was asked for."""
    if not (options.kept or options.peak):
        return []
    ways = ["", COMPILED] if options.compile else [""]
    found = []
    made, _, x = prepared(name, options)
    kinds = list(made)
    if options.kept:
        for way in ways:
            those = {kind: variant.train() for kind, variant in made.items()}
            those = compiled(those) if way else those
            counted = {kind: kept_by(variant, x) / 2**20 for kind, variant in those.items()}
            found.append(Memory(name, KEPT + way, counted))
    del made
    if options.peak:
        for way in ways:
            peaks = {kind: peak_mib(name, kind, way, options) for kind in kinds}
            found.append(Memory(name, PEAK + way, peaks))
    return found


def peak_mib(name: str, kind: str, way: str, options: argparse.Namespace) -> float:
    """In a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("peak.py")), "--model", name, "--variant", kind]
    command += ["--batch", str(options.batch), "--size", "x".join(map(str, sides(options.size)))]
    command += ["--layout", options.layout] + ["--compile"] * bool(way)
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) / 2**20


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width; one number is that of a square."""
    return (size, size) if isinstance(size, int) else size


def size_of(text: str) -> tuple[int, int]:
    """224, or 800x1344."""
    numbers = [int(part) for part in text.split("x")]
    if len(numbers) > 2:
        raise ValueError(text)
    return numbers[0], numbers[-1]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="parts of their names")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=size_of, default=(224, 224), help="of the images: 224, or 800x1344")
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each variant and direction")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="each variant under torch.compile, too")
    parser.add_argument("--kept", action="store_true", help="what autograd keeps in training")
    parser.add_argument("--peak", action="store_true", help="the peak of a training step; CPU, Linux")
    parser.add_argument("--tails", action="store_true", help="tails on CUDA, too: with GC_CUDA_PATHS=tail")
    parser.add_argument("--recompute", action="store_true", help="accelerated with recompute, too")
    parser.add_argument("--reuse-pages", action="store_true", help="CPU: the process keeps freed memory")
    parser.add_argument("--json", type=Path, help="a file for the results")
    options = parser.parse_args(arguments)
    options.chosen = [name for name in MODELS if any(part in name for part in options.models)]
    if not options.chosen:
        parser.error(f"no such model; there are {', '.join(MODELS)}")
    if options.peak and options.device != "cpu":
        parser.error("--peak is of the CPU's memory; bench/memory.py has a GPU's")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.reuse_pages:
        gc_cuda.keep_pages()
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "CPU"
    size = "×".join(map(str, options.size))
    setting = f"batch {options.batch}, {size}, {options.layout}, float32"
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads; {setting}\n")
    order = EVERY if options.recompute else ORDER
    titles = [f"ms {kind}" for kind in order] + ["faster", "blocks' share", "accelerated / without blocks"]
    print("| model | blocks | | " + " | ".join(titles) + " |")
    print("|---|---:|---|" + "---:|" * (len(order) + 1) + "---|---|")
    found = []
    for name in options.chosen:
        try:
            of_model = rows(name, options)
        except ModuleNotFoundError as error:
            print(f"| {name} | left out: {error} |")
            continue
        found += of_model
        print(*(line(row, order) for row in of_model), sep="\n", flush=True)
    counted = [one for name in dict.fromkeys(row.model for row in found) for one in memory(name, options)]
    if counted:
        print("\n| model | MiB | " + " | ".join(order) + " |\n|---|---|" + "---:|" * len(order))
    for one in counted:
        cells = [f"{one.mib[kind]:.0f}" if kind in one.mib else "–" for kind in order]
        print(f"| {one.model} | {one.what} | " + " | ".join(cells) + " |")
    if options.json:
        content = {"device": device, "torch": torch.__version__, "setting": setting}
        content["rows"] = [row._asdict() for row in found]
        content["memory"] = [one._asdict() for one in counted]
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
