"""What a call of the block takes the host, for one checkout beside another, and against what it is held to.

    python bench/host_times.py --output times.json                    of the gc_cuda that Python finds
    python bench/host_times.py --compare before.json after.json       a table: microseconds, and their ratio

Run it for two checkouts in turn, each with its folder first in PYTHONPATH. On a GPU the time is that until a
call returns, with an empty stream: a few calls in a row, far fewer than the launch queue holds, and the wait
for them outside of the time. On the CPU it is that of the call, on one thread and a map so small that
arithmetic hardly counts. Each figure is the least of many samples: whatever else the machine does only adds
to it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import cpu_name
from torch import Tensor, nn

import gc_cuda

# The ratio to the squeeze, and the size of x.
MAPS = {"1x64x7x7": (1 / 4, (1, 64, 7, 7)), "c5": (1 / 16, (2, 2048, 25, 42))}
CALLS = 20  # in a row
Result = dict[str, Any]  # what a file holds: the device, torch, and microseconds by map and call
WITHOUT_GRADIENTS = ("x + 1", "forward", "eager forward")
# What each call may take at most, as a multiple of another.
GOALS = {
    "forward": ("x + 1", 4.0),
    "forward with gradients": ("identity", 2.6),
    "step": ("identity step", 2.0),
}


class Identity(torch.autograd.Function):
    """Adds 0: the least that a Function in Python takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def host_us(call: Callable[[], object], device: str, samples: int) -> float:
    """Microseconds until one call returns."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    best = float("inf")
    for sample in range(samples + 2):  # the first two warm up
        wait()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        taken = (time.perf_counter() - begin) / CALLS
        if sample >= 2:
            best = min(best, taken)
    wait()
    return 1e6 * best


def step_of(
    function: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]
) -> Callable[[], None]:
    """Forward and backward; the gradients are dropped, as an optimizer does."""
    grad = torch.ones_like(x)

    def step() -> None:
        function(x).backward(grad)
        x.grad = None
        for parameter in parameters:
            parameter.grad = None

    return step


def calls_on(device: str, ratio: float, size: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    ours = gc_cuda.ContextBlock(size[1], ratio).to(device)
    eager = gc_cuda.reference.ContextBlock(size[1], ratio).to(device)
    x = torch.randn(size, device=device)
    leaf = x.clone().requires_grad_()
    parameters, of_eager = list(ours.parameters()), list(eager.parameters())
    return {
        "x + 1": lambda: x + 1,
        "forward": lambda: ours(x),
        "eager forward": lambda: eager(x),
        "identity": lambda: Identity.apply(leaf),
        "forward with gradients": lambda: ours(leaf),
        "eager forward with gradients": lambda: eager(leaf),
        "identity step": step_of(Identity.apply, leaf, parameters),
        "step": step_of(ours, leaf, parameters),
        "eager step": step_of(eager, leaf, of_eager),
    }


def measure(device: str, samples: int) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {}
    for name, (ratio, size) in MAPS.items():
        if device == "cpu" and name != "1x64x7x7":
            continue
        calls = calls_on(device, ratio, size)
        results[name] = {}
        for call, run in calls.items():
            with torch.set_grad_enabled(call not in WITHOUT_GRADIENTS):
                results[name][call] = host_us(run, device, samples)
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    lines = ["| x | call | host, us | held against | ratio | goal |", "| --- | --- | --: | --- | --: | --: |"]
    for name, times in results.items():
        for call, us in times.items():
            base, goal = GOALS.get(call, ("", 0.0))
            held = f"{base} | {us / times[base]:.2f} | {goal:g}" if base else "| |"
            lines.append(f"| {name} | {call} | {us:.2f} | {held} |")
    return "\n".join(lines)


def comparison(before: Result, after: Result) -> str:
    """Of two files; two machines share no table.

    Raises:
        ValueError: where the files are of different devices.
    """
    if before["device"] != after["device"]:
        raise ValueError(f"not the same device: {before['device']} and {after['device']}")
    lines = ["| x | call | before, us | after, us | ratio |", "| --- | --- | --: | --: | --: |"]
    for name, times in after["us"].items():
        for call, us in times.items():
            old = before["us"].get(name, {}).get(call)
            if old:
                lines.append(f"| {name} | {call} | {old:.2f} | {us:.2f} | {us / old:.2f} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, metavar="JSON")
    parser.add_argument("--samples", type=int, default=300, help=f"of {CALLS} calls each")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    arguments = parser.parse_args(words)
    if arguments.compare:
        try:
            print(comparison(*(json.loads(path.read_text()) for path in arguments.compare)))
        except (OSError, ValueError, KeyError) as error:
            print(f"bench/host_times.py: {error}", file=sys.stderr)
            return 2
        return 0
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    print(f"{name}, torch {torch.__version__}, gc_cuda of {Path(gc_cuda.__file__).parent}")
    result: Result = {"device": name, "torch": torch.__version__, "us": measure(device, arguments.samples)}
    print(table(result["us"]))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
