"""Draws what bench/latency.py measured: how many copies of x a block's time is worth."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from tables import Results, Row

COLOURS = ("#c1121f", "#6c757d", "#1d6fa5", "#588157")
MARKERS = ("o", "s", "^", "D")


def draw(path: Path, results: Results) -> bool:
    """A panel for each direction and layout; the first dtype, ratio, fusion and way of launching.

    False without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    first = results.rows[0]
    rows = [
        r
        for r in results.rows
        if (r.dtype, r.ratio, r.fusion, r.launch) == (first.dtype, first.ratio, first.fusion, first.launch)
    ]
    directions, layouts, peers = (
        list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("direction", "layout", "peer")
    )
    maps = list(dict.fromkeys((row.stage, *row.shape) for row in rows))
    columns = len(layouts) if len(maps) <= 8 else 1  # wide panels go below one another
    lines = len(directions) * len(layouts) // columns
    figure, panels = pyplot.subplots(
        lines,
        columns,
        figsize=(max(8.5, (0.95 * len(maps) + 0.8) * columns), 3.5 * lines + 1.3),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, (direction, layout) in zip(panels.flat, itertools.product(directions, layouts)):
        panel.set_yscale("log", base=2)
        _fill(panel, [r for r in rows if (r.direction, r.layout) == (direction, layout)], maps, peers)
        panel.set_title(f"{direction}, {layout}")
        panel.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        panel.margins(y=0.12)
        panel.grid(axis="y", alpha=0.3)
    for panel in panels[:, 0]:
        panel.set_ylabel("time / time of y.copy_(x)")
    for panel in panels[-1]:
        panel.set_xticks(range(len(maps)), [f"{s}\n{n}×{c}\n×{h}×{w}" for s, n, c, h, w in maps], size=8)
        panel.set_xlim(-0.6, len(maps) - 0.4)
        panel.set_xlabel("feature map, N×C×H×W")
    handles = [
        pyplot.Line2D([], [], color=colour, marker=marker, linestyle="none", label=peer)
        for peer, colour, marker in zip(peers, COLOURS, MARKERS)
    ]
    handles.append(
        pyplot.Line2D([], [], color="black", linestyle="dotted", label="least passes over x (a copy is 2)")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    header = results.header
    figure.suptitle(
        f"{header['device']}, torch {header['torch']}\n"
        f"{first.group.partition(', ')[2]}; medians, 20th to 80th percentile; n× is faster than eager",
        size=11,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _fill(panel: Any, rows: list[Row], maps: list[tuple[Any, ...]], peers: list[str]) -> None:
    """The marks of one panel, the peers side by side on each map."""
    for row in rows:
        k = peers.index(row.peer)
        at = maps.index((row.stage, *row.shape)) + 0.22 * (k - (len(peers) - 1) / 2)
        low, high = (row.of_copy * end / row.p50_ms for end in (row.p20_ms, row.p80_ms))
        panel.vlines(at, low, high, colors=COLOURS[k], alpha=0.6)
        panel.plot(at, row.of_copy, color=COLOURS[k], marker=MARKERS[k], markersize=6)
        if k == 0 and row.of_eager is not None:
            panel.annotate(
                f"{1 / row.of_eager:.1f}×",
                (at, low),
                (0, -6),
                textcoords="offset points",
                ha="center",
                va="top",
                size=8,
                color=COLOURS[k],
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
    if rows:
        panel.axhline(rows[0].passes / 2, color="black", linestyle="dotted", linewidth=1)
