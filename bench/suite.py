"""The steps of bench/report.py: what is measured, in order of importance, and what it adds to the result."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import bottleneck
import kernels
import memory
import models
import torch
import traffic
from cases import (
    DETECTION,
    DIRECTIONS,
    FORWARD,
    IMAGENET,
    IMAGENET_BATCH,
    LAYOUTS,
    TRAINING,
    Case,
    grid,
    make,
)
from environment import cache_bytes
from peers import COMPILED, EAGER, OURS, Problem, errors, first_line, peers
from samples import CLONE, COLD, GRAPH, LIMIT, STREAM, WARM, quantiles, sample
from tables import Progress
from timing import (
    GRAPH_BATCH,
    Call,
    Deadline,
    cannot_count_launches,
    count_launches,
    graphs_of,
    host_us,
    measure,
)

Result = dict[str, Any]
PROFILED = ("launches", "kernels", "traffic")  # last: the profilers may slow down what is timed after them
PROFILING_SHARE = 0.2  # of the time
# What one step of a section is thought to take, in seconds, until the first has been seen
GUESSES = {
    "times": 8.0,
    "memory": 5.0,
    "models": 25.0,
    "more times": 8.0,
    "launches": 8.0,
    "kernels": 4.0,
    "traffic": 30.0,
}


class Settings(NamedTuple):
    """How long, and how much."""

    device: str
    seconds: float  # of timing for each series of peers
    rounds: int
    compiled: bool = True
    caches: tuple[str, ...] = (WARM, COLD)


class Step(NamedTuple):
    """One thing to measure; `work` adds it to the result."""

    section: str
    name: str
    work: Callable[[Result], None]


def empty() -> Result:
    """What the steps fill."""
    lists = ("samples", "missing", "launches", "kernels", "memory", "models", "traffic", "left_out", "wrong")
    return {**{name: [] for name in lists}, "remarks": {}}


# --- times ---


def copy_of(case: Case, device: str) -> Call:
    """Reads and writes as many bytes as the case must move, together."""
    source = torch.ones(case.bytes_moved // 2, dtype=torch.int8, device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def flush_of(device: str) -> Call:
    """Overwrites five times the last-level cache."""
    buffer = torch.zeros(kernels.FLUSHES * cache_bytes(device) // 8, dtype=torch.int64, device=device)
    return lambda: buffer.fill_(1)


def right_ones(problem: Problem, compiled: bool, result: Result) -> dict[str, Call]:
    """The peers whose results are right; the others are put down."""
    case = problem.case
    calls, missing = peers(problem, compiled)
    if not compiled:
        missing.pop(COMPILED, None)
    result["missing"] += [{"case": case.name, "peer": peer, "reason": why} for peer, why in missing.items()]
    right: dict[str, Call] = {}
    for peer, error in errors(problem, calls).items():
        if error.is_right:
            right[peer] = calls[peer]
        else:
            result["wrong"].append(
                f"{case.name}: the {error.quantity} of {peer} is off by {error.error:.3g}, allowed is "
                f"{error.allowed:.3g}; it is not timed"
            )
    return right


def replays(calls: dict[str, Call], case: Case, result: Result) -> dict[str, Call]:
    """The calls as CUDA graphs; those that cannot be captured are put down."""
    found, refused = graphs_of(calls)
    result["missing"] += [{"case": case.name, "peer": peer, "reason": why} for peer, why in refused.items()]
    return found


def time_case(case: Case, settings: Settings, result: Result) -> None:
    """Every peer side by side, in every cache state and way of launching.

    On a GPU the host is timed once for each way of launching: it does not see the GPU's cache. On a CPU the
    call is the work, and there is no host's time beside it.
    """
    device = settings.device
    problem = make(case, device)
    calls = right_ones(problem, settings.compiled, result)
    calls[LIMIT] = copy_of(case, device)
    if device == "cpu":
        x = problem.x.detach()
        calls[CLONE] = lambda: x.clone()
    launching = {STREAM: calls}
    if device == "cuda" and case.batch <= GRAPH_BATCH:
        launching[GRAPH] = replays(calls, case, result)
    flush = flush_of(device)
    for launch, those in launching.items():
        times = {
            cache: measure(those, device, settings.seconds, settings.rounds, flush if cache == COLD else None)
            for cache in settings.caches
        }
        host = host_us(those) if device == "cuda" else {}
        result["samples"] += [
            sample(case, peer, cache, launch, series, host.get(peer)).entry
            for cache, of_peers in times.items()
            for peer, series in of_peers.items()
        ]


# --- what else there is ---


def count_case(case: Case, settings: Settings, result: Result) -> None:
    """Launches of every peer."""
    remark = result["remarks"].get("launches")
    if remark is None:
        reason = cannot_count_launches()
        remark = result["remarks"]["launches"] = reason
    if remark:
        return
    for peer, call in peers(make(case, settings.device), settings.compiled)[0].items():
        fields = {"direction": case.direction, "layout": case.layout, "dtype": case.dtype}
        fields |= {"fusion": case.fusion, "map": case.map, "peer": peer}
        result["launches"].append({**fields, "launches": count_launches(call)})


def profile_case(case: Case, repeats: int, result: Result) -> None:
    rows = kernels.rows(case, make(case, "cuda"), repeats, kernels.flush_buffer())
    result["kernels"] += [row._asdict() for row in rows]


def count_bytes(case: Case, peer: str, result: Result) -> None:
    if "traffic" in result["remarks"]:  # it will not work the next time either
        return
    found, reason = traffic.measured(case, peer)
    if reason:
        result["remarks"]["traffic"] = reason
        return
    fields = {"direction": case.direction, "layout": case.layout, "map": case.map, "peer": peer}
    result["traffic"].append({**fields, "formula_bytes": case.bytes_moved, **found})


def remember(name: str, title: str, device: str, result: Result) -> None:
    result["memory"] += [row._asdict() for row in memory.rows(name, title, memory.INPUTS[title], device)]


def remember_backbone(setting: bottleneck.Setting, result: Result) -> None:
    result["memory"] += [row._asdict() for row in memory.rows_of_backbone(setting)]


def time_model(name: str, options: argparse.Namespace, result: Result) -> None:
    try:
        found = models.measured(name, options)
    except ModuleNotFoundError as error:
        result["missing"].append({"case": name, "peer": "whole model", "reason": str(error)})
        return
    for direction, blocks, times in found:
        fields = {"model": name, "direction": direction, "blocks": blocks, "batch": options.batch}
        fields |= {"size": options.size, "layout": options.layout}
        for variant, series in times.items():
            entry = {**fields, "variant": variant, **quantiles(series), "rounds": len(series)}
            result["models"].append(entry)


# --- the plan ---


def cases_of(device: str, quick: bool) -> tuple[list[Case], list[Case]]:
    """The headline, and more where there is time; each in order of importance."""

    def some(
        stages: dict[str, tuple[int, int, int]],
        batch: int,
        ratio: float = 1 / 16,
        dtype: str = "float32",
        fusion: str = "add",
        directions: Sequence[str] = DIRECTIONS,
    ) -> list[Case]:
        return grid(stages, [batch], list(LAYOUTS), [dtype], [ratio], [fusion], directions)

    if quick:  # the slowest last: should there be no time for all of them, each direction has some
        cases = some(DETECTION, 2 if device == "cuda" else 1)
        return sorted(cases, key=lambda case: case.size[0], reverse=True), []
    # What was published is at these: both ratios, batch 2 in training and 1 in inference
    more = some(DETECTION, 1) + some(DETECTION, 2, 1 / 4) + some(DETECTION, 1, 1 / 4, directions=[FORWARD])
    more += some(IMAGENET, IMAGENET_BATCH)
    if device == "cuda":
        more += some(DETECTION, 2, dtype="float16") + some(DETECTION, 8) + some(DETECTION, 2, fusion="both")
    else:
        more += some(DETECTION, 2, dtype="bfloat16")
    return some(DETECTION, 2), more


def model_options(device: str, quick: bool) -> argparse.Namespace:
    small = device == "cpu"
    return argparse.Namespace(
        device=device,
        layout="channels_last",
        batch=(1 if quick else 2) if small else 32,
        size=224,
        seconds=0.2 if quick else 0.5,
        rounds=3 if quick and small else 5 if small else 15,
        directions=models.DIRECTIONS,
        compile=False,
    )


def plan(settings: Settings, quick: bool) -> list[Step]:
    """Everything for a device, in order of importance but for what spoils the timing, which comes last."""
    device = settings.device
    headline, more = cases_of(device, quick)
    steps = [
        Step(section, case.name, lambda result, case=case: time_case(case, settings, result))
        for section, cases in (("times", headline), ("more times", more))
        for case in cases
    ]
    for name in memory.NETS[: 1 if quick else None]:
        for title in memory.INPUTS:
            work = lambda result, name=name, title=title: remember(name, title, device, result)  # noqa: E731
            steps.append(Step("memory", f"memory of {name}, {title}", work))
    if device == "cpu":  # where tails are one operation
        for setting in bottleneck.SETTINGS[: 1 if quick else None]:
            work = lambda result, setting=setting: remember_backbone(setting, result)  # noqa: E731
            steps.append(Step("memory", f"memory of {setting.name}", work))
    options = model_options(device, quick)
    chosen = list(models.MODELS)
    if quick:
        chosen = [chosen[0]] if device == "cpu" else [chosen[0], chosen[2]]
    for name in chosen:
        work = lambda result, name=name: time_model(name, options, result)  # noqa: E731
        steps.append(Step("models", name, work))
    if device == "cuda":
        steps += profiling(settings, [case for case in headline if case.stage in DETECTION], quick)
    order = list(GUESSES)
    if device == "cpu":  # where it is accounting alone, and takes no time
        order.insert(0, order.pop(order.index("memory")))
    return sorted(steps, key=lambda step: order.index(step.section))


def profiling(settings: Settings, cases: list[Case], quick: bool) -> list[Step]:
    one = [case for case in cases if case.stage == "c4"]
    steps = [
        Step("launches", f"launches of {case.name}", lambda r, case=case: count_case(case, settings, r))
        for case in one
    ]
    for case in cases if not quick else one:
        if case.direction == TRAINING:
            work = lambda result, case=case: profile_case(case, 10 if quick else 20, result)  # noqa: E731
            steps.append(Step("kernels", f"kernels of {case.name}", work))
    for case in [] if quick else [case for case in cases if case.stage == "c3"]:
        for peer in (OURS, EAGER, COMPILED):
            work = lambda result, case=case, peer=peer: count_bytes(case, peer, result)  # noqa: E731
            steps.append(Step("traffic", f"DRAM bytes of {peer}, {case.name}", work))
    return steps


def run(steps: list[Step], result: Result, limit: float, save: Callable[[Result], None]) -> None:
    """As many steps as fit into the limit, in seconds; the result is saved after each."""
    begun = time.perf_counter()
    profiled = any(step.section in PROFILED for step in steps)
    share = {section: 1 - PROFILING_SHARE * (profiled and section not in PROFILED) for section in GUESSES}
    deadlines: dict[str, Deadline] = {}
    over: set[str] = set()
    with Progress(len(steps)) as progress:
        for step in steps:
            section = step.section
            if section not in deadlines:
                deadlines[section] = Deadline(begun + share[section] * limit, GUESSES[section])
            if section in over or deadlines[section].is_near():
                over.add(section)
                result["left_out"].append(step.name)
                continue
            progress.begin(step.name)
            try:
                step.work(result)
            except Exception as error:  # no memory, say: the rest goes on, and the run fails at its end
                result["wrong"].append(f"{step.name}: {type(error).__name__}: {first_line(error)}")
            if torch.cuda.is_available():
                gc.collect()  # graphs and compiled functions hold memory in cycles
                torch.cuda.empty_cache()
            save(result)
