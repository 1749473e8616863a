"""Puts what bench/latency.py measured into a table for the terminal, Markdown and JSON."""

from __future__ import annotations

import itertools
import json
import platform
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

WIDTH = 110


class Row(NamedTuple):
    """One peer in one case; the ratios are between medians of the same run."""

    group: str
    direction: str
    dtype: str
    ratio: float
    fusion: str
    stage: str
    shape: list[int]
    layout: str
    peer: str
    launch: str  # "stream" or "graph"; the ratios are among the peers that are launched alike
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int
    host_us: float | None  # until a call returns, on a GPU
    of_eager: float | None
    passes: int
    gigabytes_per_second: float
    of_copy: float
    of_clone: float
    launches: int | None
    worst_quantity: str
    error: float
    allowed_error: float


class Missing(NamedTuple):
    """A peer that was not timed in a case."""

    case: str
    peer: str
    reason: str


class Results(NamedTuple):
    """Of a whole run."""

    header: dict[str, str]
    rows: list[Row]
    missing: list[Missing]
    left_out: list[str]  # cases that there was no time for
    cases: int  # asked for


# Title, text of a row; those of HOST_COLUMNS are there where the host was timed
COLUMNS = (
    ("map", lambda row: f"{row.stage} {'x'.join(map(str, row.shape))}"),
    ("layout", lambda row: row.layout),
    ("peer", lambda row: row.peer),
    ("by", lambda row: row.launch),
    ("ms p50", lambda row: f"{row.p50_ms:.3f}"),
    ("host µs", lambda row: "-" if row.host_us is None else f"{row.host_us:.1f}"),
    ("speed-up", lambda row: "n/a" if row.of_eager is None else f"{1 / row.of_eager:.2f}"),
    ("GB/s", lambda row: f"{row.gigabytes_per_second:.1f}"),
    ("/ copy_", lambda row: f"{row.of_copy:.2f}"),
    ("/ clone", lambda row: f"{row.of_clone:.2f}"),
    ("launches", lambda row: "-" if row.launches is None else str(row.launches)),
)
HOST_COLUMNS = ("by", "host µs")
LEFT_ALIGNED = ("map", "layout", "peer", "by")
LEGEND = (
    "speed-up: eager's time over this one's. GB/s: the passes over x that a block needs at least, in the "
    "time taken. / copy_, / clone: this time over that of y.copy_(x) and of x.clone(). launches: kernels, "
    "memsets and memcpys of one call on a GPU."
)
HOST_LEGEND = (
    "by: on the plain stream, or, at batch 1 and 2, replayed as a CUDA graph; the ratios are among those "
    "that are launched alike. host µs: how long a call keeps the host busy, until it returns, on an idle GPU."
)


def cpu_name() -> str:
    """The processor's model name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


class Progress:
    """A progress bar on stderr; where tqdm is missing, a line for each step."""

    def __init__(self, steps: int) -> None:
        self._steps, self._begun = steps, 0
        try:
            from tqdm import tqdm
        except ImportError:
            self._bar = None
        else:
            self._bar = tqdm(total=steps, unit="case", file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def begin(self, name: str) -> None:
        """The step before is done, and this one begins."""
        if self._bar is None:
            print(f"{self._begun + 1} of {self._steps}: {name}", file=sys.stderr)
        else:
            self._bar.update(min(self._begun, 1))
            self._bar.set_description(name)
        self._begun += 1

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.update(min(self._begun, 1) if exception[0] is None else 0)
            self._bar.close()


def _sections(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Title and rows of each group."""
    for group, members in itertools.groupby(rows, key=lambda row: row.group):
        section = list(members)
        yield f"{group} ({section[0].passes} passes over x)", section


def _titles(results: Results) -> list[str]:
    """Of the columns that there is something in."""
    with_host = any(row.host_us is not None for row in results.rows)
    return [title for title, _ in COLUMNS if with_host or title not in HOST_COLUMNS]


def _cells(rows: list[Row], titles: list[str]) -> list[list[str]]:
    return [[text(row) for title, text in COLUMNS if title in titles] for row in rows]


def _legend(titles: list[str]) -> str:
    return f"{LEGEND} {HOST_LEGEND}" if "host µs" in titles else LEGEND


def remarks(results: Results) -> list[str]:
    """What is missing, and why: said once where it holds for every case."""
    lines = []
    ran = results.cases - len(results.left_out)
    by_reason: dict[tuple[str, str], list[str]] = {}
    for case, peer, reason in results.missing:
        by_reason.setdefault((peer, reason), []).append(case)
    for (peer, reason), cases in by_reason.items():
        where = "every case" if len(cases) == ran else "; ".join(cases)
        lines.append(f"n/a: {peer}: {reason}: {where}")
    if results.left_out:
        by_group: dict[str, list[str]] = {}
        for name in results.left_out:
            which, _, group = name.partition(", ")
            by_group.setdefault(group, []).append(which)
        lines.append(f"LEFT OUT, no time: {len(results.left_out)} of {results.cases} cases:")
        begun = {row.group for row in results.rows}
        for group, which in by_group.items():
            lines.append(f"{group}: {', '.join(which) if group in begun else 'every map'}")
    return lines


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def terminal(results: Results) -> str:
    """Aligned tables, one for each group; a map, its layout and a blank line only where a new one begins."""
    titles = _titles(results)
    widths = [max(map(len, column)) for column in zip(titles, *_cells(results.rows, titles))]

    def line(texts: list[str]) -> str:
        return "  ".join(
            text.ljust(width) if title in LEFT_ALIGNED else text.rjust(width)
            for title, text, width in zip(titles, texts, widths)
        ).rstrip()

    lines = []
    for name, value in results.header.items():
        lines += _wrapped(f"{name + ':':10}{value}", " " * 10)
    for title, rows in _sections(results.rows):
        lines += ["", title, line(titles), "-" * len(line(titles))]
        before = None
        for texts in _cells(rows, titles):
            which = texts[:2]
            if which == before:
                texts[:2] = ["", ""]
            elif before is not None:
                lines.append("")
            lines.append(line(texts))
            before = which
    lines.append("")
    for remark in [_legend(titles), *remarks(results)]:
        lines += _wrapped(remark, "  ")
    return "\n".join(lines)


def markdown(results: Results) -> str:
    """The same for a file."""
    lines = [f"# Latency of a context block on {results.header['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in results.header.items()]
    titles = _titles(results)
    for section, rows in _sections(results.rows):
        lines += ["", f"## {section}", "", "| " + " | ".join(titles) + " |"]
        lines += ["|" + "|".join("---" if title in LEFT_ALIGNED else "--:" for title in titles) + "|"]
        lines += ["| " + " | ".join(texts) + " |" for texts in _cells(rows, titles)]
    lines += ["", _legend(titles)]
    found = remarks(results)
    if found:
        lines += ["", *(f"- {remark}" for remark in found)]
    return "\n".join(lines) + "\n"


def write(folder: Path, results: Results) -> list[Path]:
    """DEVICE.json and DEVICE.md."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", results.header["device"].lower()).strip("-")
    as_json, as_markdown = (folder / f"{stem}.{ending}" for ending in ("json", "md"))
    content = {
        "header": results.header,
        "rows": [row._asdict() for row in results.rows],
        "missing": [missing._asdict() for missing in results.missing],
        "left_out": results.left_out,
        "cases": results.cases,
    }
    as_json.write_text(json.dumps(content, indent=1) + "\n")
    as_markdown.write_text(markdown(results))
    return [as_json, as_markdown]
