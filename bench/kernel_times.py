"""How long each of our kernels takes in a training step of the block, for one checkout beside another.

    python bench/kernel_times.py --output times.json                  of the gc_cuda that Python finds
    python bench/kernel_times.py --compare before.json after.json     a table: medians, and their ratio

Run it for two checkouts in turn, each with its folder first in PYTHONPATH. The times are those of the
profiler, cold: between two steps a buffer larger than the second-level cache is filled. ``step`` is a replay
of the step as a CUDA graph, by events, cold too.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import gc_cuda

CASES = {
    "c3": (2, 512, 100, 168),
    "c4": (2, 1024, 50, 84),
    "c5": (2, 2048, 25, 42),
    "56x56": (64, 256, 56, 56),
    "7x7": (32, 2048, 7, 7),
    "256 images": (256, 512, 7, 7),
}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
FLUSH_BYTES = 256 * 2**20


def step_of(size: tuple[int, ...], layout: str, dtype: torch.dtype) -> Callable[[], object]:
    """A forward and backward pass of the block over one map."""
    torch.manual_seed(0)
    block = gc_cuda.ContextBlock(size[1], 1 / 16).cuda()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.05)
    x = (
        torch.randn(size, device="cuda", dtype=dtype)
        .contiguous(memory_format=LAYOUTS[layout])
        .requires_grad_()
    )
    grad = torch.randn_like(x)
    inputs = [x, *block.parameters()]
    return lambda: torch.autograd.grad(block(x), inputs, grad)


def kernel_times(step: Callable[[], object], flush: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median microseconds by kernel; one that is launched more than once in a step has numbers."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            flush.fill_(1)
            step()
        torch.cuda.synchronize()
    times = defaultdict(list)
    for event in profiler.events():
        match = re.search(r"gc::(\w+)<", event.name)
        if match:
            # That of Path::kLateMerge beside that of the measured path.
            times[match.group(1).removeprefix("merging_")].append(event.device_time)
    result = {}
    for name, values in times.items():
        count = round(len(values) / repeats)
        for i in range(count):
            result[name if count == 1 else f"{name} {i + 1}"] = statistics.median(values[i::count])
    return result


def graph_time(step: Callable[[], object], flush: torch.Tensor, repeats: int) -> float:
    """Median microseconds of a replay."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    times = []
    for _ in range(repeats):
        flush.fill_(1)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    del kept
    return statistics.median(times)


def measure(repeats: int) -> dict[str, dict[str, float]]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    results = {}
    for case, size in CASES.items():
        for layout in LAYOUTS:
            for dtype in (torch.float32, torch.float16):
                step = step_of(size, layout, dtype)
                for _ in range(3):
                    step()
                name = f"{case} {layout} {str(dtype).removeprefix('torch.')}"
                results[name] = kernel_times(step, flush, repeats) | {
                    "step": graph_time(step, flush, repeats)
                }
                print(f"{name}: step {results[name]['step']:.1f} us", flush=True)
    return results


def table(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> str:
    """The kernels of each case, worst ratio last."""
    lines = ["| case | kernel | before, us | after, us | ratio |", "| --- | --- | --: | --: | --: |"]
    for case, kernels in after.items():
        for kernel, time in kernels.items():
            old = before.get(case, {}).get(kernel)
            if old:
                lines.append(f"| {case} | {kernel} | {old:.1f} | {time:.1f} | {time / old:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, metavar="JSON")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    arguments = parser.parse_args()
    if arguments.compare:
        print(table(*(json.loads(path.read_text()) for path in arguments.compare)))
        return
    results = measure(arguments.repeats)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
