"""How long the forward pass of a context block takes: ours, eager PyTorch and torch.compile, in one run.

The feature maps are c3, c4 and c5 of a ResNet-50 for an 800x1333 image (padded to 800x1344), in both memory
formats. Every peer's output is checked against the reference in float64 before it is timed; a wrong one fails
the run. The peers are timed in turn, one call each per round, so that a busy machine disturbs all of them
alike; beside them y.copy_(x) and x.clone() say what moving x once costs on this machine at this moment.

GB/s counts the bytes that a block must move: x is read by the pooling, read again by the broadcast and
written once, FORWARD_PASSES times the size of x; weights and vectors are below 1 % of that. The input is the
same in every call: what fits a cache stays there. Writes a table to the terminal and .json, .md and .png
files to --output.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import report
import torch
from torch import Tensor, nn

import gc_cuda

FORWARD_PASSES = 3

# C, H, W at stride 8, 16 and 32
STAGES = {"c3": (512, 100, 168), "c4": (1024, 50, 84), "c5": (2048, 25, 42)}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}

OURS, EAGER, COMPILED = "gc_cuda", "eager", "torch.compile"
COPY, CLONE = "y.copy_(x)", "x.clone()"

# Roundings to the dtype between x and out: context, product, norm, product, sigmoid, scaling, sum, and one to
# spare.
ROUNDINGS = 8


class Case(NamedTuple):
    """A feature map in one memory format, and a block with the same parameters in both implementations."""

    stage: str
    layout: str
    x: Tensor
    ours: nn.Module
    reference: nn.Module

    @property
    def name(self) -> str:
        return f"{self.stage} {self.layout}"


def make_case(
    stage: str,
    size: tuple[int, int, int],
    layout: str,
    batch: int,
    ratio: float,
    dtype: torch.dtype,
    device: str,
) -> Case:
    torch.manual_seed(0)
    ours = gc_cuda.ContextBlock(size[0], ratio)
    for parameter in ours.parameters():  # as if trained: a new block is the identity, which proves nothing
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5)
    reference = gc_cuda.reference.ContextBlock(size[0], ratio)
    reference.load_state_dict(ours.state_dict())
    x = torch.randn(batch, *size).to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
    return Case(stage, layout, x, ours.to(device, dtype).eval(), reference.to(device, dtype).eval())


def peers(case: Case, compiled: bool) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """What is timed, by name, and why something is not."""
    x = case.x
    calls: dict[str, Callable[[], Tensor]] = {OURS: lambda: case.ours(x), EAGER: lambda: case.reference(x)}
    missing = {}
    if not compiled:
        missing[COMPILED] = "switched off by --no-compile"
    else:
        try:
            torch.compiler.reset()
            function = torch.compile(case.reference, dynamic=False)
            function(x)
            calls[COMPILED] = lambda: function(x)
        except (
            Exception
        ) as error:  # a missing compiler, an unsupported platform: whatever it is, the rest goes on
            text = str(error).strip() or type(error).__name__
            missing[COMPILED] = f"does not run here: {text.splitlines()[0]}"
    return calls, missing


def errors(case: Case, calls: dict[str, Callable[[], Tensor]]) -> dict[str, tuple[float, float]]:
    """Each peer's largest error against the reference in float64, and what it is allowed.

    Allowed are twice eager's own error plus ROUNDINGS roundings to the dtype; eager itself gets eight times
    those.
    """
    double = gc_cuda.reference.ContextBlock(case.x.shape[1], case.reference.ratio).to(case.x.device).double()
    double.load_state_dict(case.reference.state_dict())
    truth = double(case.x.double())
    rounding = ROUNDINGS * torch.finfo(case.x.dtype).eps / 2 * float(truth.abs().max())
    result = {name: float((call().double() - truth).abs().max()) for name, call in calls.items()}
    own = result[EAGER]
    return {
        name: (error, 8 * rounding if name == EAGER else 2 * own + rounding) for name, error in result.items()
    }


def is_right(error: float, allowed: float) -> bool:
    """False for NaN, too."""
    return error <= allowed


class Timer:
    """Times one call: by events on a GPU, by the clock on the CPU. Freeing the result counts."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def __call__(self, call: Callable[[], Tensor]) -> float:
        if not self._cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def measure(
    calls: dict[str, Callable[[], Tensor]], device: str, seconds: float, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of every call, round by round, each round beginning with another one."""
    timer, names = Timer(device), list(calls)
    for call in calls.values():
        timer(call)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    count = 0
    while count < rounds or time.perf_counter() < end:
        for i in range(len(names)):
            name = names[(i + count) % len(names)]
            times[name].append(timer(calls[name]))
        count += 1
    return times


def rows_of(
    case: Case, times: dict[str, list[float]], checked: dict[str, tuple[float, float]]
) -> list[report.Row]:
    """One row for each peer that was timed."""
    size = case.x.numel() * case.x.element_size()
    median = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name, (error, allowed) in checked.items():
        if name not in times:
            continue
        p20, p50, p80 = (statistics.quantiles(times[name], n=10)[i] for i in (1, 4, 7))
        rows.append(
            report.Row(
                stage=case.stage,
                shape=list(case.x.shape),
                layout=case.layout,
                peer=name,
                p20_ms=p20,
                p50_ms=p50,
                p80_ms=p80,
                rounds=len(times[name]),
                of_eager=p50 / median[EAGER] if EAGER in median else None,
                gigabytes_per_second=FORWARD_PASSES * size / p50 / 1e6,
                of_copy=p50 / median[COPY],
                of_clone=p50 / median[CLONE],
                error=error,
                allowed_error=allowed,
            )
        )
    return rows


def run_case(
    case: Case, device: str, compiled: bool, seconds: float, rounds: int
) -> tuple[list[report.Row], dict[str, str], list[str]]:
    """The rows of one feature map, what is missing there and why, and what was wrong."""
    calls, missing = peers(case, compiled)
    checked = errors(case, calls)
    wrong = [
        f"{case.name}: the output of {name} is off by {error:.3g}, allowed is {allowed:.3g}; it is not timed"
        for name, (error, allowed) in checked.items()
        if not is_right(error, allowed)
    ]
    calls = {name: call for name, call in calls.items() if is_right(*checked[name])}
    y = torch.empty_like(case.x)
    calls[COPY] = lambda: y.copy_(case.x)
    calls[CLONE] = lambda: case.x.clone()
    return rows_of(case, measure(calls, device, seconds, rounds), checked), missing, wrong


def reuse_pages() -> None:
    """Keep freed memory in the process: glibc otherwise maps every block above 32 MiB anew, page fault by
    page fault.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    m_trim_threshold, m_mmap_max = -1, -4
    if mallopt is None or not (mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1)):
        sys.exit("--reuse-pages needs glibc's mallopt, which is not here")


def describe(device: str, arguments: argparse.Namespace) -> dict[str, str]:
    """What the numbers depend on."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, cache = properties.name, f"second-level cache {properties.L2_cache_size / 2**20:.0f} MiB"
        memory = f"torch's caching allocator; {cache}"
    else:
        name = report.cpu_name()
        memory = (
            "output pages reused (--reuse-pages)"
            if arguments.reuse_pages
            else "the system's default: glibc gives outputs above 32 MiB fresh pages in every call"
        )
    return {
        "device": name,
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "gc_cuda": gc_cuda.__version__,
        "threads": f"{torch.get_num_threads()} ({torch.backends.cpu.get_cpu_capability()})",
        "system": f"{platform.platform()}; load average {os.getloadavg()[0]:.1f} before the run",
        "block": f"ContextBlock, att, channel_add, ratio {arguments.ratio:g}; forward, no gradients",
        "input": f"batch {arguments.batch}, {arguments.dtype}, the same in every call",
        "memory": memory,
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="c4 and c5, batch 1, few rounds: a check that it runs"
    )
    parser.add_argument("--batch", type=int, help="images per call (2)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--ratio", type=float, default=1 / 16, help="hidden units per channel (0.0625)")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="of c3 c4 c5, or a size as in 256x56x56")
    parser.add_argument("--seconds", type=float, help="of timing for each feature map and memory format (4)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--reuse-pages", action="store_true", help="CPU: outputs get used pages, not fresh ones"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parents[1] / "build" / "bench", metavar="DIR"
    )
    arguments = parser.parse_args(argv)
    arguments.batch = arguments.batch or (1 if arguments.quick else 2)
    arguments.seconds = arguments.seconds or (1.0 if arguments.quick else 4.0)
    arguments.stages = arguments.stages or (["c4", "c5"] if arguments.quick else list(STAGES))
    try:
        arguments.stages = {
            s: STAGES.get(s) or tuple(int(part) for part in s.split("x")) for s in arguments.stages
        }
    except ValueError:
        parser.error(f"--stages takes {', '.join(STAGES)} or CxHxW, got {' '.join(arguments.stages)}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a peer gave a wrong result."""
    arguments = parse_arguments(argv)
    if arguments.reuse_pages:
        reuse_pages()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    header = describe(device, arguments)
    rows: list[report.Row] = []
    missing: dict[str, str] = {}
    wrong: list[str] = []
    pairs = [(stage, size, layout) for stage, size in arguments.stages.items() for layout in LAYOUTS]
    with torch.no_grad(), report.Progress(len(pairs)) as progress:
        for stage, size, layout in pairs:
            progress.begin(f"{stage} {layout}")
            case = make_case(
                stage, size, layout, arguments.batch, arguments.ratio, DTYPES[arguments.dtype], device
            )
            found = run_case(
                case, device, not arguments.no_compile, arguments.seconds, 5 if arguments.quick else 15
            )
            rows += found[0]
            missing.update({f"{case.name}, {peer}": reason for peer, reason in found[1].items()})
            wrong += found[2]

    print(report.terminal(header, rows, missing))
    for path in report.write(arguments.output, header, rows, missing):
        print(f"wrote {path}")
    for message in wrong:
        print(f"WRONG {message}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
