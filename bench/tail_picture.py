"""Draws what bench/tail.py measured: the time of each tail over that of the plain one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import TRAINING

# Colour and hatch, in the order of the names
LOOKS = (
    ("#56B4E9", "///"),
    ("#F0E442", "..."),
    ("#D55E00", ""),
    ("#CC79A7", "xxx"),
    ("#0072B2", "\\\\"),
    ("white", ""),
)


def draw(path: Path, header: dict[str, str], samples: Sequence[Any], names: Sequence[str]) -> bool:
    """Forward and backward in the first layout, the limits dotted; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    layout = samples[0].layout
    shown = [s for s in samples if (s.direction, s.layout) == (TRAINING, layout)]
    threads = list(dict.fromkeys(s.threads for s in shown))
    modes = list(dict.fromkeys(s.statistics for s in shown))
    figure, panels = pyplot.subplots(
        len(modes), len(threads), figsize=(max(8.0, 6.0 * len(threads)), 3.2 * len(modes) + 1),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for i, mode in enumerate(modes):
        for j, count in enumerate(threads):
            here = [s for s in shown if (s.threads, s.statistics) == (count, mode)]
            _fill(panels[i][j], here, names)
            panels[i][j].set_title(f"statistics {mode}, {count} thread{'s' * (count > 1)}", size=10)
    for panel in panels[:, 0]:
        panel.set_ylabel("time / plain tail")
    handles: dict[str, Any] = {}
    for panel in panels.flat:
        handles |= {name: handle for handle, name in zip(*panel.get_legend_handles_labels())}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles), frameon=False,
        fontsize=8,
    )  # fmt: skip
    what = f"The tail of a bottleneck, forward and backward, float32, {layout}; dotted: what is promised"
    figure.suptitle(f"{what}\n{header['device']}, torch {header['torch']}", size=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _fill(panel: Any, here: list[Any], names: Sequence[str]) -> None:
    """The bars of one panel, side by side on each map."""
    width = 0.8 / len(names)
    for k, (name, (colour, hatch)) in enumerate(zip(names, LOOKS)):
        there = [n for n, s in enumerate(here) if name in s.ms]
        if not there:
            continue
        bars = panel.bar(
            [n + (k - (len(names) - 1) / 2) * width for n in there], [here[n].ratio(name) for n in there],
            width, label=name, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6,
        )  # fmt: skip
        panel.bar_label(bars, fmt="%.2f", size=6)
    panel.axhline(1, color="black", linewidth=1)
    for n, s in enumerate(here):
        if s.line is not None:
            panel.hlines(s.line, n - 0.45, n + 0.45, color="black", linestyle="dotted")
    panel.set_xticks(range(len(here)), [s.stage for s in here])
