"""What torch.compile should see of a block: an operator, or PyTorch's own operations. Kept bytes and times.

A kind of block stands where models have it: at the end of a bottleneck (convolution, batch norm, block,
addition, ReLU) or in the middle of one (convolution, batch norm, activation, block, convolution), two of them
in a row, compiled by Inductor. Beside the definition in PyTorch, which the compiler fuses with what is around
it, the block is one operator, and the end of a bottleneck is, too (gc_cuda's tail). Kept is what autograd
holds on to (bench/kept.py), in maps of the block's size. "served" is what the compiler sees of accelerated
models; a row in which that keeps more than the definition, or takes more than LINE times as long, is marked.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import FUSIONS, LAYOUTS
from kept import kept_by
from models import CALLS, DIRECTIONS, FORWARD, TRAINING
from timing import measure
from torch import Tensor, nn
from torch.nn import functional

import gc_cuda
from gc_cuda import BatchNorm, Transform, reference
from gc_cuda.blocks._parts import left_to_the_compiler

PYTORCH, OPERATOR, TAIL = "PyTorch", "operator", "tail"
VARIANTS = (PYTORCH, OPERATOR, TAIL)
LINE = 1.02  # for the times, of which two runs differ by as much
SAME = 0.01  # of a map: vectors of channels
END = "end"
ACTIVATIONS = {"relu": functional.relu, "silu": functional.silu, "hardswish": functional.hardswish}


class Kind(NamedTuple):
    """A block: GCNet's with layer norms, by its options; or squeeze-and-excitation, fusion None."""

    pooling_type: str
    fusion: str | None

    @property
    def name(self) -> str:
        return "SE" if self.fusion is None else f"GC {self.pooling_type} {self.fusion}"

    @property
    def adds(self) -> bool:
        return self.fusion in ("add", "both")

    @property
    def scales(self) -> bool:
        return self.fusion != "add"


SE = Kind("avg", None)
KINDS = [*(Kind(pooling, fusion) for pooling in ("att", "avg") for fusion in FUSIONS), SE]
# C, H, W: a ResNet's c4 at 448 pixels or so, and the middle of an EfficientNet's or RegNet's blocks
SIZES = {END: (512, 28, 28)} | dict.fromkeys(ACTIVATIONS, (240, 28, 28))


class Block(nn.Module):
    """The parameters of a block."""

    def __init__(self, kind: Kind, channels: int) -> None:
        super().__init__()
        hidden = channels // 16
        self.kind = kind
        self.mask = (
            nn.Parameter(torch.randn(channels) * channels**-0.5) if kind.pooling_type == "att" else None
        )
        self.branches = nn.ModuleDict()
        for name, given in (("add", kind.adds), ("mul", kind.scales)):
            if given:
                first, last = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
                norm = nn.Identity() if kind.fusion is None else nn.LayerNorm(hidden)
                self.branches[name] = nn.ModuleList([first, norm, last])

    def options(self) -> dict[str, Any]:
        """The arguments of `global_context` and of `bn_context_add_relu`."""
        options: dict[str, Any] = {"pooling_type": self.kind.pooling_type, "mask_weight": self.mask}
        for name, (first, norm, last) in self.branches.items():
            of_norm = getattr(norm, "weight", None), getattr(norm, "bias", None)
            options[name] = Transform(first.weight, first.bias, *of_norm, last.weight, last.bias)
        return options


class Residual(nn.Module):
    """C -> C / 4 -> C, and a block at the end; or C / 4 -> C -> C / 4, and a block in the middle."""

    def __init__(self, kind: Kind, place: str, variant: str, channels: int) -> None:
        super().__init__()
        self.place, self.variant = place, variant
        self.narrow = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.wide = nn.Conv2d(channels // 4, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.block = Block(kind, channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.place == END:
            return self._end(self.wide(self.narrow(x).relu()), x)
        out = ACTIVATIONS[self.place](self.norm(self.wide(x)))
        return self.narrow(self._block(out))

    def _end(self, y: Tensor, identity: Tensor) -> Tensor:
        if self.variant != TAIL:
            return functional.relu(self._block(self.norm(y)) + identity)
        norm = self.norm
        of_norm = BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training)
        return gc_cuda.bn_context_add_relu(y, identity, of_norm, **self.block.options())

    def _block(self, x: Tensor) -> Tensor:
        run = reference.global_context if self.variant == PYTORCH else gc_cuda.global_context
        return run(x, **self.block.options())


class Case(NamedTuple):
    """A kind of block in one place."""

    kind: Kind
    place: str

    @property
    def variants(self) -> tuple[str, ...]:
        return VARIANTS if self.place == END else VARIANTS[:-1]

    @property
    def served(self) -> str:
        """What accelerate lets the compiler see."""
        if self.place == END:
            return TAIL
        kind = self.kind
        attends = kind.pooling_type == "att"
        left = left_to_the_compiler(attends=attends, scales=kind.scales, on_cuda=False)
        return PYTORCH if left else OPERATOR

    def model(self, variant: str) -> nn.Module:
        torch.manual_seed(0)
        channels, *_ = SIZES[self.place]
        blocks = [Residual(self.kind, self.place, variant, channels) for _ in range(2)]
        # A convolution keeps what comes out, as in the middle of a model.
        after = nn.Conv2d(channels, channels // 4, 1) if self.place == END else nn.Identity()
        return nn.Sequential(*blocks, after)

    def input(self, options: argparse.Namespace) -> Tensor:
        channels, height, width = SIZES[self.place]
        torch.manual_seed(1)
        x = torch.randn(options.batch, channels if self.place == END else channels // 4, height, width)
        return x.contiguous(memory_format=LAYOUTS[options.layout])


CASES = [Case(kind, place) for place in SIZES for kind in (KINDS if place != "hardswish" else [SE])]


class Row(NamedTuple):
    """A case, by VARIANTS: maps that are kept (counted in training), and medians in ms by direction."""

    kind: str
    place: str
    served: str
    maps: dict[str, float]
    ms: dict[str, dict[str, float]]

    @property
    def missed(self) -> list[str]:
        """In what the served variant loses to PyTorch's."""
        found = []
        if self.maps and self.maps[self.served] > self.maps[PYTORCH] + SAME:
            found.append("keeps more")
        for direction, ms in self.ms.items():
            if ms[self.served] > LINE * ms[PYTORCH]:
                found.append(f"slower {direction}")
        return found


def compiled(case: Case, training: bool) -> dict[str, nn.Module]:
    torch.compiler.reset()
    made = {variant: case.model(variant).train(training) for variant in case.variants}
    return {
        variant: torch.compile(model, dynamic=False, fullgraph=True)  # type: ignore[misc]
        for variant, model in made.items()
    }


def measured(case: Case, options: argparse.Namespace) -> Row:
    """Compares the outputs before it times anything."""
    x = case.input(options)
    ms: dict[str, dict[str, float]] = {}
    maps: dict[str, float] = {}
    for direction in options.directions:
        models = compiled(case, direction == TRAINING)
        if direction == TRAINING:
            channels, height, width = SIZES[case.place]
            of_map = 4 * options.batch * channels * height * width
            maps = {variant: kept_by(model, x) / of_map for variant, model in models.items()}
        with torch.no_grad():
            expected = models[PYTORCH](x)
            for model in models.values():
                torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
        calls = {variant: CALLS[direction](model, x) for variant, model in models.items()}
        times = measure(calls, "cpu", options.seconds * len(calls), options.rounds)
        ms[direction] = {variant: statistics.median(values) for variant, values in times.items()}
    return Row(case.kind.name, case.place, case.served, maps, ms)


def quietest(rows: Iterable[Row]) -> list[Row]:
    """Of rows of the same case the times that sum up to less, by direction; in the order of CASES."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row.kind, row.place
        known = best.setdefault(key, row)
        for direction, ms in row.ms.items():
            if sum(ms.values()) < sum(known.ms[direction].values()):
                best[key] = known = known._replace(ms=known.ms | {direction: ms})
    return [best[key] for case in CASES if (key := (case.kind.name, case.place)) in best]


def table(found: list[Row], directions: list[str]) -> str:
    """Markdown, readable as it is."""
    titles = [f"maps kept: {variant}" for variant in VARIANTS]
    titles += [f"ms {direction}: {variant}" for direction in directions for variant in VARIANTS]
    lines = ["| block | where | " + " | ".join(titles) + " | served | |"]
    lines.append("|---|---|" + "---:|" * len(titles) + "---|---|")
    for row in found:
        cells = [_cell(row.maps, variant, _maps) for variant in VARIANTS]
        cells += [_cell(row.ms[direction], variant, _ms) for direction in directions for variant in VARIANTS]
        where = "end" if row.place == END else f"after {row.place}"
        lines.append(
            f"| {row.kind} | {where} | {' | '.join(cells)} | {row.served} | {', '.join(row.missed)} |"
        )
    return "\n".join(lines)


def _maps(count: float) -> str:
    return f"{count:.2f}"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.2f}"


def _cell(values: dict[str, float], variant: str, text: Callable[[float], str]) -> str:
    return text(values[variant]) if variant in values else "–"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", default=[""], help="parts of their names")
    parser.add_argument("--places", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=[TRAINING, FORWARD])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each variant and direction")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--reuse-pages", action="store_true", help="the process keeps freed memory")
    parser.add_argument("--json", type=Path, help="a file for the results")
    parser.add_argument(
        "--table-of", nargs="+", type=Path, help="measure nothing: the quietest of these runs"
    )
    options = parser.parse_args(arguments)
    if options.table_of:
        contents = [json.loads(path.read_text()) for path in options.table_of]
        found = quietest(Row(**row) for content in contents for row in content["rows"])
        print(heading(contents[0]))
        print(table(found, options.directions))
        write(options.json, contents[0] | {"rows": [row._asdict() for row in found]})
        return 0
    if options.reuse_pages:
        gc_cuda.keep_pages()
    found = [
        measured(case, options)
        for case in CASES
        if case.place in options.places and any(part in case.kind.name for part in options.kinds)
    ]
    content = {
        "device": platform.processor() or "CPU",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "setting": f"batch {options.batch}, {options.layout}, float32",
        "rows": [row._asdict() for row in found],
    }
    print(heading(content))
    print(table(found, options.directions))
    write(options.json, content)
    return 0


def heading(content: dict[str, Any]) -> str:
    return (
        f"{content['device']}, torch {content['torch']}, {content['threads']} threads; {content['setting']}\n"
    )


def write(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
