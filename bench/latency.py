"""How long a context block takes, forward and in training: ours, eager PyTorch and torch.compile, in one run.

The feature maps are c3, c4 and c5 of a ResNet-50 for an 800x1333 image (padded to 800x1344), and the 28x28,
14x14 and 7x7 maps of a 224x224 image at batch 32, in both memory formats. forward+backward is a training step
of the block: the output, and from a given gradient of it those of x and of all parameters. Every peer's
output and gradients are checked against the reference in float64 before it is timed; a wrong one fails the
run. The peers are timed in turn, one call each per round, so that a busy machine disturbs all of them alike;
beside them y.copy_(x) and x.clone() say what moving x once costs on this machine at this moment.

GB/s counts the bytes that a block must move (Case.passes times the size of x). The input is the same in every
call: what fits a cache stays there. On a GPU the calls at batch 1 and 2 are replayed as CUDA graphs, too, and
beside each time is that of the host: how long until a call returns. (On a CPU the call is the work; what of
it is not arithmetic is shown by bench/host_times.py.) Launches are counted by torch.profiler after all of the
timing. Writes a table to the terminal and .json, .md and .png files to --output.
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
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import picture
import tables
import torch
from cases import (
    DETECTION,
    DIRECTIONS,
    DTYPES,
    FUSIONS,
    LAYOUTS,
    STAGES,
    Case,
    grid,
    make,
    ratio_text,
)
from peers import EAGER, Call, Error, errors, first_line, peers
from samples import GRAPH, STREAM
from timing import (
    GRAPH_BATCH,
    Deadline,
    cannot_count_launches,
    count_launches,
    graphs_of,
    host_us,
    measure,
)

import gc_cuda

COPY, CLONE = "y.copy_(x)", "x.clone()"

# What is run without options to the contrary
PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "stages": list(STAGES),
        "batch": [2],
        "dtype": ["float32"],
        "ratio": [1 / 16],
        "fusion": ["add"],
        "seconds": 2.0,
        "rounds": 15,
    },
    "quick": {
        "stages": ["c4", "c5", "7x7"],
        "batch": [1],
        "dtype": ["float32"],
        "ratio": [1 / 16],
        "fusion": ["add"],
        "seconds": 0.5,
        "rounds": 5,
    },
    "full": {
        "stages": list(STAGES),
        "batch": [1, 2, 8],
        "dtype": ["float32", "float16", "bfloat16"],
        "ratio": [1 / 16, 1 / 4],
        "fusion": list(FUSIONS),
        "seconds": 0.3,
        "rounds": 15,
    },
}
# On a GPU, the rest of --limit is for counting launches.
TIMING_SHARE = 0.75


class Found(NamedTuple):
    """What became of one case."""

    rows: list[tables.Row]
    missing: dict[str, str]  # by peer: why it was not timed
    wrong: list[str]


def rows_of(
    case: Case,
    launch: str,
    times: dict[str, list[float]],
    host: dict[str, float],
    checked: dict[str, Error],
) -> list[tables.Row]:
    """One row for each peer that was timed."""
    median = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name, error in checked.items():
        if name not in times:
            continue
        p20, p50, p80 = (statistics.quantiles(times[name], n=10)[i] for i in (1, 4, 7))
        rows.append(
            tables.Row(
                group=case.group,
                direction=case.direction,
                dtype=case.dtype,
                ratio=case.ratio,
                fusion=case.fusion,
                stage=case.stage,
                shape=list(case.shape),
                layout=case.layout,
                peer=name,
                launch=launch,
                p20_ms=p20,
                p50_ms=p50,
                p80_ms=p80,
                rounds=len(times[name]),
                host_us=host.get(name),
                of_eager=p50 / median[EAGER] if EAGER in median else None,
                passes=case.passes,
                gigabytes_per_second=case.bytes_moved / p50 / 1e6,
                of_copy=p50 / median[COPY],
                of_clone=p50 / median[CLONE],
                launches=None,
                worst_quantity=error.quantity,
                error=error.error,
                allowed_error=error.allowed,
            )
        )
    return rows


def run_case(case: Case, device: str, arguments: argparse.Namespace) -> Found:
    """Check and time every peer."""
    problem = make(case, device)
    calls, missing = peers(problem, not arguments.no_compile)
    checked = errors(problem, calls)
    wrong = [
        f"{case.name}: the {error.quantity} of {name} is off by {error.error:.3g}, allowed is "
        f"{error.allowed:.3g}; it is not timed"
        for name, error in checked.items()
        if not error.is_right
    ]
    timed: dict[str, Callable[[], object]] = {n: call for n, call in calls.items() if checked[n].is_right}
    x = problem.x.detach()
    y = torch.empty_like(x)
    timed[COPY] = lambda: y.copy_(x)
    timed[CLONE] = lambda: x.clone()
    launching = {STREAM: timed}
    if device == "cuda" and case.batch <= GRAPH_BATCH:
        replays, refused = graphs_of(timed)
        missing |= {f"{name} as a graph": why for name, why in refused.items()}
        if {COPY, CLONE} <= set(replays):
            launching[GRAPH] = replays
    rows = []
    for launch, those in launching.items():
        times = measure(those, device, arguments.seconds / len(launching), arguments.rounds)
        host = host_us(those) if device == "cuda" else {}
        rows += rows_of(case, launch, times, host, checked)
    return Found(rows, missing, wrong)


def launches_of(case: Case, device: str, arguments: argparse.Namespace) -> dict[str, int]:
    """By peer."""
    calls: dict[str, Call] = peers(make(case, device), not arguments.no_compile)[0]
    return {name: count_launches(call) for name, call in calls.items()}


def run_all(
    cases: list[Case], device: str, arguments: argparse.Namespace
) -> tuple[dict[Case, Found], list[Case], str]:
    """What was found for each case, the cases that there was no time for, and a remark on the launches."""
    begun, counting = time.perf_counter(), device == "cuda"
    end = begun + (arguments.limit or float("inf"))
    found: dict[Case, Found] = {}
    with tables.Progress(len(cases) * (1 + counting)) as progress:
        deadline = Deadline(begun + (TIMING_SHARE if counting else 1) * (end - begun))
        for case in cases:
            if deadline.is_near():
                break
            progress.begin(case.name)
            try:
                found[case] = run_case(case, device, arguments)
            except Exception as error:  # no memory, say: the run fails at the end, with all that it has found
                found[case] = Found([], {}, [f"{case.name}: {type(error).__name__}: {first_line(error)}"])
        reason = cannot_count_launches() if counting else ""
        remark = f"not counted: {reason}" if reason else ""
        deadline = Deadline(end)
        for case in found if counting and not reason else ():
            if deadline.is_near():
                remark = "counted until the limit was reached"
                break
            progress.begin(f"launches of {case.name}")
            try:
                launches = launches_of(case, device, arguments)
            except Exception as error:
                remark = f"not counted for {case.name} and later: {first_line(error)}"
                break
            rows = [
                row if row.launch == GRAPH else row._replace(launches=launches.get(row.peer))
                for row in found[case].rows
            ]
            found[case] = found[case]._replace(rows=rows)
    return found, [case for case in cases if case not in found], remark


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
    tf32 = {}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, cache = properties.name, f"second-level cache {properties.L2_cache_size / 2**20:.0f} MiB"
        memory = f"torch's caching allocator; {cache}, not flushed between calls"
        on = {True: "on", False: "off"}
        convolutions = on[torch.backends.cudnn.allow_tf32]
        products = on[torch.backends.cuda.matmul.allow_tf32]
        tf32 = {
            "TF32": f"{convolutions} for eager's convolutions, {products} for its matrix products in float32"
        }
    else:
        name = tables.cpu_name()
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
        "block": f"ContextBlock, att; fusion {', '.join(arguments.fusion)}; "
        f"ratio {', '.join(map(ratio_text, arguments.ratio))}",
        "input": f"{', '.join(arguments.dtype)}; the same in every call",
        **tf32,
        "memory": memory,
    }


def size_of(stage: str) -> tuple[int, int, int]:
    """C, H, W of a stage's name, or of a size as in 256x56x56."""
    if stage in STAGES:
        return STAGES[stage]
    c, h, w = (int(part) for part in stage.split("x"))
    return c, h, w


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    presets = parser.add_mutually_exclusive_group()
    presets.add_argument(
        "--quick", action="store_const", const="quick", dest="preset", help="a few maps: a check that it runs"
    )
    presets.add_argument(
        "--full",
        action="store_const",
        const="full",
        dest="preset",
        help="every dtype, ratio, batch and fusion (meant for a GPU)",
    )
    several: dict[str, Any] = {"nargs": "+", "default": None}
    parser.add_argument("--passes", dest="directions", choices=DIRECTIONS, help="(both)", **several)
    parser.add_argument("--dtype", choices=DTYPES, help="(float32)", **several)
    parser.add_argument(
        "--ratio", type=lambda text: float(Fraction(text)), help="hidden units per channel (1/16)", **several
    )
    parser.add_argument(
        "--batch", type=int, help=f"images per call for {', '.join(DETECTION)} (2)", **several
    )
    parser.add_argument(
        "--stages", metavar="STAGE", help=f"of {' '.join(STAGES)}, or a size as in 256x56x56 (all)", **several
    )
    parser.add_argument("--layouts", choices=LAYOUTS, help="(both)", **several)
    parser.add_argument("--fusion", choices=FUSIONS, help="(add)", **several)
    parser.add_argument("--seconds", type=float, help="of timing for each case (2)")
    parser.add_argument(
        "--limit",
        type=float,
        help="seconds for the whole run; what does not fit is left out, last cases first",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--reuse-pages", action="store_true", help="CPU: outputs get used pages, not fresh ones"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parents[1] / "build" / "bench", metavar="DIR"
    )
    arguments = parser.parse_args(argv)
    preset = {"directions": list(DIRECTIONS), "layouts": list(LAYOUTS)}
    preset.update(PRESETS[arguments.preset or "default"])
    for name, value in preset.items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    try:
        arguments.stages = {stage: size_of(stage) for stage in arguments.stages}
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
    cases = grid(
        arguments.stages,
        arguments.batch,
        arguments.layouts,
        arguments.dtype,
        arguments.ratio,
        arguments.fusion,
        arguments.directions,
    )
    found, left_out, remark = run_all(cases, device, arguments)
    if remark:
        header["launches"] = remark
    results = tables.Results(
        header,
        [row for one in found.values() for row in one.rows],
        [tables.Missing(c.name, peer, why) for c, one in found.items() for peer, why in one.missing.items()],
        [case.name for case in left_out],
        len(cases),
    )
    print(tables.terminal(results))
    paths = tables.write(arguments.output, results)
    drawing = paths[0].with_suffix(".png")
    if results.rows and picture.draw(drawing, results):
        paths.append(drawing)
    for path in paths:
        print(f"wrote {path}")
    wrong = [message for one in found.values() for message in one.wrong]
    for message in wrong:
        print(f"WRONG {message}", file=sys.stderr)
    remainder = ", the others LEFT OUT for lack of time" if left_out else ""
    print(f"{len(found)} of {len(cases)} cases run{remainder}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
