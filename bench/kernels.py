"""Where the time of a block goes on a GPU, kernel by kernel, beside a copy of x.

What to look at before changing one. Each kernel's duration is the profiler's, so the gaps between launches
are not in it. "warm" repeats the same call: what fits the second-level cache stays there; "cold" overwrites
the cache before every call. GB/s counts the passes over a tensor of x's size that a kernel must make (of the
transform: its matrices, read once forward; backward read once and their gradients written), not what it
moved.
"""

from __future__ import annotations

import argparse
import collections
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from cases import DTYPES, LAYOUTS, STAGES, TRAINING, Case, Problem, make, ratio_text
from environment import cache_bytes
from peers import step

COPY, SUM = "copy of x", "sum"
FLUSHES = 5  # buffers of the cache's size that are overwritten to empty it
# gc::Weighting of csrc/cuda/kernels/args.h: what the pooling kernel is used for, forward and backward
POOLINGS = {0: "pool_forward (mask)", 1: "pool_forward (logits)", 2: "pool_forward (uniform)"}
# Passes over a tensor of x's size, by kernel; one more where the block has a scale.
PASSES = {
    COPY: 2,
    "broadcast": 2,
    "broadcast_flat": 2,
    "pixel_dot": 1,
    "broadcast_mul_backward": 1,
    "pool_backward": 3,
    # A tail's, with statistics of the batch, identity and ReLU.
    "statistics": 1,
    "residual": 3,
    "residual_flat": 3,
    "residual_sums": 4,
    "grad_y": 3,
    **dict.fromkeys(POOLINGS.values(), 1),
}
SCALED = ("broadcast_mul_backward",)
MATRICES = {"transform_forward": 1, "transform_backward": 2}
MATRICES |= {f"merging_{name}": matrices for name, matrices in MATRICES.items()}
MATRICES["normalized_transform_backward"] = MATRICES["transform_backward"]
# Vectors of the channels, in the accumulation type: of each image, and of all.
VECTORS = {"norm_gradients": (5, 10)}
KERNEL = re.compile(r"\bgc::(\w+)<")
WEIGHTING = re.compile(r"\(gc::Weighting\)(\d)")

Times = dict[str, list[float]]


class Row(NamedTuple):
    """One kernel of a training step, or the copy, or the sum of the kernels."""

    stage: str
    shape: list[int]
    layout: str
    dtype: str
    ratio: float
    fusion: str
    kernel: str
    bytes: int | None  # None where no formula is known
    warm_us: float
    cold_us: float

    @property
    def map(self) -> str:
        return f"{self.stage} {'×'.join(map(str, self.shape))}"

    def rates(self) -> list[str]:
        """GB/s, warm and cold."""
        if self.bytes is None:
            return ["-", "-"]
        return [f"{self.bytes / us / 1e3:.0f}" for us in (self.warm_us, self.cold_us)]


def name_of(event_name: str) -> str | None:
    """One of our kernels, by what it is used for, or the copy; None for what only prepares."""
    match = KERNEL.search(event_name)
    if match is None:
        return COPY if "DtoD" in event_name else None
    weighting = WEIGHTING.search(event_name)
    if match[1] == "pool_forward" and weighting is not None:
        return POOLINGS.get(int(weighting[1]), match[1])
    return match[1]


def profile(calls: Sequence[Callable[[], object]], repeats: int, flush: torch.Tensor | None) -> Times:
    """Microseconds of every launch of each kernel, in their order."""
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
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        name = name_of(event.name) if event.device_type == torch.autograd.DeviceType.CUDA else None
        if name is not None:
            times[name].append(event.time_range.elapsed_us())
    return times


def of_rounds(times: list[float], repeats: int) -> list[float]:
    """What a kernel takes in each round, which may launch it more than once, for different work."""
    launches = max(1, len(times) // repeats)
    return [sum(times[i : i + launches]) for i in range(0, len(times) - launches + 1, launches)]


def bytes_of(name: str, case: Case) -> int | None:
    """What a kernel cannot do without."""
    itemsize = DTYPES[case.dtype].itemsize
    branches = 2 if case.fusion == "both" else 1
    if name in MATRICES:
        channels = case.size[0]
        return MATRICES[name] * 2 * channels * int(channels * case.ratio) * branches * itemsize
    if name in VECTORS:
        of_image, of_all = VECTORS[name]
        return (of_image * case.shape[0] + of_all) * case.size[0] * max(itemsize, 4)
    if name not in PASSES:
        return None
    passes = PASSES[name] + (name in SCALED and case.fusion != "add")
    return passes * torch.Size(case.shape).numel() * itemsize


def rows(case: Case, problem: Problem, repeats: int, flush: torch.Tensor) -> list[Row]:
    """The copy, each kernel in the order of launches, and the sum of the kernels."""
    x = problem.x.detach()
    y = torch.empty_like(x)
    calls = [
        lambda: y.copy_(x),
        step(problem.ours, list(problem.ours.parameters()), problem.x, problem.grad),
    ]
    warm, cold = (profile(calls, repeats, f) for f in (None, flush))
    found = []
    sums = [0.0, 0.0]
    for name in [COPY, *(n for n in warm if n != COPY)]:
        if name not in warm or name not in cold:
            continue
        medians = [statistics.median(of_rounds(t[name], repeats)) for t in (warm, cold)]
        found.append(_row(case, name, bytes_of(name, case), *medians))
        if name != COPY:
            sums = [a + b for a, b in zip(sums, medians)]
    return [*found, _row(case, SUM, case.bytes_moved, *sums)]


def _row(case: Case, kernel: str, moved: int | None, warm: float, cold: float) -> Row:
    return Row(
        case.stage,
        list(case.shape),
        case.layout,
        case.dtype,
        case.ratio,
        case.fusion,
        kernel,
        moved,
        warm,
        cold,
    )


def flush_buffer() -> torch.Tensor:
    """To be overwritten before a call that is to find nothing in the cache."""
    return torch.empty(FLUSHES * cache_bytes("cuda"), dtype=torch.int8, device="cuda")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--batch", type=int, default=2, help="of c3, c4 and c5; the others have 32 images")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--ratio", type=float, default=1 / 16)
    parser.add_argument("--fusion", default="add", choices=["add", "mul", "both"])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench/kernels.py needs a CUDA device, and none is visible", file=sys.stderr)
        return 1
    setting = f"{options.dtype}, ratio {ratio_text(options.ratio)}, {options.fusion}"
    print(f"{torch.cuda.get_device_name()}: {setting}, forward + backward")
    flush = flush_buffer()
    lines = [["map", "layout", "kernel", "warm us", "cold us", "warm GB/s", "cold GB/s"]]
    for stage in options.stages:
        for layout in LAYOUTS:
            batch = 32 if "x" in stage else options.batch
            case = Case(
                TRAINING, options.fusion, options.ratio, options.dtype, stage, STAGES[stage], batch, layout
            )
            for row in rows(case, make(case, "cuda"), options.repeats, flush):
                times = [f"{us:.1f}" for us in (row.warm_us, row.cold_us)]
                lines.append([case.map, layout, row.kernel, *times, *row.rates()])
    for first, second, kernel, *numbers in lines:
        print(" | ".join([f"{first:24} {second:13} {kernel:22}", *(f"{number:>9}" for number in numbers)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
