"""Puts what bench/latency.py measured into a table for the terminal, Markdown, JSON and a picture."""

from __future__ import annotations

import json
import platform
import re
import sys
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """One peer at one feature map; the ratios are between medians of the same run."""

    stage: str
    shape: list[int]
    layout: str
    peer: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int
    of_eager: float | None
    gigabytes_per_second: float
    of_copy: float
    of_clone: float
    error: float
    allowed_error: float


# Title, text of a row
COLUMNS = (
    ("map", lambda row: f"{row.stage} {'x'.join(map(str, row.shape))}"),
    ("layout", lambda row: row.layout),
    ("peer", lambda row: row.peer),
    ("ms p50", lambda row: f"{row.p50_ms:.3f}"),
    ("speed-up", lambda row: "n/a" if row.of_eager is None else f"{1 / row.of_eager:.2f}"),
    ("GB/s", lambda row: f"{row.gigabytes_per_second:.1f}"),
    ("/ copy_", lambda row: f"{row.of_copy:.2f}"),
    ("/ clone", lambda row: f"{row.of_clone:.2f}"),
)
LEFT_ALIGNED = 3
LEGEND = (
    "speed-up: eager's time over this one's. GB/s: 3 passes over x (read, read, write) in the time taken. "
    "/ copy_, / clone: this time over that of y.copy_(x) and of x.clone()."
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
            self._bar = tqdm(total=steps, unit="map", file=sys.stderr)

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


def _cells(rows: list[Row]) -> list[list[str]]:
    return [[text(row) for _, text in COLUMNS] for row in rows]


def terminal(header: dict[str, str], rows: list[Row], missing: dict[str, str]) -> str:
    """An aligned table, with a blank line between feature maps."""
    titles, cells = [title for title, _ in COLUMNS], _cells(rows)
    widths = [max(map(len, column)) for column in zip(titles, *cells)]

    def line(texts: list[str]) -> str:
        return "  ".join(
            text.ljust(width) if i < LEFT_ALIGNED else text.rjust(width)
            for i, (text, width) in enumerate(zip(texts, widths))
        ).rstrip()

    lines = [f"{name + ':':10}{value}" for name, value in header.items()]
    lines += ["", line(titles), "-" * len(line(titles))]
    for i, (row, texts) in enumerate(zip(rows, cells)):
        if i and (row.stage, row.layout) != (rows[i - 1].stage, rows[i - 1].layout):
            lines.append("")
        lines.append(line(texts))
    lines += ["", LEGEND, *(f"n/a: {what}: {reason}" for what, reason in missing.items())]
    return "\n".join(lines)


def markdown(header: dict[str, str], rows: list[Row], missing: dict[str, str]) -> str:
    """The same for a file."""
    lines = [f"# Forward pass of a context block on {header['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in header.items()]
    lines += ["", "| " + " | ".join(title for title, _ in COLUMNS) + " |"]
    lines += ["|" + "|".join("---" if i < LEFT_ALIGNED else "--:" for i in range(len(COLUMNS))) + "|"]
    lines += ["| " + " | ".join(texts) + " |" for texts in _cells(rows)]
    lines += ["", LEGEND]
    if missing:
        lines += ["", *(f"- n/a: {what}: {reason}" for what, reason in missing.items())]
    return "\n".join(lines) + "\n"


def write(folder: Path, header: dict[str, str], rows: list[Row], missing: dict[str, str]) -> list[Path]:
    """DEVICE.json, DEVICE.md and DEVICE.png; the picture only where there are rows and matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", header["device"].lower()).strip("-")
    as_json, as_markdown, as_picture = (folder / f"{stem}.{ending}" for ending in ("json", "md", "png"))
    content = {"header": header, "rows": [row._asdict() for row in rows], "missing": missing}
    as_json.write_text(json.dumps(content, indent=1) + "\n")
    as_markdown.write_text(markdown(header, rows, missing))
    return [as_json, as_markdown, *([as_picture] if rows and picture(as_picture, header, rows) else [])]


def picture(path: Path, header: dict[str, str], rows: list[Row]) -> bool:
    """Bars of milliseconds, a panel for each layout; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    layouts, peers, stages = (
        list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("layout", "peer", "stage")
    )
    shapes = {row.stage: "x".join(map(str, row.shape)) for row in rows}
    colours = dict(zip(peers, ("#d1495b", "#8d99ae", "#2e86ab", "#66a182")))
    figure, panels = pyplot.subplots(
        1, len(layouts), figsize=(5.5 * len(layouts), 5), sharey=True, squeeze=False, layout="constrained"
    )
    width = 0.8 / len(peers)
    for panel, layout in zip(panels[0], layouts):
        for k, peer in enumerate(peers):
            for row in rows:
                if (row.layout, row.peer) != (layout, peer):
                    continue
                at = stages.index(row.stage) + (k - (len(peers) - 1) / 2) * width
                spread = [[row.p50_ms - row.p20_ms], [row.p80_ms - row.p50_ms]]
                panel.bar(at, row.p50_ms, width, color=colours[peer], yerr=spread, ecolor="#444444")
                speed_up = "" if row.of_eager is None else f"{1 / row.of_eager:.1f}×"
                panel.annotate(
                    speed_up, (at, row.p80_ms), (0, 3), textcoords="offset points", ha="center", size=8
                )
        for i, stage in enumerate(stages):
            clone = [r.p50_ms / r.of_clone for r in rows if (r.stage, r.layout) == (stage, layout)]
            if clone:
                panel.hlines(clone[0], i - 0.45, i + 0.45, colors="black", linestyles="dotted")
        panel.set_title(layout)
        panel.set_xticks(range(len(stages)), [f"{stage}\n{shapes[stage]}" for stage in stages])
        panel.set_xlabel("feature map, N×C×H×W")
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
    panels[0][0].set_ylabel("forward pass, ms (median, 20th to 80th percentile)")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[peer]) for peer in peers]
    handles.append(pyplot.Line2D([], [], color="black", linestyle="dotted"))
    panels[0][-1].legend(handles, [*peers, "x.clone()"], frameon=False)
    figure.suptitle(
        f"{header['device']}, torch {header['torch']}\n{header['input']}; n× is the speed-up over eager"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
