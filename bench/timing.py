"""Times calls side by side, on the GPU and on its host, and counts what they launch on a GPU."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import first_line

Call = Callable[[], object]

# The categories of a profiler's trace that are work on the GPU; annotations and the runtime's calls are not.
LAUNCHES = ("kernel", "gpu_memset", "gpu_memcpy")

GRAPH_BATCH = 2  # the largest that is replayed as a CUDA graph, too: there the launches count
# Launches that may wait for the GPU, about. With more, a launch returns only when there is room again: that
# would be the GPU's time, not the host's.
QUEUE = 1000
HOST_CALLS = 5  # in a row, before the host waits for the GPU: far fewer launches than that
HOST_SECONDS, HOST_ROWS = 0.1, 15  # at most, for all peers together; but three rows of each at least


class Timer:
    """Times one call: by events on a GPU, by the clock on the CPU. Freeing the result counts."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def __call__(self, call: Call) -> float:
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


class Deadline:
    """Says when there is no time for another step as long as the longest of the last ten.

    `guess` is what the first is thought to take, in seconds.
    """

    def __init__(self, end: float, guess: float = 0.0) -> None:
        self._end, self._begun, self._taken = end, time.perf_counter(), [guess]

    def is_near(self) -> bool:
        """To be asked before each step."""
        now = time.perf_counter()
        self._taken.append(now - self._begun)
        self._begun = now
        return now + max(self._taken[-10:]) > self._end


def measure(
    calls: dict[str, Call], device: str, seconds: float, rounds: int, before: Call | None = None
) -> dict[str, list[float]]:
    """Milliseconds of every call, round by round, each round beginning with another one.

    It takes the given seconds, longer where those are too short for so many rounds, but no longer than four
    times as long once there are three rounds. `before` runs ahead of every call and is over when it is timed.
    """
    timer, names = Timer(device), list(calls)
    for call in calls.values():
        timer(call)
    times: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    count = 0
    while True:
        taken = time.perf_counter() - start
        if count >= 3 and (taken >= 4 * seconds or (taken >= seconds and count >= rounds)):
            return times
        for i in range(len(names)):
            name = names[(i + count) % len(names)]
            if before is not None:
                before()
            times[name].append(timer(calls[name]))
        count += 1


def host_us(calls: dict[str, Call]) -> dict[str, float]:
    """Microseconds that every call keeps the host busy: from the call until it returns, on an idle GPU.

    Medians over rows of a few calls, the peers in turn. The host waits for the GPU between the rows, outside
    of what is timed. The calls must have run before.
    """
    names = list(calls)
    taken: dict[str, list[float]] = {name: [] for name in names}
    begun, count = time.perf_counter(), 0
    while count < 3 or (count < HOST_ROWS and time.perf_counter() - begun < HOST_SECONDS):
        for i in range(len(names)):
            name = names[(i + count) % len(names)]
            call = calls[name]
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                call()
            taken[name].append((time.perf_counter() - start) / HOST_CALLS)
        count += 1
    torch.cuda.synchronize()
    return {name: 1e6 * statistics.median(rows) for name, rows in taken.items()}


def captured(call: Call) -> Call:
    """The call as a CUDA graph, to be replayed. Raises whatever the capture raises."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def graphs_of(calls: dict[str, Call]) -> tuple[dict[str, Call], dict[str, str]]:
    """Those that can be captured, and why the others cannot, by name."""
    found, refused = {}, {}
    for name, call in calls.items():
        try:
            found[name] = captured(call)
        except Exception as error:  # a peer that cannot be captured is a finding
            torch.cuda.synchronize()
            refused[name] = f"not captured in a CUDA graph: {first_line(error)}"
    return found, refused


def launches_in(trace: dict[str, Any]) -> int:
    """Kernels, memsets and memcpys in a profiler's trace."""
    return sum(event.get("cat") in LAUNCHES for event in trace["traceEvents"])


def count_launches(call: Call) -> int:
    """What one call runs on the GPU, by torch.profiler.

    The profiler may slow down what is launched after it, so time first.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at the first profile; it would talk into the table
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return launches_in(json.loads(path.read_text()))


def cannot_count_launches() -> str:
    """Why `count_launches` is not to be trusted here; empty if it is."""
    y = torch.zeros(64, device="cuda")
    try:
        count_launches(lambda: y.mul_(2))  # which sets the profiler up, and may see too little
        found = count_launches(lambda: y.mul_(2))
    except (RuntimeError, OSError, ValueError) as error:
        return str(error).splitlines()[0]
    return "" if found == 1 else f"torch.profiler saw {found} launches in a call that makes one"
