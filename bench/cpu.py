"""Whether the CPU path runs at the speed of memory: every promise about it as one table, and a picture.

Each promise is a ratio of medians taken side by side in one process: against y.copy_(x), against eager
PyTorch and against torch.compile, at c3, c4 and c5 of a detector and at 7x7 with batch 32, in both memory
formats; of one thread against all, of bfloat16 against float32, and of the cost of a call on a tiny map.
Those that are missed are marked. Beside the times stand those of the bare passes: the reads and writes of x's
size that the block needs, 3 forward and 7 with the backward pass, by PyTorch's own sum, copy_ and add. What a
missed ratio would be at their speed is the limit that memory sets to it where nothing of x stays in a cache.

Two regimes, each in a process of its own. "fresh": glibc's default, by which every output above 32 MiB lies
on pages that the kernel has to clear first, whoever computes it; the limit for the forward pass is then
widened by what x.clone() costs above y.copy_(x). "reused": freed memory is kept, as in a process that has
warmed up with a caching allocator.

Writes DEVICE-cpu.json, .md and .png to --output.
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
import tables
import torch
from cases import FORWARD, LAYOUTS, STAGES, TRAINING, Case, Problem, grid, make
from peers import COMPILED, EAGER, OURS, peers, step
from timing import measure

import gc_cuda

COPY, CLONE = latency.COPY, latency.CLONE
PASSES = "bare passes"
FRESH, REUSED = "fresh", "reused"
LARGE = ("c3", "c4")  # where the bytes decide
SMALL = ("c5", "7x7")
TINY = Case(FORWARD, "add", 1 / 16, "float32", "tiny", (64, 7, 7), 1, "nchw")
SCALING_STAGE = "c3"


class Sample(NamedTuple):
    """Medians in milliseconds of one case, by peer."""

    regime: str
    threads: int
    direction: str
    dtype: str
    stage: str
    shape: list[int]
    layout: str
    ms: dict[str, float]

    @property
    def map(self) -> str:
        return f"{self.stage} {'x'.join(map(str, self.shape))} {self.layout}"


class Promise(NamedTuple):
    """A ratio, and the line that it must stay on the right side of; `limit`: that of the bare passes."""

    regime: str
    what: str
    case: str
    value: float
    line: float
    at_least: bool
    limit: float | None = None

    @property
    def kept(self) -> bool:
        return self.value >= self.line if self.at_least else self.value <= self.line


# --- measuring, in a process of its own ---


def bare_passes(problem: Problem, y: torch.Tensor) -> Callable[[], object]:
    """A call that reads and writes tensors of x's size as often as the block has to (Case.passes), into y."""
    x, grad = problem.x.detach(), problem.grad

    def forward() -> None:
        x.sum()
        y.copy_(x)

    def training() -> None:
        forward()
        grad.sum()
        torch.add(x, grad, out=y)

    return training if problem.training else forward


def cases_of(stages: list[str], dtype: str, directions: list[str]) -> list[Case]:
    sizes = {stage: STAGES[stage] for stage in stages}
    return grid(sizes, [2], list(LAYOUTS), [dtype], [1 / 16], ["add"], directions)


def sample(case: Case, regime: str, wanted: set[str], seconds: float) -> Sample:
    """Times a case side by side; `wanted` are the peers beside ours."""
    problem = make(case, "cpu")
    calls: dict[str, Callable[[], object]] = {}
    if wanted & {EAGER, COMPILED}:
        found, _ = peers(problem, COMPILED in wanted)
        calls |= {name: call for name, call in found.items() if name == OURS or name in wanted}
    else:
        calls[OURS] = step(problem.ours, list(problem.ours.parameters()), problem.x, problem.grad)
    x, y = problem.x.detach(), torch.empty_like(problem.x)
    if COPY in wanted:
        calls |= {COPY: lambda: y.copy_(x), CLONE: x.clone, PASSES: bare_passes(problem, y)}
    times = measure(calls, "cpu", seconds, 15)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Sample(
        regime,
        torch.get_num_threads(),
        case.direction,
        case.dtype,
        case.stage,
        list(case.shape),
        case.layout,
        medians,
    )


def work(regime: str, threads: int, quick: bool, seconds: float) -> list[Sample]:
    """All that one process measures."""
    torch.set_num_threads(threads)
    if regime == REUSED:
        latency.reuse_pages()
    everything = {EAGER, COMPILED, COPY}
    single = threads == 1
    stages = ["c4", "7x7"] if quick else [*LARGE, *SMALL]
    plan: list[tuple[Case, set[str]]] = []
    if single:
        plan += [(case, {COPY}) for case in cases_of([SCALING_STAGE], "float32", [FORWARD, TRAINING])]
    else:
        plan += [(case, everything) for case in cases_of(stages, "float32", [FORWARD])]
        plan += [(case, {EAGER, COPY}) for case in cases_of(stages, "float32", [TRAINING])]
        plan += [(case, {COPY}) for case in cases_of(stages, "bfloat16", [FORWARD, TRAINING])]
        more = [stage for stage in STAGES if stage not in stages] if not quick else []
        plan += [(case, everything) for case in cases_of(more, "float32", [FORWARD])]
        plan += [(TINY, {EAGER}), (TINY._replace(direction=TRAINING), {EAGER})]
    found = []
    with tables.Progress(len(plan)) as progress:
        for case, wanted in plan:
            progress.begin(f"{regime} pages, {threads} threads: {case.map} {case.layout}, {case.direction}")
            found.append(sample(case, regime, wanted, seconds))
    return found


def run_worker(regime: str, threads: int, arguments: argparse.Namespace) -> list[Sample]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.json"
        command = [sys.executable, __file__, "--worker", regime, str(threads), str(path)]
        command += ["--seconds", str(arguments.seconds)] + ["--quick"] * arguments.quick
        subprocess.run(command, check=True)
        return [Sample(**entry) for entry in json.loads(path.read_text())]


# --- what was promised ---


def promises(samples: list[Sample]) -> list[Promise]:
    found = []
    most = max(s.threads for s in samples)
    for s in samples:
        if s.stage == TINY.stage:
            found.append(
                Promise(
                    s.regime,
                    f"{s.direction} of a tiny map / eager",
                    s.map,
                    s.ms[OURS] / s.ms[EAGER],
                    1,
                    False,
                )
            )
        elif s.threads == most and s.dtype == "float32" and s.stage in (*LARGE, *SMALL):
            found += of_full_size(s)
    of = {(s.regime, s.threads, s.direction, s.dtype, s.stage, s.layout): s for s in samples}
    for s in samples:
        key = (s.regime, s.threads, s.direction, "float32", s.stage, s.layout)
        if s.dtype == "bfloat16" and key in of:
            ratio = s.ms[OURS] / of[key].ms[OURS]
            found.append(Promise(s.regime, f"{s.direction}, bfloat16 / float32", s.map, ratio, 1, False))
        all_threads = (s.regime, most, *key[2:])
        if s.threads == 1 and most > 1 and all_threads in of:
            gain, limit = (s.ms[name] / of[all_threads].ms[name] for name in (OURS, PASSES))
            line = 1.7 if most == 2 else 1.0
            what = f"{s.direction}, 1 -> {most} threads"
            found.append(Promise(s.regime, what, s.map, gain, line, True, limit))
    return sorted(found, key=lambda p: (p.regime, p.what))


def of_full_size(s: Sample) -> list[Promise]:
    large = s.stage in LARGE
    ours, eager = s.ms[OURS], s.ms[EAGER]
    if s.direction == TRAINING:
        line = 8.0 if large else 5.0
        limit = eager / s.ms[PASSES]
        return [Promise(s.regime, "forward+backward, eager / ours", s.map, eager / ours, line, True, limit)]
    times = 1.6 if large else 3.0
    extra = max(0.0, s.ms[CLONE] - s.ms[COPY]) if s.regime == FRESH else 0.0
    limit = times * s.ms[COPY] + extra
    found = [
        Promise(
            s.regime,
            "forward / copy" + (" and fresh pages" * (s.regime == FRESH)),
            s.map,
            ours / (limit / times),
            times,
            False,
            s.ms[PASSES] / (limit / times),
        ),
        Promise(
            s.regime,
            "forward, eager / ours",
            s.map,
            eager / ours,
            3.5 if large else 2.5,
            True,
            eager / s.ms[PASSES],
        ),
    ]
    if COMPILED in s.ms and large:
        found.append(
            Promise(
                s.regime,
                "forward, torch.compile / ours",
                s.map,
                s.ms[COMPILED] / ours,
                2.5,
                True,
                s.ms[COMPILED] / s.ms[PASSES],
            )
        )
    return found


# --- telling it ---


def table(found: list[Promise]) -> list[list[str]]:
    rows = []
    for p in found:
        relation = "≥" if p.at_least else "≤"
        limit = "" if p.limit is None else f"{p.limit:.2f}"
        kept = "" if p.kept else "MISSED"
        rows.append([p.regime, p.what, p.case, f"{p.value:.2f}", f"{relation} {p.line:g}", kept, limit])
    return rows


TITLES = ["pages", "ratio", "map", "measured", "line", "", "bare passes"]


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(TITLES, *rows)]
    lines = ["  ".join(t.ljust(w) for t, w in zip(row, widths)).rstrip() for row in [TITLES, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def times_table(samples: list[Sample]) -> list[str]:
    """Milliseconds, in Markdown."""
    names = [OURS, EAGER, COMPILED, PASSES, COPY, CLONE]
    lines = ["| pages | threads | direction | dtype | map | " + " | ".join(names) + " |"]
    lines.append("|" + "---|" * 5 + "--:|" * len(names))
    for s in samples:
        cells = [f"{s.ms[name]:.3f}" if name in s.ms else "" for name in names]
        first = [s.regime, str(s.threads), s.direction, s.dtype, s.map]
        lines.append("| " + " | ".join([*first, *cells]) + " |")
    return lines


def describe() -> dict[str, str]:
    described = {
        "device": tables.cpu_name(),
        "torch": f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()})",
        "gc_cuda": gc_cuda.__version__,
        "threads": f"1 and {torch.get_num_threads()}",
        "block": "ContextBlock, att, channel_add, ratio 1/16; batch 2, 32 for 7x7",
    }
    return described


def write(folder: Path, header: dict[str, str], samples: list[Sample], found: list[Promise]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", header["device"].lower()).strip("-") + "-cpu"
    as_json, as_markdown, as_picture = (folder / f"{stem}.{ending}" for ending in ("json", "md", "png"))
    content: dict[str, Any] = {"header": header, "samples": [s._asdict() for s in samples]}
    content["promises"] = [p._asdict() | {"kept": p.kept} for p in found]
    as_json.write_text(json.dumps(content, indent=1) + "\n")
    lines = [f"# The CPU path on {header['device']}", "", *(f"- {k}: {v}" for k, v in header.items()), ""]
    lines += ["| " + " | ".join(TITLES) + " |", "|" + "---|" * len(TITLES)]
    lines += ["| " + " | ".join(row) + " |" for row in table(found)]
    lines += ["", "## Milliseconds (medians)", "", *times_table(samples)]
    as_markdown.write_text("\n".join(lines) + "\n")
    return [as_json, as_markdown] + ([as_picture] if draw(as_picture, header, samples) else [])


def draw(path: Path, header: dict[str, str], samples: list[Sample]) -> bool:
    """Time over size, forward, with the limit of memory; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    most = max(s.threads for s in samples)
    rows = [s for s in samples if s.threads == most and s.dtype == "float32" and s.direction == FORWARD]
    rows = [s for s in rows if s.stage != TINY.stage]
    regimes = list(dict.fromkeys(s.regime for s in rows))
    figure, panels = pyplot.subplots(
        len(regimes),
        len(LAYOUTS),
        figsize=(11, 4.2 * len(regimes) + 0.8),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    styles = {
        OURS: ("#c1121f", "o"),
        EAGER: ("#6c757d", "s"),
        COMPILED: ("#1d6fa5", "^"),
        COPY: ("black", "_"),
    }
    for i, regime in enumerate(regimes):
        for j, layout in enumerate(LAYOUTS):
            panel = panels[i][j]
            mine = [s for s in rows if (s.regime, s.layout) == (regime, layout)]
            mine.sort(key=lambda s: torch.Size(s.shape).numel())
            mib = [torch.Size(s.shape).numel() * 4 / 2**20 for s in mine]
            for name, (colour, marker) in styles.items():
                points = [(m, s.ms[name]) for m, s in zip(mib, mine) if name in s.ms]
                label = "memory limit: y.copy_(x)" if name == COPY else name
                panel.plot(
                    *zip(*points),
                    color=colour,
                    marker=marker,
                    label=label,
                    linestyle="dotted" if name == COPY else "-",
                )
            for m, s in zip(mib, mine):
                panel.annotate(
                    s.stage, (m, s.ms[OURS]), (0, -12), textcoords="offset points", ha="center", size=8
                )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            panel.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            panel.grid(alpha=0.3)
            panel.set_title(f"{layout}, {regime} output pages")
    for panel in panels[:, 0]:
        panel.set_ylabel("milliseconds")
    for panel in panels[-1]:
        panel.set_xlabel("MiB of x")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(
        f"Context block, forward, float32, {most} threads: {header['device']}, torch {header['torch']}"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def main() -> int:
    """Run everything; 1 if a promise is missed and --strict is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="c4 and 7x7 only")
    parser.add_argument("--seconds", type=float, default=1.5, help="of timing for each case")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a promise is missed")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parents[1] / "build" / "bench", metavar="DIR"
    )
    parser.add_argument("--worker", nargs=3, metavar=("REGIME", "THREADS", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        regime, threads, path = arguments.worker
        samples = work(regime, int(threads), arguments.quick, arguments.seconds)
        Path(path).write_text(json.dumps([s._asdict() for s in samples]))
        return 0
    header = describe()
    samples = []
    for regime in (FRESH, REUSED):
        for threads in dict.fromkeys((torch.get_num_threads(), 1)):
            samples += run_worker(regime, threads, arguments)
    found = promises(samples)
    print("\n".join(f"{name + ':':9}{value}" for name, value in header.items()), end="\n\n")
    print(aligned(table(found)))
    missed = sum(not p.kept for p in found)
    print(f"\n{len(found) - missed} of {len(found)} promises kept")
    for path in write(arguments.output, header, samples, found):
        print(f"wrote {path}")
    return 1 if missed and arguments.strict else 0


if __name__ == "__main__":
    sys.exit(main())
