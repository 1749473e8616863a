"""The pictures of a result. Lines and bars differ by marker, dash or hatch, too: they can be read in grey."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from formulas import PASSES
from memory import NETS
from models import BARE, BLOCK, FUSED, PLAIN
from peers import COMPILED, EAGER, OURS
from samples import LIMIT, STREAM, comparisons, headline, samples_of, setting_text

# Okabe and Ito's colours, which the colour-blind can tell apart: colour, marker, dash, hatch
LOOKS = {
    OURS: ("#D55E00", "o", "-", ""),
    EAGER: ("#56B4E9", "s", "--", "///"),
    COMPILED: ("#0072B2", "^", "-.", "..."),
    LIMIT: ("black", "_", ":", ""),
}
LABELS = {LIMIT: "limit: a copy of as many bytes"}
VARIANTS = {
    BARE: ("no GC blocks", "white", ""),
    PLAIN: ("eager blocks", "#56B4E9", "///"),
    BLOCK: (f"{OURS}, blocks only", "#F0E442", "..."),
    FUSED: (OURS, "#D55E00", ""),
}
Result = dict[str, Any]


def title_of(result: Result, what: str) -> str:
    device, versions = result["device"], result["versions"]
    return f"{what}\n{device['name']}, torch {versions['torch']}, {result['date'][:10]}"


def times(result: Result, cache: str) -> Any | None:
    """Time over the size of x, a panel for each direction and layout."""
    from matplotlib import ticker

    found = [s for s in headline(samples_of(result)) if (s.cache, s.launch) == (cache, STREAM)]
    found = [s for s in found if s.peer in LOOKS]
    if not found:
        return None
    figure, panels, places = _panels(found, sharex=True)
    for panel, (direction, layout) in zip(panels.flat, places):
        here = [s for s in found if (s.direction, s.layout) == (direction, layout)]
        for peer, (colour, marker, dash, _) in LOOKS.items():
            points = sorted((s.mib, s.p50_ms) for s in here if s.peer == peer)
            if points:
                label = LABELS.get(peer, peer)
                panel.plot(*zip(*points), color=colour, marker=marker, linestyle=dash, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        low, high = panel.get_ylim()
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
        panel.yaxis.set_minor_locator(ticker.NullLocator())
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        panel.margins(x=0.12, y=0.1)
        low = panel.get_ylim()[0]
        stages = {s.mib: s.stage for s in here}
        for mib, stage in stages.items():
            panel.annotate(
                stage, (mib, 0), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="center", va="bottom", size=8, color="#444444",
            )  # fmt: skip
        panel.set_ylim(low / 1.25)
        panel.grid(alpha=0.3)
        panel.set_title(f"{direction}, {layout}", size=10)
    for panel in panels[:, 0]:
        panel.set_ylabel("milliseconds")
    for panel in panels[-1]:
        panel.set_xlabel("MiB of x (the feature map)")
    what = f"Time of a context block: {setting_text(found[0].setting)}, {cache} cache, medians"
    return _finished(figure, title_of(result, what), panels.flat[0])


def shares(result: Result, cache: str) -> Any | None:
    """Achieved share of the limit, by map."""
    found = [s for s in headline(samples_of(result)) if (s.cache, s.launch) == (cache, STREAM)]
    if not any(s.peer == LIMIT for s in found):
        return None
    figure, panels, places = _panels(found, sharex=False)
    for panel, (direction, layout) in zip(panels.flat, places):
        rows = comparisons(found, direction=direction, layout=layout)
        _bars(
            panel,
            ["{}\n{}×{}\n×{}×{}".format(row.any.stage, *row.any.shape) for row in rows],
            {
                peer: [100 * (row.share(peer) or 0) for row in rows]
                for peer in (EAGER, COMPILED, OURS)
                if any(row.share(peer) for row in rows)
            },
            {peer: (peer, colour, hatch) for peer, (colour, _, _, hatch) in LOOKS.items()},
            "{:.0f}",
        )
        panel.axhline(100, color="black", linestyle=":")
        panel.set_title(f"{direction}, {layout}", size=10)
    for panel in panels[:, 0]:
        panel.set_ylabel("% of the limit (a copy of as many bytes)")
    top = max(panel.get_ylim()[1] for panel in panels.flat)
    for panel in panels.flat:
        panel.set_ylim(0, max(110, top))
    what = f"Share of the memory's limit: {setting_text(found[0].setting)}, {cache} cache, medians"
    return _finished(figure, title_of(result, what), panels.flat[0])


def passes(result: Result) -> Any:
    """Passes over x by the formula, and launches where they were counted."""
    launches: dict[tuple[str, str], dict[str, int]] = {}
    for row in result["launches"]:
        launches.setdefault((row["direction"], row["layout"]), {})[row["peer"]] = row["launches"]
    figure, panels = _figure(1, 1 + bool(launches), (5.2, 4.6))
    places = list(itertools.product(("forward", "forward+backward"), ("nchw", "channels_last")))
    looks = {peer: (peer, colour, hatch) for peer, (colour, _, _, hatch) in LOOKS.items()}
    names = [f"{direction}\n{layout}" for direction, layout in places]
    counted = {peer: [PASSES[peer][place] for place in places] for peer in (EAGER, COMPILED, OURS)}
    _bars(panels[0][0], names, counted, looks, "{:.0f}")
    panels[0][0].set_ylabel("passes over a tensor of x's size")
    panels[0][0].set_title("Reads and writes of x, by the formula", size=10)
    if launches:
        peers = [
            peer for peer in (EAGER, COMPILED, OURS) if any(peer in found for found in launches.values())
        ]
        counted = {peer: [launches.get(place, {}).get(peer, 0) for place in places] for peer in peers}
        _bars(panels[0][1], names, counted, looks, "{:.0f}")
        panels[0][1].set_ylabel("launches")
        panels[0][1].set_title("Kernels, memsets and memcpys, by torch.profiler", size=10)
    return _finished(figure, title_of(result, "What a context block launches and moves"), panels[0][0])


def memory(result: Result) -> Any | None:
    """What training keeps, and takes at its peak where that was measured."""
    rows = [row for row in result["memory"] if row["model"] in NETS]
    if not rows:
        return None
    kinds = {"kept_bytes": "kept for the backward pass (accounting)"}
    if any(row["peak_bytes"] is not None for row in rows):
        kinds["peak_bytes"] = "peak of a training step (measured)"
    figure, panels = _figure(1, len(kinds), (max(5.2, 9.5 / len(kinds)), 4.6))
    places = list(dict.fromkeys((row["model"], row["input"], row["shape"][0]) for row in rows))
    alone = any(row["blocks_only"] for row in rows)
    there = {row["variant"] for row in rows} - ({BARE} if alone else set())
    variants = [variant for variant in VARIANTS if variant in there]
    names = [f"{model}\n{batch} images of\n{title.partition(',')[0]}" for model, title, batch in places]
    for panel, (kind, title) in zip(panels[0], kinds.items()):
        value = {(r["model"], r["input"], r["shape"][0], r["variant"]): r[kind] for r in rows}
        heights = {v: [(value.get((*place, v)) or 0) / 2**30 for place in places] for v in variants}
        _bars(panel, names, heights, VARIANTS, "{:.2f}")
        panel.set_ylabel("GiB")
        panel.set_title(title, size=10)
    what = (
        "Training memory of the blocks alone" if alone else "Training memory of ResNets with GC in c3 to c5"
    )
    return _finished(figure, title_of(result, what + ", float32"), panels[0][0])


def whole_models(result: Result) -> Any | None:
    """Whole models: time relative to the model as it is."""
    rows = result["models"]
    if not rows:
        return None
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = _figure(1, len(directions), (6, 1.6 + 0.55 * len(names)))
    looks = {
        PLAIN: ("as it is", *VARIANTS[PLAIN][1:]),
        BLOCK: ("blocks only", *VARIANTS[BLOCK][1:]),
        FUSED: ("accelerated", *VARIANTS[FUSED][1:]),
        BARE: ("without the blocks", *VARIANTS[BARE][1:]),
    }
    looks = {variant: look for variant, look in looks.items() if any(r["variant"] == variant for r in rows)}
    height = 0.78 / len(looks)
    for panel, direction in zip(panels[0], directions):
        value = {(r["model"], r["variant"]): r["p50_ms"] for r in rows if r["direction"] == direction}
        for k, (variant, (label, colour, hatch)) in enumerate(looks.items()):
            there = [i for i, name in enumerate(names) if (name, variant) in value and (name, PLAIN) in value]
            widths = [100 * value[names[i], variant] / value[names[i], PLAIN] for i in there]
            places = [i + (k - (len(looks) - 1) / 2) * height for i in there]
            bars = panel.barh(
                places, widths, height, label=label, color=colour, hatch=hatch,
                edgecolor="black", linewidth=0.6,
            )  # fmt: skip
            texts = [f" {value[names[i], variant]:.1f} ms" for i in there]
            panel.bar_label(bars, texts, size=7)
        panel.set_yticks(range(len(names)), names, size=8)
        panel.invert_yaxis()
        panel.set_xlabel("% of the time as it is")
        panel.set_title(direction, size=10)
    right = max(panel.get_xlim()[1] for panel in panels[0])
    for panel in panels[0]:
        panel.set_xlim(0, 1.2 * right)  # room for the numbers
    for panel in panels[0][1:]:
        panel.set_yticklabels([])
    first = rows[0]
    what = (
        f"Whole models: batch {first['batch']}, {first['size']}×{first['size']}, {first['layout']}, float32"
    )
    return _finished(figure, title_of(result, what), panels[0][0])


def _figure(lines: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wide, high = size
    return pyplot.subplots(
        lines, columns, figsize=(wide * columns, high * lines), squeeze=False, layout="constrained", **options
    )


def _panels(found: list[Any], sharex: bool) -> tuple[Any, Any, list[tuple[str, str]]]:
    """A panel for each direction (down) and layout (across)."""
    directions, layouts = (
        list(dict.fromkeys(getattr(s, name) for s in found)) for name in ("direction", "layout")
    )
    wide = max(5.2, 1.15 * len({s.map for s in found}))
    figure, panels = _figure(
        len(directions), len(layouts), (wide, 3.6), sharex=sharex, sharey="row" if sharex else False
    )
    return figure, panels, list(itertools.product(directions, layouts))


def _bars(
    panel: Any,
    names: list[str],
    heights: dict[str, list[float]],
    looks: dict[str, tuple[str, str, str]],
    form: str,
) -> None:
    """Groups of bars, side by side, each with its number on top."""
    width = 0.8 / max(len(heights), 1)
    for k, (kind, values) in enumerate(heights.items()):
        label, colour, hatch = looks[kind]
        at = [i + (k - (len(heights) - 1) / 2) * width for i in range(len(names))]
        bars = panel.bar(
            at, values, width, label=label, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6
        )
        panel.bar_label(bars, [form.format(value) if value else "" for value in values], size=7, padding=1)
    panel.set_xticks(range(len(names)), names, size=8)
    panel.margins(y=0.12)
    panel.set_axisbelow(True)
    panel.grid(axis="y", alpha=0.3)


def _finished(figure: Any, title: str, panel: Any) -> Any:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(title, size=11)
    return figure


def drawings(result: Result) -> dict[str, Callable[[], Any | None]]:
    """By the end of the file's name."""
    caches = list(dict.fromkeys(sample["cache"] for sample in result["samples"]))
    found: dict[str, Callable[[], Any | None]] = {}
    for cache in sorted(caches):
        found[f"times-{cache}"] = lambda cache=cache: times(result, cache)
        found[f"share-{cache}"] = lambda cache=cache: shares(result, cache)
    return {
        **found,
        "passes": lambda: passes(result),
        "memory": lambda: memory(result),
        "models": lambda: whole_models(result),
    }


def draw(result: Result, folder: Path, stem: str) -> dict[str, Path]:
    """Writes the pictures that the result has data for. Without matplotlib there are none."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return {}
    written = {}
    for name, make in drawings(result).items():
        figure = make()
        if figure is not None:
            written[name] = folder / f"{stem}-{name}.png"
            figure.savefig(written[name], dpi=110)
            pyplot.close(figure)
    return written
