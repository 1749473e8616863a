"""Whether a bottleneck's tail with its block, as one operation, takes less time than a plain one; on the CPU.

The tail is batch norm, block, += identity, ReLU; the plain one, which the ratios are to, is a ResNet's
without blocks, in eager PyTorch, affine parameters trained. Timed in turn, one call each per round, at c3, c4
and c5 of a detector, by statistics of the batch and by given ones, with one thread and with all: GCNet's
block (attention, added) and squeeze-and-excitation, ratio 1/16, each in eager PyTorch, as
gc_cuda.global_context between eager operations, and as gc_cuda.bn_context_add_relu; and the plain tail under
torch.compile. Each is compared with eager before. Beside them are the bare passes: the reads and writes of
y's size that GCNet's tail has to make, by PyTorch's own sum, copy and add.

forward+backward gives the output and the gradients of y, identity and all parameters; it is what the promises
are about, and those that are missed are marked. Pages are reused, as in a process that has warmed up. Before
each call the caches are filled with what none of them reads, written: the tail leaves almost nothing there, a
plain one the maps that it has just written, and whoever came next paid for putting those into memory. Writes
DEVICE-tail.json, .md and .png to --output.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import latency
import markdown_text
import tables
import tail_picture
import torch
from bottleneck import GC, SE, Context, tail
from cases import DETECTION, FORWARD, LAYOUTS, TRAINING
from models import BARE, BLOCK, FUSED, PLAIN
from peers import first_line
from timing import measure
from torch import Tensor, nn

import gc_cuda

OF_BATCH, GIVEN = "of the batch", "given"
# forward+backward of GCNet's tail over that of the plain one, by statistics and stage
LINES = {OF_BATCH: {"c3": 0.85, "c4": 0.85, "c5": 0.9}, GIVEN: {"c3": 1.0, "c4": 1.0, "c5": 1.1}}
PLAIN_RESNET, COMPILED_PLAIN, PASSES = "plain", "plain, torch.compile", "bare passes"
HOW = {PLAIN: "eager", BLOCK: "block only", FUSED: "tail"}
NAMES = [PLAIN_RESNET, *(f"{kind} {how}" for kind in (GC, SE) for how in HOW.values())]
NAMES += [COMPILED_PLAIN, PASSES]
BATCH = 2
ROUNDS = 15
CACHED = 64 * 2**20  # bytes; more than the caches of a few cores
# Between two orders of summation in float32, of a whole tensor; a ReLU at its kink is one element.
# PyTorch's batch norm of channels_last maps sums in float32: at c3 the gradient of its weight is off by 1e-3.
TOLERANCE = 5e-3
RESULTS = ["output", "y", "identity", "weight", "bias"]  # and the gradients of a block's parameters


class Sample(NamedTuple):
    """Medians in milliseconds of one case, by NAMES."""

    threads: int
    statistics: str
    direction: str
    stage: str
    shape: list[int]
    layout: str
    ms: dict[str, float]

    @property
    def map(self) -> str:
        return f"{self.stage} {'x'.join(map(str, self.shape))} {self.layout}"

    def ratio(self, name: str) -> float:
        """To the plain tail."""
        return self.ms[name] / self.ms[PLAIN_RESNET]

    @property
    def line(self) -> float | None:
        """What GCNet's tail is held to; None: to nothing."""
        return LINES[self.statistics].get(self.stage) if self.direction == TRAINING else None

    @property
    def missed(self) -> bool:
        return self.line is not None and self.ratio(f"{GC} {HOW[FUSED]}") > self.line


class Case(NamedTuple):
    """What is timed side by side."""

    statistics: str
    direction: str
    stage: str
    size: tuple[int, int, int]  # C, H, W
    layout: str


# --- measuring, in a process of its own ---


class Problem(NamedTuple):
    """The tensors of a case."""

    y: Tensor
    identity: Tensor
    grad: Tensor
    norm: nn.BatchNorm2d
    contexts: dict[str, Context]  # by the kind of block


def make(case: Case, batch: int = BATCH) -> Problem:
    """The same numbers for the same case, every time; parameters as if trained."""
    torch.manual_seed(0)
    channels = case.size[0]
    y, identity, grad = (
        torch.randn(batch, *case.size).contiguous(memory_format=LAYOUTS[case.layout]) for _ in range(3)
    )
    norm = nn.BatchNorm2d(channels).train(case.statistics == OF_BATCH)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(std=0.5)
        norm.running_mean.normal_(std=0.5)
        norm.running_var.uniform_(0.5, 1.5)
    for tensor in (y, identity):
        tensor.requires_grad_(case.direction == TRAINING)
    return Problem(y, identity, grad, norm, {kind: Context(kind, channels) for kind in (GC, SE)})


def call_of(
    problem: Problem, run: Callable[..., Tensor], variant: str, context: Context | None
) -> Callable[[], list[Tensor]]:
    """`run` is `bottleneck.tail`, or that compiled. Gives the output, and in training the gradients."""
    y, identity, grad, norm, _ = problem
    parameters = [] if context is None else list(context.parameters())
    inputs = [y, identity, norm.weight, norm.bias, *parameters]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [run(variant, y, identity, norm, context)]

    def training() -> list[Tensor]:
        out = run(variant, y, identity, norm, context)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    return training if y.requires_grad else forward


def bare_passes(problem: Problem, target: Tensor) -> Callable[[], object]:
    """As many as GCNet's tail makes over tensors of y's size: by given statistics 4 and 7, else 5 and 8."""
    y, identity, grad = (tensor.detach() for tensor in problem[:3])
    of_batch = problem.norm.training

    def forward() -> None:
        if of_batch:
            y.sum()  # statistics
        y.sum()  # pooling
        torch.add(y, identity, out=target)  # the output

    def training() -> None:
        forward()
        y.sum()
        torch.add(grad, identity, out=target)  # the gradient of identity, and sums over it and y
        y.sum()  # the gradient of the logits
        if of_batch:
            torch.add(y, grad, out=target)  # the gradient of y
        else:
            target.copy_(grad)

    return training if problem.y.requires_grad else forward


def check(names: list[str], calls: dict[str, Callable[[], list[Tensor]]]) -> None:
    """Raises if one is not what the first is. `names` are those of the results."""
    (first, expected), *others = [(name, [t.detach() for t in call()]) for name, call in calls.items()]
    norms = [float(tensor.norm()) for tensor in expected]
    for name, found in others:
        for what, one, other, norm in zip(names, found, expected, norms):
            # The gradient of the mask's bias is exactly 0: what comes out is rounding.
            if what != "mask_bias" and not float((one - other).norm()) <= TOLERANCE * norm:
                raise AssertionError(f"{what} of {name} is not that of {first}")


def calls_of(case: Case, compiled: bool) -> dict[str, Callable[[], object]]:
    """Everything that is timed, checked; what torch.compile cannot do is left out."""
    problem = make(case)
    calls: dict[str, Callable[[], object]] = {}
    for kind, context in problem.contexts.items():
        of_kind = {f"{kind} {how}": call_of(problem, tail, variant, context) for variant, how in HOW.items()}
        check([*RESULTS, *(name for name, _ in context.named_parameters())], of_kind)
        calls |= of_kind
    plain = {PLAIN_RESNET: call_of(problem, tail, BARE, None)}
    if compiled:
        torch.compiler.reset()
        plain[COMPILED_PLAIN] = call_of(problem, torch.compile(tail, dynamic=False), BARE, None)
        try:
            check(RESULTS, plain)
        except Exception as error:
            print(f"{COMPILED_PLAIN}: left out: {first_line(error)}", file=sys.stderr)
            del plain[COMPILED_PLAIN]
    return {**plain, **calls, PASSES: bare_passes(problem, torch.empty_like(problem.y))}


def filled_caches() -> Callable[[], object]:
    """The same caches for every call: full of changed numbers that no call reads."""
    numbers = torch.zeros(CACHED // 4)
    return lambda: numbers.add_(1)


def cases_of(stages: list[str], layouts: list[str]) -> list[Case]:
    """A forward pass by batch statistics is nothing that anyone runs alone."""
    ways = ((OF_BATCH, TRAINING), (GIVEN, TRAINING), (GIVEN, FORWARD))
    return [
        Case(of, direction, stage, DETECTION[stage], layout)
        for of, direction in ways
        for stage in stages
        for layout in layouts
    ]


def sample(case: Case, seconds: float, compiled: bool) -> Sample:
    times = measure(calls_of(case, compiled), "cpu", seconds, ROUNDS, before=filled_caches())
    medians = {name: statistics.median(times[name]) for name in NAMES if name in times}
    shape = [BATCH, *case.size]
    return Sample(
        torch.get_num_threads(), case.statistics, case.direction, case.stage, shape, case.layout, medians
    )


def work(threads: int, options: argparse.Namespace) -> list[Sample]:
    """All that one process measures."""
    torch.set_num_threads(threads)
    latency.reuse_pages()
    found = []
    cases = cases_of(options.stages, options.layouts)
    with tables.Progress(len(cases)) as progress:
        for case in cases:
            name = f"{threads} threads: {case.stage} {case.layout}, {case.direction}, {case.statistics}"
            progress.begin(name)
            compiled = not options.no_compile and threads > 1 and case.layout == options.layouts[0]
            found.append(sample(case, options.seconds, compiled))
    return found


def run_worker(threads: int, options: argparse.Namespace) -> list[Sample]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.json"
        command = [sys.executable, __file__, "--worker", str(threads), str(path)]
        command += ["--seconds", str(options.seconds)] + ["--no-compile"] * options.no_compile
        command += ["--stages", *options.stages, "--layouts", *options.layouts]
        subprocess.run(command, check=True)
        return [Sample(**entry) for entry in json.loads(path.read_text())]


# --- telling it ---

TITLES = ["threads", "statistics", "direction", "map", "GC tail / plain", "line", ""]
TITLES += ["bare passes / plain", "SE tail / plain", "GC tail / GC eager", "GC tail / block only"]


def table(samples: list[Sample]) -> list[list[str]]:
    """The ratios."""
    rows = []
    ours, others = f"{GC} {HOW[FUSED]}", (f"{GC} {HOW[PLAIN]}", f"{GC} {HOW[BLOCK]}")
    for s in samples:
        line = "" if s.line is None else f"≤ {s.line:g}"
        row = [str(s.threads), s.statistics, s.direction, s.map, f"{s.ratio(ours):.2f}", line]
        row += ["MISSED" * s.missed, f"{s.ratio(PASSES):.2f}", f"{s.ratio(f'{SE} {HOW[FUSED]}'):.2f}"]
        rows.append([*row, *(f"{s.ms[ours] / s.ms[other]:.2f}" for other in others)])
    return rows


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(TITLES, *rows)]
    lines = ["  ".join(t.ljust(w) for t, w in zip(row, widths)).rstrip() for row in [TITLES, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def times_table(samples: list[Sample]) -> list[str]:
    """Milliseconds, in Markdown."""
    rows = [
        [str(s.threads), s.statistics, s.direction, s.map]
        + [f"{s.ms[name]:.2f}" if name in s.ms else markdown_text.NOTHING for name in NAMES]
        for s in samples
    ]
    return markdown_text.table(["threads", "statistics", "direction", "map", *NAMES], rows, 4)


def describe() -> dict[str, str]:
    return {
        "device": tables.cpu_name(),
        "torch": f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()})",
        "gc_cuda": gc_cuda.__version__,
        "threads": f"1 and {torch.get_num_threads()}",
        "tail": f"batch {BATCH}, float32, reused pages, caches full of other numbers; "
        f"medians of at least {ROUNDS} rounds, or of what four times --seconds allow",
    }


def kept_sentence(samples: list[Sample]) -> str:
    held = [s for s in samples if s.line is not None]
    return f"{sum(not s.missed for s in held)} of {len(held)} promises kept"


def write(folder: Path, header: dict[str, str], samples: list[Sample]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", header["device"].lower()).strip("-") + "-tail"
    as_json, as_markdown, as_picture = (folder / f"{stem}.{ending}" for ending in ("json", "md", "png"))
    entries = [s._asdict() | {"line": s.line, "missed": s.missed} for s in samples]
    content: dict[str, Any] = {"header": header, "samples": entries}
    as_json.write_text(json.dumps(content, indent=1) + "\n")
    lines = [f"# The end of a bottleneck on {header['device']}", ""]
    lines += [*(f"- {k}: {v}" for k, v in header.items()), ""]
    lines += [f"{kept_sentence(samples)}.", "", *markdown_text.table(TITLES, table(samples), 4)]
    lines += ["", "## Milliseconds (medians)", "", *times_table(samples)]
    as_markdown.write_text("\n".join(lines) + "\n")
    names = [f"{GC} {how}" for how in HOW.values()]
    names += [f"{SE} {HOW[FUSED]}", COMPILED_PLAIN, PASSES]
    drawn = tail_picture.draw(as_picture, header, samples, names)
    return [as_json, as_markdown] + ([as_picture] if drawn else [])


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="c5, NCHW, all threads: a check that it runs")
    parser.add_argument("--stages", nargs="+", choices=DETECTION, default=list(DETECTION))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each case")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a promise is missed")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parents[1] / "build" / "bench", metavar="DIR"
    )
    parser.add_argument("--worker", nargs=2, metavar=("THREADS", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        options.stages, options.layouts, options.no_compile = ["c5"], ["nchw"], True
        options.seconds = min(options.seconds, 0.5)
    return options


def main(argv: list[str] | None = None) -> int:
    """Run everything; 1 if a promise is missed and --strict is given."""
    options = parse_arguments(argv)
    if options.worker:
        threads, path = options.worker
        Path(path).write_text(json.dumps([s._asdict() for s in work(int(threads), options)]))
        return 0
    header = describe()
    most = torch.get_num_threads()
    counts = [most] if options.quick else list(dict.fromkeys((most, 1)))
    samples = [s for threads in counts for s in run_worker(threads, options)]
    print("\n".join(f"{name + ':':9}{value}" for name, value in header.items()), end="\n\n")
    print(aligned(table(samples)), end="\n\n")
    print(kept_sentence(samples))
    for path in write(options.output, header, samples):
        print(f"wrote {path}")
    return 1 if options.strict and any(s.missed for s in samples) else 0


if __name__ == "__main__":
    sys.exit(main())
