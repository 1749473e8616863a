"""Where the time of a block goes on a GPU, kernel by kernel, beside a copy of x: what to look at before changing one.

Each kernel's duration is the profiler's, so the gaps between launches are not in it. "warm" repeats the same call:
what fits the second-level cache stays there; "cold" overwrites the cache before every call. GB/s counts the passes
over a tensor of x's size that a kernel must make (of the transform: its matrices, read once forward; backward read
once and their gradients written), not what it moved.
"""

from __future__ import annotations

import argparse
import collections
import re
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from cases import DTYPES, LAYOUTS, STAGES, TRAINING, Case, Problem, make, ratio_text
from peers import step

COPY = "copy"
# Passes over a tensor of x's size, by kernel; one more where the block has a scale.
PASSES = {COPY: 2, "pool_forward": 1, "broadcast": 2, "broadcast_mul_backward": 1, "pool_backward": 3}
SCALED = ("broadcast_mul_backward",)
MATRICES = {"transform_forward": 1, "transform_backward": 2}
KERNEL = re.compile(r"\bgc::(\w+)<")

Times = dict[str, list[float]]


def name_of(event_name: str) -> str | None:
    """One of our kernels, or the copy; None for what only prepares."""
    match = KERNEL.search(event_name)
    return match[1] if match else COPY if "DtoD" in event_name else None


def profile(calls: Sequence[Callable[[], object]], repeats: int, flush: torch.Tensor | None) -> Times:
    """Microseconds of every kernel in every round of the calls."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            for call in calls:
                if flush is not None:
                    flush.zero_()
                call()
        torch.cuda.synchronize()
    times: Times = collections.defaultdict(list)
    for event in profiler.events():
        name = name_of(event.name) if event.device_type == torch.autograd.DeviceType.CUDA else None
        if name is not None:
            times[name].append(event.time_range.elapsed_us())
    return times


def bytes_of(name: str, case: Case) -> int:
    """What a kernel cannot do without."""
    itemsize = DTYPES[case.dtype].itemsize
    branches = 2 if case.fusion == "both" else 1
    if name in MATRICES:
        channels = case.size[0]
        return MATRICES[name] * 2 * channels * int(channels * case.ratio) * branches * itemsize
    passes = PASSES[name] + (name in SCALED and case.fusion != "add")
    return passes * torch.Size(case.shape).numel() * itemsize


def rows(case: Case, problem: Problem, repeats: int, flush: torch.Tensor) -> list[list[str]]:
    """A line for each kernel, and one for their sum."""
    x = problem.x.detach()
    y = torch.empty_like(x)
    calls = [
        lambda: y.copy_(x),
        step(problem.ours, list(problem.ours.parameters()), problem.x, problem.grad),
    ]
    warm, cold = (profile(calls, repeats, f) for f in (None, flush))
    table = []
    total = [0.0, 0.0]
    for name in [COPY, *(n for n in warm if n != COPY)]:
        medians = [statistics.median(times[name]) for times in (warm, cold)]
        moved = bytes_of(name, case)
        table.append(
            [
                case.map,
                case.layout,
                name,
                *(f"{m:.1f}" for m in medians),
                *(f"{moved / m / 1e3:.0f}" for m in medians),
            ]
        )
        if name != COPY:
            total = [a + b for a, b in zip(total, medians)]
    needed = case.bytes_moved
    table.append(
        [
            case.map,
            case.layout,
            "sum",
            *(f"{t:.1f}" for t in total),
            *(f"{needed / t / 1e3:.0f}" for t in total),
        ]
    )
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--batch", type=int, default=2, help="of c3, c4 and c5; the others have 32 images")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--ratio", type=float, default=1 / 16)
    parser.add_argument("--fusion", default="add", choices=["add", "mul", "both"])
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench/kernels.py needs a CUDA device, and none is visible", file=sys.stderr)
        return 1
    print(
        f"{torch.cuda.get_device_name()}: {arguments.dtype}, ratio {ratio_text(arguments.ratio)}, {arguments.fusion}, "
        f"forward + backward"
    )
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    table = []
    for stage in arguments.stages:
        for layout in LAYOUTS:
            batch = 32 if "x" in stage else arguments.batch
            case = Case(
                TRAINING,
                arguments.fusion,
                arguments.ratio,
                arguments.dtype,
                stage,
                STAGES[stage],
                batch,
                layout,
            )
            table += rows(case, make(case, "cuda"), arguments.repeats, flush)
    header = ["map", "layout", "kernel", "warm us", "cold us", "warm GB/s", "cold GB/s"]
    print(
        "\n".join(
            " | ".join([f"{c[0]:24} {c[1]:13} {c[2]:22}", *(f"{v:>9}" for v in c[3:])])
            for c in [header, *table]
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
